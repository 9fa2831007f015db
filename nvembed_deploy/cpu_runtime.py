"""Chooses the faster of two CPU runtimes for a bundle, if their vectors agree.

This is measured once for a bundle, a processor and the runtimes' versions, and stored in the user's cache folder.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nvembed_deploy.backends.base import Backend
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.errors import DeployError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.files.records import from_json
from nvembed_deploy.parity.compare import compare, compute_reference_outputs
from nvembed_deploy.parity.probes import PROBES
from nvembed_deploy.spec import Shape
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
        openvino = makers[OPENVINO]()
        precision = bundle.manifest.precision
        reference_outputs = compute_reference_outputs(trusted, text, precision=precision, max_shape=MAX_COMPARED_SHAPE)
        report = compare(reference_outputs, openvino, text, precision=precision, max_shape=MAX_COMPARED_SHAPE)
    except DeployError as err:
        reason = f"openvino cannot run this graph: {err}"
        return CpuChoice(backend=ONNXRUNTIME, reason=reason, single_ms={}, batch_ms={}, min_cosine=None), trusted
    rows = text.tokenize([probe_text for _, probe_text in PROBES], max_length=MAX_COMPARED_SHAPE.tokens)
    backends = {ONNXRUNTIME: trusted, OPENVINO: openvino}
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
