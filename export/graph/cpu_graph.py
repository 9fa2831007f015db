"""The graph that a CPU runs, where the engine's own is not for it: the same weights file, other arithmetic.

BF16: ONNX Runtime has no BF16 kernels for CPUs, only the cast. The same nodes compute in FP32 and each result is
rounded to BF16, so that the parity gate can judge BF16 without a GPU, and a bundle in BF16 answers on any machine.

Quantized: CPUs have no FP16 arithmetic either, so all else computes in FP32. INT8 inputs become unsigned, with zero at
128 and the same scales, which gives the same numbers and is what ONNX Runtime has fast integer products for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
"""Formats that CPUs store and do not compute in."""

MOVES = frozenset(
    ("Reshape", "Transpose", "Split", "Concat", "Expand", "Slice", "Gather", "Unsqueeze", "Squeeze", "Neg", "Identity")
)
"""Operators whose results are values of their inputs: nothing to round."""


def write_cpu_graph(source: Path, target: Path) -> None:
    """Derives the graph for CPUs.

    Args:
        source: A graph in BF16, or a quantized one, with its weights beside it.
        target: Where to write, in the same folder: it refers to the same weights.
    """
    model = ir.load(source)
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.dtype in NARROW:
            first = next(iter(graph))
            _widen(value, graph, before=first)
    for node in list(graph):
        for output in node.outputs:
            if output.dtype == ir.DataType.BFLOAT16:
                _round(node, output, graph)
            elif output.dtype == ir.DataType.FLOAT16:
                output.dtype = ir.DataType.FLOAT
                if node.op_type == "Cast":
                    node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    for node in graph:
        if node.op_type == "QuantizeLinear" and node.outputs[0].dtype == ir.DataType.INT8:
            _use_unsigned(graph, node)
    ir.save(model, target)


def _round(node: ir.Node, output: ir.Value, graph: ir.Graph) -> None:
    """Computes a BF16 result in FP32 and rounds it."""
    if node.op_type == "Cast":  # it rounds already
        _widen(output, graph, after=node)
        return
    output.dtype = ir.DataType.FLOAT
    if node.op_type not in MOVES:
        rounded = _cast(output, ir.DataType.BFLOAT16)
        restored = _cast(rounded.outputs[0], ir.DataType.FLOAT)
        _redirect(output, restored.outputs[0], keep=rounded)
        graph.insert_after(node, (rounded, restored))


def _use_unsigned(graph: ir.Graph, down: ir.Node) -> None:
    """The same numbers from codes that are 128 higher."""
    zero = ir.Value(name=f"{down.outputs[0].name}_128", const_value=ir.tensor(np.array(128, dtype=np.uint8)))
    zero.dtype, zero.shape = ir.DataType.UINT8, ir.Shape(())
    graph.initializers[str(zero.name)] = zero
    down.outputs[0].dtype = ir.DataType.UINT8
    for node in (down, *(user for user, _ in down.outputs[0].uses())):
        node.replace_input_with(2, zero)


def _widen(value: ir.Value, graph: ir.Graph, *, before: ir.Node | None = None, after: ir.Node | None = None) -> None:
    """Gives the users of a BF16 value its FP32 copy."""
    wide = _cast(value, ir.DataType.FLOAT)
    _redirect(value, wide.outputs[0], keep=wide)
    if before is not None:
        graph.insert_before(before, wide)
    elif after is not None:
        graph.insert_after(after, wide)


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": int(dtype)})
    node.outputs[0].dtype = dtype
    node.outputs[0].shape = value.shape
    node.outputs[0].name = f"{value.name}_{dtype.name.lower()}"
    return node


def _redirect(value: ir.Value, replacement: ir.Value, *, keep: ir.Node) -> None:
    for user, index in tuple(value.uses()):
        if user is not keep:
            user.replace_input_with(index, replacement)
