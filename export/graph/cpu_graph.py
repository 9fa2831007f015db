"""Derives the graph that CPUs run where they cannot run the engine's: the same weights file, other arithmetic.

BF16: ONNX Runtime has no BF16 kernels for CPUs except the cast. The same nodes compute in FP32 and each output is
rounded to BF16, so that the parity gate can judge BF16 without a GPU, and a BF16 bundle runs on any machine.

Quantized: CPUs have no FP16 arithmetic either, so everything that is not quantized computes in FP32. INT8 inputs become
unsigned, with a zero point of 128 and the same scales, which represents the same numbers and is what ONNX Runtime has
fast integer products for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

SIXTEEN_BIT_TYPES = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
"""Types that CPUs store and do not compute in."""

DATA_MOVEMENT = frozenset(
    ("Reshape", "Transpose", "Split", "Concat", "Expand", "Slice", "Gather", "Unsqueeze", "Squeeze", "Neg", "Identity")
)
"""Operators that only move or negate their inputs, so that there is nothing to round."""


def write_cpu_graph(source: Path, target: Path) -> None:
    """Derives the graph for CPUs.

    Args:
        source: A graph in BF16, or a quantized one, with its weights beside it.
        target: Where to write, in the same folder: the new graph refers to the same weights.
    """
    model = ir.load(source)
    graph = model.graph
    for initializer in list(graph.initializers.values()):
        if initializer.dtype in SIXTEEN_BIT_TYPES:
            first_node = next(iter(graph))
            _cast_to_fp32(initializer, graph, before=first_node)
    for node in list(graph):
        for output in node.outputs:
            if output.dtype == ir.DataType.BFLOAT16:
                _round_to_bf16(node, output, graph)
            elif output.dtype == ir.DataType.FLOAT16:
                output.dtype = ir.DataType.FLOAT
                if node.op_type == "Cast":
                    node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    for node in graph:
        if node.op_type == "QuantizeLinear" and node.outputs[0].dtype == ir.DataType.INT8:
            _use_unsigned(graph, node)
    ir.save(model, target)


def _round_to_bf16(node: ir.Node, output: ir.Value, graph: ir.Graph) -> None:
    """Computes a BF16 output in FP32 and rounds it."""
    if node.op_type == "Cast":  # it rounds already
        _cast_to_fp32(output, graph, after=node)
        return
    output.dtype = ir.DataType.FLOAT
    if node.op_type not in DATA_MOVEMENT:
        rounded = _cast(output, ir.DataType.BFLOAT16)
        restored = _cast(rounded.outputs[0], ir.DataType.FLOAT)
        _redirect(output, restored.outputs[0], exclude=rounded)
        graph.insert_after(node, (rounded, restored))


def _use_unsigned(graph: ir.Graph, quantize: ir.Node) -> None:
    """Represents the same numbers by quantized values that are 128 higher."""
    zero = ir.Value(name=f"{quantize.outputs[0].name}_128", const_value=ir.tensor(np.array(128, dtype=np.uint8)))
    zero.dtype, zero.shape = ir.DataType.UINT8, ir.Shape(())
    graph.initializers[str(zero.name)] = zero
    quantize.outputs[0].dtype = ir.DataType.UINT8
    for node in (quantize, *(user for user, _ in quantize.outputs[0].uses())):
        node.replace_input_with(2, zero)


def _cast_to_fp32(
    value: ir.Value, graph: ir.Graph, *, before: ir.Node | None = None, after: ir.Node | None = None
) -> None:
    """Gives the users of a 16-bit value an FP32 copy of it."""
    cast = _cast(value, ir.DataType.FLOAT)
    _redirect(value, cast.outputs[0], exclude=cast)
    if before is not None:
        graph.insert_before(before, cast)
    elif after is not None:
        graph.insert_after(after, cast)


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": int(dtype)})
    node.outputs[0].dtype = dtype
    node.outputs[0].shape = value.shape
    node.outputs[0].name = f"{value.name}_{dtype.name.lower()}"
    return node


def _redirect(value: ir.Value, replacement: ir.Value, *, exclude: ir.Node) -> None:
    """Replaces a value in all nodes that use it but one."""
    for user, index in tuple(value.uses()):
        if user is not exclude:
            user.replace_input_with(index, replacement)
