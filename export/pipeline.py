"""The steps of an export, from a checkpoint to a complete bundle that replaces the old one in one step."""

from __future__ import annotations

import datetime
import platform
import shutil
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nvembed_deploy.backends.base import Backend
from nvembed_deploy.backends.ort import OrtBackend
from nvembed_deploy.backends.pytorch import PyTorchBackend
from nvembed_deploy.bundle.manifest import (
    CPU_GRAPH,
    FORMAT_VERSION,
    GRAPH,
    PLAN,
    POOLING,
    REFERENCE_OUTPUTS,
    TOKENIZER,
    WEIGHTS,
    Manifest,
    PlanInfo,
    Source,
)
from nvembed_deploy.bundle.module_files import module_files
from nvembed_deploy.bundle.parity_report import ParityReport
from nvembed_deploy.bundle.vector_kinds import VectorKinds
from nvembed_deploy.bundle.writer import commit, new_bundle
from nvembed_deploy.console import detail, echo, program, step
from nvembed_deploy.engines.plan_builder import build_plan, require_quantized_plan
from nvembed_deploy.engines.targets import local_compute_capability
from nvembed_deploy.errors import MaskError, ParityError
from nvembed_deploy.export.background import run_in_background
from nvembed_deploy.export.device import ON_CPU, Placement, place
from nvembed_deploy.export.forecast import count_parameters, forecast, note_small_gpus, require_room
from nvembed_deploy.export.fp16_ranges import FP16_MAX, find_fp32_modules, measure_ranges
from nvembed_deploy.export.graph.cpu_graph import write_cpu_graph
from nvembed_deploy.export.graph.trace import trace
from nvembed_deploy.export.graph.weights import CheckpointWeights, WeightSource, require_finite_parameters
from nvembed_deploy.export.graph.write import check, describe_graph, write
from nvembed_deploy.export.layerwise import LayerwiseBackend, LayerwiseModel, folded_form
from nvembed_deploy.export.options import ExportOptions
from nvembed_deploy.export.quantization.formats import FORMATS
from nvembed_deploy.export.quantization.qdq import insert_qdq
from nvembed_deploy.export.quantization.quantized_weights import QuantizedWeights
from nvembed_deploy.export.quantization.record import (
    QuantizationRecord,
    exclude_fp32,
    exclude_next,
    nothing_to_quantize,
)
from nvembed_deploy.export.quantization.reuse import ReusedBundle
from nvembed_deploy.export.quantization.rounding import Rounding, rounding_of
from nvembed_deploy.export.quantization.step import (
    report_excluded,
    reused_bundle,
    search_or_reuse,
    weights_sha256,
    write_with_chart,
)
from nvembed_deploy.export.request import (
    Checkpoint,
    check_options,
    load_bindings,
    open_checkpoint,
    require_no_plan_lost,
)
from nvembed_deploy.export.structure import require_structure, structure_reference
from nvembed_deploy.files.hashing import FileEntry
from nvembed_deploy.files.read_ahead import ReadAhead
from nvembed_deploy.model import source
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.model.weights import weight_files
from nvembed_deploy.parity.compare import compute_reference_outputs
from nvembed_deploy.parity.gate import Gate, closeness, verdict
from nvembed_deploy.parity.probes import longest_probe, probe_rows
from nvembed_deploy.parity.vector_kinds import measure_vector_kinds
from nvembed_deploy.spec import Precision
from nvembed_deploy.system import GIB, installed_versions, peak_memory_bytes, return_large_blocks
from nvembed_deploy.tokenization import TextEncoder
from nvembed_deploy.version import __version__

ROUNDED_WEIGHTS = "rounded-weights"
"""Folder beside the bundle's files that holds GPTQ's results until the graph is written."""
STRUCTURE = "structure"
"""Folder beside the bundle's files for the graph in FP32 that is compared at FP32's bounds."""
RECORDED_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "tokenizers", "numpy")


@dataclass(kw_only=True)
class ExportState:
    """The results that the steps of an export pass on; each step describes what it sets."""

    options: ExportOptions
    checkpoint: Checkpoint
    staging: Path
    """Folder in which the bundle is written."""
    read_ahead: ReadAhead
    source: Future[Source]
    """The hashed checkpoint."""
    text: TextEncoder
    placement: Placement
    """Where PyTorch computes."""
    gate: Gate | None = None
    layerwise: LayerwiseModel | None = None
    record: QuantizationRecord | None = None
    rounding: Rounding | None = None
    """How the weights of quantized layers are rounded."""
    fp32_modules: frozenset[str] = frozenset()
    opset: int = 0
    hashes: dict[str, FileEntry] = field(default_factory=dict)
    """Files that were hashed while they were written or read."""
    reports: list[ParityReport] = field(default_factory=list)
    vectors: VectorKinds | None = None
    plan: PlanInfo | None = None


