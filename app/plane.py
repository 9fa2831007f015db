"""Map of a collection in two dimensions: principal components at once, and then where neighbours are neighbours.

The map of neighbours (t-SNE) takes seconds to minutes, so it is made in the background, from the principal components.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.app.index import Vectors
from nvembed_deploy.app.store import FolderStore

MAX_POINTS = 5000
"""Passages on the map; of a larger collection a sample, and the last results."""
MIN_NEIGHBOURS = 30
"""Fewer passages have no neighbourhoods that t-SNE could keep."""
MIN_SPREAD = 1e-5
PERPLEXITY = 30
ITERATIONS = (250, 500)
"""Steps with exaggerated attraction and without, as openTSNE's defaults."""
STEPS_BETWEEN_REPORTS = 25
NAMED_SOURCES = 8
"""Number of sources with a colour of their own; the smaller ones share one."""
KEPT_MAPS = 4
COMPONENTS, NEIGHBOURS = "principal components", "neighbours"
Rows = NDArray[np.int64]
Place = Callable[[Vectors], Vectors]
"""Returns the positions, float32 [N, 2], of vectors, float32 [N, D]."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plane:
    """Projection onto the two directions in which the vectors differ most."""

    centre: Vectors
    """float32 [D], the mean of the vectors."""
    axes: Vectors
    """float32 [2, D]."""

    @classmethod
    def of(cls, vectors: Vectors) -> Plane:
        """Computes the projection for vectors, float32 [N, D], at least one."""
        centre = vectors.mean(axis=0)
        scatter = (vectors - centre).T @ (vectors - centre)
        axes = np.linalg.eigh(scatter)[1][:, -2:].T[::-1]
        return cls(centre, axes.astype(np.float32))

    def points(self, vectors: Vectors) -> Vectors:
        """Projects vectors [N, D] to points, float32 [N, 2]."""
        return np.asarray((vectors - self.centre) @ self.axes.T, dtype=np.float32)


def sampled_rows(rows: int) -> Rows:
    """Returns all rows, or a random sample in order; the same one every time."""
    if rows <= MAX_POINTS:
        return np.arange(rows)
    return np.sort(np.random.default_rng(0).choice(rows, MAX_POINTS, replace=False))


def neighbour_map(vectors: Vectors, start: Vectors, report: Callable[[float], bool]) -> tuple[Vectors, Place]:
    """Computes positions that keep the neighbours of each vector (t-SNE).

    Args:
        vectors: float32 [N, D], unit length.
        start: float32 [N, 2], positions to begin with.
        report: Called with the fraction that is done; True stops the computation.

    Returns:
        The positions, and a function that places further vectors among them.

    Raises:
        ImportError: openTSNE is not installed.
        ValueError: The vectors have no neighbourhoods, since all are equal.
    """
    import openTSNE

    if np.ptp(start[:, 0]) < MIN_SPREAD:
        raise ValueError("all passages are equal")
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    affinities = openTSNE.affinity.PerplexityBasedNN(
        vectors, perplexity=perplexity, metric="cosine", n_jobs=1, random_state=0
    )
    done = 0
    is_placing = False

    def step(*_: Any) -> bool:
        nonlocal done
        done += STEPS_BETWEEN_REPORTS
        return not is_placing and report(min(1.0, done / sum(ITERATIONS)))

    embedding = openTSNE.TSNE(
        early_exaggeration_iter=ITERATIONS[0],
        n_iter=ITERATIONS[1],
        n_jobs=1,
        random_state=0,
        callbacks=step,
        callbacks_every_iters=STEPS_BETWEEN_REPORTS,
    ).fit(
        affinities=affinities,  # jitter: equal passages have equal positions, between which there is no direction
        initialization=openTSNE.initialization.jitter(
            openTSNE.initialization.rescale(start.astype(np.float64)), random_state=0
        ),
    )
    positions = np.asarray(embedding, dtype=np.float32)
    if not np.isfinite(positions).all():
        raise ValueError("the positions diverged")
    is_placing = True  # placing others calls `step` too
    neighbours = min(15, len(vectors) - 1)

    def place(others: Vectors) -> Vectors:
        placed = embedding.transform(others, perplexity=min(5, neighbours / 3), k=neighbours)
        return np.asarray(placed, dtype=np.float32)

    return positions, place


@dataclass
class CollectionMap:
    """The map of one state of a collection."""

    identity: str
    rows: Rows
    """Rows whose positions are known."""
    positions: Vectors
    """float32 [N, 2]."""
    place: Place
    kind: str = COMPONENTS
    progress: float | None = None
    """Fraction of the map of neighbours that is done; None if it is not being made."""
    reason: str = ""
    """Why there is no map of neighbours."""
    is_stale: bool = False
    """Whether a later state of the collection has its own map, so that this one is not needed any more."""

    @property
    def version(self) -> str:
        """Different whenever the positions are."""
        return f"{self.identity} {self.kind}"


class Maps:
    """Maps of the collections that are looked at, made when one is first asked for."""

    def __init__(self) -> None:
        self._maps: OrderedDict[str, CollectionMap] = OrderedDict()
        self._lock = threading.Lock()
        self._making = threading.Lock()  # one at a time: each takes a core

    def get(self, collection: str, store: FolderStore, *, is_growing: bool) -> CollectionMap:
        """Returns the map of a collection as it is now, at first that of its principal components.

        Args:
            collection: Name of the collection.
            store: The collection, with at least one passage.
            is_growing: Whether passages are being added, so that a map of neighbours would soon be out of date.
        """
        with self._lock:
            current = self._maps.get(collection)
            if current is None or current.identity != store.identity:
                if current is not None:
                    current.is_stale = True
                rows = sampled_rows(len(store))
                vectors = np.asarray(store.vectors[rows], dtype=np.float32)
                plane = Plane.of(vectors)
                current = CollectionMap(store.identity, rows, plane.points(vectors), plane.points)
                self._maps[collection] = current
            self._maps.move_to_end(collection)
            while len(self._maps) > KEPT_MAPS:
                self._maps.popitem(last=False)[1].is_stale = True
            if current.kind == COMPONENTS and current.progress is None and not current.reason:
                if len(current.rows) < MIN_NEIGHBOURS:
                    current.reason = f"a map of neighbours needs {MIN_NEIGHBOURS} passages"
                elif not is_growing:
                    current.progress = 0.0
                    vectors = np.array(store.vectors[current.rows], dtype=np.float32)
                    threading.Thread(
                        target=self._make, args=(current, vectors), name=f"map-{collection}", daemon=True
                    ).start()
            return replace(current)  # positions and `place` belong together

    def _make(self, current: CollectionMap, vectors: Vectors) -> None:
        def report(fraction: float) -> bool:
            current.progress = fraction
            return current.is_stale

        with self._making:
            if current.is_stale:
                return
            try:
                positions, place = neighbour_map(vectors, current.positions, report)
            except ImportError as err:
                reason = f"a map of neighbours needs openTSNE ({err})"
            except Exception as err:
                reason = f"no map of neighbours could be made ({err})"
                _log.info("no map of neighbours", exc_info=True)
            else:
                with self._lock:
                    current.positions, current.place, current.kind = positions, place, NEIGHBOURS
                reason = ""
        with self._lock:
            current.progress, current.reason = None, reason


def draw(store: FolderStore, shown: CollectionMap, hits: Sequence[int], query: Vectors | None) -> dict[str, Any]:
    """Returns what the map shows.

    Returns:
        `points`: x, y, index of the source, row and title of each passage shown; `sources`: the named ones, by size;
        a source that is not named has their number as its index. `hits`: rows of the last results, which are among the
        points. `query`: x and y of the last query, or None.
    """
    others = np.setdiff1d(np.array(hits, dtype=np.int64), shown.rows)
    unplaced = [np.asarray(store.vectors[others], dtype=np.float32)] if len(others) else []
    unplaced += [] if query is None else [query[None]]
    placed = shown.place(np.concatenate(unplaced)) if unplaced else np.zeros((0, 2), np.float32)
    positions = np.concatenate([shown.positions, placed[: len(others)]])
    counts = Counter(passage.source for passage in store.passages)
    sources = [source for source, _ in counts.most_common(NAMED_SOURCES)]
    numbers = {source: number for number, source in enumerate(sources)}
    points = []
    for row, (x, y) in zip([*shown.rows.tolist(), *others.tolist()], positions.tolist(), strict=True):
        passage = store.passages[row]
        points.append([round(x, 4), round(y, 4), numbers.get(passage.source, len(sources)), row, passage.label])
    query_point = None if query is None else [round(value, 4) for value in placed[-1].tolist()]
    return {"points": points, "sources": sources, "hits": [int(row) for row in hits], "query": query_point}
