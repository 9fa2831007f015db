"""Scores of the embedded model's bundles beside PyTorch's, on six kinds of tasks."""

from pathlib import Path

import pytest

pytest.importorskip("mteb", reason="mteb is not installed: pip install nvembed-deploy[evaluation]")
pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[export]")

from benchmarks.precisions import remembering
from nvembed_deploy import Encoder
from nvembed_deploy.evaluation.built_in import built_in_tasks
from nvembed_deploy.evaluation.compare import compare, scores
from nvembed_deploy.export.to_onnx import main as export
from tests.conftest import needs_rtx
from tests.readme import ROOT

MINI = ROOT / "models" / "nv-embed-mini"
pytestmark = [pytest.mark.slow, needs_rtx]


@pytest.fixture(scope="module")
def mini_bundles(readme_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns a bundle in FP32, and those that the README's commands make."""
    fp32 = tmp_path_factory.mktemp("mini") / "fp32"
    assert export(["--model", str(MINI), "--precision", "fp32", "--out", str(fp32)]) == 0
    made = readme_folder / "bundles"
    return {"fp32": fp32, "fp16": made / "nv-embed-mini-fp16", "int8": made / "int8"}


@pytest.fixture(scope="module")
def pytorch(mini_bundles: dict[str, Path]) -> tuple[Encoder, dict[str, float]]:
    """The reference and its scores on the built-in tasks."""
    reference = Encoder.from_checkpoint(MINI, like=Encoder(mini_bundles["fp32"], backend="onnxruntime", device="cpu"))
    reference.encode = remembering(reference.encode)
    return reference, scores(reference, [local_task.task for local_task in built_in_tasks()])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_scores_equal_those_of_pytorch(
    precision: str, mini_bundles: dict[str, Path], pytorch: tuple[Encoder, dict[str, float]]
) -> None:
    tasks = built_in_tasks()
    assert {task.task.metadata.type for task in tasks} == {
        "STS", "PairClassification", "Classification", "Clustering", "Reranking", "Retrieval",
    }  # fmt: skip
    encoder = Encoder(mini_bundles[precision], backend="onnxruntime", device="cpu")
    encoder.encode = remembering(encoder.encode)
    reference, expected = pytorch
    comparison = compare(encoder, reference, tasks, reference_scores=expected)
    assert not comparison.failures, [(task.task, task.difference) for task in comparison.failures]
