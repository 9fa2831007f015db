"""Inserts Q/DQ nodes into a traced graph: integers are stored, and every runtime reads the same numbers out of them.

TensorRT 10, 11 and RTX take the precision from the graph alone. They fuse a QuantizeLinear/DequantizeLinear pair at a
layer's input and a DequantizeLinear at its weight into an INT8 or FP8 product; INT4 and NVFP4 have only the weight's.
NVFP4 has two of them in a row, since its scales are quantized too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nvembed_deploy.errors import ExportError
from nvembed_deploy.export.quantization.formats import (
    QUANTIZED_SUFFIX,
    SCALE_SUFFIX,
    TENSOR_SCALE_SUFFIX,
    NumberFormat,
)
from nvembed_deploy.spec import Precision

IR_TYPES = {
    Precision.INT8: ir.DataType.INT8,
    Precision.FP8: ir.DataType.FLOAT8E4M3FN,
    Precision.INT4: ir.DataType.INT4,
    Precision.NVFP4: ir.DataType.FLOAT4E2M1,
}
"""Types of the quantized values."""


def insert_qdq(model: ir.Model, input_scales: Mapping[str, float], fmt: NumberFormat) -> None:
    """Replaces layers' weights by quantized ones, and quantizes their inputs.

    Args:
        model: A traced graph, its weights without values.
        input_scales: Scale of the input of each quantized linear layer, by the layer's module name.
        fmt: The number format.

    Raises:
        ExportError: A layer is not a single product in the graph.
    """
    graph = model.graph
    rounded_inputs: dict[tuple[int, float], ir.Value] = {}
    for name, input_scale in input_scales.items():
        weight = graph.initializers.get(f"{name}.weight")
        product = _product_of(weight)
        if weight is None or weight.dtype is None or weight.shape is None or product is None:
            raise ExportError(f"{name} is not one product in the traced graph; this is a bug, please report it")
        transpose = product.inputs[1].producer()  # type: ignore[union-attr]
        assert transpose is not None
        dequantized = _quantized_weight(graph, name, weight, fmt, before=transpose)
        if fmt.by_output:
            transpose.replace_input_with(0, dequantized)
        else:
            product.replace_input_with(1, dequantized)
            graph.remove(transpose, safe=True)
        del graph.initializers[f"{name}.weight"]
        layer_input = product.inputs[0]
        if fmt.quantizes_inputs and layer_input is not None:
            key = (id(layer_input), input_scale)
            if key not in rounded_inputs:
                rounded_inputs[key] = _rounded_input(graph, layer_input, input_scale, fmt)
            product.replace_input_with(0, rounded_inputs[key])
    model.opset_imports[""] = max(model.opset_imports[""], fmt.precision.min_opset)


def _product_of(weight: ir.Value | None) -> ir.Node | None:
    """Returns the MatMul that takes a weight's Transpose, if it is the weight's only use."""
    transposes = [node for node, _ in weight.uses()] if weight is not None else []
    users = [node for transpose in transposes for node, _ in transpose.outputs[0].uses()]
    return users[0] if len(transposes) == len(users) == 1 and users[0].op_type == "MatMul" else None


def _quantized_weight(graph: ir.Graph, name: str, weight: ir.Value, fmt: NumberFormat, *, before: ir.Node) -> ir.Value:
    assert weight.shape is not None
    assert weight.dtype is not None
    shapes = fmt.stored_shapes(*weight.shape.numpy())
    dtypes = {suffix: weight.dtype for suffix in shapes} | {QUANTIZED_SUFFIX: IR_TYPES[fmt.precision]}
    if TENSOR_SCALE_SUFFIX in shapes:
        dtypes[SCALE_SUFFIX] = ir.DataType.FLOAT8E4M3FN
    stored = {
        suffix: _initializer(graph, f"{name}.weight{suffix}", dtypes[suffix], shape) for suffix, shape in shapes.items()
    }
    scale = stored[SCALE_SUFFIX]
    if TENSOR_SCALE_SUFFIX in shapes:
        dequantize_scale = ir.node("DequantizeLinear", [scale, stored[TENSOR_SCALE_SUFFIX]])
        _describe_output(dequantize_scale, f"{name}.weight_block_scale", weight.dtype, shapes[SCALE_SUFFIX])
        graph.insert_before(before, dequantize_scale)
        scale = dequantize_scale.outputs[0]
    input_axis = 1 if fmt.by_output else 0
    attributes = {"axis": 1} if fmt.block_size is None else {"axis": input_axis, "block_size": fmt.block_size}
    dequantize = ir.node("DequantizeLinear", [stored[QUANTIZED_SUFFIX], scale], attributes)
    _describe_output(dequantize, f"{name}.weight", weight.dtype, shapes[QUANTIZED_SUFFIX])
    graph.insert_before(before, dequantize)
    return dequantize.outputs[0]


def _rounded_input(graph: ir.Graph, layer_input: ir.Value, input_scale: float, fmt: NumberFormat) -> ir.Value:
    assert layer_input.dtype is not None
    quantized_type = IR_TYPES[fmt.precision]
    dtype = layer_input.dtype.numpy()
    scale = _constant(graph, f"{layer_input.name}{SCALE_SUFFIX}", np.array(input_scale, dtype=dtype))
    zero = _constant(graph, f"{layer_input.name}_zero", np.zeros((), dtype=quantized_type.numpy()))
    quantize = ir.node("QuantizeLinear", [layer_input, scale, zero])
    _describe_output(quantize, f"{layer_input.name}{QUANTIZED_SUFFIX}", quantized_type, layer_input.shape)
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
    _describe_output(dequantize, f"{layer_input.name}_rounded", layer_input.dtype, layer_input.shape)
    producer = layer_input.producer()
    assert producer is not None
    graph.insert_after(producer, (quantize, dequantize))
    return dequantize.outputs[0]


def _describe_output(node: ir.Node, name: str, dtype: ir.DataType, shape: object) -> None:
    output = node.outputs[0]
    output.name, output.dtype = name, dtype
    output.shape = shape if isinstance(shape, ir.Shape) or shape is None else ir.Shape(shape)  # type: ignore[arg-type]


def _initializer(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    """Adds a weight whose values are written later."""
    initializer = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    graph.initializers[name] = initializer
    return initializer


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    initializer = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    graph.initializers[name] = initializer
    return initializer
