"""`nvembed build BUNDLE`: builds a bundle's plan on the device that will run it, and judges it there.

Needs the device's TensorRT and no PyTorch: the graph, the tokenizer and the reference's vectors travel in the bundle.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvembed_deploy.bundle.manifest import GRAPH, PLAN, TOKENIZER, TRUTH, Manifest
from nvembed_deploy.bundle.parity_report import ParityReport
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.bundle.writer import commit, new_bundle
from nvembed_deploy.console import program, run, say
from nvembed_deploy.engines.plan_builder import add_option_flags, asked_options, build_memory_bytes, build_plan
from nvembed_deploy.engines.targets import (
    TARGETS,
    BuildOption,
    Target,
    capable,
    choose,
    load_runtime,
    local_compute_capability,
)
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import free_bytes
from nvembed_deploy.parity.gate import Gate, step, verdict
from nvembed_deploy.parity.probes import Truth
from nvembed_deploy.spec import Dialect, Shape, ShapeProfile
from nvembed_deploy.system import available_memory_bytes
from nvembed_deploy.tokenization import TextEncoder

GIB = 2**30


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command; its last line on stdout is the folder of the finished bundle."""
    parser = argparse.ArgumentParser(
        prog=prog or program("build"),
        description="Builds a bundle's engine.plan with this machine's TensorRT, compares it with the vectors that "
        "travel in the bundle, and switches it in.",
    )
    parser.add_argument("bundle", help="a bundle's folder, such as one from an archive of `pack`")
    parser.add_argument(
        "--target",
        choices=["auto", *TARGETS],
        default="auto",
        help="recipe to build by (default: auto, by this machine's GPU and TensorRT)",
    )
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="write a new bundle, and leave this one")
    parser.add_argument(
        "--max",
        type=_shape,
        default=None,
        metavar="BxT",
        help="largest batch, texts x tokens, where the device has less memory than the recipe counts on "
        "(default: the recipe's, within the bundle's own)",
    )
    add_option_flags(parser)
    parser.add_argument("--force", action="store_true", help="try where memory or disk will not do")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what TensorRT logs")
    flags = parser.parse_args(argv)

    def command() -> None:
        recipe = choose(flags.target)
        asked = asked_options(flags, recipe)
        out = build(flags.bundle, recipe, out=flags.out, largest=flags.max, asked=asked, force=flags.force)
        sys.stdout.write(f"{out}\n")

    return run(command, verbose=flags.verbose)


def build(
    path: str | Path,
    recipe: Target,
    *,
    out: Path | None = None,
    largest: Shape | None = None,
    asked: Set[BuildOption] = frozenset(),
    force: bool = False,
) -> Path:
    """Builds a bundle's plan for this machine.

    Args:
        path: A bundle's folder; every file is checked before TensorRT sees it.
        recipe: The device's.
        out: Where the bundle with the plan goes; by default it takes the place of the old one, in one step.
        largest: Largest batch; None for the recipe's.
        asked: See `build_plan`.
        force: Try where memory or disk will not do.

    Returns:
        The folder.

    Raises:
        ConfigError: The recipe cannot build this graph or this precision, or there is not room enough.
        MissingExtra: The recipe's TensorRT is not installed.
        EngineError: TensorRT is too old, or cannot build it.
        ParityError: The engine's vectors are not the reference's.
        BundleError: The bundle is damaged.
    """
    started = time.monotonic()
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    recipe = replace(recipe, compute_capabilities=capable(recipe, manifest.precision))
    bindings = _bindings(recipe, manifest)
    profile = _profile(recipe, manifest, largest)
    destination = Path(out or bundle.folder)
    _require_room(bundle, destination, force=force)
    say(f"building {bundle.folder} for {recipe.summary}")
    with new_bundle(destination) as staging:
        _take_along(bundle, staging)
        with step(f"building the plan with {bindings.__name__} {bindings.__version__}, shapes {profile}"):
            capability = local_compute_capability()
            content, info = build_plan(
                staging / GRAPH, recipe, profile=profile, bindings=bindings, capability=capability, asked=asked
            )
            (staging / PLAN).write_bytes(content)
        reports: list[ParityReport] = []
        if TRUTH in manifest.files:
            gate = Gate(
                truth=Truth.from_bytes(bundle.read(TRUTH)),
                text=TextEncoder(bundle.read(TOKENIZER), manifest.text),
                model=manifest.source.architecture,
                precision=manifest.precision,
                largest=profile.max,
            )
            reports = gate.plan(content, info, staging / GRAPH) or gate.graphs(staging)
        known = {name: entry for name, entry in manifest.files.items() if name != PLAN}
        changed = replace(
            manifest,
            target=recipe.name,
            profile=profile,
            plan=info,
            parity=tuple(reports),
            versions=manifest.versions | {info.runtime: info.version},
        )
        commit(staging, destination, changed, known=known)
    size = (destination / PLAN).stat().st_size / 1e6
    say(f"done: {PLAN} {size:.1f} MB for {recipe.name}, {verdict(reports, info)}, {time.monotonic() - started:.0f} s")
    return destination


