"""Coalesces many small calls into few large batches: requests that arrive while a batch runs form the next one.

There is no timer: a single request runs at once, and the busier the engine, the larger its batches. A large request
runs in pieces, each in a batch with the small requests that have arrived meanwhile: these have at most half of a batch
while large ones wait, so that neither starves the other. The queue is limited in texts, and in the seconds that the
waiting work takes at the measured speed.
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

from nvembed_deploy.batching import DEFAULT_BATCH_TOKENS
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import (
    THREAD_LIMIT,
    ConfigError,
    DeadlineError,
    DeployError,
    EngineError,
    OverloadedError,
)
from nvembed_deploy.tokenization import TokenRow

Vectors = NDArray[np.float32]
DEFAULT_MAX_WAITING = 2048
"""Waiting texts in small requests, and in large ones, from which more are rejected: one of OpenAI's maximum size."""
DEFAULT_GROUP_TOKENS = 2 * DEFAULT_BATCH_TOKENS
"""Tokens per group: enough to sort texts by length, few enough that the first answer does not wait long."""
GROUP_SECONDS = 0.5
"""Maximum seconds of a group at the measured speed, because a small request may wait for one group."""
SMALL_TEXTS = 32
"""Maximum texts of a small request. Small and large ones have separate limits, so that neither blocks the other."""
SMALL_SHARE = 0.5
"""Maximum share of a group that small requests take while large ones wait."""
SPEED_MEMORY = 0.7
"""Weight of the previous speed in the moving average, so that one slow batch does not reject the next requests."""
MEASURED_SHARE = 0.5
"""Share of a full group from which a group is measured: smaller ones are dominated by their fixed cost."""
TYPICAL_TOKENS = 64
"""Assumed tokens per text before the first request."""


@dataclass(kw_only=True)
class _Request:
    rows: Sequence[TokenRow]
    dimensions: int | None
    normalize: bool
    deadline: float
    """`time.monotonic()` by which it must be completed; infinity for no limit."""
    runs_anyway: bool
    """Whether it arrived at an idle engine, and therefore runs whatever its estimated time."""
    future: Future[Vectors] = field(default_factory=Future)
    started_rows: int = 0
    """Number of rows that have run or are running."""
    done_vectors: list[Vectors] = field(default_factory=list)
    is_answered: bool = False
    """Whether the future was marked as running or notified of its cancellation, which is allowed only once."""

    @property
    def is_small(self) -> bool:
        return len(self.rows) <= SMALL_TEXTS

    @property
    def remaining_rows(self) -> Sequence[TokenRow]:
        return self.rows[self.started_rows :]

    @property
    def remaining_tokens(self) -> int:
        return sum(map(len, self.remaining_rows))

    def take(self, max_tokens: float, *, at_least_one: bool) -> Sequence[TokenRow]:
        """Takes the next rows that fit into `max_tokens`, with `at_least_one` the next one even if it does not."""
        start, tokens = self.started_rows, 0
        for row in self.remaining_rows:
            tokens += len(row)
            if tokens > max_tokens and not (at_least_one and self.started_rows == start):
                break
            self.started_rows += 1
        return self.rows[start : self.started_rows]


@dataclass(frozen=True)
class _Piece:
    """The rows of a request that run in one group."""

    request: _Request
    rows: Sequence[TokenRow]


