"""Runs the shards of a bulk job on Ray: which worker takes which shard, what happens when one dies, and progress."""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nvembed_deploy.console import clear_status, echo, is_terminal, status
from nvembed_deploy.errors import ConfigError, EngineError
from nvembed_deploy.export.bulk.shards import Shard
from nvembed_deploy.export.bulk.worker import Embedder, Report, Task

MAX_ATTEMPTS = 3
"""Workers that may die at one shard before it counts as failed; likewise at opening the engine, in a row."""
OPENING = "opening the bundle"
PROGRESS_SECONDS = 30.0
"""Time between two lines of progress where stderr is no terminal."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The workers of a job and what each of them takes."""

    count: int
    cpus: float
    gpus: float


@dataclass(kw_only=True)
class Totals:
    """What all workers have done."""

    rows: int = 0
    rejected: int = 0
    errors: list[str] = field(default_factory=list)
    seconds: Counter[str] = field(default_factory=Counter)
    """Time of each step, of all workers together."""
    notes: Counter[str] = field(default_factory=Counter)
    """Number of the workers' warnings of each kind; digits are not compared."""

    def add(self, report: Report) -> None:
        """Adds what a worker reports; the first warning of each kind is written at once."""
        self.rows += report.rows
        self.rejected += report.rejected
        self.seconds.update(report.seconds)
        if report.error:
            self.errors.append(report.error)
        for note in report.notes:
            kind = re.sub(r"\d+", "N", note)
            self.notes[kind] += 1
            if self.notes[kind] == 1:
                echo(f"note: {note}")


class ShardQueue:
    """The shards that no worker has taken yet, of each input file in order."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._files: dict[str, deque[Shard]] = {}
        for shard in shards:
            self._files.setdefault(shard.file.label, deque()).append(shard)
        self._workers: Counter[str] = Counter()
        """Number of workers at each file."""

    def __bool__(self) -> bool:
        return any(self._files.values())

    def take(self, previous: Shard | None) -> Shard | None:
        """Returns the next shard for a worker, or None: of the file that it reads, else of one that few others read."""
        label = previous.file.label if previous is not None else None
        if label is not None and not self._files[label]:
            self._workers[label] -= 1
            label = None
        if label is None:
            remaining = [name for name, shards in self._files.items() if shards]
            if not remaining:
                return None
            label = min(remaining, key=lambda name: self._workers[name])
            self._workers[label] += 1
        return self._files[label].popleft()

    def put_back(self, shard: Shard) -> None:
        """Returns a shard whose worker died."""
        self._workers[shard.file.label] -= 1
        self._files[shard.file.label].appendleft(shard)


class Progress:
    """One line with rows, rate and remaining time: kept up to date on a terminal, elsewhere repeated now and then."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.done = 0
        self.started: float | None = None
        """When the first engine was ready."""
        self._shown = time.monotonic()

    def line(self) -> str:
        """Returns the line."""
        if self.started is None:
            return "starting the workers"
        share = f"{self.done:,} of {self.rows:,} rows, {self.done / max(self.rows, 1):.0%}"
        if not self.done:
            return share
        rate = self.done / max(time.monotonic() - self.started, 1e-3)
        return f"{share}, {rate:,.0f} rows/s, {duration((self.rows - self.done) / rate)} left"

    def show(self) -> None:
        """Writes the line if it is time to."""
        if is_terminal():
            status(f"  {self.line()}")
        elif time.monotonic() - self._shown >= PROGRESS_SECONDS:
            self._shown = time.monotonic()
            echo(f"  {self.line()}")


