"""Building plans with TensorRT 10, TensorRT 11 and TensorRT-RTX, whose Python bindings have the same interface.

Networks are strongly typed: the ONNX graph defines the precision, since TensorRT 11 has no flags for it. Every bool and
None that TensorRT returns is checked. Source: NVIDIA TensorRT documentation, "Python API: build phase".
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

from nvembed_deploy.backends.bindings import TENSORRT_RTX, checked_call, make_logger, this_platform
from nvembed_deploy.backends.ort import INPUTS
from nvembed_deploy.bundle.manifest import WEIGHTS, PlanInfo
from nvembed_deploy.console import program
from nvembed_deploy.engines.targets import TARGETS, BuildOption, Target, require_option
from nvembed_deploy.engines.timing_cache import TimingCache
from nvembed_deploy.errors import EngineError
from nvembed_deploy.spec import Precision, ShapeProfile

FLAGS = {
    BuildOption.WEIGHT_STREAMING: ("WEIGHT_STREAMING",),
    # Identical: the weights are the same when they are refitted, so kernels may be selected for these weights.
    BuildOption.STRIP_WEIGHTS: ("STRIP_PLAN", "REFIT_IDENTICAL"),
}
"""TensorRT's builder flags for each build option."""
BUILD_FACTOR = 2.8
"""Peak memory of TensorRT-RTX's ahead-of-time build relative to the weights, measured at 1.3 B parameters."""
BUILD_BASE_BYTES = int(0.35 * 2**30)
"""Memory of TensorRT itself."""
PLAN_BASE_BYTES = 16 * 2**20
"""What a plan has beside its weights: code, and the kernels of its profiles. 8 to 15 MB for the mini."""


def build_memory_bytes(weight_bytes: int) -> int:
    """Returns the host memory that a build needs for a number of bytes of weights."""
    return int(BUILD_FACTOR * weight_bytes) + BUILD_BASE_BYTES


def add_option_flags(parser: argparse._ActionsContainer) -> None:
    """Adds the command-line flags of the build options."""
    for option, description in (
        (BuildOption.WEIGHT_STREAMING, "keep weights that do not fit in the GPU's memory in host memory"),
        (BuildOption.STRIP_WEIGHTS, "build a plan without weights; loading it reads them from the graph's weight file"),
    ):
        targets = ", ".join(target.name for target in TARGETS.values() if option in target.supported)
        parser.add_argument(f"--{option.value}", action="store_true", help=f"{description} (targets: {targets})")


def requested_build_options(flags: argparse.Namespace, target: Target) -> frozenset[BuildOption]:
    """Returns the build options that the command line requests.

    Raises:
        ConfigError: The target does not support one of them.
    """
    build_options = {option for option in BuildOption if getattr(flags, option.value.replace("-", "_"), False)}
    for option in sorted(build_options):
        require_option(target, option)
    return frozenset(build_options)


def build_plan(
    graph: Path,
    target: Target,
    *,
    profile: ShapeProfile,
    bindings: Any,
    capability: str | None,
    build_options: Set[BuildOption] = frozenset(),
) -> tuple[memoryview, PlanInfo]:
    """Builds a plan for a target device from an ONNX graph.

    Args:
        graph: `model.onnx`, its weights beside it.
        target: The device to build for.
        profile: Shapes that the plan accepts; the target may add a second, smaller profile.
        bindings: The Python module of TensorRT or TensorRT-RTX.
        capability: Compute capability of this machine's GPU, for targets that build on the device.
        build_options: Options that are not always used for the target.

    Returns:
        The bytes of the plan, in TensorRT's memory, and its requirements.

    Raises:
        EngineError: TensorRT cannot parse the graph or build the plan; its own message is included.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after TensorRT has stopped.
    """
    logger = make_logger(bindings)
    builder = checked_call(logger, "creating the builder", bindings.Builder, logger)
    network = checked_call(logger, "creating the network", builder.create_network, _network_flags(bindings))
    _parse(graph, network, bindings=bindings, logger=logger)
    _let_attention_decompose(network, bindings)
    config = checked_call(logger, "creating the configuration", builder.create_builder_config)
    # TF32 is on by default: FP32 products with 10 bits of mantissa, in an FP32 plan and in the pooling of every plan.
    config.clear_flag(bindings.BuilderFlag.TF32)
    profiles = target.profiles(profile)
    for plan_profile in profiles:
        _add_profile(builder, config, plan_profile, logger=logger)
    capabilities = _set_capabilities(config, target, bindings=bindings, capability=capability)
    for option in sorted(build_options):
        for flag in FLAGS[option]:
            _set_flag(config, flag, bindings)
    timing_cache = None
    if BuildOption.TIMING_CACHE in target.supported:
        timing_cache = TimingCache.of(bindings, capabilities[0])
        timing_cache.load(config, logger)
    with _progress(bindings) as (monitor, was_cancelled):
        config.progress_monitor = monitor
        try:
            plan = checked_call(logger, "building the plan", builder.build_serialized_network, network, config)
        except EngineError:
            if not was_cancelled():
                raise
    if was_cancelled():  # even if TensorRT finished before it noticed the interruption
        raise KeyboardInterrupt
    if timing_cache is not None:
        timing_cache.store(config)
    plan_info = PlanInfo(
        runtime=target.runtime,
        version=bindings.__version__,
        platform=this_platform(),
        compute_capabilities=capabilities,
        profiles=profiles,
        stripped=BuildOption.STRIP_WEIGHTS in build_options,
        weight_streaming=BuildOption.WEIGHT_STREAMING in build_options,
    )
    return memoryview(plan).cast("B"), plan_info


