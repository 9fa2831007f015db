"""`python -m benchmarks.search_speed`: time of a search among 200,000 passages, exact and indexed.

Writes benchmarks/results/search_speed.json. The vectors are of the embedded model's width and spread in clusters, as
those of texts are. Both stores are the search page's own, asked in turn in one run.
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

from nvembed_deploy.app.index import EDGE, EXACT, Vectors, opener
from nvembed_deploy.app.passages import Passage
from nvembed_deploy.app.store import Engine, FolderStore
from nvembed_deploy.console import run, say
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import describe_machine

RESULT = Path("benchmarks") / "results" / "search_speed.json"
WIDTH, CLUSTERS, SOURCES = 384, 2000, 50
QUERIES, COUNT = 200, 10
SPREAD = 1.0
"""Of a passage around its cluster's centre: texts of a topic have a cosine of about 0.5."""


def unit(rows: NDArray[np.floating[Any]]) -> Vectors:
    """Rows of unit length."""
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def measure(rows: int) -> dict[str, object]:
    """Writes a collection, and searches it with both stores in turn."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLUSTERS, WIDTH)).astype(np.float32)
    vectors = unit(centres[rng.integers(0, CLUSTERS, rows)] + SPREAD * rng.normal(size=(rows, WIDTH)))
    queries = unit(centres[rng.integers(0, CLUSTERS, QUERIES)] + SPREAD * rng.normal(size=(QUERIES, WIDTH)))
    engine = Engine(model="none", precision="fp32", manifest_sha256="0" * 64, dimension=WIDTH)
    passages = [Passage(source=f"source {row % SOURCES}", title=str(row), text="-") for row in range(rows)]
    with tempfile.TemporaryDirectory() as folder:
        FolderStore.write(Path(folder) / "mine", engine, passages, vectors)
        started = time.monotonic()
        stores = {kind: FolderStore(Path(folder) / "mine", opener(kind)) for kind in (EXACT, EDGE)}
        made_s = time.monotonic() - started
        times: dict[str, list[float]] = {kind: [] for kind in stores}
        shared = []
        for query in queries:
            found = {}
            for kind, store in stores.items():
                begun = time.perf_counter()
                hits = store.search(engine, query, count=COUNT)
                times[kind].append((time.perf_counter() - begun) * 1000)
                found[kind] = {hit.passage.title for hit in hits}
            shared.append(len(found[EXACT] & found[EDGE]) / COUNT)
    return {
        "rows": rows,
        "width": WIDTH,
        "queries": QUERIES,
        "index_made_s": round(made_s, 1),
        "recall_at_10": round(statistics.fmean(shared), 4),
        "p50_ms": {kind: round(statistics.median(found), 2) for kind, found in times.items()},
        "p99_ms": {kind: round(float(np.quantile(found, 0.99)), 2) for kind, found in times.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_speed", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--rows", type=int, default=200_000, help="passages (default: %(default)s)")
    flags = parser.parse_args(argv)

    def command() -> None:
        record = {
            "command": "python -m benchmarks.search_speed",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            **measure(flags.rows),
        }
        write_file(RESULT, (json.dumps(record, indent=1) + "\n").encode())
        say(json.dumps(record))

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
