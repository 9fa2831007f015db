"""`python -m benchmarks.search_speed`: time of a search in 200,000 passages, exact and indexed.

Writes benchmarks/results/search_speed.json. The vectors have the embedded model's dimension and are spread in clusters,
as those of texts are. Both stores are those of the search page, queried alternately in one run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.app.index import EXACT, QDRANT_EDGE, Vectors, opener
from nvembed_deploy.app.passages import Passage
from nvembed_deploy.app.store import Engine, FolderStore
from nvembed_deploy.console import echo, run
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import describe_machine

RECORD_PATH = Path("benchmarks") / "results" / "search_speed.json"
DIM, CLUSTERS, SOURCES = 384, 2000, 50
QUERIES, COUNT = 200, 10
SPREAD = 1.0
"""Spread of passages around their cluster's centre: texts of a topic have a cosine of about 0.5."""


def unit(rows: NDArray[np.floating[Any]]) -> Vectors:
    """Scales rows to unit length."""
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def measure(rows: int) -> dict[str, object]:
    """Writes a collection and searches it alternately with both stores."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLUSTERS, DIM)).astype(np.float32)
    vectors = unit(centres[rng.integers(0, CLUSTERS, rows)] + SPREAD * rng.normal(size=(rows, DIM)))
    queries = unit(centres[rng.integers(0, CLUSTERS, QUERIES)] + SPREAD * rng.normal(size=(QUERIES, DIM)))
    engine = Engine(model="none", precision="fp32", manifest_sha256="0" * 64, dimension=DIM)
    passages = [Passage(source=f"source {row % SOURCES}", title=str(row), text="-") for row in range(rows)]
    with tempfile.TemporaryDirectory() as folder:
        FolderStore.write(Path(folder) / "mine", engine, passages, vectors)
        started = time.monotonic()
        stores = {kind: FolderStore(Path(folder) / "mine", opener(kind)) for kind in (EXACT, QDRANT_EDGE)}
        index_seconds = time.monotonic() - started
        times: dict[str, list[float]] = {kind: [] for kind in stores}
        recalls = []
        for query in queries:
            titles = {}
            for kind, store in stores.items():
                query_started = time.perf_counter()
                hits = store.search(engine, query, count=COUNT)
                times[kind].append((time.perf_counter() - query_started) * 1000)
                titles[kind] = {hit.passage.title for hit in hits}
            recalls.append(len(titles[EXACT] & titles[QDRANT_EDGE]) / COUNT)
    return {
        "rows": rows,
        "width": DIM,
        "queries": QUERIES,
        "index_made_s": round(index_seconds, 1),
        "recall_at_10": round(statistics.fmean(recalls), 4),
        "p50_ms": {kind: round(statistics.median(kind_times), 2) for kind, kind_times in times.items()},
        "p99_ms": {kind: round(float(np.quantile(kind_times, 0.99)), 2) for kind, kind_times in times.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_speed", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--rows", type=int, default=200_000, help="number of passages (default: %(default)s)")
    flags = parser.parse_args(argv)

    def command() -> None:
        record = {
            "command": "python -m benchmarks.search_speed",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            **measure(flags.rows),
        }
        write_file(RECORD_PATH, (json.dumps(record, indent=1) + "\n").encode())
        echo(json.dumps(record))

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
