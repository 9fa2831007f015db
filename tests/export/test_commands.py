"""The export commands as a user types them, and common mistakes."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from nvembed_deploy import ConfigError, Encoder, ExportError, MissingExtra
from nvembed_deploy.bundle.manifest import CPU_GRAPH, GRAPH, MANIFEST, PLAN
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.engines import check
from nvembed_deploy.export import options, to_onnx, trt
from nvembed_deploy.export.forecast import forecast, require_room
from nvembed_deploy.export.graph.weights import CheckpointWeights
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.model.text_contract import text_contract
from nvembed_deploy.model.weights import StoredWeights
from nvembed_deploy.spec import Shape, ShapeProfile
from nvembed_deploy.version import __version__
from tests.conftest import ROOT, needs_rtx
from tests.tiny import make_checkpoint


def parsed(*arguments: str) -> options.ExportOptions:
    parser = argparse.ArgumentParser()
    options.add_flags(parser)
    return options.from_flags(parser.parse_args(arguments))


def test_a_graph_for_another_machine_does_not_depend_on_this_ones_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvembed_deploy.engines.targets.local_compute_capability", lambda: "8.6")
    parser = argparse.ArgumentParser()
    options.add_flags(parser)
    flags = parser.parse_args(["--target", "datacenter", "--precision", "fp8"])
    with pytest.raises(ConfigError, match="needs a GPU of compute capability"):
        options.from_flags(flags)
    flags.onnx_only = True
    assert "9.0" in options.from_flags(flags).target.compute_capabilities


def test_losing_files_is_refused_before_any_work(
    checkpoint: Path, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for flags, message in (
        (["--out", "."], "--out . is the working directory or a folder above it"),
        (["--out", ".."], "--out .. is the working directory or a folder above it"),
        (["--precision", "int8", "--calibration", "none.jsonl"], "none.jsonl cannot be read"),
    ):
        assert trt.main(["--model", str(checkpoint), *flags]) == 1
        stderr = capsys.readouterr().err
        assert message in stderr
        assert "reading the checkpoint" not in stderr
    out = Path(shutil.copytree(bundles["fp16"], tmp_path / "bundle"))
    if (out / PLAN).is_file():
        for flags in (["--onnx-only"], ["--target", "jetson-orin"]):
            assert trt.main(["--model", str(checkpoint), "--out", str(out), *flags]) == 1
            assert "contains a bundle with a plan, which would be lost" in capsys.readouterr().err
    assert (out / MANIFEST).read_bytes() == (bundles["fp16"] / MANIFEST).read_bytes()


def test_a_target_is_in_the_default_name(checkpoint: Path) -> None:
    assert options_of(checkpoint).out == Path("bundles") / "nv-embed-tiny-fp16"
    assert options_of(checkpoint, "--target", "h100").out == Path("bundles") / "nv-embed-tiny-fp16-h100"


def options_of(checkpoint: Path, *flags: str) -> options.ExportOptions:
    parser = argparse.ArgumentParser()
    options.add_flags(parser)
    return options.from_flags(parser.parse_args(["--model", str(checkpoint), *flags]))


def arguments(checkpoint: Path, out: Path, *flags: str) -> list[str]:
    return ["--model", str(checkpoint), "--out", str(out), *flags]


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_bundle(bundles: dict[str, Path], precision: str) -> None:
    manifest = Bundle.open(bundles[precision]).manifest
    assert manifest.precision == precision
    assert manifest.plan is not None
    assert manifest.plan.runtime == "tensorrt_rtx"
    assert manifest.files[PLAN].bytes > 100_000
    assert (bundles[precision] / PLAN).read_bytes()[1:4] == b"trt"
    assert str(manifest.profile) == "1x1 .. 8x64 .. 32x128"
    assert [report.passed for report in manifest.parity] == [True]
    assert manifest.source.files.keys() >= {"config.json", "tokenizer.json", "model-00001-of-00002.safetensors"}
    assert str(ROOT) not in (bundles[precision] / "manifest.json").read_text()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_a_graph_away_from_its_manifest_says_what_it_is(bundles: dict[str, Path], precision: str) -> None:
    for path in bundles[precision].glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        assert {entry.key: entry.value for entry in model.metadata_props} == {
            "model": "nv-embed-tiny",
            "family": "NV-Embed",
            "precision": precision,
            "mask": "bidirectional",
            "pooling": "latent attention, masked mean, L2",
        }
        assert model.ir_version == onnx.helper.find_min_ir_version_for(model.opset_import)
        assert (model.producer_name, model.producer_version) == ("nvembed-deploy", __version__)


def test_the_same_export_writes_the_same_graph(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert to_onnx.main(arguments(checkpoint, tmp_path / name, "--no-parity", "--precision", "bf16")) == 0
    for name in (GRAPH, CPU_GRAPH):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_last_line_is_the_bundle(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    assert to_onnx.main(arguments(checkpoint, out, "--precision", "fp32")) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    done, parity, next_command = captured.err.splitlines()[-3:]
    assert re.fullmatch(rf"done: {out}, fp32 without a plan, \d+ MB, in \d+ s, peak memory [\d.]+ GiB", done)
    assert re.fullmatch(r"parity passed \(lowest cosine to PyTorch 1\.0\d+, at least 0\.\d+ required; .*\)", parity)
    assert re.fullmatch(rf"next: .*similarity {out}", next_command)
    Encoder(out / "model.onnx", device="cpu").encode("water")


def test_a_short_profile_is_compared_on_truncated_texts(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert trt.main(arguments(checkpoint, out, "--precision", "fp32", "--max", "4x6")) == 0
    assert "17 texts up to 6 tokens)" in capsys.readouterr().err
    assert check.main([str(out), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["texts"] == 17


def test_failed_gate_leaves_the_old_bundle(
    checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}

    def damaged(self: CheckpointWeights, name: str, *, rows: tuple[int, int] | None = None) -> object:
        tensor = read(self, name, rows=rows)
        return tensor * 1.05 if name == "embedding_model.layers.0.self_attn.v_proj.weight" else tensor

    read = CheckpointWeights.read
    monkeypatch.setattr(CheckpointWeights, "read", damaged)
    assert trt.main(arguments(checkpoint, bundle, "--precision", "fp32")) == 1
    assert "error: onnxruntime" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_skipped_gate_is_reported(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert to_onnx.main(arguments(checkpoint, tmp_path / "b", "--precision", "fp32", "--no-parity", "--no-fold")) == 0
    assert "parity NOT checked" in capsys.readouterr().err
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.parity == ()
    assert not manifest.folded


def test_without_the_targets_tensorrt_only_the_graph_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a platform without wheels the ONNX bundle is written, and a message says what a plan needs."""

    def missing(runtime: str) -> None:
        raise MissingExtra(f"{runtime} is not installed here; pip install 'nvembed-deploy[rtx]'")

    monkeypatch.setattr("nvembed_deploy.engines.targets.load_bindings", missing)
    assert trt.main(arguments(checkpoint, tmp_path / "b", "--target", "rtx")) == 0
    captured = capsys.readouterr().err
    assert "no engine.plan was built: tensorrt_rtx is not installed here; pip install" in captured
    assert Bundle.open(tmp_path / "b").manifest.plan is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Encoder(tmp_path / "b")  # a machine without a GPU has nothing to lose
    monkeypatch.setattr("nvembed_deploy.select_backend._has_gpu", lambda: True)
    with pytest.warns(UserWarning, match=r"engine\.plan is not used: the bundle has no plan"):
        Encoder(tmp_path / "b")


