"""Selects the backend that runs a bundle on this machine.

On the GPU that the plan was built for it is TensorRT. Elsewhere it is ONNX Runtime or OpenVINO: the one that
`cpu_runtime` chooses.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from nvembed_deploy.backends.base import Backend
from nvembed_deploy.backends.cuda import CudaRuntime
from nvembed_deploy.backends.ort import CPU, CPU_NOTES, GPU, OrtBackend, available_providers, onnxruntime_version
from nvembed_deploy.backends.ov import OvBackend
from nvembed_deploy.backends.trt import open_plan
from nvembed_deploy.bundle.manifest import CPU_GRAPH, GRAPH, PLAN, TOKENIZER, Manifest
from nvembed_deploy.bundle.reader import OPEN_ATTEMPTS, Bundle
from nvembed_deploy.console import install_command, program
from nvembed_deploy.cpu_runtime import ONNXRUNTIME, OPENVINO, fastest_cpu_runtime
from nvembed_deploy.errors import (
    BundleError,
    ConfigError,
    DeployError,
    DeviceMismatchError,
    EngineError,
    InputTypeError,
    MissingExtra,
)
from nvembed_deploy.files.hashing import hash_file
from nvembed_deploy.files.hub import is_hub_name
from nvembed_deploy.spec import Dialect, Precision
from nvembed_deploy.tokenization import TextEncoder

_log = logging.getLogger(__name__)

MIN_FUSED_VERSION = (1, 25)
"""First ONNX Runtime with fast CPU kernels for FP16 in opset 23: 402 tokens took 8.8 s in 1.24 and 0.3 s in 1.25."""
MAX_THREADS = 1024
"""More than the cores of any machine; with larger values runtimes end the process instead of raising."""
EXACT = (Precision.FP32, Precision.FP16)
"""Precisions that OpenVINO computes in FP32: BF16 is eight times coarser than their tolerances allow."""


class Runtime(str, Enum):
    """Values of the argument `backend`."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    ONNXRUNTIME = ONNXRUNTIME
    OPENVINO = OPENVINO


@dataclass(frozen=True, kw_only=True)
class BackendRequest:
    """Device, runtime and threads that the user requested."""

    device: str
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    runtime: Runtime
    threads: int | None
    """Compute threads on a CPU; None for the runtime's default."""

    @classmethod
    def parse(cls, device: str, backend: str, threads: int | None) -> BackendRequest:
        """Checks the arguments that were passed to `Encoder`.

        Raises:
            ConfigError: A value is unknown, or two values contradict each other.
        """
        if backend not in list(Runtime):
            raise ConfigError(f"backend is {backend!r}; pass {', '.join(repr(runtime.value) for runtime in Runtime)}")
        if threads is not None and (
            isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS
        ):
            raise ConfigError(f"threads is {threads!r}; pass a whole number from 1 to {MAX_THREADS}")
        request = cls(device=device, runtime=Runtime(backend), threads=threads)
        index = request.index
        if request.runtime is Runtime.OPENVINO and index is not None and device != "auto":
            raise ConfigError(f"backend='openvino' runs on CPUs, but device is {device!r}; pass device='cpu'")
        if request.runtime is Runtime.TENSORRT and index is None:
            raise ConfigError("backend='tensorrt' runs on GPUs, but device is 'cpu'; pass device='cuda'")
        return request

    def for_file(self, name: str) -> BackendRequest:
        """Returns the request with ONNX Runtime if the path names `model.onnx` and no runtime was requested."""
        return replace(self, runtime=Runtime.ONNXRUNTIME) if name == GRAPH and self.runtime is Runtime.AUTO else self

    @property
    def index(self) -> int | None:
        """Index of the CUDA device, 0 for `auto`, None for the CPU."""
        kind, _, index = self.device.partition(":") if isinstance(self.device, str) else ("", "", "")
        if self.device == "cpu":
            return None
        if self.device in ("auto", "cuda"):
            return 0
        if kind == "cuda" and index.isdecimal():
            return int(index)
        raise ConfigError(f"device is {self.device!r}; pass 'auto', 'cpu', 'cuda' or 'cuda:N'")


