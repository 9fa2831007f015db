"""Many small calls, few large batches: requests that arrive while a batch runs are embedded together in the next one.

No timer: a lone request runs at once, and the busier the engine, the larger its batches. A large request runs in
pieces, between which the others have their turn.
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
from nvembed_deploy.tokenization import TokenRow

Vectors = NDArray[np.float32]
DEFAULT_MAX_WAITING = 2048
"""Texts that may wait: one request of OpenAI's largest size."""
DEFAULT_GROUP_TOKENS = 2 * DEFAULT_BATCH_TOKENS
"""Tokens that run together: enough to sort texts by length, few enough that the first answer does not wait long."""


@dataclass(kw_only=True)
class _Request:
    rows: Sequence[TokenRow]
    dimensions: int | None
    future: Future[Vectors] = field(default_factory=Future)
    taken: int = 0
    """Rows that have run, or run now."""
    parts: list[Vectors] = field(default_factory=list)
    started: bool = False
    """Whether the future was marked as running, or told that it was cancelled: either is allowed once."""

    @property
    def left(self) -> int:
        return len(self.rows) - self.taken


@dataclass(frozen=True)
class _Piece:
    """The rows of a request that run in one group."""

    request: _Request
    rows: Sequence[TokenRow]


class Claim:
    """Places that are kept for texts which are still being tokenized; given back by `release`, or by `submit`."""

    def __init__(self, coalescer: Coalescer, texts: int) -> None:
        self._coalescer, self.texts = coalescer, texts

    def submit(self, rows: Sequence[TokenRow], *, dimensions: int | None = None) -> Future[Vectors]:
        """As `Coalescer.submit`, in the places that were claimed.

        Raises:
            ConfigError: There are more rows than places.
            OverloadedError: The coalescer is closed.
        """
        if len(rows) > self.texts:
            raise ConfigError(f"{len(rows)} rows are submitted and {self.texts} places were claimed")
        return self._coalescer._queue(self, _Request(rows=rows, dimensions=dimensions))

    def release(self) -> None:
        """Gives the places back; a second call, or one behind `submit`, does nothing."""
        self._coalescer._give_back(self)


class Coalescer:
    """Lets threads and coroutines share an encoder's batches.

    Args:
        encoder: Whose `tokenize` makes the rows.
        max_waiting: Most texts that wait; more are refused at once, one text or many alike.
        group_tokens: Most tokens that run together; a larger request runs in pieces.

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
        self._claims: set[Claim] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="nvembed-coalescer", daemon=True)
        self._thread.start()

    @property
    def waiting_texts(self) -> int:
        """Texts that wait for the engine, or will as soon as they are tokenized."""
        with self._changed:
            return self._count()

    def claim(self, texts: int) -> Claim:
        """Keeps places for texts before they are tokenized, so that too many are refused before any work is done.

        Raises:
            ConfigError: There could never be so many places.
            OverloadedError: `max_waiting` texts would wait, or the coalescer is closed.
        """
        if texts > self.max_waiting:
            raise ConfigError(f"a request has {texts} texts and at most {self.max_waiting} may wait; split it")
        with self._changed:
            if self._closed:
                raise OverloadedError("the engine is shutting down; ask another one")
            if (waiting := self._count()) + texts > self.max_waiting:
                raise OverloadedError(
                    f"{waiting} texts are waiting and at most {self.max_waiting} may; try again later"
                )
            claim = Claim(self, texts)
            self._claims.add(claim)
        return claim

    def submit(self, rows: Sequence[TokenRow], *, dimensions: int | None = None) -> Future[Vectors]:
        """Queues a request; a cancelled future frees its place, and what has not run yet never does.

        Args:
            rows: What `encoder.tokenize` gave.
            dimensions: As of `Encoder.encode`.

        Returns:
            A future of float32 [N, D]; its errors are those of `Encoder.encode_rows`.

        Raises:
            ConfigError: There are more rows than may ever wait.
            OverloadedError: `max_waiting` texts would wait, or the coalescer is closed.
        """
        return self.claim(len(rows)).submit(rows, dimensions=dimensions)

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

    def _queue(self, claim: Claim, request: _Request) -> Future[Vectors]:
        with self._changed:
            self._claims.discard(claim)
            if self._closed:
                raise OverloadedError("the engine is shutting down; ask another one")
            self._waiting.append(request)
            self._changed.notify()
        return request.future

    def _give_back(self, claim: Claim) -> None:
        with self._changed:
            self._claims.discard(claim)

    def _count(self) -> int:
        kept: deque[_Request] = deque()
        for request in self._waiting:
            if request.future.done():
                self._start(request)
            else:
                kept.append(request)
        self._waiting = kept
        return sum(request.left for request in self._waiting) + sum(claim.texts for claim in self._claims)

    def _work(self) -> None:
        while group := self._next_group():
            self._run(group)

    def _next_group(self) -> list[_Piece]:
        """What runs together; nothing at the end. A request of which something is left goes to the end of the line."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                group: list[_Piece] = []
                tokens = 0
                while self._waiting and tokens < self._group_tokens:
                    request = self._waiting.popleft()
                    if request.future.done():  # cancelled, or failed in a piece
                        self._start(request)
                        continue
                    first = request.taken
                    while request.left:
                        size = len(request.rows[request.taken])
                        if tokens and tokens + size > self._group_tokens:
                            break
                        tokens += size
                        request.taken += 1
                    if request.taken > first or not request.rows:
                        group.append(_Piece(request, request.rows[first : request.taken]))
                    if request.left:
                        (self._waiting.append if request.taken > first else self._waiting.appendleft)(request)
                        break
                if group or (self._closed and not self._waiting):
                    return group

    def _run(self, group: list[_Piece]) -> None:
        try:
            vectors = self._embed(group)
        except BaseException as err:
            if len(group) > 1 and isinstance(err, DeployError):
                for piece in group:  # one text must not fail the others
                    self._run([piece])
                return
            for piece in group:
                if self._start(piece.request):
                    piece.request.future.set_exception(err)
            return
        for piece, part in zip(group, vectors, strict=True):
            request = piece.request
            request.parts.append(part)
            # Until its last piece a future counts as pending, so that it can be cancelled.
            if not request.left and self._start(request):
                request.future.set_result(part if len(request.parts) == 1 else np.concatenate(request.parts))

    def _start(self, request: _Request) -> bool:
        """Marks a future as running; False where it was cancelled, which those who wait for it are told once."""
        with self._changed:
            if request.started:
                return False
            request.started = True
            return request.future.set_running_or_notify_cancel()

    def _embed(self, group: list[_Piece]) -> list[Vectors]:
        found: dict[int, Vectors] = {}
        for dimensions in {piece.request.dimensions for piece in group}:
            alike = [index for index, piece in enumerate(group) if piece.request.dimensions == dimensions]
            rows = [row for index in alike for row in group[index].rows]
            vectors = self.encoder.encode_rows(rows, dimensions=dimensions)
            ends = np.cumsum([len(group[index].rows) for index in alike])
            found |= dict(zip(alike, np.split(vectors, ends[:-1]), strict=True))
        return [found[index] for index in range(len(group))]
