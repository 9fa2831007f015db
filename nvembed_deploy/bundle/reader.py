"""Opening a bundle: every file is checked against the manifest before it is used."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nvembed_deploy.bundle.manifest import GRAPH, MANIFEST, PAYLOAD, PLAN, Manifest
from nvembed_deploy.console import program
from nvembed_deploy.errors import BundleError
from nvembed_deploy.files.hashing import hash_file
from nvembed_deploy.files.hub import download, is_hub_name
from nvembed_deploy.model.config_json import CONFIG_JSON

IGNORED_NAMES = frozenset(
    (".cache", ".git", ".gitattributes", ".gitignore", ".DS_Store", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")
)
"""Files and folders that may be in the folder of a bundle, because tools for sharing models put them there."""
HUB_FILES = (MANIFEST, *sorted(PAYLOAD), "*.safetensors")
MANIFEST_MAX_BYTES = 16 * 2**20
OPEN_ATTEMPTS = 20
"""A bundle that is replaced while it is being opened is opened again, up to this number of times."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files have been checked against the manifest."""

    folder: Path
    manifest: Manifest
    stamps: dict[str, tuple[int, ...]]
    """Device, inode, size and times of each file when it was checked."""

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Opens a bundle and checks all of its files.

        Args:
            path: The folder, or one of the files in it (`engine.plan`, `model.onnx`).

        Raises:
            BundleError: A file is missing, unexpected or damaged; the message names it.
        """
        folder = bundle_folder(path)
        for attempt in range(OPEN_ATTEMPTS):
            stamp_before = _stamp_or_none(folder / MANIFEST)
            try:
                return cls._open_once(folder)
            except BundleError:
                # The bundle may have been replaced while it was being read.
                if stamp_before == _stamp_or_none(folder / MANIFEST) or attempt == OPEN_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    @classmethod
    def _open_once(cls, folder: Path) -> Bundle:
        stamps = {MANIFEST: _stamp(folder / MANIFEST)}
        if stamps[MANIFEST][_SIZE] > MANIFEST_MAX_BYTES:
            raise BundleError(f"{folder / MANIFEST} is too large to be a manifest; export the bundle again")
        try:
            manifest = Manifest.from_bytes(_read(folder / MANIFEST))
        except BundleError as err:
            raise BundleError(f"{folder}: {err}") from err
        _require_these_files(folder, {MANIFEST, *manifest.files})
        for name, entry in manifest.files.items():
            stamps[name] = _stamp(folder / name)
            if stamps[name][_SIZE] != entry.bytes:
                raise _damaged(folder / name, f"{stamps[name][_SIZE]} bytes, expected {entry.bytes}")
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
            digests = pool.map(lambda name: hash_file(folder / name), manifest.files)
            for (name, entry), digest in zip(manifest.files.items(), digests, strict=True):
                if digest.sha256 != entry.sha256:
                    raise _damaged(folder / name, "its SHA-256 does not match the manifest")
        bundle = cls(folder, manifest, stamps)
        if not bundle.is_current():
            raise BundleError(f"{folder} changed while it was being read; try again")
        return bundle

    def is_current(self) -> bool:
        """Returns True if the files on disk are still the ones that were checked."""
        return all(_stamp_or_none(self.folder / name) == stamp for name, stamp in self.stamps.items())

    def read(self, name: str) -> bytes:
        """Returns the content of a file after checking its hash again, so that the bytes used are the bytes checked.

        Raises:
            BundleError: The file changed since the bundle was opened.
        """
        content = _read(self.folder / name)
        if hashlib.sha256(content).hexdigest() != self.manifest.files[name].sha256:
            raise _damaged(self.folder / name, "its SHA-256 does not match the manifest")
        return content


def bundle_folder(path: str | Path) -> Path:
    """Returns the folder of a bundle, given the folder, a file in it, or the name of a hub repository.

    Raises:
        BundleError: The path does not exist, is not part of a bundle, or has no manifest; or a download failed.
        MissingExtra: A hub name is given and the hub's client is not installed.
    """
    if not os.path.lexists(path) and is_hub_name(str(path)):
        path = download(str(path), None, HUB_FILES)
    path = Path(path)
    try:
        exists = path.exists()
    except OSError as err:  # no permission, or a name that is too long
        raise BundleError(f"{path} cannot be read ({err.strerror}); check the path") from err
    if not exists and path.name == PLAN and (path.parent / MANIFEST).is_file():
        raise BundleError(
            f"{path.parent} has no {PLAN}; build one: {program('build')} {path.parent}, or pass the folder: its graph "
            "runs on ONNX Runtime"
        )
    if not exists:
        raise BundleError(f"{path} does not exist; check the path{_export_command()}")
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.name not in (PLAN, GRAPH, MANIFEST):
        raise BundleError(f"{path} is not a bundle; pass a bundle's folder, or the {PLAN} or {GRAPH} in it")
    if not os.path.lexists(folder / MANIFEST):
        if (folder / CONFIG_JSON).is_file():
            raise BundleError(f"{folder} is a checkpoint, not a bundle; pass a bundle{_export_command(folder)}")
        raise BundleError(f"{folder} has no {MANIFEST}, so it is not a bundle; pass a bundle{_export_command()}")
    return folder.resolve()


def _export_command(checkpoint: Path | None = None) -> str:
    """Returns the end of a message that says how to make a bundle; empty on a device, which cannot export."""
    if importlib.util.find_spec("nvembed_deploy.export") is None:
        return ""
    return f", or export one: {program('export')} --model {checkpoint or 'CHECKPOINT'} --out FOLDER"


_SIZE = 2
_CURE = "export the bundle again, or copy all of its files again"


def _require_these_files(folder: Path, expected: set[str]) -> None:
    """Refuses a folder that lacks one of the files, or has another.

    Raises:
        BundleError: The message names the file.
    """
    subfolders = {str(Path(name).parent) for name in expected} - {"."}
    present = _names(folder)
    for subfolder in subfolders & present:
        present = present - {subfolder} | {f"{subfolder}/{name}" for name in _names(folder / subfolder)}
    if missing := sorted(expected - present):
        raise BundleError(f"{folder / missing[0]} is missing; {_CURE}")
    if extra := sorted(name for name in present - expected if not _is_ignored(name)):
        name = extra[0] if extra[0].isprintable() else repr(extra[0])
        raise BundleError(f"{folder / name} is not part of the bundle; move it to another folder")


def _is_ignored(name: str) -> bool:
    """Returns True for files and folders that are not the bundle's but may be in its folder."""
    return name in IGNORED_NAMES or name.startswith("..")  # Kubernetes keeps the content of a volume in ..data


def _stamp(path: Path) -> tuple[int, ...]:
    """Returns the device, inode, size and times of a file, or of the file that a link leads to.

    Raises:
        BundleError: It does not exist, or is not a regular file.
    """
    try:
        status = path.stat()
    except OSError as err:
        raise BundleError(f"{path} is missing ({err.strerror}); {_CURE}") from err
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is a folder or a device, not a regular file; {_CURE}")
    # Creating another hard link changes a file's ctime and nothing else.
    ctime_ns = 0 if status.st_nlink > 1 else status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, ctime_ns


def _stamp_or_none(path: Path) -> tuple[int, ...] | None:
    try:
        return _stamp(path)
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
        raise BundleError(f"{folder} cannot be read ({err.strerror}); {_CURE}") from err


def _damaged(path: Path, reason: str) -> BundleError:
    return BundleError(f"{path} is damaged ({reason}); {_CURE}")
