"""Which CPU runtime runs a bundle: the faster one on this machine, of those whose vectors agree.

Measured once for a bundle, a processor and the runtimes' versions, and kept in the user's cache folder.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nvembed_deploy.atomic import write_file
from nvembed_deploy.backends import Backend
from nvembed_deploy.bundle import Bundle
from nvembed_deploy.config import Shape
from nvembed_deploy.errors import DeployError
from nvembed_deploy.machine import available_memory_bytes, cache_folder, describe_machine, installed_versions
from nvembed_deploy.parity import compare, observe
from nvembed_deploy.probes import PROBES
from nvembed_deploy.records import from_json
from nvembed_deploy.text import TextEncoder, TokenBatch

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
REPEATS = 5
LONG_SECONDS = 1.0
"""A batch that takes longer is run once: the models that large are not decided by noise."""
COMPARED = Shape(batch=8, tokens=128)
"""Largest batch of the comparison. The bundle's own gate has compared the longest inputs."""
COPIES = 3
"""Memory that both runtimes together may take, in files of weights: OpenVINO packs a second copy."""

_log = logging.getLogger(__name__)


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


def choose(
    bundle: Bundle, text: TextEncoder, makers: Mapping[str, Callable[[], Backend]], *, threads: int | None
) -> tuple[str, Backend | None]:
    """The name of the runtime to take, and the backend where one had to be opened to tell.

    Args:
        bundle: The checked bundle.
        text: Its text encoder.
        makers: Opens each runtime, by name.
        threads: As the user gave it: the choice depends on it.
    """
    if importlib.util.find_spec(OPENVINO) is None:
        return ONNXRUNTIME, None
    if importlib.util.find_spec(ONNXRUNTIME) is None:
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
    choice, backend = measure(text, bundle, makers)
    _log.info("%s: %s", choice.backend, choice.reason)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(asdict(choice), indent=1).encode())
    except OSError as err:
        _log.warning("%s cannot be written (%s); the next start measures again", path, err.strerror)
    return choice.backend, backend


def measure(
    text: TextEncoder, bundle: Bundle, makers: Mapping[str, Callable[[], Backend]]
) -> tuple[CpuChoice, Backend]:
    """Opens both runtimes, compares their vectors by the bundle's tolerances, and times them in turn."""
    trusted = makers[ONNXRUNTIME]()
    try:
        other = makers[OPENVINO]()
        precision = bundle.manifest.precision
        truth = observe(trusted, text, precision=precision, largest=COMPARED)
        report = compare(truth, other, text, precision=precision, largest=COMPARED)
    except DeployError as err:
        reason = f"openvino does not run this graph: {err}"
        return CpuChoice(backend=ONNXRUNTIME, reason=reason, single_ms={}, batch_ms={}, min_cosine=None), trusted
    rows = text.tokenize([body for _, body in PROBES], max_length=COMPARED.tokens)
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
