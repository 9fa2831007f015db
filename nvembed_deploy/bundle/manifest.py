"""The manifest of a bundle: its files, their hashes, and everything that running the model needs to know.

A bundle holds `engine.plan` (if one was built), `model.onnx` and `model.onnx.data`, `tokenizer.json` and
`manifest.json`, which lists every other file with its size and SHA-256 and contains its own hash. Nothing in a bundle
is executed or unpickled before these match; signing is left to dedicated tools. `writer.py` writes bundles.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from nvembed_deploy.bundle.parity_report import ParityReport
from nvembed_deploy.console import program
from nvembed_deploy.errors import BundleError
from nvembed_deploy.files.hashing import FileEntry
from nvembed_deploy.files.records import from_json, to_json
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.spec import Dialect, Precision, ShapeProfile
from nvembed_deploy.tokenization import TextContract

FORMAT_VERSION = 5
MANIFEST = "manifest.json"
PLAN = "engine.plan"
GRAPH = "model.onnx"
CPU_GRAPH = "model.cpu.onnx"
"""Graph for CPUs, in BF16 and quantized bundles: the same weights, with operators that CPUs have kernels for."""
WEIGHTS = "model.onnx.data"
TOKENIZER = "tokenizer.json"
QUANTIZATION = "quantization.json"
"""Record of a quantization: calibration texts, sensitivity of each layer, and layers left in the base precision."""
QUANTIZATION_PICTURE = "quantization.png"
REFERENCE_OUTPUTS = "reference.npz"
"""The reference model's vectors of the probes (`probes.py`), with which any machine can check its engine."""
PAYLOAD = frozenset((PLAN, GRAPH, CPU_GRAPH, WEIGHTS, TOKENIZER, QUANTIZATION, QUANTIZATION_PICTURE, REFERENCE_OUTPUTS))
REQUIRED = frozenset((GRAPH, WEIGHTS, TOKENIZER))
FORMER_PAYLOAD = frozenset(("truth.npz",))
"""Files of earlier format versions: they are not read, but an export may replace a bundle that has them."""

_SELF_HASH = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"')
_ZEROS = b"0" * 64
_CHECKPOINT_FILE = re.compile(r"(\d+_[A-Za-z]+/)?[a-z][a-z_]*\.json")
"""Names such as `config.json` and `1_Pooling/config.json`."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The checkpoint that the weights come from."""

    name: str
    """Folder or hub name as the user gave it, without the parent path."""
    revision: str | None
    """Commit of the hub repository; None for a local folder."""
    files: dict[str, FileEntry]
    architecture: ModelConfig


