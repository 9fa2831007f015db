"""Keeps two readers of one checkpoint close to each other, so that each byte is read from disk once.

The first reader hashes the files, the second reads their tensors. Unthrottled, the first would reach the end of a large
checkpoint before the second begins, and the system would have dropped the first reader's pages from its cache by then.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from nvembed_deploy.system import available_memory_bytes

MEMORY_DIVISOR = 3
"""The first reader may be ahead by a third of the free memory: its pages must still be cached for the second."""
MIN_READ_AHEAD_BYTES = 2**29


class ReadAhead:
    """Limits how far the first reader may be ahead of the second.

    Args:
        paths: The files that both readers read, in order.
        max_ahead_bytes: Bytes that the first reader may be ahead; by default a third of the free memory.
    """

    def __init__(self, paths: Sequence[Path], *, max_ahead_bytes: int | None = None) -> None:
        if max_ahead_bytes is None:
            max_ahead_bytes = max(MIN_READ_AHEAD_BYTES, (available_memory_bytes() or 0) // MEMORY_DIVISOR)
        self.max_ahead_bytes = max_ahead_bytes
        self._starts: dict[Path, int] = {}
        end = 0
        for path in paths:
            self._starts[path] = end
            end += path.stat().st_size
        self._reached = 0
        self._released = False
        self._changed = threading.Condition()

    def wait(self, path: Path, offset: int) -> None:
        """Blocks the first reader until it may read at `offset`; files that are not in `paths` never wait."""
        if path not in self._starts:
            return
        position = self._starts[path] + offset
        with self._changed:
            self._changed.wait_for(lambda: self._released or position <= self._reached + self.max_ahead_bytes)

    def reached(self, path: Path, offset: int) -> None:
        """Records how far the second reader has read."""
        with self._changed:
            self._reached = max(self._reached, self._starts.get(path, 0) + offset)
            self._changed.notify_all()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Stops all waiting: the second reader has finished, or there is no second reader."""
        with self._changed:
            self._released = True
            self._changed.notify_all()
