"""`python -m benchmarks.rounding`: the embedded model rounded to nearest values, by our GPTQ, and by llm-compressor's.

Inputs are quantized as the export does, and the scales, calibration and smoothing are the export's. Measures the
cosines to FP32 on the gate's texts in PyTorch, and the seconds that rounding takes. NVFP4 is measured once more with
inputs in FP4 too, which the export does not write. It needs an environment with `llmcompressor` and
`compressed-tensors`, which nothing else of this project does. Writes `benchmarks/results/rounding.json`.
"""

from __future__ import annotations

import datetime
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gptq_peer import rounded_by_llm_compressor
from nvembed_deploy.backends.pytorch import PyTorchBackend
from nvembed_deploy.console import echo, run
from nvembed_deploy.export.layerwise import LayerwiseModel, folded_form
from nvembed_deploy.export.options import CALIBRATION_TOKENS, default_model
from nvembed_deploy.export.quantization.calibration import (
    InputCollector,
    built_in_texts,
    padded_batches,
    tokenize,
    unpack,
)
from nvembed_deploy.export.quantization.formats import FORMATS, MAX_FP8, MIN_FP8, NumberFormat
from nvembed_deploy.export.quantization.gptq import gptq
from nvembed_deploy.export.quantization.linear_groups import linear_groups, weight_of
from nvembed_deploy.export.quantization.record import GroupRecord
from nvembed_deploy.export.quantization.rounding import Rounding, rounding_of
from nvembed_deploy.export.quantization.search import quantize
from nvembed_deploy.export.quantization.simulation import simulation_hook
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.model.text_contract import text_contract
from nvembed_deploy.parity.probes import probe_rows
from nvembed_deploy.spec import NVFP4_BLOCK, Precision
from nvembed_deploy.system import describe_machine, installed_versions
from nvembed_deploy.tokenization import TextEncoder

RECORD_PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "rounding.json"
RECORDED = ("torch", "llmcompressor", "compressed-tensors")
"""Packages whose versions are recorded."""
PRECISIONS = (Precision.INT8, Precision.FP8, Precision.INT4, Precision.NVFP4)
LONGEST = 512
"""Tokens of the gate's longest text."""


class Dequantized(Rounding):
    """Returns weights that were computed before.

    Args:
        fmt: The number format.
        weights: Dequantized weights by the names of their layers.
    """

    def __init__(self, fmt: NumberFormat, weights: dict[str, Tensor]) -> None:
        super().__init__(fmt)
        self.weights = weights

    def fake_quantize(self, name: str, weight: Tensor) -> Tensor:
        """See `Rounding`."""
        return self.weights[name]


@contextmanager
def inputs_in_fp4(model: NVEmbed, records: Sequence[GroupRecord]) -> Iterator[None]:
    """Quantizes the inputs of all groups to E2M1 in blocks of 16 with scales in FP8, as `TRT_FP4DynamicQuantize` does.

    A block's scale follows from its own values, and the scale of scales from the range in the calibration.
    """
    fmt = FORMATS[Precision.NVFP4]

    def hook(record: GroupRecord) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        tensor_scale = float(unpack(record.channel_ranges).max()) / (fmt.max_value * MAX_FP8)

        def quantize_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            blocks = args[0].reshape(-1, NVFP4_BLOCK)
            scale = blocks.abs().amax(dim=1, keepdim=True) / (fmt.max_value * tensor_scale)
            scale = scale.clamp_(MIN_FP8, MAX_FP8).to(torch.float8_e4m3fn).float() * tensor_scale
            return (fmt.fake_quantize(blocks, scale).reshape(args[0].shape),)

        return quantize_input

    with ExitStack() as stack:
        for record in records:
            for name in record.linears:
                layer = model.get_submodule(name)
                stack.callback(layer.register_forward_pre_hook(hook(record)).remove)
        yield


def measure(precision: Precision, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields a row of the record for each way of rounding."""
    checkpoint, fmt = default_model(), FORMATS[precision]
    text = TextEncoder(
        (checkpoint / "tokenizer.json").read_bytes(),
        text_contract(checkpoint, read_checkpoint_architecture(checkpoint)),
    )
    layerwise = LayerwiseModel(folded_form(PyTorchBackend(checkpoint).model, fold=True))
    model = layerwise.model
    batches = padded_batches(text, probe_rows(text, LONGEST, everyday=True)[1])[1]
    rows = tokenize(built_in_texts(), text, tokens=CALIBRATION_TOKENS)
    expected = layerwise.forward(batches)
    exported = rounding_of(precision, folder / precision.value)
    record = quantize(layerwise, text, rows, exported, model_sha256="", longest=LONGEST)
    groups = linear_groups(model)
    collector = InputCollector(layerwise, text, rows)
    with collector.summing_products(groups) as hessians:
        layerwise.forward(collector.batches)

    def ours(weight: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
        return fmt.dequantize_weight(gptq(weight, hessian, scale, fmt), scale)

    def peers(weight: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
        return rounded_by_llm_compressor(weight, hessian, scale.reshape(-1, len(weight)).T.contiguous(), fmt)

    def nearest(weight: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
        return fmt.fake_quantize_weight(weight)

    inputs = precision.value if fmt.quantizes_inputs else "fp16"
    ways: list[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor], str]] = [("nearest value", nearest, inputs)]
    if precision is not Precision.NVFP4:  # llm-compressor has another scale for the whole weight
        ways.append(("GPTQ, llm-compressor", peers, inputs))
    ways.append(("GPTQ, ours", ours, inputs))
    if precision is Precision.NVFP4:
        ways.append(("GPTQ, ours", ours, "fp4"))
    for way, rounded, inputs in ways:
        started = time.perf_counter()
        weights = {}
        for group in groups:
            for name in group.linears:
                weight = weight_of(model, name)
                scale = fmt.weight_scale(weight, importance=hessians[group.name].diagonal())
                weights[name] = rounded(weight, hessians[group.name], scale)
        seconds = time.perf_counter() - started
        hook = simulation_hook(model, record.groups, Dequantized(fmt, weights))
        with inputs_in_fp4(model, record.groups) if inputs == "fp4" else nullcontext():
            embeddings = layerwise.forward(batches, hook=hook)
        cosines = (expected * embeddings).sum(dim=1)
        row = {
            "precision": precision.value,
            "inputs": inputs,
            "rounding": way,
            "min_cosine": round(float(cosines.min()), 5),
            "mean_cosine": round(float(cosines.mean()), 5),
            "seconds": round(seconds, 2),
        }
        echo(json.dumps(row))
        yield row


def main() -> int:
    """Runs the command."""

    def command() -> None:
        with tempfile.TemporaryDirectory() as folder:
            rows = [row for precision in PRECISIONS for row in measure(precision, Path(folder))]
        record = {
            "command": "python -m benchmarks.rounding",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "versions": installed_versions(RECORDED),
            "rows": rows,
        }
        write_file(RECORD_PATH, (json.dumps(record, indent=1) + "\n").encode())
        echo(f"done: {RECORD_PATH}")

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
