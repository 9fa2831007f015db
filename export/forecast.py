"""What an export will need, said before it starts, and refused where it cannot fit."""

from __future__ import annotations

import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from nvembed_deploy.config import ModelConfig, Precision
from nvembed_deploy.errors import ExportError

GIB = 2**30
BASE_BYTES = int(0.8 * GIB)
"""Python with torch, onnx and TensorRT loaded."""
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
    latent = config.latent
    inner, wide = latent.heads * latent.head_dim, latent.feed_forward_mult * D
    feed_forward = 2 * wide * (D + 1) + D * (wide + 1) + 2 * D
    folded = 2 * D * latent.heads * latent.latents + 2 * D
    unfolded = 4 * inner * D + latent.latents * D + 4 * D
    return decoder + feed_forward + (folded if fold else unfolded)


def count_linear_weights(config: ModelConfig) -> int:
    """Of the parameters, those that a quantized precision stores in its own format."""
    D, heads = config.hidden_size, config.head_dim
    attention = D * heads * (2 * config.heads + 2 * config.kv_heads)
    return config.layers * (attention + 3 * D * config.intermediate_size) + 3 * config.latent.feed_forward_mult * D * D


def forecast(config: ModelConfig, precision: Precision, *, fold: bool, plan: bool, parity: bool) -> Forecast:
    """What an export needs.

    Args:
        config: The architecture.
        precision: Type of the weights.
        fold: Whether the latent attention is folded.
        plan: Whether a plan is built.
        parity: Whether ONNX Runtime runs the graph; the FP32 reference is loaded in any case.
    """
    parameters = count_parameters(config, fold=fold)
    reference = 4 * count_parameters(config, fold=False)
    linear = count_linear_weights(config)
    weights = int(linear * BITS[precision] + (parameters - linear) * BITS[precision.base]) // 8
    # Smoothing works on a copy in FP32.
    reference += 4 * parameters if precision.quantized else 0
    while_comparing = RUNTIME_BYTES_A_PARAMETER * parameters if parity else 0
    while_building = int(BUILD_FACTOR * weights) if plan else 0
    return Forecast(
        weights=weights,
        memory=BASE_BYTES + reference + max(while_comparing, while_building),
        disk=int(weights * (1 + (PLAN_FACTOR if plan else 0))) + PLAN_BASE_BYTES,
    )


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
