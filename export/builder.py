"""The plan: one builder for TensorRT 10, TensorRT 11 and TensorRT-RTX, against the bindings module.

Networks are strongly typed: precision is what the ONNX graph says, since TensorRT 11 has no flags for it. Every bool
and None that TensorRT returns is checked and named. Source: NVIDIA TensorRT documentation, "Python API: build phase".
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from nvembed_deploy.backends.bindings import TENSORRT_RTX, make_logger, this_platform
from nvembed_deploy.backends.ort import INPUTS
from nvembed_deploy.bundle import PlanInfo
from nvembed_deploy.config import ShapeProfile
from nvembed_deploy.errors import EngineError
from nvembed_deploy.targets import Target


def build_plan(
    graph: Path, target: Target, *, profile: ShapeProfile, bindings: Any, capability: str | None
) -> tuple[bytes, PlanInfo]:
    """Builds a plan from a graph.

    Args:
        graph: `model.onnx`, its weights beside it.
        target: The device's recipe.
        profile: Shapes to accept.
        bindings: The module of TensorRT or TensorRT-RTX.
        capability: This machine's GPU, for targets that build for it.

    Returns:
        The plan's bytes, and what it needs to run.

    Raises:
        EngineError: TensorRT cannot parse the graph or cannot build the plan; its own words are in the message.
        KeyboardInterrupt: Ctrl-C or SIGTERM, once TensorRT has let go.
    """
    logger = make_logger(bindings)

    def check(result: Any, what: str) -> Any:
        if result is False or result is None:
            words = f": {logger.errors[-1]}" if logger.errors else ""
            raise EngineError(f"{bindings.__name__} {bindings.__version__} failed at {what}{words}")
        return result

    builder = check(bindings.Builder(logger), "creating the builder")
    network = check(builder.create_network(_network_flags(bindings)), "creating the network")
    _parse(graph, network, bindings=bindings, logger=logger)
    _let_attention_decompose(network, bindings)
    config = check(builder.create_builder_config(), "creating the configuration")
    shapes = check(builder.create_optimization_profile(), "creating the optimization profile")
    sizes = [(shape.batch, shape.tokens) for shape in (profile.min, profile.opt, profile.max)]
    for name in INPUTS:
        shapes.set_shape(name, *sizes)  # returns nothing; a wrong shape shows when the profile is added
    if config.add_optimization_profile(shapes) < 0:
        raise EngineError(f"{bindings.__name__} refuses the shape profile {profile}: {logger.errors[-1:]}")
    capabilities = _set_capabilities(config, target, bindings=bindings, capability=capability)
    with _progress(bindings) as (monitor, was_cancelled):
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if was_cancelled():
        raise KeyboardInterrupt
    check(plan, "building the plan")
    info = PlanInfo(
        runtime=target.runtime,
        version=bindings.__version__,
        platform=this_platform(),
        compute_capabilities=capabilities,
    )
    return bytes(memoryview(plan)), info


def _network_flags(bindings: Any) -> int:
    """STRONGLY_TYPED; on TensorRT 10 the batch is explicit by default, on 11 both are all there is."""
    return 1 << int(bindings.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parse(graph: Path, network: Any, *, bindings: Any, logger: Any) -> None:
    parser = bindings.OnnxParser(network, logger)
    if parser.parse_from_file(str(graph)):
        return
    errors = [str(parser.get_error(index).desc()) for index in range(parser.num_errors)]
    raise EngineError(
        f"{bindings.__name__} {bindings.__version__} cannot parse {graph.name} ({'; '.join(errors)}); try --dialect "
        "portable"
    )


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
            self.left[phase_name] -= 1
            bar.update()
            return not cancelled

        def phase_finish(self, phase_name: str) -> None:
            bar.update(max(self.left.pop(phase_name, 0), 0))

    previous = {number: signal.signal(number, cancel) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield Monitor(), lambda: cancelled
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        bar.close()
