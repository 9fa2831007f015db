"""Nearest-neighbour search: exhaustive, with a Qdrant index on this machine, or on a Qdrant server.

An index is derived from a collection's vectors and can be rebuilt from them; scores are always computed from the
collection's own vectors, so that they are exact and the same with every index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from nvembed_deploy import ConfigError, DeployError, MissingExtra
from nvembed_deploy.console import install_command
from nvembed_deploy.files.atomic import move_into_place, staged_folder

EXACT, QDRANT_EDGE = "exact", "qdrant"
FOLDER = "qdrant"
"""Folder of the index on this machine, in the collection's folder."""
BLOCK = 1000
HNSW_LINKS, HNSW_CANDIDATES = 16, 128
"""HNSW: edges per node, and candidates while the graph is built and searched. Qdrant's defaults are 16 and 100."""
SOURCE = "source"
OVERSAMPLING = 4
"""Number of candidates per result: rounding inside the index changes their order."""
Vectors = NDArray[np.float32]


class Content(NamedTuple):
    """Contents of a collection that an index is built from."""

    identity: str
    """Different for each collection and each time it is written."""
    folder: Path
    """Folder of the collection."""
    vectors: Vectors
    """float32 [N, D], rows of unit length."""
    sources: NDArray[np.object_]
    """[N], the name of each row's source."""


class Index(Protocol):
    """Finds the nearest rows of a collection."""

    def nearest(self, query: Vectors, *, count: int, sources: Sequence[str]) -> NDArray[np.int64]:
        """Returns the rows that are nearest to a query, in any order; may return more than requested.

        Args:
            query: float32 [D], unit length.
            count: Number of rows to find.
            sources: Sources to search; all if empty.
        """

    def delete(self) -> None:
        """Removes data that is stored outside the collection's folder."""


def opener(kind: str) -> Callable[[Content], Index]:
    """Returns a function that opens an index: `exact`, `qdrant`, or the URL of a Qdrant server.

    Raises:
        ConfigError: The kind does not exist.
        MissingExtra: A required package is not installed.
    """
    if kind == EXACT:
        return ExactIndex
    if kind == QDRANT_EDGE:
        _import("qdrant_edge")
        return EdgeIndex
    if kind.startswith(("http://", "https://")):
        return lambda content: ServerIndex(
            content, _import("qdrant_client").QdrantClient(url=kind, timeout=60, check_compatibility=False), kind
        )
    raise ConfigError(
        f"--index must be {EXACT}, {QDRANT_EDGE}, or the URL of a Qdrant server (http://...), got {kind!r}"
    )


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as err:
        raise MissingExtra(f"{name} is not installed ({err}); install it: {install_command('qdrant')}") from err


class ExactIndex:
    """Compares the query with every vector."""

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
    """Qdrant's engine in this process, with its files in the collection's folder; built if missing.

    Raises:
        ConfigError: The index cannot be built or read.
        MissingExtra: qdrant-edge-py is not installed.
    """

    def __init__(self, content: Content) -> None:
        self._edge = _import("qdrant_edge")
        self._folder = folder = content.folder / FOLDER
        if not folder.is_dir():
            self._call(self._build, content, folder)
        self._shard = self._call(self._edge.EdgeShard.load, str(folder))
        if self._call(self._shard.count, self._edge.CountRequest(exact=True)) != len(content.vectors):
            raise ConfigError(f"{folder} belongs to another collection; delete the folder to rebuild the index")

    def _call(self, call: Callable[..., Any], *arguments: Any) -> Any:
        with _qdrant_errors(f"the index in {self._folder}", "delete the folder to rebuild it"):
            return call(*arguments)

    def _build(self, content: Content, folder: Path) -> None:
        edge = self._edge
        hnsw = edge.HnswIndexConfig(m=HNSW_LINKS, ef_construct=HNSW_CANDIDATES, full_scan_threshold=1000)
        vectors = edge.EdgeVectorParams(size=content.vectors.shape[1], distance=edge.Distance.Dot, hnsw_config=hnsw)
        optimizers = edge.EdgeOptimizersConfig(indexing_threshold=1000, default_segment_number=1)
        # A write-ahead log could only be opened by one process; the index is built aside and replaced in one step.
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
            move_into_place(staging, folder)

    def nearest(self, query: Vectors, *, count: int, sources: Sequence[str]) -> NDArray[np.int64]:
        """See `Index`."""
        edge = self._edge
        source_filter = None
        if sources:
            source_filter = edge.Filter(must=[edge.FieldCondition(SOURCE, match=edge.MatchAny(list(sources)))])
        request = edge.QueryRequest(
            limit=OVERSAMPLING * count,
            query=edge.Query.Nearest(query.tolist()),
            filter=source_filter,
            params=edge.SearchParams(hnsw_ef=max(HNSW_CANDIDATES, OVERSAMPLING * count)),
        )
        return np.array([point.id for point in self._call(self._shard.query, request)], dtype=np.int64)

    def delete(self) -> None:
        """See `Index`; the files are deleted with the folder."""
        self._shard.close()


