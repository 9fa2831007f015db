"""`python -m benchmarks.vector_search WORK`: time of exact search in float32, int8 and binary vectors, from disk.

The vectors are those of real texts by the embedded model, each many times over with noise of its own (to a cosine of
0.8, as of texts on one subject), and for the width of 4,096 turned into that space first; queries are real queries.
Every format is a memory-mapped file in WORK, searched one query at a time by `nvembed_deploy.vectors`, and in memory by
faiss as a yardstick. Reported are bytes, p50 and p99 with the file in the page cache, the first query after it was
dropped from there, and the share of float32's ten best. Reads the float vectors that `benchmarks.vector_kinds` kept in
WORK. Nothing else should run on the machine. Writes benchmarks/results/vector_search.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.vector_data import Model, Vectors, retrieval_sets
from nvembed_deploy.console import echo, run, step
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.parity.vector_kinds import TOP_K, overlap
from nvembed_deploy.system import describe_machine, installed_versions
from nvembed_deploy.vectors import OutputDtype, convert, fit_int8_step, rescore, search

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "vector_search.json"
SIZES = ((200_000, 384), (1_000_000, 384), (200_000, 4096))
FORMATS = (OutputDtype.FLOAT32, OutputDtype.INT8, OutputDtype.UBINARY)
CANDIDATES = (40, 200)
QUERIES, SECONDS = 100, 12.0
"""Queries of each measurement, and its longest time; a slow one has fewer."""
NOISE = 0.75
BLOCK = 10_000
Search = Callable[[int], NDArray[np.int64]]
"""Returns the ten best documents of a query by its index."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vector_search", description=__doc__)
    parser.add_argument("work", type=Path, help="folder of the float vectors, and for the files that are searched")
    parser.add_argument("--prepare", action="store_true", help="only write the files, for a measurement later")
    flags = parser.parse_args(argv)

    def command() -> None:
        rows = []
        for count, dim in SIZES:
            folder = flags.work / f"search-{count}-{dim}"
            with step(f"{count:,} vectors of width {dim}"):
                if not (folder / "done").is_file():
                    write_vectors(flags.work, folder, count=count, dim=dim)
                if not flags.prepare:
                    rows += [{"vectors": count, "width": dim, **row} for row in measure(folder)]
        if flags.prepare:
            return
        record = {
            "command": "python -m benchmarks.vector_search WORK",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "versions": installed_versions(("numpy", "faiss-cpu")),
            "rows": rows,
        }
        write_file(RESULT, (json.dumps(record, indent=1) + "\n").encode())
        echo(f"done: {RESULT.relative_to(ROOT)}; now run: python -m tools.readme")

    return run(command)


