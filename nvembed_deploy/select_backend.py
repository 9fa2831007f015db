"""Selects the backend that runs a bundle on this machine.

On the GPU that the plan was built for it is TensorRT. Elsewhere it is ONNX Runtime or OpenVINO: the faster one, if
their vectors agree. This is measured once for a bundle, a processor and the runtimes' versions, and stored in the
user's cache folder.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
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
from nvembed_deploy.errors import (
    BundleError,
    ConfigError,
    DeployError,
    DeviceMismatchError,
    EngineError,
    InputTypeError,
    MissingExtra,
)
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.files.hashing import hash_file
from nvembed_deploy.files.hub import is_hub_name
from nvembed_deploy.files.records import from_json
from nvembed_deploy.parity.compare import compare, compute_reference_outputs
from nvembed_deploy.parity.probes import PROBES
from nvembed_deploy.spec import Dialect, Precision, Shape
from nvembed_deploy.system import (
    available_memory_bytes,
    cache_folder,
    describe_machine,
    installed_versions,
    is_installed,
)
from nvembed_deploy.tokenization import TextEncoder, TokenBatch

_log = logging.getLogger(__name__)

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
REPEATS = 5
LONG_SECONDS = 1.0
"""A batch is repeated for about this long, so that opening does not take much longer; a longer one runs once."""
MAX_COMPARED_SHAPE = Shape(batch=8, tokens=128)
"""Largest batch of the comparison. The parity check of the export compared the longest inputs."""
COPIES = 3
"""Memory that both runtimes need together, as a multiple of the weights: OpenVINO packs a second copy."""
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
        f"{PLAN} is not used: {reason}. Its ONNX graph runs on {backend.name} instead. Pass device='cpu' "
        "to request that, or device='cuda' to raise an error instead.",
        stacklevel=6,
    )


def _ort_on_cuda(bundle: Bundle, index: int) -> Backend:
    """Opens ONNX Runtime with its TensorRT and CUDA providers, as far as they are installed."""
    installed = [provider for provider in GPU if provider in available_providers()]
    if not installed:
        raise DeviceMismatchError(
            f"the installed ONNX Runtime has no CUDA provider; {install_command('gpu')} in place of the extra cpu"
        )
    CudaRuntime.load().device(index)
    providers = [(provider, {"device_id": index}) for provider in installed]
    while True:
        try:
            return OrtBackend(
                bundle.folder / GRAPH,
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
        note=CPU_NOTES[bundle.manifest.precision.base] if graph == CPU_GRAPH else "",
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


@dataclass(frozen=True, kw_only=True)
class CpuChoice:
    """The selected CPU runtime, and the measurements that it was selected by."""

    backend: str
    """`onnxruntime` or `openvino`."""
    reason: str
    single_ms: dict[str, float]
    """Milliseconds for one short query, by runtime."""
    batch_ms: dict[str, float]
    """Milliseconds for a padded batch of the probe texts, by runtime."""
    min_cosine: float | None
    """Minimum cosine between the runtimes' vectors of a text; None if OpenVINO could not run."""


def fastest_cpu_runtime(
    bundle: Bundle, text: TextEncoder, makers: Mapping[str, Callable[[], Backend]], *, threads: int | None
) -> tuple[str, Backend | None]:
    """Returns the name of the faster runtime, and its backend if it was opened to measure.

    Args:
        bundle: The checked bundle.
        text: Its text encoder.
        makers: Opens each runtime, by name.
        threads: The argument of `Encoder`; the choice depends on it.
    """
    if not is_installed(OPENVINO):
        return ONNXRUNTIME, None
    if not is_installed(ONNXRUNTIME):
        return OPENVINO, None
    path = cache_path(bundle, threads)
    if (cached_choice := read_choice(path)) is not None:
        _log.info("%s: %s (%s)", cached_choice.backend, cached_choice.reason, path)
        return cached_choice.backend, None
    weight_bytes = sum(entry.bytes for name, entry in bundle.manifest.files.items() if not name.endswith(".plan"))
    available_bytes = available_memory_bytes()
    if available_bytes is not None and COPIES * weight_bytes > available_bytes:
        _log.warning("%s: not enough memory to compare it with %s", ONNXRUNTIME, OPENVINO)
        return ONNXRUNTIME, None
    choice, backend = measure_cpu_runtimes(text, bundle, makers)
    _log.info("%s: %s", choice.backend, choice.reason)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(asdict(choice), indent=1).encode())
    except OSError as err:
        _log.warning("%s cannot be written (%s); the next start will measure again", path, err.strerror)
    return choice.backend, backend