def _bindings(recipe: Target, manifest: Manifest) -> Any:
    """The recipe's TensorRT, if it is new enough for the graph."""
    if recipe.dialect is Dialect.PORTABLE and manifest.dialect is Dialect.FUSED:
        raise ConfigError(
            f"the bundle's graph is in the fused dialect (opset {manifest.opset}), and --target {recipe.name} parses "
            f"up to opset {recipe.dialect.opset}; export again with --target {recipe.name}"
        )
    return load_runtime(recipe)


def _profile(recipe: Target, manifest: Manifest, largest: Shape | None) -> ShapeProfile:
    """The recipe's shapes within the bundle's, whose largest batch is the largest that was asked for at export."""
    asked, low = largest or recipe.profile.max, manifest.profile.min
    if largest and asked.tokens > manifest.text.max_tokens:
        raise ConfigError(f"--max {asked} is longer than the model's {manifest.text.max_tokens} tokens; pass fewer")
    bound = manifest.profile.max
    within = asked if largest else Shape(batch=min(asked.batch, bound.batch), tokens=min(asked.tokens, bound.tokens))
    high = Shape(batch=max(within.batch, low.batch), tokens=max(within.tokens, low.tokens))
    usual = recipe.profile.opt
    opt = Shape(
        batch=min(max(usual.batch, low.batch), high.batch), tokens=min(max(usual.tokens, low.tokens), high.tokens)
    )
    return ShapeProfile(min=low, opt=opt, max=high)


def _require_room(bundle: Bundle, destination: Path, *, force: bool) -> None:
    """Refuses with the numbers where memory or disk will not do."""
    files = {name: entry.bytes for name, entry in bundle.manifest.files.items() if name != PLAN}
    weights = sum(size for name, size in files.items() if name.endswith((".data", ".safetensors")))
    disk = sum(size for name, size in files.items() if name not in bundle.manifest.referenced) + weights
    for what, needed, there in (
        ("memory", build_memory_bytes(weights), available_memory_bytes()),
        ("disk", disk, free_bytes(destination)),
    ):
        if there is not None and needed > there:
            words = f"building needs about {needed / GIB:.1f} GiB of {what} and {there / GIB:.1f} GiB are free"
            if not force:
                raise ConfigError(f"{words}; free some, or try all the same with --force")
            say(f"  {words}; going on, as --force asks")


def _take_along(bundle: Bundle, staging: Path) -> None:
    """Everything but the old plan; the checkpoint's own files are linked again."""
    for name in bundle.manifest.files:
        if name == PLAN:
            continue
        if name in bundle.manifest.referenced:
            os.link(bundle.folder / name, staging / name)
        else:
            shutil.copyfile(bundle.folder / name, staging / name)


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ConfigError as err:  # argparse shows the words of its own error only
        raise argparse.ArgumentTypeError(str(err)) from err
