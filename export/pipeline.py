"""The steps of an export, each gated, ending in a bundle that is switched in whole."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from nvembed_deploy.backends.pytorch import PyTorchBackend
from nvembed_deploy.bundle.manifest import (
    CPU_GRAPH,
    FORMAT_VERSION,
    GRAPH,
    PLAN,
    QUANTIZATION,
    QUANTIZATION_PICTURE,
    TOKENIZER,
    TRUTH,
    WEIGHTS,
    Manifest,
    PlanInfo,
    Source,
)
from nvembed_deploy.bundle.writer import commit, new_bundle
from nvembed_deploy.console import program, say
from nvembed_deploy.engines.plan_builder import build_plan
from nvembed_deploy.engines.targets import BuildOption, load_runtime, local_compute_capability
from nvembed_deploy.errors import ConfigError, MaskError, MissingExtra, ParityError
from nvembed_deploy.export.background import InBackground
from nvembed_deploy.export.forecast import GIB, Forecast, forecast, require_room
from nvembed_deploy.export.fp16_ranges import FP16_MAX, probe, wide_modules
from nvembed_deploy.export.graph.cpu_graph import write_cpu_graph
from nvembed_deploy.export.graph.trace import trace
from nvembed_deploy.export.graph.weights import StoredState
from nvembed_deploy.export.graph.write import check, write
from nvembed_deploy.export.layerwise import Parts, folded_form
from nvembed_deploy.export.options import ExportOptions
from nvembed_deploy.export.quantization.calibration import built_in_texts, read_texts, texts_sha256, tokenize
from nvembed_deploy.export.quantization.formats import FORMATS
from nvembed_deploy.export.quantization.qdq import insert
from nvembed_deploy.export.quantization.record import (
    QuantizationRecord,
    keep_next,
    keep_wide,
    read_record,
    write_record,
)
from nvembed_deploy.export.quantization.search import QuantizedState, apply_record, quantize
from nvembed_deploy.files.hashing import FileEntry
from nvembed_deploy.files.read_ahead import Pace
from nvembed_deploy.model import source
from nvembed_deploy.model.config import Pooling
from nvembed_deploy.model.family import read_checkpoint_architecture
from nvembed_deploy.model.weights import StoredWeights, weight_files
from nvembed_deploy.parity.compare import observe
from nvembed_deploy.parity.gate import Gate, step, verdict
from nvembed_deploy.parity.probes import longest_probe
from nvembed_deploy.spec import Precision
from nvembed_deploy.system import installed_versions, peak_memory_bytes, return_large_blocks
from nvembed_deploy.tokenization import TextEncoder
from nvembed_deploy.version import __version__

POOLING = {
    Pooling.LATENT: "latent attention, masked mean, L2",
    Pooling.MEAN: "masked mean, L2",
    Pooling.LAST: "last token, L2",
}
RECORDED = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "tokenizers", "numpy")


def export(options: ExportOptions) -> Manifest:
    """Exports a checkpoint to a bundle.

    Args:
        options: What to export. Without the target's TensorRT the bundle is written without a plan, and a message
            says what is missing.

    Raises:
        DeployError: A step failed; the destination is as it was.
    """
    started = time.monotonic()
    folder, revision = source.resolve(options.model, options.revision)
    config = read_checkpoint_architecture(folder).slice(options.layers)
    contract = source.text_contract(folder, config)
    if options.profile.max.tokens > contract.max_tokens:
        raise ConfigError(
            f"--max {options.profile.max} is longer than the model's {contract.max_tokens} tokens; pass fewer"
        )
    weights = StoredWeights(folder, config)
    bindings, missing = (None, "") if options.onnx_only else _bindings(options)
    needed = forecast(weights, options, plan=bindings is not None)
    say(f"exporting {options.model} as {options.precision.value} to {options.out}; forecast: {needed}")
    streamed = () if options.runs_model or options.reference else tuple(weight_files(folder))
    with new_bundle(options.out) as staging, Pace(streamed) as pace:
        require_room(needed, options.out, force=options.force)
        _note_small_gpus(needed, options)
        name = options.model if revision else Path(options.model).resolve().name
        hashing = InBackground(lambda: source.describe(folder, name, revision, config, pace))
        tokenizer = (folder / "tokenizer.json").read_bytes()
        (staging / TOKENIZER).write_bytes(tokenizer)
        text = TextEncoder(tokenizer, contract)
        gate, parts = _gate_and_parts(folder, weights, text, options)
        if gate is not None:
            (staging / TRUTH).write_bytes(gate.truth.to_bytes())
        record = _quantize(parts, text, hashing.result(), options) if parts and options.precision.quantized else None
        wide: frozenset[str] = frozenset()
        if parts is not None and options.precision.base is Precision.FP16:
            with step("probing for values near FP16's limit"):
                wide = _probe(parts, text, options)
        record = record and keep_wide(record, wide)
        while True:
            opset, known = _write_graphs(options, weights, parts, record, staging, wide, pace)
            try:
                reports = gate.graphs(staging) if gate is not None else []
                break
            except ParityError as err:
                record = record and keep_next(record, "the gate did not pass without it")
                if record is None or isinstance(err, MaskError):
                    raise
                say(f"  {err}; keeping the next costliest layers in {options.precision.base.value}")
        if record is not None:
            _write_record(record, staging)
        del parts
        with step("hashing the checkpoint"):
            origin = hashing.result()
        linked = tuple(sorted(path.name for path in staging.glob("*.safetensors")))
        known |= {shard: origin.files[shard] for shard in linked}
        info: PlanInfo | None = None
        if bindings is not None:
            say(f"  building for {options.target.summary}")
            with step(f"building the plan with {bindings.__name__} {bindings.__version__}, shapes {options.profile}"):
                content, info = build_plan(
                    staging / GRAPH,
                    options.target,
                    profile=options.profile,
                    bindings=bindings,
                    capability=local_compute_capability(),
                    asked=options.asked,
                )
                (staging / PLAN).write_bytes(content)
            if gate is not None:
                reports += gate.plan(content, info, staging / GRAPH)
        manifest = commit(
            staging,
            options.out,
            Manifest(
                format_version=FORMAT_VERSION,
                manifest_sha256="",
                created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                tool_version=__version__,
                source=origin,
                target=options.target.name,
                precision=options.precision,
                dialect=options.dialect,
                opset=opset,
                pooling=POOLING[config.pooling],
                folded=options.fold and config.latent is not None,
                fp32_modules=tuple(sorted(wide)),
                dimension=config.hidden_size,
                text=contract,
                profile=options.profile,
                plan=info,
                parity=tuple(reports),
                versions=_versions(info),
                referenced=linked,
                files={},
            ),
            known=known,
        )
    _report(manifest, options.out, missing=missing, seconds=time.monotonic() - started)
    return manifest


def _note_small_gpus(needed: Forecast, options: ExportOptions) -> None:
    """The target's smallest device may be too small for the plan; larger ones of the same recipe are not."""
    smallest = options.target.memory_gib
    if smallest is not None and needed.gpu > smallest * GIB and BuildOption.WEIGHT_STREAMING not in options.asked:
        say(
            f"note: a plan of this needs about {needed.gpu / GIB:.0f} GiB of GPU memory, and the smallest "
            f"{options.target.name} has {smallest:g}; take a larger one, --precision int8 or int4, or a smaller --max"
        )


