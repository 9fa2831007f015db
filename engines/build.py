"""`nvembed build BUNDLE`: builds the plan of a bundle on the device that will run it, and checks it there.

Needs the device's TensorRT and no PyTorch: the graph, the tokenizer and the reference outputs are in the bundle.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvembed_deploy.bundle.manifest import GRAPH, PLAN, REFERENCE_OUTPUTS, TOKENIZER, Manifest
from nvembed_deploy.bundle.parity_report import ParityReport
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.bundle.writer import commit, new_bundle
from nvembed_deploy.console import ArgumentParser, detail, echo, program, run, shape_argument, step
from nvembed_deploy.engines.plan_builder import (
    add_option_flags,
    build_memory_bytes,
    build_plan,
    requested_build_options,
    require_quantized_plan,
)
from nvembed_deploy.engines.targets import (
    TARGETS,
    BuildOption,
    Target,
    capable_gpus,
    choose_target,
    load_runtime,
    local_compute_capability,
    version_number,
)
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import free_bytes
from nvembed_deploy.parity.gate import Gate, closeness, verdict
from nvembed_deploy.parity.probes import ReferenceOutputs
from nvembed_deploy.spec import Dialect, Shape, ShapeProfile
from nvembed_deploy.system import GIB, available_memory_bytes
from nvembed_deploy.tokenization import TextEncoder


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; the last line on stdout is the folder of the finished bundle."""
    parser = ArgumentParser(
        prog=prog or program("build"),
        description="Builds the engine.plan of a bundle with this machine's TensorRT, compares it with the reference "
        "outputs in the bundle, and replaces the bundle.",
    )
    parser.add_argument("bundle", help="folder of a bundle, for example one from an archive made by `pack`")
    parser.add_argument(
        "--target",
        choices=["auto", *TARGETS],
        default="auto",
        help="device to build for (default: auto, which is chosen by this machine's GPU and TensorRT)",
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="DIR", help="folder of the new bundle (default: replace this one)"
    )
    parser.add_argument(
        "--max",
        type=shape_argument,
        default=None,
        metavar="BxT",
        help="largest batch, texts x tokens, for devices with less memory than the target assumes "
        "(default: the target's, limited by the bundle's)",
    )
    add_option_flags(parser)
    parser.add_argument("--force", action="store_true", help="build even if memory or disk space seems insufficient")
    parser.add_argument("-v", "--verbose", action="store_true", help="show TensorRT's log")
    flags = parser.parse_args(argv)

    def command() -> None:
        target = choose_target(flags.target)
        build_options = requested_build_options(flags, target)
        out = build(
            flags.bundle, target, out=flags.out, max_shape=flags.max, build_options=build_options, force=flags.force
        )
        sys.stdout.write(f"{out}\n")

    return run(command, verbose=flags.verbose)


def build(
    path: str | Path,
    target: Target,
    *,
    out: Path | None = None,
    max_shape: Shape | None = None,
    build_options: Set[BuildOption] = frozenset(),
    force: bool = False,
) -> Path:
    """Builds the plan of a bundle for this machine.

    Args:
        path: Folder of the bundle; every file is checked before TensorRT reads it.
        target: The device to build for.
        out: Folder of the bundle with the plan; by default it replaces the old one atomically.
        max_shape: Largest batch; None for the target's.
        build_options: See `build_plan`.
        force: Build even if memory or disk space seems insufficient.

    Returns:
        The folder of the bundle with the plan.

    Raises:
        ConfigError: The target does not support this graph or precision, or there is not enough memory or disk space.
        MissingExtra: The target's TensorRT is not installed.
        EngineError: TensorRT is too old, or cannot build the plan.
        ParityError: The vectors of the engine are outside the tolerance, or its inputs are too short to compare them.
        BundleError: The bundle is damaged.
    """
    started = time.monotonic()
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    target = replace(target, compute_capabilities=capable_gpus(target, manifest.precision))
    bindings = _bindings(target, manifest)
    profile = _profile(target, manifest, max_shape)
    reference = None
    if REFERENCE_OUTPUTS in manifest.files:
        reference = ReferenceOutputs.from_bytes(bundle.read(REFERENCE_OUTPUTS)).up_to(profile.max.tokens)
    destination = Path(out or bundle.folder)
    _require_space(bundle, destination, force=force)
    echo(f"building {bundle.folder} for {target.summary}")
    with new_bundle(destination) as staging:
        _copy_files(bundle, staging)
        detail(f"  shapes {profile}")
        with step(f"building the plan with {bindings.__name__} {bindings.__version__}"):
            capability = local_compute_capability()
            content, plan_info = build_plan(
                staging / GRAPH,
                target,
                profile=profile,
                bindings=bindings,
                capability=capability,
                build_options=build_options,
            )
            parameters = sum(manifest.source.architecture.parameters(fold=manifest.folded).values())
            precision = manifest.precision
            require_quantized_plan(content, plan_info, staging / GRAPH, precision=precision, parameters=parameters)
            (staging / PLAN).write_bytes(content)
        reports: list[ParityReport] = []
        if reference is not None:
            gate = Gate(
                reference=reference,
                text=TextEncoder(bundle.read(TOKENIZER), manifest.text),
                model=manifest.source.architecture,
                precision=manifest.precision,
                max_shape=profile.max,
            )
            reports = gate.plan(content, plan_info, staging / GRAPH) or gate.graphs(staging)
        built = replace(
            manifest,
            checkpoint_files=(),
            target=target.name,
            profile=profile,
            plan=plan_info,
            parity=tuple(reports),
            versions=manifest.versions | {plan_info.runtime: plan_info.version},
        )
        commit(staging, destination, built, hashed=manifest.graph_files)
    size, seconds = (destination / PLAN).stat().st_size / 1e6, time.monotonic() - started
    echo(f"done: {destination}, {PLAN} {size:.1f} MB for {target.name}, in {seconds:.0f} s")
    echo(f"{verdict(reports, plan_info)}{closeness(reports)}")
    echo(f"next: {program('similarity')} {destination}")
    return destination


