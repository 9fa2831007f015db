"""Atomic writes of folders and files: written next to the destination, then moved into place by one rename.

Order of calls: write and fsync each file, fsync the folder, rename, fsync the parent. An existing destination is
exchanged with the new folder in one system call (Linux, renameat2), so that no reader ever finds it missing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

RENAME_EXCHANGE = 2
AT_FDCWD = -100
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_NO_FOLDER_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_log = logging.getLogger(__name__)


@contextmanager
def staged_folder(destination: Path) -> Iterator[Path]:
    """Yields an empty folder next to `destination`, and removes it on exit unless `move_into_place` has moved it.

    Leftovers of killed runs are removed first. A folder that another process is still writing is locked and stays.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    if _previous_path(destination).exists() and not destination.exists():
        os.rename(_previous_path(destination), destination)  # a run was killed between the two renames of `exchange`
    remove_leftovers(destination.parent, destination.name)
    prefix = f".{destination.name}.staging-"
    with _names_in_errors(destination):
        folder, lock = _new_locked_folder(prefix, destination.parent)
    try:
        folder.chmod(stat.S_IMODE(folder.stat().st_mode) & stat.S_ISGID | 0o777 & ~_umask())
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_leftovers(parent: Path, name: str | None = None) -> None:
    """Removes the staging folders that killed runs of `staged_folder` left behind.

    Args:
        parent: The folder to clean up.
        name: Name of a destination; only its leftovers are removed. None removes those of every destination.
    """
    for leftover in parent.glob(f".{'*' if name is None else glob.escape(name)}.staging-*"):
        _remove_if_abandoned(leftover)


def move_into_place(folder: Path, destination: Path) -> None:
    """Moves `folder` to `destination`; a previous destination is left under the old name of `folder`.

    Raises:
        OSError: The file system refuses the rename; the destination is unchanged.
    """
    for path in sorted(folder.rglob("*")):
        fsync(path)
    fsync(folder)
    while True:
        try:
            os.rename(folder, destination)
            break
        except OSError as err:
            if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            exchange(folder, destination)
            break
        except FileNotFoundError:
            continue  # the destination was removed in between, so a plain rename works again
    fsync(destination.parent)


def exchange(new: Path, current: Path) -> None:
    """Swaps two paths in one step; where the file system cannot, the current path is moved aside first.

    Raises:
        OSError: Neither method worked.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        paths = (AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(current), RENAME_EXCHANGE)
        if libc.renameat2(*paths) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NO_EXCHANGE:
            raise OSError(code, os.strerror(code), str(current))
    previous = _previous_path(current)
    shutil.rmtree(previous, ignore_errors=True)
    os.rename(current, previous)
    try:
        os.rename(new, current)
    except OSError:
        os.rename(previous, current)
        raise
    os.rename(previous, new)


def _previous_path(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.previous")


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Writes a file atomically: readers see either the old content or the new."""
    with staged_file(path) as file:
        file.write(content)


@contextmanager
def staged_file(destination: Path) -> Iterator[BinaryIO]:
    """Yields a file that replaces `destination` on exit, unless an exception is raised.

    Its folder is created if missing. Leftovers of killed runs are removed first. A file that another process is still
    writing is locked and stays.

    Raises:
        OSError: The file cannot be created; the error names the destination.
    """
    if destination.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(destination))
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.part-"
    for leftover in destination.parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError), leftover.open("rb") as abandoned:
            _lock(abandoned.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()
    with _names_in_errors(destination):
        temporary, file = _new_locked_file(prefix, destination.parent)
    try:
        with file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
            temporary.replace(destination)
        fsync(destination.parent)
    finally:
        temporary.unlink(missing_ok=True)


def free_bytes(path: Path) -> int:
    """Returns the free bytes of the disk that holds a path, or that will hold it."""
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(folder).free


def fsync(path: Path) -> None:
    """Flushes a file or a folder to the disk.

    Some file systems (shared folders of virtual machines, old network ones) know no flush of a folder: they are left to
    write it when they do, since the alternative is to fail behind hours of work.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as err:
        if not (path.is_dir() and err.errno in _NO_FOLDER_FLUSH):
            raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int, operation: int) -> None:
    """Locks a file or a folder where the file system knows locks; elsewhere a warning says that two runs may collide.

    Raises:
        OSError: Another process holds the lock.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as err:
        if err.errno not in _NO_LOCKS:
            raise
        if operation & fcntl.LOCK_NB:
            raise  # nobody knows whether it is abandoned, so it stays
        _log.warning("this file system has no locks (%s): do not run two exports to one folder", err.strerror)


def _umask() -> int:
    """Returns the process's mask of permissions, without changing it for a moment where Linux tells it."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextmanager
def _names_in_errors(destination: Path) -> Iterator[None]:
    """Lets errors name the destination, which the user knows, instead of the temporary name beside it."""
    try:
        yield
    except OSError as err:
        raise OSError(err.errno, err.strerror, str(destination)) from err


def _new_locked_folder(prefix: str, parent: Path) -> tuple[Path, int]:
    """Creates a folder and returns it with a descriptor that holds its lock.

    Until the lock is taken, another run may mistake the folder for a leftover and remove it; then a new one is made.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            _lock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _new_locked_file(prefix: str, parent: Path) -> tuple[Path, BinaryIO]:
    """Creates a file and returns it locked; see `_new_locked_folder`."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=prefix, dir=parent)
        file = os.fdopen(descriptor, "wb")
        _lock(file.fileno(), fcntl.LOCK_EX)
        if Path(name).exists():
            return Path(name), file
        file.close()


def _remove_if_abandoned(folder: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
