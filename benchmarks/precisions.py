"""`python -m benchmarks.precisions`: exports the embedded model in every precision and measures the bundles.

Records sizes, the cosines of the parity gate, times, and MTEB scores against PyTorch on local data sets. Writes
`benchmarks/results/precisions.json`, from which `tools.readme` makes the README's tables.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nvembed_deploy.bundle.manifest import GRAPH, PLAN, QUANTIZATION, WEIGHTS, Manifest
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import echo, run
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.evaluation.built_in import built_in_tasks
from nvembed_deploy.evaluation.compare import RECORDED, scores, tolerance_of
from nvembed_deploy.evaluation.tasks import LocalTask, folder_tasks
from nvembed_deploy.export.graph.trace import DTYPES
from nvembed_deploy.export.options import default_model
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.spec import Precision
from nvembed_deploy.system import describe_machine, installed_versions

ROOT = Path(__file__).resolve().parent.parent
RECORD_PATH = ROOT / "benchmarks" / "results" / "precisions.json"
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
    """Exports a precision once and starts the encoder several times in new processes.

    Args:
        precision: Precision to export.
        folder: Folder that gets a folder for the bundle.

    Returns:
        The row of the record.
    """
    out = folder / precision.value
    command = [sys.executable, "-m", "export.trt", "--precision", precision.value, "--out", str(out)]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds = time.monotonic() - started
    peak_match = re.search(r"peak memory ([\d.]+) GiB", done.stderr)
    assert peak_match is not None
    manifest = Bundle.open(out).manifest
    report = manifest.parity[0]
    starts = [
        float(
            subprocess.run([sys.executable, "-c", FIRST_VECTOR, out], capture_output=True, text=True, check=True).stdout
        )
        for _ in range(STARTS)
    ]
    excluded_groups = []
    if precision.quantized:
        groups = json.loads((out / QUANTIZATION).read_text(encoding="utf-8"))["groups"]
        excluded_groups = [group["name"] for group in groups if group["excluded"]]
    return {
        "precision": precision.value,
        "date": datetime.date.today().isoformat(),
        "export_s": seconds,
        "export_peak_gib": float(peak_match[1]),
        "plan_bytes": manifest.files[PLAN].bytes if manifest.plan else None,
        "graph_bytes": manifest.files[GRAPH].bytes + manifest.files[WEIGHTS].bytes,
        "matrix_bytes": manifest.files[WEIGHTS].bytes - _embedding_bytes(manifest),
        "kept_groups": excluded_groups,
        "min_cosine": report.min_cosine,
        "mean_cosine": report.mean_cosine,
        "overlap": report.overlap,
        "max_difference": report.max_difference,
        "first_vector_s": statistics.median(starts),
        "versions": manifest.versions,
    }


def _embedding_bytes(manifest: Manifest) -> int:
    """Returns the bytes of the token embeddings, which are never quantized; other weights are matrices and norms."""
    model = manifest.source.architecture
    return model.vocab_size * model.hidden_size * DTYPES[manifest.precision.base].itemsize


def remembering(encode: Encode) -> Encode:
    """Wraps `encode` so that each text is embedded once: tasks repeat the same texts."""
    vectors: dict[tuple[str | None, str], NDArray[np.float32]] = {}

    def remembered(texts: list[str], *, prompt: str | None = None) -> NDArray[np.float32]:
        new_texts = list(dict.fromkeys(text for text in texts if (prompt, text) not in vectors))
        if new_texts:
            vectors.update(zip(((prompt, text) for text in new_texts), encode(new_texts, prompt=prompt), strict=True))
        return np.stack([vectors[prompt, text] for text in texts])

    return remembered


def _tasks(data: Path | None, max_documents: int | None) -> list[LocalTask]:
    """Returns the tasks of a folder, or the built-in ones.

    Raises:
        ConfigError: The folder has no evaluation set, or a limit is given for the built-in tasks.
    """
    if data is not None:
        return folder_tasks(data, max_documents=max_documents)
    if max_documents is not None:
        raise ConfigError("--max-documents applies to the corpora of --data; pass --data, or leave it out")
    return built_in_tasks()


def _scores_of(
    precision: Precision | None, folder: Path, data: Path | None, max_documents: int | None
) -> dict[str, float]:
    """Returns the MTEB scores of a precision's bundle, or of PyTorch for None."""
    tasks = _tasks(data, max_documents)
    encoder = Encoder(folder / (precision or Precision.FP32).value, device="cpu", backend="onnxruntime")
    if precision is None:
        encoder = Encoder.from_checkpoint(default_model(), like=encoder)
    setattr(encoder, "encode", remembering(encoder.encode))  # noqa: B010 - on this instance only
    task_scores = scores(encoder, [local_task.task for local_task in tasks])
    echo(f"scored {encoder.backend}{f', {precision.value}' if precision else ''}")
    return task_scores


def _claim_core(cores: multiprocessing.Queue[int]) -> None:
    os.sched_setaffinity(0, {cores.get()})
    torch.set_num_threads(1)  # torch counted the cores at import, and threads that share a core wait for each other


