"""Adds decoder layers to a traced graph by copying: they are alike, so three traced ones are enough.

Tracing takes about a second per layer, which is most of the time of an export with `--weights reference`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common as passes

TRACED_LAYERS = 3
"""The first layer also computes what all layers share; the other two show that only their weights differ."""
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


def repeat_layers(model: ir.Model, layers: int) -> bool:
    """Appends copies of the last decoder layer, in place.

    Args:
        model: A simplified model of `TRACED_LAYERS` layers, its weights without values.
        layers: Number of layers that the model will have.

    Returns:
        False if the last two layers differ in more than their weights; the model is then unchanged.
    """
    layer_nodes = _last_layers(list(model.graph))
    if layer_nodes is None or not _are_alike(*layer_nodes):
        return False
    previous_layer, last_layer = layer_nodes
    following = list(model.graph)[list(model.graph).index(last_layer[-1]) + 1 :]
    successors = dict(zip(_outputs(previous_layer), _outputs(last_layer), strict=True))
    insert_point = last_layer[-1]
    copied: dict[ir.Value, ir.Value] = {}
    """Maps each value that the last traced layer computes, or takes from the one before it, to the copy's."""
    for layer in range(TRACED_LAYERS, layers):
        copied = {value: copied.get(successor, successor) for value, successor in successors.items()}
        copies = [_copy(node, copied, layer, model.graph) for node in last_layer]
        model.graph.insert_after(insert_point, copies)
        insert_point = copies[-1]
    for node in following:
        for index, value in enumerate(node.inputs):
            if value in copied:
                node.replace_input_with(index, copied[value])
    passes.NameFixPass()(model)
    return True


def _last_layers(nodes: Sequence[ir.Node]) -> tuple[Sequence[ir.Node], Sequence[ir.Node]] | None:
    """Returns the nodes of the last two layers, each from its first weight on; None if they are not contiguous."""
    users: dict[int, list[int]] = {}
    for index, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and (layer := _layer_of(value)) is not None:
                users.setdefault(layer, []).append(index)
    starts = [min(users[layer]) for layer in range(TRACED_LAYERS)]
    end = 2 * starts[2] - starts[1]
    ranges = {0: range(starts[0], starts[1]), 1: range(starts[1], starts[2]), 2: range(starts[2], end)}
    is_contiguous = all(index in ranges[layer] for layer, indices in users.items() for index in indices)
    if end > len(nodes) or not is_contiguous:
        return None
    return nodes[starts[1] : starts[2]], nodes[starts[2] : end]


def _are_alike(layer: Sequence[ir.Node], next_layer: Sequence[ir.Node]) -> bool:
    """Returns True if the next layer does with the layer's outputs what the layer does with its inputs."""
    layer_outputs = set(_outputs(layer))
    successors: dict[ir.Value, ir.Value] = {}
    for node, next_node in zip(layer, next_layer, strict=True):
        if _signature(node) != _signature(next_node):
            return False
        for value, next_value in zip(node.inputs, next_node.inputs, strict=True):
            if value is not None and next_value in layer_outputs:  # an input from the layer before corresponds to it
                successors.setdefault(value, next_value)
            if not _corresponds(value, next_value, successors):
                return False
        successors.update(zip(node.outputs, next_node.outputs, strict=True))
    return True


def _corresponds(value: ir.Value | None, next_value: ir.Value | None, successors: dict[ir.Value, ir.Value]) -> bool:
    if value is None or next_value is None:
        return value is next_value
    if _layer_of(value) is None:
        return successors.get(value, value) is next_value
    return next_value.name == _name_in(value, TRACED_LAYERS - 1)


def _signature(node: ir.Node) -> tuple[object, ...]:
    attributes = {name: (attribute.type, attribute.value) for name, attribute in node.attributes.items()}
    types = [(value.type, value.shape) for value in node.outputs]
    return node.domain, node.op_type, attributes, types, len(node.inputs)


def _copy(node: ir.Node, copied: dict[ir.Value, ir.Value], layer: int, graph: ir.Graph) -> ir.Node:
    """Copies a node for another layer, and adds the copy's outputs to `copied`."""
    inputs = [
        value if value is None else _weight(value, layer, graph) or copied.get(value, value) for value in node.inputs
    ]
    outputs = [ir.Value(name=f"{value.name}_{layer}", type=value.type, shape=value.shape) for value in node.outputs]
    copied.update(zip(node.outputs, outputs, strict=True))
    return ir.Node(
        node.domain, node.op_type, inputs, node.attributes.values(), outputs=outputs, name=f"{node.name}_{layer}"
    )


def _weight(value: ir.Value, layer: int, graph: ir.Graph) -> ir.Value | None:
    """Returns the same weight of another layer, adding it to the graph; None if the value is no layer's weight."""
    if _layer_of(value) is None:
        return None
    name = _name_in(value, layer)
    if name not in graph.initializers:
        graph.initializers.add(ir.Value(name=name, type=value.type, shape=value.shape))
    return graph.initializers[name]


def _outputs(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    return [value for node in nodes for value in node.outputs]


def _layer_of(value: ir.Value) -> int | None:
    match = _LAYER.search(str(value.name)) if value.is_initializer() else None
    return int(match[0]) if match else None


def _name_in(value: ir.Value, layer: int) -> str:
    return _LAYER.sub(str(layer), str(value.name), count=1)