def write_vectors(work: Path, folder: Path, *, count: int, dim: int) -> None:
    """Writes documents and queries of a size in each format, a .npy file for each."""
    model = Model("nv-embed-mini", work)
    real = model.on_texts().calibration
    queries = model.on_set(retrieval_sets(None)[0]).queries[:QUERIES]
    rng = np.random.default_rng(0)
    if dim > real.shape[1]:
        turn, _ = np.linalg.qr(rng.standard_normal((dim, real.shape[1]), dtype=np.float32))
        real, queries = real @ turn.T, queries @ turn.T
    folder.mkdir(parents=True, exist_ok=True)
    step_size = fit_int8_step(_noisy(real[:BLOCK], rng))
    types = {OutputDtype.FLOAT32: (np.float32, dim), OutputDtype.INT8: (np.int8, dim)}
    types[OutputDtype.UBINARY] = (np.uint8, dim // 8)
    files = {
        dtype: np.lib.format.open_memmap(
            folder / f"{dtype.value}.npy", mode="w+", dtype=types[dtype][0], shape=(count, types[dtype][1])
        )
        for dtype in FORMATS
    }
    for start in range(0, count, BLOCK):
        block = _noisy(real[rng.integers(0, len(real), BLOCK)], rng)
        for dtype, file in files.items():
            file[start : start + BLOCK] = convert(block, dtype, int8_step=step_size)
    for dtype, file in files.items():
        file.flush()
        np.save(folder / f"{dtype.value}-queries.npy", convert(queries, dtype, int8_step=step_size))
    (folder / "done").touch()


def _noisy(vectors: Vectors, rng: np.random.Generator) -> Vectors:
    noise = rng.standard_normal(vectors.shape, dtype=np.float32) * np.float32(NOISE / np.sqrt(vectors.shape[1]))
    rows = vectors + noise
    units: Vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return units


def measure(folder: Path) -> list[dict[str, Any]]:
    """Searches the files of a size in every format, and returns a row for each way of searching."""
    documents = {dtype: np.load(folder / f"{dtype.value}.npy", mmap_mode="r") for dtype in FORMATS}
    queries = {dtype: np.load(folder / f"{dtype.value}-queries.npy") for dtype in FORMATS}
    floats, int8, bits = FORMATS

    def plain(dtype: OutputDtype) -> Search:
        return lambda query: search(queries[dtype][query : query + 1], documents[dtype], top_k=TOP_K)[0][0]

    def rescored(count: int) -> Search:
        def both(query: int) -> NDArray[np.int64]:
            candidates, _ = search(queries[bits][query : query + 1], documents[bits], top_k=count)
            ranking: NDArray[np.int64]
            ranking = rescore(queries[int8][query : query + 1], candidates, documents[int8], top_k=TOP_K)[0][0]
            return ranking

        return both

    ways: dict[str, tuple[OutputDtype, Search]] = {dtype.value: (dtype, plain(dtype)) for dtype in (floats, int8)}
    ways |= {f"ubinary, {count} rescored by int8": (bits, rescored(count)) for count in CANDIDATES}
    rows: list[dict[str, Any]] = []
    exact: NDArray[np.int64] | None = None
    for name, (dtype, way) in ways.items():
        for cached in FORMATS:
            _drop_from_page_cache(folder / f"{cached.value}.npy")
        first = _seconds(way, 0)[0]
        way(0)
        row, rankings = _timed(way)
        exact = rankings if exact is None else exact
        found = overlap(exact[: len(rankings)], rankings[: len(exact)])
        rows.append({"by": name, "bytes": documents[dtype].nbytes, "first_ms": round(1000 * first, 1), **row})
        rows[-1]["overlap"] = round(found, 4)
    for dtype in FORMATS:
        rows.append(
            {"by": f"faiss, {dtype.value}", "bytes": documents[dtype].nbytes, **_faiss(dtype, documents, queries)}
        )
    return rows


def _timed(way: Search) -> tuple[dict[str, Any], NDArray[np.int64]]:
    started, times, rankings = time.monotonic(), [], []
    for query in range(QUERIES):
        seconds, ranking = _seconds(way, query)
        times.append(1000 * seconds)
        rankings.append(ranking)
        if time.monotonic() - started > SECONDS:
            break
    p50, p99 = np.quantile(times, [0.5, 0.99])
    return {"queries": len(times), "p50_ms": round(p50, 2), "p99_ms": round(p99, 2)}, np.array(rankings)


def _seconds(way: Search, query: int) -> tuple[float, NDArray[np.int64]]:
    started = time.perf_counter()
    ranking = way(query)
    return time.perf_counter() - started, ranking


def _faiss(
    dtype: OutputDtype, documents: dict[OutputDtype, NDArray[Any]], queries: dict[OutputDtype, NDArray[Any]]
) -> dict[str, Any]:
    """Measures faiss's exhaustive index of a format; of bits, without rescoring."""
    import faiss

    count, width = documents[dtype].shape
    if dtype is OutputDtype.UBINARY:
        index: Any = faiss.IndexBinaryFlat(8 * width)
    elif dtype is OutputDtype.INT8:
        kind = faiss.ScalarQuantizer.QT_8bit_direct_signed
        index = faiss.IndexScalarQuantizer(width, kind, faiss.METRIC_INNER_PRODUCT)
    else:
        index = faiss.IndexFlatIP(width)
    needed = np.float32 if dtype is OutputDtype.INT8 else documents[dtype].dtype
    for start in range(0, count, BLOCK):
        index.add(documents[dtype][start : start + BLOCK].astype(needed))

    def way(query: int) -> NDArray[np.int64]:
        ranking: NDArray[np.int64] = index.search(queries[dtype][query : query + 1].astype(needed), TOP_K)[1][0]
        return ranking

    way(0)
    return _timed(way)[0]


def _drop_from_page_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    raise SystemExit(main())