def _gate_and_parts(
    folder: Path, weights: StoredWeights, text: TextEncoder, options: ExportOptions
) -> tuple[Gate | None, Parts | None]:
    """The gate, and the model as far as one is needed: in memory beside a gate, else part by part."""
    if options.parity:
        with step("reading the checkpoint"):
            reference = PyTorchBackend(folder, layers=options.layers)
        gate = _gate(reference, text, options)
        return gate, Parts(folded_form(reference.model, fold=options.fold))  # nobody else needs it any more
    return_large_blocks()  # what a model in memory computes takes a third less time where they are kept
    return None, Parts.of_checkpoint(weights, fold=options.fold) if options.runs_model else None


def _gate(reference: PyTorchBackend, text: TextEncoder, options: ExportOptions) -> Gate:
    """What the reference makes of the probes, for every graph and plan to be measured by."""
    largest = options.profile.max
    with step("embedding the probes with PyTorch"):
        truth = observe(reference, text, precision=options.precision, largest=largest)
    model = reference.model.config
    return Gate(truth=truth, text=text, model=model, precision=options.precision, largest=largest)


def _quantize(parts: Parts, text: TextEncoder, origin: Source, options: ExportOptions) -> QuantizationRecord:
    """Ranges, smoothing and kept layers, found or read again; the model is smoothed in place."""
    weights = {name: entry.sha256 for name, entry in origin.files.items() if name.endswith(".safetensors")}
    model_sha256 = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
    rows = None
    if options.calibration is not None or options.reuse is None:
        texts = read_texts(options.calibration) if options.calibration else built_in_texts()
        rows = tokenize(texts, text, tokens=options.calibration_tokens)
    if options.reuse is not None:
        record = read_record(
            options.reuse,
            precision=options.precision,
            model_sha256=model_sha256,
            texts=texts_sha256(rows) if rows is not None else None,
        )
        with step(f"smoothing as {options.reuse} says"):
            apply_record(parts, record)
        return record
    assert rows is not None
    with step(f"quantizing to {options.precision.value} on {len(rows)} texts of {sum(map(len, rows))} tokens"):
        longest = longest_probe(text, options.profile.max)
        record = quantize(parts, text, rows, options.precision, model_sha256=model_sha256, longest=longest)
    kept = [item.name for item in record.groups if item.kept]
    say(
        f"  {len(record.groups) - len(kept)} of {len(record.groups)} groups of layers quantized; kept: {kept or 'none'}"
    )
    return record


