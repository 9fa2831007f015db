"""Collections in a folder: Python's documentation, indexed at the first start, and documents that users add."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nvembed_deploy import BundleError, ConfigError, DeployError, Encoder, InputError
from nvembed_deploy.app.index import EXACT, ExactIndex, Vectors, opener
from nvembed_deploy.app.passages import Passage, library_passages
from nvembed_deploy.app.store import RECORD, Engine, FolderStore, StoredFile, read_record
from nvembed_deploy.files.atomic import move_into_place, remove_leftovers

PYTHON = "Python documentation"
NAME = re.compile(r"\w[\w .-]{0,39}")
LOCK = ".lock"
FIRST_BLOCK, MAX_BLOCK = 16, 256
"""Passages that are embedded in the first step, and at most in one; adding can be cancelled between two steps."""
BLOCK_SECONDS = 0.25
"""Intended time of a step: a search that arrives meanwhile may have to wait for its end."""
COMMIT_SECONDS = 2.0
"""Seconds after which embedded passages are stored and can be searched; a killed run loses as much."""

_log = logging.getLogger(__name__)


class BusyError(ConfigError):
    """Another thread or process is changing the collection."""


@dataclass(frozen=True, kw_only=True)
class CollectionState:
    """What can be said of a collection without opening it."""

    name: str
    rows: int
    identity: str
    engine: str
    """Model and precision that made its vectors."""
    is_usable: bool
    """Whether that is the engine of this library, and the collection is not damaged."""
    is_damaged: bool = False
    is_complete: bool


def next_block(texts: int, seconds: float) -> int:
    """Returns the number of passages of the next step, given the time that the last one took."""
    return max(FIRST_BLOCK, min(MAX_BLOCK, 2 * texts, round(texts * BLOCK_SECONDS / max(seconds, 1e-3))))


def stored_file(name: str, passages: Sequence[Passage]) -> StoredFile:
    """Returns the record of passages that are no file, with the hash of their texts."""
    content = "\0".join(passage.embedded_text for passage in passages).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    return StoredFile(name=name, bytes=len(content), sha256=sha256, passages=len(passages), rows=0)


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
        self._opened: dict[str, FolderStore] = {}
        self._index_kind, self._open_index = index, opener(index)
        self._opening = threading.Lock()
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

    def states(self) -> list[CollectionState]:
        """Returns the state of each collection, in the order of `names`."""
        return [self._state(name) for name in self.names()]

    def _state(self, name: str) -> CollectionState:
        try:
            record = read_record(self._path(name))
        except (OSError, ValueError, KeyError, TypeError):
            return CollectionState(
                name=name, rows=0, identity="", engine="", is_usable=False, is_complete=False, is_damaged=True
            )
        return CollectionState(
            name=name,
            rows=record.rows,
            identity=record.identity,
            engine=f"{record.model} {record.precision}",
            is_usable=record.engine == self.engine,
            is_complete=all(entry.rows == entry.passages for entry in record.files),
        )

    def open(self, name: str) -> FolderStore:
        """Opens an existing collection, or returns the open one if it has not changed since.

        Raises:
            ConfigError: There is no collection with this name.
            BundleError: The collection is damaged.
        """
        path = self._path(name)
        if not (path / RECORD).is_file():
            raise ConfigError(f"there is no collection {name!r}; available: {', '.join(self.names()) or 'none'}")
        with self._opening:
            store = self._opened.get(name)
            if store is None or not store.is_current():  # another process may have changed it
                # While files are added, it is searched exactly: an index is built once, when they are complete.
                open_index = self._open_index if self.is_indexed(name) else ExactIndex
                store = self._opened[name] = FolderStore(path, open_index, previous=store)
            return store

    def add_steps(
        self, name: str, passages: Sequence[Passage], file: StoredFile | None = None
    ) -> Generator[tuple[int, int]]:
        """Embeds the passages of a file step by step and adds them to a collection, which is created if missing.

        They can be searched as they are added. Where a killed run has stopped, the next one for the same file goes on.
        A file of the same name is replaced.

        Args:
            name: Name of the collection: letters, digits, spaces, dots and hyphens.
            passages: Passages to add.
            file: The file they come from; None for one that is named after the source of the first passage.

        Yields:
            The number of embedded passages and the total. A closed iterator leaves nothing of the file.

        Raises:
            ConfigError: The name is not valid, or the collection was made by another engine.
            InputError: There are no passages.
            BundleError: The collection is damaged.
        """
        self.check_user_name(name)
        if not passages:
            raise InputError("no text was found in these files; choose other files")
        with self._lock(name):
            try:
                yield from self._add(name, passages, file or stored_file(passages[0].source, passages))
            except GeneratorExit:
                if (store := self._existing_collection(name)) is not None:
                    self._without_unfinished(store)
                    self._opened.pop(name, None)
                raise
            finally:
                self._removed_if_empty(name)

    def check_user_name(self, name: str) -> None:
        """Checks the name of a collection that a user adds to.

        Raises:
            ConfigError: The name is not valid, or is that of Python's documentation.
        """
        if name.casefold().startswith(PYTHON.casefold()):
            raise ConfigError(f"{name!r} is reserved for Python's documentation; choose another name")
        self._path(name)

    def files(self, name: str) -> tuple[StoredFile, ...]:
        """Returns the files of a collection; none if it does not exist or cannot be read."""
        try:
            return read_record(self._path(name)).files
        except (OSError, ValueError, KeyError, TypeError):
            return ()

    def _add(self, name: str, passages: Sequence[Passage], file: StoredFile) -> Generator[tuple[int, int]]:
        """Adds the passages of a file; the caller holds the collection's lock."""
        store = self._existing_collection(name)
        there = {(entry.name, entry.sha256, entry.rows) for entry in store.record.files} if store else set()
        if (file.name, file.sha256, len(passages)) in there:
            yield len(passages), len(passages)
            return
        if store is not None and self._index_kind != EXACT:  # an index that cannot be opened is a reason to stop now
            self._drop_index(name, self.open(name))
            self._opened.pop(name)
        if store is None:
            no_rows = np.zeros((0, self.engine.dimension), np.float32)
            store = FolderStore.write(self._path(name), self.engine, [], no_rows)
        files = list(store.record.files)
        unfinished = next((entry for entry in files if entry.rows < entry.passages), None)
        is_same = unfinished is not None and (unfinished.sha256, unfinished.name) == (file.sha256, file.name)
        if not is_same or unfinished is None or unfinished.passages != len(passages):
            store = self._without_unfinished(store)
            if store.file_rows(file.name) is not None:
                store = self._without_file(store, file.name)
            files = [*store.record.files, replace(file, rows=0, passages=len(passages))]

        def commit(block: list[Passage], vectors: Vectors) -> None:
            nonlocal store
            assert store is not None
            files[-1] = replace(files[-1], rows=files[-1].rows + len(block))
            store = self._opened[name] = store.append(block, vectors, files)

        yield from self._embed(passages, files[-1].rows, commit)
        self._opened.pop(name, None)
        if self._index_kind != EXACT:
            self.open(name)  # builds the index now, and not at the first search
        yield len(passages), len(passages)

    def _embed(
        self, passages: Sequence[Passage], done: int, commit: Callable[[list[Passage], Vectors], None]
    ) -> Generator[tuple[int, int]]:
        """Embeds the passages behind those that are done, and commits some every few seconds; yields as `add_steps`."""
        step = FIRST_BLOCK
        while done < len(passages):
            yield done, len(passages)
            block: list[Passage] = []
            vectors = []
            commit_at = time.monotonic() + COMMIT_SECONDS
            while done + len(block) < len(passages) and (not block or time.monotonic() < commit_at):
                texts = passages[done + len(block) : done + len(block) + step]
                started = time.monotonic()
                vectors.append(self.encoder.encode([passage.embedded_text for passage in texts]))
                step = next_block(len(texts), time.monotonic() - started)
                block += texts
                if done + len(block) < len(passages):
                    yield done + len(block), len(passages)
            done += len(block)
            commit(block, np.concatenate(vectors))

    def index_again_steps(self, name: str) -> Generator[tuple[int, int]]:
        """Embeds the passages of a collection that another engine has made, step by step; see `add_steps`.

        The collection stays as it is until its new vectors are complete. A killed run leaves those that it has made,
        with which the next one goes on; a closed iterator leaves none.

        Raises:
            ConfigError: There is no collection with this name, or it is being added to.
            BundleError: The collection is damaged.
        """
        path, staging = self._path(name), self._staging(name)
        with self._lock(name):
            if not (path / RECORD).is_file():
                raise ConfigError(f"there is no collection {name!r}; it may have been deleted already")
            old = FolderStore(path)
            if old.engine == self.engine:
                yield len(old), len(old)
                return
            new = self._staged(staging, old)

            def commit(block: list[Passage], vectors: Vectors) -> None:
                nonlocal new
                is_last = len(new) + len(block) == len(old)
                new = new.append(block, vectors, old.record.files if is_last else ())

            try:
                yield from self._embed(old.passages, len(new), commit)
            except GeneratorExit:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            with suppress(DeployError):  # the index belongs to the other engine, and may be out of reach
                self._drop_index(name, self.open(name))
            move_into_place(staging, path)
            shutil.rmtree(staging, ignore_errors=True)  # now the old one
            self._opened.pop(name, None)
            if self._index_kind != EXACT:
                self.open(name)
            yield len(old), len(old)

    def _staging(self, name: str) -> Path:
        """Returns the folder in which a collection is indexed again; its name is that of no collection."""
        return self.folder / f".{name}.{self.engine.manifest_sha256[:16]}.again"

    def _staged(self, staging: Path, old: FolderStore) -> FolderStore:
        """Opens what a killed run has left of a collection's new vectors, or begins anew."""
        with suppress(BundleError):
            new = FolderStore(staging)
            if new.engine == self.engine and len(new) < len(old) and new.passages == old.passages[: len(new)]:
                return new
        shutil.rmtree(staging, ignore_errors=True)
        return FolderStore.write(staging, self.engine, [], np.zeros((0, self.engine.dimension), np.float32))

    def _without_unfinished(self, store: FolderStore) -> FolderStore:
        """Removes what an interrupted run has left of a file; it is always the last one."""
        files = [entry for entry in store.record.files if entry.rows == entry.passages]
        if len(files) == len(store.record.files):
            return store
        rows = len(store) - sum(entry.rows for entry in store.record.files if entry.rows < entry.passages)
        return store.truncate(rows, files)

    def _without_file(self, store: FolderStore, name: str) -> FolderStore:
        """Writes a collection again without one of its files."""
        removed = store.file_rows(name) or range(0)
        rows = [row for row in range(len(store)) if row not in removed]
        return FolderStore.write(
            store.folder,
            store.engine,
            [store.passages[row] for row in rows],
            np.asarray(store.vectors[rows]),
            files=[entry for entry in store.record.files if entry.name != name],
        )

    def _existing_collection(self, name: str) -> FolderStore | None:
        """Returns the collection that passages will be added to, or None if it does not exist.

        Raises:
            ConfigError: The collection was made by another engine.
        """
        if not (self._path(name) / RECORD).is_file():
            return None
        store = FolderStore(self._path(name), previous=self._opened.get(name))
        if store.engine != self.engine:
            raise ConfigError(
                f"collection {name!r} was made by {store.engine.model} {store.engine.precision} "
                f"({store.engine.manifest_sha256[:12]}); index it again with this engine, or add to another collection"
            )
        return store

    def _removed_if_empty(self, name: str) -> None:
        """Removes a collection without passages, which a stopped or failed run has created."""
        with suppress(OSError, ValueError):
            if read_record(self._path(name)).rows == 0:
                self._opened.pop(name, None)
                shutil.rmtree(self._path(name))

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Locks a collection against writers in other threads and other processes.

        Raises:
            ConfigError: Another writer holds the lock.
        """
        with (self.folder / f".{self._path(name).name}{LOCK}").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                raise BusyError(f"{name!r} is being added to or deleted; wait until that is done") from err
            yield

    def is_indexed(self, name: str) -> bool:
        """Returns whether a collection has passages and no run that added to it was interrupted."""
        try:
            record = read_record(self._path(name))
            return record.rows > 0 and all(entry.rows == entry.passages for entry in record.files)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def add_python_steps(self, passages: Iterable[Passage] | None = None) -> Generator[tuple[int, int]]:
        """Indexes Python's documentation for this engine if missing, incomplete or damaged; see `add_steps`.

        A stopped run keeps what it has added, and the next one goes on from there.
        """
        if self.is_indexed(PYTHON):
            try:
                self.open(PYTHON)
                return
            except BundleError:
                shutil.rmtree(self._path(PYTHON))
        with self._lock(PYTHON):
            python_passages = list(library_passages() if passages is None else passages)
            try:
                self._existing_collection(PYTHON)
            except BundleError:
                shutil.rmtree(self._path(PYTHON))
            yield from self._add(PYTHON, python_passages, stored_file(PYTHON, python_passages))

    def add_python(self, passages: Iterable[Passage] | None = None) -> FolderStore:
        """Opens Python's documentation for this engine, and first indexes it if needed, with a progress bar."""
        with tqdm(desc=f"indexing {PYTHON}", unit="passage", disable=None) as progress_bar:
            for done, total in self.add_python_steps(passages):
                progress_bar.total = total
                progress_bar.update(done - progress_bar.n)
        return self.open(PYTHON)

    def delete_file(self, name: str, file: str) -> None:
        """Removes a file and its passages from a collection, and the collection with its last file.

        Raises:
            ConfigError: There is no such collection or file, it is Python's documentation, or it is being added to.
        """
        if name == PYTHON:
            raise ConfigError("Python's documentation is one whole; nothing of it can be removed")
        with self._lock(name):
            store = self.open(name)
            if store.file_rows(file) is None:
                raise ConfigError(f"there is no file {file!r} in {name!r}; it may have been removed already")
            self._without_file(store, file)
            self._drop_index(name, store)
            self._opened.pop(name, None)
            self._removed_if_empty(name)

    def _drop_index(self, name: str, store: FolderStore) -> None:
        """Removes the index of a collection's previous state, or warns that it may remain."""
        try:
            store.drop_index()
        except DeployError as err:
            _log.warning("%s has changed, but its previous index outside the folder may remain: %s", name, err)

    def delete(self, name: str) -> None:
        """Deletes a collection.

        Raises:
            ConfigError: There is no collection with this name, or it is Python's documentation.
        """
        if name == PYTHON:
            raise ConfigError("Python's documentation cannot be deleted: it would be indexed again at the next start")
        path = self._path(name)
        with self._lock(name):  # not while another process adds to it
            if not (path / RECORD).is_file():
                raise ConfigError(f"there is no collection {name!r}; it may have been deleted already")
            try:
                self._drop_index(name, self.open(name))
            except DeployError:
                pass  # a damaged collection, or one without its index, can be deleted
            shutil.rmtree(path)
            shutil.rmtree(self._staging(name), ignore_errors=True)
            self._opened.pop(name, None)

    def _path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is not a valid collection name; use 1 to 40 letters, digits, spaces, dots and hyphens"
            )
        # Python's documentation is indexed for each engine; a user's collection belongs to one engine.
        suffix = f".{self.engine.manifest_sha256[:16]}" if name == PYTHON else ""
        return self.folder / f"{name}{suffix}"
