"""`python -m benchmarks.held_out BUNDLE... --data DIR`: quantized bundles on 1,200 texts that nothing was fitted to.

The cosines to PyTorch of 100 texts each of eight evaluation sets, and of 200 queries with and without an instruction,
beside what the gate measured on its own texts. The bundles are the embedded model's. Writes
`benchmarks/results/held_out.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_deploy.backends.base import Backend
from nvembed_deploy.backends.ort import OrtBackend
from nvembed_deploy.backends.pytorch import PyTorchBackend
from nvembed_deploy.bundle.manifest import CPU_GRAPH, GRAPH, QUANTIZATION, TOKENIZER, WEIGHTS
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import echo, run
from nvembed_deploy.export.options import default_model
from nvembed_deploy.export.quantization.calibration import padded_batches
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.files.json_lines import read_rows
from nvembed_deploy.system import describe_machine, installed_versions
from nvembed_deploy.tokenization import DEFAULT_QUERY_INSTRUCTION, TextEncoder, TokenRow

RECORDED = ("torch", "numpy", "onnxruntime")
"""Packages whose versions are recorded."""
RECORD_PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "held_out.json"
DOCUMENTS = {
    "banking77/test.jsonl": ("text",),
    "sts12/test.jsonl": ("a", "b"),
    "stsbenchmark/test.jsonl": ("a", "b"),
    "emotion/test.jsonl": ("text",),
    "stackoverflow_titles/test.jsonl": ("text",),
    "mrpc/test.jsonl": ("a", "b"),
    "scifact/corpus.jsonl": ("text",),
    "cranfield/corpus.jsonl": ("text",),
}
"""Files of the data folder, and the fields of their texts."""
QUERIES = ("scifact/queries.jsonl", "cranfield/queries.jsonl")
TEXTS_PER_FILE = 100
MAX_TOKENS = 96


def sample(path: Path, fields: Sequence[str]) -> list[str]:
    """Returns some texts of a file, reproducibly."""
    texts = [str(row[field]) for row in read_rows(path) for field in fields if str(row.get(field) or "").strip()]
    return random.Random(1).sample(list(dict.fromkeys(texts)), TEXTS_PER_FILE)


def token_rows(data: Path, text: TextEncoder) -> list[TokenRow]:
    """Returns the tokenized texts: documents, queries, and queries with an instruction."""
    documents = [body for name, fields in DOCUMENTS.items() for body in sample(data / name, fields)]
    queries = [body for name in QUERIES for body in sample(data / name, ("text",))]
    return [
        *text.tokenize(documents + queries, prompt=text.prompt(None, None), max_length=MAX_TOKENS),
        *text.tokenize(queries, prompt=text.query_prompt(DEFAULT_QUERY_INSTRUCTION), max_length=MAX_TOKENS),
    ]


def measure(bundles: Sequence[Path], data: Path) -> Iterator[dict[str, Any]]:
    """Yields a row of the record for each bundle."""
    first = Bundle.open(bundles[0])
    text = TextEncoder(first.read(TOKENIZER), first.manifest.text)
    batches = padded_batches(text, token_rows(data, text))[1]

    def embed(backend: Backend) -> Any:
        return np.concatenate([backend.run(batch).embeddings for batch in batches])

    expected = embed(PyTorchBackend(default_model()))
    for folder in bundles:
        bundle = Bundle.open(folder)
        cosines = (expected * embed(OrtBackend(folder / CPU_GRAPH))).sum(axis=1)
        quantization = json.loads(bundle.read(QUANTIZATION))
        groups = quantization["groups"]
        gate = min(bundle.manifest.parity, key=lambda report: report.min_cosine)
        tolerance = gate.tolerance.min_cosine
        row = {
            "precision": bundle.manifest.precision.value,
            "bytes": bundle.manifest.files[GRAPH].bytes + bundle.manifest.files[WEIGHTS].bytes,
            "calibration_tokens": quantization["tokens"],
            "groups": len(groups),
            "excluded": [group["name"] for group in groups if group["excluded"]],
            "texts": len(cosines),
            "min_cosine": round(float(cosines.min()), 5),
            "mean_cosine": round(float(cosines.mean()), 5),
            "below_tolerance": int((cosines < tolerance).sum()),
            "tolerance": tolerance,
            "gate_texts": gate.texts,
            "gate_min_cosine": round(gate.min_cosine, 5),
            "gate_mean_cosine": round(gate.mean_cosine, 5),
        }
        echo(json.dumps(row))
        yield row


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.held_out", description=(__doc__ or "").split(": ", 1)[1]
    )
    parser.add_argument(
        "bundles", nargs="+", type=Path, metavar="BUNDLE", help="quantized bundle of the embedded model"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of evaluation sets")
    flags = parser.parse_args(argv)

    def command() -> None:
        record = {
            "command": "python -m benchmarks.held_out BUNDLE... --data DIR",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "versions": installed_versions(RECORDED),
            "rows": list(measure(flags.bundles, flags.data)),
        }
        write_file(RECORD_PATH, (json.dumps(record, indent=1) + "\n").encode())
        echo(f"done: {RECORD_PATH}")

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
