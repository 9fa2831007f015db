"""The plan: one builder for TensorRT 10, TensorRT 11 and TensorRT-RTX, against the bindings module.

Networks are strongly typed: precision is what the ONNX graph says, since TensorRT 11 has no flags for it. Every bool
and None that TensorRT returns is checked and named. Source: NVIDIA TensorRT documentation, "Python API: build phase".
"""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from nvembed_deploy.backends.bindings import TENSORRT_RTX, ask, make_logger, this_platform
from nvembed_deploy.backends.ort import INPUTS
from nvembed_deploy.bundle.manifest import PlanInfo
from nvembed_deploy.engines.targets import TARGETS, BuildOption, Target, require_option
from nvembed_deploy.engines.timing_cache import TimingCache
from nvembed_deploy.errors import EngineError
from nvembed_deploy.spec import ShapeProfile

FLAGS = {
    BuildOption.WEIGHT_STREAMING: ("WEIGHT_STREAMING",),
    # Identical: what is put in is what was taken out, so kernels may be chosen for these very weights.
    BuildOption.STRIP_WEIGHTS: ("STRIP_PLAN", "REFIT_IDENTICAL"),
}
"""Names of TensorRT's builder flags."""


BUILD_FACTOR = 2.8
"""Peak of TensorRT-RTX's ahead-of-time build over the weights, measured at 1.3 B parameters."""
BUILD_BASE_BYTES = int(0.35 * 2**30)
"""TensorRT itself."""


def build_memory_bytes(weights: int) -> int:
    """Memory of the host that a build takes, for so many bytes of weights."""
    return int(BUILD_FACTOR * weights) + BUILD_BASE_BYTES


def add_option_flags(parser: argparse._ActionsContainer) -> None:
    """Adds the flags of the options for large engines."""
    for option, what in (
        (BuildOption.WEIGHT_STREAMING, "let weights that do not fit the GPU's memory stay in the host's"),
        (BuildOption.STRIP_WEIGHTS, "build a plan without weights, which are put in from the graph's file at load"),
    ):
        having = ", ".join(target.name for target in TARGETS.values() if option in target.offers)
        parser.add_argument(f"--{option.value}", action="store_true", help=f"{what} (targets: {having})")


def asked_options(flags: argparse.Namespace, target: Target) -> frozenset[BuildOption]:
    """The options that flags ask for.

    Raises:
        ConfigError: The target has not got one; with its recipe's reason.
    """
    asked = {option for option in BuildOption if getattr(flags, option.value.replace("-", "_"), False)}
    for option in sorted(asked):
        require_option(target, option)
    return frozenset(asked)


def build_plan(
    graph: Path,
    target: Target,
    *,
    profile: ShapeProfile,
    bindings: Any,
    capability: str | None,
    asked: Set[BuildOption] = frozenset(),
) -> tuple[memoryview, PlanInfo]:
    """Builds a plan from a graph.

    Args:
        graph: `model.onnx`, its weights beside it.
        target: The device's recipe.
        profile: Shapes to accept; the target's recipe may add a narrower one inside.
        bindings: The module of TensorRT or TensorRT-RTX.
        capability: This machine's GPU, for targets that build for it.
        asked: Options beside those that the target's recipe always takes.

    Returns:
        The plan's bytes, in TensorRT's own memory, and what it needs to run.

    Raises:
        EngineError: TensorRT cannot parse the graph or cannot build the plan; its own words are in the message.
        KeyboardInterrupt: Ctrl-C or SIGTERM, once TensorRT has let go.
    """
    logger = make_logger(bindings)
    builder = ask(logger, "creating the builder", bindings.Builder, logger)
    network = ask(logger, "creating the network", builder.create_network, _network_flags(bindings))
    _parse(graph, network, bindings=bindings, logger=logger)
    _let_attention_decompose(network, bindings)
    config = ask(logger, "creating the configuration", builder.create_builder_config)
    # On by default: FP32 products with 10 bits of mantissa, in an FP32 plan and in every plan's pooling.
    config.clear_flag(bindings.BuilderFlag.TF32)
    profiles = target.profiles(profile)
    for item in profiles:
        _add_profile(builder, config, item, logger=logger)
    capabilities = _set_capabilities(config, target, bindings=bindings, capability=capability)
    for option in sorted(asked):
        for flag in FLAGS[option]:
            _set_flag(config, flag, bindings)
    timings = None
    if BuildOption.TIMING_CACHE in target.offers:
        timings = TimingCache.of(bindings, capabilities[0])
        timings.load(config, logger)
    with _progress(bindings) as (monitor, was_cancelled):
        config.progress_monitor = monitor
        try:
            plan = ask(logger, "building the plan", builder.build_serialized_network, network, config)
        except EngineError:
            if not was_cancelled():
                raise
    if was_cancelled():  # also where TensorRT was done before it asked again: the user's word counts
        raise KeyboardInterrupt
    if timings is not None:
        timings.store(config)
    info = PlanInfo(
        runtime=target.runtime,
        version=bindings.__version__,
        platform=this_platform(),
        compute_capabilities=capabilities,
        profiles=profiles,
        stripped=BuildOption.STRIP_WEIGHTS in asked,
        weight_streaming=BuildOption.WEIGHT_STREAMING in asked,
    )
    return memoryview(plan).cast("B"), info


