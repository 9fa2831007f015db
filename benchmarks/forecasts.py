"""`python -m benchmarks.forecasts`: what NV-Embed-v2 needs by precision, and what fits on a Jetson, as forecast.

The checkpoint has the published names, shapes and types; its files are holes that take no disk space. For the Jetsons,
two relatives are added by the sizes in their config.json. Writes benchmarks/results/forecasts.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import synthetic
from nvembed_deploy.console import echo, run
from nvembed_deploy.engines.plan_builder import build_memory_bytes
from nvembed_deploy.export.forecast import Forecast, forecast, gpu_bytes, stored_bytes
from nvembed_deploy.export.options import ExportOptions, add_flags, from_flags
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.model.config_json import read_architecture, read_checkpoint_architecture
from nvembed_deploy.model.sentence_transformers_files import StatedPooling
from nvembed_deploy.model.weights import StoredWeights
from nvembed_deploy.spec import Precision

RECORD_PATH = Path("benchmarks") / "results" / "forecasts.json"
BATCH = "8x512"
"""Largest batch of the table: short and long texts of a service with few at a time."""


BOARDS = {"jetson-orin": (8, 16, 32, 64), "jetson-thor": (128,)}
"""Memory of the boards in GB, which CPU and GPU share. Source: NVIDIA's datasheets of the modules."""
USABLE_SHARE, SYSTEM_BYTES = 0.93, 2**30
"""Share of a board's memory that Linux reports as its total, and what the system itself needs without a desktop."""
BATCHES, TOKENS = (1, 2, 4, 8, 16, 32, 64), 512
RELATIVES: dict[str, dict[str, Any]] = {
    "llama-nemotron-embed-1b-v2": {
        "architectures": ["LlamaBidirectionalModel"],
        "model_type": "llama_bidirec",
        "pooling": "avg",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
    },
    "Qwen3-Embedding-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151669,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
    },
}
"""Source: config.json of nvidia/llama-nemotron-embed-1b-v2, without its rope scaling, and Qwen/Qwen3-Embedding-0.6B."""


def _options(precision: Precision, target: str, *flags: str) -> ExportOptions:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_flags(parser.parse_args(["--precision", precision.value, "--target", target, *flags]))


def models() -> dict[str, ModelConfig]:
    """Returns the architectures of the board table by name."""
    last_token = StatedPooling(modes=frozenset({"lasttoken"}), include_prompt=True, path="1_Pooling/config.json")
    nemotron, qwen3 = RELATIVES.items()
    return {
        "NV-Embed-v2": read_architecture(synthetic.CONFIG),
        nemotron[0]: read_architecture(nemotron[1]),
        qwen3[0]: read_architecture(qwen3[1], pooling=last_token),
    }


def board_rows(name: str, config: ModelConfig) -> Iterator[dict[str, Any]]:
    """Yields what fits on each board, by precision: building the plan there, and the largest batch of 512 tokens."""
    for precision in (Precision.FP16, Precision.INT8, Precision.INT4):
        for target, sizes in BOARDS.items():
            needs = {}
            for batch in BATCHES:
                shape = ("--opt", f"1x{TOKENS}", "--max", f"{batch}x{TOKENS}")
                needs[batch] = _options(precision, target, *shape)
            weights = stored_bytes(config, needs[1])
            building = build_memory_bytes(weights)
            for size in sizes:
                usable = int(size * USABLE_SHARE * 2**30) - SYSTEM_BYTES
                fitting = [batch for batch in BATCHES if gpu_bytes(config, needs[batch]) <= usable]
                yield {
                    "model": name,
                    "precision": precision.value,
                    "target": target,
                    "board_gb": size,
                    "usable": usable,
                    "weights": weights,
                    "building": building,
                    "builds": building <= usable,
                    "largest_batch": max(fitting, default=0),
                }


def row(weights: StoredWeights, precision: Precision) -> dict[str, Any]:
    """Returns the bytes that an export of one precision needs, and its engine."""

    def needs(*flags: str) -> Forecast:
        arguments = ("--model", str(weights.folder), "--opt", "4x64", "--max", BATCH, *flags)
        return forecast(weights, _options(precision, "datacenter", *arguments), plan=False)

    compared, streamed = needs(), needs("--no-parity")
    return {
        "precision": precision.value,
        "weights": compared.weights,
        "gpu": compared.gpu,
        "building": build_memory_bytes(compared.weights),
        "export": streamed.memory,
        "export_compared": compared.memory,
        "disk": compared.disk,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forecasts", description=__doc__.splitlines()[0])
    parser.parse_args(argv)

    def command() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "NV-Embed-v2"
            synthetic.make(folder, seed=None)
            weights = StoredWeights(folder, read_checkpoint_architecture(folder))
            rows = [row(weights, precision) for precision in Precision if precision is not Precision.FP32]
        record = {
            "command": "python -m benchmarks.forecasts",
            "date": datetime.date.today().isoformat(),
            "batch": BATCH,
            "rows": rows,
            "boards": [board for name, config in models().items() for board in board_rows(name, config)],
        }
        write_file(RECORD_PATH, (json.dumps(record, indent=1) + "\n").encode())
        echo(f"done: {RECORD_PATH}")

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
