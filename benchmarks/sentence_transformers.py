"""`python -m benchmarks.sentence_transformers BUNDLE`: a bundle behind sentence-transformers beside `Encoder` itself.

Both embed the same 1,000 passages, beginnings of Python's documentation, alternately, at batch_size 32. Writes
benchmarks/results/sentence_transformers.json: the seconds of each, and the ratio, on each runtime of this CPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_deploy import Encoder
from nvembed_deploy.app.passages import library_passages
from nvembed_deploy.console import echo, run
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.integrations.sentence_transformers import load
from nvembed_deploy.system import describe_machine, installed_versions

RESULT = Path("benchmarks") / "results" / "sentence_transformers.json"
TEXTS, BATCH_SIZE, MAX_CHARS = 1000, 32, 300
BACKENDS = ("onnxruntime", "openvino")


def passages() -> list[str]:
    """Returns the passages: a random selection, the same in every run on the same Python."""
    return random.Random(0).sample([passage.text[:MAX_CHARS] for passage in library_passages()], TEXTS)


def measure(bundle: Path, backend: str, texts: Sequence[str], *, rounds: int) -> dict[str, Any]:
    """Embeds the passages alternately with both; one more round at the beginning warms up."""
    encoder, model = Encoder(bundle, device="cpu", backend=backend), load(bundle, device="cpu", backend=backend)
    calls: dict[str, Callable[[], Any]] = {
        "encoder": lambda: encoder.encode(texts, batch_size=BATCH_SIZE),
        "sentence_transformers": lambda: model.encode(texts, batch_size=BATCH_SIZE),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in calls}
    vectors = {}
    for round_index in range(rounds + 1):
        for name, call in list(calls.items())[:: 1 if round_index % 2 else -1]:
            started, cpu_started = time.perf_counter(), time.process_time()
            vectors[name] = call()
            if round_index:
                seconds[name].append(time.perf_counter() - started)
                cpu_seconds[name].append(time.process_time() - cpu_started)
        echo(f"  {backend}, round {round_index}: { ({name: round(s[-1], 2) for name, s in seconds.items() if s}) }")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "median_s": {name: round(median, 3) for name, median in medians.items()},
        "all_s": {name: [round(value, 3) for value in times] for name, times in seconds.items()},
        "median_cpu_s": {name: round(statistics.median(times), 3) for name, times in cpu_seconds.items()},
        "ratio": round(medians["sentence_transformers"] / medians["encoder"], 3),
        "largest_difference": float(np.abs(vectors["encoder"] - vectors["sentence_transformers"]).max()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sentence_transformers", description=__doc__.split(": ", 1)[1]
    )
    parser.add_argument("bundle", type=Path, help="a bundle's folder")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    flags = parser.parse_args(argv)

    def command() -> None:
        texts = passages()
        record = {
            "command": "python -m benchmarks.sentence_transformers BUNDLE",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "versions": installed_versions(("sentence-transformers", "torch", *BACKENDS)),
            "texts": TEXTS,
            "batch_size": BATCH_SIZE,
            "backends": {backend: measure(flags.bundle, backend, texts, rounds=flags.rounds) for backend in BACKENDS},
        }
        write_file(RESULT, (json.dumps(record, indent=1) + "\n").encode())
        echo(json.dumps(record))

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
