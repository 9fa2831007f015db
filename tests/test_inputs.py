"""Inputs that users pass to `encode` (tables, columns, arrays), and the machines that they use."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy import Coalescer, ConfigError, Encoder, EngineError, InputTypeError, select_backend, system
from nvembed_deploy.backends import no_telemetry
from nvembed_deploy.console import run
from nvembed_deploy.files.json_lines import read_rows
from tests.readme import ROOT

TEXTS = ["a first text", "another", ""]


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_tables_are_refused_and_their_columns_accepted(encoder: Encoder, library: str) -> None:
    module = pytest.importorskip(library)
    columns = {"text": TEXTS}
    table = module.table(columns) if library == "pyarrow" else module.DataFrame(columns)
    for rows in (table, table[:0]):
        with pytest.raises(InputTypeError, match=r"texts is a table \(.*\); pass one of its columns"):
            encoder.encode(rows)
    np.testing.assert_array_equal(encoder.encode(table["text"]), encoder.encode(TEXTS))
    if library == "pyarrow":
        np.testing.assert_array_equal(encoder.encode(module.array(TEXTS)), encoder.encode(TEXTS))


def test_a_series_is_checked_completely_before_any_work(encoder: Encoder) -> None:
    pandas = pytest.importorskip("pandas")
    for texts in (pandas.Series(["a"] * 5000 + [None]), dict(enumerate(["a"] * 5000 + [None])).values()):
        with pytest.raises(InputTypeError, match=r"text 5000 is a (NoneType|float)"):
            encoder.encode_stream(texts)
    with pytest.raises(InputTypeError, match=r"text 5000 is a (NoneType|float)"):
        list(encoder.encode_stream(iter(["a"] * 5000 + [None])))  # a generator: when it is reached


def test_arrays_without_dimensions_and_arrays_of_rows(encoder: Encoder) -> None:
    with pytest.raises(InputTypeError, match=r"an array without dimensions \(ndarray\); pass a list of str"):
        encoder.encode(np.array("abc"))
    for rows in (["abc"], (row for row in encoder.tokenize(["a"])), None):
        with pytest.raises(InputTypeError, match="rows were not returned by `tokenize`"):
            encoder.encode_rows(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [0, -1, 1025, 10**12, True, 2.0])
def test_impossible_thread_counts_are_refused(bundles: dict[str, Path], threads: object) -> None:
    with pytest.raises(ConfigError, match="pass a whole number from 1 to 1024"):
        Encoder(bundles["fp32"], device="cpu", threads=threads)  # type: ignore[arg-type]


def test_json_lines_with_a_byte_order_mark_and_with_too_much_nesting(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert list(read_rows(path)) == [{"text": "a"}]
    path.write_text('{"text": "a"}\n' + "[" * 100_000)
    with pytest.raises(ConfigError, match="line 2: not JSON"):
        list(read_rows(path))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_utf_8_gets_escapes(bundles: dict[str, Path], encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nvembed_deploy", "similarity", str(bundles["fp32"]), "--device", "cpu",
         "--query", "déjà vu 日本?", "--passage", "été"],
        cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\\u65e5" in done.stdout


def test_relative_cache_folders_are_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/cache")
    assert system.cache_folder() == tmp_path / ".cache" / "nvembed-deploy"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "absolute"))
    assert system.cache_folder() == tmp_path / "absolute" / "nvembed-deploy"


def test_the_smallest_limit_of_all_control_groups_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A version 2 group inside one with a smaller limit, and a version 1 group."""

    def write(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\n")

    version_2 = ("memory.max", "memory.current", "inactive_file")
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    monkeypatch.setattr(system, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(system, "PROCESS_GROUPS", tmp_path / "process")
    (tmp_path / "process").write_text("0::/slice/service\n3:memory:/docker/one\n")
    write(tmp_path / "cgroup" / "slice" / "service", version_2, "max", 100, 0)
    write(tmp_path / "cgroup" / "slice", version_2, "5000", 1000, 300)
    assert system.available_memory_bytes() == 4300
    write(tmp_path / "cgroup" / "memory" / "docker" / "one", version_1, "3000", 1000, 100)
    assert system.available_memory_bytes() == 2100


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"slice/service/cpu.max": "max 100000", "slice/cpu.max": "150000 100000"}, 2),
        ({"slice/service/cpu.max": "50000 100000", "slice/cpu.max": "400000 100000"}, 1),
        ({"cpu,cpuacct/docker/cpu.cfs_quota_us": "300000", "cpu,cpuacct/docker/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_a_container_limits_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], limit: int | None
) -> None:
    """Both versions of control groups, the smallest of all parents."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    monkeypatch.setattr(system, "CGROUP", tmp_path)
    monkeypatch.setattr(system, "PROCESS_GROUPS", tmp_path / "process")
    (tmp_path / "process").write_text("0::/slice/service\n4:cpu,cpuacct:/docker\n")
    assert system.cpu_limit() == limit
    monkeypatch.setattr(system, "_usable_processors", lambda: set(range(8)))
    assert system.usable_cores() == (limit or 8)


def test_logical_processors_of_a_core_count_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(system, "CPU_TOPOLOGY", tmp_path)
    monkeypatch.setattr(system, "cpu_limit", lambda: None)
    monkeypatch.setattr(system, "_usable_processors", lambda: {0, 1, 2, 3, 4})
    for number, core in enumerate(["0,2", "1,3", "0,2", "1,3"]):  # nothing is known of the fifth
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core}\n")
    assert system.usable_physical_cores() == 3


ONE_CORE = """
import os, sys
from pathlib import Path
core = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {core})
from nvembed_deploy import Encoder
for runtime in ("onnxruntime", "openvino"):
    encoder = Encoder(sys.argv[1], device="cpu", backend=runtime)
    encoder.encode(["a"] * 8)
    allowed = {frozenset(os.sched_getaffinity(int(thread.name))) for thread in Path("/proc/self/task").iterdir()}
    assert allowed == {frozenset({core})}, (runtime, allowed)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux limits a process to cores")
