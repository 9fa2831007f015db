"""The archive for a device: packed, unpacked, built and run as its README describes, with TensorRT-RTX for TensorRT."""

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from nvembed_deploy import Encoder
from nvembed_deploy.bundle.manifest import GRAPH, MANIFEST
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.engines import pack as archive
from nvembed_deploy.engines.pack import (
    DEVICE_TARGETS,
    JETPACKS,
    JETSON_TENSORRT,
    TENSORRT_10_REQUIREMENTS,
    TENSORRT_11_REQUIREMENTS,
    main,
)
from nvembed_deploy.engines.portable_operators import require_portable, unsupported
from nvembed_deploy.errors import ExportError
from nvembed_deploy.export.trt import main as export
from tests.conftest import needs_rtx


@pytest.fixture(scope="module")
def packed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    flags = ["--precision", "int8", "--calibration-tokens", "2048", "--max", "8x128", "--out", str(folder / "tiny")]
    assert export(["--model", str(checkpoint), "--target", "jetson-orin", *flags]) == 0
    assert main([str(folder / "tiny")]) == 0
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["tiny-jetson-orin-jetpack6.tar"]
    return folder / "tiny-jetson-orin-jetpack6.tar"


@pytest.fixture
def device(packed: Path, tmp_path: Path) -> Path:
    with tarfile.open(packed) as tar:
        tar.extractall(tmp_path, filter="data")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-jetson-orin-jetpack6"]
    return tmp_path / "tiny-jetson-orin-jetpack6"


def run(device: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=device,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@needs_rtx
def test_the_instructions_for_the_device(packed: Path, device: Path) -> None:
    steps = (device / "README.md").read_text()
    assert "venv/bin/python -m nvembed_deploy build bundle --target jetson-orin" in steps
    location = run(device, "-c", "import nvembed_deploy; print(nvembed_deploy.__file__)")
    assert Path(location.stdout.strip()).parent == device / "nvembed_deploy"
    done = run(device, "-m", "nvembed_deploy", "build", "bundle", "--target", "rtx")
    assert done.returncode == 0, done.stderr
    assert "parity of the graph passed" in done.stderr
    manifest = Bundle.open(device / "bundle").manifest
    assert (manifest.precision.value, manifest.target, manifest.parity[0].tolerance.min_overlap) == (
        "int8",
        "rtx",
        0.95,
    )
    similarity = run(device, "-m", "nvembed_deploy", "similarity", "bundle", "--device", "cpu")
    assert similarity.returncode == 0, similarity.stderr
    # The figures of a board: `bench` needs nothing that is not in the archive.
    assert "venv/bin/python -m nvembed_deploy bench bundle --device cuda --out bench.json" in steps
    bench = ("bench", "bundle", "--device", "cpu", "--texts", "2", "--repeats", "2", "--out", "bench.json")
    measured = run(device, "-m", "nvembed_deploy", *bench)
    assert measured.returncode == 0, measured.stderr
    assert json.loads((device / "bench.json").read_text())["sides"][0]["texts_per_second"] > 0
    expected = Encoder(packed.parent / "tiny", device="cpu").encode(["a text"])
    np.testing.assert_array_equal(expected, Encoder(device / "bundle", device="cpu").encode(["a text"]))


def test_contents(device: Path) -> None:
    assert not (device / "bundle" / "engine.plan").exists()
    assert (device / "requirements.txt").read_text().splitlines() == list(TENSORRT_10_REQUIREMENTS)
    names = {path.relative_to(device).as_posix() for path in device.rglob("*.py")}
    assert {"nvembed_deploy/engines/build.py", "nvembed_deploy/backends/trt.py", "nvembed_deploy/serve/api.py"} <= names
    sources = [path.read_text() for path in device.rglob("*.py")]
    assert not [text for text in sources if re.search(r"^(import|from) torch", text, flags=re.MULTILINE)]
    assert not [name for name in names if "/training/" in name or "/export/" in name]


def test_every_module_that_is_imported_is_packed(device: Path) -> None:
    """The library installed here would stand in for one that is missing."""
    for path in sorted((device / "nvembed_deploy").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("nvembed_deploy."):
                module = device.joinpath(*str(node.module).split("."))
                assert module.with_suffix(".py").is_file() or (module / "__init__.py").is_file(), (path, node.module)


def test_the_packed_library_installs(device: Path, tmp_path: Path) -> None:
    """`pip install .` reads the pyproject.toml of the archive."""
    done = run(device, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "wheel"), ".")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "wheel").glob("nvembed_deploy-*.whl"))) == 1


def test_a_finished_bundle_is_packed_without_its_plan(bundles: dict[str, Path], tmp_path: Path) -> None:
    before = (bundles["fp16"] / MANIFEST).read_bytes()
    assert main([str(bundles["fp16"]), "--target", "h100", "--archive", str(tmp_path / "x.tar")]) == 0
    assert (bundles["fp16"] / MANIFEST).read_bytes() == before
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert not [name for name in tar.getnames() if name.endswith("engine.plan")]
        tar.extractall(tmp_path, filter="data")
    assert Bundle.open(tmp_path / "x" / "bundle").manifest.plan is None
    assert (tmp_path / "x" / "requirements.txt").read_text().splitlines() == list(TENSORRT_11_REQUIREMENTS)


