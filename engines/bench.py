"""`nvembed bench BUNDLE ...`: measures engines side by side on the same texts, interleaved in one run.

An engine is a bundle, a bundle with a backend (`BUNDLE@openvino`), or the checkpoint in PyTorch
(`reference@CHECKPOINT`). Every figure is a median or a percentile of repeats in which the engines alternate, so that
other load on the machine affects all of them equally. Start-up time and memory are those of new processes.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nvembed_deploy.backends.bindings import TENSORRT
from nvembed_deploy.backends.cuda import CudaDevice, CudaRuntime
from nvembed_deploy.backends.ort import GPU
from nvembed_deploy.batching import DEFAULT_BATCH_TOKENS, plan_batches
from nvembed_deploy.console import ArgumentParser, echo, program, run, step
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.engines.bench_plot import draw_bench
from nvembed_deploy.engines.bench_report import BenchReport, EngineFigures, Latency
from nvembed_deploy.engines.power import PowerMeter
from nvembed_deploy.engines.targets import TARGETS
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.sample_texts import docstring_pairs, in_mixed_order
from nvembed_deploy.select_backend import BackendRequest
from nvembed_deploy.system import describe_machine
from nvembed_deploy.tokenization import TokenRow

REFERENCE = "reference"
QUERY = "how do I undo my last git commit but keep the changes?"
SHAPES = ((1, 16), (1, 128), (8, 64), (32, 64))
"""Texts x tokens of the latency table; shapes that a plan does not support are left out."""
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


METERED_SECONDS = 5.0
"""Duration of the power measurement: the tools read ten times per second and take a moment to start."""


def percentiles(times_ms: Sequence[float], *, texts: int, tokens: int) -> Latency:
    """Computes percentiles of times in milliseconds, by linear interpolation."""
    p50, p95, p99 = (round(float(percentile), 3) for percentile in np.percentile(times_ms, (50, 95, 99)))
    return Latency(texts=texts, tokens=tokens, p50=p50, p95=p95, p99=p99)


def time_interleaved(
    actions: Sequence[Callable[[], object]], repeats: int, *, description: str | None = None
) -> list[list[float]]:
    """Runs the actions alternately, once to warm up and then `repeats` times.

    Args:
        actions: What is timed.
        repeats: Number of times.
        description: Text before a progress bar, which is shown on a terminal only; None for no bar.

    Returns:
        The times of each action in milliseconds, without the warm-up.
    """
    times_ms: list[list[float]] = [[] for _ in actions]
    disable = True if description is None else None
    for repeat in tqdm(range(repeats + 1), desc=f"  {description}", disable=disable, leave=False):
        for action_times_ms, action in zip(times_ms, actions, strict=True):
            started = time.perf_counter()
            action()
            if repeat:
                action_times_ms.append((time.perf_counter() - started) * 1000)
    return times_ms


def flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """Counts the multiplications and additions for texts: two per weight and token, plus those of attention.

    The embedding table is not counted, since its rows are looked up and not multiplied.
    """
    weights = sum(count for name, count in config.parameters(fold=True).items() if name != "embeddings")
    inner = config.heads * config.head_dim
    return float(sum(2 * weights * T + 4 * config.layers * inner * T * T for T in lengths))


def padding_waste(lengths: Sequence[int], *, rows: int, tokens: int) -> float:
    """Returns the share of the tokens in batches that are padding."""
    batches = list(plan_batches(lengths, max_rows=rows, max_tokens=tokens))
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return 1 - sum(lengths) / padded


def gemm_gflops() -> float:
    """Measures the speed of NumPy's FP32 matrix product on this machine, the best of `GEMM_REPEATS`."""
    matrix = np.random.default_rng(0).random((GEMM_SIZE, GEMM_SIZE), dtype=np.float32)
    times_ms = time_interleaved([lambda: matrix @ matrix], GEMM_REPEATS)[0]
    return 2 * GEMM_SIZE**3 / min(times_ms) / 1e6


def corpus(count: int) -> list[str]:
    """Returns short and long passages of Python's documentation."""
    return [f"{summary}\n{body}" for summary, body in in_mixed_order(docstring_pairs())[:count]]


