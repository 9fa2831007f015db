"""Forecasts what an export will need, and refuses it before it starts if the machine has less."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nvembed_deploy.backends.trt import CONTEXTS
from nvembed_deploy.console import echo
from nvembed_deploy.engines.plan_builder import PLAN_BASE_BYTES, build_memory_bytes
from nvembed_deploy.engines.targets import BuildOption
from nvembed_deploy.errors import ExportError
from nvembed_deploy.export.graph.trace import DTYPES
from nvembed_deploy.export.graph.write import BLOCK_BYTES, PANEL_BYTES
from nvembed_deploy.export.layerwise import EMBEDDINGS, block_of
from nvembed_deploy.export.options import ExportOptions
from nvembed_deploy.export.quantization.calibration import BATCH_TOKENS, SAMPLED_ROWS
from nvembed_deploy.export.quantization.formats import FORMATS
from nvembed_deploy.export.quantization.gptq import MATRICES_IN_WORK
from nvembed_deploy.export.structure import structure_config
from nvembed_deploy.files.atomic import free_bytes
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.model.weights import StoredTensor, StoredWeights
from nvembed_deploy.spec import Dialect, Precision
from nvembed_deploy.system import GIB, available_memory_bytes

BASE_BYTES = int(0.41 * GIB)
"""Python with torch and onnx, after tracing."""
LAYER_BYTES = 2_000_000
"""Nodes of one layer, traced or repeated."""
HEAD_BYTES = 6
"""Bytes per number of a head's matrix while the pooler is folded: 16 bits, and a copy in FP32."""
PROBE_TOKENS = 2048
"""Tokens of the gate's texts, without the longest one."""
RANKED_TOKENS = 400
"""Tokens of the rows that rank a large model's groups; their hidden states are held once for each group."""
QUANTIZING_BYTES = 5
"""Bytes per weight of a matrix while it is quantized: its quotient in FP32, and the quantized value."""
SMALL_FILES_BYTES = 16 * 2**20
"""Graph, tokenizer and manifest."""
RUNTIME_BYTES_PER_PARAMETER = 5
"""ONNX Runtime's CPU provider holds FP32 copies of weights for whose type it has no kernel, and keeps some of the
originals: 4.3 on a third-generation AMD EPYC, 6.4 on a Xeon with more instruction sets."""
RUNTIME_BYTES_PER_QUANTIZED_WEIGHT = 4.5
"""Added per quantized weight while ONNX Runtime dequantizes it: measured for INT8 on the same EPYC."""
CUDA_BYTES = int(0.5 * GIB)
"""CUDA's own memory, and the kernels."""
RUNTIME_BASE_BYTES = int(0.15 * GIB)
"""Python with ONNX Runtime and the tokenizer."""
PLAN_FACTOR = 1.2
"""Size of a plan over that of its weights; up to 2 for the mini, which has few weights for its kernels."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes that an export and its bundle need."""

    weights: int
    memory: int
    """Host memory while exporting and building."""
    disk: int
    gpu: int
    """GPU memory at run time, with a plan."""
    cpu: int
    """Host memory at run time, without a plan."""
    device_whole: int
    """GPU memory while exporting, if PyTorch computes on a GPU and the whole model is there."""
    device_layerwise: int
    """The same if its blocks are copied there one after the other."""

    def __str__(self) -> str:
        return (
            f"{self.weights / GIB:.2f} GiB of weights, up to {self.memory / GIB:.2f} GiB of memory, "
            f"{self.disk / GIB:.2f} GiB of disk; at run time about {self.gpu / GIB:.1f} GiB of GPU memory, or "
            f"{self.cpu / GIB:.1f} GiB of memory on a CPU"
        )

    def on_device(self, *, whole: bool) -> str:
        """Says how much GPU memory the export needs, with the whole model there or layer by layer."""
        needed = self.device_whole if whole else self.device_layerwise
        return f"{'as a whole' if whole else 'layer by layer'}: up to {needed / GIB:.2f} GiB of GPU memory"


def count_parameters(config: ModelConfig, *, fold: bool) -> int:
    """Returns the number of parameters of the exported model."""
    return sum(config.parameters(fold=fold).values())


def count_linear_weights(config: ModelConfig) -> int:
    """Returns the number of parameters that a quantized precision stores quantized."""
    return sum(config.linear_weights().values())


