"""The structure of a graph is checked at FP32's bounds, whatever precision is exported."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from nvembed_deploy.backends.pytorch import PyTorchBackend
from nvembed_deploy.errors import ParityError
from nvembed_deploy.export import structure, to_onnx
from nvembed_deploy.export.graph.trace import trace
from nvembed_deploy.export.structure import require_structure, structure_config, structure_reference, use_fp32
from nvembed_deploy.model.config import Mask, ModelConfig
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.model.text_contract import text_contract
from nvembed_deploy.model.weights import StoredWeights
from nvembed_deploy.spec import Dialect, Precision, Shape
from nvembed_deploy.tokenization import TextEncoder

MAX_SHAPE = Shape(batch=8, tokens=128)
MUTATIONS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "RoPE base x 2": lambda config: replace(config, rope_theta=config.rope_theta * 2),
    "RoPE base + 10 %": lambda config: replace(config, rope_theta=config.rope_theta * 1.1),
    "RoPE base + 1 %": lambda config: replace(config, rope_theta=config.rope_theta * 1.01),
    "epsilon x 10": lambda config: replace(config, rms_norm_eps=config.rms_norm_eps * 10),
    "causal mask": lambda config: replace(config, mask=Mask.CAUSAL),
}


@pytest.fixture(scope="module")
def text(checkpoint: Path) -> TextEncoder:
    contract = text_contract(checkpoint, read_checkpoint_architecture(checkpoint))
    return TextEncoder((checkpoint / "tokenizer.json").read_bytes(), contract)


def check(
    checkpoint: Path,
    text: TextEncoder,
    folder: Path,
    change: Callable[[ModelConfig], ModelConfig],
    *,
    precision: Precision = Precision.FP16,
    dialect: Dialect = Dialect.FUSED,
) -> float:
    """Compares the checkpoint's graph with a reference that has another configuration."""
    config = read_checkpoint_architecture(checkpoint)
    reference = PyTorchBackend(checkpoint, config=change(config))
    weights = StoredWeights(checkpoint, config)
    outputs = structure_reference(reference, reference.model, text, MAX_SHAPE)
    arguments = {"precision": precision, "dialect": dialect, "fold": True, "max_shape": MAX_SHAPE}
    return require_structure(weights, outputs, text, folder / "structure", **arguments).max_difference


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_a_right_graph_passes(
    checkpoint: Path, text: TextEncoder, tmp_path: Path, precision: Precision, dialect: Dialect
) -> None:
    assert check(checkpoint, text, tmp_path, lambda config: config, precision=precision, dialect=dialect) < 5e-6
    assert not list(tmp_path.iterdir())


def test_the_checked_graph_is_that_of_the_export(checkpoint: Path) -> None:
    """In FP32 and but for the casts, which nothing is left of, every node and constant is the traced FP32 graph's."""
    config = read_checkpoint_architecture(checkpoint)
    graph = trace(config, precision=Precision.FP16, dialect=Dialect.FUSED, fold=True)
    assert use_fp32(graph)
    expected = trace(config, precision=Precision.FP32, dialect=Dialect.FUSED, fold=True)
    types = {value.dtype for node in graph.graph for value in (*node.inputs, *node.outputs) if value is not None}
    assert ir.DataType.FLOAT16 not in types
    assert operators(graph) == operators(expected)
    again = trace(config, precision=Precision.FP16, dialect=Dialect.FUSED, fold=True)
    assert ir.DataType.FLOAT16 in {value.dtype for value in again.graph.initializers.values()}, "a copy was changed"


def operators(model: ir.Model) -> list[str]:
    """Returns the operators of a graph but its casts, in order."""
    return [node.op_type for node in model.graph if node.op_type != "Cast"]


def test_a_rounded_constant_has_the_graph_traced_again(checkpoint: Path) -> None:
    """The portable dialect's scale of the scores is a constant in FP16."""
    graph = trace(
        read_checkpoint_architecture(checkpoint), precision=Precision.FP16, dialect=Dialect.PORTABLE, fold=True
    )
    before = [value.dtype for node in graph.graph for value in node.outputs]
    assert not use_fp32(graph)
    assert [value.dtype for node in graph.graph for value in node.outputs] == before


def test_a_large_model_is_checked_with_its_first_layers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(read_checkpoint_architecture(checkpoint), layers=32)
    assert structure_config(config) == config
    monkeypatch.setattr(structure, "MAX_PARAMETERS", 1)
    assert structure_config(config).layers == 4


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_structural_faults_are_caught(checkpoint: Path, text: TextEncoder, tmp_path: Path, mutation: str) -> None:
    """Also those that the bounds of coarse precisions let pass."""
    with pytest.raises(ParityError, match="the traced graph computes something else than the checkpoint, even in FP32"):
        check(checkpoint, text, tmp_path, MUTATIONS[mutation])
    assert not list(tmp_path.iterdir())


def test_an_export_with_a_structural_fault_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """INT8's own bounds let a rotary base pass that is wrong by 10 %."""
    trace = structure.trace
    wrong = MUTATIONS["RoPE base + 10 %"]
    monkeypatch.setattr(structure, "trace", lambda config, **options: trace(wrong(config), **options))
    out = tmp_path / "bundle"
    flags = ["--model", str(checkpoint), "--precision", "int8", "--max", "8x64", "--out", str(out)]
    assert to_onnx.main(flags) == 1
    assert "the traced graph computes something else than the checkpoint, even in FP32" in capsys.readouterr().err
    assert not out.exists()