def open_engine(name: str, device: str, bundle_encoder: Encoder | None) -> tuple[Encoder, str]:
    """Opens an engine by its name on the command line.

    Args:
        name: `BUNDLE`, `BUNDLE@BACKEND` or `reference@CHECKPOINT`.
        device: See `Encoder`.
        bundle_encoder: Encoder of the first bundle, whose tokens the reference is given.

    Returns:
        The encoder, and the name of its backend.

    Raises:
        ConfigError: The reference is named before any bundle, or without its checkpoint.
    """
    bundle, _, suffix = name.partition("@")
    if bundle == REFERENCE:
        if bundle_encoder is None or not suffix:
            raise ConfigError("reference needs a checkpoint and must follow a bundle: BUNDLE reference@CHECKPOINT")
        # On a GPU in FP16 with PyTorch's fused attention, as one would deploy it, not in FP32.
        torch_device = f"cuda:{_index(device)}" if on_gpu(bundle_encoder) else "cpu"
        return Encoder.from_checkpoint(Path(suffix), like=bundle_encoder, device=torch_device), REFERENCE
    backend = suffix or "auto"
    return Encoder(bundle, device=device, backend=backend), backend


def on_gpu(encoder: Encoder) -> bool:
    """Returns True for a plan, a GPU provider of ONNX Runtime, or PyTorch on CUDA, by the name of the backend."""
    backend = encoder.backend
    return backend.startswith(TENSORRT) or any(name in backend for name in GPU) or "(CUDA" in backend


def _index(device: str) -> int:
    return BackendRequest.parse(device, "auto", None).index or 0


def _gpu(device: str) -> CudaDevice:
    return CudaRuntime.load().device(_index(device))


def peak_gflops(encoder: Encoder, device: str) -> tuple[float, str]:
    """Returns the peak speed of the device: from a GPU's datasheet, or measured with an FP32 product on a CPU.

    Args:
        encoder: The encoder that runs on the device.
        device: The device argument that the encoder was opened with.

    Returns:
        GFLOP/s, or 0 if no target has the peak of this GPU and precision; and the source of the number.
    """
    if not on_gpu(encoder):
        return gemm_gflops(), "FP32 GEMM"
    name = _gpu(device).name
    for target in TARGETS.values():
        peak_tflops = target.tflops.get(encoder.manifest.precision)
        if peak_tflops and re.search(rf"\b{target.card}\b", name):
            return peak_tflops * 1000, target.source
    return 0.0, "an unknown peak"


def _metered(encoder: Encoder, device: str, passages: Sequence[str]) -> tuple[float | None, float | None]:
    """Measures joules per text and peak MiB of a GPU during bulk encoding; None on other devices."""
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
    """Returns the precision of an encoder; the reference's is FP32 on a CPU and FP16 on a GPU, as its name says."""
    if not is_reference:
        return encoder.manifest.precision.value
    return "fp16" if "fp16" in encoder.backend else "fp32"


