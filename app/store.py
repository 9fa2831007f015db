"""Collections of passages and their vectors on disk.

A collection records the engine that made its vectors and rejects vectors of any other: similarities across engines or
precisions are meaningless.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nvembed_deploy import Encoder
from nvembed_deploy.app.index import Content, ExactIndex, Index, Vectors
from nvembed_deploy.app.passages import Passage
from nvembed_deploy.errors import BundleError, ConfigError
from nvembed_deploy.files.atomic import move_into_place, staged_folder
from nvembed_deploy.files.records import from_json

RECORD, PASSAGES, VECTORS = "collection.json", "passages.jsonl", "vectors.npy"


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
    """A passage of a search result, and its cosine to the query."""

    passage: Passage
    score: float


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


class FolderStore:
    """A folder with passages, memory-mapped vectors, and an index that finds the nearest ones.

    Args:
        folder: Folder written by `write`.
        open_index: Opens the index; see `index.opener`.

    Raises:
        BundleError: The folder is damaged.
        ConfigError: The index cannot be opened.
    """

    def __init__(self, folder: Path, open_index: Callable[[Content], Index] = ExactIndex) -> None:
        self.folder = folder
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            self.identity = str(record.pop("identity"))
            self.engine = from_json(Engine, record)
            lines = (folder / PASSAGES).read_text(encoding="utf-8").splitlines()
            self.passages = [from_json(Passage, json.loads(line)) for line in lines]
            self.vectors: Vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
            is_consistent = self.vectors.dtype == np.float32 and self.vectors.shape == (
                len(lines),
                self.engine.dimension,
            )
        except (OSError, ValueError, KeyError, AttributeError) as err:
            raise BundleError(f"collection {folder.name} is damaged ({err}); delete it and index again") from err
        if not is_consistent:
            raise BundleError(
                f"collection {folder.name} is damaged (its files do not match); delete it and index again"
            )
        self._sources = np.array([passage.source for passage in self.passages], dtype=object)
        self._index = open_index(Content(self.identity, folder, self.vectors, self._sources))

    def __len__(self) -> int:
        return len(self.passages)

    def is_current(self) -> bool:
        """Returns False if the folder was changed or deleted since it was opened."""
        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(record, dict) and record.get("identity") == self.identity

    def sources(self) -> list[str]:
        """Returns the names of the sources, sorted."""
        return sorted(set(self._sources))

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
        rows = self._index.nearest(query, count=count, sources=sources)
        scores = self.vectors[rows] @ query
        order = sorted(range(len(rows)), key=lambda index: (-scores[index], rows[index]))[:count]
        return [Hit(self.passages[rows[index]], float(scores[index])) for index in order]

    @classmethod
    def write(
        cls,
        folder: Path,
        engine: Engine,
        passages: Sequence[Passage],
        vectors: Vectors,
        open_index: Callable[[Content], Index] = ExactIndex,
    ) -> FolderStore:
        """Creates or replaces a collection in one step; an interrupted call leaves the old one unchanged."""
        with staged_folder(folder) as staging:
            record = {"identity": secrets.token_hex(8), **asdict(engine)}
            (staging / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
            with (staging / PASSAGES).open("w", encoding="utf-8") as file:
                # JSON escapes every line separator of str.splitlines.
                file.writelines(json.dumps(asdict(passage)) + "\n" for passage in passages)
            np.save(staging / VECTORS, vectors.astype(np.float32, copy=False))
            move_into_place(staging, folder)
        return cls(folder, open_index)

    def drop_index(self) -> None:
        """Removes index data outside the folder, before the collection is replaced or deleted."""
        self._index.delete()
