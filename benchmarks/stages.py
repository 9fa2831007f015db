"""`python -m benchmarks.stages BUNDLE[@BACKEND] ...`: where the time of a bulk run and of a single query goes.

Times the encoder's own steps while it runs; tokenizing goes on beside the engine, so that the steps of a bulk run may
add up to more than its time. Medians of repeats, the sides in turn. For OpenVINO also what its operators take, one
batch at a time. Writes benchmarks/results/profile.json.
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
from nvembed_deploy.batching import plan_batches
from nvembed_deploy.console import run, say
from nvembed_deploy.encoder import DEFAULT_BATCH_TOKENS, Encoder
from nvembed_deploy.engines.bench import QUERY, corpus, open_side
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import describe_machine

RESULT = Path("benchmarks") / "results" / "profile.json"
STEPS = ("tokenizing", "padding", "engine")
BULK_TURNS, QUERY_TURNS = 5, 100
OPERATORS = {"FullyConnected": "products with weights", "ScaledDotProductAttention": "attention"}
"""How the names of OpenVINO's operators, or of their kinds, begin, and what they are; all others are the rest."""


@contextmanager
def timed(encoder: Encoder) -> Iterator[dict[str, float]]:
    """Seconds of each step while the block runs; calls of a step at the same time count once."""
    seconds: dict[str, float] = defaultdict(float)
    running: dict[str, int] = defaultdict(int)
    since: dict[str, float] = {}
    lock = threading.Lock()

    def around(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*arguments: Any, **named: Any) -> Any:
            with lock:
                if not running[name]:
                    since[name] = time.perf_counter()
                running[name] += 1
            try:
                return call(*arguments, **named)
            finally:
                with lock:
                    running[name] -= 1
                    if not running[name]:
                        seconds[name] += time.perf_counter() - since[name]

        return timed_call

    text, backend = encoder._text, encoder._backend
    places = ((text, "tokenize"), (text, "pad"), (backend, "run"), (backend, "run_beside"))
    for step, (owner, method) in zip((*STEPS, "engine"), places, strict=True):
        setattr(owner, method, around(step, getattr(owner, method)))
    try:
        started = time.perf_counter()
        yield seconds
        seconds["in all"] = time.perf_counter() - started
    finally:
        for owner, method in places:
            delattr(owner, method)


def profile(
    encoders: dict[str, Encoder], action: Callable[[Encoder], object], turns: int
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each step, for each side."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in encoders}
    for turn in range(turns + 1):
        for name, encoder in encoders.items():
            with timed(encoder) as seconds:
                action(encoder)
            if turn:
                found[name].append(dict(seconds))
    return {
        name: {step: round(statistics.median(item[step] for item in items) * 1000, 3) for step in (*STEPS, "in all")}
        for name, items in found.items()
    }


def operators(encoder: Encoder, texts: list[str], turns: int) -> dict[str, float]:
    """Median milliseconds of OpenVINO's operators, of each kind in `OPERATORS`; one batch at a time.

    Raises:
        ConfigError: The backend has no second copy of its graph.
    """
    backend = encoder._backend
    assert isinstance(backend, OvBackend)
    if backend._graph is None:
        raise ConfigError(
            "OpenVINO's operators are timed on two cores and more, and of models below 1 GiB; name @onnxruntime"
        )
    settings = backend._settings | {"PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True}
    request = backend._core.compile_model(backend._graph, CPU, settings).create_infer_request()
    rows = encoder.tokenize(texts)
    lengths = [len(row) for row in rows]
    most = encoder.manifest.profile.max.batch
    found: dict[str, list[float]] = defaultdict(list)
    for turn in range(turns + 1):
        seconds = dict.fromkeys((*OPERATORS.values(), "the rest"), 0.0)
        for batch in plan_batches(lengths, max_rows=most, max_tokens=DEFAULT_BATCH_TOKENS):
            padded = encoder._text.pad([rows[index] for index in batch])
            request.infer(dict(zip(INPUTS, padded, strict=True)), share_inputs=True)
            for item in request.get_profiling_info():
                names = (item.node_type, item.node_name)
                kind = next((OPERATORS[key] for key in OPERATORS if any(n.startswith(key) for n in names)), "the rest")
                seconds[kind] += item.real_time.total_seconds()
        for kind, taken in seconds.items():
            if turn:
                found[kind].append(taken)
    return {kind: round(statistics.median(taken) * 1000, 1) for kind, taken in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages", description=__doc__.split(": ", 1)[1])
    parser.add_argument("sides", nargs="+", metavar="BUNDLE[@BACKEND]")
    parser.add_argument("--texts", type=int, default=600, help="of the bulk run (default: %(default)s)")
    parser.add_argument(
        "--data", type=Path, help="folder with the data sets of tools.peers (default: Python's own texts)"
    )
    flags = parser.parse_args(argv)

    def command() -> None:
        encoders = {}
        for side in flags.sides:
            encoder = open_side(side, "cpu", None)[0]
            encoders[f"{encoder.manifest.precision.value}, {encoder.backend.split(' (')[0]}"] = encoder
        texts = mixed_texts(flags.data, flags.texts) if flags.data else corpus(flags.texts)
        tokens = sum(len(row) for row in next(iter(encoders.values())).tokenize(texts))
        within = {
            name: operators(encoder, texts, BULK_TURNS)
            for name, encoder in encoders.items()
            if isinstance(encoder._backend, OvBackend)
        }
        data = " --data DIR" if flags.data else ""
        record = {
            "command": f"python -m benchmarks.stages BUNDLE@BACKEND ...{data} --texts {flags.texts}",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "texts": len(texts),
            "tokens": tokens,
            "bulk_ms": profile(encoders, lambda encoder: encoder.encode(texts), BULK_TURNS),
            "query_ms": profile(encoders, lambda encoder: encoder.encode(QUERY), QUERY_TURNS),
            "operators_ms": within,
        }
        write_file(RESULT, (json.dumps(record, indent=1) + "\n").encode())
        say(json.dumps(record["bulk_ms"]))

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