class ServerIndex:
    """A collection on a Qdrant server or cluster, uploaded if the server does not have it.

    Args:
        content: Contents to index.
        client: A `qdrant_client.QdrantClient`.
        url: URL of the server, for messages.

    Raises:
        ConfigError: The server does not respond.
    """

    def __init__(self, content: Content, client: Any, url: str) -> None:
        self._client, self._url = client, url
        self._models = _import("qdrant_client").models
        self._name = f"nvembed-{content.identity}"
        if not self._call(client.collection_exists, self._name) or self._count() < len(content.vectors):
            self._fill(content)

    def _count(self) -> int:
        return int(self._call(self._client.count, self._name, exact=True).count)

    def _fill(self, content: Content) -> None:
        models = self._models
        if not self._call(self._client.collection_exists, self._name):
            parameters = models.VectorParams(size=content.vectors.shape[1], distance=models.Distance.DOT, on_disk=True)
            hnsw = models.HnswConfigDiff(m=HNSW_LINKS, ef_construct=HNSW_CANDIDATES)
            # One byte a number in memory, a quarter; candidates are rescored with the vectors on the server's disk.
            scalar = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, always_ram=True)
            self._call(
                self._client.create_collection,
                self._name,
                vectors_config=parameters,
                hnsw_config=hnsw,
                quantization_config=models.ScalarQuantization(scalar=scalar),
            )
            self._call(self._client.create_payload_index, self._name, SOURCE, models.PayloadSchemaType.KEYWORD)
        for start, block, sources in _blocks(content):  # points have the rows' numbers, so a retry adds nothing
            batch = models.Batch(
                ids=list(range(start, start + len(block))),
                vectors=block.tolist(),
                payloads=[{SOURCE: source} for source in sources],
            )
            self._call(self._client.upsert, self._name, batch, wait=True)

    def nearest(self, query: Vectors, *, count: int, sources: Sequence[str]) -> NDArray[np.int64]:
        """See `Index`."""
        models = self._models
        source_filter = None
        if sources:
            source_filter = models.Filter(
                must=[models.FieldCondition(key=SOURCE, match=models.MatchAny(any=list(sources)))]
            )
        response = self._call(
            self._client.query_points,
            self._name,
            query=query.tolist(),
            query_filter=source_filter,
            limit=OVERSAMPLING * count,
            with_payload=False,
            search_params=models.SearchParams(
                hnsw_ef=max(HNSW_CANDIDATES, OVERSAMPLING * count),
                quantization=models.QuantizationSearchParams(rescore=True),
            ),
        )
        return np.array([point.id for point in response.points], dtype=np.int64)

    def delete(self) -> None:
        """See `Index`."""
        self._call(self._client.delete_collection, self._name)

    def _call(self, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        with _qdrant_errors(f"the Qdrant server at {self._url}", "start it"):
            return call(*arguments, **keywords)


@contextmanager
def _qdrant_errors(subject: str, cure: str) -> Iterator[None]:
    """Converts Qdrant's errors, which have no common class and include httpx's, to `ConfigError`."""
    try:
        yield
    except DeployError:
        raise
    except Exception as err:
        reason = str(err).splitlines()[0] if str(err) else repr(err)
        raise ConfigError(f"{subject} failed ({reason}); {cure}, or search without it: --index {EXACT}") from err


def _blocks(content: Content) -> Iterator[tuple[int, Vectors, Iterable[str]]]:
    total = len(content.vectors)
    with tqdm(total=total, desc="indexing", unit="passage", disable=None, leave=False) as progress_bar:
        for start in range(0, total, BLOCK):
            block = np.asarray(content.vectors[start : start + BLOCK])
            yield start, block, content.sources[start : start + BLOCK]
            progress_bar.update(len(block))
