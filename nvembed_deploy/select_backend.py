"""Which backend runs a bundle on this machine.

TensorRT on the GPU that its plan is for; elsewhere ONNX Runtime or OpenVINO, the faster one of those whose vectors
agree: measured once for a bundle, a processor and the runtimes' versions, and kept in the user's cache folder.
"""

from __future__ import annotations

import functools
import json
import logging
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
from nvembed_deploy.bundle.manifest import CPU_GRAPH, GRAPH, PLAN, Manifest
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import program
from nvembed_deploy.errors import BundleError, ConfigError, DeployError, DeviceMismatchError, EngineError, MissingExtra
from nvembed_deploy.files.atomic import write_file
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
"""A batch that takes longer is run once: the models that large are not decided by noise."""
MAX_COMPARED_SHAPE = Shape(batch=8, tokens=128)
"""Largest batch of the comparison. The bundle's own gate has compared the longest inputs."""
COPIES = 3
"""Memory that both runtimes together may take, in files of weights: OpenVINO packs a second copy."""
MIN_FUSED_VERSION = (1, 25)
"""ONNX Runtime with fast CPU kernels for FP16 in opset 23: a text of 402 tokens took 8.8 s in 1.24, 0.3 s in 1.25."""
MAX_THREADS = 1024
"""More than any machine has cores; beyond it runtimes end the process rather than raise."""
EXACT = (Precision.FP32, Precision.FP16)
"""Precisions that OpenVINO runs in FP32: BF16 is eight times coarser than what their gate allows."""


class Runtime(str, Enum):
    """What a user may ask for by `backend=`."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    ONNXRUNTIME = ONNXRUNTIME
    OPENVINO = OPENVINO


@dataclass(frozen=True, kw_only=True)
class BackendRequest:
    """What the user asked for."""

    device: str
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    runtime: Runtime
    threads: int | None
    """Threads that compute on a CPU; None leaves it to the runtime."""

    @classmethod
    def of(cls, device: str, backend: str, threads: int | None) -> BackendRequest:
        """Reads what was passed to `Encoder`.

        Raises:
            ConfigError: A value is unknown, or two do not go together.
        """
        if backend not in list(Runtime):
            raise ConfigError(f"backend is {backend!r}; pass {', '.join(repr(item.value) for item in Runtime)}")
        if threads is not None and (
            isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS
        ):
            raise ConfigError(f"threads is {threads!r}; pass a whole number from 1 to {MAX_THREADS}")
        wish = cls(device=device, runtime=Runtime(backend), threads=threads)
        index = wish.index
        if wish.runtime is Runtime.OPENVINO and index is not None and device != "auto":
            raise ConfigError(f"backend='openvino' runs on CPUs and device is {device!r}; pass device='cpu'")
        if wish.runtime is Runtime.TENSORRT and index is None:
            raise ConfigError("backend='tensorrt' runs on GPUs and device is 'cpu'; pass device='cuda'")
        return wish

    def for_file(self, name: str) -> BackendRequest:
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


def open_backend(bundle: Bundle, text: TextEncoder, name: str, wish: BackendRequest) -> Backend:
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
        raise BundleError(f"{bundle.folder} has no {PLAN}; build one: {program('build')} {bundle.folder}")
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
                bundle=bundle,
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


def _on_cpu(bundle: Bundle, text: TextEncoder, wish: BackendRequest) -> Backend:
    makers: dict[str, Callable[[], Backend]] = {
        ONNXRUNTIME: functools.partial(_ort_on_cpu, bundle, wish.threads),
        OPENVINO: functools.partial(_openvino, bundle, wish.threads),
    }
    if wish.runtime in (Runtime.ONNXRUNTIME, Runtime.OPENVINO):
        return makers[wish.runtime.value]()
    chosen, opened = fastest_cpu_runtime(bundle, text, makers, threads=wish.threads)
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
    """Tells who runs a graph in the fused dialect on an ONNX Runtime whose kernels for it are missing or very slow.

    Raises:
        EngineError: The graph is quantized, which those versions cannot load in that dialect.
    """
    version = onnxruntime_version()
    if manifest.dialect is not Dialect.FUSED or tuple(map(int, version.split(".")[:2])) >= MIN_FUSED_VERSION:
        return
    cure = (
        f"export it again with --dialect portable, or use ONNX Runtime {MIN_FUSED_VERSION[0]}.{MIN_FUSED_VERSION[1]} or "
        "newer, which needs Python 3.11"
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
    """What was measured, and what follows from it."""

    backend: str
    """`onnxruntime` or `openvino`."""
    reason: str
    single_ms: dict[str, float]
    """Milliseconds of one short query, by the name of what ran it."""
    batch_ms: dict[str, float]
    """Milliseconds of a padded batch of the gate's texts."""
    min_cosine: float | None
    """Of OpenVINO's vectors to ONNX Runtime's, the worst text; None where it did not run."""


