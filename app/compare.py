"""Compares two engines: the rankings of the same candidates for the same query."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from nvembed_deploy import Encoder
from nvembed_deploy.app.search import Searcher
from nvembed_deploy.app.store import FolderStore

CANDIDATES = 40
"""Number of nearest passages by the page's engine, which both engines then rank."""
TOP = 10
CALLS = 5


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two rankings of the same passages."""

    rows: list[list[str]]
    """For each of the first ranking's top passages: rank and cosine of both engines, and the title."""
    overlap: float
    """Fraction of the top ten that both rankings share."""
    largest_difference: float
    """Largest difference between the two cosines of a passage."""
    milliseconds: tuple[float, float]
    """Time to embed the query with each engine, the median of `CALLS` alternating calls."""
    candidates: int
    """Number of passages that both engines ranked."""


def compare(
    searcher: Searcher,
    store: FolderStore,
    first_engine: Encoder,
    second_engine: Encoder,
    query: str,
    *,
    instruction: str,
) -> Comparison:
    """Ranks the candidates with both engines.

    Args:
        searcher: Finds the candidates.
        store: Collection of the candidates.
        first_engine: Encoder of the first engine.
        second_engine: Encoder of the second engine.
        query: Text of the query.
        instruction: The task in words.

    Raises:
        InputError: The query is empty or too long.
    """
    vector = searcher.embed_query(query, instruction)
    hits = store.search(searcher.engine, vector, count=CANDIDATES)
    texts = [hit.passage.embedded_text for hit in hits]
    engines = [
        (encoder, encoder.query_prompt(instruction) if instruction else None)
        for encoder in (first_engine, second_engine)
    ]
    scores = [encoder.encode(texts) @ encoder.encode(query, prompt=prompt) for encoder, prompt in engines]
    times: list[list[float]] = [[], []]
    for _ in range(CALLS):  # both have run once: an engine's first call is not representative
        for engine_times, (encoder, prompt) in zip(times, engines, strict=True):
            started = time.perf_counter()
            encoder.encode(query, prompt=prompt)
            engine_times.append((time.perf_counter() - started) * 1000)
    ranks = [np.argsort(np.argsort(-engine_scores, kind="stable"), kind="stable") for engine_scores in scores]
    best = np.argsort(ranks[0])[:TOP]
    top = min(TOP, len(texts))
    shared = sum(ranks[1][index] < top for index in best)
    return Comparison(
        rows=[
            [
                str(ranks[0][index] + 1),
                f"{scores[0][index]:.4f}",
                str(ranks[1][index] + 1),
                f"{scores[1][index]:.4f}",
                hits[index].passage.label,
            ]
            for index in best
        ],
        overlap=shared / max(1, top),
        largest_difference=float(np.abs(scores[0] - scores[1]).max(initial=0.0)),
        milliseconds=(statistics.median(times[0]), statistics.median(times[1])),
        candidates=len(texts),
    )