def export(options: ExportOptions) -> Manifest:
    """Exports a checkpoint to a bundle.

    Args:
        options: What to export. Without the target's TensorRT the bundle is written without a plan, and a message
            says what is missing.

    Raises:
        DeployError: A step failed; the destination is unchanged.
    """
    started = time.monotonic()
    check_options(options)
    checkpoint = open_checkpoint(options)
    bindings, no_plan_reason = (None, "") if options.onnx_only else load_bindings(options)
    if bindings is None and not options.force:
        require_no_plan_lost(options)
    needs = forecast(checkpoint.weights, options, plan=bindings is not None)
    echo(f"exporting {options.model} as {options.precision.value} to {options.out}")
    detail(f"  forecast: {needs}")
    placement = place(options.device, needs, force=options.force) if options.runs_model else ON_CPU
    if placement != ON_CPU:
        echo(f"  PyTorch computes on {placement.device}, {needs.on_device(whole=placement.whole)}")
    # Where the model does not run, the weights are read once: to be written, or to be checked if they are linked.
    streamed = () if options.runs_model else tuple(weight_files(checkpoint.folder))
    with new_bundle(options.out) as staging, ReadAhead(streamed) as read_ahead:
        require_room(needs, options.out, force=options.force)
        note_small_gpus(needs, options)
        reused = reused_bundle(options, checkpoint.weights.config)
        state = _start(options, checkpoint, staging, read_ahead, placement)
        _load_model(state)
        _quantize(state, reused)
        _search_fp16_limit(state)
        _write_passing_graphs(state)
        _measure_vector_kinds(state)
        _hash_checkpoint(state)
        if bindings is not None:
            _build_plan(state, bindings)
        manifest = commit(staging, options.out, _manifest(state), hashed=state.hashes)
    _report(manifest, options.out, no_plan_reason=no_plan_reason, seconds=time.monotonic() - started)
    return manifest


def _start(
    options: ExportOptions, checkpoint: Checkpoint, staging: Path, read_ahead: ReadAhead, placement: Placement
) -> ExportState:
    """Starts hashing the checkpoint in the background, and writes the tokenizer and the prompts."""
    folder, config = checkpoint.folder, checkpoint.weights.config
    hashing = run_in_background(
        lambda: source.describe(folder, checkpoint.name, checkpoint.revision, config, read_ahead)
    )
    tokenizer = (folder / "tokenizer.json").read_bytes()
    (staging / TOKENIZER).write_bytes(tokenizer)
    text = TextEncoder(tokenizer, checkpoint.contract)
    for file_name, content in module_files(text.prompts(None)).items():
        (staging / file_name).write_bytes(content)
    return ExportState(
        options=options,
        checkpoint=checkpoint,
        staging=staging,
        read_ahead=read_ahead,
        source=hashing,
        text=text,
        placement=placement,
    )


def _load_model(state: ExportState) -> None:
    """Sets the gate and the model: in memory if it is compared, block by block if it only runs, none otherwise."""
    options, weights = state.options, state.checkpoint.weights
    if options.runs_model:
        probe_rows(state.text, longest_probe(state.text, options.profile.max))  # refuses a --max that is too short
    device, fold = state.placement.device, options.fold
    if options.parity:
        with step("reading the checkpoint"):
            whole_on = str(device) if state.placement.whole else "cpu"
            on_device = PyTorchBackend(state.checkpoint.folder, config=weights.config, device=whole_on)
            require_finite_parameters(on_device.model)
        model = on_device.model
        reference: Backend = on_device
        if not state.placement.whole:
            reference = LayerwiseBackend(LayerwiseModel(model, device=device))
        state.gate = _gate(reference, model.config, state.text, options)
        _require_structure(state, reference, model)
        (state.staging / REFERENCE_OUTPUTS).write_bytes(state.gate.reference.to_bytes())
        # In place: the reference itself is not needed any more.
        state.layerwise = LayerwiseModel(folded_form(model, fold=fold), device=device)
        return
    return_large_blocks()  # not for a model in memory, which computes in two thirds of the time without this
    if options.runs_model:
        state.layerwise = LayerwiseModel.from_checkpoint(weights, fold=fold, device=device)


def _require_structure(state: ExportState, reference: Backend, model: NVEmbed) -> None:
    """Refuses a graph whose structure is wrong: the gate of a coarse precision may not see it."""
    options = state.options
    if options.precision is Precision.FP32:
        return  # the gate itself has FP32's bounds
    with step("comparing the graph's structure with PyTorch, in fp32"):
        report = require_structure(
            state.checkpoint.weights,
            structure_reference(reference, model, state.text, options.profile.max),
            state.text,
            state.staging / STRUCTURE,
            precision=options.precision,
            dialect=options.dialect,
            fold=options.fold,
            max_shape=options.profile.max,
        )
    detail(f"  {report.summary()}")


