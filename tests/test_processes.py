"""An open Encoder in other processes (forked, spawned, pickled), and after it is closed."""

import copy
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy import Coalescer, Encoder, EngineError, InputTypeError
from tests.readme import ROOT

BATCH = ["hello world " * count for count in range(1, 40)]
FORK = """
import multiprocessing, sys, warnings
import numpy as np
from nvembed_deploy import Coalescer, Encoder, EngineError

warnings.simplefilter("ignore")
encoder = Encoder(sys.argv[1], device="cpu", backend=sys.argv[2], threads=2)
batch = ["hello world " * count for count in range(1, 40)]
expected = encoder.encode(batch)
coalescer = Coalescer(encoder)


def child(results):
    difference = float(np.abs(encoder.encode(batch) - expected).max())
    try:
        coalescer.submit(encoder.tokenize(["a"]))
        refused = ""
    except EngineError as err:
        refused = str(err)
    results.put((difference, refused))


context = multiprocessing.get_context("fork")
results = context.Queue()
process = context.Process(target=child, args=(results,))
process.start()
print(*results.get(timeout=60), sep="|")
process.join(10)
raise SystemExit(process.exitcode)
"""


def encode(encoder: Encoder) -> np.ndarray:
    return encoder.encode(BATCH)


def open_encoder(folder: Path, backend: str) -> Encoder:
    pytest.importorskip(backend)
    return Encoder(folder, device="cpu", backend=backend, threads=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_fork_opens_the_bundle_again(bundles: dict[str, Path], backend: str) -> None:
    """A runtime's threads do not survive a fork: without reopening, a batch in the child would wait forever."""
    pytest.importorskip(backend)
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(bundles["fp32"]), backend],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    difference, refused = done.stdout.strip().split("|")
    assert float(difference) <= 2e-6
    assert "was created in another process" in refused


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_pickled_and_copied(bundles: dict[str, Path], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundles["fp32"].parent)
    encoder = open_encoder(Path(bundles["fp32"].name), backend)  # a relative path
    expected = encoder.encode(BATCH)
    monkeypatch.chdir("/")
    for duplicate in (pickle.loads(pickle.dumps(encoder)), copy.deepcopy(encoder), copy.copy(encoder)):
        np.testing.assert_allclose(duplicate.encode(BATCH), expected, atol=2e-6)
        assert duplicate.backend == encoder.backend


def test_sent_to_a_spawned_process(bundles: dict[str, Path]) -> None:
    encoder = open_encoder(bundles["fp32"], "onnxruntime")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        np.testing.assert_allclose(pool.submit(encode, encoder).result(120), encoder.encode(BATCH), atol=2e-6)


def test_a_checkpoint_is_sent_too(bundles: dict[str, Path], checkpoint: Path) -> None:
    encoder = Encoder.from_checkpoint(checkpoint, like=Encoder(bundles["fp32"], device="cpu"))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(encoder)).encode("a"), encoder.encode("a"))


def test_closed(bundles: dict[str, Path]) -> None:
    with Encoder(bundles["fp32"], device="cpu") as encoder:
        name = encoder.backend
        assert encoder.encode("a").shape == (encoder.dimension,)
    for _ in range(2):
        with pytest.raises(EngineError, match="this Encoder was closed; open the bundle again"):
            encoder.encode("a")
        with pytest.raises(EngineError, match="was closed"):
            encoder.encode_rows(encoder.tokenize(["a"]))
        encoder.close()
    assert encoder.backend == name


def test_invalid_paths_are_named() -> None:
    with pytest.raises(InputTypeError, match="path is a NoneType; pass a bundle's folder"):
        Encoder(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_open_bundle_computes_what_was_checked(
    bundles: dict[str, Path], tmp_path: Path, backend: str, precision: str
) -> None:
    """Later changes in the folder, even in place as by `cp` and `rsync --inplace`, do not change vectors."""
    folder = Path(shutil.copytree(bundles[precision], tmp_path / "bundle"))
    encoder = open_encoder(folder, backend)
    expected = encoder.encode(BATCH)
    weights = folder / "model.onnx.data"
    with weights.open("r+b") as file:
        file.write(b"\0" * weights.stat().st_size)
    np.testing.assert_array_equal(encoder.encode(BATCH), expected)
    os.truncate(weights, 0)
    np.testing.assert_allclose(encoder.encode(BATCH * 3)[: len(BATCH)], expected, atol=2e-6)


def test_a_coalescer_reports_that_its_encoder_is_closed(bundles: dict[str, Path]) -> None:
    encoder = Encoder(bundles["fp32"], device="cpu")
    rows = encoder.tokenize(["a"])
    encoder.close()
    with Coalescer(encoder) as coalescer, pytest.raises(EngineError, match="was closed"):
        coalescer.submit(rows).result(30)