def duration(seconds: float) -> str:
    """Returns a time in words: `42 s`, `7 min`, `3 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Job:
    """Embeds shards on workers.

    Args:
        shards: The shards that are missing.
        task: What the workers do.
        workers: How many, and what each takes.
    """

    def __init__(self, shards: Sequence[Shard], task: Task, workers: Workers) -> None:
        import ray

        self._ray: Any = ray
        self._queue = ShardQueue(shards)
        self._task = ray.put(task)
        self._count = min(workers.count, len(shards))
        options = {"num_cpus": workers.cpus, "num_gpus": workers.gpus}
        self._embedder = ray.remote(Embedder).options(**options)
        self._running: dict[Any, tuple[Any, Shard | None]] = {}
        """Workers by what they have been asked, and the shard in work; None while the engine is opened."""
        self._ids: dict[Any, str] = {}
        """Process and machine of each worker."""
        self._deaths: Counter[str] = Counter()
        self._progress = Progress(sum(shard.rows for shard in shards))
        self.totals = Totals()

    def run(self) -> Totals:
        """Embeds all shards; those that fail are named in the totals.

        Raises:
            EngineError: The workers cannot open the bundle.
        """
        for _ in range(self._count):
            self._start_worker()
        try:
            # At the end, a worker for which there is no machine may still be waiting.
            while self._running and (self._queue or any(shard for _, shard in self._running.values())):
                ready, _ = self._ray.wait(list(self._running), timeout=1)
                for reference in ready:
                    self._finish(reference)
                self._progress.show()
        finally:
            clear_status()
            for worker, _ in self._running.values():
                self._ray.kill(worker)
        return self.totals

    def _start_worker(self) -> None:
        worker = self._embedder.remote(self._task)
        self._running[worker.open.remote()] = (worker, None)

    def _finish(self, reference: Any) -> None:
        worker, shard = self._running.pop(reference)
        try:
            report: Report = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as err:
            self._replace(worker, shard, err)
            return
        except self._ray.exceptions.RayTaskError as err:
            where = OPENING if shard is None else f"{shard.file.label}, from row {shard.first_row}"
            report = Report(error=f"{where}: unexpected {type(err.cause).__name__}: {err.cause}")
        if shard is None:
            self._opened(worker, report)
        else:
            self._progress.done += shard.rows
        self.totals.add(report)
        self._next(worker, shard)

    def _opened(self, worker: Any, report: Report) -> None:
        if report.error:
            raise EngineError(report.error)
        self._ids[worker] = report.worker
        self._deaths[OPENING] = 0
        if self._progress.started is None:
            self._progress.started = time.monotonic()
            echo(f"{self._count} worker{'s' if self._count > 1 else ''} on {report.backend}")

    def _next(self, worker: Any, shard: Shard | None) -> None:
        """Gives a worker its next shard; at the end it is stopped, which frees its GPU for others."""
        following = self._queue.take(shard)
        if following is None:
            self._ray.kill(worker)
            return
        self._running[worker.embed.remote(following)] = (worker, following)

    def _replace(self, worker: Any, shard: Shard | None, err: Exception) -> None:
        """Starts another worker for one that died, and has its shard tried again, a limited number of times.

        Raises:
            EngineError: No worker survives opening the engine.
        """
        step = OPENING if shard is None else f"{shard.file.label}, from row {shard.first_row}"
        key = OPENING if shard is None else shard.name
        self._deaths[key] += 1
        cause = "out of memory" if "running low on memory" in str(err) else "killed"
        what = f"worker {self._ids.pop(worker, '(new)')} died at {step} ({cause}, or it crashed)"
        is_last = self._deaths[key] == MAX_ATTEMPTS
        if shard is None and is_last:
            raise EngineError(f"{what}, as did {MAX_ATTEMPTS - 1} before; give each worker more memory or run fewer")
        if shard is not None and is_last:
            self.totals.errors.append(f"{step}: {MAX_ATTEMPTS} workers died at these rows, one after another")
            self._progress.done += shard.rows
        elif shard is not None:
            self._queue.put_back(shard)
        echo(
            f"note: {what}; "
            + ("not tried again" if is_last else f"trying again, {self._deaths[key] + 1} of {MAX_ATTEMPTS}")
        )
        if self._queue:
            self._start_worker()


def require_resources(workers: Workers) -> None:
    """Refuses workers that do not fit on a machine on which Ray has just been started.

    Raises:
        ConfigError: The message says what there is.
    """
    import ray

    available = ray.cluster_resources()
    for name, flag, needed in (("GPU", "--gpus", workers.gpus), ("CPU", "--cpus", workers.cpus)):
        if needed > available.get(name, 0):
            raise ConfigError(
                f"{flag} {needed:g} per worker, and this machine has {available.get(name, 0):g} {name}s; pass fewer, "
                "or name a cluster with RAY_ADDRESS"
            )
