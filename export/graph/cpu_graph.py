"""Derives the graph that CPUs run where they cannot run the engine's: the same weights file, other arithmetic.

BF16: ONNX Runtime has no BF16 kernels for CPUs except the cast. The same nodes compute in FP32 and each output is
rounded to BF16, so that the parity gate can judge BF16 without a GPU, and a BF16 bundle runs on any machine.

Quantized: CPUs have no FP16 arithmetic either, so everything that is not quantized computes in FP32. INT8 inputs become
unsigned, with a zero point of 128 and the same scales, which represents the same numbers and is what ONNX Runtime has
fast integer products for. ONNX Runtime has no kernels for FP4: such weights are read as bytes, and the two values in
each are looked up in a table, doubled, so that they are integers. Runtimes do that once, when they load the graph, and
hold 8 bits per weight; they would also multiply by the scales, but then hold 22 bytes per weight for a while.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nvembed_deploy.export.quantization.formats import E2M1_VALUES

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
    _replace_types(graph)
    ir.save(model, target)


def _replace_types(graph: ir.Graph) -> None:
    """Replaces the quantized types that CPUs multiply slowly, or cannot read, by others for the same numbers."""
    for node in list(graph):
        if node.op_type == "QuantizeLinear" and node.outputs[0].dtype == ir.DataType.INT8:
            _use_unsigned(graph, node)
        elif node.op_type == "DequantizeLinear" and _dtype_of(node.inputs[0]) == ir.DataType.FLOAT4E2M1:
            _look_up_fp4(graph, node)


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


def _dtype_of(value: ir.Value | None) -> ir.DataType | None:
    return None if value is None else value.dtype


def _look_up_fp4(graph: ir.Graph, dequantize: ir.Node) -> None:
    """Replaces an FP4 weight [out, in] by its doubled values in INT8, and halves the scales that they are read with."""
    packed = _as_bytes(graph, dequantize.inputs[0])
    scale = dequantize.inputs[1]
    dequantize_scale = scale.producer() if scale is not None else None
    assert dequantize_scale is not None
    scales_in_fp8, tensor_scale = dequantize_scale.inputs
    doubled = 2 * np.array((*E2M1_VALUES, *(-value for value in E2M1_VALUES)))
    byte = np.arange(256)
    pairs = np.stack((doubled[byte & 0xF], doubled[byte >> 4]), axis=1).astype(np.int8)
    nodes: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, attributes))
        output = nodes[-1].outputs[0]
        output.name = f"{dequantize.outputs[0].name}_{op_type.lower()}_{len(nodes)}"
        return output

    half = add("Mul", tensor_scale, _shared_constant(graph, "fp4_half", np.array(0.5, dtype=np.float32)))
    scales = add("Mul", add("Cast", scales_in_fp8, to=int(ir.DataType.FLOAT)), half)
    table = _shared_constant(graph, "fp4_doubled_values_of_bytes", pairs)
    looked_up = add("Gather", table, add("Cast", packed, to=int(ir.DataType.INT32)))  # [out, in / 2, 2]
    weight = add("Reshape", looked_up, _shared_constant(graph, "fp4_shape", np.array((0, -1))))
    weight.dtype, weight.shape = ir.DataType.INT8, dequantize.outputs[0].shape
    scales.dtype, scales.shape = ir.DataType.FLOAT, dequantize_scale.outputs[0].shape
    graph.insert_before(dequantize_scale, nodes)
    dequantize.replace_input_with(0, weight)
    dequantize.replace_input_with(1, scales)
    graph.remove(dequantize_scale, safe=True)


def _as_bytes(graph: ir.Graph, weight: ir.Value | None) -> ir.Value:
    """Returns the stored bytes of a weight with two values in each, in place of the weight."""
    assert weight is not None
    stored = weight.const_value
    assert isinstance(stored, ir.ExternalTensor)
    rows, columns = stored.shape.numpy()
    shape = ir.Shape((rows, columns // 2))
    tensor = ir.ExternalTensor(
        stored.location, stored.offset, stored.length, ir.DataType.UINT8, shape=shape, name=stored.name,
        base_dir=stored.base_dir,
    )  # fmt: skip
    packed = ir.Value(name=weight.name, const_value=tensor, type=ir.TensorType(ir.DataType.UINT8), shape=shape)
    graph.initializers[str(weight.name)] = packed
    return packed


def _shared_constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Returns a constant, which is added to the graph when it is needed for the first time."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.initializers[name] = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)
        )
    return graph.initializers[name]


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