def test_a_target_for_another_machine_writes_only_the_graph(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trt.main(arguments(checkpoint, tmp_path / "b", "--target", "jetson-orin", "--no-parity")) == 0
    assert (
        "--target jetson-orin is built on the device itself; pack the bundle for it with: " in capsys.readouterr().err
    )
    manifest = Bundle.open(tmp_path / "b").manifest
    assert (manifest.dialect, manifest.opset, manifest.plan) == ("portable", 20, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/nowhere/at/all"], "error: --model /nowhere/at/all is not a folder"),
        (["--max", "1x1", "--min", "2x2"], "error: --min 2x2 is larger than --max 1x1"),
        (["--min", "64x16"], "error: --min 64x16 is larger than --max 32x512, which is the target's unless"),
        (["--calibration-tokens", "100"], "error: --calibration-tokens 100 is for quantized precisions, but --precis"),
        (
            ["--calibration-tokens", "100", "--precision", "int8", "--reuse", "x"],
            "error: --calibration-tokens 100 has no effect, because --reuse x calibrates nothing",
        ),
        (["--revision", "abc"], "error: --revision abc is a commit of a hub repository, but --model"),
        (["--min", "4x4", "--opt", "2x8"], "error: --opt 2x8 is smaller than 4x4"),
        (["--max", "8x1"], "error: --max BATCHx1 truncates the 26 texts that engines are compared on to 1 "),
    ],
)
def test_mistakes_end_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert trt.main(arguments(checkpoint, tmp_path / "b", *flags)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(message)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--precision", "int3"], "invalid choice: 'int3'"),
        (["--max", "8by64"], "shape '8by64' is not of the form BATCHxTOKENS; for 8 texts of 64 tokens write 8x64"),
        (["--max", "0x64"], "batch and tokens must be at least 1"),
        (["--max", "99999x99999"], "the limit of TensorRT"),
        (["--target", "toaster"], "invalid choice: 'toaster'"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        trt.main(flags)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    process = subprocess.run(
        [sys.executable, "-m", "export.trt", "--model", "nvidia/NV-Embed-v2"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    message = "error: nvidia/NV-Embed-v2 is not a folder here, and it could not be downloaded from the hub"
    assert message in process.stderr
    assert "Traceback" not in process.stderr


def test_help_is_fast_and_needs_no_torch() -> None:
    code = (
        "import sys\nfrom nvembed_deploy.export import trt, to_onnx\nfrom nvembed_deploy.engines import check\n"
        "for main in (trt.main, to_onnx.main, check.main):\n"
        "    try:\n        main(['--help'])\n    except SystemExit as exit_:\n        assert exit_.code == 0\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "--precision {fp32,fp16,bf16,int8,fp8,int4,nvfp4}" in process.stdout


def test_check_judges_a_bundle(
    bundles: dict[str, Path], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--device", "cpu", "--model"]
    assert check.main([str(bundles["fp16"]), *flags, str(checkpoint)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failures"] == []
    another_checkpoint = make_checkpoint(tmp_path / "another_checkpoint", seed=1)
    assert check.main([str(bundles["fp16"]), *flags, str(another_checkpoint)]) == 1
    assert "error: onnxruntime" in capsys.readouterr().err


def test_profile_follows_max() -> None:
    assert parsed("--max", "4x32", "--model", "anything").profile == ShapeProfile(
        min=Shape(batch=1, tokens=1), opt=Shape(batch=4, tokens=32), max=Shape(batch=4, tokens=32)
    )


def test_a_tokenizer_without_bos_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "c"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert trt.main(arguments(folder, tmp_path / "b")) == 1
    assert "NV-Embed needs [1] before" in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_embedding_table_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "c"))
    config = read_checkpoint_architecture(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zz"] = 99_999
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(Exception, match="has token id 99999, and the embedding table"):
        text_contract(folder, config)


def test_forecast_refuses_what_cannot_fit(checkpoint: Path, tmp_path: Path) -> None:
    weights = StoredWeights(checkpoint, read_checkpoint_architecture(checkpoint))
    export_options = parsed("--model", str(checkpoint))
    needs = forecast(weights, export_options, plan=True)
    require_room(needs, tmp_path / "b", force=False)
    compared, streamed = (
        forecast(weights, replace(export_options, parity=parity), plan=False) for parity in (True, False)
    )
    linked = forecast(weights, replace(export_options, parity=False, reference_weights=True), plan=False)
    assert compared.memory > streamed.memory >= linked.memory
    assert compared.disk >= streamed.disk > linked.disk
    huge = replace(needs, disk=2**60)
    with pytest.raises(ExportError, match=r"needs about 1073741824\.0 GiB of disk, but only .* GiB are free"):
        require_room(huge, tmp_path / "b", force=False)
    require_room(huge, tmp_path / "b", force=True)


def test_bundles_have_the_requested_precision(bundles: dict[str, Path]) -> None:
    """Embeddings in 16 bits differ from those in FP32."""
    vectors = {name: Encoder(path, device="cpu").encode("the water") for name, path in bundles.items()}
    assert np.abs(vectors["fp16"] - vectors["fp32"]).max() > 1e-5
    assert np.abs(vectors["bf16"] - vectors["fp32"]).max() > 1e-4
