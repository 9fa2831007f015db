"""Q/DQ nodes in a traced graph: integers are stored, and every runtime reads the same numbers out of them.

TensorRT 10, 11 and RTX take precision from the graph alone. A pair around a layer's input and a DequantizeLinear behind
its weight is the pattern that they fuse into an INT8 or FP8 product; INT4 has the weight's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nvembed_deploy.engines.portable_operators import INT4_OPSET
from nvembed_deploy.errors import ExportError
from nvembed_deploy.export.quantization.formats import Format

CODES = "_codes"
SCALE = "_scale"
TYPES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN, "int4": ir.DataType.INT4}
"""The first with 4-bit integers and blocks."""


def insert(model: ir.Model, layers: Mapping[str, float], number: Format) -> None:
    """Puts stored codes in place of layers' weights, and rounds their inputs.

    Args:
        model: A traced graph, weights without values.
        layers: Module name of each quantized linear layer to the scale of its input.
        number: How to store.

    Raises:
        ExportError: A layer's product is not in the graph as expected.
    """
    graph = model.graph
    rounded: dict[tuple[int, float], ir.Value] = {}
    for name, input_scale in layers.items():
        weight = graph.initializers.get(f"{name}.weight")
        product = _product_of(weight)
        if weight is None or weight.dtype is None or weight.shape is None or product is None:
            raise ExportError(f"{name} is not one product in the traced graph; this is a bug, please report it")
        turn = product.inputs[1].producer()  # type: ignore[union-attr]
        product.replace_input_with(1, _stored_weight(graph, name, weight, number, before=product))
        assert turn is not None
        graph.remove(turn, safe=True)
        del graph.initializers[f"{name}.weight"]
        given = product.inputs[0]
        if number.inputs and given is not None:
            key = (id(given), input_scale)
            if key not in rounded:
                rounded[key] = _rounded_input(graph, given, input_scale, number)
            product.replace_input_with(0, rounded[key])
    if number.block is not None:
        model.opset_imports[""] = max(model.opset_imports[""], INT4_OPSET)


def _product_of(weight: ir.Value | None) -> ir.Node | None:
    """The MatMul behind a weight's Transpose."""
    turns = [node for node, _ in weight.uses()] if weight is not None else []
    users = [node for turn in turns for node, _ in turn.outputs[0].uses()]
    return users[0] if len(turns) == len(users) == 1 and users[0].op_type == "MatMul" else None


def _stored_weight(graph: ir.Graph, name: str, weight: ir.Value, number: Format, *, before: ir.Node) -> ir.Value:
    assert weight.shape is not None
    assert weight.dtype is not None
    rows, columns = weight.shape.numpy()  # [out, in]
    codes = _initializer(graph, f"{name}.weight{CODES}", TYPES[number.precision.value], (columns, rows))
    scale = _initializer(graph, f"{name}.weight{SCALE}", weight.dtype, number.scale_shape(rows, columns))
    attributes = {"axis": 1} if number.block is None else {"axis": 0, "block_size": number.block}
    node = ir.node("DequantizeLinear", [codes, scale], attributes)
    _describe(node, f"{name}.weight", weight.dtype, (columns, rows))
    graph.insert_before(before, node)
    return node.outputs[0]


def _rounded_input(graph: ir.Graph, given: ir.Value, input_scale: float, number: Format) -> ir.Value:
    assert given.dtype is not None
    kind = TYPES[number.precision.value]
    dtype = given.dtype.numpy()
    scale = _constant(graph, f"{given.name}{SCALE}", np.array(input_scale, dtype=dtype))
    zero = _constant(graph, f"{given.name}_zero", np.zeros((), dtype=kind.numpy()))
    down = ir.node("QuantizeLinear", [given, scale, zero])
    _describe(down, f"{given.name}{CODES}", kind, given.shape)
    up = ir.node("DequantizeLinear", [down.outputs[0], scale, zero])
    _describe(up, f"{given.name}_rounded", given.dtype, given.shape)
    maker = given.producer()
    assert maker is not None
    graph.insert_after(maker, (down, up))
    return up.outputs[0]


def _describe(node: ir.Node, name: str, dtype: ir.DataType, shape: object) -> None:
    output = node.outputs[0]
    output.name, output.dtype = name, dtype
    output.shape = shape if isinstance(shape, ir.Shape) or shape is None else ir.Shape(shape)  # type: ignore[arg-type]


def _initializer(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    """A weight whose value is written later."""
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    graph.initializers[name] = value
    return value


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    graph.initializers[name] = value
    return value
