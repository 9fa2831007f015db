"""The artefact directory: what is in it, and that it is whole. How it is written and replaced is in `publish.py`.

A bundle holds `engine.plan` (where one was built), `model.onnx` and `model.onnx.data`, `tokenizer.json` and
`manifest.json`, which names every other file with its size and SHA-256 and carries its own. Nothing in it is executed
or unpickled before these fit; signing is left to tools made for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from nvembed_deploy.architecture import ModelConfig
from nvembed_deploy.config import Dialect, Precision, ShapeProfile
from nvembed_deploy.errors import BundleError
from nvembed_deploy.parity import ParityReport
from nvembed_deploy.records import from_json, to_json
from nvembed_deploy.text import TextContract

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
PLAN = "engine.plan"
GRAPH = "model.onnx"
CPU_GRAPH = "model.cpu.onnx"
"""Beside a graph in BF16 or a quantized one: the same weights, with the arithmetic that CPUs have."""
WEIGHTS = "model.onnx.data"
TOKENIZER = "tokenizer.json"
QUANTIZATION = "quantization.json"
"""In a quantized bundle: what was calibrated on what, each layer's cost, and what was left in the base precision."""
QUANTIZATION_PICTURE = "quantization.png"
TRUTH = "truth.npz"
"""What the reference makes of the probes (`probes.py`), so that any machine can judge its engine."""
PAYLOAD = frozenset((PLAN, GRAPH, CPU_GRAPH, WEIGHTS, TOKENIZER, QUANTIZATION, QUANTIZATION_PICTURE, TRUTH))
REQUIRED = frozenset((GRAPH, WEIGHTS, TOKENIZER))

MANIFEST_MAX_BYTES = 16 * 2**20
OPEN_ATTEMPTS = 20
_SELF_HASH = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"')
_ZEROS = b"0" * 64
_CHUNK_BYTES = 2**24
"""Large: between two blocks a hashing thread asks for the interpreter, and a busy one makes it wait."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a file must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights came from."""

    name: str
    """Folder or hub name as the user gave it, without the machine's path."""
    revision: str | None
    """Commit of the hub repository; None for a local folder."""
    files: dict[str, FileEntry]
    architecture: ModelConfig


