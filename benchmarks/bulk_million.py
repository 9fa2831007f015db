"""`python -m benchmarks.bulk_million BUNDLE`: embeds a million short texts by `nvembed bulk`, killed and continued.

The texts are made of the words in this file, differ from each other, and have at most 16 tokens. Two workers embed
them; the driver is killed by SIGKILL twice, and a worker once, at moments drawn at random, and the same command
continues. Then every row must be there once, in order, and a sample must have the vectors that `Encoder` returns. The
record has the rate, the memory of all processes, and the share of the workers' time outside the engine, which does not
run while a worker reads, writes or waits. Writes benchmarks/results/bulk_million.json.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stages import timed
from nvembed_deploy.console import BUNDLE_HELP, echo, run
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError, ExportError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import describe_machine

RESULT = Path("benchmarks") / "results" / "bulk_million.json"
MAX_TOKENS = 16
WORKERS = 2
SAMPLE_ROWS = 2000
MIN_COSINE = 0.9999
"""A text's cosine in another batch: the order of additions differs, and of int8 graphs nothing else."""
WORDS = (
    ("red", "old", "small", "quiet", "broken", "heavy", "new", "wet", "early", "cheap"),
    ("river", "engine", "garden", "letter", "market", "window", "teacher", "bridge", "winter", "song"),
    ("under", "behind", "without", "near", "after", "against", "above", "inside", "beyond", "before"),
    ("the house", "our city", "a forest", "the sea", "your office", "this road", "a mountain", "the school", "my boat",
     "that hill"),
    ("sleeps", "breaks", "sings", "waits", "falls", "grows", "burns", "opens", "turns", "stops"),
    ("again", "slowly", "today", "at night", "in May", "forever", "by chance", "at last", "for you", "too soon"),
)  # fmt: skip


def texts(count: int) -> Iterator[str]:
    """Yields different texts of 7 to 9 words, always the same, neighbours unlike each other.

    Raises:
        ConfigError: There are not so many.
    """
    total = len(WORDS[0]) ** len(WORDS)
    if count > total:
        raise ConfigError(f"--texts must be at most {total:,}, got {count:,}")
    for index in range(count):
        number = index * 387_420_489 % total  # 3^18 has no factor in common with 10^6, so that none is repeated
        words = []
        for choices in WORDS:
            number, choice = divmod(number, len(choices))
            words.append(choices[choice])
        yield f"the {' '.join(words)}"


def write_corpus(path: Path, count: int) -> None:
    """Writes the texts as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": index, "text": text}) + "\n" for index, text in enumerate(texts(count)))


class ProcessTree(threading.Thread):
    """Samples the memory of a process and its descendants while they run, in MiB of proportional set size."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.peak_mib = self.peak_worker_mib = 0.0
        self.workers: list[int] = []
        """Processes that run the actor."""
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(1):
            sizes = {pid: _memory_mib(pid) for pid in (self.pid, *_descendants(self.pid))}
            self.workers = [pid for pid in sizes if "ray::Embedder" in _command_line(pid)]
            self.peak_mib = max(self.peak_mib, sum(sizes.values()))
            self.peak_worker_mib = max([self.peak_worker_mib, *(sizes[pid] for pid in self.workers)])

    def end(self) -> None:
        """Ends the thread."""
        self._ended.set()
        self.join()


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found, waiting = [], [pid]
    while waiting:
        waiting += (next_pids := children.get(waiting.pop(), []))
        found += next_pids
    return found


def _memory_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def run_job(command: Sequence[str], log: Path, kills: Sequence[tuple[int, str]], out: Path) -> dict[str, Any]:
    """Runs the job, kills its driver or a worker when it has made some shards, and returns what was seen.

    Args:
        command: The job.
        log: File to which its stderr is added.
        kills: Number of shards in the output, and `driver` or `worker`.
        out: The output.

    Raises:
        ExportError: The job failed.
    """
    started = time.monotonic()
    killed: list[str] = []
    with log.open("ab") as stderr, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr) as process:
        tree = ProcessTree(process.pid)
        tree.start()
        for shards, kind in kills:
            while process.poll() is None and (len(list(out.glob("*.parquet"))) < shards or not tree.workers):
                time.sleep(0.1)
            if process.poll() is None:
                os.kill(process.pid if kind == "driver" else tree.workers[0], signal.SIGKILL)
                killed.append(kind)
        code = process.wait()
        tree.end()
    if code and "driver" not in killed:
        raise ExportError(f"the job failed: {log.read_text().strip().splitlines()[-1]}")
    return {
        "seconds": round(time.monotonic() - started, 1),
        "killed": killed,
        "peak_memory_mib": round(tree.peak_mib),
        "peak_worker_mib": round(tree.peak_worker_mib),
    }