def _set_flag(config: Any, name: str, bindings: Any) -> None:
    flag = getattr(bindings.BuilderFlag, name, None)
    if flag is None:
        raise EngineError(f"{bindings.__name__} {bindings.__version__} has no builder flag {name}; take a newer one")
    config.set_flag(flag)


def _network_flags(bindings: Any) -> int:
    """STRONGLY_TYPED; on TensorRT 10 the batch is explicit by default, on 11 both are all there is."""
    return 1 << int(bindings.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parse(graph: Path, network: Any, *, bindings: Any, logger: Any) -> None:
    parser = bindings.OnnxParser(network, logger)
    if parser.parse_from_file(str(graph)):
        return
    errors = [str(parser.get_error(index).desc()) for index in range(parser.num_errors)]
    raise EngineError(
        f"{bindings.__name__} {bindings.__version__} cannot parse {graph.name} ({'; '.join(errors)}); export the "
        "graph again with --dialect portable"
    )


def _add_profile(builder: Any, config: Any, profile: ShapeProfile, *, logger: Any) -> None:
    shapes = ask(logger, "creating the optimization profile", builder.create_optimization_profile)
    sizes = [(shape.batch, shape.tokens) for shape in (profile.min, profile.opt, profile.max)]
    for name in INPUTS:
        shapes.set_shape(name, *sizes)  # returns nothing; a wrong shape shows when the profile is added
    before = logger.errors_seen
    if config.add_optimization_profile(shapes) < 0:
        words = "; ".join(logger.errors[-(logger.errors_seen - before) :] if logger.errors_seen > before else ())
        raise EngineError(f"TensorRT: the shape profile {profile} is refused{': ' if words else ''}{words}")


def _let_attention_decompose(network: Any, bindings: Any) -> None:
    """Lets TensorRT run an attention as plain operators where it has no fused kernel: FP32, unusual head widths."""
    kind = getattr(bindings.LayerType, "ATTENTION_INPUT", None)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if kind is not None and layer.type == kind:
            layer.__class__ = bindings.IAttentionInputLayer
            layer.attention.decomposable = True


def _set_capabilities(config: Any, target: Target, *, bindings: Any, capability: str | None) -> tuple[str, ...]:
    """Names the GPUs of an ahead-of-time plan; TensorRT itself builds for the GPU it runs on."""
    if target.runtime != TENSORRT_RTX:
        if capability is None:
            raise EngineError(f"--target {target.name} builds on the GPU itself, and there is none here")
        return (capability,)
    config.num_compute_capabilities = len(target.compute_capabilities)
    for index, item in enumerate(target.compute_capabilities):
        member = getattr(bindings.ComputeCapability, f"SM{item.replace('.', '')}", None)
        if member is None or not config.set_compute_capability(member, index):
            raise EngineError(f"{bindings.__name__} {bindings.__version__} cannot build for compute capability {item}")
    return target.compute_capabilities


@contextmanager
def _progress(bindings: Any) -> Iterator[tuple[Any, Callable[[], bool]]]:
    """TensorRT's progress as a bar. Ctrl-C asks the builder to stop: an exception must not cross its C++."""
    cancelled = False

    def cancel(signum: int, frame: FrameType | None) -> None:
        nonlocal cancelled
        cancelled = True

    bar = tqdm(desc="building the plan", unit="step", total=0, disable=None, leave=False)

    class Monitor(bindings.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.left: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.left[phase_name] = num_steps
            bar.total += num_steps
            bar.set_postfix_str(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.left[phase_name] = self.left.get(phase_name, 0) - 1  # phases of one name may run at once
            bar.update()
            return not cancelled

        def phase_finish(self, phase_name: str) -> None:
            bar.update(max(self.left.pop(phase_name, 0), 0))

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, cancel) for number in numbers}
    try:
        yield Monitor(), lambda: cancelled
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        bar.close()