def forecast(weights: StoredWeights, options: ExportOptions, *, plan: bool) -> Forecast:
    """Forecasts what an export needs.

    Args:
        weights: The checkpoint's weights.
        options: The export's options.
        plan: Whether a plan is built.
    """
    config, precision, fold = weights.config, options.precision, options.fold
    parameters, linear_weights = count_parameters(config, fold=fold), count_linear_weights(config)
    weight_bytes = stored_bytes(config, options)
    streaming, layerwise = _streaming_bytes(weights, options), _layerwise_bytes(weights, options)
    comparing = 0
    if options.parity:
        folded = 4 * parameters
        runtime = RUNTIME_BYTES_PER_PARAMETER * parameters
        if precision.quantized:  # more than the simulated weights take during the search
            runtime += int(RUNTIME_BYTES_PER_QUANTIZED_WEIGHT * linear_weights)
        # First the reference alone; then, its pooler folded, beside the writer, the runtime, or GPTQ.
        working = max(streaming, runtime, _gptq_bytes(config) if uses_gptq(precision) else 0)
        comparing = max(4 * count_parameters(config, fold=False), folded + working)
    elif options.runs_model:
        streaming = max(streaming, layerwise)
    building = build_memory_bytes(weight_bytes) if plan else 0
    # The rounded weights are removed when the graph is written, before a plan is built.
    beside_graph = _rounded_bytes(linear_weights, precision) if uses_gptq(precision) else 0
    if plan:
        beside_graph = max(beside_graph, int(weight_bytes * PLAN_FACTOR) + PLAN_BASE_BYTES)
    written = _written_bytes(weights, options, weight_bytes) + beside_graph
    return Forecast(
        weights=weight_bytes,
        memory=BASE_BYTES + LAYER_BYTES * config.layers + max(comparing, streaming, building),
        disk=max(written, _structure_bytes(weights, options)) + SMALL_FILES_BYTES,
        gpu=gpu_bytes(config, options),
        cpu=RUNTIME_BASE_BYTES + _cpu_weight_bytes(parameters, linear_weights, precision),
        device_whole=CUDA_BYTES + 4 * count_parameters(config, fold=fold and not options.parity) + layerwise,
        device_layerwise=CUDA_BYTES + layerwise,
    )


def stored_bytes(config: ModelConfig, options: ExportOptions) -> int:
    """Returns the size of the weights in a bundle."""
    linear_weights, precision = count_linear_weights(config), options.precision
    bits = linear_weights * precision.bits_per_weight
    bits += (count_parameters(config, fold=options.fold) - linear_weights) * precision.base.bits_per_weight
    return int(bits) // 8


def gpu_bytes(config: ModelConfig, options: ExportOptions) -> int:
    """Returns the GPU memory of a plan at run time: weights, the activations of all contexts, and CUDA."""
    plan_bytes = int(stored_bytes(config, options) * PLAN_FACTOR)
    return plan_bytes + CONTEXTS * _activation_bytes(config, options) + CUDA_BYTES


def _activation_bytes(config: ModelConfig, options: ExportOptions) -> int:
    """Returns the bytes of one context's activations at the largest batch: the residual and a block's.

    A fused attention holds no scores. That of a portable graph may run as separate operators, which hold them twice.
    """
    shape, itemsize = options.profile.max, DTYPES[options.precision.base].itemsize
    pooler_dim = (config.latent.feed_forward_mult * 3 if config.latent else 0) * config.hidden_size
    block_dim = max(3 * config.intermediate_size, pooler_dim)
    scores = 2 * config.heads * shape.tokens if options.dialect is Dialect.PORTABLE else 0
    return shape.batch * shape.tokens * (4 * config.hidden_size + max(block_dim, scores)) * itemsize


def _cpu_weight_bytes(parameters: int, linear_weights: int, precision: Precision) -> int:
    """Returns the size of the weights in ONNX Runtime, which keeps integers and converts everything else to FP32."""
    if precision in (Precision.INT8, Precision.INT4, Precision.NVFP4):
        return linear_weights + 4 * (parameters - linear_weights)
    return 4 * parameters


def _unfolded_tensors(weights: StoredWeights, options: ExportOptions) -> Iterator[tuple[str, StoredTensor]]:
    """Yields the checkpoint's tensors without those that are replaced by folded ones."""
    for name, tensor in weights.tensors.items():
        if not (options.fold and ".cross_attend_blocks.0." in name):
            yield name, tensor


def _streaming_bytes(weights: StoredWeights, options: ExportOptions) -> int:
    """Returns the peak while weights are written: a matrix and its transpose, or a head of the pooler."""
    dtype = DTYPES[options.precision.base]
    matrices = [
        2 * min(math.prod(tensor.shape) * dtype.itemsize, PANEL_BYTES)
        for name, tensor in _unfolded_tensors(weights, options)
        if len(tensor.shape) == 2
        and "embed_tokens" not in name
        and not (options.reference_weights and tensor.dtype == dtype)
    ]
    writing = max(matrices, default=0) + 4 * BLOCK_BYTES
    latent = weights.config.latent
    if options.fold and latent is not None:
        D = weights.config.hidden_size
        folded = 8 * D * latent.heads * latent.latents
        return folded + max(writing, HEAD_BYTES * latent.head_dim * D)
    return writing


