"""Exports that never have all weights in memory, or do not write them again: streamed, referenced, sliced."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nvembed_deploy import BundleError, CheckpointError, Encoder
from nvembed_deploy.bundle.manifest import WEIGHTS
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.export import pipeline, to_onnx
from nvembed_deploy.export.graph import write
from nvembed_deploy.export.graph.weights import CheckpointWeights
from nvembed_deploy.files.hashing import hash_file
from nvembed_deploy.files.read_ahead import ReadAhead
from nvembed_deploy.model import source
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.model.fold import FoldedLatentAttention
from nvembed_deploy.model.weights import StoredWeights
from tests.conftest import ROOT
from tests.tiny import make_checkpoint

TEXTS = ["the water over the passage", "a", "question and answer " * 9]


def export(checkpoint: Path, out: Path, *flags: str) -> Path:
    assert to_onnx.main(["--model", str(checkpoint), "--out", str(out), "--max", "4x64", *flags]) == 0
    return out


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def vectors(bundle: Path) -> np.ndarray:
    return Encoder(bundle, device="cpu").encode(TEXTS)


@pytest.fixture
def checkpoint_copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that other tests do not link to."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
def test_checkpoint_weights_equal_the_models(checkpoint: Path, fold: bool) -> None:
    weights = StoredWeights(checkpoint, read_checkpoint_architecture(checkpoint))
    model = load_checkpoint(checkpoint)
    if fold:
        model.latent_attention_model = FoldedLatentAttention(model.latent_attention_model)
    weight_source = CheckpointWeights(weights, fold=fold)
    for name, tensor in model.state_dict().items():
        assert weight_source.shape(name) == tuple(tensor.shape), name
        np.testing.assert_allclose(weight_source.read(name).float(), tensor, atol=2e-6, err_msg=name)
        assert torch.equal(weight_source.read(name, rows=(1, 3)), weight_source.read(name)[1:3])
    assert weight_source.shape("nothing") is None


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_small_blocks_write_the_same_file(
    checkpoint: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(checkpoint, tmp_path / "default", "--precision", precision, "--no-parity")
    for name, size in (("BLOCK_BYTES", 96), ("READ_BYTES", 96), ("PANEL_BYTES", 700), ("UNCACHED_BYTES", 0)):
        monkeypatch.setattr(write, name, size)
    export(checkpoint, tmp_path / "blocks", "--precision", precision, "--no-parity")
    assert (tmp_path / "default" / WEIGHTS).read_bytes() == (tmp_path / "blocks" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_bundle_without_comparison_has_the_same_weights(
    checkpoint: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = export(checkpoint, tmp_path / "compared", "--precision", precision)
    monkeypatch.setattr(pipeline, "PyTorchBackend", None)  # the model is never loaded
    streamed = export(checkpoint, tmp_path / "streamed", "--precision", precision, "--no-parity")
    assert (compared / WEIGHTS).read_bytes() == (streamed / WEIGHTS).read_bytes()
    assert Bundle.open(streamed).manifest.parity == ()


@pytest.mark.parametrize("fold", [[], ["--no-fold"]], ids=["folded", "unfolded"])
def test_referenced_weights_are_linked_and_give_the_same_embeddings(
    checkpoint_copy: Path, tmp_path: Path, fold: list[str]
) -> None:
    copied = export(checkpoint_copy, tmp_path / "copied", "--precision", "fp16", *fold)
    linked = export(checkpoint_copy, tmp_path / "linked", "--precision", "fp16", "--weights", "reference", *fold)
    manifest = Bundle.open(linked).manifest
    assert manifest.referenced == tuple(sorted(path.name for path in checkpoint_copy.glob("*.safetensors")))
    for name in manifest.referenced:
        assert (linked / name).stat().st_ino == (checkpoint_copy / name).stat().st_ino
        assert manifest.files[name] == hash_file(checkpoint_copy / name) == manifest.source.files[name]
    written = (linked / WEIGHTS).stat().st_size
    assert written == 0 if fold else 0 < written < (copied / WEIGHTS).stat().st_size / 4
    np.testing.assert_allclose(vectors(linked), vectors(copied), atol=2e-3)
    assert [report.passed for report in manifest.parity] == [True]


def test_converted_weights_are_written_beside_references(checkpoint_copy: Path, tmp_path: Path) -> None:
    linked = export(checkpoint_copy, tmp_path / "linked", "--precision", "fp32", "--weights", "reference")
    assert Bundle.open(linked).manifest.referenced == ()  # stored in 16 bits, exported in 32
    np.testing.assert_allclose(
        vectors(linked), vectors(export(checkpoint_copy, tmp_path / "b", "--precision", "fp32")), atol=1e-6
    )


def test_a_referenced_bundle_is_replaced_and_notices_a_changed_checkpoint(
    checkpoint_copy: Path, tmp_path: Path
) -> None:
    flags = ["--precision", "fp16", "--weights", "reference"]
    linked = export(checkpoint_copy, tmp_path / "linked", *flags)
    export(checkpoint_copy, linked, *flags)  # replaces the bundle
    encoder = Encoder(linked, device="cpu")
    encoder.encode(TEXTS)
    shard = checkpoint_copy / Bundle.open(linked).manifest.referenced[0]
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(BundleError, match="SHA-256 does not match"):
        Encoder(linked, device="cpu")


def test_another_disk_is_refused_with_a_remedy(
    checkpoint_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    flags = [
        "--model",
        str(checkpoint_copy),
        "--out",
        str(tmp_path / "b"),
        "--precision",
        "fp16",
        "--weights",
        "reference",
    ]
    assert to_onnx.main([*flags, "--no-parity"]) == 1
    assert "put --out on the checkpoint's disk, or pass --weights copy" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert to_onnx.main([*flags, "--precision", "int8"]) == 1
    assert "--precision int8 quantizes them; pass --weights copy" in capsys.readouterr().err


def test_slice_is_a_smaller_model(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete = export(checkpoint, tmp_path / "complete", "--precision", "fp32")
    sliced = export(checkpoint, tmp_path / "sliced", "--precision", "fp32", "--layers", "1")
    architecture = Bundle.open(sliced).manifest.source.architecture
    assert (architecture.layers, architecture.sliced) == (1, True)
    assert Bundle.open(sliced).manifest.source.name.endswith("(first 1 layers)")
    assert np.abs(vectors(sliced) - vectors(complete)).max() > 1e-3
    from nvembed_deploy.engines import check

    assert check.main([str(sliced), "--model", str(checkpoint)]) == 0
    assert to_onnx.main(["--model", str(checkpoint), "--out", str(tmp_path / "c"), "--layers", "3"]) == 1
    assert "--layers must be between 1 and 2, the layers of this checkpoint; got 3" in capsys.readouterr().err


def test_weights_beyond_fp16_are_refused_without_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(tmp_path / "c", shards=1)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["embedding_model.layers.1.mlp.up_proj.weight"][3, 5] = 70_000
    save_file(tensors, folder / "model.safetensors")
    flags = ["--model", str(folder), "--out", str(tmp_path / "b"), "--precision", "fp16", "--no-parity"]
    assert to_onnx.main(flags) == 1
    assert "up_proj.weight reaches 7e+04, which float16 cannot represent" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "fp32", "--no-parity"],
        ["--precision", "fp32"],
        ["--precision", "fp16", "--no-parity", "--weights", "reference"],
        ["--precision", "fp16", "--no-parity", "--probe-ranges"],
        ["--precision", "int8", "--no-parity"],
    ],
    ids=lambda flags: " ".join(flags),
)
@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "an infinite value"), (-np.inf, "an infinite")])
def test_weights_that_are_not_finite_are_told_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], value: float, kind: str
) -> None:
    folder = make_checkpoint(tmp_path / "c", shards=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["embedding_model.embed_tokens.weight"][300] = value  # of a token that no probe has
    save_file(tensors, folder / "model.safetensors")
    assert to_onnx.main(["--model", str(folder), "--out", str(tmp_path / "b"), *flags]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"weight embedding_model.embed_tokens.weight contains {kind}" in message
    assert "--precision" not in message
    assert not (tmp_path / "b").exists()


def test_a_weight_beyond_fp32_is_not_told_to_use_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(tmp_path / "c", shards=1)
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["embedding_model.layers.1.mlp.up_proj.weight"][3, 5] = 1e300
    save_file(tensors, folder / "model.safetensors")
    flags = ["--model", str(folder), "--out", str(tmp_path / "b"), "--precision", "fp32", "--no-parity"]
    assert to_onnx.main(flags) == 1
    assert "reaches 1e+300, which float32 cannot represent, and no precision can" in capsys.readouterr().err


def test_quantized_tensors_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(tmp_path / "c", shards=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["embedding_model.norm.weight"] = tensors["embedding_model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    assert to_onnx.main(["--model", str(folder), "--out", str(tmp_path / "b")]) == 1
    assert "norm.weight is stored as I8" in capsys.readouterr().err


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Three times the layers need only the memory of their nodes; each export is a process that reports its peak."""
    peaks = []
    for layers in (2, 6):
        folder = wide_checkpoint(tmp_path / f"c{layers}", layers)
        flags = ["--model", str(folder), "--out", str(tmp_path / f"b{layers}"), "--precision", "fp16", "--no-parity"]
        command = [sys.executable, "-m", "export.to_onnx", *flags]
        log = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stderr
        peaks.append(float(re.findall(r"peak memory ([\d.]+) GiB", log)[-1]))
    assert (tmp_path / "b6" / WEIGHTS).stat().st_size > 144e6
    assert peaks[1] - peaks[0] < 0.04, peaks  # of 0.09 GiB more weights


