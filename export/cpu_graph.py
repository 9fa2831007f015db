"""A BF16 graph that a CPU can run: the same nodes and the same weights, computed in FP32, each result rounded to BF16.

ONNX Runtime has no BF16 kernels for CPUs, only the cast. So the parity gate can judge BF16 without a GPU, and a bundle
in BF16 answers on any machine.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

MOVES = frozenset(
    ("Reshape", "Transpose", "Split", "Concat", "Expand", "Slice", "Gather", "Unsqueeze", "Squeeze", "Neg", "Identity")
)
"""Operators whose results are values of their inputs: nothing to round."""


def write_cpu_graph(source: Path, target: Path) -> None:
    """Derives the graph for CPUs.

    Args:
        source: A BF16 graph with its weights beside it.
        target: Where to write, in the same folder: it refers to the same weights.
    """
    model = ir.load(source)
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.dtype == ir.DataType.BFLOAT16:
            first = next(iter(graph))
            _widen(value, graph, before=first)
    for node in list(graph):
        for output in node.outputs:
            if output.dtype != ir.DataType.BFLOAT16:
                continue
            if node.op_type == "Cast":  # it rounds already
                _widen(output, graph, after=node)
                continue
            output.dtype = ir.DataType.FLOAT
            if node.op_type not in MOVES:
                rounded = _cast(output, ir.DataType.BFLOAT16)
                restored = _cast(rounded.outputs[0], ir.DataType.FLOAT)
                _redirect(output, restored.outputs[0], keep=rounded)
                graph.insert_after(node, (rounded, restored))
    ir.save(model, target)


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
