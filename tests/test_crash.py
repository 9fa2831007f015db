"""Killed, interrupted or out of disk at any point: the destination is the old bundle or the new one, never a third."""

import errno
import functools
import itertools
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from nvembed_deploy import console as cli
from nvembed_deploy.bundle.manifest import MANIFEST
from nvembed_deploy.bundle.writer import new_bundle
from nvembed_deploy.files import atomic
from tests.bundle.test_reader import FILES, contents, publish, snapshot

ROOT = Path(__file__).resolve().parent.parent
FILE_EVENTS = ("open", "os.", "shutil.", "tempfile.", "fcntl.", "ctypes.")


class Outcome(NamedTuple):
    """The outcome of a publish that was stopped at one point."""

    event: str
    exit: int
    """Exit code, or minus the signal."""
    state: str
    """`old`, `new`, `absent`, or `torn`."""
    errors: list[str]
    """Lines on stderr."""


def die(event: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full(event: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), event)


def terminate(event: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


STOPS: dict[str, Callable[[str], None]] = {"kill": die, "disk full": disk_full, "terminate": terminate}


def stop_at(index: int, action: Callable[[str], None], report: int) -> None:
    """Runs the action at this process's n-th file event: an open, rename, mkdir, unlink, lock or fsync."""
    count, fsync = itertools.count(), os.fsync

    def tick(event: str) -> None:
        if next(count) == index:
            os.write(report, event.encode())
            action(event)

    def fsync_and_tick(handle: int) -> None:  # the one call on files that has no audit event
        tick("before fsync")
        fsync(handle)
        tick("after fsync")

    os.fsync = fsync_and_tick
    sys.addaudithook(lambda event, arguments: tick(event) if event.startswith(FILE_EVENTS) else None)


def without_exchange() -> None:
    """Simulates a system without renameat2."""
    atomic.ctypes.CDLL = lambda *arguments, **options: object()


def stopped_publishes(folder: Path, action: str, exchange: bool) -> Iterator[Outcome]:
    """Publishes repeatedly, each time in a fork that is stopped one event later, until one is not stopped."""
    destination = folder / "out"
    publish(destination, 0)
    standing = 0
    for index in itertools.count():
        (read, write), (read_errors, write_errors) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(write_errors, 2)
            if not exchange:
                without_exchange()
            stop_at(index, STOPS[action], write)
            os._exit(cli.run(functools.partial(publish, destination, index + 1)))
        for handle in (write, write_errors):
            os.close(handle)
        with os.fdopen(read) as event, os.fdopen(read_errors) as errors:
            where, lines = event.read(), errors.read().splitlines()
        status = os.waitpid(child, 0)[1]
        files = snapshot(destination) if destination.exists() else None
        state = "torn"
        if files == contents(standing):
            state = "old"
        elif files == contents(index + 1):
            state, standing = "new", index + 1
        elif files is None and snapshot(destination.with_name(".out.previous")) == contents(standing):
            state = "absent"
        yield Outcome(where, os.waitstatus_to_exitcode(status), state, lines)
        if not where:  # it came to its end
            return
        if state == "absent":
            with new_bundle(destination):  # any next run brings it back
                assert snapshot(destination) == contents(standing)


def killed_at_random(folder: Path, rounds: int) -> Iterator[Outcome]:
    """Publishes continuously in a fork that is killed after a random time."""
    destination, standing = folder / "out", 0
    publish(destination, 0)
    for _ in range(rounds):
        child = os.fork()
        if child == 0:
            for generation in itertools.count(standing):
                publish(destination, generation)
        time.sleep(random.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        files = snapshot(destination)
        generation = int(json.loads(files[MANIFEST])["created"])
        is_intact = files == contents(generation) and generation >= standing
        standing = max(standing, generation)
        yield Outcome("", os.waitstatus_to_exitcode(status), "new" if is_intact else "torn", [])


def in_child(call: str, folder: Path, *arguments: object) -> list[Outcome]:
    """Runs a generator of this module in a process without threads, which can be forked safely."""
    code = (
        "import json, sys, pathlib; from tests import test_crash; "
        "folder, *rest = json.loads(sys.argv[1]); "
        f"print(json.dumps(list(test_crash.{call}(pathlib.Path(folder), *rest))))"
    )
    command = [sys.executable, "-c", code, json.dumps([str(folder), *arguments])]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    return [Outcome(*values) for values in json.loads(ran.stdout)]


def test_a_publish_killed_at_any_call_leaves_the_old_or_the_new_bundle(tmp_path: Path) -> None:
    *stopped, completed = in_child("stopped_publishes", tmp_path, "kill", True)
    assert {outcome.exit for outcome in stopped} == {-signal.SIGKILL}
    assert {outcome.state for outcome in stopped} == {"old", "new"}
    events = Counter(outcome.event for outcome in stopped)
    # Each file, the manifest, the folder and its parent; and each file once a half, to hash it and to flush it.
    assert events["before fsync"] == events["after fsync"] == len(FILES) + 3
    assert events["open"] >= 4 * len(FILES)
    assert {"os.rename", "os.mkdir", "os.remove", "os.rmdir"} <= events.keys()
    assert (completed.exit, completed.state) == (0, "new")
    assert os.listdir(tmp_path) == ["out"], "the last run removed what the killed ones left"


def test_a_publish_killed_at_any_moment_leaves_a_complete_bundle(tmp_path: Path) -> None:
    outcomes = in_child("killed_at_random", tmp_path, 60)
    assert {(outcome.exit, outcome.state) for outcome in outcomes} == {(-signal.SIGKILL, "new")}
    publish(tmp_path / "out", 0)
    assert os.listdir(tmp_path) == ["out"]


def test_without_exchange_the_next_run_restores_the_old_bundle_of_a_killed_one(tmp_path: Path) -> None:
    *stopped, completed = in_child("stopped_publishes", tmp_path, "kill", False)
    assert {outcome.state for outcome in stopped} == {"old", "new", "absent"}
    assert sum(outcome.state == "absent" for outcome in stopped) == 1, "only between the two renames"
    assert (completed.exit, completed.state) == (0, "new")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("action", "message"), [("disk full", "error: the disk is full"), ("terminate", "error: interrupted")]
)
def test_a_publish_stopped_at_any_call_reports_it_in_one_line(tmp_path: Path, action: str, message: str) -> None:
    *stopped, completed = in_child("stopped_publishes", tmp_path, action, True)
    assert {outcome.state for outcome in stopped} == {"old", "new"}
    for outcome in stopped:
        if outcome.exit == 0:  # met while the old files were removed, which may fail
            assert (outcome.state, outcome.errors) == ("new", [])
        else:
            assert (outcome.exit, len(outcome.errors)) == (1, 1), outcome
            assert outcome.errors[0].startswith("error: ")
    assert all(
        outcome.errors[0].startswith(message)
        for outcome in stopped
        if outcome.exit == 1 and (action == "terminate" or outcome.event in ("os.mkdir", "os.rename", "before fsync"))
    )
    assert sum(outcome.state == "old" and outcome.exit == 1 for outcome in stopped) > 30
    assert (completed.exit, completed.state) == (0, "new")
    assert os.listdir(tmp_path) == ["out"]


class Stopped(NamedTuple):
    """An export that was stopped before its end."""

    exit: int
    output: str
    errors: list[str]
    leftovers: list[str]
    """Names of the files beside the destination."""


def run_export(largest_file: int, *flags: str) -> None:
    """Runs `python -m export.to_onnx` with a limit on file sizes, in a child process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    sys.argv[1:] = flags
    runpy.run_module("export.to_onnx", run_name="__main__", alter_sys=True)


def stopped_export(checkpoint: Path, out: Path, *, signal_number: int | None = None, largest_file: int = -1) -> Stopped:
    """Runs an export and sends it a signal once the tracer is running."""
    code = f"from tests.test_crash import run_export; import sys; run_export({largest_file}, *sys.argv[1:])"
    flags = ["--model", str(checkpoint), "--no-parity", "--force", "--out", str(out)]
    with subprocess.Popen(
        [sys.executable, "-c", code, *flags], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None
        progress = ""
        if signal_number is not None:
            while "tracing to ONNX" not in progress:  # the line of a step has no end before the step has
                progress += run.stderr.read(1)
            time.sleep(0.3)
            run.send_signal(signal_number)
        output, errors = run.communicate(timeout=90)
    leftovers = sorted(set(os.listdir(out.parent)) - {out.name})
    return Stopped(run.returncode, output, f"{progress}{errors}".splitlines(), leftovers)


@pytest.fixture(scope="module")
def stopped_exports(
    checkpoint: Path, bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Stopped, Path]]:
    """Real exports over an existing bundle, in parallel to save time, each stopped in a different way."""
    outs = {name: tmp_path_factory.mktemp(name) / "out" for name in ("SIGTERM", "SIGINT", "SIGKILL")}
    for out in outs.values():
        shutil.copytree(bundles["fp32"], out)
    with ThreadPoolExecutor() as pool:
        runs = {
            name: pool.submit(stopped_export, checkpoint, out, signal_number=signal.Signals[name])
            for name, out in outs.items()
        }
        stopped = {name: (run.result(), outs[name]) for name, run in runs.items()}
    # The next run where the killed one left its folder. The tokenizer fits, the weights do not.
    stopped["EFBIG"] = (stopped_export(checkpoint, outs["SIGKILL"], largest_file=100_000), outs["SIGKILL"])
    return stopped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [("SIGTERM", "error: interrupted"), ("SIGINT", "error: interrupted"), ("EFBIG", "error: the disk is full")],
)
def test_a_stopped_export_reports_one_line_and_changes_nothing(
    stopped_exports: dict, bundles: dict[str, Path], how: str, message: str
) -> None:
    stopped, out = stopped_exports[how]
    assert (stopped.exit, stopped.output) == (1, "")
    assert stopped.errors[-1].startswith(message)
    assert sum(line.startswith("error:") for line in stopped.errors) == 1
    assert not [line for line in stopped.errors if "Traceback" in line]
    assert snapshot(out) == snapshot(bundles["fp32"])
    assert stopped.leftovers == []


@pytest.mark.slow
def test_a_killed_export_changes_nothing_and_the_next_removes_what_it_left(
    stopped_exports: dict, bundles: dict[str, Path]
) -> None:
    stopped, out = stopped_exports["SIGKILL"]
    assert stopped.exit == -signal.SIGKILL
    assert [name.startswith(".out.staging-") for name in stopped.leftovers] == [True]
    assert snapshot(out) == snapshot(bundles["fp32"])
    assert os.listdir(out.parent) == ["out"], "the run behind it removed that"
