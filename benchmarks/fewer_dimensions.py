"""`python -m benchmarks.fewer_dimensions WORK --data DIR`: vectors of fewer dimensions beside bits of the same size.

For models whose vectors may not simply be truncated. A projection (SVD, and PCA with centring) is fitted on texts of
Python's documentation and never on the documents, and rotated at random, so that one step of int8 serves all of its
components. Compared are the first dimensions, the projections and bits: alone, and as a selection of 40 documents that
int8 vectors of all dimensions rank. Reads the float vectors that `benchmarks.vector_kinds` kept in WORK, or makes them.
Writes benchmarks/results/fewer_dimensions.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.vector_data import ModelVectors, RetrievalSet, SetVectors, Vectors, run_comparison
from nvembed_deploy.parity.vector_kinds import TOP_K, ndcg, overlap
from nvembed_deploy.vectors import OutputDtype, convert, fit_int8_step, rescore, search

SHARES = (2, 4, 8)
"""Divisors of the number of dimensions; with 8, an int8 vector is as large as the bits of all dimensions."""
CANDIDATES = 40
SEED = 0
Pair = tuple[NDArray[Any], NDArray[Any]]
"""Queries and documents in one format."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run_comparison(argv, name="fewer_dimensions", description=__doc__, compare=compare, recorded=("numpy",))


def compare(retrieval_set: RetrievalSet, vectors: SetVectors, on_texts: ModelVectors) -> list[dict[str, Any]]:
    """Searches a set with every kind of vectors, and returns a row for each."""
    exact, _ = search(vectors.queries, vectors.documents, top_k=TOP_K)
    exact_gain = ndcg(exact, retrieval_set.judged)
    full_queries, full_documents = _int8((vectors.queries, vectors.documents), on_texts.fit)
    rows = []
    for kind, (queries, documents) in kinds(vectors, on_texts):
        candidates, _ = search(queries, documents, top_k=CANDIDATES)
        reranked, _ = rescore(full_queries, candidates, full_documents, top_k=TOP_K)
        alone = candidates[:, :TOP_K]
        rows.append(
            {
                "set": retrieval_set.name,
                "kind": kind,
                "bytes": documents.shape[1] * documents.itemsize,
                "overlap": round(overlap(exact, alone), 5),
                "ndcg_share": round(ndcg(alone, retrieval_set.judged) / exact_gain, 5),
                "rescored_overlap": round(overlap(exact, reranked), 5),
                "rescored_ndcg_share": round(ndcg(reranked, retrieval_set.judged) / exact_gain, 5),
            }
        )
    return rows


def kinds(vectors: SetVectors, on_texts: ModelVectors) -> Iterator[tuple[str, Pair]]:
    """Yields queries and documents in each kind of vectors."""
    both = vectors.queries, vectors.documents
    dim = vectors.documents.shape[1]
    mean = on_texts.calibration.mean(axis=0)
    yield "bits", _bits(both)
    yield "bits, centred", _bits((both[0] - mean, both[1] - mean))
    for share in SHARES:
        size = dim // share
        first = both[0][:, :size], both[1][:, :size]
        yield f"int8, the first 1/{share}", _int8(first, on_texts.fit[:, :size])
        for name, centre in (("SVD", np.zeros_like(mean)), ("PCA", mean)):
            projection = fit_projection(on_texts.calibration - centre, size)
            fit = (on_texts.fit - centre) @ projection
            projected = (both[0] - centre) @ projection, (both[1] - centre) @ projection
            yield f"int8, {name} to 1/{share}", _int8(projected, fit)


def fit_projection(vectors: Vectors, size: int) -> Vectors:
    """Returns the projection to the subspace that has most of the vectors' squared length, rotated at random.

    Returns:
        float32 [D, size], with orthonormal columns.
    """
    _, _, directions = np.linalg.svd(vectors, full_matrices=False)
    rotation, _ = np.linalg.qr(np.random.default_rng(SEED).standard_normal((size, size)))
    projection: Vectors = (directions[:size].T @ rotation).astype(np.float32)
    return projection


def _int8(pair: Pair, fit: Vectors) -> Pair:
    step_size = fit_int8_step(fit)
    queries, documents = (convert(part, OutputDtype.INT8, int8_step=step_size) for part in pair)
    return queries, documents


def _bits(pair: Pair) -> Pair:
    queries, documents = (convert(part, OutputDtype.UBINARY) for part in pair)
    return queries, documents


if __name__ == "__main__":
    raise SystemExit(main())
