"""The steps of an export, each gated, ending in a bundle that is switched in whole."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nvembed_deploy.backends import Backend
from nvembed_deploy.backends.bindings import load_bindings
from nvembed_deploy.backends.cuda import CudaRuntime
from nvembed_deploy.backends.ort import ROUNDED, OrtBackend
from nvembed_deploy.backends.reference import ReferenceBackend
from nvembed_deploy.backends.trt import TrtBackend
from nvembed_deploy.bundle import CPU_GRAPH, FORMAT_VERSION, GRAPH, PLAN, TOKENIZER, Manifest, PlanInfo
from nvembed_deploy.cli import say
from nvembed_deploy.config import ModelConfig, Precision
from nvembed_deploy.errors import DeviceMismatchError, MissingExtra
from nvembed_deploy.model.fold import FoldedLatentAttention
from nvembed_deploy.model.nvembed import LatentAttentionModel
from nvembed_deploy.parity import ParityReport, compare, longest_probe, require
from nvembed_deploy.publish import commit, new_bundle
from nvembed_deploy.targets import local_compute_capability
from nvembed_deploy.text import TextEncoder
from nvembed_deploy.version import __version__

from . import source
from .builder import build_plan
from .cpu_graph import write_cpu_graph
from .forecast import GIB, forecast, peak_memory_bytes, require_room
from .graph import check, trace, write
from .options import ExportOptions
from .ranges import FP16_MAX, probe, wide_modules

POOLING = "latent attention, masked mean, L2"
RECORDED = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "tokenizers", "numpy")


def export(options: ExportOptions, *, plan: bool) -> Manifest:
    """Exports a checkpoint to a bundle.

    Args:
        options: What to export.
        plan: Whether to build `engine.plan`; without the target's TensorRT the bundle is written without one, and a
            message says what is missing.

    Raises:
        DeployError: A step failed; the destination is as it was.
    """
    started = time.monotonic()
    folder, revision = source.resolve(options.model, options.revision)
    config = ModelConfig.from_checkpoint(folder)
    contract = source.text_contract(folder, config)
    bindings, missing = _bindings(options) if plan else (None, "")
    needed = forecast(config, options.precision, fold=options.fold, plan=bindings is not None, parity=options.parity)
    say(f"exporting {options.model} as {options.precision.value} to {options.out}; forecast: {needed}")
    with new_bundle(options.out) as staging:
        require_room(needed, options.out, force=options.force)
        with _step("checking the checkpoint"):
            name = options.model if revision else Path(options.model).resolve().name
            origin = source.describe(folder, name, revision, config)
            reference = ReferenceBackend(folder)
            tokenizer = (folder / "tokenizer.json").read_bytes()
            (staging / TOKENIZER).write_bytes(tokenizer)
        wide: frozenset[str] = frozenset()
        if options.precision is Precision.FP16:
            with _step("probing for values near FP16's limit"):
                wide = _probe(reference, TextEncoder(tokenizer, contract), options)
        with _step(f"tracing to ONNX ({options.dialect.value}, opset {options.dialect.opset})"):
            _write_graphs(options, config, reference, staging, wide)
        reports: list[ParityReport] = []
        if options.parity:
            rounded = options.precision is Precision.BF16
            candidate = OrtBackend(staging / (CPU_GRAPH if rounded else GRAPH), note=ROUNDED if rounded else "")
            with _step("comparing ONNX with PyTorch"):
                reports.append(_gate(reference, candidate, TextEncoder(tokenizer, contract), options))
            del candidate
        info: PlanInfo | None = None
        if bindings is not None:
            say(f"  building for {options.target.summary}")
            with _step(f"building the plan with {bindings.__name__} {bindings.__version__}, shapes {options.profile}"):
                content, info = build_plan(
                    staging / GRAPH,
                    options.target,
                    profile=options.profile,
                    bindings=bindings,
                    capability=local_compute_capability(),
                )
                (staging / PLAN).write_bytes(content)
            if options.parity:
                reports += _gate_plan(content, info, reference, TextEncoder(tokenizer, contract), options)
        manifest = commit(
            staging,
            options.out,
            Manifest(
                format_version=FORMAT_VERSION,
                manifest_sha256="",
                created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                tool_version=__version__,
                source=origin,
                precision=options.precision,
                dialect=options.dialect,
                opset=options.dialect.opset,
                pooling=POOLING,
                folded=options.fold,
                fp32_modules=tuple(sorted(wide)),
                dimension=config.hidden_size,
                text=contract,
                profile=options.profile,
                plan=info,
                parity=tuple(reports),
                versions=_versions(info),
                files={},
            ),
        )
    _report(manifest, options.out, missing=missing, seconds=time.monotonic() - started)
    return manifest


def _probe(reference: ReferenceBackend, text: TextEncoder, options: ExportOptions) -> frozenset[str]:
    """The modules that must stay in FP32, said with the reason."""
    found = probe(reference.model, text, longest=longest_probe(text, options.profile.max))
    wide = wide_modules(reference.model, found)
    worst = max(found.largest, key=lambda name: found.largest[name])
    say(f"  largest value {found.largest[worst]:.4g} at {worst}; FP16 ends at {FP16_MAX:.0f}")
    if wide:
        near = ", ".join(f"{name} {value:.3g}" for name, value in sorted(found.near.items()))
        say(f"  near the limit: {near}; kept in FP32: {', '.join(sorted(wide))}")
    return wide


def _write_graphs(
    options: ExportOptions, config: ModelConfig, reference: ReferenceBackend, staging: Path, wide: frozenset[str]
) -> None:
    traced = trace(config, precision=options.precision, dialect=options.dialect, fold=options.fold, wide=wide)
    model = reference.model
    state = model.state_dict()
    if options.fold and isinstance(model.latent_attention_model, LatentAttentionModel):
        prefix = "latent_attention_model."
        state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        folded = FoldedLatentAttention(model.latent_attention_model)
        state |= {prefix + name: tensor for name, tensor in folded.state_dict().items()}
    write(traced, state, staging, name=GRAPH)
    check(staging / GRAPH)
    if options.precision is Precision.BF16:
        write_cpu_graph(staging / GRAPH, staging / CPU_GRAPH)
        check(staging / CPU_GRAPH)


def _gate(reference: Backend, candidate: Backend, text: TextEncoder, options: ExportOptions) -> ParityReport:
    report = compare(reference, candidate, text, precision=options.precision, largest=options.profile.max)
    say(f"  {report.summary()}")
    return require(report)


def _gate_plan(
    plan: memoryview, info: PlanInfo, reference: ReferenceBackend, text: TextEncoder, options: ExportOptions
) -> list[ParityReport]:
    """Runs the plan where there is a GPU for it; elsewhere the graph's gate is all that can be done, and it says so."""
    try:
        cuda = CudaRuntime.load()
        device = cuda.device(0)
        dimension = reference.model.config.hidden_size
        candidate = TrtBackend(plan, info, dimension=dimension, device=device, cuda=cuda)
    except (DeviceMismatchError, MissingExtra) as err:
        say(f"  the plan itself was not run ({err}); its graph was compared. On its GPU: python -m export.check BUNDLE")
        return []
    with _step("comparing the plan with PyTorch"):
        return [_gate(reference, candidate, text, options)]


def _bindings(options: ExportOptions) -> tuple[Any, str]:
    """The target's TensorRT, or why there will be no plan."""
    target = options.target
    if target.on_device and local_compute_capability() is None:
        return None, f"--target {target.name} is built on the device itself: copy the bundle there and export again"
    try:
        return load_bindings(target.runtime), ""
    except MissingExtra as err:
        return None, str(err)


def _versions(info: PlanInfo | None) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in RECORDED:
        found[name] = importlib.metadata.version(name)
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
    checked = "parity passed" if manifest.parity else "parity NOT checked (--no-parity)"
    say(f"done: {what}, {checked}, {seconds:.0f} s, peak memory {peak_memory_bytes() / GIB:.2f} GiB")


@contextmanager
def _step(what: str) -> Iterator[None]:
    started = time.monotonic()
    say(f"  {what} ...")
    yield
    say(f"  {what}: {time.monotonic() - started:.1f} s")
