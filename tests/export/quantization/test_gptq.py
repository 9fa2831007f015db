"""GPTQ: against llm-compressor, against its definition, and against rounding to the nearest value."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gptq_peer import CASES, layer
from nvembed_deploy.export.quantization import gptq as gptq_module
from nvembed_deploy.export.quantization.formats import FORMATS, NumberFormat, pack_int4, unpack_int4
from nvembed_deploy.export.quantization.gptq import DAMPING, gptq
from nvembed_deploy.spec import Precision

GOLDEN = json.loads((Path(__file__).parent / "gptq_golden.json").read_text())


@pytest.mark.parametrize("index", range(len(CASES)))
def test_values_are_llm_compressors(index: int) -> None:
    golden = GOLDEN["cases"][index]
    assert tuple(golden["case"]) == CASES[index]
    weight, hessian, scale = layer(*CASES[index])
    fmt = replace(FORMATS[Precision.INT4], block_size=CASES[index][2])
    quantized = gptq(weight, hessian, scale.T.contiguous(), fmt)
    expected = torch.tensor([[int(digit, 16) - 8 for digit in row] for row in golden["quantized"]])
    # Another order of sums may move a value across a tie, and all behind it: hardly any do.
    assert (quantized.T != expected).float().mean() < 0.01


def surgeon(weight: Tensor, hessian: Tensor, scale: Tensor, fmt: NumberFormat) -> Tensor:
    """Rounds one channel after another as the Optimal Brain Surgeon does, from the definition and without Cholesky.

    After a channel is rounded, the others are set to the values that minimize the error of the outputs: a linear system
    over the channels that remain, solved anew for each of them.
    """
    matrix = hessian.double() + DAMPING * hessian.diagonal().double().mean() * torch.eye(len(hessian)).double()
    remaining, original = hessian.diagonal().argsort(descending=True).tolist(), weight.double()
    current, result = original.clone(), torch.zeros_like(original)
    rounded: list[int] = []
    while remaining:
        channel = remaining.pop(0)
        channel_scale = scale[channel // (fmt.block_size or len(hessian))].double()
        values = fmt.quantize(current[:, channel].float(), channel_scale.float()).double()
        result[:, channel] = values
        current[:, channel] = values * channel_scale
        rounded.append(channel)
        if remaining:
            error = original[:, rounded] - current[:, rounded]
            correction = torch.linalg.solve(matrix[remaining][:, remaining], matrix[remaining][:, rounded] @ error.T)
            current[:, remaining] = original[:, remaining] + correction.T
    return result.T


@pytest.mark.parametrize("panel", [5, 128])
def test_values_are_the_surgeons(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_module, "PANEL", panel)
    weight, hessian, _ = layer(6, 96, 32)
    fmt = replace(FORMATS[Precision.INT4], block_size=32)
    scale = fmt.weight_scale(weight, importance=hessian.diagonal())
    quantized = gptq(weight, hessian, scale, fmt)
    assert (quantized != surgeon(weight, hessian, scale, fmt)).float().mean() < 0.01


@pytest.mark.parametrize("precision", [precision for precision in Precision if precision.quantized])
def test_outputs_are_closer_than_with_the_nearest_values(precision: Precision) -> None:
    weight, hessian, _ = layer(24, 256, 64)
    fmt = FORMATS[precision]

    nearest, scale = fmt.quantize_weight(weight)

    def error(quantized: Tensor) -> float:
        difference = fmt.dequantize_weight(quantized, scale) - weight
        return float((difference @ hessian * difference).sum())

    assert error(gptq(weight, hessian, scale, fmt)) < 0.7 * error(nearest)


def test_inputs_that_are_zero_or_depend_on_each_other_are_no_obstacle() -> None:
    weight, fmt = layer(8, 64, 64)[0], FORMATS[Precision.INT4]
    scale = fmt.weight_scale(weight)
    rows = torch.zeros(3, 64)
    rows[:, 5], rows[:, 6] = 1e4, 1e4
    for hessian in (rows.T @ rows, torch.zeros(64, 64)):
        quantized = gptq(weight, hessian, scale, fmt)
        assert (fmt.dequantize_weight(quantized, scale) - weight).abs().max() < 1
    with pytest.raises(ArithmeticError, match="not finite"):
        gptq(weight, torch.full((64, 64), torch.nan), scale, fmt)


def test_four_bit_values_are_read_as_packed() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(3)
    assert torch.equal(unpack_int4(pack_int4(values)), values)
