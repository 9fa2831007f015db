"""Which passages are nearest: all of them looked at, an index of Qdrant's on this machine, or a Qdrant server.

An index is derived from a collection's vectors and can be made again from them; scores are always exact, of the
collection's own vectors, so that they mean the same with every index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from nvembed_deploy.errors import ConfigError, DeployError, MissingExtra
from nvembed_deploy.files.atomic import staged_folder, switch_in

EXACT, EDGE = "exact", "qdrant"
FOLDER = "qdrant"
"""Of the index on this machine, in the collection's folder."""
BLOCK = 1000
LINKS, CANDIDATES = 16, 128
"""HNSW: edges of a node, and candidates held while the graph is made and searched. Qdrant's defaults are 16 and 100."""
SOURCE = "source"
SPARE = 4
"""Candidates asked for, times the results: rounding inside the index moves them by places."""
Vectors = NDArray[np.float32]


class Content(NamedTuple):
    """What a collection has to index."""

    identity: str
    """Another for each collection and each time it is written."""
    folder: Path
    vectors: Vectors
    """float32 [N, D], rows of unit length."""
    sources: NDArray[np.object_]
    """[N], the name of each row's source."""


class Index(Protocol):
    """Finds rows of a collection."""

    def nearest(self, query: Vectors, *, count: int, sources: Sequence[str]) -> NDArray[np.int64]:
        """Rows that are nearest to a query, in any order; more of them than asked for do not hurt.

        Args:
            query: float32 [D], unit length.
            count: Most rows that are wanted.
            sources: Only of these; of all where empty.
        """

    def delete(self) -> None:
        """Removes what is kept elsewhere than in the collection's folder."""


def opener(kind: str) -> Callable[[Content], Index]:
    """How indexes of a kind are opened: `exact`, `qdrant`, or the URL of a Qdrant server.

    Raises:
        ConfigError: There is no such kind.
        MissingExtra: The package that it needs is not installed.
    """
    if kind == EXACT:
        return ExactIndex
    if kind == EDGE:
        _import("qdrant_edge")
        return EdgeIndex
    if kind.startswith(("http://", "https://")):
        return lambda content: ServerIndex(
            content, _import("qdrant_client").QdrantClient(url=kind, timeout=60, check_compatibility=False), kind
        )
    raise ConfigError(f"--index is {kind!r}; pass {EXACT}, {EDGE}, or the URL of a Qdrant server (http://...)")


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as err:
        raise MissingExtra(f"{name} is not installed ({err}); pip install 'nvembed-deploy[qdrant]'") from err


class ExactIndex:
    """Looks at every vector."""

    def __init__(self, content: Content) -> None:
        self._vectors, self._sources = content.vectors, content.sources

    def nearest(self, query: Vectors, *, count: int, sources: Sequence[str]) -> NDArray[np.int64]:
        """See `Index`."""
        if sources:
            rows = np.flatnonzero(np.isin(self._sources, list(sources)))
            scores = self._vectors[rows] @ query
            return rows[_best(scores, count)]
        return _best(self._vectors @ query, count)

    def delete(self) -> None:
        """See `Index`."""


def _best(scores: Vectors, count: int) -> NDArray[np.int64]:
    if count >= len(scores):
        return np.arange(len(scores))
    return np.argpartition(-scores, count - 1)[:count]