class Reservation:
    """Reserved places in the queue for texts that are still being tokenized, until `submit` or `release`."""

    def __init__(self, coalescer: Coalescer, texts: int, deadline: float, *, is_idle: bool) -> None:
        self._coalescer, self.texts, self.deadline, self.is_idle = coalescer, texts, deadline, is_idle

    def submit(
        self, rows: Sequence[TokenRow], *, dimensions: int | None = None, normalize: bool = True
    ) -> Future[Vectors]:
        """Queues a request in the reserved places; see `Coalescer.submit`.

        Raises:
            ConfigError: There are more rows than places, the reservation was used or released before, or the model does
                not support `dimensions`.
            OverloadedError: The coalescer is closed.
        """
        self._coalescer.encoder.output_dimension(dimensions)  # not in a batch, where it would fail others' requests too
        if len(rows) > self.texts:
            raise ConfigError(f"{len(rows)} rows were submitted, but only {self.texts} places were reserved")
        request = _Request(
            rows=rows,
            dimensions=dimensions,
            normalize=normalize,
            deadline=self.deadline,
            runs_anyway=self.is_idle,
        )
        return self._coalescer._queue(self, request)

    def release(self) -> None:
        """Releases the places; a second call, or one after `submit`, does nothing."""
        self._coalescer._release(self)


