"""Adds documents in the background: uploads of all users, and Python's documentation at the first start."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nvembed_deploy import DeployError
from nvembed_deploy.app.documents import Limits, ReadFile, file_passages, read_files
from nvembed_deploy.app.library import PYTHON, BusyError, Library
from nvembed_deploy.app.passages import Passage
from nvembed_deploy.app.store import StoredFile

MAX_RUNNING, MAX_WAITING = 2, 16
"""Jobs that embed at a time, and jobs that may wait for them."""
KEPT_JOBS = 30
"""Number of finished jobs that are remembered, with what was added and skipped."""
SPECIAL_TOKENS = 8
"""Tokens of a passage reserved for special tokens, and for a split that tokenizes into more tokens."""
BUSY_RETRY_SECONDS = 0.5
RATE_SECONDS = 20.0
"""Seconds whose speed is shown, so that a slow start does not count for long."""

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FileOutcome:
    """What became of one file of an upload."""

    name: str
    is_added: bool
    passages: int = 0
    reason: str = ""
    """Why it was skipped, or what was noticed while it was read."""


@dataclass(kw_only=True)
class Job:
    """One upload, or the indexing of Python's documentation or of a collection of another engine."""

    number: int
    collection: str
    owner: str = ""
    """Session that may cancel it; empty for the page's own."""
    state: str = "waiting"
    """waiting, reading, embedding, done, cancelled or failed."""
    message: str = ""
    """Why it failed or waits."""
    done: int = 0
    total: int = 0
    outcomes: list[FileOutcome] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    _progress: list[tuple[float, int]] = field(default_factory=list)

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ("waiting", "reading", "embedding")

    def update(self, done: int) -> None:
        """Records the number of embedded passages."""
        now = time.monotonic()
        self.done = done
        self._progress.append((now, done))
        while len(self._progress) > 2 and self._progress[0][0] < now - RATE_SECONDS:
            self._progress.pop(0)

    def rate(self) -> float | None:
        """Returns the speed in passages per second, or None before it is known."""
        if len(self._progress) < 2:
            return None
        (start, first), (end, last) = self._progress[0], self._progress[-1]
        return (last - first) / (end - start) if end > start and last > first else None

    def seconds_left(self) -> float | None:
        """Returns the remaining time at the present speed, or None before it is known."""
        rate = self.rate()
        return (self.total - self.done) / rate if rate and self.state == "embedding" else None


