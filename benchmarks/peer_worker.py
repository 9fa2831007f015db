"""Process of one embedder for `benchmarks.peers`; runs in that peer's own environment.

Started with a kind and a model's folder, it embeds one text and prints a line of JSON. Then, for each line of JSON on
standard input ({"texts": FILE, "batch": N} or {"query": TEXT}), it embeds and prints the seconds and its peak memory.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_TOKENS = 512


def peak_bytes() -> int:
    """Returns the peak memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


class SentenceTransformers:
    """sentence-transformers with one of its backends."""

    def __init__(self, folder: str, backend: str, dtype: str = "float32") -> None:
        from sentence_transformers import SentenceTransformer

        # The default is the checkpoint's FP16, which is slow on CPUs.
        options: dict[str, Any] = {"dtype": dtype}
        if backend == "onnx":
            options = {"file_name": "model.onnx", "provider": "CPUExecutionProvider"}
        self.model = SentenceTransformer(folder, device="cpu", backend=backend, model_kwargs=options)
        self.model.max_seq_length = MAX_TOKENS

    def encode(self, texts: list[str], batch: int) -> Any:
        return self.model.encode(texts, batch_size=batch, convert_to_numpy=True, show_progress_bar=False)


class Torch:
    """transformers' model, eager or compiled, with texts in order of length."""

    def __init__(self, folder: str, *, compiled: bool) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.config.use_cache = False
        self.run = torch.compile(self.forward, dynamic=True) if compiled else self.forward

    def forward(self, ids: Any, mask: Any) -> Any:
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        last_tokens = mask.sum(dim=1) - 1
        vectors = states[self.torch.arange(len(ids)), last_tokens]
        return self.torch.nn.functional.normalize(vectors, dim=1)

    def encode(self, texts: list[str], batch: int) -> Any:
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors: list[Any] = [None] * len(texts)
        with self.torch.inference_mode():
            for start in range(0, len(order), batch):
                batch_indices = order[start : start + batch]
                inputs = tokens(self.tokenizer, [texts[index] for index in batch_indices], "pt")
                for index, row in zip(
                    batch_indices, self.run(inputs["input_ids"], inputs["attention_mask"]), strict=True
                ):
                    vectors[index] = row.numpy()
        return vectors


class Optimum:
    """transformers' tokenizer and ONNX Runtime through optimum, with texts in order of length."""

    def __init__(self, folder: str) -> None:
        from optimum.onnxruntime import ORTModelForFeatureExtraction
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = ORTModelForFeatureExtraction.from_pretrained(f"{folder}/onnx", file_name="model.onnx")

    def encode(self, texts: list[str], batch: int) -> Any:
        import numpy as np

        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors: list[Any] = [None] * len(texts)
        for start in range(0, len(order), batch):
            batch_indices = order[start : start + batch]
            inputs = tokens(self.tokenizer, [texts[index] for index in batch_indices], "np")
            states = self.model(**inputs).last_hidden_state
            batch_vectors = states[np.arange(len(batch_indices)), inputs["attention_mask"].sum(axis=1) - 1]
            unit_vectors = batch_vectors / np.linalg.norm(batch_vectors, axis=1, keepdims=True)
            for index, row in zip(batch_indices, unit_vectors, strict=True):
                vectors[index] = row
        return vectors


class FastEmbed:
    """fastembed with a custom model."""

    def __init__(self, folder: str) -> None:
        from fastembed import TextEmbedding
        from fastembed.common.model_description import ModelSource, PoolingType

        TextEmbedding.add_custom_model(
            model="own/peer",
            pooling=PoolingType.LAST_TOKEN,
            normalization=True,
            sources=ModelSource(hf="own/peer"),
            dim=json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["hidden_size"],
            model_file="onnx/model.onnx",
        )
        self.model = TextEmbedding("own/peer", specific_model_path=folder)

    def encode(self, texts: list[str], batch: int) -> Any:
        return list(self.model.embed(texts, batch_size=batch))


class Ours:
    """This library with one of its backends."""

    def __init__(self, folder: str, backend: str) -> None:
        from nvembed_deploy import Encoder

        self.encoder = Encoder(folder, device="cpu", backend=backend)

    def encode(self, texts: list[str], batch: int) -> Any:
        return self.encoder.encode(texts)  # batches by a token budget


def tokens(tokenizer: Any, texts: list[str], kind: str) -> Any:
    """Tokenizes texts; returns ids and mask, padded on the right."""
    tokenizer.padding_side = "right"
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors=kind)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def gemm(precision: str) -> float:
    """Returns the GFLOP/s of matrix products with PyTorch on this machine: the best of 20."""
    import torch

    size, dtype = 2048, getattr(torch, precision)
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    times = []
    for _ in range(20):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times) / 1e9


KINDS: dict[str, Callable[[str], Any]] = {
    "sentence-transformers": lambda folder: SentenceTransformers(folder, "torch"),
    "sentence-transformers-bf16": lambda folder: SentenceTransformers(folder, "torch", "bfloat16"),
    "sentence-transformers-onnx": lambda folder: SentenceTransformers(folder, "onnx"),
    "torch": lambda folder: Torch(folder, compiled=False),
    "torch-compile": lambda folder: Torch(folder, compiled=True),
    "optimum": Optimum,
    "fastembed": FastEmbed,
    "onnxruntime": lambda folder: Ours(folder, "onnxruntime"),
    "openvino": lambda folder: Ours(folder, "openvino"),
}


def main() -> None:
    """Runs the process."""
    kind, folder = sys.argv[1:3]
    if kind == "gemm":
        answer({name: gemm(name) for name in ("float32", "bfloat16")})
        return
    os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"})
    peer: Any = KINDS[kind](folder)
    vector = peer.encode(["how do I undo my last git commit but keep the changes?"], 1)
    answer({"ready": len(vector[0])})
    for line in sys.stdin:
        task = json.loads(line)
        if "query" in task:
            started = time.perf_counter()
            peer.encode([task["query"]], 1)
            answer({"seconds": time.perf_counter() - started})
            continue
        texts = json.loads(Path(task["texts"]).read_text(encoding="utf-8"))
        started = time.perf_counter()
        vectors = peer.encode(texts, task["batch"])
        seconds = time.perf_counter() - started
        if "save" in task:
            import numpy as np

            np.save(task["save"], np.stack([np.asarray(row, dtype=np.float32) for row in vectors]))
        answer({"seconds": seconds, "peak_bytes": peak_bytes()})


def answer(record: dict[str, Any]) -> None:
    """Writes one line of JSON to the parent process."""
    sys.__stdout__.write(json.dumps(record) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


if __name__ == "__main__":
    # Output of libraries must not mix with the lines of JSON.
    sys.stdout = sys.stderr
    main()
