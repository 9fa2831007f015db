"""The artefact directory: what is in it, and that it is whole. `writer.py` writes and replaces it.

A bundle holds `engine.plan` (where one was built), `model.onnx` and `model.onnx.data`, `tokenizer.json` and
`manifest.json`, which names every other file with its size and SHA-256 and carries its own. Nothing in it is executed
or unpickled before these fit; signing is left to tools made for it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from nvembed_deploy.bundle.parity_report import ParityReport
from nvembed_deploy.errors import BundleError
from nvembed_deploy.files.hashing import FileEntry
from nvembed_deploy.files.records import from_json, to_json
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.spec import Dialect, Precision, ShapeProfile
from nvembed_deploy.tokenization import TextContract

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

_SELF_HASH = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"')
_ZEROS = b"0" * 64


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


def is_shard_name(name: str) -> bool:
    """True for the plain name of a safetensors file."""
    return Path(name).name == name and name.endswith(".safetensors")
