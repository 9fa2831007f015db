"""What quantization costs, seen: the same query through two engines, over the same candidates."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from nvembed_deploy import Encoder
from nvembed_deploy.app.search import Searcher, check_query
from nvembed_deploy.app.store import FolderStore

CANDIDATES = 40
"""The nearest passages by the page's own engine, which both sides then rank."""
SHOWN = 10
CALLS = 5


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two rankings of the same passages."""

    rows: list[list[str]]
    """For each of the first ranking's best: rank and cosine of both sides, and the title."""
    overlap: float
    """Share of the ten best that both have."""
    largest_difference: float
    """Of two cosines of the same passage."""
    milliseconds: tuple[float, float]
    """Of the query's embedding, the medians of `CALLS` in turn."""
    candidates: int
    """Passages that both ranked."""


def compare(
    searcher: Searcher, store: FolderStore, left: Encoder, right: Encoder, query: str, *, instruction: str
) -> Comparison:
    """Ranks the candidates with both engines.

    Args:
        searcher: Finds the candidates.
        store: Where they are.
        left: One engine.
        right: The other.
        query: What is asked.
        instruction: The task in words.

    Raises:
        InputError: The query is empty or too long.
    """
    check_query(query, instruction)
    vector = searcher.embed([query], instruction=instruction)[0]
    hits = store.search(searcher.engine, vector, count=CANDIDATES)
    texts = [hit.passage.text for hit in hits]
    sides = [(encoder, encoder.query_prompt(instruction) if instruction else None) for encoder in (left, right)]
    scores = [encoder.encode(texts) @ encoder.encode(query, prompt=prompt) for encoder, prompt in sides]
    times: list[list[float]] = [[], []]
    for _ in range(CALLS):  # both have run once: an engine's first call is no measure
        for own, (encoder, prompt) in zip(times, sides, strict=True):
            started = time.perf_counter()
            encoder.encode(query, prompt=prompt)
            own.append((time.perf_counter() - started) * 1000)
    ranks = [np.argsort(np.argsort(-own, kind="stable"), kind="stable") for own in scores]
    best = np.argsort(ranks[0])[:SHOWN]
    shown = min(SHOWN, len(texts))
    both = sum(ranks[1][index] < shown for index in best)
    return Comparison(
        rows=[
            [
                str(ranks[0][index] + 1),
                f"{scores[0][index]:.4f}",
                str(ranks[1][index] + 1),
                f"{scores[1][index]:.4f}",
                hits[index].passage.title,
            ]
            for index in best
        ],
        overlap=both / max(1, shown),
        largest_difference=float(np.abs(scores[0] - scores[1]).max(initial=0.0)),
        milliseconds=(statistics.median(times[0]), statistics.median(times[1])),
        candidates=len(texts),
    )