def _gate(reference: Backend, model: ModelConfig, text: TextEncoder, options: ExportOptions) -> Gate:
    """Embeds the gate's texts with the reference; every graph and plan is compared with these embeddings."""
    max_shape = options.profile.max
    with step("embedding the probes with PyTorch"):
        outputs = compute_reference_outputs(reference, text, precision=options.precision, max_shape=max_shape)
    return Gate(reference=outputs, text=text, model=model, precision=options.precision, max_shape=max_shape)


def _quantize(state: ExportState, reused: ReusedBundle | None) -> None:
    """Sets the quantization record, searched or reused, and the rounding, and smooths the model in place."""
    options, layerwise = state.options, state.layerwise
    if layerwise is None or not options.precision.quantized:
        return
    state.rounding = rounding_of(options.precision, state.staging / ROUNDED_WEIGHTS)
    model_sha256 = weights_sha256(state.source.result())
    state.record = search_or_reuse(
        layerwise, state.text, state.rounding, options, reused=reused, model_sha256=model_sha256
    )


def _search_fp16_limit(state: ExportState) -> None:
    """Sets the modules that must stay in FP32, and excludes them from quantization."""
    if state.layerwise is None or state.options.precision.base is not Precision.FP16:
        return
    with step("searching for values near FP16's limit"):
        longest = longest_probe(state.text, state.options.profile.max)
        ranges = measure_ranges(state.layerwise, state.text, longest=longest)
        state.fp32_modules = find_fp32_modules(state.layerwise.model, ranges)
        peak_name = max(ranges.max_abs, key=lambda name: ranges.max_abs[name])
        detail(f"  largest value {ranges.max_abs[peak_name]:.4g} at {peak_name}; FP16's maximum is {FP16_MAX:.0f}")
        if state.fp32_modules:
            near_limit = ", ".join(f"{name} {peak:.3g}" for name, peak in sorted(ranges.near_limit.items()))
            echo(f"  near the limit: {near_limit}; computed in FP32: {', '.join(sorted(state.fp32_modules))}")
    if state.record is not None:
        state.record = exclude_fp32(state.record, state.fp32_modules)


def _write_passing_graphs(state: ExportState) -> None:
    """Writes graphs that pass the gate, and their reports; while a quantized one fails, excludes one more group."""
    while True:
        _write_graphs(state)
        try:
            state.reports = state.gate.graphs(state.staging) if state.gate is not None else []
            break
        except ParityError as err:
            if state.record is None or isinstance(err, MaskError):
                raise
            record = exclude_next(state.record, "the parity gate did not pass with it quantized")
            echo(f"  {err}")
            if record is None:
                raise nothing_to_quantize(state.record.precision) from err
            state.record = record
            echo("  excluding the next most sensitive layers from quantization")
    state.layerwise = None  # frees the model's memory
    if state.rounding is not None:
        shutil.rmtree(state.staging / ROUNDED_WEIGHTS, ignore_errors=True)
    if state.record is not None:
        report_excluded(state.record)
        write_with_chart(state.record, state.staging)


def _write_graphs(state: ExportState) -> None:
    """Writes the graph that plans are built from and, for some precisions, the CPU's; sets the opset and the hashes."""
    options, weights, staging = state.options, state.checkpoint.weights, state.staging
    quantized = None
    if state.layerwise is not None and state.record is not None and state.rounding is not None:
        quantized = QuantizedWeights(state.layerwise, state.record, state.rounding)

    def weight_source() -> WeightSource:
        return quantized or CheckpointWeights(weights, fold=options.fold)

    folding = run_in_background(weight_source)
    with step(f"tracing to ONNX ({options.dialect.value})"):
        traced = trace(
            weights.config,
            precision=options.precision,
            dialect=options.dialect,
            fold=options.fold,
            fp32_modules=state.fp32_modules,
        )
    if quantized is not None:
        insert_qdq(traced, quantized.input_scales, FORMATS[options.precision])
    describe_graph(traced, _graph_properties(state))
    for path in (staging / name for name in (GRAPH, CPU_GRAPH, WEIGHTS)):  # from an attempt that did not pass
        path.unlink(missing_ok=True)
    with step("writing the weights"):
        state.hashes = write(
            traced,
            folding.result(),
            staging,
            name=GRAPH,
            reference=options.reference_weights,
            reached=state.read_ahead.reached,
        )
        state.read_ahead.release()
        if quantized is not None:
            quantized.close()
    with step("checking the graph"):
        check(staging / GRAPH, linked=options.reference_weights)
        if options.precision.has_cpu_graph:
            write_cpu_graph(staging / GRAPH, staging / CPU_GRAPH)
            check(staging / CPU_GRAPH, linked=options.reference_weights)
    state.opset = traced.opset_imports[""]


