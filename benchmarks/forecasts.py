"""`python -m benchmarks.forecasts`: what NV-Embed-v2 needs by precision, as an export forecasts it before it starts.

The checkpoint has the published names, shapes and types; its files are holes that take no disk space. Writes
benchmarks/results/forecasts.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import synthetic
from nvembed_deploy.console import echo, run
from nvembed_deploy.engines.plan_builder import build_memory_bytes
from nvembed_deploy.export.forecast import forecast
from nvembed_deploy.export.options import add_flags, from_flags
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.model.weights import StoredWeights
from nvembed_deploy.spec import Precision

RECORD_PATH = Path("benchmarks") / "results" / "forecasts.json"
BATCH = "8x512"
"""Largest batch of the table: short and long texts of a service with few at a time."""


def row(weights: StoredWeights, precision: Precision) -> dict[str, Any]:
    """Returns the bytes that an export of one precision needs, and its engine."""

    def needs(*flags: str) -> Any:
        parser = argparse.ArgumentParser()
        add_flags(parser)
        arguments = ["--model", str(weights.folder), "--precision", precision.value, "--target", "datacenter"]
        options = from_flags(parser.parse_args([*arguments, "--opt", "4x64", "--max", BATCH, *flags]))
        return forecast(weights, options, plan=False)

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
        }
        write_file(RECORD_PATH, (json.dumps(record, indent=1) + "\n").encode())
        echo(f"done: {RECORD_PATH}")

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
