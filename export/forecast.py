"""What an export will need, said before it starts, and refused where it cannot fit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from nvembed_deploy.backends.trt import CONTEXTS
from nvembed_deploy.engines.plan_builder import build_memory_bytes
from nvembed_deploy.errors import ExportError
from nvembed_deploy.export.graph.trace import DTYPES
from nvembed_deploy.export.graph.write import BLOCK_BYTES, PANEL_BYTES
from nvembed_deploy.export.layerwise import EMBEDDINGS, part_of
from nvembed_deploy.export.options import ExportOptions
from nvembed_deploy.export.quantization.calibration import BATCH_TOKENS, SAMPLED_ROWS
from nvembed_deploy.files.atomic import free_bytes
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.model.weights import StoredWeights
from nvembed_deploy.spec import Precision
from nvembed_deploy.system import available_memory_bytes

GIB = 2**30
BASE_BYTES = int(0.41 * GIB)
"""Python with torch and onnx, after tracing."""
LAYER_BYTES = 2_000_000
"""Nodes of one layer, traced or repeated."""
HEAD_BYTES = 6
"""Bytes for each entry of a head's matrix while the pooler is folded: 16 bits, and a copy in FP32."""
PROBE_TOKENS = 2048
"""Of the probes, but for a longest one."""
RANKED_TOKENS = 400
"""Of the rows that rank a large model's groups: their states are held once for each group."""
CODING_BYTES = 5
"""For each entry of a matrix while its codes are made: its quotient in FP32, and the code."""
SMALL_FILES_BYTES = 16 * 2**20
"""Graph, tokenizer and manifest."""
RUNTIME_BYTES_A_PARAMETER = 5
"""ONNX Runtime's CPU provider holds FP32 copies of weights where it has no kernel for their type, and some as they are:
4.3 on an AMD EPYC of the third generation, 6.4 on a Xeon with more kinds of instructions."""
RUNTIME_BYTES_A_CODE = 4.5
"""More for each quantized weight, while it turns codes into numbers: measured for INT8 on that EPYC."""
CUDA_BYTES = int(0.5 * GIB)
"""CUDA's own, and the kernels."""
RUNTIME_BASE_BYTES = int(0.15 * GIB)
"""Python with ONNX Runtime and the tokenizer."""
PLAN_FACTOR = 1.2
"""Size of a plan over its weights; the mini's, which has kernels beside few weights, is up to 2 x."""
PLAN_BASE_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes needed."""

    weights: int
    memory: int
    """Of the host, while exporting and building."""
    disk: int
    gpu: int
    """At run time, with a plan."""
    cpu: int
    """Of the host at run time, without one."""

    def __str__(self) -> str:
        return (
            f"{self.weights / GIB:.2f} GiB of weights, up to {self.memory / GIB:.2f} GiB of memory, "
            f"{self.disk / GIB:.2f} GiB of disk; at run time about {self.gpu / GIB:.1f} GiB of GPU memory, or "
            f"{self.cpu / GIB:.1f} GiB of memory on a CPU"
        )


def count_parameters(config: ModelConfig, *, fold: bool) -> int:
    """Parameters of the model as exported."""
    return sum(config.parameters(fold=fold).values())


def count_linear_weights(config: ModelConfig) -> int:
    """Of the parameters, those that a quantized precision stores in its own format."""
    return sum(config.linear_weights().values())


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
    size = int(linear * precision.bits_per_weight + (parameters - linear) * precision.base.bits_per_weight) // 8
    streaming = _streaming_bytes(weights, options)
    in_memory = 0
    while_building = build_memory_bytes(size) if plan else 0
    if options.parity:
        folded = 4 * parameters
        runtime = RUNTIME_BYTES_A_PARAMETER * parameters
        if precision.quantized:  # which is more than what stands for the codes while they are searched for
            runtime += int(RUNTIME_BYTES_A_CODE * linear)
        # The reference; then, its pooler folded, beside the writer or the runtime.
        in_memory = max(4 * count_parameters(config, fold=False), folded + max(streaming, runtime))
    elif options.runs_model:
        streaming = max(streaming, _part_bytes(weights, options))
    written = _written_bytes(weights, options, size)
    return Forecast(
        weights=size,
        memory=BASE_BYTES + LAYER_BYTES * config.layers + max(in_memory, streaming, while_building),
        disk=int(written + (size * PLAN_FACTOR + PLAN_BASE_BYTES if plan else 0)) + SMALL_FILES_BYTES,
        gpu=int(size * PLAN_FACTOR) + CONTEXTS * _activation_bytes(config, options) + CUDA_BYTES,
        cpu=RUNTIME_BASE_BYTES + _cpu_weight_bytes(parameters, linear, precision),
    )


def _activation_bytes(config: ModelConfig, options: ExportOptions) -> int:
    """What a context holds for the largest batch: the residual and a block's tensors, scores not among them."""
    tokens = options.profile.max.batch * options.profile.max.tokens
    widest = max(
        3 * config.intermediate_size, (config.latent.feed_forward_mult * 3 if config.latent else 0) * config.hidden_size
    )
    return tokens * (4 * config.hidden_size + widest) * DTYPES[options.precision.base].itemsize


