"""Map of a collection in two dimensions: the principal components of its vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nvembed_deploy.app.index import Vectors
from nvembed_deploy.app.store import FolderStore

MAX_POINTS = 3000
NAMED_SOURCES = 8
"""Number of sources with a colour of their own; the smaller ones share one."""


@dataclass(frozen=True)
class Plane:
    """Projection onto the two directions in which the vectors differ most."""

    centre: Vectors
    """float32 [D], the mean of the vectors."""
    axes: Vectors
    """float32 [2, D]."""

    @classmethod
    def of(cls, vectors: Vectors) -> Plane:
        """Computes the projection for a collection, from a sample if it is large."""
        sample = np.asarray(vectors[sampled_rows(len(vectors))], dtype=np.float32)
        centre = sample.mean(axis=0)
        scatter = (sample - centre).T @ (sample - centre)
        axes = np.linalg.eigh(scatter)[1][:, -2:].T[::-1]
        return cls(centre, axes.astype(np.float32))

    def points(self, vectors: Vectors) -> Vectors:
        """Projects vectors [N, D] to points, float32 [N, 2]."""
        return np.asarray((vectors - self.centre) @ self.axes.T, dtype=np.float32)


def sampled_rows(rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Returns all rows, or a random sample in order; the same one every time."""
    if rows <= MAX_POINTS:
        return np.arange(rows)
    return np.sort(np.random.default_rng(0).choice(rows, MAX_POINTS, replace=False))


def draw(store: FolderStore, plane: Plane, hits: Sequence[int], query: Vectors | None) -> dict[str, Any]:
    """Returns what the map shows.

    Returns:
        `points`: x, y, index of the source, row and title of each passage shown; `sources`: the named ones, by size;
        a source that is not named has their number as its index. `hits`: rows of the last results, which are among the
        points. `query`: x and y of the last query, or None.
    """
    rows = np.union1d(sampled_rows(len(store)), np.array(hits, dtype=np.int64))
    positions = plane.points(np.asarray(store.vectors[rows]))
    counts = Counter(passage.source for passage in store.passages)
    sources = [source for source, _ in counts.most_common(NAMED_SOURCES)]
    numbers = {source: number for number, source in enumerate(sources)}
    points = []
    for row, (x, y) in zip(rows.tolist(), positions.tolist(), strict=True):
        passage = store.passages[row]
        points.append([round(x, 4), round(y, 4), numbers.get(passage.source, len(sources)), row, passage.label])
    query_point = None if query is None else [round(value, 4) for value in plane.points(query[None])[0].tolist()]
    return {"points": points, "sources": sources, "hits": [int(row) for row in hits], "query": query_point}
