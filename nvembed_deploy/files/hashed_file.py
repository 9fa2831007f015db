"""Large files written once: hashed on the way, and past the page cache where that is of no use."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path

from nvembed_deploy.files.hashing import FileEntry

_BLOCKS_WAITING = 2
_DIRECT_BYTES = 8 * 2**20


class HashedFile:
    """A new file, written and hashed behind the caller's back, each on a thread of its own.

    Args:
        path: Must not exist.
        direct: Write past the system's page cache where the file system can; see `DirectWriter`.
    """

    def __init__(self, path: Path, *, direct: bool = False) -> None:
        self.path = path
        self.size = 0
        self._wants_direct = direct
        self._direct: DirectWriter | None = None
        self._digest = hashlib.sha256()
        self._hashing, self._writing = (ThreadPoolExecutor(max_workers=1) for _ in range(2))
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> HashedFile:
        self._file = self.path.open("xb", buffering=0)
        if self._wants_direct and set_direct(self._file, True):
            self._direct = DirectWriter(self._file)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.drain()  # a full disk is told here
                if self._direct is not None:
                    self._direct.finish()
        finally:
            self._hashing.shutdown(cancel_futures=True)
            self._writing.shutdown(cancel_futures=True)
            self._file.close()

    def write(self, content: bytes | memoryview) -> None:
        """Appends; the content must stay as it is until `drain`. A failure may be raised by a later call."""
        while len(self._waiting) >= 2 * _BLOCKS_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._hashing.submit(self._digest.update, content))
        self._waiting.append(self._writing.submit(self._write_all, content))
        self.size += len(content)

    def drain(self) -> None:
        """Returns once all is hashed and written."""
        while self._waiting:
            self._waiting.popleft().result()

    def _write_all(self, content: bytes | memoryview) -> None:
        if self._direct is not None:
            self._direct.write(content)
            return
        rest = memoryview(content)
        while len(rest):
            rest = rest[self._file.write(rest) :]

    def entry(self) -> FileEntry:
        """Size and hash, once it is closed."""
        return FileEntry(bytes=self.size, sha256=self._digest.hexdigest())


class DirectWriter:
    """Writes whole pages past the system's page cache.

    A file larger than that cache gains nothing from it, and pays for each page: on a virtual machine, `cp` of 15 GB
    spent 24 to 45 s in the system at 0.3 to 0.5 GB/s, and direct writes reached 2.3.

    Args:
        file: One that `set_direct` has set.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._pages = mmap.mmap(-1, _DIRECT_BYTES)  # such writes begin and end on pages, in memory as in the file
        self._filled = 0

    def write(self, content: bytes | memoryview) -> None:
        """Appends; what fills no block waits for more."""
        rest = memoryview(content)
        while len(rest):
            part = rest[: _DIRECT_BYTES - self._filled]
            self._pages[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rest = rest[len(part) :]
            if self._filled == _DIRECT_BYTES:
                self._flush()

    def finish(self) -> None:
        """Writes what is left, which may end anywhere."""
        set_direct(self._file, False)
        self._flush()
        self._pages.close()

    def _flush(self) -> None:
        done = 0
        with memoryview(self._pages) as pages:
            while done < self._filled:
                done += self._file.write(pages[done : self._filled])
                if done % mmap.PAGESIZE:  # a full disk ends anywhere, and tells at the next write
                    set_direct(self._file, False)
        self._filled = 0


def set_direct(file: FileIO, on: bool) -> bool:
    """Has writes to a file pass the page cache, or not; False where its file system or this system knows no such."""
    flag = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(file, fcntl.F_GETFL) & ~flag
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | (flag if on else 0))
    except OSError:
        return False
    return bool(flag)