def _bindings(target: Target, manifest: Manifest) -> Any:
    """Loads the target's TensorRT, if its version supports the dialect of the graph.

    Raises:
        ConfigError: The target, or this version, cannot parse the graph.
    """
    is_fused, fused_from = manifest.dialect is Dialect.FUSED, target.fused_from
    again = f"export the bundle again with --target {target.name} --dialect {Dialect.PORTABLE.value}"
    if is_fused and target.dialect is Dialect.PORTABLE and fused_from is None:
        raise ConfigError(
            f"the bundle's graph has the fused dialect (opset {manifest.opset}), and --target {target.name} supports "
            f"up to opset {target.dialect.opset}; {again}"
        )
    bindings = load_runtime(target)
    if fused_from is None:
        return bindings
    parses_fused = version_number(bindings.__version__) >= version_number(fused_from)
    if is_fused and not parses_fused:
        raise ConfigError(
            f"the bundle's graph has the fused dialect (opset {manifest.opset}), which --target {target.name} supports "
            f"from TensorRT {fused_from} on, and {bindings.__version__} is installed; install that (it needs JetPack "
            f"7.2.2), or {again}, pack it and copy that archive here"
        )
    if parses_fused and not is_fused:
        echo(
            f"  note: TensorRT {bindings.__version__} also supports the fused dialect on this device, with kernels for "
            f"attention; for that, pack a bundle exported with --dialect {Dialect.FUSED.value}"
        )
    return bindings


def _profile(target: Target, manifest: Manifest, max_shape: Shape | None) -> ShapeProfile:
    """Returns the shapes to build for: the target's, limited by the bundle's unless `max_shape` is given."""
    if max_shape and max_shape.tokens > manifest.text.max_tokens:
        raise ConfigError(
            f"--max {max_shape} is too long: the model supports up to {manifest.text.max_tokens} tokens per text"
        )
    min_shape, bundle_max = manifest.profile.min, manifest.profile.max
    limit = max_shape or Shape(
        batch=min(target.profile.max.batch, bundle_max.batch), tokens=min(target.profile.max.tokens, bundle_max.tokens)
    )
    high = Shape(batch=max(limit.batch, min_shape.batch), tokens=max(limit.tokens, min_shape.tokens))
    usual = target.profile.opt
    opt = Shape(
        batch=min(max(usual.batch, min_shape.batch), high.batch),
        tokens=min(max(usual.tokens, min_shape.tokens), high.tokens),
    )
    return ShapeProfile(min=min_shape, opt=opt, max=high)


def _require_space(bundle: Bundle, destination: Path, *, force: bool) -> None:
    """Refuses to build if memory or disk space is insufficient, unless `force` is set."""
    files = {name: entry.bytes for name, entry in bundle.manifest.graph_files.items()}
    weights = sum(size for name, size in files.items() if name.endswith((".data", ".safetensors")))
    disk = sum(size for name, size in files.items() if name not in bundle.manifest.referenced) + weights
    for resource, required, available in (
        ("memory", build_memory_bytes(weights), available_memory_bytes()),
        ("disk", disk, free_bytes(destination)),
    ):
        if available is not None and required > available:
            shortage = (
                f"building needs about {required / GIB:.1f} GiB of {resource}, but only {available / GIB:.1f} GiB "
                "are free"
            )
            if not force:
                raise ConfigError(f"{shortage}; free some, or build anyway with --force")
            echo(f"  {shortage}; building anyway because of --force")


def _copy_files(bundle: Bundle, staging: Path) -> None:
    """Copies a bundle's graph and what belongs to it, not its plan; the checkpoint's shards become hard links."""
    for name in bundle.manifest.graph_files:
        if name in bundle.manifest.referenced:
            os.link(bundle.folder / name, staging / name)
        else:
            shutil.copyfile(bundle.folder / name, staging / name)
