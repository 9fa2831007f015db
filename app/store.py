"""Collections of passages with their vectors, kept on disk.

A collection knows the engine that made its vectors, and refuses vectors of any other: nearness across engines or
precisions means nothing.
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
from nvembed_deploy.files.atomic import staged_folder, switch_in
from nvembed_deploy.files.records import from_json

RECORD, PASSAGES, VECTORS = "collection.json", "passages.jsonl", "vectors.npy"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What made a collection's vectors."""

    model: str
    precision: str
    manifest_sha256: str
    dimension: int

    @classmethod
    def of(cls, encoder: Encoder) -> Engine:
        """The engine of an encoder's bundle."""
        manifest = encoder.manifest
        return cls(
            model=manifest.source.name,
            precision=manifest.precision.value,
            manifest_sha256=manifest.manifest_sha256,
            dimension=manifest.dimension,
        )


class Hit(NamedTuple):
    """A passage that was found, and its cosine to the query."""

    passage: Passage
    score: float


def require_same(stored: Engine, asked: Engine) -> None:
    """Refuses to compare vectors of two engines.

    Raises:
        ConfigError: With both, and what to do.
    """
    if stored != asked:
        what = "engine" if (stored.model, stored.precision) == (asked.model, asked.precision) else "model or precision"
        raise ConfigError(
            f"the collection was made by another {what} ({stored.model} {stored.precision}, "
            f"{stored.manifest_sha256[:12]}) than the query ({asked.model} {asked.precision}, "
            f"{asked.manifest_sha256[:12]}); index the passages again with this one, or search with the other"
        )


class FolderStore:
    """A folder with passages and vectors, which are mapped, not read, and an index that finds the nearest of them.

    Args:
        folder: What `write` made.
        open_index: See `index.opener`.

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
            whole = self.vectors.dtype == np.float32 and self.vectors.shape == (len(lines), self.engine.dimension)
        except (OSError, ValueError, KeyError, AttributeError) as err:
            raise BundleError(f"collection {folder.name} is damaged ({err}); delete it and index again") from err
        if not whole:
            raise BundleError(f"collection {folder.name} is damaged (its parts differ); delete it and index again")
        self._sources = np.array([passage.source for passage in self.passages], dtype=object)
        self._index = open_index(Content(self.identity, folder, self.vectors, self._sources))

    def __len__(self) -> int:
        return len(self.passages)

    def is_current(self) -> bool:
        """False where the folder was written again since it was opened, or is gone."""
        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(record, dict) and record.get("identity") == self.identity

    def sources(self) -> list[str]:
        """Names of the sources, sorted."""
        return sorted(set(self._sources))

    def search(self, engine: Engine, query: Vectors, *, count: int, sources: Sequence[str] = ()) -> list[Hit]:
        """The nearest passages, the best first.

        Args:
            engine: What made the query's vector.
            query: float32 [D], unit length.
            count: Most passages.
            sources: Only of these; of all where empty.

        Raises:
            ConfigError: The query is of another engine.
        """
        require_same(self.engine, engine)
        rows = self._index.nearest(query, count=count, sources=sources)
        scores = self.vectors[rows] @ query
        order = sorted(range(len(rows)), key=lambda place: (-scores[place], rows[place]))[:count]
        return [Hit(self.passages[rows[place]], float(scores[place])) for place in order]

    @classmethod
    def write(
        cls,
        folder: Path,
        engine: Engine,
        passages: Sequence[Passage],
        vectors: Vectors,
        open_index: Callable[[Content], Index] = ExactIndex,
    ) -> FolderStore:
        """Makes or replaces a collection; killed at any moment, the old one or the new one is there."""
        with staged_folder(folder) as staging:
            record = {"identity": secrets.token_hex(8), **asdict(engine)}
            (staging / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
            with (staging / PASSAGES).open("w", encoding="utf-8") as file:
                # JSON escapes every line separator that splitlines knows.
                file.writelines(json.dumps(asdict(passage)) + "\n" for passage in passages)
            np.save(staging / VECTORS, vectors.astype(np.float32, copy=False))
            switch_in(staging, folder)
        return cls(folder, open_index)

    def drop_index(self) -> None:
        """Removes what the index keeps elsewhere: the collection is about to be replaced or removed."""
        self._index.delete()
