"""`python -m benchmarks.peers WORK`: compares this library with its alternatives in one run.

All use the same weights: the embedded model's decoder as a causal last-token embedder (like e5-mistral), which every
peer can load; none of them runs NV-Embed itself. Each embedder is a process in its own environment. A cold start is the
time from the start of a process to its first vector; then all processes run alternately: one query at a time, and the
mixed corpus in bulk. Every speed is reported with the cosine to transformers' FP32 vectors. Writes
benchmarks/results/peers.json. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, processors
from tqdm import tqdm

from benchmarks.peer_worker import MAX_TOKENS
from nvembed_deploy.batching import DEFAULT_BATCH_TOKENS
from nvembed_deploy.console import echo, run
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.engines.bench import corpus, flops, padding_waste
from nvembed_deploy.errors import DeployError
from nvembed_deploy.export.options import default_model
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.files.json_lines import read_rows
from nvembed_deploy.system import describe_machine

ROOT = Path(__file__).resolve().parent.parent
RECORD_PATH = ROOT / "benchmarks" / "results" / "peers.json"
WORKER = ROOT / "benchmarks" / "peer_worker.py"
ENVIRONMENTS = {
    "torch": ("torch==2.13.0", "sentence-transformers==6.2.0", "fastembed==0.9.1"),
    # The newest optimum-onnx requires transformers 4, and sentence-transformers' ONNX backend requires optimum-onnx.
    "onnx": ("torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0", "sentence-transformers<5.3", "transformers<4.58"),
}
OURS = "ours"
CORPORA = ("banking77", "cranfield", "emotion", "scifact", "stsbenchmark", "trecqa_wang")
QUERIES = 40
STARTS = 3
PEER_BATCH = 32
"""Batch size of the peers: their default, and the fastest of 8, 32 and 128 on two cores."""


@dataclass(frozen=True)
class Peer:
    """An embedder of the comparison."""

    name: str
    kind: str
    """Key of `peer_worker.KINDS`."""
    environment: str
    model: str
    """Name of the model's folder in the work folder."""


PEERS = (
    Peer("PyTorch, eager", "torch", "torch", "checkpoint"),
    Peer("PyTorch, torch.compile", "torch-compile", "torch", "checkpoint"),
    Peer("sentence-transformers, torch", "sentence-transformers", "torch", "checkpoint"),
    Peer("sentence-transformers, torch bf16", "sentence-transformers-bf16", "torch", "checkpoint"),
    Peer("sentence-transformers, ONNX", "sentence-transformers-onnx", "onnx", "checkpoint"),
    Peer("transformers + ONNX Runtime (optimum)", "optimum", "onnx", "checkpoint"),
    Peer("fastembed, own model", "fastembed", "torch", "checkpoint"),
    Peer("ours, ONNX Runtime fp32", "onnxruntime", OURS, "fp32"),
    Peer("ours, OpenVINO fp32", "openvino", OURS, "fp32"),
    Peer("ours, OpenVINO bf16", "openvino", OURS, "bf16"),
    Peer("ours, OpenVINO int8", "openvino", OURS, "int8"),
    Peer("ours, ONNX Runtime int8", "onnxruntime", OURS, "int8"),
)
REFERENCE = "PyTorch, eager"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "work", type=Path, help="folder for environments, models and texts; environments are reused by later runs"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help=f"folder with the data sets {', '.join(CORPORA)} (default: passages of Python's documentation)",
    )
    parser.add_argument(
        "--texts", type=int, default=600, help="number of texts of the mixed corpus (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds in which all peers run alternately (default: %(default)s)"
    )
    flags = parser.parse_args(argv)

    def command() -> None:
        texts = corpus(flags.texts) if flags.data is None else mixed_texts(flags.data, flags.texts)
        work = flags.work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        for name in ENVIRONMENTS:
            _environment(work, name)
        _checkpoint(work)
        _bundles(work)
        record = measure(work, texts, rounds=flags.rounds)
        data_flag = " --data DIR" if flags.data else ""
        record["command"] = f"python -m benchmarks.peers WORK{data_flag} --texts {len(texts)} --rounds {flags.rounds}"
        write_file(RECORD_PATH, (json.dumps(record, indent=1) + "\n").encode())
        echo(f"done: {RECORD_PATH.relative_to(ROOT)}")

    return run(command)


def _environment(work: Path, name: str) -> None:
    folder = work / "environments" / name
    if not (folder / "bin" / "python").exists():
        echo(f"creating the environment {name}")
        venv.create(folder, with_pip=True)
    if not (folder / "ready").exists():
        # torch first: packages that depend on it then use the installed version.
        for requirements in (ENVIRONMENTS[name][:1], ENVIRONMENTS[name]):
            subprocess.run([_python(work, name), "-m", "pip", "install", "--quiet", *requirements], check=True)
        (folder / "ready").touch()


