"""Repeated layers: the graph is the same as if every layer were traced."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from nvembed_deploy.export.graph import trace as graph
from nvembed_deploy.export.graph.repeat_layers import TRACED_LAYERS, repeat_layers
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.spec import Dialect, Precision
from tests.model.test_family import make_family_checkpoint

LAYERS = TRACED_LAYERS + 2


def describe(model: ir.Model) -> list[object]:
    """Describes each node and its inputs: weights by name, constants by content, others by the node that made them."""
    names: dict[ir.Value, object] = {value: value.name for value in model.graph.inputs}
    for value in model.graph.initializers.values():
        constant = value.const_value
        names[value] = value.name if constant is None else (str(constant.dtype), constant.numpy().tolist())
    descriptions: list[object] = []
    for index, node in enumerate(model.graph):
        inputs = [names[value] if value is not None else None for value in node.inputs]
        attributes = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
        shapes = [(str(value.shape), str(value.type)) for value in node.outputs]
        descriptions.append((node.domain, node.op_type, inputs, attributes, shapes))
        names.update({value: (index, position) for position, value in enumerate(node.outputs)})
    return [*descriptions, [names[value] for value in model.graph.outputs]]


@pytest.mark.parametrize(
    ("name", "dialect", "precision"),
    [
        pytest.param("NV-Embed-v2", Dialect.FUSED, Precision.FP16, marks=pytest.mark.slow),
        pytest.param("e5-mistral", Dialect.FUSED, Precision.FP32, marks=pytest.mark.slow),
        pytest.param("gte-Qwen2", Dialect.PORTABLE, Precision.BF16, marks=pytest.mark.slow),
    ],
)
def test_repeating_equals_tracing(
    checkpoint: Path, tmp_path: Path, name: str, dialect: Dialect, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint if name == "NV-Embed-v2" else make_family_checkpoint(name, tmp_path / name)
    config = replace(read_checkpoint_architecture(folder), layers=LAYERS)
    traced = []

    def recording(model: ir.Model, layers: int) -> bool:
        traced.append(repeat_layers(model, layers))
        return traced[-1]

    monkeypatch.setattr(graph, "repeat_layers", recording)
    repeated = graph.trace(config, precision=precision, dialect=dialect, fold=True)
    assert traced == [True]
    monkeypatch.setattr(graph, "repeat_layers", lambda *_: False)
    expected = graph.trace(config, precision=precision, dialect=dialect, fold=True)
    for node, expected_node in zip(describe(repeated), describe(expected), strict=True):
        assert node == expected_node
    output_names = [output.name for node in repeated.graph for output in node.outputs]
    assert len(output_names) == len(set(output_names))
    assert weight_shapes(repeated) == weight_shapes(expected)


def weight_shapes(model: ir.Model) -> dict[str, ir.Shape | None]:
    initializers = model.graph.initializers.items()
    return {name: initializer.shape for name, initializer in initializers if initializer.const_value is None}


@pytest.mark.parametrize("layer", [0, TRACED_LAYERS - 1])
def test_layers_that_differ_are_not_repeated(checkpoint: Path, layer: int) -> None:
    config = replace(read_checkpoint_architecture(checkpoint), layers=TRACED_LAYERS)
    fp32_modules = frozenset({f"embedding_model.layers.{layer}.mlp"})
    model = graph.trace(config, precision=Precision.FP16, dialect=Dialect.FUSED, fold=True, fp32_modules=fp32_modules)
    before = describe(model)
    # The first layer is not copied, and may differ.
    assert repeat_layers(model, LAYERS) is (layer == 0)
    assert (describe(model) == before) is (layer > 0)


def test_an_fp32_module_in_one_layer_has_all_layers_traced(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    monkeypatch.setattr(graph, "_trace", lambda config, **_: traced.append(config.layers))
    monkeypatch.setattr(graph, "_copy", lambda _: None)
    monkeypatch.setattr(graph, "repeat_layers", lambda *_: True)
    config = replace(read_checkpoint_architecture(checkpoint), layers=LAYERS)
    for module in (f"embedding_model.layers.{LAYERS - 1}.mlp", "embedding_model.norm"):
        fp32_modules = frozenset({module})
        graph.trace(config, precision=Precision.FP16, dialect=Dialect.FUSED, fold=True, fp32_modules=fp32_modules)
    assert traced == [LAYERS, TRACED_LAYERS]
