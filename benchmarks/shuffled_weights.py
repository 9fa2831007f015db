"""`python -m benchmarks.shuffled_weights`: what INT4 loses when the weights' values stay and their order is random.

Exports the embedded model in INT4 as it is, and with the entries of each matrix in random order: of the token
embeddings, of the decoder layers, of both. Every matrix keeps its values; what training made of their arrangement is
gone, and with it the correlation of a layer's inputs. Writes `benchmarks/results/shuffled_weights.json`.
"""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from nvembed_deploy.bundle.manifest import GRAPH, QUANTIZATION, TOKENIZER, WEIGHTS
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import echo, run
from nvembed_deploy.errors import DeployError
from nvembed_deploy.export.options import default_model
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import describe_machine, installed_versions

RECORDED = ("torch", "numpy", "onnxruntime")
"""Packages whose versions are recorded."""
RECORD_PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "shuffled_weights.json"
EMBEDDINGS, LAYERS = "embedding_model.embed_tokens.", "embedding_model.layers."
SHUFFLED: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "token embeddings": (EMBEDDINGS,),
    "decoder layers": (LAYERS,),
    "both": (EMBEDDINGS, LAYERS),
}
"""Prefixes of the matrices whose entries are shuffled."""
WEIGHT_FILE = "model.safetensors"


def write_checkpoint(folder: Path, prefixes: tuple[str, ...]) -> None:
    """Copies the embedded model, with the entries of some matrices in random order."""
    original = default_model()
    folder.mkdir()
    for name in ("config.json", TOKENIZER, "tokenizer_config.json"):
        shutil.copy(original / name, folder)
    rng = np.random.default_rng(0)
    weights = {
        name: rng.permutation(weight.ravel()).reshape(weight.shape)
        if weight.ndim == 2 and name.startswith(prefixes)
        else weight
        for name, weight in load_file(original / WEIGHT_FILE).items()
    }
    save_file(weights, folder / WEIGHT_FILE, metadata={"format": "pt"})


def measure(work: Path) -> Iterator[dict[str, Any]]:
    """Yields a row of the record for each set of shuffled matrices."""
    for index, (description, prefixes) in enumerate(SHUFFLED.items()):
        checkpoint, folder = work / f"checkpoint-{index}", work / f"bundle-{index}"
        write_checkpoint(checkpoint, prefixes)
        command = [sys.executable, "-m", "export.to_onnx", "--precision", "int4"]
        process = subprocess.run(
            [*command, "--model", str(checkpoint), "--out", str(folder)], stderr=subprocess.PIPE, text=True
        )
        if process.returncode:
            raise DeployError(f"the export failed: {process.stderr.strip().splitlines()[-1:]}")
        bundle = Bundle.open(folder)
        record = json.loads(bundle.read(QUANTIZATION))
        excluded = [group for group in record["groups"] if group["excluded"]]
        row = {
            "shuffled": description,
            "groups": len(record["groups"]),
            "excluded": [group["name"] for group in excluded],
            "mean_error": round(sum(group["error"] for group in record["groups"]) / len(record["groups"]), 5),
            "all_quantized": {name: round(value, 5) for name, value in record["all_quantized"].items()},
            "bounds": record["bounds"],
            "bytes": bundle.manifest.files[GRAPH].bytes + bundle.manifest.files[WEIGHTS].bytes,
        }
        echo(json.dumps(row))
        yield row


def main() -> int:
    """Runs the command."""

    def command() -> None:
        with tempfile.TemporaryDirectory() as work:
            record = {
                "command": "python -m benchmarks.shuffled_weights",
                "date": datetime.date.today().isoformat(),
                "machine": describe_machine(),
                "versions": installed_versions(RECORDED),
                "rows": list(measure(Path(work))),
            }
        write_file(RECORD_PATH, (json.dumps(record, indent=1) + "\n").encode())
        echo(f"done: {RECORD_PATH}")

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
