"""Many small calls, few large batches: requests that arrive while a batch runs are embedded together in the next one.

No timer: a lone request runs at once, and the busier the engine, the larger its batches. A large request runs in
pieces, between which the others have their turn. How much may wait is bounded in texts, and in the seconds that the
waiting work takes at the speed that was measured.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.encoder import DEFAULT_BATCH_TOKENS, Encoder
from nvembed_deploy.errors import ConfigError, DeadlineError, DeployError, EngineError, OverloadedError
from nvembed_deploy.tokenization import TokenRow

Vectors = NDArray[np.float32]
DEFAULT_MAX_WAITING = 2048
"""Texts that may wait, of small requests and of large ones each: one request of OpenAI's largest size."""
DEFAULT_GROUP_TOKENS = 2 * DEFAULT_BATCH_TOKENS
"""Tokens that run together: enough to sort texts by length, few enough that the first answer does not wait long."""
SMALL_TEXTS = 32
"""Largest small request. Small and large ones have `max_waiting` places each, so that neither locks the other out."""
SPEED_MEMORY = 0.7
"""Weight of the earlier speed when a group's is averaged in: a slow batch alone does not refuse the next requests."""
MEASURED_SHARE = 0.5
"""Of `group_tokens`: smaller groups say little of the speed: each has a fixed cost. Under load groups are full."""
TYPICAL_TOKENS = 64
"""Tokens of a text until some were seen."""


@dataclass(kw_only=True)
class _Request:
    rows: Sequence[TokenRow]
    dimensions: int | None
    deadline: float
    """`time.monotonic()` by which it must be done; infinity for no limit."""
    runs_anyway: bool
    """Whether it came to an idle engine, and runs until its deadline whatever its time was estimated at."""
    future: Future[Vectors] = field(default_factory=Future)
    started_rows: int = 0
    """Rows that have run, or run now."""
    done_vectors: list[Vectors] = field(default_factory=list)
    is_answered: bool = False
    """Whether the future was marked as running, or told that it was cancelled: either is allowed once."""

    @property
    def is_small(self) -> bool:
        return len(self.rows) <= SMALL_TEXTS

    @property
    def remaining_rows(self) -> Sequence[TokenRow]:
        return self.rows[self.started_rows :]

    @property
    def remaining_tokens(self) -> int:
        return sum(map(len, self.remaining_rows))

    def take(self, max_tokens: int, *, at_least_one: bool) -> Sequence[TokenRow]:
        """Takes the next rows, as many as fit into `max_tokens`; the first one even if it does not, where asked."""
        first, tokens = self.started_rows, 0
        for row in self.remaining_rows:
            tokens += len(row)
            if tokens > max_tokens and not (at_least_one and self.started_rows == first):
                break
            self.started_rows += 1
        return self.rows[first : self.started_rows]


@dataclass(frozen=True)
class _Piece:
    """The rows of a request that run in one group."""

    request: _Request
    rows: Sequence[TokenRow]


class Reservation:
    """Places that are kept for texts which are still being tokenized; given back by `release`, or by `submit`."""

    def __init__(self, coalescer: Coalescer, texts: int, deadline: float, *, is_idle: bool) -> None:
        self._coalescer, self.texts, self.deadline, self.is_idle = coalescer, texts, deadline, is_idle

    def submit(self, rows: Sequence[TokenRow], *, dimensions: int | None = None) -> Future[Vectors]:
        """Queues a request in the reserved places; see `Coalescer.submit`.

        Raises:
            ConfigError: There are more rows than places, or the places were used or given back before.
            OverloadedError: The coalescer is closed.
        """
        if len(rows) > self.texts:
            raise ConfigError(f"{len(rows)} rows are submitted and {self.texts} places were reserved")
        request = _Request(rows=rows, dimensions=dimensions, deadline=self.deadline, runs_anyway=self.is_idle)
        return self._coalescer._queue(self, request)

    def release(self) -> None:
        """Gives the places back; a second call, or one after `submit`, does nothing."""
        self._coalescer._give_back(self)