def check_output(out: Path, count: int, encoder: Encoder) -> dict[str, Any]:
    """Checks that the output has each row once and in order, and the vectors of a sample.

    Raises:
        ExportError: It has not.
    """
    import pyarrow.parquet as pq

    expected, rows, lowest, sampled = texts(count), 0, 1.0, 0
    rng = random.Random(0)
    for path in sorted(out.glob("*.parquet")):
        table = pq.read_table(path)
        shard_texts = list(itertools.islice(expected, table.num_rows))
        if table.column("text").to_pylist() != shard_texts or table.column("id")[0].as_py() != rows:
            raise ExportError(f"{path} has other rows than the corpus from row {rows}")
        rows += table.num_rows
        indices = rng.sample(range(table.num_rows), min(table.num_rows, max(1, SAMPLE_ROWS * table.num_rows // count)))
        vectors = np.array(table.column("embedding").take(indices).to_pylist())
        again = encoder.encode([shard_texts[index] for index in indices])
        lowest = min(lowest, float((vectors * again).sum(axis=1).min()))
        sampled += len(indices)
    if rows != count or lowest < MIN_COSINE:
        raise ExportError(f"{rows} of {count} rows, and the lowest cosine of {sampled} is {lowest}")
    return {"rows": rows, "sampled": sampled, "lowest_cosine": round(lowest, 7)}


def encode_speed(encoder: Encoder, count: int) -> tuple[float, float]:
    """Returns the texts per second of one engine, and the share of that time in which the engine itself runs."""
    sample = list(texts(count))
    encoder.encode(sample[: count // 10])
    with timed(encoder) as seconds:
        encoder.encode(sample)
    return count / seconds["in all"], seconds["engine"] / seconds["in all"]


def step_seconds(line: str) -> dict[str, float]:
    """Returns the workers' seconds by step, from the line that a job ends with."""
    return {step: float(seconds) for step, seconds in re.findall(r"(\w+) ([\d.]+) s", line)}


def measure(bundle: Path, count: int, *, seed: int, shard_rows: int, work: Path) -> dict[str, Any]:
    """Runs the job with its kills, checks the output, and returns the record."""
    corpus, out, log = work / "corpus.jsonl", work / "vectors", work / "log.txt"
    write_corpus(corpus, count)
    encoder = Encoder(bundle, device="cpu", threads=1)
    longest = max(map(len, encoder.tokenize(list(itertools.islice(texts(count), 10_000)))))
    if longest > MAX_TOKENS:
        raise ConfigError(f"this tokenizer makes {longest} tokens of a text, more than {MAX_TOKENS}")
    speed, engine_share = encode_speed(encoder, min(count, shard_rows))
    echo(f"  one engine alone: {speed:.0f} texts/s, {engine_share:.1%} of it in the engine")
    command = [
        sys.executable, "-m", "nvembed_deploy", "bulk", str(bundle), "--input", str(corpus), "--out", str(out),
        "--workers", str(WORKERS), "--cpus", "1", "--shard-rows", str(shard_rows),
    ]  # fmt: skip
    rng = random.Random(seed)
    runs = []
    for kinds in (("driver",), ("worker", "driver"), ()):
        rows_before, shards_before = _rows(out), len(list(out.glob("*.parquet")))
        moments = sorted(shards_before + rng.uniform(0.05, 0.35) * count / shard_rows for _ in kinds)
        seen = run_job(command, log, [(int(moment), kind) for moment, kind in zip(moments, kinds, strict=True)], out)
        runs.append(seen | {"rows": _rows(out) - rows_before})
        echo(f"  {runs[-1]}")
    last_line = next(line for line in reversed(log.read_text().splitlines()) if line.startswith("workers' time"))
    steps = step_seconds(last_line)
    embedding_seconds = steps["encode"] * engine_share
    worker_seconds = WORKERS * (runs[-1]["seconds"])
    return {
        "texts": count,
        "shard_rows": shard_rows,
        "one_engine_alone_texts_per_second": round(speed),
        "share_of_encode_in_the_engine": round(engine_share, 3),
        "runs": runs,
        "last_run": {
            "texts_per_second": round(runs[-1]["rows"] / runs[-1]["seconds"]),
            "worker_seconds": round(worker_seconds, 1),
            "steps_seconds": steps,
            "share_outside_the_engine": round(1 - embedding_seconds / worker_seconds, 3),
        },
        "peak_memory_mib": max(run["peak_memory_mib"] for run in runs),
        "peak_worker_mib": max(run["peak_worker_mib"] for run in runs),
        "output": check_output(out, count, encoder),
    }


def _rows(out: Path) -> int:
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(path).num_rows for path in out.glob("*.parquet"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, in the root of a checkout."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bulk_million", description=__doc__.split(": ", 1)[1])
    parser.add_argument("bundle", type=Path, help=BUNDLE_HELP)
    parser.add_argument("--texts", type=int, default=1_000_000, help="number of texts (default: %(default)s)")
    parser.add_argument("--shard-rows", type=int, default=10_000, help="see nvembed bulk (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: %(default)s)")
    parser.add_argument("--beside", default="", metavar="WORDS", help="what else the machine did meanwhile, to record")
    parser.add_argument("--out", type=Path, default=RESULT, help="record to write (default: %(default)s)")
    flags = parser.parse_args(argv)

    def command() -> None:
        load_before = os.getloadavg()[0]
        with tempfile.TemporaryDirectory(prefix="nvembed-million-") as work:
            result = measure(flags.bundle, flags.texts, seed=flags.seed, shard_rows=flags.shard_rows, work=Path(work))
        record = {
            "command": f"python -m benchmarks.bulk_million BUNDLE --texts {flags.texts} --seed {flags.seed}",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "beside": flags.beside,
            "load_before": round(load_before, 1),
            "precision": Encoder(flags.bundle, device="cpu").manifest.precision.value,
            **result,
        }
        write_file(flags.out, (json.dumps(record, indent=1) + "\n").encode())
        sys.stdout.write(f"{flags.out}\n")

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