def open_backend(bundle: Bundle, text: TextEncoder, name: str, request: BackendRequest) -> Backend:
    """Opens the best backend that the request allows.

    Args:
        bundle: The checked bundle.
        text: Its text encoder.
        name: Last part of the path that the user gave: `model.onnx` requests the graph.
        request: Device, runtime and threads that the user requested.

    Raises:
        BundleError: A plan was requested and the bundle has none.
        DeviceMismatchError: A GPU or TensorRT was requested and cannot run the bundle.
        MissingExtra: The requested runtime is not installed.
        EngineError: The graph or the plan could not be loaded.
    """
    request = request.for_file(name)
    index = request.index
    if index is None or request.runtime is Runtime.OPENVINO:
        return _on_cpu(bundle, text, request)
    has_plan = bundle.manifest.plan is not None
    if not has_plan and (name == PLAN or request.runtime is Runtime.TENSORRT):
        raise BundleError(f"{bundle.folder} has no {PLAN}; build one: {program('build')} {bundle.folder}")
    reasons: list[str] = [] if has_plan else ["the bundle has no plan"]
    attempts: list[Callable[[], Backend]] = []
    if has_plan and request.runtime is not Runtime.ONNXRUNTIME:
        attempts.append(functools.partial(open_plan, bundle, index))
    if request.runtime is not Runtime.TENSORRT:
        attempts.append(functools.partial(_ort_on_cuda, bundle, index))
    for attempt in attempts:
        try:
            backend = attempt()
        except (DeviceMismatchError, MissingExtra) as err:
            if request.device != "auto" or request.runtime is Runtime.TENSORRT:
                name, requested = (
                    ("device", request.device) if request.device != "auto" else ("backend", request.runtime.value)
                )
                raise type(err)(
                    f"{name}={requested!r} was requested but cannot be used: {err}; fix this or pass {name}='auto'"
                ) from err
            reasons.append(str(err))
            continue
        if reasons:
            _warn_of_fallback(reasons[0], backend)
        return backend
    backend = _on_cpu(bundle, text, request)
    # A bundle without a plan on a machine without a GPU is as expected.
    if request.runtime is Runtime.AUTO and (has_plan or _has_gpu()):
        _warn_of_fallback(reasons[0], backend)
    return backend


def _has_gpu() -> bool:
    try:
        CudaRuntime.load().device(0)
    except DeviceMismatchError:
        return False
    except MissingExtra:
        pass  # a driver, and no cuda-python
    return True


def _warn_of_fallback(reason: str, backend: Backend) -> None:
    warnings.warn(
        f"{PLAN} is not used: {reason}. Its ONNX graph runs on {backend.name} instead. The device 'cpu' "
        "requests that without this note, and 'cuda' makes it an error.",
        stacklevel=6,
    )


def _ort_on_cuda(bundle: Bundle, index: int) -> Backend:
    """Opens ONNX Runtime with its TensorRT and CUDA providers, as far as they are installed; they have no FP4."""
    CudaRuntime.load().device(index)  # without a GPU, another build of ONNX Runtime would not help
    installed = [provider for provider in GPU if provider in available_providers()]
    if not installed:
        raise DeviceMismatchError(
            "the installed ONNX Runtime has no CUDA provider; install its CUDA build in place of it: "
            f"{install_command('gpu')}"
        )
    providers = [(provider, {"device_id": index}) for provider in installed]
    while True:
        try:
            return OrtBackend(
                bundle.folder / (CPU_GRAPH if bundle.manifest.precision is Precision.NVFP4 else GRAPH),
                bundle=bundle,
                providers=(*providers, CPU),
                as_written=bundle.manifest.precision.quantized,  # full optimization rejects signed pairs (1.27 to 1.32)
                dimension=bundle.manifest.dimension,
            )
        except DeviceMismatchError as err:
            # The CUDA build lists TensorRT even if its libraries are missing.
            _log.info("%s", err)
            if not providers[1:]:
                raise
            providers = providers[1:]


