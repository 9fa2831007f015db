"""The description of a bundle by `nvembed show`, as text and as JSON."""

import json
from pathlib import Path

import pytest

from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.engines import show
from nvembed_deploy.engines.show import component_bytes, main, quantized_groups
from nvembed_deploy.spec import INT4_BLOCK, Precision
from tests.conftest import needs_rtx


@needs_rtx
@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_text(bundles: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundles[name] / "engine.plan")]) == 0
    shown = capsys.readouterr().out
    for words in (
        "NV-Embed, 2 layers, hidden size 32",
        "bidirectional, mean of the tokens after latent attention",
        f"precision  {name}",
        "1x1 .. 8x64 .. 32x128",
        "target     rtx: RTX GPUs",
        "with a separate profile for 1x1 .. 1x32 .. 4x64",
        "tensorrt_rtx",
        "GPUs 8.0, 8.6, 8.9, 12.0",
        "file       engine.plan",
        "lowest cosine 0.99",
        "here       the plan does not run: no NVIDIA",
    ):
        assert words in shown, (words, shown)


def test_json(bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundles["fp32"]), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["manifest"]["precision"] == "fp32"
    assert record["plan_runs_here"] is False
    assert record["available_memory_bytes"] > 0


def test_components_are_the_weights(bundles: dict[str, Path]) -> None:
    """Their sum is the size of the weight file, except for the alignment of tensors to pages."""
    bundle = Bundle.open(bundles["fp32"])
    manifest, total = bundle.manifest, sum(component_bytes(bundle).values())
    assert total == 4 * sum(manifest.source.architecture.parameters(fold=True).values())
    assert total <= manifest.files["model.onnx.data"].bytes < total + 64 * 4096


def test_layers_that_stay_in_fp16_are_counted_as_such(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.open(bundles["int8"])
    groups = quantized_groups(bundle)
    assert sum(group["weight_count"] for group in groups) == sum(
        bundle.manifest.source.architecture.linear_weights().values()
    )

    def shown(excluded: str) -> tuple[dict[str, int], str]:
        """Returns the bytes and the line of the precision if only one group is excluded."""
        changed = [group | {"excluded": group["name"] == excluded} for group in groups]
        monkeypatch.setattr(show, "quantized_groups", lambda _: changed)
        assert main([str(bundles["int8"])]) == 0
        line = capsys.readouterr().out.split("precision  ")[1].splitlines()[0]
        return component_bytes(bundle), line

    quantized, line = shown("none")
    assert line == "int8"
    for group, component in ((groups[0], "decoder"), (groups[-1], "pooler")):
        excluded, line = shown(group["name"])
        share = group["weight_count"] / sum(group["weight_count"] for group in groups)
        assert line == f"int8; 1 of {len(groups)} groups of layers, {share:.0%} of their weights, are not quantized"
        assert excluded == quantized | {component: quantized[component] + group["weight_count"]}  # 16 bits for 8


def test_bits_per_weight_are_those_of_the_stored_weights() -> None:
    torch = pytest.importorskip("torch", reason="not installed: pip install nvembed-deploy[export]")
    from nvembed_deploy.export.quantization.formats import FORMATS

    weight = torch.ones(16, 2 * INT4_BLOCK)
    for precision, fmt in FORMATS.items():
        quantized, scales = fmt.quantize_weight(weight)
        bits = 4 if precision.weight_only else 8
        # The others have a scale per column, which is not counted.
        scale_bits = {Precision.INT4: 16, Precision.NVFP4: 8}.get(precision, 0) * scales.numel()
        assert precision.bits_per_weight == (bits * quantized.numel() + scale_bits) / weight.numel()
    assert [precision.bits_per_weight for precision in (Precision.FP32, Precision.FP16, Precision.BF16)] == [32, 16, 16]


def test_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 1
    assert "does not exist; check the path, or export one: " in capsys.readouterr().err