def test_no_thread_leaves_the_cores_of_its_process(bundles: dict[str, Path]) -> None:
    """As a container with a set of cores, Ray and taskset give it; ONNX Runtime's default counts the machine's."""
    subprocess.run([sys.executable, "-c", ONE_CORE, str(bundles["fp32"])], check=True)


def test_a_folder_with_the_name_of_a_package_is_not_mistaken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not system.is_installed("no_such_package")
    assert system.is_installed("numpy")
    assert system.installed_versions(["no_such_package"]) == {}


def test_an_old_onnxruntime_is_reported_with_the_fix(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_backend, "onnxruntime_version", lambda: "1.23.2")
    with pytest.warns(UserWarning, match=r"ONNX Runtime 1\.23\.2 runs FP16 graphs .* --dialect portable"):
        Encoder(bundles["fp16"], device="cpu", backend="onnxruntime")
    with pytest.raises(EngineError, match=r"cannot load a quantized graph in the fused dialect; .* --dialect portable"):
        Encoder(bundles["int8"], device="cpu", backend="onnxruntime")
    Encoder(bundles["fp32"], device="cpu", backend="onnxruntime")


def test_a_user_without_a_home_can_embed(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with no_telemetry.without_openvino_telemetry():
        pass
    assert Encoder(bundles["fp32"], device="cpu").encode("a").shape == (32,)


def test_a_process_that_may_start_no_threads_says_so(
    bundles: dict[str, Path], encoder: Encoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for start in (lambda: Encoder(bundles["fp32"], device="cpu"), lambda: Coalescer(encoder)):
        with pytest.raises(EngineError, match="cannot start more threads; raise the limit"):
            start()
    assert run(lambda: ThreadPoolExecutor().submit(int).result()) == 1
    assert "error: this process cannot start more threads" in capsys.readouterr().err
