"""The manifest of a bundle: its files, their hashes, and everything that running the model needs to know.

A bundle holds `engine.plan` (if one was built), `model.onnx` and `model.onnx.data`, `tokenizer.json`, the two files
that sentence-transformers reads (`module_files.py`) and `manifest.json`, which lists every other file with its size and
SHA-256 and contains its own hash. Nothing in a bundle is executed or unpickled before these match; signing is left to
dedicated tools. `writer.py` writes bundles.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nvembed_deploy.backends.bindings import RUNTIMES
from nvembed_deploy.bundle.parity_report import ParityReport
from nvembed_deploy.bundle.vector_kinds import MEASURED_KINDS, VectorKinds
from nvembed_deploy.console import program
from nvembed_deploy.errors import BundleError
from nvembed_deploy.files.hashing import FileEntry
from nvembed_deploy.files.records import from_json, parse_json, to_json
from nvembed_deploy.model.config import ModelConfig, Pooling
from nvembed_deploy.spec import MAX_ELEMENTS, Dialect, Precision, ShapeProfile
from nvembed_deploy.tokenization import TextContract
from nvembed_deploy.vectors import INT8_MAX

FORMAT_VERSION = 6
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
MODULES = "modules.json"
"""The modules that sentence-transformers loads: one, our own."""
SETTINGS = "config_sentence_transformers.json"
"""The prompts and the similarity function, as sentence-transformers reads them."""
REQUIRED = frozenset((GRAPH, WEIGHTS, TOKENIZER, MODULES, SETTINGS))
PAYLOAD = REQUIRED | {PLAN, CPU_GRAPH, QUANTIZATION, QUANTIZATION_PICTURE, REFERENCE_OUTPUTS}
FORMER_PAYLOAD = frozenset(("truth.npz",))
"""Files of earlier format versions: they are not read, but an export may replace a bundle that has them."""

POOLING = {
    Pooling.LATENT: "latent attention, masked mean, L2",
    Pooling.MEAN: "masked mean, L2",
    Pooling.LAST: "last token, L2",
}
"""Description of each pooling, for readers of `manifest.json`."""
MAX_COSINE = 1 + 1e-6
"""Cosines are rounded, and may be above 1 by that."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMPUTE_CAPABILITY = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}")
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
    vectors: VectorKinds | None
    """Costs of smaller number formats of vectors; None if they were not measured, so that they are not offered."""
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
            record = parse_json(content)
            version = record.get("format_version") if isinstance(record, dict) else None
            if version != FORMAT_VERSION:
                raise BundleError(
                    f"{MANIFEST} has format version {version!r:.60}, and this version of nvembed-deploy reads "
                    f"format version {FORMAT_VERSION}; export the bundle again: {program('export')} --out FOLDER"
                )
            manifest = from_json(cls, record)
        except (ValueError, RecursionError) as err:  # ConfigError is a ValueError
            raise BundleError(f"{MANIFEST} is invalid ({err}); {cure}") from err
        manifest._check_files()
        for problem in manifest._contradictions():
            raise BundleError(f"{MANIFEST} is inconsistent: {problem}; export the bundle again")
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

    def _contradictions(self) -> Iterator[str]:
        """Yields what cannot be: values that no bundle has, and fields that contradict each other."""
        yield from _bad_entries("files", self.files)
        yield from _bad_entries("source.files", self.source.files)
        for name in self.referenced:
            if self.source.files.get(name) != self.files[name]:
                yield f"{name} is linked from the checkpoint, whose files do not include it"
        yield from self._text_contradictions()
        yield from _impossible_sizes(self.source.architecture)
        yield from self._graph_contradictions()
        if self.plan is not None:
            yield from self._plan_contradictions(self.plan)
        for report in self.parity:
            yield from self._report_contradictions(report)
        if self.vectors is not None:
            yield from _impossible_kinds(self.vectors)

    def _text_contradictions(self) -> Iterator[str]:
        model, text = self.source.architecture, self.text
        for token in (*text.prefix_ids, *text.suffix_ids, text.pad_id):
            if not 0 <= token < model.vocab_size:
                yield f"it has token id {token}, and the embedding table has {model.vocab_size} rows"
        if not 1 <= text.max_tokens <= model.max_positions:
            yield f"texts have up to {text.max_tokens} tokens, and the model {model.max_positions} positions"
        if self.profile.max.tokens > text.max_tokens:
            yield f"the shapes go up to {self.profile.max}, and texts have up to {text.max_tokens} tokens"
        if text.mask_prompt != model.mask_instruction:
            yield "text and model disagree on whether the prompt is pooled"
        if text.pool_last != (model.pooling is Pooling.LAST):
            yield "text and model disagree on whether the last token is pooled"

    def _graph_contradictions(self) -> Iterator[str]:
        model = self.source.architecture
        if self.dimension != model.hidden_size:
            yield f"the vectors have {self.dimension} dimensions and the model has {model.hidden_size}"
        if self.opset != (opset := self.dialect.opset_for(self.precision)):
            yield f"the graph has opset {self.opset}, and the {self.dialect.value} dialect has {opset}"
        if self.pooling != POOLING[model.pooling]:
            yield f"the pooling is {self.pooling[:60]!r}, and the model's is {POOLING[model.pooling]!r}"
        if self.folded and model.latent is None:
            yield "the latent attention is folded, and the model has none"
        if self.fp32_modules and self.precision.base is not Precision.FP16:
            yield f"{self.fp32_modules[0]!r} is in FP32 for FP16's limit, and the precision is {self.precision.value}"

    def _plan_contradictions(self, plan: PlanInfo) -> Iterator[str]:
        if plan.runtime not in RUNTIMES:
            yield f"the plan is for {plan.runtime[:60]!r}, and runtimes are {' and '.join(RUNTIMES)}"
        if not plan.compute_capabilities or not all(map(_COMPUTE_CAPABILITY.fullmatch, plan.compute_capabilities)):
            yield f"the plan's compute capabilities are {str(list(plan.compute_capabilities))[:60]}"
        if plan.profiles[:1] != (self.profile,):
            yield f"the plan's first profile is not that of the bundle, {self.profile}"
        for profile in plan.profiles[1:]:
            if not self.profile.contains(profile):
                yield f"the plan's profile {profile} is not within {self.profile}"

    def _report_contradictions(self, report: ParityReport) -> Iterator[str]:
        if report.precision is not self.precision:
            yield f"{report.candidate!r} was compared as {report.precision.value}, and is {self.precision.value}"
        if report.failures:
            yield f"{report.candidate!r} did not pass the comparison, and no bundle is written then"
        if report.texts < 1 or report.longest_tokens < 1 or report.non_finite_rows:
            yield f"{report.candidate!r} was compared on {report.texts} texts, {report.non_finite_rows} not finite"
        cosines = (report.min_cosine, report.mean_cosine, report.min_batch_cosine)
        if max(map(abs, cosines)) > MAX_COSINE or not 0 <= (report.overlap or 0.0) <= 1:
            yield f"the cosines or the overlap of {report.candidate!r} are out of range"
        if min(report.max_difference, report.max_scaled_difference) < 0:
            yield f"the difference of {report.candidate!r} is below 0"