def wide_checkpoint(folder: Path, layers: int) -> Path:
    """Makes a tiny checkpoint with wider and more layers: 12.3 M parameters each."""
    make_checkpoint(folder, shards=1)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": layers, "intermediate_size": 128_000}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for index in range(layers):
        for name in [name for name in tensors if ".layers.0." in name]:
            tensors[name.replace(".0.", f".{index}.", 1)] = tensors[name].clone()
        for name, shape in (("gate", (128_000, 32)), ("up", (128_000, 32)), ("down", (32, 128_000))):
            tensors[f"embedding_model.layers.{index}.mlp.{name}_proj.weight"] = torch.full(shape, 0.01).half()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_known_hashes_are_compared(checkpoint_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = sorted(checkpoint_copy.glob("*.safetensors"))[0]
    sha256, flags = hash_file(shard).sha256, ["--precision", "fp32", "--no-parity", "--out", str(tmp_path / "b")]
    (checkpoint_copy / "SHA256SUMS").write_text(f"{sha256}  {shard.name}\n{'0' * 64} *other\n")
    assert to_onnx.main(["--model", str(checkpoint_copy), *flags]) == 0
    (checkpoint_copy / "SHA256SUMS").write_text(f"{'0' * 64}  {shard.name}\n")
    assert to_onnx.main(["--model", str(checkpoint_copy), *flags]) == 1
    err = capsys.readouterr().err
    assert f"{shard} is damaged: its SHA-256 is {sha256[:12]}..., but 000000000000... according to SHA256SUMS" in err
    (checkpoint_copy / "SHA256SUMS").unlink()
    blobs = tmp_path / "blobs"  # as in the hub's cache
    blobs.mkdir()
    for name, expected in ((sha256, 0), ("f" * 64, 1)):
        (blobs / name).write_bytes(shard.read_bytes())
        shard.unlink()
        shard.symlink_to(blobs / name)
        assert to_onnx.main(["--model", str(checkpoint_copy), *flags]) == expected
    assert "but ffffffffffff... according to the hub" in capsys.readouterr().err


def test_a_fine_tuned_models_shards_are_not_called_damaged(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shards have the published sizes but other hashes; that is damage only if another shard is a published one."""
    config = read_checkpoint_architecture(checkpoint)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    for name, content in (("a.safetensors", b"one"), ("b.safetensors", b"other")):
        (tmp_path / name).write_bytes(content)
    weights = {"weight_map": {"first": "a.safetensors", "second": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(weights))
    monkeypatch.setattr(source, "KNOWN_SHARDS", {3: "0" * 64, 5: "1" * 64})
    assert len(source.describe(tmp_path, "mine", None, config).files) == 4
    published = hash_file(tmp_path / "a.safetensors").sha256
    monkeypatch.setattr(source, "KNOWN_SHARDS", {3: published, 5: "1" * 64})
    with pytest.raises(CheckpointError, match=r"b\.safetensors is damaged: .* NV-Embed-v2's shard of this size"):
        source.describe(tmp_path, "mine", None, config)


def test_hashing_keeps_pace_with_the_writer(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(bytes(100))
    hashed: list[tuple[str, int]] = []
    with ReadAhead(paths, max_ahead_bytes=50) as read_ahead:

        def read() -> None:
            for path in paths:
                for offset in range(0, 100, 20):
                    read_ahead.wait(path, offset)
                    hashed.append((path.name, offset))

        thread = threading.Thread(target=read)
        thread.start()
        wait_until(lambda: len(hashed) == 3)
        time.sleep(0.05)
        assert hashed == [("a", 0), ("a", 20), ("a", 40)]
        read_ahead.reached(paths[0], 90)
        wait_until(lambda: len(hashed) == 8)
        time.sleep(0.05)
        assert hashed[-1] == ("b", 40)  # 140 of 200: 50 ahead of 90
        read_ahead.wait(tmp_path / "config.json", 10**9)  # a file that only hashing reads
        assert thread.is_alive()
    thread.join(timeout=5)
    assert hashed[-1] == ("b", 80)


def test_the_writer_reports_its_progress_to_hashing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no read-ahead allowed, hashing finishes only because the writer and then the export release it."""
    reports: list[tuple[str, int]] = []

    class Slow(ReadAhead):
        def __init__(self, paths: Sequence[Path]) -> None:
            super().__init__(paths, max_ahead_bytes=0)

        def reached(self, path: Path, offset: int) -> None:
            reports.append((path.name, offset))
            super().reached(path, offset)

    monkeypatch.setattr(pipeline, "ReadAhead", Slow)
    bundle = export(checkpoint, tmp_path / "bundle", "--precision", "fp16", "--no-parity")
    shards = sorted(checkpoint.glob("*.safetensors"))
    assert reports == sorted(reports)
    assert {name for name, _ in reports} == {path.name for path in shards}
    assert all(Bundle.open(bundle).manifest.source.files[path.name] == hash_file(path) for path in shards)
