"""The operators that TensorRT 10's ONNX parser supports, to check graphs for a device that is not at hand.

The table has only the operators that portable graphs may contain; any other is refused, even if TensorRT supports it.
Source: onnx/onnx-tensorrt, docs/operators.md at 10.1-GA; JetPack 6.2 has TensorRT 10.3. FP4 is in the list of 10.15,
and in TensorRT since 10.8, which is also the first for GPUs that have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from nvembed_deploy.errors import ExportError
from nvembed_deploy.spec import Dialect, Precision

OPSET = Dialect.PORTABLE.opset

_FLOATS = frozenset(("FLOAT", "FLOAT16", "BFLOAT16"))
_NUMBERS = _FLOATS | {"INT32", "INT64"}
_ANY = _NUMBERS | {"BOOL"}
TYPES: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        ("Clip", "Cos", "Erf", "LayerNormalization", "MatMul", "Pow", "QuantizeLinear", "Reciprocal", "Sigmoid", "Sin"),
        _FLOATS,
    ),
    **dict.fromkeys(("Softmax", "Sqrt", "Tanh"), _FLOATS),
    **dict.fromkeys(("Add", "Div", "Equal", "Gelu", "IsNaN", "Max", "Mul", "Neg", "Range", "Sub"), _NUMBERS),
    **dict.fromkeys(("GreaterOrEqual", "Less"), _NUMBERS),
    **dict.fromkeys(("ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum"), _NUMBERS),
    **dict.fromkeys(("Concat", "Expand", "Gather", "Reshape", "Shape", "Slice", "Split", "Squeeze"), _ANY),
    **dict.fromkeys(("Transpose", "Unsqueeze", "Where"), _ANY),
    **dict.fromkeys(("And", "Or"), frozenset(("BOOL",))),
    "Cast": _ANY | {"UINT8"},
    "DequantizeLinear": frozenset(("INT8", "FLOAT8E4M3FN", "INT4", "FLOAT4E2M1")),
}
"""Types that each operator supports for its operand."""
OPERAND_INDEX = {"Where": 1}
"""Index of the input that `TYPES` refers to, if it is not the first."""
CONSTANT_AXES = ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum", "Squeeze", "Unsqueeze")
"""Operators whose second input must be a constant; for Slice it is the fourth."""
STANDARD_DOMAINS = ("", "ai.onnx")
SYMMETRIC = ("QuantizeLinear", "DequantizeLinear")
"""Operators whose zero points must be 0."""


def require_portable(path: Path) -> None:
    """Checks that TensorRT 10 can parse a graph.

    Raises:
        ExportError: It cannot; the message lists everything that it does not support.
    """
    if problems := sorted(set(unsupported(path))):
        raise ExportError(
            f"TensorRT 10 cannot parse {path.name}: {'; '.join(problems)}. Export with --dialect portable; if the "
            "graph was exported with it, please report a bug"
        )


def unsupported(path: Path) -> Iterator[str]:
    """Yields a description of each thing in a graph that TensorRT 10's parser does not support."""
    model = onnx.load(path, load_external_data=False)
    opset = next(imported.version for imported in model.opset_import if imported.domain in STANDARD_DOMAINS)
    # ONNX has 4-bit types from a later opset on, and the parser supports them in graphs that use nothing else of it.
    types_used = {tensor.data_type for tensor in model.graph.initializer}
    four_bits = {onnx.TensorProto.INT4: Precision.INT4, onnx.TensorProto.FLOAT4E2M1: Precision.NVFP4}
    max_opset = max(OPSET, *(four_bits[dtype].min_opset for dtype in types_used & four_bits.keys()), 0)
    if opset > max_opset:
        yield f"opset {opset}, above {max_opset}"
    operators = [
        node.op_type for node in model.graph.node if node.domain not in STANDARD_DOMAINS or node.op_type not in TYPES
    ]
    yield from (f"operator {name}" for name in operators)
    if operators:  # the types of unknown operators cannot be inferred
        return
    # In memory, because shape inference of a file would need its weights.
    graph = onnx.shape_inference.infer_shapes(model).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    types = {name: tensor.data_type for name, tensor in constants.items()}
    values = (*graph.input, *graph.value_info, *graph.output)
    types |= {value.name: value.type.tensor_type.elem_type for value in values}
    for node in graph.node:
        yield from _unsupported_in_node(node, types, constants)


def _unsupported_in_node(
    node: onnx.NodeProto, types: dict[str, int], constants: dict[str, onnx.TensorProto]
) -> Iterator[str]:
    operator = node.op_type
    operand = node.input[OPERAND_INDEX.get(operator, 0)]
    type_name = onnx.TensorProto.DataType.Name(types[operand]) if operand in types else "an unknown type"
    if type_name not in TYPES[operator]:
        yield f"{operator} of {type_name}"
    axes = node.input[1:2] if operator in CONSTANT_AXES else node.input[3:4] if operator == "Slice" else ()
    yield from (f"{operator} with computed axes" for name in axes if name and name not in constants)
    for name in node.input[2:3] if operator in SYMMETRIC else ():
        zero_point = constants.get(name)
        if zero_point is None or any(zero_point.raw_data) or any(zero_point.int32_data):
            yield f"{operator} with a zero point"
