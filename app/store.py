"""Collections of passages and their vectors on disk.

A collection records the engine that made its vectors and rejects vectors of any other: similarities across engines or
precisions are meaningless. Rows are added behind the others and count when collection.json, replaced in one step, says
so: a kill at any moment loses what was not yet counted, and nothing else.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy import BundleError, ConfigError, Encoder
from nvembed_deploy.app.index import FOLDER, Content, ExactIndex, Index, Vectors
from nvembed_deploy.app.passages import Passage
from nvembed_deploy.files.atomic import move_into_place, staged_folder, write_file
from nvembed_deploy.files.records import from_json

RECORD, PASSAGES, VECTORS = "collection.json", "passages.jsonl", "vectors.npy"
REQUIRED = ("source", "title", "text")
"""Fields of a passage that are written even if they are empty."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The engine that made a collection's vectors."""

    model: str
    precision: str
    manifest_sha256: str
    dimension: int

    @classmethod
    def of(cls, encoder: Encoder) -> Engine:
        """Returns the engine of an encoder's bundle."""
        manifest = encoder.manifest
        return cls(
            model=manifest.source.name,
            precision=manifest.precision.value,
            manifest_sha256=manifest.manifest_sha256,
            dimension=manifest.dimension,
        )


class Hit(NamedTuple):
    """A passage of a search result, its cosine to the query, and its row in the collection."""

    passage: Passage
    score: float
    row: int


def require_same_engine(stored: Engine, requested: Engine) -> None:
    """Checks that a query's vector and a collection were made by the same engine.

    Raises:
        ConfigError: The engines differ.
    """
    if stored != requested:
        is_same_model = (stored.model, stored.precision) == (requested.model, requested.precision)
        difference = "engine" if is_same_model else "model or precision"
        raise ConfigError(
            f"the collection was made by another {difference} ({stored.model} {stored.precision}, "
            f"{stored.manifest_sha256[:12]}) than the query ({requested.model} {requested.precision}, "
            f"{requested.manifest_sha256[:12]}); index the passages again with this engine, or search with the other"
        )


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file whose passages a collection has; files follow one another in the order of the rows."""

    name: str
    bytes: int
    sha256: str
    """Hash of its content, by which the same file is recognized."""
    passages: int
    """Number of passages when it is complete."""
    rows: int
    """Number of passages that are stored, fewer while it is added or where adding it was interrupted."""
    note: str = ""
    """What was read differently than expected, such as the encoding."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Contents of collection.json, whose replacement is what commits a change."""

    identity: str
    """Different for each collection and each time it changes."""
    lineage: str
    """Different each time that rows are removed or replaced; equal while they are only added."""
    rows: int
    passages_bytes: int
    """Bytes of passages.jsonl that count; whatever follows is of an interrupted write."""
    model: str
    precision: str
    manifest_sha256: str
    dimension: int
    files: tuple[StoredFile, ...] = ()

    @property
    def engine(self) -> Engine:
        """The engine that made the vectors."""
        return Engine(
            model=self.model,
            precision=self.precision,
            manifest_sha256=self.manifest_sha256,
            dimension=self.dimension,
        )


def read_record(folder: Path) -> Record:
    """Reads collection.json, also that of a collection of an earlier version, which names no files.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged.
    """
    fields = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if isinstance(fields, dict) and "identity" in fields and "rows" not in fields:
        with (folder / VECTORS).open("rb") as file:
            rows = _npy_shape(file)[0]
        fields |= {"lineage": fields["identity"], "rows": rows, "passages_bytes": (folder / PASSAGES).stat().st_size}
    return from_json(Record, fields)


def _npy_shape(file: BinaryIO) -> tuple[int, int]:
    """Reads the header of a file of vectors; the file's position is then that of the first row.

    Raises:
        ValueError: It is no file of float32 [N, D].
    """
    np.lib.format.read_magic(file)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.float32 or is_fortran or len(shape) != 2:
        raise ValueError(f"{VECTORS} is not float32 [N, D]")
    return shape[0], shape[1]