def _write_record(record: QuantizationRecord, staging: Path) -> None:
    """The record, and the picture of its ranking."""
    from nvembed_deploy.export.quantization.plot import draw_ranking  # matplotlib takes a second to load

    write_record(record, staging / QUANTIZATION)
    draw_ranking(record, staging / QUANTIZATION_PICTURE)


def _probe(parts: Parts, text: TextEncoder, options: ExportOptions) -> frozenset[str]:
    """The modules that must stay in FP32, said with the reason."""
    found = probe(parts, text, longest=longest_probe(text, options.profile.max))
    wide = wide_modules(parts.model, found)
    worst = max(found.largest, key=lambda name: found.largest[name])
    say(f"  largest value {found.largest[worst]:.4g} at {worst}; FP16 ends at {FP16_MAX:.0f}")
    if wide:
        near = ", ".join(f"{name} {value:.3g}" for name, value in sorted(found.near.items()))
        say(f"  near the limit: {near}; kept in FP32: {', '.join(sorted(wide))}")
    return wide


def _write_graphs(
    options: ExportOptions,
    weights: StoredWeights,
    parts: Parts | None,
    record: QuantizationRecord | None,
    staging: Path,
    wide: frozenset[str],
    pace: Pace,
) -> tuple[int, dict[str, FileEntry]]:
    """Writes what the engine is built from, and what CPUs run where that is not for them.

    Returns:
        The opset, and the hash of what was hashed while it was written.
    """
    quantized = None if parts is None or record is None else QuantizedState(parts, record)
    folding = InBackground(lambda: quantized or StoredState(weights, fold=options.fold))
    with step(f"tracing to ONNX ({options.dialect.value})"):
        traced = trace(
            weights.config, precision=options.precision, dialect=options.dialect, fold=options.fold, wide=wide
        )
    if quantized is not None:
        insert(traced, quantized.input_scales, FORMATS[options.precision])
    for path in (staging / name for name in (GRAPH, CPU_GRAPH, WEIGHTS)):  # of an attempt that did not pass
        path.unlink(missing_ok=True)
    with step("writing the weights"):
        known = write(traced, folding.result(), staging, name=GRAPH, reference=options.reference, reached=pace.reached)
        pace.release()
        if quantized is not None:
            quantized.close()
    with step("checking the graph"):
        check(staging / GRAPH, linked=options.reference)
        if options.precision.has_cpu_graph:
            write_cpu_graph(staging / GRAPH, staging / CPU_GRAPH)
            check(staging / CPU_GRAPH, linked=options.reference)
    return traced.opset_imports[""], known


def _bindings(options: ExportOptions) -> tuple[Any, str]:
    """The target's TensorRT, or why there will be no plan."""
    target, here = options.target, local_compute_capability()
    if target.on_device and here not in target.compute_capabilities:
        found = f", and this machine's GPU has compute capability {here}" if here else ""
        return (
            None,
            f"--target {target.name} is built on the device itself{found}: {program('pack')} BUNDLE packs what it "
            "needs there",
        )
    try:
        return load_runtime(target), ""
    except MissingExtra as err:
        return None, str(err)


def _versions(info: PlanInfo | None) -> dict[str, str]:
    found = {"python": platform.python_version()} | installed_versions(RECORDED)
    found["torch"] = torch.__version__
    if info is not None:
        found[info.runtime] = info.version
    return found


def _report(manifest: Manifest, out: Path, *, missing: str, seconds: float) -> None:
    sizes = ", ".join(f"{name} {entry.bytes / 1e6:.1f} MB" for name, entry in manifest.files.items())
    say(f"  {sizes}")
    if missing:
        say(f"no {PLAN} was built: {missing}. The ONNX bundle is complete and runs on ONNX Runtime.")
    what = f"{manifest.precision.value} bundle" + (" with a plan" if manifest.plan else " without a plan")
    checked = verdict(manifest.parity, manifest.plan)
    say(f"done: {what}, {checked}, {seconds:.0f} s, peak memory {peak_memory_bytes() / GIB:.2f} GiB")
