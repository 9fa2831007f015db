"""`python -m benchmarks.mutations`: structural faults that each precision's gate sees, and the check in FP32.

The embedded model is changed in PyTorch, one fault at a time, and compared with the unchanged one: by the bounds of
each precision, and by those of the check in FP32 that precedes every export (`export/structure.py`). Writes
`benchmarks/results/mutations.json`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nvembed_deploy.backends.base import Backend, Output
from nvembed_deploy.backends.pytorch import PyTorchBackend
from nvembed_deploy.console import echo, run
from nvembed_deploy.errors import MaskError
from nvembed_deploy.export.options import default_model
from nvembed_deploy.export.structure import structure_shape
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.model.config import Mask, ModelConfig
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.model.text_contract import text_contract
from nvembed_deploy.parity.compare import (
    Differences,
    compute_reference_outputs,
    make_report,
    measure_differences,
    require_mask,
)
from nvembed_deploy.spec import Precision, Shape
from nvembed_deploy.system import describe_machine, installed_versions
from nvembed_deploy.tokenization import TextEncoder, TokenBatch

RECORDED = ("torch", "numpy")
"""Packages whose versions are recorded."""
RECORD_PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "mutations.json"
MAX_SHAPE = Shape(batch=16, tokens=128)
CONFIGS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "none": lambda config: config,
    "causal mask": lambda config: replace(config, mask=Mask.CAUSAL),
    "RoPE base x 2": lambda config: replace(config, rope_theta=config.rope_theta * 2),
    "RoPE base + 10 %": lambda config: replace(config, rope_theta=config.rope_theta * 1.1),
    "RoPE base + 1 %": lambda config: replace(config, rope_theta=config.rope_theta * 1.01),
    "RMSNorm's epsilon x 10": lambda config: replace(config, rms_norm_eps=config.rms_norm_eps * 10),
}
"""Faults of numbers in the configuration."""


class Changed:
    """A backend whose batches are changed.

    Args:
        backend: The backend.
        change: Returns the batch that it runs instead.
    """

    profile = None
    in_flight = 1
    name = "changed"

    def __init__(self, backend: Backend, change: Callable[[TokenBatch], TokenBatch]) -> None:
        self._backend, self._change = backend, change

    def run(self, batch: TokenBatch) -> Output:
        """Embeds a batch."""
        return self._backend.run(self._change(batch))

    run_concurrent = run


def causal_in_first_layer(model: NVEmbed) -> None:
    """Makes the first layer's mask causal."""

    def change(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, cos, sin, mask = args
        tokens = x.shape[1]
        return x, cos, sin, mask & torch.ones(tokens, tokens, dtype=torch.bool).tril()

    model.embedding_model.layers[0].register_forward_pre_hook(change)


@contextmanager
def tanh_gelu() -> Iterator[None]:
    """Makes the pooler compute the tanh form of GELU."""
    exact = F.gelu
    setattr(F, "gelu", lambda x: exact(x, approximate="tanh"))  # noqa: B010
    try:
        yield
    finally:
        setattr(F, "gelu", exact)  # noqa: B010


def has_mask(candidate: Backend, text: TextEncoder) -> bool:
    """Returns True if the candidate's mask is the model's."""
    try:
        require_mask(candidate, text, Mask.BIDIRECTIONAL)
    except MaskError:
        return False
    return True


def measure() -> Iterator[dict[str, Any]]:
    """Yields a row of the record for each fault."""
    folder = default_model()
    config = read_checkpoint_architecture(folder)
    text = TextEncoder((folder / "tokenizer.json").read_bytes(), text_contract(folder, config))
    unchanged = PyTorchBackend(folder)
    # The probes and the ranking of a quantized precision, and the probes of the others.
    coarse, fine, structure = (
        compute_reference_outputs(unchanged, text, precision=precision, max_shape=shape)
        for precision, shape in (
            (Precision.INT8, MAX_SHAPE),
            (Precision.FP16, MAX_SHAPE),
            (Precision.FP32, structure_shape(MAX_SHAPE)),
        )
    )

    def row(fault: str, candidate: Backend) -> dict[str, Any]:
        measured = {
            quantized: measure_differences(reference, candidate, text, max_shape=MAX_SHAPE)
            for quantized, reference in ((True, coarse), (False, fine))
        }
        in_fp32 = measure_differences(structure, candidate, text, max_shape=structure_shape(MAX_SHAPE))
        mask = has_mask(candidate, text)

        def judge(differences: Differences, precision: Precision) -> str:
            report = make_report(differences, reference="unchanged", candidate="changed", precision=precision)
            return "passed" if mask and report.passed else "caught"

        result = {
            "fault": fault,
            "min_cosine": round(measured[True].min_cosine, 7),
            "gate": {name.value: judge(measured[name.quantized], name) for name in Precision},
            "structure": judge(in_fp32, Precision.FP32),
        }
        echo(json.dumps(result))
        return result

    for fault, change in CONFIGS.items():
        yield row(fault, PyTorchBackend(folder, config=change(config)))
    first_layer = PyTorchBackend(folder)
    causal_in_first_layer(first_layer.model)
    yield row("causal mask in the first layer", first_layer)
    with_everything_pooled = Changed(unchanged, lambda batch: replace(batch, pool_mask=batch.attention_mask))
    yield row("instruction pooled", with_everything_pooled)
    with_everything_attended = Changed(
        unchanged, lambda batch: replace(batch, attention_mask=np.ones_like(batch.attention_mask))
    )
    yield row("padding attended", with_everything_attended)
    with tanh_gelu():
        yield row("tanh form of GELU", unchanged)


def main() -> int:
    """Runs the command."""

    def command() -> None:
        record = {
            "command": "python -m benchmarks.mutations",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "versions": installed_versions(RECORDED),
            "rows": list(measure()),
        }
        write_file(RECORD_PATH, (json.dumps(record, indent=1) + "\n").encode())
        echo(f"done: {RECORD_PATH}")

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
