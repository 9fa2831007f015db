"""Repeated layers: the graph is the one that tracing every layer gives."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from nvembed_deploy.export.graph import trace as graph
from nvembed_deploy.export.graph.repeat_layers import TRACED_LAYERS, repeat_layers
from nvembed_deploy.model.family import read_checkpoint_architecture
from nvembed_deploy.spec import Dialect, Precision
from tests.model.test_family import make_relative

LAYERS = TRACED_LAYERS + 2


def described(model: ir.Model) -> list[object]:
    """Every node with its inputs: weights by name, constants by value, the others by who made them."""
    names: dict[ir.Value, object] = {value: value.name for value in model.graph.inputs}
    for value in model.graph.initializers.values():
        constant = value.const_value
        names[value] = value.name if constant is None else (str(constant.dtype), constant.numpy().tolist())
    found: list[object] = []
    for number, node in enumerate(model.graph):
        inputs = [names[value] if value is not None else None for value in node.inputs]
        attributes = sorted((name, str(item.value)) for name, item in node.attributes.items())
        shapes = [(str(value.shape), str(value.type)) for value in node.outputs]
        found.append((node.domain, node.op_type, inputs, attributes, shapes))
        names.update({value: (number, place) for place, value in enumerate(node.outputs)})
    return [*found, [names[value] for value in model.graph.outputs]]


@pytest.mark.parametrize(
    ("name", "dialect", "precision"),
    [
        ("NV-Embed-v2", Dialect.FUSED, Precision.FP16),
        pytest.param("e5-mistral", Dialect.FUSED, Precision.FP32, marks=pytest.mark.slow),
        pytest.param("gte-Qwen2", Dialect.PORTABLE, Precision.BF16, marks=pytest.mark.slow),
    ],
)
def test_repeating_equals_tracing(
    checkpoint: Path, tmp_path: Path, name: str, dialect: Dialect, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint if name == "NV-Embed-v2" else make_relative(name, tmp_path / name)
    config = replace(read_checkpoint_architecture(folder), layers=LAYERS)
    traced = []

    def watched(model: ir.Model, layers: int) -> bool:
        traced.append(repeat_layers(model, layers))
        return traced[-1]

    monkeypatch.setattr(graph, "repeat_layers", watched)
    repeated = graph.trace(config, precision=precision, dialect=dialect, fold=True)
    assert traced == [True]
    monkeypatch.setattr(graph, "repeat_layers", lambda *_: False)
    whole = graph.trace(config, precision=precision, dialect=dialect, fold=True)
    for ours, theirs in zip(described(repeated), described(whole), strict=True):
        assert ours == theirs
    values = [value.name for node in repeated.graph for value in node.outputs]
    assert len(values) == len(set(values))
    weights = {name: value.shape for name, value in whole.graph.initializers.items() if value.const_value is None}
    assert {name: value.shape for name, value in repeated.graph.initializers.items() if value.const_value is None} == (
        weights
    )


@pytest.mark.parametrize("layer", [0, TRACED_LAYERS - 1])
def test_layers_that_differ_are_not_repeated(checkpoint: Path, layer: int) -> None:
    config = replace(read_checkpoint_architecture(checkpoint), layers=TRACED_LAYERS)
    wide = frozenset({f"embedding_model.layers.{layer}.mlp"})
    model = graph.trace(config, precision=Precision.FP16, dialect=Dialect.FUSED, fold=True, wide=wide)
    before = described(model)
    # The first layer stands for none, and may be another.
    assert repeat_layers(model, LAYERS) is (layer == 0)
    assert (described(model) == before) is (layer > 0)


def test_what_is_wide_in_one_layer_is_traced_in_all(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    monkeypatch.setattr(graph, "_trace", lambda config, **_: traced.append(config.layers))
    monkeypatch.setattr(graph, "repeat_layers", lambda *_: True)
    config = replace(read_checkpoint_architecture(checkpoint), layers=LAYERS)
    for wide in (f"embedding_model.layers.{LAYERS - 1}.mlp", "embedding_model.norm"):
        graph.trace(config, precision=Precision.FP16, dialect=Dialect.FUSED, fold=True, wide=frozenset({wide}))
    assert traced == [LAYERS, TRACED_LAYERS]