def _on_cpu(bundle: Bundle, text: TextEncoder, request: BackendRequest) -> Backend:
    makers: dict[str, Callable[[], Backend]] = {
        ONNXRUNTIME: functools.partial(_ort_on_cpu, bundle, request.threads),
        OPENVINO: functools.partial(_openvino, bundle, request.threads),
    }
    if request.runtime in (Runtime.ONNXRUNTIME, Runtime.OPENVINO):
        return makers[request.runtime.value]()
    chosen, opened = fastest_cpu_runtime(bundle, text, makers, threads=request.threads)
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
    _note_old_onnxruntime(bundle.manifest)
    return OrtBackend(
        bundle.folder / graph,
        bundle=bundle,
        note=CPU_NOTES[bundle.manifest.precision] if graph == CPU_GRAPH else "",
        dimension=bundle.manifest.dimension,
        threads=threads,
    )


def _note_old_onnxruntime(manifest: Manifest) -> None:
    """Warns if the installed ONNX Runtime lacks kernels for the fused dialect, or has very slow ones.

    Raises:
        EngineError: The graph is quantized; such versions cannot load it in that dialect.
    """
    version = onnxruntime_version()
    if manifest.dialect is not Dialect.FUSED or tuple(map(int, version.split(".")[:2])) >= MIN_FUSED_VERSION:
        return
    cure = (
        f"export it again with --dialect portable, or use ONNX Runtime {MIN_FUSED_VERSION[0]}.{MIN_FUSED_VERSION[1]} "
        "or newer, which needs Python 3.11"
    )
    if manifest.precision.quantized:
        raise EngineError(f"ONNX Runtime {version} cannot load a quantized graph in the fused dialect; {cure}")
    if manifest.precision is Precision.FP16:
        warnings.warn(
            f"ONNX Runtime {version} runs FP16 graphs in the fused dialect 30 times slower than later ones; {cure}",
            stacklevel=5,
        )


def open_parts(
    path: str | Path, device: str, *, backend: str = "auto", threads: int | None = None
) -> tuple[Bundle, TextEncoder, Backend]:
    """Opens a bundle, its tokenizer and its backend from the same version of the bundle; raises `Encoder`'s errors."""
    request = BackendRequest.parse(device, backend, threads)
    for _ in range(OPEN_ATTEMPTS):
        bundle = Bundle.open(path)
        try:
            text = TextEncoder(bundle.read(TOKENIZER), bundle.manifest.text)
            opened_backend = open_backend(bundle, text, Path(path).name, request)
        except DeployError:
            if bundle.is_current():
                raise
            continue
        if bundle.is_current():  # otherwise it was replaced while it was loading, and the new one is opened
            return bundle, text, opened_backend
    raise BundleError(f"{path} keeps changing while it is being opened; retry when the export has finished")


def open_checkpoint(
    checkpoint: str, bundle_folder: str, manifest_sha256: str, device: str
) -> tuple[Bundle, TextEncoder, Backend]:
    """Opens a checkpoint in PyTorch with the tokenizer and the text rules of a bundle that was made from it."""
    try:
        from nvembed_deploy.backends.pytorch import PyTorchBackend
    except ImportError as err:
        raise MissingExtra(f"a checkpoint runs in PyTorch ({err}); install it: {install_command('export')}") from err
    bundle = Bundle.open(bundle_folder)
    if bundle.manifest.manifest_sha256 != manifest_sha256:
        raise BundleError(f"{bundle_folder} was replaced by another bundle; open both encoders again")
    text = TextEncoder(bundle.read(TOKENIZER), bundle.manifest.text)
    source = bundle.manifest.source
    for name, entry in source.files.items():
        path = Path(checkpoint, name)
        if path.suffix == ".safetensors" and (not path.is_file() or hash_file(path) != entry):
            raise ConfigError(
                f"{name} of {checkpoint} differs from the file that the bundle was made from; pass the bundle's own "
                "checkpoint as --reference, or export it again"
            )
    backend = PyTorchBackend(checkpoint, config=source.architecture, device=device, half=device != "cpu")
    return bundle, text, backend


def absolute_path(path: str | Path) -> str:
    """Returns the absolute path without resolving links, and a Hugging Face repository name unchanged.

    Raises:
        InputTypeError: The argument is not a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputTypeError(
            f"path is a {type(path).__name__}; pass a bundle's folder, its engine.plan or its model.onnx"
        )
    is_name = not os.path.lexists(path) and is_hub_name(str(path))
    return str(path) if is_name else str(Path(path).absolute())
