"""Folders and files that appear whole or not at all: written beside the destination, then switched in by one rename.

Order of calls: write and fsync each file, fsync the folder, rename, fsync the parent. An existing destination is
exchanged with the new folder in one system call (Linux, renameat2), so that no reader ever finds it missing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

RENAME_EXCHANGE = 2
AT_FDCWD = -100
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@contextmanager
def staged_folder(destination: Path) -> Iterator[Path]:
    """An empty folder beside `destination`, removed on the way out unless `switch_in` has taken it.

    Leftovers of killed runs are removed first; a folder that another process still writes is locked and stays.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    if _aside(destination).exists() and not destination.exists():
        os.rename(_aside(destination), destination)  # a run was killed between the two renames of `exchange`
    remove_leftovers(destination.parent, destination.name)
    prefix = f".{destination.name}.staging-"
    folder, lock = _new_locked_folder(prefix, destination.parent)
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_leftovers(parent: Path, name: str | None = None) -> None:
    """Removes what killed runs of `staged_folder` left in a folder.

    Args:
        parent: The folder.
        name: Only of this destination.
    """
    for leftover in parent.glob(f".{'*' if name is None else glob.escape(name)}.staging-*"):
        _remove_if_abandoned(leftover)


def switch_in(folder: Path, destination: Path) -> None:
    """Makes `folder` the destination; what stood there is left under the folder's old name.

    Raises:
        OSError: The file system refuses; the destination is as it was.
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
            continue  # the destination went away in between: a plain rename fits again
    fsync(destination.parent)


def exchange(first: Path, second: Path) -> None:
    """Swaps two paths in one step; on file systems without that, moves the second aside first.

    Raises:
        OSError: Neither way worked.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        paths = (AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE)
        if libc.renameat2(*paths) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NO_EXCHANGE:
            raise OSError(code, os.strerror(code), str(second))
    aside = _aside(second)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(second, aside)
    try:
        os.rename(first, second)
    except OSError:
        os.rename(aside, second)
        raise
    os.rename(aside, first)


def _aside(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.previous")


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Writes a file of a folder that exists: readers see the old content or the new."""
    with staged_file(path) as file:
        file.write(content)


@contextmanager
def staged_file(destination: Path) -> Iterator[BinaryIO]:
    """A file that becomes `destination` on the way out, unless an exception goes through.

    Leftovers of killed runs are removed first; a file that another process still writes is locked and stays.
    """
    prefix = f".{destination.name}.part-"
    for leftover in destination.parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError), leftover.open("rb") as abandoned:
            fcntl.flock(abandoned, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()
    temporary, file = _new_locked_file(prefix, destination.parent)
    try:
        with file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
            temporary.replace(destination)
        fsync(destination.parent)
    finally:
        temporary.unlink(missing_ok=True)


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that a path is on, or will be."""
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(folder).free


def fsync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _new_locked_folder(prefix: str, parent: Path) -> tuple[Path, int]:
    """A new folder and a handle that locks it; until it is locked, another run may take it for a leftover."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _new_locked_file(prefix: str, parent: Path) -> tuple[Path, BinaryIO]:
    """A new file, locked by its handle; until it is, another run may take it for a leftover."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=prefix, dir=parent)
        file = os.fdopen(descriptor, "wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if Path(name).exists():
            return Path(name), file
        file.close()


def _remove_if_abandoned(folder: Path) -> None:
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)
