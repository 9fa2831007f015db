"""What `engines.show` says of a bundle, to people and to programs."""

import json
from pathlib import Path

import pytest

from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.engines.show import component_bytes, main
from nvembed_deploy.spec import INT4_BLOCK, Precision
from tests.conftest import needs_rtx


@needs_rtx
@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_words(bundles: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundles[name] / "engine.plan")]) == 0
    shown = capsys.readouterr().out
    for words in (
        "NV-Embed, 2 layers, width 32",
        "bidirectional, mean of the tokens behind latent attention",
        f"precision  {name}",
        "1x1 .. 8x64 .. 32x128",
        "target     rtx: RTX GPUs",
        "and kernels of their own for 1x1 .. 1x32 .. 4x64",
        "tensorrt_rtx",
        "GPUs 8.0, 8.6, 8.9, 12.0",
        "file       engine.plan",
        "lowest cosine 0.99",
        "here       no: no NVIDIA",
    ):
        assert words in shown, (words, shown)


def test_json(bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundles["fp32"]), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["manifest"]["precision"] == "fp32"
    assert record["plan_runs_here"] is False
    assert record["available_memory_bytes"] > 0


def test_components_are_the_weights(bundles: dict[str, Path]) -> None:
    """Their sum is the file of the weights, but for the pages that tensors start on."""
    manifest = Bundle.open(bundles["fp32"]).manifest
    total = sum(component_bytes(manifest).values())
    assert total == 4 * sum(manifest.source.architecture.parameters(fold=True).values())
    assert total <= manifest.files["model.onnx.data"].bytes < total + 64 * 4096


def test_bits_of_a_weight_are_those_that_are_written() -> None:
    torch = pytest.importorskip("torch", reason="not installed: pip install nvembed-deploy[export]")
    from nvembed_deploy.export.quantization.formats import FORMATS

    weight = torch.ones(16, 2 * INT4_BLOCK)
    for precision, number in FORMATS.items():
        codes, scales = number.encode_weight(weight)
        bits = 4 if precision is Precision.INT4 else 8
        scale_bits = 16 * scales.numel() if precision is Precision.INT4 else 0  # one a column: not counted
        assert precision.bits_per_weight == (bits * codes.numel() + scale_bits) / weight.numel()
    assert [item.bits_per_weight for item in (Precision.FP32, Precision.FP16, Precision.BF16)] == [32, 16, 16]


def test_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 1
    assert "does not exist; make a bundle" in capsys.readouterr().err