def _measure_vector_kinds(state: ExportState) -> None:
    """Sets what int8 and binary vectors cost, if ONNX Runtime embeds the texts for that within a minute."""
    if state.gate is None:
        return
    precision, max_shape = state.options.precision, state.options.profile.max
    graph = state.staging / (CPU_GRAPH if precision.has_cpu_graph else GRAPH)
    with step("measuring int8 and binary vectors"):
        state.vectors = measure_vector_kinds(OrtBackend(graph), state.text, max_shape=max_shape)
    if state.vectors is None:
        detail(
            "  not measured, because the engine is too slow here or accepts only short texts; to measure them: "
            f"{program('check')} {state.options.out} --measure-vectors"
        )
        return
    for name, loss in state.vectors.losses.items():
        detail(f"  {name}: {loss.overlap:.1%} of the top ten, {loss.ndcg_share:.1%} of nDCG@10")


def _graph_properties(state: ExportState) -> dict[str, str]:
    """Returns what the graph's file says of itself, for a reader who has no manifest."""
    config, precision = state.checkpoint.weights.config, state.options.precision
    return {
        "model": state.checkpoint.name,
        "family": config.family,
        "precision": precision.value,
        "mask": config.mask.value,
        "pooling": POOLING[config.pooling],
    }


def _linked_shards(staging: Path) -> tuple[str, ...]:
    """Returns the names of the checkpoint's files that are linked into the bundle."""
    return tuple(sorted(path.name for path in staging.glob("*.safetensors")))


def _hash_checkpoint(state: ExportState) -> None:
    """Waits for the checkpoint's hashes, and adds those of linked files."""
    with step("hashing the checkpoint"):
        files = state.source.result().files
    state.hashes |= {shard: files[shard] for shard in _linked_shards(state.staging)}


def _build_plan(state: ExportState, bindings: Any) -> None:
    """Builds the plan and compares it; sets the plan and adds its reports."""
    options, graph = state.options, state.staging / GRAPH
    detail(f"  building for {options.target.summary}, shapes {options.profile}")
    with step(f"building the plan with {options.target.runtime} {bindings.__version__}"):
        content, state.plan = build_plan(
            graph,
            options.target,
            profile=options.profile,
            bindings=bindings,
            capability=local_compute_capability(),
            build_options=options.build_options,
        )
        parameters = count_parameters(state.checkpoint.weights.config, fold=options.fold)
        require_quantized_plan(content, state.plan, graph, precision=options.precision, parameters=parameters)
        (state.staging / PLAN).write_bytes(content)
    if state.gate is not None:
        state.reports += state.gate.plan(content, state.plan, graph)


def _manifest(state: ExportState) -> Manifest:
    options, config = state.options, state.checkpoint.weights.config
    return Manifest(
        format_version=FORMAT_VERSION,
        manifest_sha256="",
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tool_version=__version__,
        source=state.source.result(),
        target=options.target.name,
        precision=options.precision,
        dialect=options.dialect,
        opset=state.opset,
        pooling=POOLING[config.pooling],
        folded=options.fold and config.latent is not None,
        fp32_modules=tuple(sorted(state.fp32_modules)),
        dimension=config.hidden_size,
        text=state.checkpoint.contract,
        profile=options.profile,
        plan=state.plan,
        parity=tuple(state.reports),
        vectors=state.vectors,
        versions=_versions(state.plan),
        referenced=_linked_shards(state.staging),
        checkpoint_files=(),
        files={},
    )


def _versions(plan: PlanInfo | None) -> dict[str, str]:
    versions = {"python": platform.python_version()} | installed_versions(RECORDED_PACKAGES)
    versions["torch"] = torch.__version__
    if plan is not None:
        versions[plan.runtime] = plan.version
    return versions


def _report(manifest: Manifest, out: Path, *, no_plan_reason: str, seconds: float) -> None:
    """Says where the bundle is, how close it is to PyTorch, and what to type next."""
    detail(f"  {', '.join(f'{name} {entry.bytes / 1e6:.1f} MB' for name, entry in manifest.files.items())}")
    if no_plan_reason:
        echo(f"no {PLAN} was built: {no_plan_reason}. The ONNX bundle is complete and runs on ONNX Runtime.")
    size = sum(entry.bytes for entry in manifest.files.values()) / 1e6
    plan = f"with {PLAN}" if manifest.plan else "without a plan"
    echo(
        f"done: {out}, {manifest.precision.value} {plan}, {size:.0f} MB, in {seconds:.0f} s, peak memory "
        f"{peak_memory_bytes() / GIB:.2f} GiB"
    )
    echo(f"{verdict(manifest.parity, manifest.plan)}{closeness(manifest.parity)}")
    echo(f"next: {program('similarity')} {out}")
