"""Collections of passages with their vectors, kept on disk and searched exactly.

A collection knows the engine that made its vectors, and refuses vectors of any other: nearness across engines or
precisions means nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy import Encoder
from nvembed_deploy.atomic import staged_folder, switch_in
from nvembed_deploy.errors import BundleError, ConfigError
from nvembed_deploy.records import from_json

from .passages import Passage

RECORD, PASSAGES, VECTORS = "collection.json", "passages.jsonl", "vectors.npy"
Vectors = NDArray[np.float32]


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


class Store(Protocol):
    """Where a collection's vectors are."""

    engine: Engine

    def __len__(self) -> int: ...

    def sources(self) -> list[str]:
        """Names of the sources, sorted."""

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


class ExactStore:
    """A folder with passages and vectors; every search looks at all of them. The vectors are mapped, not read.

    Args:
        folder: What `write` made.

    Raises:
        BundleError: The folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.engine = from_json(Engine, json.loads((folder / RECORD).read_text(encoding="utf-8")))
            lines = (folder / PASSAGES).read_text(encoding="utf-8").splitlines()
            self.passages = [from_json(Passage, json.loads(line)) for line in lines]
            self.vectors: Vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
            whole = self.vectors.dtype == np.float32 and self.vectors.shape == (len(lines), self.engine.dimension)
        except (OSError, ValueError) as err:
            raise BundleError(f"collection {folder.name} is damaged ({err}); delete it and index again") from err
        if not whole:
            raise BundleError(f"collection {folder.name} is damaged (its parts differ); delete it and index again")
        self._sources = np.array([passage.source for passage in self.passages], dtype=object)

    def __len__(self) -> int:
        return len(self.passages)

    def sources(self) -> list[str]:
        """See `Store`."""
        return sorted(set(self._sources))

    def search(self, engine: Engine, query: Vectors, *, count: int, sources: Sequence[str] = ()) -> list[Hit]:
        """See `Store`."""
        require_same(self.engine, engine)
        scores = self.vectors @ query
        if sources:
            scores = np.where(np.isin(self._sources, list(sources)), scores, -np.inf)
        best = np.argpartition(-scores, min(count, len(scores)) - 1)[:count]  # a collection is never empty
        order = sorted(best.tolist(), key=lambda index: (-scores[index], index))
        return [Hit(self.passages[index], float(scores[index])) for index in order if np.isfinite(scores[index])]

    @classmethod
    def write(cls, folder: Path, engine: Engine, passages: Sequence[Passage], vectors: Vectors) -> ExactStore:
        """Makes or replaces a collection; killed at any moment, the old one or the new one is there."""
        with staged_folder(folder) as staging:
            (staging / RECORD).write_text(json.dumps(asdict(engine), indent=1), encoding="utf-8")
            with (staging / PASSAGES).open("w", encoding="utf-8") as file:
                # JSON escapes every line separator that splitlines knows.
                file.writelines(json.dumps(asdict(passage)) + "\n" for passage in passages)
            np.save(staging / VECTORS, vectors.astype(np.float32, copy=False))
            switch_in(staging, folder)
        return cls(folder)

    def delete(self) -> None:
        """Removes the collection."""
        shutil.rmtree(self.folder)
