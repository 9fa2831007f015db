"""What runs a bundle on this machine: TensorRT on the GPU that its plan is for, ONNX Runtime or OpenVINO elsewhere."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from nvembed_deploy.backends import Backend
from nvembed_deploy.backends import cpu_choice as cpu
from nvembed_deploy.backends.cuda import CudaRuntime
from nvembed_deploy.backends.ort import CPU, CPU_NOTES, GPU, OrtBackend, available_providers
from nvembed_deploy.backends.ov import OvBackend
from nvembed_deploy.backends.trt import open_plan
from nvembed_deploy.bundle import CPU_GRAPH, GRAPH, PLAN, Bundle
from nvembed_deploy.config import Precision
from nvembed_deploy.errors import BundleError, ConfigError, DeviceMismatchError, MissingExtra
from nvembed_deploy.text import TextEncoder

_log = logging.getLogger(__name__)

EXACT = (Precision.FP32, Precision.FP16)
"""Precisions that OpenVINO runs in FP32: BF16 is eight times coarser than what their gate allows."""


class Runtime(str, Enum):
    """What a user may ask for by `backend=`."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    ONNXRUNTIME = cpu.ONNXRUNTIME
    OPENVINO = cpu.OPENVINO


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the user asked for."""

    device: str
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    runtime: Runtime
    threads: int | None
    """Threads that compute on a CPU; None leaves it to the runtime."""

    @classmethod
    def of(cls, device: str, backend: str, threads: int | None) -> Wish:
        """Reads what was passed to `Encoder`.

        Raises:
            ConfigError: A value is unknown, or two do not go together.
        """
        if backend not in list(Runtime):
            raise ConfigError(f"backend is {backend!r}; pass {', '.join(repr(item.value) for item in Runtime)}")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ConfigError(f"threads is {threads!r}; pass a whole number of at least 1")
        wish = cls(device=device, runtime=Runtime(backend), threads=threads)
        index = wish.index
        if wish.runtime is Runtime.OPENVINO and index is not None and device != "auto":
            raise ConfigError(f"backend='openvino' runs on CPUs and device is {device!r}; pass device='cpu'")
        if wish.runtime is Runtime.TENSORRT and index is None:
            raise ConfigError("backend='tensorrt' runs on GPUs and device is 'cpu'; pass device='cuda'")
        return wish

    def for_file(self, name: str) -> Wish:
        """The wish of who names `model.onnx`: ONNX Runtime, unless another runtime is asked for."""
        return replace(self, runtime=Runtime.ONNXRUNTIME) if name == GRAPH and self.runtime is Runtime.AUTO else self

    @property
    def index(self) -> int | None:
        """Number of the CUDA device, 0 for `auto`, None for the CPU."""
        kind, _, number = self.device.partition(":") if isinstance(self.device, str) else ("", "", "")
        if self.device == "cpu":
            return None
        if self.device in ("auto", "cuda"):
            return 0
        if kind == "cuda" and number.isdecimal():
            return int(number)
        raise ConfigError(f"device is {self.device!r}; pass 'auto', 'cpu', 'cuda' or 'cuda:N'")


def open_backend(bundle: Bundle, text: TextEncoder, name: str, wish: Wish) -> Backend:
    """The best backend that the wish allows.

    Args:
        bundle: The checked bundle.
        text: Its text encoder.
        name: Last part of the path that the user gave: `model.onnx` asks for the graph.
        wish: What the user asked for.

    Raises:
        BundleError: A plan was asked for and there is none.
        DeviceMismatchError: A GPU or TensorRT was asked for and does not fit.
        MissingExtra: What was asked for is not installed.
        EngineError: It could not be loaded.
    """
    wish = wish.for_file(name)
    index = wish.index
    if index is None or wish.runtime is Runtime.OPENVINO:
        return _on_cpu(bundle, text, wish)
    has_plan = bundle.manifest.plan is not None
    if not has_plan and (name == PLAN or wish.runtime is Runtime.TENSORRT):
        raise BundleError(f"{bundle.folder} has no {PLAN}; build one: python -m nvembed_deploy.build {bundle.folder}")
    reasons: list[str] = [] if has_plan else ["the bundle has none"]
    attempts: list[Callable[[], Backend]] = []
    if has_plan and wish.runtime is not Runtime.ONNXRUNTIME:
        attempts.append(functools.partial(open_plan, bundle, index))
    if wish.runtime is not Runtime.TENSORRT:
        attempts.append(functools.partial(_ort_on_cuda, bundle, index))
    for attempt in attempts:
        try:
            backend = attempt()
        except (DeviceMismatchError, MissingExtra) as err:
            asked = f"device={wish.device!r}" if wish.device != "auto" else f"backend={wish.runtime.value!r}"
            if wish.device != "auto" or wish.runtime is Runtime.TENSORRT:
                raise type(err)(f"{asked} was asked for: {err}; mend that, or pass 'auto'") from err
            reasons.append(str(err))
            continue
        if reasons:
            _warn_of_fallback(reasons[0], backend)
        return backend
    backend = _on_cpu(bundle, text, wish)
    if wish.runtime is Runtime.AUTO:
        _warn_of_fallback(reasons[0], backend)
    return backend


def _warn_of_fallback(reason: str, backend: Backend) -> None:
    warnings.warn(
        f"{PLAN} is not used: {reason}. The graph it is built from runs on {backend.name} instead. Pass device='cpu' "
        "to ask for that, or device='cuda' to make this an error.",
        stacklevel=5,
    )


def _ort_on_cuda(bundle: Bundle, index: int) -> Backend:
    """ONNX Runtime's TensorRT and CUDA providers, those that are installed."""
    installed = [provider for provider in GPU if provider in available_providers()]
    if not installed:
        raise DeviceMismatchError(
            "the installed ONNX Runtime has no CUDA provider; pip install 'nvembed-deploy[gpu]' in place of [cpu]"
        )
    CudaRuntime.load().device(index)
    ordered = [(provider, {"device_id": index}) for provider in installed]
    while True:
        try:
            return OrtBackend(
                bundle.folder / GRAPH,
                providers=(*ordered, CPU),
                as_written=bundle.manifest.precision.quantized,  # full optimisation refuses signed pairs (1.27 to 1.32)
                dimension=bundle.manifest.dimension,
            )
        except DeviceMismatchError as err:
            # The CUDA build lists TensorRT whether or not its libraries are there.
            _log.info("%s", err)
            if not ordered[1:]:
                raise
            ordered = ordered[1:]


