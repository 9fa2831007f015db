"""Traces a model to an ONNX graph on fake tensors; `write.py` then adds the weights.

Tracing never holds a weight. The precision is part of the graph: tensors are FP32, FP16 or BF16, while norms, pooling
and the L2 normalization compute in FP32.
"""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nvembed_deploy.backends.ort import INPUTS, OUTPUTS
from nvembed_deploy.errors import ExportError
from nvembed_deploy.export.fp16_ranges import convert_to_fp32
from nvembed_deploy.export.graph.repeat_layers import TRACED_LAYERS, repeat_layers
from nvembed_deploy.export.graph.simplify import simplify
from nvembed_deploy.export.layerwise import folded_form
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.model.decoder import Decoder
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.spec import Dialect, Precision

DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
TRACE_SHAPE = (3, 7)
"""Batch and tokens of the example; both above 1, or the tracer would treat them as constants."""


def trace(
    config: ModelConfig,
    *,
    precision: Precision,
    dialect: Dialect,
    fold: bool,
    fp32_modules: frozenset[str] = frozenset(),
) -> ir.Model:
    """Traces the model of a configuration; its weights are names without values.

    Layers beyond the third are copied from the traced ones, unless one of the layers has FP32 modules or only some of
    them limit attention to a window.

    Args:
        config: The architecture.
        precision: Type of weights and activations.
        dialect: Operators to use.
        fold: Whether to fold the latent attention.
        fp32_modules: Modules that compute in FP32; see `fp16_ranges.py`.

    Returns:
        A model with inputs int64 [batch, tokens] x 3 and outputs float32 [batch, D] and [batch].
    """
    differ = config.windowed_layers is not None or any(".layers." in name for name in fp32_modules)
    dtype = DTYPES[precision.base]
    if config.layers > TRACED_LAYERS and not differ:
        shortened = replace(config, layers=TRACED_LAYERS)
        traced = _copy(_trace(shortened, dtype=dtype, dialect=dialect, fold=fold, fp32_modules=fp32_modules))
        if repeat_layers(traced, config.layers):
            return traced
    return _copy(_trace(config, dtype=dtype, dialect=dialect, fold=fold, fp32_modules=fp32_modules))


@functools.lru_cache(maxsize=1)
def _trace(
    config: ModelConfig, *, dtype: torch.dtype, dialect: Dialect, fold: bool, fp32_modules: frozenset[str]
) -> ir.Model:
    """Traces all layers; the last graph is kept, since an export asks for it more than once."""
    with FakeTensorMode(), _default_dtype(dtype):
        model = folded_form(NVEmbed(config).requires_grad_(False).eval(), fold=fold)
        convert_to_fp32(model, fp32_modules)
        if dialect is Dialect.FUSED:
            _use_rotary_operator(model.embedding_model)
        else:
            _use_primitive_attention(model.embedding_model)
        # Three separate tensors: if one were passed twice, the tracer would merge the two inputs.
        example = tuple(torch.ones(TRACE_SHAPE, dtype=torch.int64) for _ in INPUTS)
        with _quiet():
            program = torch.onnx.export(
                model,
                example,
                dynamo=True,
                optimize=False,
                opset_version=dialect.opset,
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                dynamic_shapes=[{0: "batch", 1: "tokens"}] * len(INPUTS),
                verbose=False,
            )
    assert program is not None
    graph = program.model.graph
    weights = {name for name, _ in model.named_parameters()}
    for name in weights & graph.initializers.keys():
        graph.initializers[name].const_value = None  # it is fake, and a weight without a value is not folded
    with _quiet():
        simplify(program.model)
        passes.ClearMetadataAndDocStringPass()(program.model)  # they hold paths of this machine
    if missing_weights := sorted(weights - graph.initializers.keys()):
        raise ExportError(
            f"the exporter of torch {torch.__version__} dropped the weight {missing_weights[0]}; install a torch "
            "version that this package was tested with (constraints.txt)"
        )
    if program.model.opset_imports.get("") != dialect.opset:
        raise ExportError(
            f"the exporter of torch {torch.__version__} wrote opset {program.model.opset_imports.get('')} instead of "
            f"{dialect.opset}; install a torch version that this package was tested with (constraints.txt)"
        )
    program.model.producer_name = "nvembed-deploy"
    program.model.producer_version = None  # torch's; `describe_graph` sets this project's
    return program.model


def _copy(model: ir.Model) -> ir.Model:
    """Copies a graph with the types of its values, which `ir.Model.clone` shares."""
    copied = model.clone()
    graph = copied.graph
    outputs = (output for node in graph for output in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *outputs):
        value.type = copy.copy(value.type)
    return copied


def _use_rotary_operator(backbone: Decoder) -> None:
    """Replaces the five primitive operators of a rotary embedding by ONNX's RotaryEmbedding."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # The operator takes half of each table, repeated for every text: ONNX Runtime does not broadcast the batch.
        B, half = x.shape[0], cos.shape[-1] // 2
        tables = (table[None, :, :half].expand(B, -1, -1) for table in (cos, sin))
        return torch.onnx.ops.rotary_embedding(x, *tables)

    for layer in backbone.layers:
        layer.self_attn.rotate = rotate


def _use_primitive_attention(backbone: Decoder) -> None:
    """Writes attention in six operators per layer, which TensorRT 10 can fuse, with one mask for all layers.

    PyTorch's own decomposition has 17: it also transposes the keys by their shape, and replaces NaN in the weights,
    which an infinite mask makes of a query without keys. The mask here is finite, half of the type's minimum: no sum
    with a score overflows, and a softmax makes exactly 0 of it, since scores above a quarter of FP16's maximum are
    computed in FP32 (`fp16_ranges.HEADROOM`).

    Queries of heads that share keys are stacked along the tokens, [B, K, H/K x T, h]: two reshapes copy nothing, where
    repeated keys and values would.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        B, H, T, h = q.shape
        group = H // k.shape[1]
        # Equal in all layers, so computed once. Both values have the type of the scores, which may be FP32 in FP16.
        visible, hidden = (torch.full((), value, dtype=q.dtype) for value in (0.0, torch.finfo(q.dtype).min / 2))
        bias = torch.where(mask, visible, hidden)
        q = q * h**-0.5
        if group > 1:
            q = q.reshape(B, k.shape[1], group * T, h)
            if mask.shape[2] != 1:
                bias = torch.cat([bias] * group, dim=2)
        out = (q @ k.transpose(-1, -2) + bias).softmax(dim=-1) @ v
        return out.reshape(B, H, T, h) if group > 1 else out

    for layer in backbone.layers:
        layer.self_attn.attend = attend


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's warnings about weights without values: there are many, and they are intended."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