@dataclass(frozen=True, kw_only=True)
class PlanInfo:
    """Requirements of `engine.plan`: runtime, platform, GPUs and shapes."""

    runtime: str
    """Python module of the runtime: `tensorrt` or `tensorrt_rtx`."""
    version: str
    """Version of the runtime that built the plan, and the only one that loads it."""
    platform: str
    """Operating system and processor, such as `linux_x86_64`."""
    compute_capabilities: tuple[str, ...]
    """Compute capabilities of the GPUs that it runs on, such as `8.9`."""
    profiles: tuple[ShapeProfile, ...]
    """Optimization profiles; the first contains all others."""
    stripped: bool = False
    """True if the plan has no weights of its own; they are read from the graph's weight file when it is loaded."""
    weight_streaming: bool = False
    """True if weights may stay in host memory and be streamed to the GPU."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of `manifest.json`."""

    format_version: int
    manifest_sha256: str
    created: str
    """ISO 8601, UTC."""
    tool_version: str
    source: Source
    target: str
    """Name of the target that the bundle was exported or built for."""
    precision: Precision
    dialect: Dialect
    opset: int
    pooling: str
    folded: bool
    fp32_modules: tuple[str, ...]
    """Modules that compute in FP32 although the others do not, because their values come near the limit of FP16."""
    dimension: int
    text: TextContract
    profile: ShapeProfile
    plan: PlanInfo | None
    parity: tuple[ParityReport, ...]
    versions: dict[str, str]
    referenced: tuple[str, ...]
    """Checkpoint files that the graph reads weights from; the bundle contains hard links to them."""
    files: dict[str, FileEntry]
    checkpoint_files: tuple[str, ...]
    """Files of the checkpoint in whose folder the bundle is, besides its weights and its tokenizer: the embedded model
    is a checkpoint and a bundle in one."""

    @property
    def graph_files(self) -> dict[str, FileEntry]:
        """The files that make a bundle elsewhere: all but the plan and the checkpoint's own."""
        return {name: entry for name, entry in self.files.items() if name != PLAN and name not in self.checkpoint_files}

    def to_bytes(self) -> bytes:
        """Serializes the manifest and fills in its own hash."""
        record = to_json(replace(self, manifest_sha256=_ZEROS.decode()))
        content = (json.dumps(record, indent=1, ensure_ascii=True) + "\n").encode()
        return content.replace(_ZEROS, hashlib.sha256(content).hexdigest().encode(), 1)

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest:
        """Parses and validates the content of `manifest.json`.

        Raises:
            BundleError: The content is damaged, inconsistent, or of another format version.
        """
        cure = "export the bundle again, or copy it again from its source"
        self_hashes = _SELF_HASH.findall(content)
        if len(self_hashes) != 1:
            raise BundleError(f"{MANIFEST} is damaged (its own hash is missing); {cure}")
        if hashlib.sha256(content.replace(self_hashes[0], _ZEROS, 1)).hexdigest().encode() != self_hashes[0]:
            raise BundleError(f"{MANIFEST} is damaged (its own hash does not match); {cure}")
        try:
            record = json.loads(content)
            version = record.get("format_version") if isinstance(record, dict) else None
            if version != FORMAT_VERSION:
                raise BundleError(
                    f"{MANIFEST} has format version {version!r}, and this version of nvembed-deploy reads format "
                    f"version {FORMAT_VERSION}; export the bundle again: {program('export')} --out FOLDER"
                )
            manifest = from_json(cls, record)
        except (ValueError, RecursionError) as err:  # ConfigError is a ValueError
            raise BundleError(f"{MANIFEST} is invalid ({err}); {cure}") from err
        manifest._check_files()
        manifest._check_model()
        return manifest

    def _check_files(self) -> None:
        names = self.files.keys()
        if missing := sorted(REQUIRED - names):
            raise BundleError(f"{MANIFEST} does not list {missing[0]}; export the bundle again")
        if missing := sorted({*self.referenced, *self.checkpoint_files} - names):
            raise BundleError(f"{MANIFEST} does not list {missing[0]}; export the bundle again")
        if invalid := [name for name in self.referenced if not is_shard_name(name)]:
            raise BundleError(
                f"{MANIFEST} refers to {invalid[0]!r}, which is not a safetensors file; export the bundle again"
            )
        if invalid := [name for name in self.checkpoint_files if not _CHECKPOINT_FILE.fullmatch(name)]:
            raise BundleError(
                f"{MANIFEST} lists {invalid[0]!r}, which is not a file of a checkpoint; export the bundle again"
            )
        if unknown := sorted(names - PAYLOAD - set(self.referenced) - set(self.checkpoint_files)):
            raise BundleError(f"{MANIFEST} lists {unknown[0]!r}, which is not a bundle file; export the bundle again")
        for name, expected, cause in (
            (PLAN, self.plan is not None, "plan record"),
            (CPU_GRAPH, self.precision.has_cpu_graph, "precision that needs a graph for CPUs"),
            (QUANTIZATION, self.precision.quantized, "quantized precision"),
            (REFERENCE_OUTPUTS, bool(self.parity), "parity report"),
        ):
            if (name in names) != expected:
                mismatch = f"is not listed but has a {cause}" if expected else f"is listed but has no {cause}"
                raise BundleError(f"{MANIFEST} is inconsistent: {name} {mismatch}; export the bundle again")

    def _check_model(self) -> None:
        model = self.source.architecture
        if self.dimension != model.hidden_size:
            raise BundleError(
                f"{MANIFEST} is inconsistent: the vectors have {self.dimension} dimensions and the model has "
                f"{model.hidden_size}; export the bundle again"
            )
        for token in (*self.text.prefix_ids, *self.text.suffix_ids, self.text.pad_id):
            if not 0 <= token < model.vocab_size:
                raise BundleError(
                    f"{MANIFEST} is inconsistent: it has token id {token}, and the embedding table has "
                    f"{model.vocab_size} rows; export the bundle again"
                )


def is_shard_name(name: str) -> bool:
    """Returns True for the name of a safetensors file that has no folder in it."""
    return Path(name).name == name and name.endswith(".safetensors")
