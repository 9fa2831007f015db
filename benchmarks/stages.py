"""`python -m benchmarks.stages BUNDLE[@BACKEND] ...`: time of each step of a bulk run and a single query.

Times the encoder's steps while it runs; tokenizing runs concurrently with the engine, so that the steps of a bulk run
may add up to more than its time. Reports medians of repeats, alternating between the bundles, and for OpenVINO also the
time of its operators, one batch at a time. Writes benchmarks/results/profile.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers import mixed_texts
from nvembed_deploy.backends.ort import INPUTS
from nvembed_deploy.backends.ov import CPU, OvBackend
from nvembed_deploy.batching import DEFAULT_BATCH_TOKENS, plan_batches
from nvembed_deploy.console import echo, run
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.engines.bench import QUERY, corpus, open_engine
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import describe_machine

RECORD_PATH = Path("benchmarks") / "results" / "profile.json"
STEPS = ("tokenizing", "padding", "engine")
BULK_REPEATS, QUERY_REPEATS = 5, 100
OPERATORS = {"FullyConnected": "products with weights", "ScaledDotProductAttention": "attention"}
"""Prefixes of the names or types of OpenVINO's operators, and their labels; all others count as the rest."""


@contextmanager
def timed(encoder: Encoder) -> Iterator[dict[str, float]]:
    """Measures the seconds of each step while the block runs; concurrent calls of a step count once."""
    seconds: dict[str, float] = defaultdict(float)
    running: dict[str, int] = defaultdict(int)
    since: dict[str, float] = {}
    lock = threading.Lock()

    def timer(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*arguments: Any, **keywords: Any) -> Any:
            with lock:
                if not running[name]:
                    since[name] = time.perf_counter()
                running[name] += 1
            try:
                return call(*arguments, **keywords)
            finally:
                with lock:
                    running[name] -= 1
                    if not running[name]:
                        seconds[name] += time.perf_counter() - since[name]

        return timed_call

    text, backend = encoder._text, encoder._backend
    methods = ((text, "tokenize"), (text, "pad"), (backend, "run"), (backend, "run_concurrent"))
    for step, (target, method) in zip((*STEPS, "engine"), methods, strict=True):
        setattr(target, method, timer(step, getattr(target, method)))
    try:
        started = time.perf_counter()
        yield seconds
        seconds["in all"] = time.perf_counter() - started
    finally:
        for target, method in methods:
            delattr(target, method)


def profile(
    encoders: dict[str, Encoder], action: Callable[[Encoder], object], repeats: int
) -> dict[str, dict[str, float]]:
    """Returns the median milliseconds of each step for each encoder.

    Args:
        encoders: Encoders by name.
        action: Call to measure.
        repeats: Number of measured calls, after one warm-up call.
    """
    times: dict[str, list[dict[str, float]]] = {name: [] for name in encoders}
    for repeat in range(repeats + 1):
        for name, encoder in encoders.items():
            with timed(encoder) as seconds:
                action(encoder)
            if repeat:
                times[name].append(dict(seconds))
    return {
        name: {
            step: round(statistics.median(seconds[step] for seconds in repeat_times) * 1000, 3)
            for step in (*STEPS, "in all")
        }
        for name, repeat_times in times.items()
    }


def operators(encoder: Encoder, texts: list[str], repeats: int) -> dict[str, float]:
    """Returns the median milliseconds of each kind of OpenVINO's operators in `OPERATORS`, one batch at a time.

    Raises:
        ConfigError: The backend has no second copy of its graph.
    """
    backend = encoder._backend
    assert isinstance(backend, OvBackend)
    if backend._graph is None:
        raise ConfigError(
            "OpenVINO's operators can only be timed with at least two cores and models below 1 GiB; use @onnxruntime"
        )
    settings = backend._settings | {"PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True}
    request = backend._core.compile_model(backend._graph, CPU, settings).create_infer_request()
    rows = encoder.tokenize(texts)
    lengths = [len(row) for row in rows]
    max_batch = encoder.manifest.profile.max.batch
    kind_times: dict[str, list[float]] = defaultdict(list)
    for repeat in range(repeats + 1):
        seconds = dict.fromkeys((*OPERATORS.values(), "the rest"), 0.0)
        for batch in plan_batches(lengths, max_rows=max_batch, max_tokens=DEFAULT_BATCH_TOKENS):
            padded = encoder._text.pad([rows[index] for index in batch])
            request.infer(dict(zip(INPUTS, padded, strict=True)), share_inputs=True)
            for operator in request.get_profiling_info():
                names = (operator.node_type, operator.node_name)
                kind = next((OPERATORS[key] for key in OPERATORS if any(n.startswith(key) for n in names)), "the rest")
                seconds[kind] += operator.real_time.total_seconds()
        if repeat:
            for kind, kind_seconds in seconds.items():
                kind_times[kind].append(kind_seconds)
    return {kind: round(statistics.median(repeat_times) * 1000, 1) for kind, repeat_times in kind_times.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages", description=__doc__.split(": ", 1)[1])
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE[@BACKEND]")
    parser.add_argument("--texts", type=int, default=600, help="number of texts of the bulk run (default: %(default)s)")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with the data sets of benchmarks.peers (default: texts from Python's documentation)",
    )
    flags = parser.parse_args(argv)

    def command() -> None:
        encoders = {}
        for bundle in flags.bundles:
            encoder = open_engine(bundle, "cpu", None)[0]
            encoders[f"{encoder.manifest.precision.value}, {encoder.backend.split(' (')[0]}"] = encoder
        texts = mixed_texts(flags.data, flags.texts) if flags.data else corpus(flags.texts)
        tokens = sum(len(row) for row in next(iter(encoders.values())).tokenize(texts))
        operator_ms = {
            name: operators(encoder, texts, BULK_REPEATS)
            for name, encoder in encoders.items()
            if isinstance(encoder._backend, OvBackend)
        }
        data_flag = " --data DIR" if flags.data else ""
        record = {
            "command": f"python -m benchmarks.stages BUNDLE@BACKEND ...{data_flag} --texts {flags.texts}",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "texts": len(texts),
            "tokens": tokens,
            "bulk_ms": profile(encoders, lambda encoder: encoder.encode(texts), BULK_REPEATS),
            "query_ms": profile(encoders, lambda encoder: encoder.encode(QUERY), QUERY_REPEATS),
            "operators_ms": operator_ms,
        }
        write_file(RECORD_PATH, (json.dumps(record, indent=1) + "\n").encode())
        echo(json.dumps(record["bulk_ms"]))

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
