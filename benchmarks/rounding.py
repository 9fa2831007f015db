"""`python -m benchmarks.rounding`: the embedded model rounded to nearest values, by our GPTQ, and by llm-compressor's.

Inputs are quantized as the export does, and the scales, calibration and smoothing are the export's. Measures the
cosines to FP32 on the gate's texts in PyTorch, and the seconds that rounding takes. It needs an environment with
`llmcompressor` and `compressed-tensors`, which nothing else of this project does. Writes
`benchmarks/results/rounding.json`.
"""

from __future__ import annotations

import datetime
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.gptq_peer import rounded_by_llm_compressor
from nvembed_deploy.backends.pytorch import PyTorchBackend
from nvembed_deploy.console import echo, run
from nvembed_deploy.export.layerwise import LayerwiseModel, folded_form
from nvembed_deploy.export.options import CALIBRATION_TOKENS, default_model
from nvembed_deploy.export.quantization.calibration import InputCollector, built_in_texts, padded_batches, tokenize
from nvembed_deploy.export.quantization.formats import FORMATS, NumberFormat
from nvembed_deploy.export.quantization.gptq import gptq
from nvembed_deploy.export.quantization.linear_groups import linear_groups, weight_of
from nvembed_deploy.export.quantization.rounding import GptqRounding, Rounding
from nvembed_deploy.export.quantization.search import quantize
from nvembed_deploy.export.quantization.simulation import simulation_hook
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.model.text_contract import text_contract
from nvembed_deploy.parity.probes import probe_rows
from nvembed_deploy.spec import Precision
from nvembed_deploy.system import describe_machine, installed_versions
from nvembed_deploy.tokenization import TextEncoder

RECORD_PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "rounding.json"
RECORDED = ("torch", "llmcompressor", "compressed-tensors")
"""Packages whose versions are recorded."""
PRECISIONS = (Precision.INT8, Precision.FP8, Precision.INT4)
"""llm-compressor has no rule for NVFP4's scales here: it takes another scale for the whole weight."""
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
    exported = GptqRounding(fmt, folder / precision.value)
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

    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "nearest value": nearest,
        "GPTQ, llm-compressor": peers,
        "GPTQ, ours": ours,
    }
    for way, rounded in ways.items():
        started = time.perf_counter()
        weights = {}
        for group in groups:
            for name in group.linears:
                weight = weight_of(model, name)
                scale = fmt.weight_scale(weight, importance=hessians[group.name].diagonal())
                weights[name] = rounded(weight, hessians[group.name], scale)
        seconds = time.perf_counter() - started
        hook = simulation_hook(model, record.groups, Dequantized(fmt, weights))
        embeddings = layerwise.forward(batches, hook=hook)
        cosines = (expected * embeddings).sum(dim=1)
        row = {
            "precision": precision.value,
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
