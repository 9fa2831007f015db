"""What the ONNX parser of TensorRT 10 takes, for graphs that are built on a device which is not at hand.

Only the operators that portable graphs may hold are in the table; any other is refused, known to TensorRT or not.
Source: onnx/onnx-tensorrt, docs/operators.md at 10.1-GA; JetPack 6.2 has TensorRT 10.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from nvembed_deploy.errors import ExportError
from nvembed_deploy.spec import Dialect

OPSET = Dialect.PORTABLE.opset
INT4_OPSET = 21
"""The first that has 4-bit tensors."""

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
    "DequantizeLinear": frozenset(("INT8", "FLOAT8E4M3FN", "INT4")),
}
"""Types of an operator's operand."""
OPERAND = {"Where": 1}
"""The input that `TYPES` is about, where it is not the first."""
CONSTANT_AXES = ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum", "Squeeze", "Unsqueeze")
"""Their second input must be a constant; of Slice, the fourth."""
STANDARD = ("", "ai.onnx")
SYMMETRIC = ("QuantizeLinear", "DequantizeLinear")
"""Their zero points must be 0."""


def require_portable(path: Path) -> None:
    """Checks a graph against the table.

    Raises:
        ExportError: With everything that TensorRT 10 does not take.
    """
    if found := sorted(set(unsupported(path))):
        raise ExportError(
            f"{path.name} holds what TensorRT 10 cannot parse: {'; '.join(found)}. Export with --dialect portable; "
            "if it was, this is a bug, please report it"
        )


def unsupported(path: Path) -> Iterator[str]:
    """What in a graph TensorRT 10's parser does not take, in words."""
    model = onnx.load(path, load_external_data=False)
    opset = next(item.version for item in model.opset_import if item.domain in STANDARD)
    # 4-bit integers are in ONNX from opset 21 on; the parser's list has them, for graphs with nothing else of it.
    most = INT4_OPSET if any(item.data_type == onnx.TensorProto.INT4 for item in model.graph.initializer) else OPSET
    if opset > most:
        yield f"opset {opset}, above {most}"
    strange = [node.op_type for node in model.graph.node if node.domain not in STANDARD or node.op_type not in TYPES]
    yield from (f"operator {name}" for name in strange)
    if strange:  # whose types cannot be inferred either
        return
    # In memory: shape inference of a file would look for its weights.
    graph = onnx.shape_inference.infer_shapes(model).graph
    constants = {item.name: item for item in graph.initializer}
    types = {name: item.data_type for name, item in constants.items()}
    types |= {item.name: item.type.tensor_type.elem_type for item in (*graph.input, *graph.value_info, *graph.output)}
    for node in graph.node:
        yield from _of_node(node, types, constants)


def _of_node(node: onnx.NodeProto, types: dict[str, int], constants: dict[str, onnx.TensorProto]) -> Iterator[str]:
    name = node.op_type
    operand = node.input[OPERAND.get(name, 0)]
    kind = onnx.TensorProto.DataType.Name(types[operand]) if operand in types else "an unknown type"
    if kind not in TYPES[name]:
        yield f"{name} of {kind}"
    axes = node.input[1:2] if name in CONSTANT_AXES else node.input[3:4] if name == "Slice" else ()
    yield from (f"{name} whose axes are computed" for item in axes if item and item not in constants)
    for item in node.input[2:3] if name in SYMMETRIC else ():
        point = constants.get(item)
        if point is None or any(point.raw_data) or any(point.int32_data):
            yield f"{name} with a zero point"
