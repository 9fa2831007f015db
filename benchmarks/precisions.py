"""`python -m benchmarks.precisions`: exports the embedded model in every precision and records what came out.

Sizes, the gate's cosines, times, and MTEB's scores against PyTorch on local data sets. Writes
`benchmarks/results/precisions.json`,
from which `tools.readme` makes the README's tables.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nvembed_deploy.bundle.manifest import GRAPH, PLAN, QUANTIZATION, WEIGHTS, Manifest
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import say
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.evaluation.compare import RECORDED, scores, tolerance_of
from nvembed_deploy.evaluation.tasks import folder_tasks
from nvembed_deploy.export.graph.trace import DTYPES
from nvembed_deploy.export.options import default_model
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.spec import Precision
from nvembed_deploy.system import describe_machine, installed_versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "precisions.json"
STARTS = 7
Encode = Callable[..., NDArray[np.float32]]
FIRST_VECTOR = """
import time, sys, warnings
start = time.perf_counter()
warnings.simplefilter("ignore")
from nvembed_deploy import Encoder
Encoder(sys.argv[1]).encode("how do I undo a commit?")
print(time.perf_counter() - start)
"""


def measure(precision: Precision, folder: Path) -> dict[str, Any]:
    """Exports once, and starts the encoder several times in fresh processes.

    Args:
        precision: What to export.
        folder: Where to put the bundle.
    """
    out = folder / precision.value
    command = [sys.executable, "-m", "export.trt", "--precision", precision.value, "--out", str(out)]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds = time.monotonic() - started
    told = re.search(r"peak memory ([\d.]+) GiB", done.stderr)
    assert told is not None
    manifest = Bundle.open(out).manifest
    report = manifest.parity[0]
    starts = [
        float(
            subprocess.run([sys.executable, "-c", FIRST_VECTOR, out], capture_output=True, text=True, check=True).stdout
        )
        for _ in range(STARTS)
    ]
    kept = []
    if precision.quantized:
        groups = json.loads((out / QUANTIZATION).read_text(encoding="utf-8"))["groups"]
        kept = [group["name"] for group in groups if group["kept"]]
    return {
        "precision": precision.value,
        "export_s": seconds,
        "export_peak_gib": float(told[1]),
        "plan_bytes": manifest.files[PLAN].bytes if manifest.plan else None,
        "graph_bytes": manifest.files[GRAPH].bytes + manifest.files[WEIGHTS].bytes,
        "matrix_bytes": manifest.files[WEIGHTS].bytes - _embedding_bytes(manifest),
        "kept_groups": kept,
        "min_cosine": report.min_cosine,
        "mean_cosine": report.mean_cosine,
        "overlap": report.overlap,
        "max_difference": report.max_difference,
        "first_vector_s": statistics.median(starts),
        "versions": manifest.versions,
    }


def _embedding_bytes(manifest: Manifest) -> int:
    """Token embeddings are never quantized; all else of the weights' file is matrices, and norms of a few kilobytes."""
    model = manifest.source.architecture
    return model.vocab_size * model.hidden_size * DTYPES[manifest.precision.base].itemsize


def remembering(encode: Encode) -> Encode:
    """The same with each text embedded once: tasks ask for the same texts again and again."""
    known: dict[tuple[str | None, str], NDArray[np.float32]] = {}

    def remembered(texts: list[str], *, prompt: str | None = None) -> NDArray[np.float32]:
        new = list(dict.fromkeys(text for text in texts if (prompt, text) not in known))
        if new:
            known.update(zip(((prompt, text) for text in new), encode(new, prompt=prompt), strict=True))
        return np.stack([known[prompt, text] for text in texts])

    return remembered


def _scores_of(precision: Precision | None, folder: Path, data: Path, most: int | None) -> dict[str, float]:
    """MTEB's scores of a precision's bundle; of PyTorch for None."""
    tasks = folder_tasks(data, max_documents=most)
    encoder = Encoder(folder / (precision or Precision.FP32).value, device="cpu", backend="onnxruntime")
    if precision is None:
        encoder = Encoder.from_checkpoint(default_model(), like=encoder)
    setattr(encoder, "encode", remembering(encoder.encode))  # noqa: B010 - of this one alone
    found = scores(encoder, [item.task for item in tasks])
    say(f"scored {encoder.backend}{f', {precision.value}' if precision else ''}")
    return found


def _take_a_core(cores: multiprocessing.Queue[int]) -> None:
    os.sched_setaffinity(0, {cores.get()})
    torch.set_num_threads(1)  # it counted the cores when it was imported, and threads of one core wait for each other


def score(folder: Path, data: Path, most: int | None) -> dict[str, list[dict[str, Any]]]:
    """MTEB's scores of every precision's bundle against PyTorch, each in a process on a core of its own.

    Args:
        folder: Holds a bundle for each precision.
        data: Folder of evaluation sets.
        most: Most documents of a corpus.

    Returns:
        Precision to its tasks: name, type, size, both scores and the tolerance, in points.
    """
    context = multiprocessing.get_context("spawn")
    cores: multiprocessing.Queue[int] = context.Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    sides = (None, *Precision)
    with ProcessPoolExecutor(
        min(len(os.sched_getaffinity(0)), len(sides)), context, initializer=_take_a_core, initargs=(cores,)
    ) as pool:
        wanted, *found = pool.map(_scores_of, sides, *zip(*[(folder, data, most)] * len(sides), strict=True))
    tasks = folder_tasks(data, max_documents=most)
    return {
        precision.value: [
            {
                "task": (name := item.task.metadata.name),
                "type": item.task.metadata.type,
                "size": item.size,
                "reference": wanted[name],
                "engine": own[name],
                "tolerance": tolerance_of(precision, item.size),
            }
            for item in tasks
        ]
        for precision, own in zip(Precision, found, strict=True)
    }


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precisions", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of evaluation sets")
    parser.add_argument("--max-documents", type=int, default=None, metavar="N", help="cut the corpora, judged first")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for precision in Precision:
            say(f"measuring {precision.value}")
            rows.append(measure(precision, Path(folder)))
        scored = score(Path(folder), flags.data, flags.max_documents)
    cut = f" --max-documents {flags.max_documents}" if flags.max_documents else ""
    record = {
        "command": f"python -m benchmarks.precisions --data {flags.data}{cut}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{describe_machine()}, no GPU",
        "rows": rows,
        "scores": scored,
        "score_versions": installed_versions(RECORDED) | {"python": platform.python_version()},
    }
    write_file(RESULTS, (json.dumps(record, indent=1) + "\n").encode())
    say(f"done: {RESULTS.relative_to(ROOT)}; now python -m tools.readme")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
