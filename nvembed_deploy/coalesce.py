"""Many small calls, few large batches: requests that arrive while a batch runs are embedded together in the next one.

No timer: a lone request runs at once, and the busier the engine, the larger its batches.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.encoder import DEFAULT_BATCH_TOKENS, Encoder
from nvembed_deploy.errors import ConfigError, DeployError, OverloadedError
from nvembed_deploy.text import TokenRow

Vectors = NDArray[np.float32]
DEFAULT_MAX_WAITING = 1024
"""Texts that may wait. At a hundred texts a second the last of them waits ten seconds, which is what clients bear."""
DEFAULT_GROUP_TOKENS = 2 * DEFAULT_BATCH_TOKENS
"""Tokens that run together: enough to sort texts by length, few enough that the first answer does not wait long."""


@dataclass(frozen=True, kw_only=True)
class _Request:
    rows: Sequence[TokenRow]
    dimensions: int | None
    future: Future[Vectors] = field(default_factory=Future)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))


class Coalescer:
    """Lets threads and coroutines share an encoder's batches.

    Args:
        encoder: Whose `tokenize` makes the rows.
        max_waiting: Most texts that wait; more are refused at once, one text or many alike.
        group_tokens: Most tokens that run together; a larger request runs alone.

    Example:
        >>> with Coalescer(encoder) as coalescer:
        ...     vectors = coalescer.submit(encoder.tokenize(["a text"])).result()
        ...     vectors = await asyncio.wrap_future(coalescer.submit(encoder.tokenize(["a text"])))
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        max_waiting: int = DEFAULT_MAX_WAITING,
        group_tokens: int = DEFAULT_GROUP_TOKENS,
    ) -> None:
        if max_waiting < 1 or group_tokens < 1:
            raise ConfigError(f"max_waiting is {max_waiting} and group_tokens {group_tokens}; pass at least 1")
        self.encoder = encoder
        self.max_waiting = max_waiting
        self._group_tokens = group_tokens
        self._waiting: deque[_Request] = deque()
        self._waiting_texts = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="nvembed-coalescer", daemon=True)
        self._thread.start()

    @property
    def waiting_texts(self) -> int:
        """Texts that wait for the engine."""
        return self._waiting_texts

    def submit(self, rows: Sequence[TokenRow], *, dimensions: int | None = None) -> Future[Vectors]:
        """Queues a request; a cancelled future frees its place without being run.

        Args:
            rows: What `encoder.tokenize` gave.
            dimensions: As of `Encoder.encode`.

        Returns:
            A future of float32 [N, D]; its errors are those of `Encoder.encode_rows`.

        Raises:
            OverloadedError: `max_waiting` texts wait already, or the coalescer is closed.
        """
        request = _Request(rows=rows, dimensions=dimensions)
        with self._changed:
            if self._closed:
                raise OverloadedError("the engine is shutting down; ask another one")
            self._drop_cancelled()
            # An idle engine takes a request of any size: it could never run otherwise.
            if self._waiting_texts and self._waiting_texts + len(rows) > self.max_waiting:
                raise OverloadedError(
                    f"{self._waiting_texts} texts are waiting and at most {self.max_waiting} may; try again later"
                )
            self._waiting.append(request)
            self._waiting_texts += len(rows)
            self._changed.notify()
        return request.future

    def close(self) -> None:
        """Runs what is waiting, refuses what comes, and waits for the end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Coalescer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_cancelled(self) -> None:
        kept = [request for request in self._waiting if not request.future.cancelled()]
        if len(kept) != len(self._waiting):
            self._waiting = deque(kept)
            self._waiting_texts = sum(len(request.rows) for request in kept)

    def _work(self) -> None:
        while group := self._next_group():
            self._run(group)

    def _next_group(self) -> list[_Request]:
        """The requests that run together; none at the end."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                group: list[_Request] = []
                tokens = 0
                while self._waiting and (not group or tokens + self._waiting[0].tokens <= self._group_tokens):
                    request = self._waiting.popleft()
                    self._waiting_texts -= len(request.rows)
                    if request.future.set_running_or_notify_cancel():
                        group.append(request)
                        tokens += request.tokens
                if group or (self._closed and not self._waiting):
                    return group

    def _run(self, group: list[_Request]) -> None:
        try:
            vectors = self._embed(group)
        except BaseException as err:
            if len(group) > 1 and isinstance(err, DeployError):
                for request in group:  # one text must not fail the others
                    self._run([request])
                return
            for request in group:
                request.future.set_exception(err)
            return
        for request, part in zip(group, vectors, strict=True):
            request.future.set_result(part)

    def _embed(self, group: list[_Request]) -> list[Vectors]:
        found: dict[int, Vectors] = {}
        for dimensions in {request.dimensions for request in group}:
            alike = [index for index, request in enumerate(group) if request.dimensions == dimensions]
            rows = [row for index in alike for row in group[index].rows]
            vectors = self.encoder.encode_rows(rows, dimensions=dimensions)
            ends = np.cumsum([len(group[index].rows) for index in alike])
            found |= dict(zip(alike, np.split(vectors, ends[:-1]), strict=True))
        return [found[index] for index in range(len(group))]
