"""Collections in a folder: Python's documentation, indexed at the first start, and documents that users add."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
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
"""Number of passages embedded in one step; adding can be cancelled between two steps."""

_log = logging.getLogger(__name__)


def default_folder() -> Path:
    """Returns the default folder of collections, in the user's data folder by the XDG rules."""
    folder = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not folder.is_absolute():  # relative ones are invalid, says the specification
        try:
            folder = Path.home() / ".local" / "share"
        except RuntimeError as err:
            raise ConfigError("this user has no home folder; pass --collections with a folder to keep them in") from err
    return folder / "nvembed-deploy" / "collections"


class Library:
    """Manages the collections of a folder by name.

    Args:
        folder: Folder of the collections; created if missing.
        encoder: Embeds added passages.
        index: Kind of index; see `index.opener`.

    Raises:
        ConfigError: The kind of index does not exist, or the folder cannot be created.
        MissingExtra: The index needs a package that is not installed.
    """

    def __init__(self, folder: Path, encoder: Encoder, *, index: str = EXACT) -> None:
        self.folder, self.encoder, self.engine = folder, encoder, Engine.of(encoder)
        self._open: dict[str, FolderStore] = {}
        self._open_index = opener(index)
        self._writing = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise ConfigError(
                f"the folder {folder} cannot be created ({err.strerror}); pass --collections with another one"
            ) from err
        remove_leftovers(folder)

    def names(self) -> list[str]:
        """Returns the names of the collections, Python's documentation first, without its copies for other engines."""
        names = sorted(path.parent.name for path in self.folder.glob(f"*/{RECORD}"))
        names = [name for name in names if NAME.fullmatch(name)]  # staging folders have other names
        user_names = [name for name in names if not name.startswith(f"{PYTHON}.")]
        return ([PYTHON] if self._path(PYTHON).is_dir() else []) + user_names

    def open(self, name: str) -> FolderStore:
        """Opens an existing collection, or returns the open one if it has not changed since.

        Raises:
            ConfigError: There is no collection with this name.
            BundleError: The collection is damaged.
        """
        path = self._path(name)
        if not (path / RECORD).is_file():
            raise ConfigError(f"there is no collection {name!r}; available: {', '.join(self.names()) or 'none'}")
        if name not in self._open or not self._open[name].is_current():  # another process may have changed it
            self._open[name] = FolderStore(path, self._open_index)
        return self._open[name]

    def add_steps(self, name: str, passages: Sequence[Passage]) -> Generator[tuple[int, int]]:
        """Embeds passages step by step and adds them to a user's collection, which is created if missing.

        Args:
            name: Name of the collection: letters, digits, spaces, dots and hyphens.
            passages: Passages to add.

        Yields:
            The number of embedded passages and the total, once more before they are written. Nothing is added unless
            the iterator is exhausted.

        Raises:
            ConfigError: The name is not valid, or the collection was made by another engine.
            InputError: There are no passages.
            BundleError: The collection is damaged.
        """
        if name.casefold().startswith(PYTHON.casefold()):
            raise ConfigError(f"{name!r} is reserved for Python's documentation; choose another name")
        yield from self._add(name, passages)

    def _add(self, name: str, passages: Sequence[Passage]) -> Iterator[tuple[int, int]]:
        path = self._path(name)
        if not passages:
            raise InputError("no text was found in these files; choose other files")
        self._existing_collection(name)  # fails early if it was made by another engine
        blocks = []
        for start in range(0, len(passages), BLOCK):
            yield start, len(passages)
            blocks.append(self.encoder.encode([passage.text for passage in passages[start : start + BLOCK]]))
        yield len(passages), len(passages)
        with self._write_lock():
            old = self._existing_collection(name)  # another user may have changed it in the meantime
            if old is not None and name == PYTHON:
                return  # another process has indexed it
            all_passages = [*old.passages, *passages] if old else [*passages]
            vectors = np.concatenate([old.vectors, *blocks] if old else blocks)
            try:
                self._open[name] = FolderStore.write(path, self.engine, all_passages, vectors, self._open_index)
            except DeployError:  # the index failed after the files were written
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
                    _log.warning("the previous index of %s could not be removed: %s", name, err)

    def _existing_collection(self, name: str) -> FolderStore | None:
        """Returns the collection that passages will be added to, or None if it does not exist.

        Raises:
            ConfigError: The collection was made by another engine.
        """
        if not (self._path(name) / RECORD).is_file():
            return None
        store = self.open(name)
        if store.engine != self.engine:
            raise ConfigError(
                f"collection {name!r} was made by {store.engine.model} {store.engine.precision} "
                f"({store.engine.manifest_sha256[:12]}); delete it, or add to another collection"
            )
        return store

    @contextmanager
    def _write_lock(self) -> Iterator[None]:
        """Locks the folder against writers in other threads and other processes."""
        with self._writing, (self.folder / LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def add_python(self, passages: Iterable[Passage] | None = None) -> FolderStore:
        """Opens Python's documentation for this engine; indexes it if missing or damaged, with a progress bar."""
        if (self._path(PYTHON) / RECORD).is_file():
            try:
                return self.open(PYTHON)
            except BundleError:
                shutil.rmtree(self._path(PYTHON))
        python_passages = list(library_passages() if passages is None else passages)
        description = f"indexing {PYTHON}"
        with tqdm(total=len(python_passages), desc=description, unit="passage", disable=None) as progress_bar:
            for done, _ in self._add(PYTHON, python_passages):
                progress_bar.update(done - progress_bar.n)
        return self.open(PYTHON)

    def delete(self, name: str) -> None:
        """Deletes a collection.

        Raises:
            ConfigError: There is no collection with this name, or it is Python's documentation.
        """
        if name == PYTHON:
            raise ConfigError("Python's documentation cannot be deleted: it would be indexed again at the next start")
        path = self._path(name)
        with self._write_lock():  # not while another process adds to it
            if not (path / RECORD).is_file():
                raise ConfigError(f"there is no collection {name!r}; it may have been deleted already")
            try:
                self.open(name).drop_index()
            except BundleError:
                pass  # a damaged collection can be deleted
            except DeployError as err:
                _log.warning("%s is deleted, but its index outside the folder may remain: %s", name, err)
            shutil.rmtree(path)
            self._open.pop(name, None)

    def _path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is not a valid collection name; use 1 to 40 letters, digits, spaces, dots and hyphens"
            )
        # Python's documentation is indexed for each engine; a user's collection belongs to one engine.
        suffix = f".{self.engine.manifest_sha256[:16]}" if name == PYTHON else ""
        return self.folder / f"{name}{suffix}"
