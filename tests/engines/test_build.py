"""Building the plan of a bundle on the device; TensorRT-RTX takes the place of the device's TensorRT."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy import Encoder
from nvembed_deploy.bundle.manifest import GRAPH, MANIFEST, PLAN, REFERENCE_OUTPUTS, WEIGHTS
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.engines import build, targets
from nvembed_deploy.engines.targets import SINGLE_QUERIES, TARGETS
from nvembed_deploy.errors import ConfigError, EngineError
from nvembed_deploy.parity.probes import ReferenceOutputs
from nvembed_deploy.spec import Shape
from tests.bundle.test_reader import snapshot
from tests.conftest import ROOT, needs_rtx
from tests.engines.test_plan_builder import FakeTensorRT
from tests.test_loading import rebuild

JETSON = ["--target", "jetson-orin", "--max", "8x128"]


@pytest.fixture(scope="module")
def portable(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for a Jetson, without a plan: only the Jetson itself can build one."""
    from nvembed_deploy.export.trt import main

    out = tmp_path_factory.mktemp("portable") / "bundle"
    assert main(["--model", str(checkpoint), "--precision", "fp16", "--out", str(out), *JETSON]) == 0
    assert Bundle.open(out).manifest.plan is None
    return out


@pytest.fixture
def copy(portable: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(portable, tmp_path / "bundle"))


