"""`python -m benchmarks.gptq_peer`: rounds small layers by llm-compressor's GPTQ, the vectors that tests compare with.

It needs an environment with `llmcompressor` and `compressed-tensors`, which nothing else of this project does. Writes
`tests/export/quantization/gptq_golden.json`: the quantized values of each case, and the versions.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nvembed_deploy.console import echo, run
from nvembed_deploy.export.quantization.formats import FORMATS, NumberFormat
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.spec import Precision

GOLDEN_PATH = Path(__file__).resolve().parent.parent / "tests" / "export" / "quantization" / "gptq_golden.json"
CASES = ((24, 256, 64), (16, 192, 32), (12, 256, 128))
"""Outputs, inputs and block size of each layer."""


def layer(outputs: int, inputs: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a weight [out, in], the Hessian [in, in] of correlated inputs, and scales [out, in / block size].

    They are made of sines, so that every machine and version makes the same ones.
    """
    index = torch.arange(outputs * inputs, dtype=torch.float64)
    weight = (torch.sin(index * 12.9898) * 43758.5453).frac().reshape(outputs, inputs)
    tokens = torch.arange(4 * inputs * inputs, dtype=torch.float64)
    noise = (torch.sin(tokens * 78.233) * 43758.5453).frac().reshape(4 * inputs, inputs)
    spread = 0.2 + (torch.arange(inputs, dtype=torch.float64) * 0.618).frac() * 3
    rows = (noise + 0.8 * noise.roll(1, dims=1) + 0.6 * noise.roll(5, dims=1)) * spread
    scale = (weight.reshape(outputs, -1, block_size).abs().amax(dim=2) / 7).half()
    return weight.float(), (rows.T @ rows / len(rows)).float(), scale.float()


def rounded_by_llm_compressor(weight: Tensor, hessian: Tensor, scale: Tensor, fmt: NumberFormat) -> Tensor:
    """Quantizes and dequantizes a weight by llm-compressor's GPTQ, with given scales and in activation order.

    Args:
        weight: float32 [out, in].
        hessian: float32 [in, in].
        scale: float32 [out, in / block size], or [out, 1].
        fmt: The number format: integers or FP8.

    Returns:
        float32 [out, in].
    """
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    arguments = QuantizationArgs(
        num_bits=fmt.bits,
        type="int" if fmt.dtype == torch.int8 else "float",
        symmetric=True,
        strategy="group" if fmt.block_size else "channel",
        group_size=fmt.block_size,
        actorder="weight",
    )
    rounded, _, _ = quantize_weight(
        weight[None].clone(), hessian[None].clone(), scale[None], torch.zeros_like(scale)[None], None, arguments
    )
    result: Tensor = rounded[0]
    return result


def quantize(outputs: int, inputs: int, block_size: int) -> Tensor:
    """Returns llm-compressor's quantized values, int8 [out, in]."""
    weight, hessian, scale = layer(outputs, inputs, block_size)
    rounded = rounded_by_llm_compressor(weight, hessian, scale, replace(FORMATS[Precision.INT4], block_size=block_size))
    return (rounded / scale.repeat_interleave(block_size, dim=1)).round().to(torch.int8)


def main() -> int:
    """Runs the command."""

    def command() -> None:
        record = {
            "command": "python -m benchmarks.gptq_peer",
            "versions": {
                name: importlib.metadata.version(name) for name in ("llmcompressor", "compressed-tensors", "torch")
            },
            "cases": [
                {
                    "case": case,
                    "quantized": ["".join(f"{value + 8:x}" for value in row) for row in quantize(*case).tolist()],
                }
                for case in CASES
            ],
        }
        write_file(GOLDEN_PATH, (json.dumps(record, indent=1) + "\n").encode())
        echo(f"done: {GOLDEN_PATH}")

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