def _layerwise_bytes(weights: StoredWeights, options: ExportOptions) -> int:
    """Returns the peak while a model runs block by block: the largest block in FP32, and its tokens' hidden states."""
    config, precision = weights.config, options.precision
    blocks: dict[str, list[int]] = {}
    for name, tensor in _unfolded_tensors(weights, options):
        blocks.setdefault(block_of(name), []).append(math.prod(tensor.shape))
    activations = 12 * BATCH_TOKENS * max(config.hidden_size * 2, config.intermediate_size)
    loading = max(5 * sum(sizes) for sizes in blocks.values())
    if not precision.quantized:
        return loading + 4 * PROBE_TOKENS * config.hidden_size + activations
    ranked_states = 4 * (4 * config.layers + 2) * RANKED_TOKENS * config.hidden_size
    hidden_states = 4 * max(options.calibration_tokens, PROBE_TOKENS) * config.hidden_size
    sampled_rows = SAMPLED_ROWS * (2 * config.hidden_size + config.intermediate_size) * 8
    # The block, its dequantized weights, and the work in progress: a matrix being quantized, or a batch.
    simulating = max(
        8 * sum(sizes) + max(QUANTIZING_BYTES * max(sizes), activations)
        for block_name, sizes in blocks.items()
        if block_name != EMBEDDINGS
    )
    # The block, the Hessians of its groups, and GPTQ's work.
    rounding = max(4 * sum(sizes) for sizes in blocks.values()) + _gptq_bytes(config) if uses_gptq(precision) else 0
    return max(loading, simulating, rounding) + ranked_states + hidden_states + sampled_rows


def uses_gptq(precision: Precision) -> bool:
    """Returns True if a precision's weights are rounded by GPTQ."""
    return precision.quantized and FORMATS[precision].gptq


def _gptq_bytes(config: ModelConfig) -> int:
    """Returns the bytes of a block's Hessians, and of what GPTQ makes of the largest one and its weight."""
    inputs = [config.hidden_size, config.heads * config.head_dim, config.hidden_size, config.intermediate_size]
    widest = max(config.intermediate_size, config.hidden_size)
    if config.latent is not None:
        feed_forward = config.latent.feed_forward_mult * config.hidden_size
        inputs = max(inputs, [config.hidden_size, feed_forward], key=lambda sizes: sum(K * K for K in sizes))
        widest = max(widest, 2 * feed_forward)
    hessians = sum(K * K for K in inputs) + (MATRICES_IN_WORK - 1) * max(inputs) ** 2
    return 4 * hessians + 9 * config.hidden_size * widest


def _rounded_bytes(linear_weights: int, precision: Precision) -> int:
    """Returns the size of the rounded weights in their files; scales of whole outputs are too few to count."""
    fmt = FORMATS[precision]
    scales = linear_weights // fmt.block_size if fmt.block_size is not None else 0
    return linear_weights * fmt.bits // 8 + 4 * scales


def _structure_bytes(weights: StoredWeights, options: ExportOptions) -> int:
    """Returns the size of the graph in FP32 that the structure is checked with, which is removed again."""
    if not options.parity or options.precision is Precision.FP32:
        return 0
    return 4 * count_parameters(structure_config(weights.config), fold=options.fold)


def _written_bytes(weights: StoredWeights, options: ExportOptions, weight_bytes: int) -> int:
    if not options.reference_weights:
        return weight_bytes
    dtype = DTYPES[options.precision.base]
    referenced = sum(tensor.bytes for _, tensor in _unfolded_tensors(weights, options) if tensor.dtype == dtype)
    return max(0, weight_bytes - referenced)


def require_room(needs: Forecast, out: Path, *, force: bool) -> None:
    """Compares a forecast with this machine.

    Raises:
        ExportError: There is not enough free memory or disk space, and `force` is False.
    """
    for resource, required, available in (
        ("disk", needs.disk, free_bytes(out)),
        ("memory", needs.memory, available_memory_bytes()),
    ):
        if available is not None and required > available and not force:
            raise ExportError(
                f"this export needs about {required / GIB:.1f} GiB of {resource}, but only {available / GIB:.1f} GiB "
                "are free; free some, use a larger machine, or pass --force to try"
            )


def note_small_gpus(needs: Forecast, options: ExportOptions) -> None:
    """Warns if the smallest device of the target has too little memory for the plan; larger ones may have enough."""
    memory_gib = options.target.memory_gib
    streams_weights = BuildOption.WEIGHT_STREAMING in options.build_options
    if memory_gib is not None and needs.gpu > memory_gib * GIB and not streams_weights:
        echo(
            f"note: the plan will need about {needs.gpu / GIB:.0f} GiB of GPU memory, and the smallest "
            f"{options.target.name} has {memory_gib:g}; use a larger one, --precision int8 or int4, or a smaller --max"
        )