def _python(work: Path, environment: str) -> str:
    return sys.executable if environment == OURS else str(work / "environments" / environment / "bin" / "python")


def _checkpoint(work: Path) -> None:
    """Writes the mini's decoder in the layout of e5-mistral and sentence-transformers, and as an ONNX graph."""
    from safetensors.numpy import load_file, save_file

    folder = work / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)  # it may belong to an earlier mini
    for subfolder in ("", "1_Pooling", "2_Normalize"):
        (folder / subfolder).mkdir(parents=True)
    mini = default_model()
    weights = load_file(mini / "model.safetensors")
    prefix = "embedding_model."
    decoder = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    save_file(decoder, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer.from_file(str(mini / "tokenizer.json"))
    special_tokens = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special_tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    # fastembed has no other limit and would accept longer texts than the others.
    limit = {"model_max_length": MAX_TOKENS}
    settings = json.loads((mini / "tokenizer_config.json").read_text(encoding="utf-8")) | limit
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = json.loads((mini / "config.json").read_text(encoding="utf-8"))["text_config"]
    config |= {"model_type": "mistral", "architectures": ["MistralModel"], "torch_dtype": "float16"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(
            (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
        )
    ]
    pooling = {"word_embedding_dimension": config["hidden_size"], "pooling_mode_lasttoken": True}
    pooling |= {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
    for name, content in (("1_Pooling/config", pooling), ("modules", modules), ("config", config)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    _plain_onnx(folder)


def _plain_onnx(folder: Path) -> None:
    """Exports the graph for the peers' ONNX backends with torch's exporter: ids and mask to states.

    Optimum's exporter adds position ids as a third input to a decoder's graph, which none of the peers provides.
    """
    import torch
    from transformers import AutoModel

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
            self.model.config.use_cache = False

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            states: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return states

    ids = torch.randint(3, 1000, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    (folder / "onnx").mkdir()
    torch.onnx.export(
        States(),
        (ids, mask),
        folder / "onnx" / "model.onnx",
        input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state"],
        opset_version=18,
        dynamic_shapes=(sizes, sizes),
        external_data=False,
    )
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / "onnx" / name).write_bytes((folder / name).read_bytes())


def _bundles(work: Path) -> None:
    for precision in ("fp32", "bf16", "int8"):
        command = [sys.executable, "-m", "export.to_onnx", "--model", str(work / "checkpoint")]
        subprocess.run([*command, "--precision", precision, "--out", str(work / precision)], check=True, cwd=ROOT)


def mixed_texts(data: Path, count: int) -> list[str]:
    """Returns a shuffled mix of short queries and passages, the same number from each data set.

    Raises:
        DeployError: A data set is missing.
    """
    texts: list[str] = []
    for name in CORPORA:
        files = (data / name / file for file in ("corpus.jsonl", "test.jsonl"))
        path = next((file for file in files if file.is_file()), None)
        if path is None:
            raise DeployError(f"{data / name} has neither corpus.jsonl nor test.jsonl; see --data")
        rows = [next(str(row[key]) for key in ("text", "a", "query") if key in row) for row in read_rows(path)]
        texts += [row for row in rows if row.strip()][: count // len(CORPORA)]
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[index] for index in order]


class Worker:
    """Process of a peer."""

    def __init__(self, peer: Peer, work: Path) -> None:
        self.peer = peer
        started = time.perf_counter()
        environment = os.environ | ({"PYTHONPATH": str(ROOT)} if peer.environment == OURS else {})
        self.errors = (work / "errors.txt").open("w+")
        self.process = subprocess.Popen(
            [_python(work, peer.environment), str(WORKER), peer.kind, str(work / peer.model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )
        self.read()
        self.cold_s = time.perf_counter() - started

    def read(self) -> dict[str, Any]:
        """Reads the next line of the process.

        Raises:
            DeployError: The process ended; the message includes the last line of its errors.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            error_lines = [line for line in self.errors.read().splitlines() if line.strip()]
            raise DeployError(f"{self.peer.name}: {error_lines[-1] if error_lines else 'ended without a message'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **task: object) -> dict[str, Any]:
        """Sends a task to the process and returns its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """Stops the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Times:
    """Times of a peer in seconds, and its peak memory."""

    cold: list[float] = field(default_factory=list)
    bulk: list[float] = field(default_factory=list)
    single: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def measure(work: Path, texts: list[str], *, rounds: int) -> dict[str, Any]:
    """Measures cold starts, then rounds in which all peers run alternately.

    Args:
        work: Folder of environments and models.
        texts: The mixed corpus.
        rounds: Number of bulk runs; single queries are spread over them.

    Returns:
        The record.
    """
    texts_path = work / "texts.json"
    texts_path.write_text(json.dumps(texts), encoding="utf-8")
    times, failed = start_all(work)
    gemm = subprocess.run(
        [_python(work, "torch"), str(WORKER), "gemm", "-"], capture_output=True, text=True, check=True
    )
    workers = {peer.name: Worker(peer, work) for peer in PEERS if peer.name not in failed}
    vectors = {}
    for name, worker in workers.items():  # warms up, and stores the vectors
        worker.ask(texts=str(texts_path), batch=PEER_BATCH, save=str(work / "vectors.npy"))
        vectors[name] = np.load(work / "vectors.npy")
    queries = sorted(texts, key=len)[len(texts) // 10 :][:QUERIES]
    for index in tqdm(range(rounds), desc="rounds", disable=None):
        run_round(workers, times, texts_path, queries[index::rounds])
    for worker in workers.values():
        worker.close()
    encoder = Encoder(work / "fp32", device="cpu", backend="onnxruntime")
    lengths = [len(row) for row in encoder.tokenize(texts)]
    operations = flops(encoder.manifest.source.architecture, lengths)
    rows = []
    for name in workers:
        peer_times = times[name]
        seconds = statistics.median(peer_times.bulk)
        rows.append(
            {
                "name": name,
                "texts_s": round(len(texts) / seconds, 1),
                "tokens_s": round(sum(lengths) / seconds),
                "bulk_s": [round(bulk_seconds, 3) for bulk_seconds in peer_times.bulk],
                "single_p50_ms": round(statistics.median(peer_times.single) * 1000, 2),
                "single_p99_ms": round(float(np.quantile(peer_times.single, 0.99)) * 1000, 2),
                "cold_s": round(statistics.median(peer_times.cold), 2),
                "peak_mb": round(peer_times.peak_bytes / 1e6),
                "gflops": round(operations / seconds / 1e9, 1),
                "min_cosine": float((vectors[name] * vectors[REFERENCE]).sum(axis=1).min()),
                "versions": _versions(work, name),
            }
        )
    return {
        "command": "",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "texts": len(texts),
        "tokens": sum(lengths),
        "padding_waste": round(
            padding_waste(lengths, rows=encoder.manifest.profile.max.batch, tokens=DEFAULT_BATCH_TOKENS), 4
        ),
        "gemm_gflops": {dtype: round(gflops) for dtype, gflops in json.loads(gemm.stdout).items()},
        "failed": failed,
        "rows": rows,
    }


def start_all(work: Path) -> tuple[dict[str, Times], dict[str, str]]:
    """Starts every peer a few times, alternately; returns the times, and the errors of peers that cannot run."""
    times = {peer.name: Times() for peer in PEERS}
    failed: dict[str, str] = {}
    for start in range(STARTS):
        for peer in PEERS:
            if peer.name in failed:
                continue
            try:
                worker = Worker(peer, work)
            except DeployError as err:
                failed[peer.name] = str(err)
                echo(f"  {err}")
                continue
            worker.close()
            if start:  # the first start reads everything from disk
                times[peer.name].cold.append(worker.cold_s)
    return times, failed


def run_round(workers: dict[str, Worker], times: dict[str, Times], texts_path: Path, queries: list[str]) -> None:
    """Runs the corpus once with each peer, then every query with each peer."""
    for name, worker in workers.items():
        answer = worker.ask(texts=str(texts_path), batch=PEER_BATCH)
        times[name].bulk.append(answer["seconds"])
        times[name].peak_bytes = answer["peak_bytes"]
    for query in queries:
        for name, worker in workers.items():
            for _ in range(2):  # the second call finds warm caches, as on a busy server
                seconds = worker.ask(query=query)["seconds"]
            times[name].single.append(seconds)


def _versions(work: Path, name: str) -> dict[str, str]:
    packages = {
        "ours": ("onnxruntime", "openvino"),
        "torch": ("torch", "transformers", "sentence-transformers", "fastembed"),
        "onnx": ("transformers", "sentence-transformers", "optimum-onnx", "onnxruntime"),
    }
    environment = next(peer.environment for peer in PEERS if peer.name == name)
    code = "import sys, json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run(
        [_python(work, environment), "-c", code, *packages[environment]], capture_output=True, text=True, check=True
    )
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


if __name__ == "__main__":
    raise SystemExit(main())