def bench(names: Sequence[str], *, device: str, texts: int, repeats: int) -> BenchReport:
    """Measures all engines.

    Args:
        names: Engines as on the command line.
        device: See `Encoder`.
        texts: Passages of the corpus.
        repeats: Repeats of a single query; bulk encoding is repeated a tenth as often, and shapes half as often.
    """
    encoders: list[Encoder] = []
    for name in names:
        with step(f"opening {name}"):
            encoders.append(open_engine(name, device, encoders[0] if encoders else None)[0])
    passages = corpus(texts)
    lengths = [len(row) for row in encoders[0].tokenize(passages)]
    with step(f"embedding {len(passages)} passages, {sum(lengths)} tokens"):
        vectors = [encoder.encode(passages) for encoder in encoders]
    encode_all = [partial(encoder.encode, passages) for encoder in encoders]
    bulk_ms = time_interleaved(encode_all, max(3, repeats // 10), description="passages")
    query_ms = time_interleaved([partial(encoder.encode, QUERY) for encoder in encoders], repeats, description="query")
    max_length = min(encoder.max_length for encoder in encoders)
    shapes = [(count, tokens) for count, tokens in SHAPES if tokens <= max_length]
    shape_ms = [
        time_interleaved(
            [_encode_shape(encoder, *shape) for encoder in encoders],
            repeats // 2,
            description=f"{shape[0]} x {shape[1]} tokens",
        )
        for shape in shapes
    ]
    peak, peak_source = peak_gflops(encoders[0], device)
    engines = []
    for index, (name, encoder) in enumerate(zip(names, encoders, strict=True)):
        seconds = statistics.median(bulk_ms[index]) / 1000
        gflops = flops(encoder.manifest.source.architecture, lengths) / seconds / 1e9
        joules, device_mib = _metered(encoder, device, passages)
        is_reference = name.startswith(f"{REFERENCE}@")
        start_seconds = start_mib = None
        if not is_reference:
            with step(f"starting {name} in new processes"):
                start_seconds, start_mib = _measure_start(name, device)
        latencies = (
            percentiles(times_ms[index], texts=count, tokens=tokens)
            for (count, tokens), times_ms in zip(shapes, shape_ms, strict=True)
        )
        engines.append(
            EngineFigures(
                name=name,
                backend=encoder.backend,
                precision=_precision(encoder, is_reference=is_reference),
                min_cosine=round(float((vectors[0] * vectors[index]).sum(axis=1).min()), 7),
                query_ms=percentiles(query_ms[index], texts=1, tokens=len(encoder.tokenize([QUERY])[0])),
                latency_ms=tuple(latencies),
                texts_per_second=round(len(passages) / seconds, 1),
                tokens_per_second=round(sum(lengths) / seconds, 1),
                gflops=round(gflops, 1),
                peak_share=round(gflops / peak, 3) if peak else None,
                joules_per_text=joules,
                device_peak_mib=device_mib,
                start_seconds=start_seconds,
                start_peak_mib=start_mib,
            )
        )
    waste = padding_waste(lengths, rows=encoders[0].manifest.profile.max.batch, tokens=DEFAULT_BATCH_TOKENS)
    return BenchReport(
        machine=describe_machine(),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        passages=len(passages),
        tokens=sum(lengths),
        padding_waste=round(waste, 4),
        peak_gflops=round(peak, 1),
        peak_source=peak_source,
        sides=tuple(engines),
    )


def _encode_shape(encoder: Encoder, count: int, tokens: int) -> Callable[[], object]:
    """Returns a function that encodes `count` texts of `tokens` tokens each."""
    row = encoder.tokenize(["a b c d " * tokens], max_length=tokens)[0]
    rows: list[TokenRow] = [row] * count
    return lambda: encoder.encode_rows(rows)


def _measure_start(name: str, device: str) -> tuple[float, float]:
    """Measures the seconds to the first vector and the peak MiB of a new process; medians of three."""
    bundle, _, backend = name.partition("@")
    command = [sys.executable, "-W", "ignore", "-c", FIRST_VECTOR, bundle, device, backend or "auto", QUERY]
    seconds, mib = [], []
    for _ in range(3):
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        seconds.append(float(output[-2]))
        mib.append(float(output[-1]) / 2**20)
    return round(statistics.median(seconds), 3), round(statistics.median(mib), 1)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command."""
    parser = ArgumentParser(
        prog=prog or program("bench"), description="Measures engines side by side on the same texts, interleaved."
    )
    parser.add_argument(
        "sides",
        nargs="+",
        metavar="BUNDLE[@BACKEND]",
        help="bundles, or reference@CHECKPOINT for PyTorch; cosines are with the first bundle",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--texts", type=int, default=400, help="passages of the corpus (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=50, help="repeats of a single query (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all figures, and a plot next to the file")
    flags = parser.parse_args(argv)
    if flags.texts < 1 or flags.repeats < 2:
        parser.error("--texts must be at least 1 and --repeats at least 2")

    def command() -> None:
        report = bench(flags.sides, device=flags.device, texts=flags.texts, repeats=flags.repeats)
        if flags.out is not None:
            flags.out.parent.mkdir(parents=True, exist_ok=True)
            write_file(flags.out, (json.dumps(asdict(report), indent=1) + "\n").encode())
        sys.stdout.write(report.table())
        if flags.out is not None:
            if importlib.util.find_spec("matplotlib") is None:
                echo("  no plot: matplotlib is not installed; pip install matplotlib")
            else:
                draw_bench(report, flags.out.with_suffix(".png"))

    return run(command)


if __name__ == "__main__":
    from nvembed_deploy.engines.bench import main

    raise SystemExit(main(prog="python -m engines.bench"))