def measure_cpu_runtimes(
    text: TextEncoder, bundle: Bundle, makers: Mapping[str, Callable[[], Backend]]
) -> tuple[CpuChoice, Backend]:
    """Opens both runtimes, compares their vectors by the bundle's tolerances, and times them alternately."""
    trusted = makers[ONNXRUNTIME]()
    try:
        other = makers[OPENVINO]()
        precision = bundle.manifest.precision
        reference_outputs = compute_reference_outputs(trusted, text, precision=precision, max_shape=MAX_COMPARED_SHAPE)
        report = compare(reference_outputs, other, text, precision=precision, max_shape=MAX_COMPARED_SHAPE)
    except DeployError as err:
        reason = f"openvino cannot run this graph: {err}"
        return CpuChoice(backend=ONNXRUNTIME, reason=reason, single_ms={}, batch_ms={}, min_cosine=None), trusted
    rows = text.tokenize([probe_text for _, probe_text in PROBES], max_length=MAX_COMPARED_SHAPE.tokens)
    backends = {ONNXRUNTIME: trusted, OPENVINO: other}
    single_ms = _times_ms(backends, text.pad(rows[:1]))
    batch_ms = _times_ms(backends, text.pad(rows))
    # The product gives both times the same weight, however much they differ.
    faster = min(backends, key=lambda name: single_ms[name] * batch_ms[name])
    figures = ", ".join(f"{name} {single_ms[name]:.1f} and {batch_ms[name]:.1f} ms" for name in backends)
    reason = f"one query and a batch of {len(rows)}: {figures}"
    if not report.passed:
        faster, reason = ONNXRUNTIME, f"openvino's vectors differ ({'; '.join(report.failures)})"
    return (
        CpuChoice(
            backend=faster,
            reason=reason,
            single_ms=single_ms,
            batch_ms=batch_ms,
            min_cosine=round(report.min_cosine, 7),
        ),
        backends[faster],
    )


def cache_path(bundle: Bundle, threads: int | None) -> Path:
    """Returns the path of the cached choice for this bundle on this machine."""
    versions = "-".join(f"{name}{version}" for name, version in installed_versions((ONNXRUNTIME, OPENVINO)).items())
    machine = "".join(letter if letter.isalnum() else "-" for letter in describe_machine())
    suffix = "" if threads is None else f"-{threads}threads"
    return cache_folder() / f"{bundle.manifest.manifest_sha256[:16]}-{machine}-{versions}{suffix}.json"


def read_choice(path: Path) -> CpuChoice | None:
    """Returns the cached choice, or None if the file is missing or damaged."""
    try:
        choice = from_json(CpuChoice, json.loads(path.read_bytes()))
        return choice if choice.backend in (ONNXRUNTIME, OPENVINO) else None
    except (OSError, ValueError, DeployError):
        return None


def _times_ms(backends: Mapping[str, Backend], batch: TokenBatch) -> dict[str, float]:
    """Returns each backend's median milliseconds for a batch; they alternate, after one warm-up run each."""
    warmup_ms = {name: _run_ms(backend, batch) for name, backend in backends.items()}
    repeats = min(REPEATS, int(LONG_SECONDS * 1000 / max(warmup_ms.values())))
    if not repeats:
        return warmup_ms
    times_ms: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(repeats):
        for name, backend in backends.items():
            times_ms[name].append(_run_ms(backend, batch))
    return {name: round(statistics.median(times), 3) for name, times in times_ms.items()}


def _run_ms(backend: Backend, batch: TokenBatch) -> float:
    started = time.perf_counter()
    backend.run(batch)
    return (time.perf_counter() - started) * 1000


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
        raise MissingExtra(f"a checkpoint runs in PyTorch ({err}); {install_command('export')}") from err
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