@dataclass(frozen=True, kw_only=True)
class PlanInfo:
    """What `engine.plan` needs to run."""

    runtime: str
    """Python module of the runtime: `tensorrt` or `tensorrt_rtx`."""
    version: str
    """The runtime that built it; a plan loads in exactly this version."""
    platform: str
    """Operating system and processor, such as `linux_x86_64`."""
    compute_capabilities: tuple[str, ...]
    """GPUs it runs on, such as `8.9`."""
    profiles: tuple[ShapeProfile, ...]
    """Shapes that kernels were chosen for; the first holds all others."""
    stripped: bool = False
    """True where the plan holds no weights: they are put in from the graph's file when it is loaded."""
    weight_streaming: bool = False
    """True where weights may stay in the host's memory."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that a bundle says of itself; `manifest.json`."""

    format_version: int
    manifest_sha256: str
    created: str
    """ISO 8601, UTC."""
    tool_version: str
    source: Source
    target: str
    """The recipe it was made by, or for."""
    precision: Precision
    dialect: Dialect
    opset: int
    pooling: str
    folded: bool
    fp32_modules: tuple[str, ...]
    """Modules that compute in FP32 although the rest does not: their values come near FP16's limit."""
    dimension: int
    text: TextContract
    profile: ShapeProfile
    plan: PlanInfo | None
    parity: tuple[ParityReport, ...]
    versions: dict[str, str]
    referenced: tuple[str, ...]
    """Files of the checkpoint that the graph reads its weights from; hard links to them stand in the bundle."""
    files: dict[str, FileEntry]

    def to_bytes(self) -> bytes:
        """The file's content, with its own hash filled in."""
        record = to_json(replace(self, manifest_sha256=_ZEROS.decode()))
        content = (json.dumps(record, indent=1, ensure_ascii=True) + "\n").encode()
        return content.replace(_ZEROS, hashlib.sha256(content).hexdigest().encode(), 1)

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest:
        """Reads the file's content.

        Raises:
            BundleError: It is damaged, of another version, or says something that cannot be.
        """
        cure = "make the bundle again, or copy it again from where it came"
        found = _SELF_HASH.findall(content)
        if len(found) != 1:
            raise BundleError(f"{MANIFEST} is damaged (it does not carry its own hash); {cure}")
        if hashlib.sha256(content.replace(found[0], _ZEROS, 1)).hexdigest().encode() != found[0]:
            raise BundleError(f"{MANIFEST} is damaged (its own hash does not fit); {cure}")
        try:
            record = json.loads(content)
            version = record.get("format_version") if isinstance(record, dict) else None
            if version != FORMAT_VERSION:
                raise BundleError(
                    f"{MANIFEST} has format version {version!r}, this library reads {FORMAT_VERSION}; make the bundle "
                    "again with this version of nvembed-deploy"
                )
            manifest = from_json(cls, record)
        except (ValueError, RecursionError) as err:  # ConfigError is a ValueError
            raise BundleError(f"{MANIFEST} cannot be used ({err}); {cure}") from err
        manifest._check_files()
        manifest._check_model()
        return manifest

    def _check_files(self) -> None:
        names = self.files.keys()
        if missing := sorted(REQUIRED - names):
            raise BundleError(f"{MANIFEST} does not list {missing[0]}; make the bundle again")
        if missing := sorted(set(self.referenced) - names):
            raise BundleError(f"{MANIFEST} does not list {missing[0]}; make the bundle again")
        if wrong := [name for name in self.referenced if not is_shard_name(name)]:
            raise BundleError(f"{MANIFEST} refers to {wrong[0]!r}, which is no safetensors file; make the bundle again")
        if unknown := sorted(names - PAYLOAD - set(self.referenced)):
            raise BundleError(f"{MANIFEST} lists {unknown[0]!r}, which is no file of a bundle; make the bundle again")
        for name, expected in (
            (PLAN, self.plan is not None),
            (CPU_GRAPH, self.precision.has_cpu_graph),
            (QUANTIZATION, self.precision.quantized),
            (TRUTH, bool(self.parity)),
        ):
            if (name in names) != expected:
                raise BundleError(f"{MANIFEST} is of two minds about {name}; make the bundle again")

    def _check_model(self) -> None:
        model = self.source.architecture
        if self.dimension != model.hidden_size:
            raise BundleError(
                f"{MANIFEST} gives the vectors {self.dimension} dimensions and the model {model.hidden_size}; make the "
                "bundle again"
            )
        for token in (*self.text.prefix_ids, *self.text.suffix_ids, self.text.pad_id):
            if not 0 <= token < model.vocab_size:
                raise BundleError(
                    f"{MANIFEST} has token id {token}, the embedding table {model.vocab_size} rows; make the bundle "
                    "again"
                )


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files have been checked against the manifest."""

    folder: Path
    manifest: Manifest
    stamps: dict[str, tuple[int, ...]]
    """Identity of each file when it was checked."""

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Opens and checks a bundle.

        Args:
            path: The folder, or one of the files in it (`engine.plan`, `model.onnx`).

        Raises:
            BundleError: A file is missing, extra, a link, damaged, or not a bundle's; its name is in the message.
        """
        folder = bundle_folder(path)
        for attempt in range(OPEN_ATTEMPTS):
            before = _stamp_or_none(folder / MANIFEST)
            try:
                return cls._open_once(folder)
            except BundleError:
                # A new generation may have been switched in while this one was being read.
                if before == _stamp_or_none(folder / MANIFEST) or attempt == OPEN_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    @classmethod
    def _open_once(cls, folder: Path) -> Bundle:
        stamps = {MANIFEST: _stamp(folder / MANIFEST)}
        if stamps[MANIFEST][_SIZE] > MANIFEST_MAX_BYTES:
            raise BundleError(f"{folder / MANIFEST} is too large to be a manifest; make the bundle again")
        try:
            manifest = Manifest.from_bytes(_read(folder / MANIFEST))
        except BundleError as err:
            raise BundleError(f"{folder}: {err}") from err
        present = _names(folder)
        expected = {MANIFEST, *manifest.files}
        if missing := sorted(expected - present):
            raise BundleError(f"{folder / missing[0]} is missing; make the bundle again, or copy it whole")
        if extra := sorted(present - expected):
            raise BundleError(f"{folder / extra[0]} is not part of the bundle; move it elsewhere")
        for name, entry in manifest.files.items():
            stamps[name] = _stamp(folder / name, linked=name in manifest.referenced)
            if stamps[name][_SIZE] != entry.bytes:
                raise _damaged(folder / name, f"{stamps[name][_SIZE]} bytes, expected {entry.bytes}")
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
            found = pool.map(lambda name: hash_file(folder / name), manifest.files)
            for (name, entry), digest in zip(manifest.files.items(), found, strict=True):
                if digest.sha256 != entry.sha256:
                    raise _damaged(folder / name, "its SHA-256 does not fit the manifest")
        bundle = cls(folder, manifest, stamps)
        if not bundle.is_current():
            raise BundleError(f"{folder} changed while it was being read; open it again")
        return bundle

    def is_current(self) -> bool:
        """True if the files on disk are still the ones that were checked."""
        linked = self.manifest.referenced
        return all(
            _stamp_or_none(self.folder / name, linked=name in linked) == stamp for name, stamp in self.stamps.items()
        )

    def read(self, name: str) -> bytes:
        """Content of a file, checked again, so that the bytes used are the bytes that were hashed.

        Raises:
            BundleError: The file changed since the bundle was opened.
        """
        content = _read(self.folder / name)
        if hashlib.sha256(content).hexdigest() != self.manifest.files[name].sha256:
            raise _damaged(self.folder / name, "its SHA-256 does not fit the manifest")
        return content


