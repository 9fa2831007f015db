"""What an export will need, said before it starts, and refused where it cannot fit."""

from __future__ import annotations

import math
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from nvembed_deploy.architecture import ModelConfig
from nvembed_deploy.config import Precision
from nvembed_deploy.errors import ExportError
from nvembed_deploy.model.weights import StoredWeights

from .calibration import BATCH_TOKENS, SAMPLED_ROWS
from .graph import BLOCK_BYTES, DTYPES
from .options import ExportOptions
from .parts import part_of

GIB = 2**30
BASE_BYTES = int(0.5 * GIB)
"""Python with torch, onnx and the traced graph."""
BUILD_BASE_BYTES = int(0.35 * GIB)
"""TensorRT itself."""
HEAD_BYTES = 20
"""Bytes for each entry of a head's matrices while the pooler is folded: four of them in 16 bits, and FP32 copies."""
PROBE_TOKENS = 2048
"""Of the probes, but for a longest one."""
SMALL_FILES_BYTES = 16 * 2**20
"""Graph, tokenizer and manifest."""
BUILD_FACTOR = 2.8
"""Peak of TensorRT-RTX's ahead-of-time build over the weights, measured at 1.3 B parameters."""
RUNTIME_BYTES_A_PARAMETER = 8
"""ONNX Runtime's CPU provider holds stored weights, and FP32 copies of them where it has no kernel for their type."""
PLAN_FACTOR = 1.2
"""Size of a plan over its weights; the mini's, which has kernels beside few weights, is up to 2 x."""
PLAN_BASE_BYTES = 16 * 2**20
BITS = {
    Precision.FP32: 32,
    Precision.FP16: 16,
    Precision.BF16: 16,
    Precision.INT8: 8,
    Precision.FP8: 8,
    Precision.INT4: 4.125,  # a scale of 16 bits for 128 weights
}


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes needed."""

    weights: int
    memory: int
    disk: int

    def __str__(self) -> str:
        return (
            f"{self.weights / GIB:.2f} GiB of weights, up to {self.memory / GIB:.1f} GiB of memory, "
            f"{self.disk / GIB:.2f} GiB of disk"
        )


def count_parameters(config: ModelConfig, *, fold: bool) -> int:
    """Parameters of the model as exported."""
    D, heads = config.hidden_size, config.head_dim
    attention = D * heads * (2 * config.heads + 2 * config.kv_heads)
    decoder = config.layers * (attention + 3 * D * config.intermediate_size + 2 * D) + D + config.vocab_size * D
    decoder += config.layers * (config.qkv_bias * heads * (config.heads + 2 * config.kv_heads))
    decoder += config.layers * config.qk_norm * 2 * heads
    latent = config.latent
    if latent is None:
        return decoder
    inner, wide = latent.heads * latent.head_dim, latent.feed_forward_mult * D
    feed_forward = 2 * wide * (D + 1) + D * (wide + 1) + 2 * D
    folded = 2 * D * latent.heads * latent.latents + 2 * D
    unfolded = 4 * inner * D + latent.latents * D + 4 * D
    return decoder + feed_forward + (folded if fold else unfolded)


def count_linear_weights(config: ModelConfig) -> int:
    """Of the parameters, those that a quantized precision stores in its own format."""
    D, heads = config.hidden_size, config.head_dim
    attention = D * heads * (2 * config.heads + 2 * config.kv_heads)
    pooler = 0 if config.latent is None else 3 * config.latent.feed_forward_mult * D * D
    return config.layers * (attention + 3 * D * config.intermediate_size) + pooler


def forecast(weights: StoredWeights, options: ExportOptions, *, plan: bool) -> Forecast:
    """What an export needs.

    Args:
        weights: The checkpoint's.
        options: The export's.
        plan: Whether a plan is built.
    """
    config, precision, fold = weights.config, options.precision, options.fold
    parameters = count_parameters(config, fold=fold)
    linear = count_linear_weights(config)
    size = int(linear * BITS[precision] + (parameters - linear) * BITS[precision.base]) // 8
    streaming = _streaming_bytes(weights, fold=fold)
    in_memory = while_comparing = 0
    if options.parity:
        in_memory = 4 * count_parameters(config, fold=False)
        # Smoothing works on a copy in FP32.
        in_memory += 4 * parameters if precision.quantized else 0
        while_comparing = RUNTIME_BYTES_A_PARAMETER * parameters
    elif options.runs_model:
        streaming = max(streaming, _part_bytes(weights, options))
    while_building = int(BUILD_FACTOR * size) + BUILD_BASE_BYTES if plan else 0
    written = _written_bytes(weights, options, size)
    return Forecast(
        weights=size,
        memory=BASE_BYTES + in_memory + max(streaming, while_comparing, while_building),
        disk=int(written + (size * PLAN_FACTOR + PLAN_BASE_BYTES if plan else 0)) + SMALL_FILES_BYTES,
    )


def _streaming_bytes(weights: StoredWeights, *, fold: bool) -> int:
    """Most that is in memory while weights are written: a matrix that is turned, or a head of the pooler."""
    matrices = [
        item.bytes for name, item in weights.tensors.items() if len(item.shape) == 2 and "embed_tokens" not in name
    ]
    latent = weights.config.latent
    head = 0
    if fold and latent is not None:
        D = weights.config.hidden_size
        head = HEAD_BYTES * latent.head_dim * D + 16 * D * latent.heads * latent.latents
    return max(max(matrices, default=0) + 4 * BLOCK_BYTES, head)


def _part_bytes(weights: StoredWeights, options: ExportOptions) -> int:
    """Most that is in memory while a model runs part by part: the largest part in FP32, and states of its tokens."""
    config = weights.config
    sizes: dict[str, int] = {}
    for name, item in weights.tensors.items():
        if not (options.fold and ".cross_attend_blocks.0." in name):
            part = part_of(name)
            sizes[part] = sizes.get(part, 0) + 4 * math.prod(item.shape)
    tokens = max(options.calibration_tokens if options.precision.quantized else 0, PROBE_TOKENS)
    widest = max(config.hidden_size * 2, config.intermediate_size)
    sampled = (
        SAMPLED_ROWS * (2 * config.hidden_size + config.intermediate_size) * 8 if options.precision.quantized else 0
    )
    return max(sizes.values()) * 5 // 4 + 4 * tokens * config.hidden_size + 12 * BATCH_TOKENS * widest + sampled


def _written_bytes(weights: StoredWeights, options: ExportOptions, size: int) -> int:
    if not options.reference:
        return size
    wanted = DTYPES[options.precision.base]
    as_they_lie = sum(item.bytes for item in weights.tensors.values() if item.dtype == wanted)
    return max(0, size - as_they_lie)


def require_room(needed: Forecast, out: Path, *, force: bool) -> None:
    """Compares a forecast with this machine.

    Raises:
        ExportError: There is not enough free memory or disk, and `force` is off.
    """
    folder = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.is_dir())
    disk, memory = shutil.disk_usage(folder).free, available_memory_bytes()
    for what, want, have in (("disk", needed.disk, disk), ("memory", needed.memory, memory)):
        if have is not None and want > have and not force:
            raise ExportError(
                f"this export needs about {want / GIB:.1f} GiB of {what} and {have / GIB:.1f} GiB are free; free some, "
                "use a larger machine, or pass --force to try"
            )


def available_memory_bytes() -> int | None:
    """Memory that programs can still get, or None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def peak_memory_bytes() -> int:
    """Most memory that this process has had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
