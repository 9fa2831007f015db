"""Checks the structure of a graph apart from its precision: in FP32, at FP32's bounds, whatever precision is exported.

The bounds of coarse precisions are wider than the effect of some structural faults: a rotary embedding whose base is
wrong by a factor of two passes those of INT8. The same graph with FP32 for its own types, and with the checkpoint's own
weights, has nothing but rounding errors of FP32 between it and PyTorch.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
from torch import nn

from nvembed_deploy.backends.base import Backend
from nvembed_deploy.backends.ort import OrtBackend
from nvembed_deploy.bundle.manifest import GRAPH
from nvembed_deploy.bundle.parity_report import ParityReport
from nvembed_deploy.errors import ParityError
from nvembed_deploy.export.graph.cpu_graph import SIXTEEN_BIT_TYPES
from nvembed_deploy.export.graph.repeat_layers import TRACED_LAYERS
from nvembed_deploy.export.graph.trace import trace
from nvembed_deploy.export.graph.weights import CheckpointWeights
from nvembed_deploy.export.graph.write import write
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.model.weights import StoredWeights
from nvembed_deploy.parity.compare import compare, compute_reference_outputs, require_mask
from nvembed_deploy.parity.probes import ReferenceOutputs
from nvembed_deploy.spec import Dialect, Precision, Shape
from nvembed_deploy.tokenization import TextEncoder

MAX_PARAMETERS = 300_000_000
"""A larger model is checked with its first layers only."""
FIRST_LAYERS = TRACED_LAYERS + 1
"""Layers of a larger model: those that are traced, and one that is copied."""
MAX_TOKENS = 64
"""Longer texts show no more of the structure."""


def structure_shape(max_shape: Shape) -> Shape:
    """Returns the largest batch that the structure is checked with."""
    return Shape(batch=max_shape.batch, tokens=min(MAX_TOKENS, max_shape.tokens))


def structure_config(config: ModelConfig) -> ModelConfig:
    """Returns the architecture that is checked: a large model's is cut to its first layers."""
    is_large = sum(config.parameters(fold=False).values()) > MAX_PARAMETERS
    return config.slice(min(config.layers, FIRST_LAYERS)) if is_large else config


def structure_reference(reference: Backend, model: NVEmbed, text: TextEncoder, max_shape: Shape) -> ReferenceOutputs:
    """Embeds short probes with the layers that are checked.

    Args:
        reference: A backend that runs `model`.
        model: The model in FP32, its pooler not folded.
        text: The model's text encoder.
        max_shape: Largest batch of the export.
    """
    with _first_layers(model, structure_config(model.config).layers):
        return compute_reference_outputs(
            reference, text, precision=Precision.FP32, max_shape=structure_shape(max_shape)
        )


@contextmanager
def _first_layers(model: NVEmbed, count: int) -> Iterator[None]:
    layers = model.embedding_model.layers
    model.embedding_model.layers = nn.ModuleList(list(layers)[:count])
    try:
        yield
    finally:
        model.embedding_model.layers = layers


def require_structure(
    weights: StoredWeights,
    reference: ReferenceOutputs,
    text: TextEncoder,
    folder: Path,
    *,
    precision: Precision,
    dialect: Dialect,
    fold: bool,
    max_shape: Shape,
) -> ParityReport:
    """Compares the export's graph, with FP32 for its own types, with the reference at FP32's bounds.

    Args:
        weights: The checkpoint's weights.
        reference: Outputs from `structure_reference`.
        text: The model's text encoder.
        folder: Where the graph is written; it is removed again.
        precision: Precision of the export's graph.
        dialect: Operators of the export's graph.
        fold: Whether the export's graph has a folded pooler.
        max_shape: Largest batch of the export.

    Raises:
        ParityError: The graph computes something else than the checkpoint's model.
        MaskError: It has another attention mask.
    """
    config = structure_config(weights.config)
    folder.mkdir()
    try:
        traced = trace(config, precision=precision, dialect=dialect, fold=fold)
        if not use_fp32(traced):
            traced = trace(config, precision=Precision.FP32, dialect=dialect, fold=fold)
        write(traced, CheckpointWeights(weights, fold=fold), folder, name=GRAPH)
        candidate = OrtBackend(folder / GRAPH)
        shape = structure_shape(max_shape)
        require_mask(candidate, text, config.mask, max_shape=shape)
        report = compare(reference, candidate, text, precision=Precision.FP32, max_shape=shape)
    finally:
        shutil.rmtree(folder)
    if not report.passed:
        raise ParityError(
            "the traced graph computes something else than the checkpoint, even in FP32: "
            f"{'; '.join(report.failures)}; no precision helps, so please report it with the checkpoint's config.json"
        )
    return report


def use_fp32(model: ir.Model) -> bool:
    """Replaces FP16 and BF16 by FP32 in a traced graph, in place.

    Returns:
        False, with the graph unchanged, if it has constants that were rounded to these types.
    """
    graph = model.graph
    constants = [value.const_value for value in graph.initializers.values()]
    constants += [
        attribute.as_tensor()
        for node in graph
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.TENSOR
    ]
    if any(constant is not None and constant.dtype in SIXTEEN_BIT_TYPES for constant in constants):
        return False
    outputs = [output for node in graph for output in node.outputs]
    for value in (*graph.initializers.values(), *outputs):
        if value.dtype in SIXTEEN_BIT_TYPES:
            value.dtype = ir.DataType.FLOAT
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() in SIXTEEN_BIT_TYPES:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    return True
