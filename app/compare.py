"""Compares two engines: the rankings of the same candidates for the same query."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nvembed_deploy import Encoder, InputError
from nvembed_deploy.app.passages import Passage
from nvembed_deploy.app.requests import SearchRequest
from nvembed_deploy.app.search import Searcher

CANDIDATES = 40
"""Number of nearest passages by the page's engine, which both engines then rank."""
TOP = 10
CALLS = 5


@dataclass(frozen=True, kw_only=True)
class RankedPassage:
    """A passage with its rank, from 1, and cosine by the first and by the second engine."""

    title: str
    source: str
    ranks: tuple[int, int]
    cosines: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two rankings of the same passages."""

    passages: list[RankedPassage]
    """The passages among the ten best of either engine, in the order of the first one."""
    overlap: float
    """Fraction of the ten best that both rankings share."""
    largest_difference: float
    """Largest difference between the two cosines of a passage."""
    milliseconds: tuple[float, float]
    """Time to embed the query with each engine, the median of `CALLS` alternating calls."""
    candidates: int
    """Number of passages that both engines ranked."""

    def as_json(self) -> dict[str, Any]:
        """Returns the comparison as JSON-like values."""
        return asdict(self)


class Comparer:
    """Compares engines that are opened when they are first chosen.

    Args:
        searcher: Finds the candidates.
        engines: Functions that open the engines, by name.
    """

    def __init__(self, searcher: Searcher, engines: Mapping[str, Callable[[], Encoder]]) -> None:
        self.names = tuple(engines)
        self._searcher, self._engines = searcher, dict(engines)
        self._opened: dict[str, Encoder] = {}
        self._opening = threading.Lock()

    def compare(self, request: SearchRequest, left: str, right: str) -> Comparison:
        """Ranks the passages nearest to a query with two engines.

        Raises:
            InputError: There is no such engine, or the query is empty or too long.
            ConfigError: The collection was made by another engine than the page's.
        """
        for name in (left, right):
            if name not in self._engines:
                raise InputError(f"there is no engine {name!r}; available: {', '.join(self.names)}")
        vector = self._searcher.embed_query(request.query, request.instruction)
        hits = request.store.search(self._searcher.engine, vector, count=CANDIDATES)
        texts = [hit.passage.embedded_text for hit in hits]
        engines = [
            (encoder, encoder.query_prompt(request.instruction) if request.instruction else None)
            for encoder in (self._open(left), self._open(right))
        ]
        scores = [encoder.encode(texts) @ encoder.encode(request.query, prompt=prompt) for encoder, prompt in engines]
        ranks = [np.argsort(np.argsort(-engine_scores, kind="stable"), kind="stable") + 1 for engine_scores in scores]
        top = min(TOP, len(texts))
        in_top = [engine_ranks <= top for engine_ranks in ranks]
        shown = [index for index in np.argsort(ranks[0]) if in_top[0][index] or in_top[1][index]]
        return Comparison(
            passages=[
                RankedPassage(
                    title=_name(hits[index].passage),
                    source=hits[index].passage.source,
                    ranks=(int(ranks[0][index]), int(ranks[1][index])),
                    cosines=(float(scores[0][index]), float(scores[1][index])),
                )
                for index in shown
            ],
            overlap=int((in_top[0] & in_top[1]).sum()) / max(1, top),
            largest_difference=float(np.abs(scores[0] - scores[1]).max(initial=0.0)),
            milliseconds=_query_times(engines, request.query),
            candidates=len(texts),
        )

    def _open(self, name: str) -> Encoder:
        with self._opening:
            if name not in self._opened:
                self._opened[name] = self._engines[name]()
            return self._opened[name]


def _name(passage: Passage) -> str:
    """Returns the title, or where the passage stands in its file."""
    return passage.title or ", ".join(filter(None, [passage.label, passage.place]))


def _query_times(engines: list[tuple[Encoder, str | None]], query: str) -> tuple[float, float]:
    """Returns the time of each engine; both have run once, since a first call is not representative."""
    times: list[list[float]] = [[], []]
    for _ in range(CALLS):
        for engine_times, (encoder, prompt) in zip(times, engines, strict=True):
            started = time.perf_counter()
            encoder.encode(query, prompt=prompt)
            engine_times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times[0]), statistics.median(times[1])