def require_quantized_plan(
    plan: memoryview, plan_info: PlanInfo, graph: Path, *, precision: Precision, parameters: int
) -> None:
    """Refuses the plan of a graph with 4-bit weights that is as large as if they had 16 bits.

    TensorRT may dequantize weights when it builds the plan, without a message. The vectors are the same then, but no
    memory is saved, and that is the reason for such a precision.

    Args:
        plan: The bytes of the plan.
        plan_info: Its requirements.
        graph: The graph that it was built from, its weights beside it.
        precision: Precision of the graph; of others than weight-only ones, any plan passes.
        parameters: Parameters of the exported model.

    Raises:
        EngineError: Less than half of what 4 bits save is saved.
    """
    if not precision.weight_only or plan_info.stripped:
        return
    weight_bytes = (graph.parent / WEIGHTS).stat().st_size
    fp16_bytes = parameters * Precision.FP16.bits_per_weight / 8
    if len(plan) > PLAN_BASE_BYTES + (weight_bytes + fp16_bytes) / 2:
        raise EngineError(
            f"{plan_info.runtime} {plan_info.version} did not keep the weights in 4 bits: the plan has "
            f"{len(plan) / 1e6:.0f} MB, {graph.name}'s weights have {weight_bytes / 1e6:.0f} MB, and in fp16 they "
            f"would have {fp16_bytes / 1e6:.0f} MB; update TensorRT, or export with --precision int8"
        )


def _set_flag(config: Any, name: str, bindings: Any) -> None:
    flag = getattr(bindings.BuilderFlag, name, None)
    if flag is None:
        raise EngineError(
            f"{bindings.__name__} {bindings.__version__} has no builder flag {name}; install a newer version"
        )
    config.set_flag(flag)


def _network_flags(bindings: Any) -> int:
    """Returns STRONGLY_TYPED; explicit batches are the default of TensorRT 10 and all that TensorRT 11 has."""
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
    shapes = checked_call(logger, "creating the optimization profile", builder.create_optimization_profile)
    sizes = [(shape.batch, shape.tokens) for shape in (profile.min, profile.opt, profile.max)]
    for name in INPUTS:
        shapes.set_shape(name, *sizes)  # returns nothing; an invalid shape is reported when the profile is added
    errors_before = logger.errors_seen
    if config.add_optimization_profile(shapes) < 0:
        new_errors = logger.errors_seen - errors_before
        reason = "; ".join(logger.errors[-new_errors:]) if new_errors > 0 else ""
        raise EngineError(f"TensorRT refused the shape profile {profile}{': ' if reason else ''}{reason}")


def _let_attention_decompose(network: Any, bindings: Any) -> None:
    """Allows TensorRT to run an attention as separate operators if it has no fused kernel, as for FP32."""
    attention_type = getattr(bindings.LayerType, "ATTENTION_INPUT", None)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if attention_type is not None and layer.type == attention_type:
            layer.__class__ = bindings.IAttentionInputLayer
            layer.attention.decomposable = True


def _set_capabilities(config: Any, target: Target, *, bindings: Any, capability: str | None) -> tuple[str, ...]:
    """Sets the GPUs of an ahead-of-time plan; TensorRT itself builds for the GPU that it runs on."""
    if target.runtime != TENSORRT_RTX:
        if capability is None:
            raise EngineError(
                f"--target {target.name} builds on the GPU itself, and this machine has none; build the plan there: "
                f"{program('build')} BUNDLE"
            )
        return (capability,)
    config.num_compute_capabilities = len(target.compute_capabilities)
    for index, gpu in enumerate(target.compute_capabilities):
        member = getattr(bindings.ComputeCapability, f"SM{gpu.replace('.', '')}", None)
        if member is None or not config.set_compute_capability(member, index):
            raise EngineError(
                f"{bindings.__name__} {bindings.__version__} cannot build for compute capability {gpu}; install "
                "a newer version"
            )
    return target.compute_capabilities


@contextmanager
def _progress(bindings: Any) -> Iterator[tuple[Any, Callable[[], bool]]]:
    """Shows TensorRT's progress as a bar, and makes Ctrl-C stop the builder without an exception in its C++ code."""
    cancelled = False

    def cancel(signum: int, frame: FrameType | None) -> None:
        nonlocal cancelled
        cancelled = True

    bar = tqdm(desc="building the plan", unit="step", total=0, disable=None, leave=False)

    class Monitor(bindings.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.remaining_steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.remaining_steps[phase_name] = num_steps
            bar.total += num_steps
            bar.set_postfix_str(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.remaining_steps[phase_name] = (
                self.remaining_steps.get(phase_name, 0) - 1
            )  # phases of the same name may run concurrently
            bar.update()
            return not cancelled

        def phase_finish(self, phase_name: str) -> None:
            bar.update(max(self.remaining_steps.pop(phase_name, 0), 0))

    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous = {signum: signal.signal(signum, cancel) for signum in signals}
    try:
        yield Monitor(), lambda: cancelled
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        bar.close()
