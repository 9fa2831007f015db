"""Shared fixtures: a tiny checkpoint, its bundles, and the folder of golden vectors."""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from nvembed_deploy import Encoder, select_backend
from tests.readme import ROOT, run_readme
from tests.tiny import make_checkpoint

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
MEASURED_CHOICE = select_backend.fastest_cpu_runtime
"""The function that `no_choice` replaces, for the tests of it."""
HAS_RTX = importlib.util.find_spec("tensorrt_rtx_libs") is not None
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="TensorRT-RTX is not installed (no wheels for this platform)")


def pytest_configure() -> None:
    """Pins each of several workers to its own cores, since more threads than cores slow each other down."""
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: workers] or cores)


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests that use the fixture `browser`, and puts files with long tests first.

    Workers take one file each, in this order, so that no long file starts when the others have finished. The README's
    commands come first; the tests that read their bundles come last among the long ones.
    """
    for test in items:
        if "browser" in getattr(test, "fixturenames", ()):
            test.add_marker("browser")
    files: dict[Path, list[pytest.Item]] = {}
    for test in items:
        files.setdefault(test.path, []).append(test)

    def is_long(test: pytest.Item) -> bool:
        return any(test.get_closest_marker(name) for name in ("slow", "browser"))

    def rank(path: Path) -> tuple[bool, bool, bool, int]:
        return (
            path.name != "test_readme.py",
            not any(is_long(test) for test in files[path]),
            any("readme_folder" in getattr(test, "fixturenames", ()) for test in files[path]),
            -len(files[path]),
        )

    items[:] = [
        test for path in sorted(files, key=rank) for test in sorted(files[path], key=lambda test: not is_long(test))
    ]


@pytest.fixture(scope="session", autouse=True)
def one_trace_each() -> Iterator[None]:
    """Traces each graph once per worker, since tracing takes 96 % of a tiny export."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torch") is not None and importlib.util.find_spec("onnx_ir") is not None:
            _trace_once(patch)
        yield


def _trace_once(patch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from nvembed_deploy.export.graph import trace as graph

    # torch collects its 800 operators anew for each trace, a fifth of a tiny one; no export changes them.
    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))

    patch.setattr(graph, "_trace", functools.cache(graph._trace.__wrapped__))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps measurements made by tests out of the user's cache folder."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def no_choice() -> Iterator[None]:
    """Always chooses ONNX Runtime on CPUs, since which runtime is faster varies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_backend, "fastest_cpu_runtime", lambda *_, **__: ("onnxruntime", None))
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run see, and both runs of `make test-all`."""
    if "NVEMBED_TEST_SHARED" in os.environ:
        return Path(os.environ["NVEMBED_TEST_SHARED"])
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """Returns `path` once `make` has written it: the first worker that asks calls `make`, the others wait."""
    with FileLock(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            staging = path.with_name(f"{path.name}.making")
            shutil.rmtree(staging, ignore_errors=True)  # of a worker that failed
            make(staging)
            staging.rename(path)
    return path


@pytest.fixture(scope="session")
def checkpoint(shared: Path) -> Path:
    """A tiny random checkpoint in shards. Read only."""
    return made_once(shared / "nv-embed-tiny", make_checkpoint)


@pytest.fixture(scope="session")
def bundles(checkpoint: Path, shared: Path) -> dict[str, Path]:
    """A bundle of the tiny checkpoint in each precision, with plans where TensorRT-RTX is installed. Read only."""
    from nvembed_deploy.export.trt import main

    def export(precision: str) -> Path:
        flags = ["--model", str(checkpoint), "--precision", precision, "--max", "32x128"]

        def make(folder: Path) -> None:
            assert main([*flags, "--out", str(folder)]) == 0

        return made_once(shared / f"bundle-{precision}", make)

    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # workers begin at different ones
    order = PRECISIONS[worker % len(PRECISIONS) :] + PRECISIONS[: worker % len(PRECISIONS)]
    return {precision: export(precision) for precision in order}


@pytest.fixture(scope="session")
def readme_folder(shared: Path) -> Path:
    """The folder in which the README's commands and Python blocks were run, unchanged and in order. Read only."""
    return made_once(shared / "readme", run_readme)


@pytest.fixture
def bundle(bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the FP16 bundle, to be damaged."""
    return Path(shutil.copytree(bundles["fp16"], tmp_path / "bundle"))


@pytest.fixture(scope="session")
def encoder(bundles: dict[str, Path]) -> Encoder:
    """The FP32 bundle on the CPU."""
    return Encoder(bundles["fp32"], device="cpu")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Vectors made by NVIDIA's own code: the folder in NVEMBED_GOLDEN, or ../shared/golden/public."""
    folder = Path(os.environ.get("NVEMBED_GOLDEN", ROOT.parent / "shared" / "golden" / "public"))
    if not (folder / "golden.jsonl").is_file():
        pytest.skip(f"no golden data at {folder}; set NVEMBED_GOLDEN to the folder with golden.jsonl")
    return folder