def _impossible_kinds(kinds: VectorKinds) -> Iterator[str]:
    if set(kinds.losses) != MEASURED_KINDS:
        yield f"vectors were measured as {str(sorted(kinds.losses))[:120]}, not as {sorted(MEASURED_KINDS)}"
    if not 0 < kinds.int8_step <= 1 / INT8_MAX:
        yield f"the step of int8 vectors is {kinds.int8_step}, and no component is above 1"
    if min(kinds.queries, kinds.passages) < 1:
        yield f"vectors were measured on {kinds.queries} queries and {kinds.passages} passages"
    for name, loss in kinds.losses.items():
        if not (0 <= loss.overlap <= 1 and 0 <= loss.ndcg_share < math.inf):
            yield f"the overlap or nDCG of {name[:60]!r} vectors is out of range"


def _bad_entries(field: str, files: Mapping[str, FileEntry]) -> Iterator[str]:
    for name, entry in files.items():
        if entry.bytes < 0 or not _SHA256.fullmatch(entry.sha256):
            yield f"{field} has {name[:60]!r} with {entry.bytes} bytes and SHA-256 {entry.sha256[:64]!r}"


def _impossible_sizes(model: ModelConfig) -> Iterator[str]:
    """Yields the sizes of an architecture that no tensor has; `ModelConfig` itself refuses most."""
    sizes = {
        name: getattr(model, name)
        for name in ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim", "vocab_size")
    } | {"max_positions": model.max_positions}
    if model.latent is not None:
        sizes |= {f"latent.{name}": size for name, size in vars(model.latent).items()}
    if model.matryoshka is not None:
        # Dimensions of a family; a small model of it may have fewer.
        sizes["matryoshka.min_dim"] = model.matryoshka.min_dim
        sizes |= {f"matryoshka.dims[{index}]": dim for index, dim in enumerate(model.matryoshka.dims)}
    for name, size in sizes.items():
        if not 1 <= size <= MAX_ELEMENTS:
            yield f"the model's {name} is {size}"


def is_shard_name(name: str) -> bool:
    """Returns True for the name of a safetensors file that has no folder in it."""
    return Path(name).name == name and name.endswith(".safetensors") and name.isprintable()