@needs_rtx
def test_an_archive_for_jetpack_7(
    bundles: dict[str, Path], packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One archive has one graph: the fused one with a newer TensorRT, or the portable one."""
    fused = tmp_path / "fused.tar"
    assert main([str(bundles["fp16"]), "--target", "jetson-orin", "--archive", str(fused)]) == 0
    with tarfile.open(fused) as tar:
        tar.extractall(tmp_path, filter="data")
    device = tmp_path / "fused"
    requirements = (device / "requirements.txt").read_text().splitlines()
    assert requirements == [*TENSORRT_11_REQUIREMENTS, JETSON_TENSORRT]
    assert "jetson-orin with JetPack 7.2.2 or newer" in (device / "README.md").read_text()
    done = run(device, "-m", "nvembed_deploy", "build", "bundle", "--target", "rtx")
    assert done.returncode == 0, done.stderr
    assert Bundle.open(device / "bundle").manifest.opset == 23
    assert main([str(packed.parent / "tiny"), "--jetpack", "7"]) == 0
    assert Path(capsys.readouterr().out.strip()).name == "tiny-jetson-orin-jetpack7.tar"
    with tarfile.open(packed.parent / "tiny-jetson-orin-jetpack7.tar") as tar:
        content = tar.extractfile("tiny-jetson-orin-jetpack7/requirements.txt")
        assert content is not None
        assert content.read().decode().splitlines() == list(TENSORRT_11_REQUIREMENTS)


def test_every_jetson_has_a_jetpack() -> None:
    jetsons = {name for name in DEVICE_TARGETS if name.startswith("jetson")}
    assert jetsons == {name for jetpack in JETPACKS.values() for name in jetpack.targets}


def test_bundles_that_cannot_be_packed_are_refused(
    bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        main([str(bundles["fp16"]), "--target", "rtx"])  # its plan is built where the bundle is exported
    assert "invalid choice: 'rtx'" in capsys.readouterr().err
    assert main([str(bundles["fp16"])]) == 1
    assert (
        "was exported for --target rtx, whose plan is built on any machine: copy the folder, or pass --target"
        in capsys.readouterr().err
    )
    for flags, words in (
        (["tensorrt10"], "has the fused dialect (opset 23), which --target tensorrt10 does not support"),
        (["jetson-orin", "--jetpack", "6"], "which JetPack 6 does not support; pass --jetpack 7, or export it again: "),
        (["jetson-thor", "--jetpack", "6"], "--target jetson-thor has no JetPack 6; pass --jetpack 7"),
        (["h100", "--jetpack", "7"], "--jetpack is for Jetsons, and --target is h100; leave it out"),
        (["h100", "--archive", "x.tar.gz"], "--archive x.tar.gz: archives are uncompressed tar files"),
    ):
        assert main([str(bundles["fp16"]), "--target", *flags]) == 1
        assert words in capsys.readouterr().err
    assert main([str(tmp_path / "none")]) == 1
    assert "does not exist" in capsys.readouterr().err
    out = tmp_path / "x.tar"
    out.write_text("before")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive, "_add_bundle", fail)
    assert main([str(bundles["fp16"]), "--target", "h100", "--archive", str(out)]) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
    assert out.read_text() == "before"


def graph_of(path: Path, *nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT, opset: int = 20, **constants) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", kind, [2, 3])],
        [helper.make_tensor_value_info("y", kind, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), path)
    return path


def test_operators_that_tensorrt_10_does_not_parse(bundles: dict[str, Path], tmp_path: Path) -> None:
    path, node, zero = tmp_path / GRAPH, helper.make_node, np.zeros(1, np.int8)
    problems = set(unsupported(bundles["fp16"] / GRAPH))
    assert {"opset 23, above 20", "operator Attention", "operator RMSNormalization"} <= problems
    scale = np.ones((), np.float32)
    for nodes, extra, words in (
        ((node("NonZero", ["x"], ["y"]),), {}, ["operator NonZero"]),
        ((node("Sqrt", ["x"], ["y"]),), {"kind": TensorProto.DOUBLE}, ["Sqrt of DOUBLE"]),
        ((node("Sqrt", ["x"], ["y"], domain="com.own"),), {}, ["operator Sqrt"]),
        (
            (node("Shape", ["x"], ["s"]), node("ReduceSum", ["x", "s"], ["y"])),
            {},
            ["ReduceSum with computed axes"],
        ),
        (
            (node("QuantizeLinear", ["x", "scale", "zero"], ["y"]),),
            {"scale": scale, "zero": zero[0] + np.int8(3)},
            ["QuantizeLinear with a zero point"],
        ),
        ((node("QuantizeLinear", ["x", "scale", "zero"], ["y"]),), {"scale": scale, "zero": zero[0]}, []),
        ((node("Add", ["x", "x"], ["y"]),), {}, []),
    ):
        assert list(unsupported(graph_of(path, *nodes, **extra))) == words
    with pytest.raises(ExportError, match=r"cannot parse model\.onnx: .*Attention.*Export with --dialect portable"):
        require_portable(bundles["fp16"] / GRAPH)