def bundle_folder(path: str | Path) -> Path:
    """The bundle's folder for a path to it or into it.

    Raises:
        BundleError: There is no such path, or no manifest.
    """
    path = Path(path)
    try:
        exists = path.exists()
    except OSError as err:  # no permission, or a name that is too long
        raise BundleError(f"{path} cannot be read ({err.strerror}); check the path") from err
    if not exists:
        raise BundleError(f"{path} does not exist; make a bundle: python -m export.trt --precision fp16 --out FOLDER")
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.name not in (PLAN, GRAPH, MANIFEST):
        raise BundleError(f"{path} is not a bundle; pass its folder, its {PLAN} or its {GRAPH}")
    if not os.path.lexists(folder / MANIFEST):
        raise BundleError(
            f"{folder} has no {MANIFEST}, so nothing says how to run what is in it; make a bundle: "
            "python -m export.trt --precision fp16 --out FOLDER"
        )
    return folder.resolve()


def hash_file(path: Path, *, before: Callable[[Path, int], None] | None = None) -> FileEntry:
    """Size and SHA-256 of a file.

    Args:
        path: The file.
        before: Called with the file and the offset before each chunk is read.
    """
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while True:
                if before is not None:
                    before(path, size)
                if not (count := file.readinto(buffer)):
                    break
                digest.update(buffer[:count])
                size += count
    except OSError as err:
        raise BundleError(f"{path} cannot be read ({err.strerror}); copy the bundle again") from err
    return FileEntry(bytes=size, sha256=digest.hexdigest())


_SIZE = 2


def is_shard_name(name: str) -> bool:
    """True for the plain name of a safetensors file."""
    return Path(name).name == name and name.endswith(".safetensors")


def _stamp(path: Path, *, linked: bool = False) -> tuple[int, ...]:
    """Identity of a regular file that nothing else links to, unless it is `linked` on purpose."""
    try:
        status = path.lstat()
    except OSError as err:
        raise BundleError(f"{path} is missing ({err.strerror}); make the bundle again, or copy it whole") from err
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is a link, a folder or a device, not a file; copy the bundle with its files")
    if status.st_nlink > 1 and not linked:
        raise BundleError(f"{path} is a hard link, so its content can change elsewhere; copy the file instead")
    # Linking a file once more changes its ctime and nothing else.
    changed = 0 if linked else status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, changed


def _stamp_or_none(path: Path, *, linked: bool = False) -> tuple[int, ...] | None:
    try:
        return _stamp(path, linked=linked)
    except BundleError:
        return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise BundleError(f"{path} cannot be read ({err.strerror}); copy the bundle again") from err


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except OSError as err:
        raise BundleError(f"{folder} cannot be read ({err.strerror}); make the bundle again, or copy it whole") from err


def _damaged(path: Path, how: str) -> BundleError:
    return BundleError(f"{path} is damaged ({how}); make the bundle again, or copy it again from where it came")
