"""The corpus in two dimensions: principal components of its vectors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from nvembed_deploy.app.index import Vectors
from nvembed_deploy.app.search import Found
from nvembed_deploy.app.store import FolderStore

MOST_POINTS = 3000
NAMED_SOURCES = 8
"""Sources with a colour of their own; the smaller ones share one."""
OTHERS, RESULT, QUERY = "others", "result", "your query"


@dataclass(frozen=True)
class Plane:
    """A projection onto the two directions in which the vectors differ most."""

    centre: Vectors
    axes: Vectors
    """float32 [2, D]."""

    @classmethod
    def of(cls, vectors: Vectors) -> Plane:
        """The projection of a collection; by a sample where it is large."""
        sample = np.asarray(vectors[:: max(1, len(vectors) // MOST_POINTS)], dtype=np.float32)
        centre = sample.mean(axis=0)
        spread = (sample - centre).T @ (sample - centre)
        axes = np.linalg.eigh(spread)[1][:, -2:].T[::-1]
        return cls(centre, axes.astype(np.float32))

    def points(self, vectors: Vectors) -> Vectors:
        """float32 [N, 2]."""
        return np.asarray((vectors - self.centre) @ self.axes.T, dtype=np.float32)


def draw(store: FolderStore, plane: Plane, found: Found | None) -> dict[str, list[Any]]:
    """Columns x, y, source and title of the points; results and the query are last, so that they lie on top."""
    step = max(1, len(store) // MOST_POINTS)
    indices = range(0, len(store), step)
    counts = Counter(passage.source for passage in store.passages)
    named = {source for source, _ in counts.most_common(NAMED_SOURCES)}
    places = plane.points(np.asarray(store.vectors[::step]))
    kinds = [store.passages[index].source if store.passages[index].source in named else OTHERS for index in indices]
    titles = [store.passages[index].title for index in indices]
    if found is not None:
        wanted = {id(hit.passage) for hit in found.hits}
        hits = [index for index, passage in enumerate(store.passages) if id(passage) in wanted]
        extra = [store.vectors[index] for index in hits] + [found.query]
        places = np.concatenate([places, plane.points(np.stack(extra))])
        kinds += [RESULT] * len(hits) + [QUERY]
        titles += [store.passages[index].title for index in hits] + [QUERY]
    return {"x": places[:, 0].tolist(), "y": places[:, 1].tolist(), "source": kinds, "title": titles}