def score(
    folder: Path,
    data: Path | None,
    max_documents: int | None,
    precisions: Sequence[Precision],
    reference_scores: dict[str, float] | None,
) -> dict[str, list[dict[str, Any]]]:
    """Scores bundles and PyTorch with MTEB, each in a process on a core of its own.

    Args:
        folder: Folder with a bundle for each precision.
        data: Folder of evaluation sets; None for the built-in tasks.
        max_documents: Maximum number of documents of a corpus.
        precisions: Precisions to score.
        reference_scores: PyTorch's score of each task; None to score PyTorch too.

    Returns:
        Tasks of each precision: name, type, size, both scores and the tolerance, in points.
    """
    context = multiprocessing.get_context("spawn")
    cores: multiprocessing.Queue[int] = context.Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    candidates = (*((None,) if reference_scores is None else ()), *precisions)
    with ProcessPoolExecutor(
        min(len(os.sched_getaffinity(0)), len(candidates)), context, initializer=_claim_core, initargs=(cores,)
    ) as pool:
        arguments = zip(*[(folder, data, max_documents)] * len(candidates), strict=True)
        precision_scores = list(pool.map(_scores_of, candidates, *arguments))
    reference_scores = precision_scores.pop(0) if reference_scores is None else reference_scores
    tasks = _tasks(data, max_documents)
    return {
        precision.value: [
            {
                "task": (name := local_task.task.metadata.name),
                "type": local_task.task.metadata.type,
                "size": local_task.size,
                "reference": reference_scores[name],
                "engine": engine_scores[name],
                "tolerance": tolerance_of(precision, local_task.size),
            }
            for local_task in tasks
        ]
        for precision, engine_scores in zip(precisions, precision_scores, strict=True)
    }


def _recorded_reference(
    earlier: dict[str, Any], tasks: Sequence[LocalTask], versions: dict[str, str]
) -> dict[str, float]:
    """Returns PyTorch's scores in an earlier record.

    Raises:
        ConfigError: They are of other tasks, or were made with other versions.
    """
    recorded = {task["task"]: (task["size"], task["reference"]) for task in earlier["scores"][Precision.FP32.value]}
    sizes = {local_task.task.metadata.name: local_task.size for local_task in tasks}
    if sizes != {name: size for name, (size, _) in recorded.items()} or versions != earlier["score_versions"]:
        raise ConfigError(
            f"--only compares with the record's scores of PyTorch, made by {earlier['scores_command']} with "
            f"{earlier['score_versions']}; pass the same flags and install these versions, or pass --keep-scores"
        )
    return {name: reference for name, (_, reference) in recorded.items()}


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precisions", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of evaluation sets (default: the built-in tasks)")
    parser.add_argument(
        "--max-documents",
        type=int,
        default=None,
        metavar="N",
        help="limit the corpora to N documents, judged ones first",
    )
    parser.add_argument(
        "--keep-scores",
        action="store_true",
        help="measure the exports alone, and keep the record's scores with their date: scoring takes most of the time",
    )
    parser.add_argument(
        "--only",
        choices=[precision.value for precision in Precision],
        help="measure one precision, and keep the rest of the record with its dates",
    )
    flags = parser.parse_args()

    def command() -> None:
        # First, since a missing folder should not be reported after ten minutes.
        tasks = _tasks(flags.data, flags.max_documents)
        versions = installed_versions(RECORDED) | {"python": platform.python_version()}
        earlier: dict[str, Any] = {}
        reference_scores = None
        if flags.only or flags.keep_scores:
            earlier = json.loads(RECORD_PATH.read_text(encoding="utf-8"))
        if flags.only and not flags.keep_scores:
            reference_scores = _recorded_reference(earlier, tasks, versions)
        precisions = [Precision(flags.only)] if flags.only else list(Precision)
        with tempfile.TemporaryDirectory() as folder:
            rows = {}
            for precision in precisions:
                echo(f"measuring {precision.value}")
                rows[precision] = measure(precision, Path(folder))
            new_scores: dict[str, list[dict[str, Any]]] = {}
            if not flags.keep_scores:
                new_scores = score(Path(folder), flags.data, flags.max_documents, precisions, reference_scores)
        command_line = "python -m benchmarks.precisions"
        command_line += f" --data {flags.data}" if flags.data else ""
        command_line += f" --max-documents {flags.max_documents}" if flags.max_documents else ""
        today = datetime.date.today().isoformat()
        record: dict[str, Any] = {
            "command": command_line + (" --keep-scores" if flags.keep_scores else ""),
            "date": today,
            "machine": f"{describe_machine()}, no GPU",
            "rows": [],
            "scores_command": command_line,
            "score_versions": versions,
            "scores": {},
            "scores_date": today,
        }
        # An earlier record is only read if parts of it are kept.
        kept = {name: value for name, value in earlier.items() if flags.only or "score" in name}
        other_rows = {Precision(row["precision"]): row for row in kept.pop("rows", ())}
        other_dates = kept.pop("score_dates", {}) | (dict.fromkeys(new_scores, today) if flags.only else {})
        record |= kept | {
            "rows": [(other_rows | rows)[precision] for precision in Precision if precision in other_rows | rows],
            "scores": kept.get("scores", {}) | new_scores,
            "score_dates": other_dates,
        }
        write_file(RECORD_PATH, (json.dumps(record, indent=1) + "\n").encode())
        echo(f"done: {RECORD_PATH.relative_to(ROOT)}; now run: python -m tools.readme")

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
