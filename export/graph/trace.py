"""The ONNX graph: traced once on fake tensors, then the weights are written to one file beside it.

Tracing never holds a weight. Precision is in the graph: tensors are FP32, FP16 or BF16; norms, pooling and L2 compute
in FP32. Linear weights are stored the way MatMul takes them, so that no runtime has to turn them at load.
"""

from __future__ import annotations

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
from nvembed_deploy.export.fp16_ranges import widen
from nvembed_deploy.export.graph.repeat_layers import TRACED_LAYERS, repeat_layers
from nvembed_deploy.export.graph.simplify import simplify
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.model.decoder import Decoder
from nvembed_deploy.model.fold import FoldedLatentAttention
from nvembed_deploy.model.latent_attention import LatentAttentionModel
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.spec import Dialect, Precision

DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
TRACE_SHAPE = (3, 7)
"""Both above 1, or the tracer takes them for constants."""


def trace(
    config: ModelConfig, *, precision: Precision, dialect: Dialect, fold: bool, wide: frozenset[str] = frozenset()
) -> ir.Model:
    """Traces the model of a configuration; its weights are names without values. Layers beyond the third are repeated.

    Args:
        config: The architecture.
        precision: Type of weights and activations.
        dialect: Operators to use.
        fold: Fold the latent attention.
        wide: Modules that compute in FP32; see `fp16_ranges.py`.

    Returns:
        A model with inputs int64 [batch, tokens] x 3 and outputs float32 [batch, D] and [batch].
    """
    if config.layers > TRACED_LAYERS and not any(".layers." in name for name in wide):
        few = replace(config, layers=TRACED_LAYERS)
        traced = _trace(few, precision=precision, dialect=dialect, fold=fold, wide=wide)
        if repeat_layers(traced, config.layers):
            return traced
    return _trace(config, precision=precision, dialect=dialect, fold=fold, wide=wide)


def _trace(
    config: ModelConfig, *, precision: Precision, dialect: Dialect, fold: bool, wide: frozenset[str]
) -> ir.Model:
    with FakeTensorMode(), _default_dtype(DTYPES[precision.base]):
        model = NVEmbed(config).requires_grad_(False).eval()
        if fold and isinstance(model.latent_attention_model, LatentAttentionModel):
            model.latent_attention_model = FoldedLatentAttention(model.latent_attention_model)
        widen(model, wide)
        if dialect is Dialect.FUSED:
            _use_rotary_operator(model.embedding_model)
        # Three tensors: one given twice would be merged into one input.
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
        graph.initializers[name].const_value = None  # fake; and what has no value cannot be folded
    with _quiet():
        simplify(program.model)
        passes.ClearMetadataAndDocStringPass()(program.model)  # they hold paths of this machine
    if missing := sorted(weights - graph.initializers.keys()):
        raise ExportError(f"the tracer dropped {missing[0]}; this torch {torch.__version__} is not one we know")
    program.model.producer_name = "nvembed-deploy"
    program.model.producer_version = None
    return program.model


def _use_rotary_operator(backbone: Decoder) -> None:
    """Puts ONNX's RotaryEmbedding in place of the five operators that it stands for."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # The operator takes half of each table, one row a text: ONNX Runtime refuses a batch of 1 for many.
        B, half = x.shape[0], cos.shape[-1] // 2
        tables = (table[None, :, :half].expand(B, -1, -1) for table in (cos, sin))
        return torch.onnx.ops.rotary_embedding(x, *tables)

    for layer in backbone.layers:
        layer.self_attn.rotate = rotate


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
    """Keeps back the exporter's notes on values without content: there are many, and they are meant."""
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
