"""Replacing a bundle: order of the system calls, foreign files, concurrent writers."""

import errno
import multiprocessing
import os
import stat
import threading
from pathlib import Path

import pytest

from nvembed_deploy.bundle.manifest import MANIFEST
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.bundle.writer import commit, new_bundle
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files import atomic
from nvembed_deploy.files.atomic import staged_folder
from tests.bundle.test_reader import FILES, contents, make_manifest, publish, snapshot


def publish_often(destination: Path, generation: int, times: int, barrier) -> None:
    barrier.wait(30)
    for _ in range(times):
        publish(destination, generation)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Records the system calls in order, with each path and its size at that moment, and still makes them."""
    made: list[tuple[str, str, int]] = []
    fsync, rename, exchange = os.fsync, os.rename, atomic.exchange

    def size(path) -> int:
        return os.stat(path).st_size if os.path.isfile(path) else -1

    def record_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        made.append(("fsync", path, size(path)))
        fsync(descriptor)

    def record_rename(source, target) -> None:
        rename(source, target)
        made.append(("switch", str(target), -1))

    def record_exchange(new, current) -> None:
        exchange(new, current)
        made.append(("switch", str(current), -1))

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(atomic, "exchange", record_exchange)
    return made


def test_a_file_and_its_folder_reach_the_disk_in_that_order(tmp_path: Path, calls: list) -> None:
    atomic.write_file(tmp_path / "a", b"abc")
    (file_call, name, size), (folder_call, folder, _) = calls
    assert (file_call, folder_call, size, folder) == ("fsync", "fsync", 3, str(tmp_path))
    assert os.path.basename(name).startswith(".a.part-")
    assert (tmp_path / "a").read_bytes() == b"abc"


def test_errors_name_the_destination_and_its_folder_is_created(tmp_path: Path) -> None:
    """The name of the temporary file beside it would tell the user nothing."""
    atomic.write_file(tmp_path / "new" / "folders" / "a", b"abc")
    assert (tmp_path / "new" / "folders" / "a").read_bytes() == b"abc"
    with pytest.raises(IsADirectoryError) as caught:
        atomic.write_file(tmp_path / "new", b"abc")
    assert caught.value.filename == str(tmp_path / "new")
    long_name = tmp_path / ("a" * 245)  # as long as a name may be, without what a temporary one adds
    for stage in (atomic.staged_file, staged_folder):
        with pytest.raises(OSError, match="File name too long") as too_long, stage(long_name):
            pass
        assert too_long.value.filename == str(long_name)


def test_leftovers_of_a_killed_writer_are_removed_and_those_of_a_running_one_stay(tmp_path: Path) -> None:
    (tmp_path / ".a.part-killed").write_bytes(b"half")
    (tmp_path / ".ab.part-other").write_bytes(b"half")
    with atomic.staged_file(tmp_path / "a") as slow:
        slow.write(b"slow")
        atomic.write_file(tmp_path / "a", b"quick")
        assert (tmp_path / "a").read_bytes() == b"quick"
    assert (tmp_path / "a").read_bytes() == b"slow"
    with pytest.raises(TypeError):
        atomic.write_file(tmp_path / "a", "no bytes")  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ab.part-other", "a"]
    assert (tmp_path / "a").read_bytes() == b"slow"


@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
def test_files_folder_switch_and_parent_reach_the_disk_in_that_order(tmp_path: Path, calls: list, exists: bool) -> None:
    destination = tmp_path / "out"
    if exists:
        publish(destination, 1)
        calls.clear()
    publish(destination, 2)
    staging = os.path.dirname(calls[0][1])
    assert os.path.basename(staging).startswith(".out.staging-")
    written = {("fsync", f"{staging}/{name}", len(data)) for name, data in contents(2).items()}
    assert set(calls[: len(written)]) == written, "every file, at its full size"
    assert calls[len(written) :] == [
        ("fsync", staging, -1),
        ("switch", str(destination), -1),
        ("fsync", str(tmp_path), -1),
    ]
    assert snapshot(destination) == contents(2)


def test_a_destination_is_never_missing_while_it_is_replaced(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    publish(destination, 0)
    looks, missing, stop = 0, 0, threading.Event()

    def look() -> None:
        nonlocal looks, missing
        while not stop.is_set():
            looks += 1
            missing += not (destination / MANIFEST).exists()

    watcher = threading.Thread(target=look)
    watcher.start()
    for generation in range(25):
        publish(destination, generation)
    stop.set()
    watcher.join()
    assert (missing, looks > 25) == (0, True)


def test_two_concurrent_writers_leave_one_complete_bundle(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    writers = [
        context.Process(target=publish_often, args=(destination, generation, 25, barrier)) for generation in (1, 2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert snapshot(destination) in (contents(1), contents(2))
    assert os.listdir(tmp_path) == ["out"]


def test_many_writers_do_not_remove_each_others_new_folders(tmp_path: Path) -> None:
    failures: list[OSError] = []

    def stage() -> None:
        for _ in range(150):
            try:
                with staged_folder(tmp_path / "out") as folder:
                    (folder / "file").write_text("x")
            except OSError as err:
                failures.append(err)

    writers = [threading.Thread(target=stage) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failures == []


def test_the_folder_of_a_running_writer_stays_and_an_abandoned_one_is_removed(tmp_path: Path) -> None:
    abandoned = tmp_path / ".out.staging-abandoned"
    abandoned.mkdir()
    (abandoned / "model.onnx").write_text("torn")
    with staged_folder(tmp_path / "out") as running:
        (running / "file").write_text("still being written")
        with staged_folder(tmp_path / "out") as concurrent:
            assert not abandoned.exists()
            assert (running / "file").read_text() == "still being written"
            assert concurrent != running
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["out[1]", "*", "out?", "a b", "-rf", "ünïcode"])
def test_leftovers_are_removed_for_any_name_of_the_destination(tmp_path: Path, name: str) -> None:
    (tmp_path / f".{name}.staging-abandoned").mkdir()
    (tmp_path / ".other.staging-abandoned").mkdir()
    publish(tmp_path / name, 1)
    assert sorted(os.listdir(tmp_path)) == sorted([".other.staging-abandoned", name])


def test_a_failure_before_the_switch_changes_nothing(tmp_path: Path) -> None:
    publish(tmp_path / "out", 1)
    with pytest.raises(ZeroDivisionError), new_bundle(tmp_path / "out") as folder:  # noqa: PT012
        (folder / "model.onnx").write_text("half")
        raise ZeroDivisionError
    assert snapshot(tmp_path / "out") == contents(1)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [38, 22, 95], ids=["ENOSYS", "EINVAL", "ENOTSUP"])
def test_a_file_system_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    class OldSystem:
        def renameat2(self, *paths) -> int:
            return -1

    publish(tmp_path / "out", 1)
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *args, **kwargs: OldSystem())
    monkeypatch.setattr(atomic.ctypes, "get_errno", lambda: code)
    publish(tmp_path / "out", 2)
    assert snapshot(tmp_path / "out") == contents(2)
    assert os.listdir(tmp_path) == ["out"]


def test_a_refused_exchange_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "out", 1)
    monkeypatch.setattr(atomic.ctypes, "get_errno", lambda: 5)
    monkeypatch.setattr(atomic, "RENAME_EXCHANGE", 1 << 30)  # no such flag: the kernel itself refuses
    with pytest.raises(OSError, match="Input/output error"):
        publish(tmp_path / "out", 2)
    assert snapshot(tmp_path / "out") == contents(1)
    assert os.listdir(tmp_path) == ["out"]


def users_home(folder: Path) -> None:
    for name in (".ssh", "Documents"):
        (folder / name).mkdir(parents=True)
    (folder / ".bashrc").write_text("alias ll='ls -l'")


def users_notes(folder: Path) -> None:
    publish(folder, 1)
    (folder / "notes.txt").write_text("mine")


def users_folder_of_that_name(folder: Path) -> None:
    (folder / "engine.plan").mkdir(parents=True)
    (folder / "engine.plan" / "thesis.txt").write_text("mine")


def users_own_export(path: Path) -> None:
    """An export of another tool, with files of the same names."""
    path.mkdir()
    for name in ("model.onnx", "tokenizer.json"):
        (path / name).write_text("mine")


def users_file(path: Path) -> None:
    path.write_text("mine")


def everything(path: Path) -> list[tuple[str, bytes]]:
    return sorted((str(entry), entry.read_bytes() if entry.is_file() else b"") for entry in path.rglob("*"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (users_home, r"has '\.bashrc'"),
        (users_notes, r"has 'notes\.txt'"),
        (users_folder_of_that_name, r"has 'engine\.plan'"),
        (users_file, "is a file"),
        (users_own_export, r"is not empty and has no manifest\.json"),
    ],
)
def test_foreign_files_are_refused_and_not_touched(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "out")
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match=message):
        publish(tmp_path / "out", 2)
    assert everything(tmp_path) == before


def test_a_foreign_file_that_appears_during_an_export_is_not_removed(tmp_path: Path) -> None:
    publish(tmp_path / "out", 1)
    with pytest.raises(ConfigError, match=r"notes\.txt"), new_bundle(tmp_path / "out") as folder:  # noqa: PT012
        for name in FILES:
            (folder / name).write_bytes(contents(2)[name])
        (tmp_path / "out" / "notes.txt").write_text("mine")
        commit(folder, tmp_path / "out", make_manifest())
    assert snapshot(tmp_path / "out") == contents(1) | {"notes.txt": b"mine"}


def no_files(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / MANIFEST).write_bytes(b"\0"),
        lambda folder: (folder / MANIFEST).write_text('{"format_version": 0}'),
        lambda folder: (folder / "model.onnx.data").write_bytes(b""),
        lambda folder: (folder / "model.cpu.onnx").write_bytes(b"left from an older export"),
        lambda folder: (folder / "model.cpu.onnx").symlink_to("nowhere"),
        lambda folder: (folder / "truth.npz").write_bytes(b"of format version 3"),
        no_files,
    ],
    ids=["torn manifest", "older manifest", "emptied", "extra graph", "dangling link", "former file", "empty folder"],
)
def test_an_older_or_damaged_bundle_is_replaced(tmp_path: Path, damage) -> None:
    publish(tmp_path / "out", 1)
    damage(tmp_path / "out")
    publish(tmp_path / "out", 2)
    assert snapshot(tmp_path / "out") == contents(2)
    assert Bundle.open(tmp_path / "out").manifest.created == "2"


def test_a_link_to_a_bundle_stays_a_link(tmp_path: Path) -> None:
    publish(tmp_path / "real", 1)
    (tmp_path / "link").symlink_to("real")
    publish(tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink()
    assert snapshot(tmp_path / "real") == contents(2)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_flushes_no_folder_loses_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    flush = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with atomic.staged_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("content")
        atomic.move_into_place(folder, tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "content"


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    (tmp_path / ".file.part-abandoned").write_text("may be somebody's")
    atomic.write_file(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert (tmp_path / ".file.part-abandoned").exists()
    assert "has no locks" in caplog.text


def test_permissions_follow_the_umask_and_the_folders_group(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o2777)
    before = os.umask(0o002)
    try:
        with atomic.staged_folder(tmp_path / "shared" / "out") as folder:
            (folder / "file").write_text("x")
            atomic.move_into_place(folder, tmp_path / "shared" / "out")
        atomic.write_file(tmp_path / "shared" / "file", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "shared" / "out").stat().st_mode) == 0o2775
    assert stat.S_IMODE((tmp_path / "shared" / "file").stat().st_mode) == 0o664
