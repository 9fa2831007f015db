"""Map of a collection in two dimensions: the principal components of its vectors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from nvembed_deploy.app.index import Vectors
from nvembed_deploy.app.search import SearchResult
from nvembed_deploy.app.store import FolderStore

MAX_POINTS = 3000
NAMED_SOURCES = 8
"""Number of sources with a colour of their own; the smaller ones share one."""
OTHERS, RESULT, QUERY = "others", "result", "your query"


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
        sample = np.asarray(vectors[:: max(1, len(vectors) // MAX_POINTS)], dtype=np.float32)
        centre = sample.mean(axis=0)
        scatter = (sample - centre).T @ (sample - centre)
        axes = np.linalg.eigh(scatter)[1][:, -2:].T[::-1]
        return cls(centre, axes.astype(np.float32))

    def points(self, vectors: Vectors) -> Vectors:
        """Projects vectors [N, D] to points, float32 [N, 2]."""
        return np.asarray((vectors - self.centre) @ self.axes.T, dtype=np.float32)


def draw(store: FolderStore, plane: Plane, search_result: SearchResult | None) -> dict[str, list[Any]]:
    """Returns columns x, y, source and title of the points; results and query come last, to be drawn on top."""
    step = max(1, len(store) // MAX_POINTS)
    indices = range(0, len(store), step)
    counts = Counter(passage.source for passage in store.passages)
    named_sources = {source for source, _ in counts.most_common(NAMED_SOURCES)}
    points = plane.points(np.asarray(store.vectors[::step]))
    labels = [
        store.passages[index].source if store.passages[index].source in named_sources else OTHERS for index in indices
    ]
    titles = [store.passages[index].title for index in indices]
    if search_result is not None:
        hit_ids = {id(hit.passage) for hit in search_result.hits}
        hits = [index for index, passage in enumerate(store.passages) if id(passage) in hit_ids]
        extra_vectors = [store.vectors[index] for index in hits] + [search_result.query]
        points = np.concatenate([points, plane.points(np.stack(extra_vectors))])
        labels += [RESULT] * len(hits) + [QUERY]
        titles += [store.passages[index].title for index in hits] + [QUERY]
    return {"x": points[:, 0].tolist(), "y": points[:, 1].tolist(), "source": labels, "title": titles}
