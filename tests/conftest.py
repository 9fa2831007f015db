"""Fixtures: a tiny checkpoint, its bundles, and where golden data may lie."""

import importlib.util
import os
from pathlib import Path

import pytest

from nvembed_deploy import Encoder
from tests.tiny import make_checkpoint

ROOT = Path(__file__).resolve().parent.parent
HAS_RTX = importlib.util.find_spec("tensorrt_rtx_libs") is not None
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="TensorRT-RTX is not installed (no wheels for this platform)")


def pytest_configure() -> None:
    """A worker of several keeps to its cores: programs with more threads than cores wait for each other."""
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: workers] or cores)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Measurements of tests are kept apart from the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def no_choice(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's runtime is ONNX Runtime: which one is faster is for tests/backends/test_ov.py, and else would vary."""
    if request.module.__name__.split(".")[-1] != "test_ov":
        monkeypatch.setattr("nvembed_deploy.backends.cpu_choice.choose", lambda *_, **__: ("onnxruntime", None))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint in shards."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "nv-embed-tiny")


@pytest.fixture(scope="session")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle of the tiny checkpoint in each precision, with plans where TensorRT-RTX is installed. Read only."""
    from export.trt import main

    folder = tmp_path_factory.mktemp("bundles")
    for precision in ("fp32", "fp16", "bf16", "int8"):
        out = folder / precision
        assert main(["--model", str(checkpoint), "--precision", precision, "--out", str(out), "--max", "32x128"]) == 0
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def bundle(bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the FP16 bundle, to be damaged."""
    import shutil

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
        pytest.skip(f"no golden data at {folder}; set NVEMBED_GOLDEN to the folder that holds golden.jsonl")
    return folder