class Coalescer:
    """Lets threads and coroutines share an encoder's batches.

    Args:
        encoder: The encoder that tokenizes and embeds the requests.
        max_waiting: Number of waiting texts, separately for requests of up to `SMALL_TEXTS` texts and for larger ones,
            from which a further request is rejected at once; and the maximum texts of one request.
        group_tokens: Maximum tokens that run together; a larger request runs in pieces. On a slow engine groups are
            smaller, so that each takes up to `GROUP_SECONDS`.

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
        self._small: deque[_Request] = deque()
        self._large: deque[_Request] = deque()
        self._reservations: set[Reservation] = set()
        self._running_tokens = 0
        self._tokens_per_second = math.inf  # until a full group was measured, no request is rejected for its time
        self._tokens_per_text = float(TYPICAL_TOKENS)
        self._large_share = 1.0  # of the tokens of groups with large requests
        self._changed = threading.Condition()
        self._is_closed = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._work, name="nvembed-coalescer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as err:
            raise EngineError(THREAD_LIMIT) from err

    @property
    def waiting_texts(self) -> int:
        """Number of texts that wait for the engine, or are reserved."""
        with self._changed:
            self._drop_cancelled()
            return self._waiting_texts(small=True) + self._waiting_texts(small=False)

    def reserve(self, texts: int, *, max_seconds: float = math.inf) -> Reservation:
        """Reserves places for texts, or rejects them for an overload or a time limit, before they cost any work.

        Args:
            texts: Number of texts.
            max_seconds: Time limit from now to the answer. A request that cannot meet it at the measured speed is
                rejected at once; one that can no longer meet it while it waits fails with `DeadlineError` without
                running.

        Raises:
            ConfigError: There are more texts than the queue can ever hold.
            OverloadedError: Too many texts are waiting, they take too long, or the coalescer is closed.
            EngineError: This process was forked from the one that created the coalescer.
        """
        if self._process != os.getpid():
            raise EngineError("this Coalescer was created in another process; create one in this process")
        if texts > self.max_waiting:
            raise ConfigError(
                f"the request has {texts} texts, more than the {self.max_waiting} that may wait; split it"
            )
        is_small = texts <= SMALL_TEXTS
        with self._changed:
            self._require_open()
            self._drop_cancelled()
            # One request may exceed the limit: otherwise a few texts would keep out one of the maximum size.
            if (waiting_texts := self._waiting_texts(small=is_small)) >= self.max_waiting:
                kind = "small" if is_small else "large"
                raise OverloadedError(
                    f"{waiting_texts} texts are waiting in {kind} requests, the maximum is {self.max_waiting}; "
                    "try again later"
                )
            # An idle engine accepts anything; otherwise a speed measured at a bad moment would never be updated.
            is_idle = not (self._is_waiting() or self._running_tokens or self._reservations)
            if not is_idle and (seconds := self._seconds_until_done(texts)) > max_seconds:
                raise OverloadedError(
                    f"this request would take {seconds:.1f} s with the waiting texts, the limit is {max_seconds:g} s; "
                    "try again later"
                )
            reservation = Reservation(self, texts, time.monotonic() + max_seconds, is_idle=is_idle)
            self._reservations.add(reservation)
        return reservation

    def submit(
        self, rows: Sequence[TokenRow], *, dimensions: int | None = None, max_seconds: float = math.inf
    ) -> Future[Vectors]:
        """Queues a request; cancelling its future frees its places, and its remaining rows do not run.

        Args:
            rows: Rows that `encoder.tokenize` returned.
            dimensions: See `Encoder.encode`.
            max_seconds: See `reserve`.

        Returns:
            A future of float32 [N, D]; it raises the errors of `Encoder.encode_rows`, and `DeadlineError`.

        Raises:
            ConfigError: There are more rows than the queue can ever hold, or the model does not support `dimensions`.
            OverloadedError: Too many texts are waiting, they take too long, or the coalescer is closed.
            EngineError: This process was forked from the one that created the coalescer.
        """
        reservation = self.reserve(len(rows), max_seconds=max_seconds)
        try:
            return reservation.submit(rows, dimensions=dimensions)
        finally:
            reservation.release()  # after an error

    def close(self, *, max_seconds: float | None = None) -> None:
        """Rejects new requests, runs those that are waiting, and returns when they are done.

        Args:
            max_seconds: Maximum time to wait: requests that have not started by then fail with `OverloadedError`, and
                a running batch ends by itself. None waits for all of them.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._process != os.getpid():
            return  # the thread belongs to the other process
        self._thread.join(max_seconds)
        if self._thread.is_alive():
            with self._changed:
                abandoned = [*self._small, *self._large]
                self._small.clear()
                self._large.clear()
            for request in abandoned:
                self._fail(request, OverloadedError("the engine is shutting down; retry on another server"))

    def __enter__(self) -> Coalescer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _queue(self, reservation: Reservation, request: _Request) -> Future[Vectors]:
        with self._changed:
            if reservation not in self._reservations:
                raise ConfigError("the reserved places were already used or released; reserve again")
            self._reservations.discard(reservation)
            self._require_open()
            if request.rows:
                tokens_per_text = request.remaining_tokens / len(request.rows)
                self._tokens_per_text += (1 - SPEED_MEMORY) * (tokens_per_text - self._tokens_per_text)
            self._lane(small=request.is_small).append(request)
            self._changed.notify()
        return request.future

    def _release(self, reservation: Reservation) -> None:
        with self._changed:
            self._reservations.discard(reservation)

    def _require_open(self) -> None:
        if self._is_closed:
            raise OverloadedError("the engine is shutting down; retry on another server")

    def _lane(self, *, small: bool) -> deque[_Request]:
        return self._small if small else self._large

    def _is_waiting(self) -> bool:
        return bool(self._small or self._large)

    def _drop_cancelled(self) -> None:
        for lane in (self._small, self._large):
            cancelled = [request for request in lane if request.future.done()]
            for request in cancelled:
                lane.remove(request)
                self._mark_answered(request)

    def _waiting_texts(self, *, small: bool) -> int:
        queued = sum(len(request.remaining_rows) for request in self._lane(small=small))
        return queued + self._reserved_texts(small=small)

    def _reserved_texts(self, *, small: bool) -> int:
        return sum(places.texts for places in self._reservations if (places.texts <= SMALL_TEXTS) == small)

    def _seconds_until_done(self, texts: int) -> float:
        """Estimates the seconds of a new request, behind those of its kind and at this kind's share of the engine."""
        is_small = texts <= SMALL_TEXTS
        tokens = (texts + self._reserved_texts(small=is_small)) * self._tokens_per_text
        tokens += sum(request.remaining_tokens for request in self._lane(small=is_small))
        small_share = SMALL_SHARE if self._large else 1.0
        share = small_share if is_small else self._large_share
        return (self._running_tokens + tokens / share) / self._tokens_per_second

    def _full_group(self) -> float:
        """Tokens of a full group at the measured speed."""
        return min(self._group_tokens, self._tokens_per_second * GROUP_SECONDS)

    def _work(self) -> None:
        while group := self._next_group():
            tokens = _tokens(group)
            started = time.monotonic()
            self._run(group)
            speed = tokens / max(time.monotonic() - started, 1e-6)
            with self._changed:
                self._running_tokens = 0
                if tokens >= MEASURED_SHARE * self._full_group():
                    previous_speed = speed if math.isinf(self._tokens_per_second) else self._tokens_per_second
                    self._tokens_per_second = SPEED_MEMORY * previous_speed + (1 - SPEED_MEMORY) * speed
                    large_tokens = _tokens([piece for piece in group if not piece.request.is_small])
                    if large_tokens:
                        self._large_share += (1 - SPEED_MEMORY) * (large_tokens / tokens - self._large_share)

    def _next_group(self) -> list[_Piece]:
        """Returns the next group, empty after closing."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._is_waiting() or self._is_closed)
                group = self._take_group()
                self._running_tokens = _tokens(group)
                if group or (self._is_closed and not self._is_waiting()):
                    return group

    def _take_group(self) -> list[_Piece]:
        full_group = self._full_group()
        group = self._take(self._small, full_group * SMALL_SHARE if self._large else full_group)
        # A single small text may be longer than its share.
        return group + self._take(self._large, max(full_group - _tokens(group), full_group * (1 - SMALL_SHARE)))

    def _take(self, lane: deque[_Request], max_tokens: float) -> list[_Piece]:
        """Takes the next rows of a kind, at least one; a request with remaining rows moves to the end of its lane."""
        pieces: list[_Piece] = []
        while lane and max_tokens > 0:
            request = lane.popleft()
            if request.future.done():  # cancelled, or failed in a piece
                self._mark_answered(request)
                continue
            needed_seconds = 0.0 if request.runs_anyway else request.remaining_tokens / self._tokens_per_second
            if time.monotonic() + needed_seconds > request.deadline:
                state = "stopped half way" if request.started_rows else "not started"
                self._fail(
                    request, DeadlineError(f"the request could not be completed before its deadline and was {state}")
                )
                continue
            rows = request.take(max_tokens, at_least_one=not pieces)
            if rows or not request.rows:
                pieces.append(_Piece(request, rows))
                max_tokens -= sum(map(len, rows))
            if request.remaining_rows:
                if rows:
                    lane.append(request)
                else:
                    lane.appendleft(request)
                break
        return pieces

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
                ran_in_one_piece = len(request.done_vectors) == 1
                request.future.set_result(piece_vectors if ran_in_one_piece else np.concatenate(request.done_vectors))

    def _fail(self, request: _Request, err: BaseException) -> None:
        if self._mark_answered(request):
            request.future.set_exception(err)

    def _mark_answered(self, request: _Request) -> bool:
        """Marks a future as running; returns False if it was cancelled, of which its waiters are notified once."""
        with self._changed:
            if request.is_answered:
                return False
            request.is_answered = True
            return request.future.set_running_or_notify_cancel()

    def _embed(self, group: list[_Piece]) -> list[Vectors]:
        vectors_by_index: dict[int, Vectors] = {}
        options = [(piece.request.dimensions, piece.request.normalize) for piece in group]
        for dimensions, normalize in set(options):
            indices = [index for index, piece_options in enumerate(options) if piece_options == (dimensions, normalize)]
            rows = [row for index in indices for row in group[index].rows]
            vectors = self.encoder.encode_rows(rows, dimensions=dimensions, normalize=normalize)
            ends = np.cumsum([len(group[index].rows) for index in indices])
            vectors_by_index |= dict(zip(indices, np.split(vectors, ends[:-1]), strict=True))
        return [vectors_by_index[index] for index in range(len(group))]


def _tokens(group: Sequence[_Piece]) -> int:
    return sum(len(row) for piece in group for row in piece.rows)
