"""The ONNX graph: traced once on fake tensors, then the weights are written to one file beside it.

Tracing never holds a weight. Precision is in the graph: tensors are FP32, FP16 or BF16; norms, pooling and L2 compute
in FP32. Linear weights are stored the way MatMul takes them, so that no runtime has to turn them at load.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from nvembed_deploy.backends.ort import INPUTS, OUTPUTS
from nvembed_deploy.bundle import WEIGHTS
from nvembed_deploy.config import Dialect, ModelConfig, Precision
from nvembed_deploy.errors import ExportError
from nvembed_deploy.model.fold import FoldedLatentAttention
from nvembed_deploy.model.nvembed import BidirectionalMistral, LatentAttentionModel, NVEmbed

from .ranges import widen

DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
STORED = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.INT4: torch.int8,  # two to a byte once they are written
}
TRACE_SHAPE = (3, 7)
"""Both above 1, or the tracer takes them for constants."""
PAGE_BYTES = 4096
"""Tensors start on pages, so that a runtime can map the file into memory."""


def trace(
    config: ModelConfig, *, precision: Precision, dialect: Dialect, fold: bool, wide: frozenset[str] = frozenset()
) -> ir.Model:
    """Traces the model of a configuration; its weights are names without values.

    Args:
        config: The architecture.
        precision: Type of weights and activations.
        dialect: Operators to use.
        fold: Fold the latent attention.
        wide: Modules that compute in FP32; see `ranges.py`.

    Returns:
        A model with inputs int64 [batch, tokens] x 3 and outputs float32 [batch, D] and [batch].
    """
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
        program.optimize()  # folds constants, and fuses RMSNormalization where the opset has it
        passes.ClearMetadataAndDocStringPass()(program.model)  # they hold paths of this machine
    if missing := sorted(weights - graph.initializers.keys()):
        raise ExportError(f"the tracer dropped {missing[0]}; this torch {torch.__version__} is not one we know")
    program.model.producer_name = "nvembed-deploy"
    program.model.producer_version = None
    return program.model


def write(model: ir.Model, state: dict[str, Tensor], folder: Path, *, name: str) -> int:
    """Writes the weights, then the graph that refers to them.

    Args:
        model: What `trace` gave.
        state: The reference's parameters in FP32, folded if the graph is; codes and scales of quantized layers.
        folder: Where to write.
        name: File name of the graph.

    Returns:
        Bytes of the weights.

    Raises:
        ExportError: A weight is missing, is of another shape, or does not fit into FP16.
    """
    path = folder / WEIGHTS
    graph = model.graph
    with path.open("xb") as file:
        names = [name for name, value in graph.initializers.items() if value.const_value is None]
        for weight in tqdm(names, desc="writing weights", unit="tensor", disable=None, leave=False):
            value = graph.initializers[weight]
            tensor = _stored(value, state)
            file.write(b"\0" * (-file.tell() % PAGE_BYTES))
            offset = file.tell()
            content = _packed(tensor) if value.dtype == ir.DataType.INT4 else tensor.view(torch.uint8)
            file.write(content.numpy().data)
            value.const_value = ir.ExternalTensor(
                WEIGHTS,
                offset,
                file.tell() - offset,
                value.dtype or ir.DataType.FLOAT,
                shape=ir.Shape(tensor.shape),
                name=weight,
                base_dir=folder,
            )
        size_bytes = file.tell()
    ir.save(model, folder / name)
    return size_bytes


def check(path: Path) -> None:
    """Checks a written graph with onnx.checker, and for FP16 constants that are infinite.

    Raises:
        ExportError: With what is wrong.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise ExportError(f"{path.name} is not valid ONNX ({err}); this is a bug, please report it") from err
    for value in ir.load(path).graph.initializers.values():
        constant = value.const_value
        if isinstance(constant, ir.ExternalTensor) or constant is None or constant.dtype != ir.DataType.FLOAT16:
            continue
        if not np.isfinite(constant.numpy()).all():
            raise ExportError(
                f"{path.name}: constant {value.name} is infinite in FP16; this is a bug, please report it"
            )


def _stored(value: ir.Value, state: dict[str, Tensor]) -> Tensor:
    """The tensor as the graph takes it: converted, and turned where every use would turn it."""
    tensor = state.get(str(value.name))
    if tensor is None or value.shape is None or list(tensor.shape) != [int(size) for size in value.shape]:
        raise ExportError(f"the graph's weight {value.name} {value.shape} is not one of the checkpoint's")
    dtype = STORED[value.dtype or ir.DataType.FLOAT]
    if tensor.dtype == dtype and dtype in (torch.int8, torch.float8_e4m3fn):
        return tensor.contiguous()  # codes, as MatMul takes them
    converted = tensor.to(dtype)
    if not torch.isfinite(converted).all():
        largest = float(tensor.abs().max())
        raise ExportError(
            f"weight {value.name} reaches {largest:.3g}, which {str(dtype).removeprefix('torch.')} cannot hold; export "
            "with --precision bf16 or fp32"
        )
    turns = [node for node, _ in value.uses()]
    if turns and all(_is_turn(node) for node in turns):
        for node in turns:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            graph = node.graph
            if graph is not None:
                graph.remove(node, safe=True)
        converted = converted.T
        value.shape = ir.Shape(converted.shape)
    return converted.contiguous()


def _packed(codes: Tensor) -> Tensor:
    """4-bit codes, two to a byte, the first in the lower half, as ONNX stores them."""
    pairs = codes.reshape(-1, 2).to(torch.uint8) & 0xF  # an even number: blocks are
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _is_turn(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm")
    return node.op_type == "Transpose" and permutation is not None and list(permutation.as_ints()) == [1, 0]


def _use_rotary_operator(backbone: BidirectionalMistral) -> None:
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
