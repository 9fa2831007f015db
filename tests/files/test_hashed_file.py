"""Files that are hashed while they are written, with and without the page cache."""

import errno
import fcntl
import os
import resource
from pathlib import Path

import pytest

from nvembed_deploy.files import hashed_file
from nvembed_deploy.files.hashed_file import HashedFile
from nvembed_deploy.files.hashing import hash_file

PAGE = os.sysconf("SC_PAGESIZE")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed_file, "_DIRECT_BLOCK_BYTES", 4 * PAGE)


def write(path: Path, sizes: list[int], *, direct: bool) -> bytes:
    content = os.urandom(sum(sizes))
    with HashedFile(path, direct=direct) as file:
        start = 0
        for size in sizes:
            file.write(content[start : start + size])
            start += size
        file.drain()
    assert file.entry() == hash_file(path)
    return content


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize(
    "sizes",
    [[], [1], [PAGE], [4 * PAGE], [4 * PAGE, 1], [1000] * 50, [3, 9 * PAGE, 0, 8 * PAGE - 3], [7 * PAGE + 5] * 3],
    ids=lambda sizes: f"{len(sizes)}x{max(sizes, default=0)}",
)
def test_content_and_hash(tmp_path: Path, sizes: list[int], direct: bool) -> None:
    assert write(tmp_path / "file", sizes, direct=direct) == (tmp_path / "file").read_bytes()


def test_a_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object, command: int, *__: int) -> int:
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return 0

    monkeypatch.setattr(hashed_file.fcntl, "fcntl", refuse)
    assert write(tmp_path / "file", [5 * PAGE + 1] * 2, direct=True) == (tmp_path / "file").read_bytes()


def test_a_write_that_ends_within_a_page_is_continued(tmp_path: Path) -> None:
    class Short:
        """Writes a hundred bytes less than requested, once."""

        def __init__(self, file: object) -> None:
            self.file, self.calls = file, 0

        def fileno(self) -> int:
            return self.file.fileno()  # type: ignore[attr-defined]

        def write(self, content: memoryview) -> int:
            self.calls += 1
            if self.calls == 1:
                hashed_file.set_direct(self.file, False)  # type: ignore[arg-type]
                return self.file.write(content[:-100])  # type: ignore[attr-defined]
            return self.file.write(content)  # type: ignore[attr-defined]

    content = os.urandom(10 * PAGE + 17)
    with (tmp_path / "file").open("xb", buffering=0) as file:
        hashed_file.set_direct(file, True)
        writer = hashed_file.DirectWriter(Short(file))  # type: ignore[arg-type]
        writer.write(content)
        writer.finish()
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_a_full_disk_is_reported(tmp_path: Path, direct: bool) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * PAGE, limits[1]))  # Python ignores the signal: writing fails
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "file", [3 * PAGE + 1] * 9, direct=direct)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
