"""`nvembed bench BUNDLE ...`: engines side by side on the same texts, in turn, in one run.

Sides are bundles, a bundle with a backend (`BUNDLE@openvino`), or the checkpoint in PyTorch (`reference@CHECKPOINT`).
Every figure is a median or a percentile of repeats in which the sides take turns, so that what else the machine does
meets all of them alike. Start-up and memory are those of fresh processes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from nvembed_deploy.backends.bindings import TENSORRT
from nvembed_deploy.backends.cuda import CudaDevice, CudaRuntime
from nvembed_deploy.backends.ort import GPU
from nvembed_deploy.batching import plan_batches
from nvembed_deploy.console import program, run, say
from nvembed_deploy.encoder import DEFAULT_BATCH_TOKENS, Encoder
from nvembed_deploy.engines.bench_plot import draw_bench
from nvembed_deploy.engines.power import PowerMeter
from nvembed_deploy.engines.targets import TARGETS
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.sample_texts import docstring_pairs, in_mixed_order
from nvembed_deploy.select_backend import Wish
from nvembed_deploy.system import describe_machine
from nvembed_deploy.tokenization import TokenRow

REFERENCE = "reference"
QUERY = "how do I undo my last git commit but keep the changes?"
SHAPES = ((1, 16), (1, 128), (8, 64), (32, 64))
"""Texts x tokens of the latency table; without those that a plan does not take."""
GEMM_SIZE, GEMM_REPEATS = 1024, 5
FIRST_VECTOR = """
import sys, time
started = time.perf_counter()
from nvembed_deploy import Encoder
Encoder(sys.argv[1], device=sys.argv[2], backend=sys.argv[3]).encode(sys.argv[4])
seconds = time.perf_counter() - started
from nvembed_deploy.system import peak_memory_bytes
print(seconds, peak_memory_bytes())
"""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of one shape."""

    texts: int
    tokens: int
    p50: float
    p95: float
    p99: float


METERED_SECONDS = 5.0
"""The tools read ten times a second, and need a moment to start."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """What was measured of one engine."""

    name: str
    backend: str
    precision: str
    min_cosine: float
    """Of its vectors to the first side's, over the corpus."""
    query_ms: Latency
    latency_ms: tuple[Latency, ...]
    texts_per_second: float
    tokens_per_second: float
    gflops: float
    """Of the model's multiplications, padding left out."""
    peak_share: float | None
    """Of `peak_gflops`; None where no recipe tells a GPU's peak."""
    joules_per_text: float | None
    """Of a GPU in bulk, as its own tool tells; None elsewhere."""
    device_peak_mib: float | None
    """Most memory in use on the GPU in bulk, of all programs; None elsewhere."""
    start_seconds: float | None
    """From a fresh process to its first vector; None for the reference."""
    start_peak_mib: float | None


def percentiles(times: Sequence[float], *, texts: int, tokens: int) -> Latency:
    """Of times in milliseconds, by linear interpolation."""
    p50, p95, p99 = (round(float(value), 3) for value in np.percentile(times, (50, 95, 99)))
    return Latency(texts=texts, tokens=tokens, p50=p50, p95=p95, p99=p99)