def _write_npy_header(file: BinaryIO, rows: int, dimension: int) -> None:
    """Writes the header of a file of vectors; NumPy pads it so that more rows do not make it longer."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, header | {"shape": (rows, dimension)})


class FolderStore:
    """A collection as it was when opened: passages, memory-mapped vectors, and an index that finds the nearest ones.

    Args:
        folder: Folder written by `write` and `append`.
        open_index: Opens the index; see `index.opener`.
        previous: The same collection with fewer rows, whose passages need not be read again.

    Raises:
        BundleError: The folder is damaged.
        ConfigError: The index cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        open_index: Callable[[Content], Index] = ExactIndex,
        previous: FolderStore | None = None,
    ) -> None:
        self.folder = folder
        while True:
            try:
                self.record = read_record(folder)
                self._read(previous)
                break
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as err:
                if self._was_replaced():
                    continue  # another process has replaced it in the meantime
                raise BundleError(f"collection {folder.name} is damaged ({err}); delete it and index again") from err
        self._index = open_index(Content(self.identity, folder, self.vectors, self._sources))

    passages: list[Passage]
    vectors: Vectors
    """float32 [N, D], read-only."""
    _sources: NDArray[np.object_]

    def _read(self, previous: FolderStore | None) -> None:
        record = self.record
        old = previous if previous is not None and previous.record.lineage == record.lineage else None
        if old is not None and (old.record.rows > record.rows or old.folder != self.folder):
            old = None
        start = old.record.passages_bytes if old else 0
        with (self.folder / PASSAGES).open("rb") as file:
            file.seek(start)
            lines = file.read(record.passages_bytes - start).decode().splitlines()
        added = [from_json(Passage, json.loads(line)) for line in lines]
        self.passages = [*old.passages, *added] if old else added
        sources = np.array([passage.source for passage in added], dtype=object)
        self._sources = np.concatenate([old._sources, sources]) if old else sources
        with (self.folder / VECTORS).open("rb") as file:
            dimension, offset = _npy_shape(file)[1], file.tell()
        if (len(self.passages), dimension) != (record.rows, record.dimension):
            raise ValueError("its files do not match")
        if sum(entry.rows for entry in record.files) > record.rows:
            raise ValueError("its files have more passages than there are")
        shape = (record.rows, record.dimension)
        self.vectors = (  # nothing cannot be mapped
            np.memmap(self.folder / VECTORS, np.float32, "r", offset=offset, shape=shape)
            if record.rows
            else np.zeros(shape, np.float32)
        )

    def _was_replaced(self) -> bool:
        try:
            return hasattr(self, "record") and read_record(self.folder).identity != self.record.identity
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def __len__(self) -> int:
        return len(self.passages)

    @property
    def identity(self) -> str:
        """Different for each collection and each time it changes."""
        return self.record.identity

    @property
    def engine(self) -> Engine:
        """The engine that made the vectors."""
        return self.record.engine

    def is_current(self) -> bool:
        """Returns False if the folder was changed or deleted since it was opened."""
        try:
            return read_record(self.folder).identity == self.identity
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def sources(self) -> list[str]:
        """Returns the names of the sources, sorted."""
        return sorted(set(self._sources))

    def rows_of(self, sources: Sequence[str]) -> NDArray[np.bool_]:
        """Returns whether each row is of one of the sources."""
        return np.isin(self._sources, list(sources))

    def file_rows(self, name: str) -> range | None:
        """Returns the rows of a file, or None if the collection does not have it."""
        start = len(self) - sum(entry.rows for entry in self.record.files)  # rows of an earlier version come first
        for entry in self.record.files:
            if entry.name == name:
                return range(start, start + entry.rows)
            start += entry.rows
        return None

    def search(self, engine: Engine, query: Vectors, *, count: int, sources: Sequence[str] = ()) -> list[Hit]:
        """Returns the nearest passages, the best one first.

        Args:
            engine: Engine that made the query's vector.
            query: float32 [D], unit length.
            count: Maximum number of passages.
            sources: Sources to search; all if empty.

        Raises:
            ConfigError: The query's vector was made by another engine.
        """
        require_same_engine(self.engine, engine)
        if not len(self):
            return []
        rows = self._index.nearest(query, count=count, sources=sources)
        scores = self.vectors[rows] @ query
        order = sorted(range(len(rows)), key=lambda index: (-scores[index], rows[index]))[:count]
        return [Hit(self.passages[rows[index]], float(scores[index]), int(rows[index])) for index in order]

    @classmethod
    def write(
        cls,
        folder: Path,
        engine: Engine,
        passages: Sequence[Passage],
        vectors: Vectors,
        open_index: Callable[[Content], Index] = ExactIndex,
        files: Sequence[StoredFile] = (),
    ) -> FolderStore:
        """Creates or replaces a collection in one step; an interrupted call leaves the old one unchanged."""
        with staged_folder(folder) as staging:
            content = _json_lines(passages)
            (staging / PASSAGES).write_bytes(content)
            with (staging / VECTORS).open("wb") as file:
                _write_npy_header(file, len(vectors), engine.dimension)
                file.write(np.ascontiguousarray(vectors, dtype=np.float32).tobytes())
            token = secrets.token_hex(8)
            record = Record(
                identity=token,
                lineage=token,
                rows=len(passages),
                passages_bytes=len(content),
                files=tuple(files),
                **asdict(engine),
            )
            (staging / RECORD).write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
            move_into_place(staging, folder)
        return cls(folder, open_index)

    def append(self, passages: Sequence[Passage], vectors: Vectors, files: Sequence[StoredFile]) -> FolderStore:
        """Adds rows in place and returns the longer collection, without an index; a killed call adds none.

        The caller holds the collection's lock. Rows are written behind those that count, and count when the record is
        replaced.
        """
        content, record = _json_lines(passages), self.record
        rows = record.rows + len(passages)
        with (self.folder / PASSAGES).open("r+b") as file:
            file.truncate(record.passages_bytes)
            file.seek(record.passages_bytes)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with (self.folder / VECTORS).open("r+b") as file:
            _npy_shape(file)
            file.seek(file.tell() + record.rows * record.dimension * np.dtype(np.float32).itemsize)
            file.write(np.ascontiguousarray(vectors, dtype=np.float32).tobytes())
            file.seek(0)
            _write_npy_header(file, rows, record.dimension)
            file.flush()
            os.fsync(file.fileno())
        self._commit(rows=rows, passages_bytes=record.passages_bytes + len(content), files=tuple(files))
        return FolderStore(self.folder, previous=self)

    def truncate(self, rows: int, files: Sequence[StoredFile]) -> FolderStore:
        """Removes rows from the end, and returns the shorter collection, without an index."""
        lines = (self.folder / PASSAGES).read_bytes().split(b"\n")[:rows]
        passages_bytes = sum(len(line) + 1 for line in lines)
        self._commit(rows=rows, passages_bytes=passages_bytes, files=tuple(files), lineage=secrets.token_hex(8))
        return FolderStore(self.folder)

    def _commit(self, **changes: Any) -> None:
        shutil.rmtree(self.folder / FOLDER, ignore_errors=True)  # an index of other rows; it is built again
        record = replace(self.record, identity=secrets.token_hex(8), **changes)
        write_file(self.folder / RECORD, json.dumps(asdict(record), indent=1).encode())

    def drop_index(self) -> None:
        """Removes index data outside the folder, before the collection is replaced or deleted."""
        self._index.delete()


def _json_lines(passages: Sequence[Passage]) -> bytes:
    """Returns passages as lines; JSON escapes every line separator of str.splitlines, and empty fields are left out."""
    lines = (
        {name: value for name, value in asdict(passage).items() if value or name in REQUIRED} for passage in passages
    )
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
