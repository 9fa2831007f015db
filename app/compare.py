"""What quantization costs, seen: the same query through two engines, over the same candidates."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from nvembed_deploy import Encoder

from .search import Searcher, check_query
from .store import FolderStore

CANDIDATES = 40
"""The first engine's nearest passages, which both engines then rank."""
SHOWN = 10


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
    """Of the query's embedding."""


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
    scores, times = [], []
    for encoder in (left, right):
        prompt = encoder.query_prompt(instruction) if instruction else None
        started = time.perf_counter()
        asked = encoder.encode(query, prompt=prompt)
        times.append((time.perf_counter() - started) * 1000)
        scores.append(encoder.encode(texts) @ asked)
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
        milliseconds=(times[0], times[1]),
    )
