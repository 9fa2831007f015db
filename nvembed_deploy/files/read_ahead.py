"""Two readers of one checkpoint that stay near each other, so that a disk gives each byte once.

One hashes the files, the other takes their tensors. On its own the first would be at the end of a large checkpoint
before the second begins, and the system would have dropped from memory what it read.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from nvembed_deploy.system import available_memory_bytes

MEMORY_SHARE = 3
"""The first may be ahead by this part of the free memory: what it read must still be there when the second comes."""
LEAST_AHEAD = 2**29


class Pace:
    """How far the second reader is, and how far the first may be.

    Args:
        paths: The files that both read, in their order.
        ahead: Bytes that the first may be ahead; by default a third of the memory that is free.
    """

    def __init__(self, paths: Sequence[Path], *, ahead: int | None = None) -> None:
        self.ahead = max(LEAST_AHEAD, (available_memory_bytes() or 0) // MEMORY_SHARE) if ahead is None else ahead
        self._starts: dict[Path, int] = {}
        end = 0
        for path in paths:
            self._starts[path] = end
            end += path.stat().st_size
        self._reached = 0
        self._released = False
        self._changed = threading.Condition()

    def wait(self, path: Path, offset: int) -> None:
        """Called by the first reader before it reads on: returns when it may. Files that were not named never wait."""
        if path not in self._starts:
            return
        place = self._starts[path] + offset
        with self._changed:
            self._changed.wait_for(lambda: self._released or place <= self._reached + self.ahead)

    def reached(self, path: Path, offset: int) -> None:
        """Called by the second reader, which has read so far."""
        with self._changed:
            self._reached = max(self._reached, self._starts.get(path, 0) + offset)
            self._changed.notify_all()

    def __enter__(self) -> Pace:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Nobody waits from now on: the second reader is done, or was never to come."""
        with self._changed:
            self._released = True
            self._changed.notify_all()
