"""Scores of the embedded model's INT8 bundle compared with PyTorch's, on three kinds of tasks.

`python -m benchmarks.precisions` scores every precision on all six kinds; its record is in `benchmarks/results`. The
export's own gate limits FP32 to a difference of 2e-6 in every element.
"""

from pathlib import Path

import pytest

pytest.importorskip("mteb", reason="mteb is not installed: pip install nvembed-deploy[evaluation]")
pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[export]")

from benchmarks.precisions import remembering
from nvembed_deploy import Encoder
from nvembed_deploy.evaluation.built_in import built_in_tasks
from nvembed_deploy.evaluation.compare import compare, scores
from nvembed_deploy.evaluation.tasks import LocalTask
from tests.conftest import needs_rtx
from tests.readme import ROOT

MINI = ROOT / "models" / "nv-embed-mini"
KINDS = ("Retrieval", "STS", "Clustering")
pytestmark = [pytest.mark.slow, needs_rtx]


def tasks() -> list[LocalTask]:
    selected = [task for task in built_in_tasks() if task.task.metadata.type in KINDS]
    assert len(selected) == len(KINDS)
    return selected


@pytest.fixture(scope="module")
def mini_bundles(readme_folder: Path) -> dict[str, Path]:
    """The bundles that the README's commands create."""
    made = readme_folder / "bundles"
    return {"fp16": made / "nv-embed-mini-fp16", "int8": made / "int8"}


@pytest.fixture(scope="module")
def pytorch(mini_bundles: dict[str, Path]) -> tuple[Encoder, dict[str, float]]:
    """The reference and its scores on the built-in tasks."""
    reference = Encoder.from_checkpoint(MINI, like=Encoder(mini_bundles["fp16"], backend="onnxruntime", device="cpu"))
    reference.encode = remembering(reference.encode)
    return reference, scores(reference, [local_task.task for local_task in tasks()])


def test_int8_scores_equal_those_of_pytorch(
    mini_bundles: dict[str, Path], pytorch: tuple[Encoder, dict[str, float]]
) -> None:
    encoder = Encoder(mini_bundles["int8"], backend="onnxruntime", device="cpu")
    encoder.encode = remembering(encoder.encode)
    reference, expected = pytorch
    comparison = compare(encoder, reference, tasks(), reference_scores=expected)
    assert not comparison.failures, [(task.task, task.difference) for task in comparison.failures]
