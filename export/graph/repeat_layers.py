"""Layers that are not traced: a decoder's are alike, so that three of them stand for all.

Tracing takes about a second a layer, and is most of an export that refers to weights where they lie.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common as passes

TRACED_LAYERS = 3
"""The first also computes what all share; the other two show that they differ in nothing but their weights."""
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


def repeat_layers(model: ir.Model, layers: int) -> bool:
    """Adds layers like the last one behind it, in place.

    Args:
        model: Of `TRACED_LAYERS` layers, simplified, its weights without values.
        layers: How many it is to have.

    Returns:
        False where the last two layers differ in more than their weights; the model is then as it was.
    """
    blocks = _last_blocks(list(model.graph))
    if blocks is None or not _are_alike(*blocks):
        return False
    before, block = blocks
    tail = list(model.graph)[list(model.graph).index(block[-1]) + 1 :]
    follower = dict(zip(_outputs(before), _outputs(block), strict=True))
    place = block[-1]
    here: dict[ir.Value, ir.Value] = {}
    """For what the last traced layer computes or takes from the one before it: the same of the layer at hand."""
    for layer in range(TRACED_LAYERS, layers):
        here = {value: here.get(next_one, next_one) for value, next_one in follower.items()}
        copies = [_copy(node, here, layer, model.graph) for node in block]
        model.graph.insert_after(place, copies)
        place = copies[-1]
    for node in tail:
        for index, value in enumerate(node.inputs):
            if value in here:
                node.replace_input_with(index, here[value])
    passes.NameFixPass()(model)
    return True


def _last_blocks(nodes: Sequence[ir.Node]) -> tuple[Sequence[ir.Node], Sequence[ir.Node]] | None:
    """The nodes of the last two layers, each from its first weight on; None where they do not lie behind each other."""
    users: dict[int, list[int]] = {}
    for index, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and (layer := _layer_of(value)) is not None:
                users.setdefault(layer, []).append(index)
    first, begin, middle = (min(users[layer]) for layer in range(TRACED_LAYERS))
    end = 2 * middle - begin
    inside = {0: range(first, begin), 1: range(begin, middle), 2: range(middle, end)}
    if end > len(nodes) or any(index not in inside[layer] for layer, found in users.items() for index in found):
        return None
    return nodes[begin:middle], nodes[middle:end]


def _are_alike(one: Sequence[ir.Node], other: Sequence[ir.Node]) -> bool:
    """True where the second block is the first one with another layer's weights, and takes its place in the data."""
    own = set(_outputs(one))
    follower: dict[ir.Value, ir.Value] = {}
    for ours, theirs in zip(one, other, strict=True):
        if _kind(ours) != _kind(theirs):
            return False
        for value, next_one in zip(ours.inputs, theirs.inputs, strict=True):
            if value is not None and next_one in own:  # what came from the layer before comes from this one
                follower.setdefault(value, next_one)
            if not _follows(value, next_one, follower):
                return False
        follower.update(zip(ours.outputs, theirs.outputs, strict=True))
    return True


def _follows(value: ir.Value | None, next_one: ir.Value | None, follower: dict[ir.Value, ir.Value]) -> bool:
    if value is None or next_one is None:
        return value is next_one
    if _layer_of(value) is None:
        return follower.get(value, value) is next_one
    return next_one.name == _name_in(value, TRACED_LAYERS - 1)


def _kind(node: ir.Node) -> tuple[object, ...]:
    attributes = {name: (item.type, item.value) for name, item in node.attributes.items()}
    types = [(value.type, value.shape) for value in node.outputs]
    return node.domain, node.op_type, attributes, types, len(node.inputs)


def _copy(node: ir.Node, here: dict[ir.Value, ir.Value], layer: int, graph: ir.Graph) -> ir.Node:
    """A node for another layer; its outputs are added to `here`."""
    inputs = [
        value if value is None else _weight(value, layer, graph) or here.get(value, value) for value in node.inputs
    ]
    outputs = [ir.Value(name=f"{value.name}_{layer}", type=value.type, shape=value.shape) for value in node.outputs]
    here.update(zip(node.outputs, outputs, strict=True))
    return ir.Node(
        node.domain, node.op_type, inputs, node.attributes.values(), outputs=outputs, name=f"{node.name}_{layer}"
    )


def _weight(value: ir.Value, layer: int, graph: ir.Graph) -> ir.Value | None:
    """The same weight of another layer, made where there is none yet; None for what is no layer's weight."""
    if _layer_of(value) is None:
        return None
    name = _name_in(value, layer)
    if name not in graph.initializers:
        graph.initializers.add(ir.Value(name=name, type=value.type, shape=value.shape))
    return graph.initializers[name]


def _outputs(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    return [value for node in nodes for value in node.outputs]


def _layer_of(value: ir.Value) -> int | None:
    found = _LAYER.search(str(value.name)) if value.is_initializer() else None
    return int(found[0]) if found else None


def _name_in(value: ir.Value, layer: int) -> str:
    return _LAYER.sub(str(layer), str(value.name), count=1)