def in_turn(actions: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Milliseconds of each action, once to warm up and then `repeats` times, the actions taking turns."""
    times: list[list[float]] = [[] for _ in actions]
    for turn in range(repeats + 1):
        for own, action in zip(times, actions, strict=True):
            started = time.perf_counter()
            action()
            if turn:
                own.append((time.perf_counter() - started) * 1000)
    return times


def flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """Multiplications and additions of texts: two for each weight (not the embeddings') and token, and attention."""
    weights = sum(count for name, count in config.parameters(fold=True).items() if name != "embeddings")
    inner = config.heads * config.head_dim
    return float(sum(2 * weights * T + 4 * config.layers * inner * T * T for T in lengths))


def padding_waste(lengths: Sequence[int], *, rows: int, tokens: int) -> float:
    """Share of the tokens in batches that are padding."""
    batches = list(plan_batches(lengths, max_rows=rows, max_tokens=tokens))
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return 1 - sum(lengths) / padded


def gemm_gflops() -> float:
    """Speed of NumPy's FP32 matrix product on this machine, the best of a few."""
    left = np.random.default_rng(0).random((GEMM_SIZE, GEMM_SIZE), dtype=np.float32)
    times = in_turn([lambda: left @ left], GEMM_REPEATS)[0]
    return 2 * GEMM_SIZE**3 / min(times) / 1e6


def corpus(count: int) -> list[str]:
    """Passages of Python's own documentation, short and long."""
    return [f"{summary}\n{body}" for summary, body in in_mixed_order(docstring_pairs())[:count]]


def open_side(name: str, device: str, first: Encoder | None) -> tuple[Encoder, str]:
    """An engine by its name on the command line, and its backend's name.

    Raises:
        ConfigError: The reference is named first, since it takes its tokens from a bundle.
    """
    place, _, backend = name.partition("@")
    if place == REFERENCE:
        if first is None or not backend:
            raise ConfigError("name a bundle first, and the reference as reference@CHECKPOINT")
        # Beside a plan on a GPU: FP16 with PyTorch's fused attention, as one would deploy it, not FP32.
        place = f"cuda:{_index(device)}" if on_gpu(first) else "cpu"
        return Encoder.from_checkpoint(Path(backend), like=first, device=place), REFERENCE
    return Encoder(place, device=device, backend=backend or "auto"), backend or "auto"


def on_gpu(encoder: Encoder) -> bool:
    """A plan, ONNX Runtime's providers for GPUs, or PyTorch on CUDA, by the backend's name."""
    backend = encoder.backend
    return backend.startswith(TENSORRT) or any(name in backend for name in GPU) or "(CUDA" in backend


def _index(device: str) -> int:
    return Wish.of(device, "auto", None).index or 0


def _gpu(device: str) -> CudaDevice:
    return CudaRuntime.load().device(_index(device))


def peak_gflops(encoder: Encoder, device: str) -> tuple[float, str]:
    """The most that the device can do: a GPU's datasheet for the bundle's precision, or this CPU's FP32 product.

    Args:
        encoder: What runs.
        device: What it was opened with.

    Returns:
        GFLOP/s, or 0 where no recipe tells it; and where the number comes from.
    """
    if not on_gpu(encoder):
        return gemm_gflops(), "FP32 GEMM"
    name = _gpu(device).name
    for target in TARGETS.values():
        found = target.tflops.get(encoder.manifest.precision)
        if found and re.search(rf"\b{target.card}\b", name):
            return found * 1000, target.source
    return 0.0, "an unknown peak"


def _metered(encoder: Encoder, device: str, passages: Sequence[str]) -> tuple[float | None, float | None]:
    """Joules a text and the device's MiB over a bulk run, where the device tells."""
    if not on_gpu(encoder):
        return None, None
    runs = 0
    with PowerMeter(_gpu(device).bus) as meter:
        started = time.monotonic()
        while time.monotonic() - started < METERED_SECONDS:
            encoder.encode(passages)
            runs += 1
    joules = None if meter.joules is None else round(meter.joules / (runs * len(passages)), 4)
    return joules, meter.peak_memory_mib


def _precision(encoder: Encoder, *, is_reference: bool) -> str:
    """The reference computes in FP32 on a CPU and in FP16 on a GPU, and says so in its name."""
    if not is_reference:
        return encoder.manifest.precision.value
    return "fp16" if "fp16" in encoder.backend else "fp32"


def bench(names: Sequence[str], *, device: str, texts: int, repeats: int) -> dict[str, object]:
    """Measures all sides."""
    encoders: list[Encoder] = []
    for name in names:
        encoders.append(open_side(name, device, encoders[0] if encoders else None)[0])
        say(f"  {name}: {encoders[-1].backend}")
    passages = corpus(texts)
    rows = [encoder.tokenize(passages) for encoder in encoders]
    lengths = [len(row) for row in rows[0]]
    say(f"  {len(passages)} passages, {sum(lengths)} tokens ...")
    vectors = [encoder.encode(passages) for encoder in encoders]
    bulk = in_turn([partial(encoder.encode, passages) for encoder in encoders], max(3, repeats // 10))
    say("  queries and shapes ...")
    queries = in_turn([partial(encoder.encode, QUERY) for encoder in encoders], repeats)
    longest = min(encoder.max_length for encoder in encoders)
    shapes = [shape for shape in SHAPES if shape[1] <= longest]
    shaped = [(shape, in_turn([_shaped(encoder, shape) for encoder in encoders], repeats // 2)) for shape in shapes]
    say("  fresh processes ...")
    peak, peak_source = peak_gflops(encoders[0], device)
    sides = []
    for index, (name, encoder) in enumerate(zip(names, encoders, strict=True)):
        seconds = statistics.median(bulk[index]) / 1000
        speed = flops(encoder.manifest.source.architecture, lengths) / seconds / 1e9
        joules, device_mib = _metered(encoder, device, passages)
        start = _fresh(name, device) if not name.startswith(f"{REFERENCE}@") else (None, None)
        sides.append(
            Side(
                name=name,
                backend=encoder.backend,
                precision=_precision(encoder, is_reference=start[0] is None),
                min_cosine=round(float((vectors[0] * vectors[index]).sum(axis=1).min()), 7),
                query_ms=percentiles(queries[index], texts=1, tokens=len(encoder.tokenize([QUERY])[0])),
                latency_ms=tuple(percentiles(times[index], texts=shape[0], tokens=shape[1]) for shape, times in shaped),
                texts_per_second=round(len(passages) / seconds, 1),
                tokens_per_second=round(sum(lengths) / seconds, 1),
                gflops=round(speed, 1),
                peak_share=round(speed / peak, 3) if peak else None,
                joules_per_text=joules,
                device_peak_mib=device_mib,
                start_seconds=start[0],
                start_peak_mib=start[1],
            )
        )
    return {
        "machine": describe_machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "passages": len(passages),
        "tokens": sum(lengths),
        "padding_waste": round(
            padding_waste(lengths, rows=encoders[0].manifest.profile.max.batch, tokens=DEFAULT_BATCH_TOKENS), 4
        ),
        "peak_gflops": round(peak, 1),
        "peak_source": peak_source,
        "sides": [asdict(side) for side in sides],
    }


def _shaped(encoder: Encoder, shape: tuple[int, int]) -> Callable[[], object]:
    count, tokens = shape
    row = encoder.tokenize(["a b c d " * tokens], max_length=tokens)[0]
    rows: list[TokenRow] = [row] * count
    return lambda: encoder.encode_rows(rows)


def _fresh(name: str, device: str) -> tuple[float, float]:
    """Seconds to the first vector and peak MiB of a fresh process, the median of three."""
    place, _, backend = name.partition("@")
    command = [sys.executable, "-W", "ignore", "-c", FIRST_VECTOR, place, device, backend or "auto", QUERY]
    found = []
    for _ in range(3):
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        found.append((float(out[-2]), float(out[-1]) / 2**20))
    return round(statistics.median(item[0] for item in found), 3), round(
        statistics.median(item[1] for item in found), 1
    )


def table(result: dict[str, object]) -> str:
    """The result for people, as Markdown."""
    lines = [
        "| engine | texts/s | tokens/s | GFLOP/s | one query p50 / p99 | to first vector | memory | lowest cosine |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    sides = result["sides"]
    assert isinstance(sides, list)
    for side in sides:
        start = "-" if side["start_seconds"] is None else f"{side['start_seconds']:.2f} s"
        memory = "-" if side["start_peak_mib"] is None else f"{side['start_peak_mib']:.0f} MiB"
        query = side["query_ms"]
        share = "" if side["peak_share"] is None else f" ({side['peak_share']:.0%} of {result['peak_source']})"
        lines.append(
            f"| {Path(side['name']).name}: {side['backend']}, {side['precision']} | {side['texts_per_second']:.0f} | "
            f"{side['tokens_per_second']:.0f} | {side['gflops']:.0f}{share} | "
            f"{query['p50']:.1f} / {query['p99']:.1f} ms | {start} | {memory} | {side['min_cosine']:.5f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog=prog or program("bench"), description="Measures engines side by side on the same texts, in turn."
    )
    parser.add_argument(
        "sides",
        nargs="+",
        metavar="BUNDLE[@BACKEND]",
        help="bundles, or reference@CHECKPOINT for PyTorch; cosines are to the first",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--texts", type=int, default=400, help="passages of the corpus (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=50, help="repeats of a single query (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all figures, and a picture beside it")
    flags = parser.parse_args(argv)
    if flags.texts < 1 or flags.repeats < 2:
        parser.error("--texts must be at least 1 and --repeats at least 2")

    def command() -> None:
        result = bench(flags.sides, device=flags.device, texts=flags.texts, repeats=flags.repeats)
        if flags.out is not None:
            flags.out.parent.mkdir(parents=True, exist_ok=True)
            write_file(flags.out, (json.dumps(result, indent=1) + "\n").encode())
        sys.stdout.write(table(result))
        if flags.out is not None:
            if importlib.util.find_spec("matplotlib") is None:
                say("  no picture: matplotlib is not installed; pip install matplotlib")
            else:
                draw_bench(result, flags.out.with_suffix(".png"))

    return run(command)


if __name__ == "__main__":
    from nvembed_deploy.engines.bench import main

    raise SystemExit(main(prog="python -m engines.bench"))