def _on_cpu(bundle: Bundle, text: TextEncoder, wish: Wish) -> Backend:
    makers: dict[str, Callable[[], Backend]] = {
        cpu.ONNXRUNTIME: functools.partial(_ort_on_cpu, bundle, wish.threads),
        cpu.OPENVINO: functools.partial(_openvino, bundle, wish.threads),
    }
    if wish.runtime in (Runtime.ONNXRUNTIME, Runtime.OPENVINO):
        return makers[wish.runtime.value]()
    chosen, opened = cpu.choose(bundle, text, makers, threads=wish.threads)
    return opened or makers[chosen]()


def _cpu_graph(bundle: Bundle) -> str:
    return CPU_GRAPH if CPU_GRAPH in bundle.manifest.files else GRAPH


def _openvino(bundle: Bundle, threads: int | None) -> Backend:
    manifest = bundle.manifest
    return OvBackend(
        bundle.folder / _cpu_graph(bundle),
        dimension=manifest.dimension,
        exact=manifest.precision in EXACT,
        threads=threads,
    )


def _ort_on_cpu(bundle: Bundle, threads: int | None) -> Backend:
    graph = _cpu_graph(bundle)
    return OrtBackend(
        bundle.folder / graph,
        note=CPU_NOTES[bundle.manifest.precision.base] if graph == CPU_GRAPH else "",
        dimension=bundle.manifest.dimension,
        threads=threads,
    )