class EdgeIndex:
    """Qdrant's engine inside this process, its files in the collection's folder; made where they are missing.

    Raises:
        ConfigError: The index cannot be made or read.
        MissingExtra: qdrant-edge-py is not installed.
    """

    def __init__(self, content: Content) -> None:
        self._edge = _import("qdrant_edge")
        self._folder = folder = content.folder / FOLDER
        if not folder.is_dir():
            self._asked(self._make, content, folder)
        self._shard = self._asked(self._edge.EdgeShard.load, str(folder))
        if self._asked(self._shard.count, self._edge.CountRequest(exact=True)) != len(content.vectors):
            raise ConfigError(f"{folder} is not of this collection; delete that folder, and it is made again")

    def _asked(self, call: Callable[..., Any], *arguments: Any) -> Any:
        with _told(f"the index in {self._folder}", "delete that folder, and it is made again"):
            return call(*arguments)

    def _make(self, content: Content, folder: Path) -> None:
        edge = self._edge
        hnsw = edge.HnswIndexConfig(m=LINKS, ef_construct=CANDIDATES, full_scan_threshold=1000)
        vectors = edge.EdgeVectorParams(size=content.vectors.shape[1], distance=edge.Distance.Dot, hnsw_config=hnsw)
        optimizers = edge.EdgeOptimizersConfig(indexing_threshold=1000, default_segment_number=1)
        # Without a write-ahead log, which only one process could open: it is made aside, and whole or not at all.
        config = edge.EdgeConfig(vectors=vectors, optimizers=optimizers, wal_enabled=False)
        with staged_folder(folder) as staging:
            shard = edge.EdgeShard.create(str(staging), config)
            keyword = edge.PayloadSchemaType.Keyword
            shard.update(edge.UpdateOperation.create_field_index(SOURCE, keyword))
            for start, block, sources in _blocks(content):
                points = [
                    edge.Point(start + row, vector.tolist(), {SOURCE: source})
                    for row, (vector, source) in enumerate(zip(block, sources, strict=True))
                ]
                shard.update(edge.UpdateOperation.upsert_points(points))
            shard.optimize()
            shard.flush()
            shard.close()
            switch_in(staging, folder)

    def nearest(self, query: Vectors, *, count: int, sources: Sequence[str]) -> NDArray[np.int64]:
        """See `Index`."""
        edge = self._edge
        only = None
        if sources:
            only = edge.Filter(must=[edge.FieldCondition(SOURCE, match=edge.MatchAny(list(sources)))])
        request = edge.QueryRequest(
            limit=SPARE * count,
            query=edge.Query.Nearest(query.tolist()),
            filter=only,
            params=edge.SearchParams(hnsw_ef=max(CANDIDATES, SPARE * count)),
        )
        return np.array([point.id for point in self._asked(self._shard.query, request)], dtype=np.int64)

    def delete(self) -> None:
        """See `Index`; its files go with the folder."""
        self._shard.close()


class ServerIndex:
    """A collection of a Qdrant server or cluster, filled where the server lacks it.

    Args:
        content: What to index.
        client: A `qdrant_client.QdrantClient`.
        where: The server's URL, for messages.

    Raises:
        ConfigError: The server does not answer.
    """

    def __init__(self, content: Content, client: Any, where: str) -> None:
        self._client, self._where = client, where
        self._models = _import("qdrant_client").models
        self._name = f"nvembed-{content.identity}"
        if not self._asked(client.collection_exists, self._name) or self._count() < len(content.vectors):
            self._fill(content)

    def _count(self) -> int:
        return int(self._asked(self._client.count, self._name, exact=True).count)

    def _fill(self, content: Content) -> None:
        models = self._models
        if not self._asked(self._client.collection_exists, self._name):
            parameters = models.VectorParams(size=content.vectors.shape[1], distance=models.Distance.DOT)
            hnsw = models.HnswConfigDiff(m=LINKS, ef_construct=CANDIDATES)
            self._asked(self._client.create_collection, self._name, vectors_config=parameters, hnsw_config=hnsw)
            self._asked(self._client.create_payload_index, self._name, SOURCE, models.PayloadSchemaType.KEYWORD)
        for start, block, sources in _blocks(content):  # points have the rows' numbers, so a second try adds nothing
            batch = models.Batch(
                ids=list(range(start, start + len(block))),
                vectors=block.tolist(),
                payloads=[{SOURCE: source} for source in sources],
            )
            self._asked(self._client.upsert, self._name, batch, wait=True)

    def nearest(self, query: Vectors, *, count: int, sources: Sequence[str]) -> NDArray[np.int64]:
        """See `Index`."""
        models = self._models
        only = None
        if sources:
            only = models.Filter(must=[models.FieldCondition(key=SOURCE, match=models.MatchAny(any=list(sources)))])
        found = self._asked(
            self._client.query_points,
            self._name,
            query=query.tolist(),
            query_filter=only,
            limit=SPARE * count,
            with_payload=False,
            search_params=models.SearchParams(hnsw_ef=max(CANDIDATES, SPARE * count)),
        )
        return np.array([point.id for point in found.points], dtype=np.int64)

    def delete(self) -> None:
        """See `Index`."""
        self._asked(self._client.delete_collection, self._name)

    def _asked(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with _told(f"the Qdrant server at {self._where}", "start it"):
            return call(*arguments, **named)


@contextmanager
def _told(what: str, cure: str) -> Iterator[None]:
    """What Qdrant raises as one of ours: its errors have no common class, and connections fail in httpx's."""
    try:
        yield
    except DeployError:
        raise
    except Exception as err:
        reason = str(err).splitlines()[0] if str(err) else repr(err)
        raise ConfigError(f"{what} failed ({reason}); {cure}, or search without it: --index {EXACT}") from err


def _blocks(content: Content) -> Iterator[tuple[int, Vectors, Iterable[str]]]:
    total = len(content.vectors)
    with tqdm(total=total, desc="indexing", unit="passage", disable=None, leave=False) as bar:
        for start in range(0, total, BLOCK):
            block = np.asarray(content.vectors[start : start + BLOCK])
            yield start, block, content.sources[start : start + BLOCK]
            bar.update(len(block))
