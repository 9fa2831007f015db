"""The collections of a folder: Python's documentation, indexed at the first start, and what people add."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nvembed_deploy import Encoder
from nvembed_deploy.app.index import EXACT, opener
from nvembed_deploy.app.passages import Passage, library_passages
from nvembed_deploy.app.store import RECORD, Engine, FolderStore
from nvembed_deploy.errors import BundleError, ConfigError, DeployError, InputError
from nvembed_deploy.files.atomic import remove_leftovers

PYTHON = "Python documentation"
NAME = re.compile(r"\w[\w .-]{0,39}")
LOCK = ".lock"
BLOCK = 64
"""Passages between two steps, at which work can be stopped."""

_log = logging.getLogger(__name__)


def default_folder() -> Path:
    """Where collections are kept: the user's data folder, by the XDG rules."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "nvembed-deploy" / "collections"


class Library:
    """Collections by name.

    Args:
        folder: Where they are kept; made where it is missing.
        encoder: Embeds what is added.
        index: See `index.opener`.

    Raises:
        ConfigError: There is no such index.
        MissingExtra: It needs a package that is not installed.
    """

    def __init__(self, folder: Path, encoder: Encoder, *, index: str = EXACT) -> None:
        self.folder, self.encoder, self.engine = folder, encoder, Engine.of(encoder)
        self._open: dict[str, FolderStore] = {}
        self._open_index = opener(index)
        self._writing = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)

    def names(self) -> list[str]:
        """Names of the collections, Python's documentation first; its copies for other engines are left out."""
        found = sorted(path.parent.name for path in self.folder.glob(f"*/{RECORD}"))
        found = [name for name in found if NAME.fullmatch(name)]  # not what is being written
        own = [name for name in found if not name.startswith(f"{PYTHON}.")]
        return ([PYTHON] if self._path(PYTHON).is_dir() else []) + own

    def open(self, name: str) -> FolderStore:
        """A collection.

        Raises:
            ConfigError: There is none of the name.
            BundleError: It is damaged.
        """
        path = self._path(name)
        if not (path / RECORD).is_file():
            raise ConfigError(f"there is no collection {name!r}; choose one of {', '.join(self.names()) or 'none'}")
        if name not in self._open or not self._open[name].is_current():  # another page may have written it
            self._open[name] = FolderStore(path, self._open_index)
        return self._open[name]

    def add_steps(self, name: str, passages: Sequence[Passage]) -> Iterator[tuple[int, int]]:
        """Embeds passages and adds them to a collection of the user's own, which is made where it is missing.

        Args:
            name: Letters, digits, spaces, dots and hyphens.
            passages: What to add.

        Yields:
            How many are embedded, and of how many; once more before they are written. Nothing is kept of what is not
            carried to its end.

        Raises:
            ConfigError: The name does not fit, or the collection is another engine's.
            InputError: There is nothing to add.
            BundleError: The collection is damaged.
        """
        if name.casefold().startswith(PYTHON.casefold()):
            raise ConfigError(f"{name!r} is kept for Python's own documentation; take another name")
        yield from self._add(name, passages)

    def _add(self, name: str, passages: Sequence[Passage]) -> Iterator[tuple[int, int]]:
        path = self._path(name)
        if not passages:
            raise InputError("there is no text in these files; bring others")
        self._writable(name)
        blocks = []
        for start in range(0, len(passages), BLOCK):
            yield start, len(passages)
            blocks.append(self.encoder.encode([passage.text for passage in passages[start : start + BLOCK]]))
        yield len(passages), len(passages)
        with self._alone():
            old = self._writable(name)  # another user may have added to it in the meantime
            if old is not None and name == PYTHON:
                return  # another page was first
            kept = [*old.passages] if old else []
            vectors = np.concatenate([old.vectors, *blocks] if old else blocks)
            whole = [*kept, *passages]
            try:
                self._open[name] = FolderStore.write(path, self.engine, whole, vectors, self._open_index)
            except DeployError:  # the index failed, behind the files
                self._open.pop(name, None)
                if old is None:
                    shutil.rmtree(path)
                else:
                    FolderStore.write(path, old.engine, old.passages, old.vectors)
                raise
            if old is not None:
                try:
                    old.drop_index()
                except DeployError as err:
                    _log.warning("the index of what %s was before stays: %s", name, err)

    def _writable(self, name: str) -> FolderStore | None:
        """The collection as it stands, None where there is none.

        Raises:
            ConfigError: It is another engine's.
        """
        if not (self._path(name) / RECORD).is_file():
            return None
        found = self.open(name)
        if found.engine != self.engine:
            raise ConfigError(
                f"collection {name!r} was made by {found.engine.model} {found.engine.precision} "
                f"({found.engine.manifest_sha256[:12]}); delete it, or add to another one"
            )
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else writes, be it a thread of this page or another page on the same folder."""
        with self._writing, (self.folder / LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def add_python(self, passages: Iterable[Passage] | None = None) -> FolderStore:
        """Python's documentation, as this engine sees it: indexed once with a progress bar, again if damaged."""
        if (self._path(PYTHON) / RECORD).is_file():
            try:
                return self.open(PYTHON)
            except BundleError:
                shutil.rmtree(self._path(PYTHON))
        found = list(library_passages() if passages is None else passages)
        with tqdm(total=len(found), desc=f"indexing {PYTHON}", unit="passage", disable=None) as bar:
            for done, _ in self._add(PYTHON, found):
                bar.update(done - bar.n)
        return self.open(PYTHON)

    def delete(self, name: str) -> None:
        """Removes a collection.

        Raises:
            ConfigError: There is none of the name, or it is Python's documentation.
        """
        if name == PYTHON:
            raise ConfigError("Python's documentation would be indexed again at the next start; it stays")
        path = self._path(name)
        with self._alone():  # not while somebody adds to it
            if not (path / RECORD).is_file():
                raise ConfigError(f"there is no collection {name!r}; it may have been deleted already")
            try:
                self.open(name).drop_index()
            except BundleError:
                pass  # damaged: that is why it goes
            except DeployError as err:
                _log.warning("%s is deleted, but what its index keeps elsewhere may stay: %s", name, err)
            shutil.rmtree(path)
            self._open.pop(name, None)

    def _path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is no name for a collection; take 1 to 40 letters, digits, spaces, dots and hyphens"
            )
        # What everyone has is indexed for each engine; what people bring is theirs, and refuses other engines.
        suffix = f".{self.engine.manifest_sha256[:16]}" if name == PYTHON else ""
        return self.folder / f"{name}{suffix}"