def _cpu_weight_bytes(parameters: int, linear: int, precision: Precision) -> int:
    """ONNX Runtime keeps integers as they are, and turns all else into FP32."""
    if precision in (Precision.INT8, Precision.INT4):
        return linear + 4 * (parameters - linear)
    return 4 * parameters


def _streaming_bytes(weights: StoredWeights, options: ExportOptions) -> int:
    """Most that is in memory while weights are written: a matrix and the same turned, or a head of the pooler."""
    fold, wanted = options.fold, DTYPES[options.precision.base]
    matrices = [
        2 * min(math.prod(item.shape) * wanted.itemsize, PANEL_BYTES)
        for name, item in weights.tensors.items()
        if len(item.shape) == 2
        and "embed_tokens" not in name
        and not (fold and ".cross_attend_blocks.0." in name)
        and not (options.reference and item.dtype == wanted)
    ]
    latent = weights.config.latent
    if fold and latent is not None:
        D = weights.config.hidden_size
        folded = 8 * D * latent.heads * latent.latents
        return folded + max(max(matrices, default=0) + 4 * BLOCK_BYTES, HEAD_BYTES * latent.head_dim * D)
    return max(matrices, default=0) + 4 * BLOCK_BYTES


def _part_bytes(weights: StoredWeights, options: ExportOptions) -> int:
    """Most that is in memory while a model runs part by part: the largest part in FP32, and states of its tokens."""
    config = weights.config
    parts: dict[str, list[int]] = {}
    for name, item in weights.tensors.items():
        if not (options.fold and ".cross_attend_blocks.0." in name):
            parts.setdefault(part_of(name), []).append(math.prod(item.shape))
    activations = 12 * BATCH_TOKENS * max(config.hidden_size * 2, config.intermediate_size)
    loading = max(5 * sum(entries) for entries in parts.values())
    if not options.precision.quantized:
        return loading + 4 * PROBE_TOKENS * config.hidden_size + activations
    ranked = 4 * (4 * config.layers + 2) * RANKED_TOKENS * config.hidden_size
    states = 4 * max(options.calibration_tokens, PROBE_TOKENS) * config.hidden_size
    sampled = SAMPLED_ROWS * (2 * config.hidden_size + config.intermediate_size) * 8
    # The part, what stands for its codes, and what is at work: codes being made, or a batch.
    simulating = max(
        8 * sum(entries) + max(CODING_BYTES * max(entries), activations)
        for part, entries in parts.items()
        if part != EMBEDDINGS
    )
    return max(loading, simulating) + ranked + states + sampled


def _written_bytes(weights: StoredWeights, options: ExportOptions, size: int) -> int:
    if not options.reference:
        return size
    wanted = DTYPES[options.precision.base]
    as_they_lie = sum(
        item.bytes
        for name, item in weights.tensors.items()
        if item.dtype == wanted and not (options.fold and ".cross_attend_blocks.0." in name)  # which is written folded
    )
    return max(0, size - as_they_lie)


def require_room(needed: Forecast, out: Path, *, force: bool) -> None:
    """Compares a forecast with this machine.

    Raises:
        ExportError: There is not enough free memory or disk, and `force` is off.
    """
    disk, memory = free_bytes(out), available_memory_bytes()
    for what, want, have in (("disk", needed.disk, disk), ("memory", needed.memory, memory)):
        if have is not None and want > have and not force:
            raise ExportError(
                f"this export needs about {want / GIB:.1f} GiB of {what} and {have / GIB:.1f} GiB are free; free some, "
                "use a larger machine, or pass --force to try"
            )