@needs_rtx
def test_the_plan_is_built_checked_and_added(
    portable: Path, copy: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.parent)
    assert build.main(["bundle", "--target", "rtx"]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == str(copy)
    assert "comparing ONNX with PyTorch" in err
    assert re.search(
        r"done: .*bundle, engine\.plan [\d.]+ MB for rtx, in \d+ s\nparity of the graph passed, the plan", err
    )
    manifest = Bundle.open(copy).manifest
    assert (manifest.target, manifest.plan.profiles) == ("rtx", (manifest.profile, SINGLE_QUERIES))
    assert manifest.profile.max.tokens == 128  # not longer than the probes that were compared
    assert manifest.parity[0].reference.startswith("PyTorch")
    before, after = snapshot(portable), snapshot(copy)
    assert all(after[name] == content for name, content in before.items() if name != MANIFEST)
    vectors = Encoder(copy, device="cpu").encode(["a", "b c"])
    np.testing.assert_array_equal(vectors, Encoder(portable, device="cpu").encode(["a", "b c"]))


@needs_rtx
def test_a_new_bundle_leaves_the_old_one(portable: Path, tmp_path: Path) -> None:
    before = snapshot(portable)
    out = build.build(portable, TARGETS["rtx"], out=tmp_path / "new")
    assert snapshot(portable) == before
    assert Bundle.open(out).manifest.plan is not None


@needs_rtx
def test_an_engine_with_wrong_vectors_does_not_replace_the_bundle(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For example, if the graph and the reference vectors are from different models."""
    reference = ReferenceOutputs.from_bytes((copy / REFERENCE_OUTPUTS).read_bytes())
    rebuild(
        copy, copy, {REFERENCE_OUTPUTS: replace(reference, vectors=np.roll(reference.vectors, 1, axis=0)).to_bytes()}
    )
    before = snapshot(copy)
    assert build.main([str(copy), "--target", "rtx"]) == 1
    assert re.search(r"error: .* differs from PyTorch .*: cosine", capsys.readouterr().err)
    assert snapshot(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["bundle"]


@needs_rtx
def test_a_build_without_reference_vectors_is_reported(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nvembed_deploy.export.to_onnx import main

    out = tmp_path / "bundle"
    assert main(["--model", str(checkpoint), "--weights", "reference", "--no-parity", "--out", str(out)]) == 0
    assert build.main([str(out), "--target", "rtx"]) == 0
    assert "parity NOT checked: the bundle was exported with --no-parity" in capsys.readouterr().err
    manifest = Bundle.open(out).manifest
    assert manifest.parity == ()
    assert manifest.referenced
    assert all(os.path.samefile(out / name, checkpoint / name) for name in manifest.referenced)


def test_impossible_builds_are_refused_with_the_reason(
    bundles: dict[str, Path], copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    orin = TARGETS["jetson-orin"]
    with pytest.raises(ConfigError, match=r"fused dialect \(opset 23\), .* supports up to opset 20"):
        build.build(bundles["fp16"], TARGETS["tensorrt10"])
    old = type("Old", (), {"__version__": "10.0.1"})
    monkeypatch.setattr("nvembed_deploy.engines.targets.load_bindings", lambda name: old)
    with pytest.raises(EngineError, match=r"needs tensorrt 10\.3 or newer, and 10\.0\.1 is installed; update it"):
        build.build(copy, orin)
    monkeypatch.undo()
    assert build.main([str(copy.parent)]) == 1
    assert "has no manifest.json" in capsys.readouterr().err
    assert build.main([str(copy), "--target", "rtx", "--max", "4x9999"]) == 1
    assert "--max 4x9999 is too long: the model supports up to 2048 tokens" in capsys.readouterr().err
    assert build.main([str(copy), "--target", "rtx", "--strip-weights"]) == 1
    assert "needs a GPU to be built" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build.main([str(copy), "--max", "many"])
    (copy / WEIGHTS).write_bytes(b"x" * (copy / WEIGHTS).stat().st_size)
    assert build.main([str(copy), "--target", "rtx"]) == 1
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["10.3.0", "11.4.1"])
def test_the_dialect_that_a_jetsons_tensorrt_supports(
    bundles: dict[str, Path],
    portable: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """JetPack 6 has TensorRT 10; JetPack 7.2.2 may have 11.4.1, which parses both dialects."""
    fake = FakeTensorRT()
    fake.__version__ = version
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(targets, "load_bindings", lambda name: fake)
    for module in (targets, build):
        monkeypatch.setattr(module, "local_compute_capability", lambda: "8.7")

    def build_for_orin(bundle: Path) -> str:
        out = build.build(bundle, targets.choose_target("jetson-orin"), out=tmp_path / bundle.name)
        assert Bundle.open(out).manifest.plan.version == version
        return capsys.readouterr().err

    if version == "10.3.0":
        words = (
            r"supports from TensorRT 11\.4 on, and 10\.3\.0 is installed; install that .* --dialect portable, pack it"
        )
        with pytest.raises(ConfigError, match=words):
            build_for_orin(bundles["fp16"])
        assert "note: TensorRT" not in build_for_orin(portable)
    else:
        assert "note: TensorRT" not in build_for_orin(bundles["fp16"])
        assert "note: TensorRT 11.4.1 also supports the fused dialect on this device" in build_for_orin(portable)


def test_a_plan_for_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """DGX Spark has an Arm processor, and any of those builds its plan."""
    spark, fake = TARGETS["spark-rtx"], FakeTensorRT()
    fake.__version__ = "1.7.1.116"
    monkeypatch.setattr(targets, "load_bindings", lambda name: fake)
    monkeypatch.setattr(targets, "this_platform", lambda: "linux_x86_64")
    with pytest.raises(
        EngineError, match=r"on linux_aarch64, and this machine is linux_x86_64; .* --target spark-rtx$"
    ):
        targets.load_runtime(spark)
    monkeypatch.setattr(targets, "this_platform", lambda: "linux_aarch64")
    assert targets.load_runtime(spark) is fake
    monkeypatch.setattr(targets, "local_compute_capability", lambda: "12.1")
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)  # TensorRT itself is not installed
    assert targets.choose_target("auto") is spark


@pytest.mark.parametrize(
    ("target", "capability", "oldest", "too_old"),
    [("datacenter", "10.7", "11.3", "11.2.0"), ("tensorrt10", "12.0", "10.8", "10.7.0")],
)
def test_a_gpu_that_needs_a_newer_tensorrt_than_its_target(
    monkeypatch: pytest.MonkeyPatch, target: str, capability: str, oldest: str, too_old: str
) -> None:
    fake = FakeTensorRT()
    monkeypatch.setattr(targets, "load_bindings", lambda name: fake)
    monkeypatch.setattr(targets, "local_compute_capability", lambda: capability)
    fake.__version__ = f"{oldest}.0"
    assert targets.load_runtime(TARGETS[target]) is fake
    fake.__version__ = too_old
    message = rf"--target {target} needs tensorrt {re.escape(oldest)} or newer, and {re.escape(too_old)} is"
    with pytest.raises(EngineError, match=message):
        targets.load_runtime(TARGETS[target])


@pytest.mark.parametrize(
    ("max_shape", "expected"),
    [(None, "16x128"), (Shape(batch=40, tokens=128), "40x128"), (Shape(batch=4, tokens=256), "4x256")],
)
def test_shapes_are_the_targets_limited_by_the_bundles(portable: Path, max_shape: Shape | None, expected: str) -> None:
    manifest = Bundle.open(portable).manifest
    bundle_profile = replace(manifest.profile, max=Shape(batch=16, tokens=128))
    profile = build._profile(TARGETS["h100"], replace(manifest, profile=bundle_profile), max_shape)
    assert str(profile.max) == expected
    assert profile.opt.batch <= profile.max.batch
    assert profile.opt.tokens <= profile.max.tokens


@needs_rtx
def test_too_little_memory_is_reported_first(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "available_memory_bytes", lambda: 2**20)
    assert build.main([str(copy), "--target", "rtx"]) == 1
    assert "needs about 0.4 GiB of memory, but only 0.0 GiB are free" in capsys.readouterr().err
    assert not (copy / PLAN).exists()
    assert build.main([str(copy), "--target", "rtx", "--force"]) == 0
    assert "building anyway because of --force" in capsys.readouterr().err


@needs_rtx
def test_a_plan_too_short_to_compare_is_refused_before_it_is_built(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main([str(copy), "--target", "rtx", "--max", "4x12"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert (
        "reference texts have at most 12 tokens, the longest input of this engine, and a comparison needs" in lines[0]
    )
    assert "export the bundle again with --max BATCHx12" in lines[0]
    assert not (copy / PLAN).exists()


@needs_rtx
def test_a_device_needs_no_torch(copy: Path) -> None:
    code = (
        "import sys, nvembed_deploy.engines.build as build; build.main([sys.argv[1], '--target', 'rtx']); import json\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(copy)], capture_output=True, text=True, check=True, timeout=120, cwd=ROOT
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "transformers", "onnx", "onnxscript", "safetensors", "export"}
    assert (copy / PLAN).is_file()
    assert (copy / GRAPH).is_file()