class Coalescer:
    """Lets threads and coroutines share an encoder's batches.

    Args:
        encoder: Whose `tokenize` makes the rows.
        max_waiting: Texts that may wait, in requests of up to `SMALL_TEXTS` texts and in larger ones each; a further
            request is refused at once.
        group_tokens: Tokens that run together; a larger request runs in pieces.

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
        self._reservations: set[Reservation] = set()
        self._running_tokens = 0
        self._tokens_per_second = math.inf  # until a full group was measured, nothing is refused for its time
        self._tokens_per_text = float(TYPICAL_TOKENS)
        self._changed = threading.Condition()
        self._is_closed = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._work, name="nvembed-coalescer", daemon=True)
        self._thread.start()

    @property
    def waiting_texts(self) -> int:
        """Texts that wait for the engine, or will as soon as they are tokenized."""
        with self._changed:
            self._drop_cancelled()
            return self._waiting_texts(small=True) + self._waiting_texts(small=False)

    def reserve(self, texts: int, *, max_seconds: float = math.inf) -> Reservation:
        """Keeps places for texts before they are tokenized, so that too many are refused before any work is done.

        Args:
            texts: How many.
            max_seconds: From now to the answer. A request that cannot be done by then at the measured speed is refused
                at once; one that turns out so while it waits fails with `DeadlineError` and is not run.

        Raises:
            ConfigError: There could never be so many places.
            OverloadedError: Too many texts wait already, they take too long, or the coalescer is closed.
            EngineError: This process was forked from the one that made the coalescer.
        """
        if self._process != os.getpid():
            raise EngineError("this Coalescer was made in another process; make one here")
        if texts > self.max_waiting:
            raise ConfigError(f"a request has {texts} texts and at most {self.max_waiting} may wait; split it")
        is_small = texts <= SMALL_TEXTS
        with self._changed:
            self._require_open()
            self._drop_cancelled()
            if (waiting := self._waiting_texts(small=is_small)) + texts > self.max_waiting:
                kind = "small" if is_small else "large"
                raise OverloadedError(
                    f"{waiting} texts are waiting in {kind} requests and at most {self.max_waiting} may; try later"
                )
            # An idle engine takes anything: or a speed that was measured in a bad moment would never be measured again.
            is_idle = not (self._waiting or self._running_tokens or self._reservations)
            if not is_idle and (seconds := self._seconds_until_done(texts)) > max_seconds:
                raise OverloadedError(
                    f"this request would take {seconds:.1f} s with what is waiting, and {max_seconds:g} s are allowed; "
                    "try again later"
                )
            reservation = Reservation(self, texts, time.monotonic() + max_seconds, is_idle=is_idle)
            self._reservations.add(reservation)
        return reservation

    def submit(
        self, rows: Sequence[TokenRow], *, dimensions: int | None = None, max_seconds: float = math.inf
    ) -> Future[Vectors]:
        """Queues a request; a cancelled future frees its place, and what has not run yet never does.

        Args:
            rows: What `encoder.tokenize` returned.
            dimensions: See `Encoder.encode`.
            max_seconds: See `reserve`.

        Returns:
            A future of float32 [N, D]; its errors are those of `Encoder.encode_rows`, and `DeadlineError`.

        Raises:
            ConfigError: There are more rows than may ever wait.
            OverloadedError: Too many texts wait already, they take too long, or the coalescer is closed.
            EngineError: This process was forked from the one that made the coalescer.
        """
        return self.reserve(len(rows), max_seconds=max_seconds).submit(rows, dimensions=dimensions)

    def close(self, *, max_seconds: float | None = None) -> None:
        """Runs what is waiting, refuses what comes, and waits for the end.

        Args:
            max_seconds: Wait no longer than this: what has not begun by then fails with `OverloadedError`, and a batch
                that is running is left to end by itself. None waits for everything.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._process != os.getpid():
            return  # the thread is the other process's
        self._thread.join(max_seconds)
        if self._thread.is_alive():
            with self._changed:
                abandoned, self._waiting = list(self._waiting), deque()
            for request in abandoned:
                self._fail(request, OverloadedError("the engine is shutting down; ask another one"))

    def __enter__(self) -> Coalescer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _queue(self, reservation: Reservation, request: _Request) -> Future[Vectors]:
        with self._changed:
            if reservation not in self._reservations:
                raise ConfigError("the reserved places were used or given back before; reserve again")
            self._reservations.discard(reservation)
            self._require_open()
            if request.rows:
                tokens_per_text = request.remaining_tokens / len(request.rows)
                self._tokens_per_text += (1 - SPEED_MEMORY) * (tokens_per_text - self._tokens_per_text)
            self._waiting.append(request)
            self._changed.notify()
        return request.future

    def _give_back(self, reservation: Reservation) -> None:
        with self._changed:
            self._reservations.discard(reservation)

    def _require_open(self) -> None:
        if self._is_closed:
            raise OverloadedError("the engine is shutting down; ask another one")

    def _drop_cancelled(self) -> None:
        cancelled = [request for request in self._waiting if request.future.done()]
        if cancelled:
            self._waiting = deque(request for request in self._waiting if not request.future.done())
        for request in cancelled:
            self._mark_answered(request)

    def _waiting_texts(self, *, small: bool) -> int:
        queued = sum(len(request.remaining_rows) for request in self._waiting if request.is_small == small)
        return queued + sum(item.texts for item in self._reservations if (item.texts <= SMALL_TEXTS) == small)

    def _seconds_until_done(self, texts: int) -> float:
        """Seconds that a further request would take: a small one waits for one piece of each large one, not for all."""
        tokens = self._running_tokens + texts * self._tokens_per_text
        tokens += sum(item.texts for item in self._reservations) * self._tokens_per_text
        for request in self._waiting:
            ahead = request.remaining_tokens
            tokens += min(ahead, self._group_tokens) if texts <= SMALL_TEXTS and not request.is_small else ahead
        return tokens / self._tokens_per_second

    def _work(self) -> None:
        while group := self._next_group():
            tokens = sum(len(row) for piece in group for row in piece.rows)
            started = time.monotonic()
            self._run(group)
            speed = tokens / max(time.monotonic() - started, 1e-6)
            with self._changed:
                self._running_tokens = 0
                if tokens >= MEASURED_SHARE * self._group_tokens:
                    earlier = speed if math.isinf(self._tokens_per_second) else self._tokens_per_second
                    self._tokens_per_second = SPEED_MEMORY * earlier + (1 - SPEED_MEMORY) * speed

    def _next_group(self) -> list[_Piece]:
        """Returns what runs together, nothing at the end. A request with rows left goes to the end of the line."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                group = self._take_group()
                if group:
                    self._running_tokens = sum(len(row) for piece in group for row in piece.rows)
                if group or (self._is_closed and not self._waiting):
                    return group

    def _take_group(self) -> list[_Piece]:
        group: list[_Piece] = []
        room = self._group_tokens
        while self._waiting and room > 0:
            request = self._waiting.popleft()
            if request.future.done():  # cancelled, or failed in a piece
                self._mark_answered(request)
                continue
            needed_seconds = 0.0 if request.runs_anyway else request.remaining_tokens / self._tokens_per_second
            if time.monotonic() + needed_seconds > request.deadline:
                self._fail(request, DeadlineError("the request could not be done in its time; it was not started"))
                continue
            rows = request.take(room, at_least_one=not group)
            if rows or not request.rows:
                group.append(_Piece(request, rows))
                room -= sum(map(len, rows))
            if request.remaining_rows:
                if rows:
                    self._waiting.append(request)
                else:
                    self._waiting.appendleft(request)
                break
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
                self._fail(piece.request, err)
            return
        for piece, piece_vectors in zip(group, vectors, strict=True):
            request = piece.request
            request.done_vectors.append(piece_vectors)
            # Until its last piece a future counts as pending, so that it can be cancelled.
            if not request.remaining_rows and self._mark_answered(request):
                is_whole = len(request.done_vectors) == 1
                request.future.set_result(piece_vectors if is_whole else np.concatenate(request.done_vectors))

    def _fail(self, request: _Request, err: BaseException) -> None:
        if self._mark_answered(request):
            request.future.set_exception(err)

    def _mark_answered(self, request: _Request) -> bool:
        """Marks a future as running; False where it was cancelled, which those who wait for it are told once."""
        with self._changed:
            if request.is_answered:
                return False
            request.is_answered = True
            return request.future.set_running_or_notify_cancel()

    def _embed(self, group: list[_Piece]) -> list[Vectors]:
        vectors_by_index: dict[int, Vectors] = {}
        for dimensions in {piece.request.dimensions for piece in group}:
            indices = [index for index, piece in enumerate(group) if piece.request.dimensions == dimensions]
            rows = [row for index in indices for row in group[index].rows]
            vectors = self.encoder.encode_rows(rows, dimensions=dimensions)
            ends = np.cumsum([len(group[index].rows) for index in indices])
            vectors_by_index |= dict(zip(indices, np.split(vectors, ends[:-1]), strict=True))
        return [vectors_by_index[index] for index in range(len(group))]