class Jobs:
    """Runs jobs in threads of their own; searching goes on meanwhile.

    Args:
        library: The collections.
        limits: Limits of an upload.
    """

    def __init__(self, library: Library, limits: Limits) -> None:
        self.library, self.limits = library, limits
        self._jobs: list[Job] = []
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._running = threading.Semaphore(MAX_RUNNING)

    def all(self) -> list[Job]:
        """Returns the jobs, the newest first."""
        with self._lock:
            return self._jobs[::-1]

    def add_python(self, passages: Sequence[Passage] | None = None) -> Job | None:
        """Starts to index Python's documentation if it is missing or incomplete."""
        if self.library.is_indexed(PYTHON):
            return None

        def steps(job: Job) -> None:
            job.state = "embedding"
            self._follow(job, 0, lambda: self.library.add_python_steps(passages))

        return self._start(Job(number=next(self._numbers), collection=PYTHON), steps)

    def add_files(self, collection: str, paths: Sequence[Path], owner: str = "") -> Job:
        """Starts to add files to a collection.

        Raises:
            ConfigError: The collection's name is not valid.
            DeployError: Too many uploads are waiting.
        """
        self.library.check_user_name(collection)
        self._require_place()
        job = Job(number=next(self._numbers), collection=collection, owner=owner)
        return self._start(job, lambda started: self._add_files(started, paths))

    def index_again(self, collection: str, owner: str = "") -> Job:
        """Starts to index a collection of another engine again with this one.

        Raises:
            ConfigError: The collection's name is not valid.
            DeployError: Too many jobs are waiting.
        """
        self.library.check_user_name(collection)
        self._require_place()

        def steps(job: Job) -> None:
            job.state = "embedding"
            self._follow(job, 0, lambda: self.library.index_again_steps(collection))

        return self._start(Job(number=next(self._numbers), collection=collection, owner=owner), steps)

    def _require_place(self) -> None:
        if sum(job.is_active for job in self.all()) >= MAX_RUNNING + MAX_WAITING:
            raise DeployError("too many uploads are waiting; try again when some are done")

    def cancel(self, number: int, owner: str) -> None:
        """Stops a job of a session between two steps; nothing of its unfinished file stays.

        Raises:
            DeployError: There is no such job that this session has started.
        """
        job = next((job for job in self.all() if job.number == number and job.owner == owner and owner), None)
        if job is None or not job.is_active:
            raise DeployError("this upload has ended, or was started elsewhere, so there is nothing to cancel")
        job.stop.set()

    def _start(self, job: Job, work: Callable[[Job], None]) -> Job:
        with self._lock:
            self._jobs.append(job)
            ended = [other for other in self._jobs if not other.is_active]
            for other in ended[:-KEPT_JOBS]:
                self._jobs.remove(other)
        threading.Thread(target=self._run, args=(job, work), name=f"job-{job.number}", daemon=True).start()
        return job

    def _run(self, job: Job, work: Callable[[Job], None]) -> None:
        while not self._running.acquire(timeout=0.2):
            if job.stop.is_set():
                job.state = "cancelled"
                return
        try:
            work(job)
            job.state = "cancelled" if job.stop.is_set() else "done"
        except DeployError as err:
            job.state, job.message = "failed", str(err)
        except OSError as err:
            job.state, job.message = "failed", f"{err.strerror or err}: the server could not read or write a file"
        except Exception as err:
            job.state, job.message = "failed", f"an unexpected error ({type(err).__name__}); the server's log has it"
            _log.exception("job %d on %r failed", job.number, job.collection)
        finally:
            self._running.release()

    def _add_files(self, job: Job, paths: Sequence[Path]) -> None:
        job.state = "reading"
        encoder = self.library.encoder
        planned: list[tuple[ReadFile, list[Passage]]] = []
        complete = [file for file in self.library.files(job.collection) if file.rows == file.passages]
        hashes, names = {file.sha256: file.name for file in complete}, {file.name for file in complete}
        for file in read_files(paths, self.limits):
            if job.stop.is_set():
                return
            if not isinstance(file, ReadFile):
                job.outcomes.append(FileOutcome(name=file.name, is_added=False, reason=file.reason))
            elif file.sha256 in hashes:
                reason = f"has the same content as {hashes[file.sha256]}, which is there already"
                job.outcomes.append(FileOutcome(name=file.name, is_added=False, reason=reason))
            else:
                hashes[file.sha256] = file.name
                max_tokens = encoder.max_length - SPECIAL_TOKENS
                passages = list(file_passages(file, encoder.token_spans, max_tokens=max_tokens))
                planned.append((file, passages))
                job.total += len(passages)
        job.state = "embedding"
        for file, passages in planned:
            if job.stop.is_set():
                return
            stored = StoredFile(
                name=file.name,
                bytes=file.bytes,
                sha256=file.sha256,
                passages=len(passages),
                rows=0,
                note=file.note,
            )
            replaced = "replaced the earlier version" if file.name in names else ""
            self._follow(job, job.done, partial(self.library.add_steps, job.collection, passages, stored))
            if not job.stop.is_set():
                note = "; ".join(filter(None, [replaced, file.note]))
                job.outcomes.append(FileOutcome(name=file.name, is_added=True, passages=len(passages), reason=note))

    def _follow(self, job: Job, before: int, start: Callable[[], Generator[tuple[int, int]]]) -> None:
        """Runs steps until they end or the job is stopped, and waits while another writer has the collection."""
        while not job.stop.is_set():
            try:
                with closing(start()) as steps:
                    for done, total in steps:
                        job.message = ""
                        job.total = max(job.total, total)
                        job.update(before + done)
                        if job.stop.is_set():
                            return
                return
            except BusyError:
                job.message = "waiting for another upload to this collection"
                job.stop.wait(BUSY_RETRY_SECONDS)