def fastest_cpu_runtime(
    bundle: Bundle, text: TextEncoder, makers: Mapping[str, Callable[[], Backend]], *, threads: int | None
) -> tuple[str, Backend | None]:
    """The name of the runtime to take, and the backend where one had to be opened to tell.

    Args:
        bundle: The checked bundle.
        text: Its text encoder.
        makers: Opens each runtime, by name.
        threads: As the user gave it: the choice depends on it.
    """
    if not is_installed(OPENVINO):
        return ONNXRUNTIME, None
    if not is_installed(ONNXRUNTIME):
        return OPENVINO, None
    path = cache_path(bundle, threads)
    if (known := read_choice(path)) is not None:
        _log.info("%s: %s (%s)", known.backend, known.reason, path)
        return known.backend, None
    size = sum(entry.bytes for name, entry in bundle.manifest.files.items() if not name.endswith(".plan"))
    available = available_memory_bytes()
    if available is not None and COPIES * size > available:
        _log.warning("%s: there is not memory enough to compare it with %s", ONNXRUNTIME, OPENVINO)
        return ONNXRUNTIME, None
    choice, backend = measure_cpu_runtimes(text, bundle, makers)
    _log.info("%s: %s", choice.backend, choice.reason)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(asdict(choice), indent=1).encode())
    except OSError as err:
        _log.warning("%s cannot be written (%s); the next start measures again", path, err.strerror)
    return choice.backend, backend


def measure_cpu_runtimes(
    text: TextEncoder, bundle: Bundle, makers: Mapping[str, Callable[[], Backend]]
) -> tuple[CpuChoice, Backend]:
    """Opens both runtimes, compares their vectors by the bundle's tolerances, and times them in turn."""
    trusted = makers[ONNXRUNTIME]()
    try:
        other = makers[OPENVINO]()
        precision = bundle.manifest.precision
        reference_outputs = compute_reference_outputs(trusted, text, precision=precision, max_shape=MAX_COMPARED_SHAPE)
        report = compare(reference_outputs, other, text, precision=precision, max_shape=MAX_COMPARED_SHAPE)
    except DeployError as err:
        reason = f"openvino does not run this graph: {err}"
        return CpuChoice(backend=ONNXRUNTIME, reason=reason, single_ms={}, batch_ms={}, min_cosine=None), trusted
    rows = text.tokenize([body for _, body in PROBES], max_length=MAX_COMPARED_SHAPE.tokens)
    backends = {ONNXRUNTIME: trusted, OPENVINO: other}
    single = _times_ms(backends, text.pad(rows[:1]))
    batch = _times_ms(backends, text.pad(rows))
    # Both count alike, whatever each takes: a ratio of products.
    faster = min(backends, key=lambda name: single[name] * batch[name])
    figures = ", ".join(f"{name} {single[name]:.1f} and {batch[name]:.1f} ms" for name in backends)
    reason = f"one query and a batch of {len(rows)}: {figures}"
    if not report.passed:
        faster, reason = ONNXRUNTIME, f"openvino's vectors differ ({'; '.join(report.failures)})"
    return (
        CpuChoice(
            backend=faster, reason=reason, single_ms=single, batch_ms=batch, min_cosine=round(report.min_cosine, 7)
        ),
        backends[faster],
    )


def cache_path(bundle: Bundle, threads: int | None) -> Path:
    """Where the choice for this bundle on this machine is kept."""
    versions = "-".join(f"{name}{version}" for name, version in installed_versions((ONNXRUNTIME, OPENVINO)).items())
    machine = "".join(letter if letter.isalnum() else "-" for letter in describe_machine())
    width = "" if threads is None else f"-{threads}threads"
    return cache_folder() / f"{bundle.manifest.manifest_sha256[:16]}-{machine}-{versions}{width}.json"


def read_choice(path: Path) -> CpuChoice | None:
    """What was measured before, or None; a damaged file is as good as none."""
    try:
        found = from_json(CpuChoice, json.loads(path.read_bytes()))
        return found if found.backend in (ONNXRUNTIME, OPENVINO) else None
    except (OSError, ValueError, DeployError):
        return None


def _times_ms(backends: Mapping[str, Backend], batch: TokenBatch) -> dict[str, float]:
    """Median milliseconds of a batch, the backends in turn, after one run to warm up."""
    first = {name: _run_ms(backend, batch) for name, backend in backends.items()}
    if max(first.values()) > LONG_SECONDS * 1000:
        return first
    found: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(REPEATS):
        for name, backend in backends.items():
            found[name].append(_run_ms(backend, batch))
    return {name: round(statistics.median(times), 3) for name, times in found.items()}


def _run_ms(backend: Backend, batch: TokenBatch) -> float:
    started = time.perf_counter()
    backend.run(batch)
    return (time.perf_counter() - started) * 1000
