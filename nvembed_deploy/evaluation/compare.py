"""Scores a bundle and its reference on the same tasks and reports the differences."""

from __future__ import annotations

import copy
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mteb

from nvembed_deploy.console import step
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.evaluation.model import MtebModel, revision
from nvembed_deploy.evaluation.published import published_scores
from nvembed_deploy.evaluation.tasks import LocalTask
from nvembed_deploy.spec import Precision
from nvembed_deploy.system import installed_versions

TOLERANCES: dict[Precision, float] = {
    # Points of the main score, 0 to 100. In FP32 only documents with equal scores can swap ranks.
    Precision.FP32: 0.01,
    Precision.FP16: 0.1,
    Precision.BF16: 0.2,
    Precision.INT8: 0.5,
    Precision.FP8: 0.5,
    Precision.INT4: 2.0,
    Precision.NVFP4: 2.0,
}
DOWNLOADERS = ("datasets", "huggingface_hub", "httpx", "requests")
"""Packages whose errors mean that data could not be downloaded."""
FULL_SIZE = 500
"""Number of queries or pairs from which the tolerance applies unscaled."""
RECORDED = ("mteb", "torch", "onnxruntime", "numpy", "scikit-learn")


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Scores of one task, in points of its main score."""

    task: str
    kind: str
    """The task's type in mteb."""
    size: int | None
    """Number of queries, pairs or texts; None if mteb does not report it."""
    reference: float
    engine: float
    tolerance: float
    published: float | None = None
    """Score that the model's authors published; see `published.py`."""

    @property
    def difference(self) -> float:
        """Score of the engine minus score of the reference."""
        return self.engine - self.reference

    @property
    def passed(self) -> bool:
        """True if the difference is within the tolerance, apart from float rounding."""
        return abs(self.difference) <= self.tolerance + 1e-9


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Results of all tasks of a bundle."""

    bundle: str
    precision: Precision
    reference: str
    """Backend that ran the reference."""
    engine: str
    """Backend that ran the bundle."""
    revision: str
    results: tuple[TaskResult, ...]
    versions: dict[str, str]

    @property
    def failures(self) -> tuple[TaskResult, ...]:
        """Tasks beyond their tolerance."""
        return tuple(result for result in self.results if not result.passed)


def tolerance_of(precision: Precision, size: int | None) -> float:
    """Returns the points by which a score over `size` queries may differ.

    Below 500 queries, one query counts for more than 0.2 points; the tolerance then grows with the standard error, by
    the square root.
    """
    points = TOLERANCES[precision]
    return points if size is None or size >= FULL_SIZE else points * (FULL_SIZE / size) ** 0.5


def scores(encoder: Encoder, tasks: Sequence[Any]) -> dict[str, float]:
    """Returns the main score of each mteb task, in points. mteb's cache is neither read nor written."""
    model = MtebModel(encoder)
    task_scores: dict[str, float] = {}
    for index, task in enumerate(tasks, 1):
        task_copy = copy.deepcopy(task)  # a task keeps its random state: a second run would draw other samples
        _load(task_copy)
        with step(f"{task.metadata.name} ({index} of {len(tasks)}) on {encoder.backend}"):
            evaluation = mteb.evaluate(model, [task_copy], cache=None, co2_tracker=False, show_progress_bar=False)
        task_scores |= {result.task_name: 100 * float(result.get_score()) for result in evaluation.task_results}
    return task_scores


def _load(task: Any) -> None:
    """Loads a task's data, which mteb downloads unless they are in its cache.

    Raises:
        ConfigError: They cannot be downloaded.
    """
    try:
        if not getattr(task, "data_loaded", False):
            task.load_data()
    except Exception as err:
        if not isinstance(err, OSError) and type(err).__module__.partition(".")[0] not in DOWNLOADERS:
            raise
        cause = str(err).strip().partition("\n")[0]
        raise ConfigError(
            f"the data of {task.metadata.name} cannot be downloaded ({cause}); check the network, or evaluate sets of "
            "your own with --data"
        ) from err


def compare(
    encoder: Encoder,
    reference: Encoder,
    tasks: Sequence[LocalTask],
    *,
    reference_scores: dict[str, float] | None = None,
) -> Comparison:
    """Scores a bundle and the reference on the same tasks.

    Args:
        encoder: Encoder of the bundle.
        reference: Encoder of the checkpoint, from `Encoder.from_checkpoint`.
        tasks: Tasks to run.
        reference_scores: Scores of the reference, if known from another bundle of the same checkpoint.
    """
    mteb_tasks = [local_task.task for local_task in tasks]
    if reference_scores is None:
        reference_scores = scores(reference, mteb_tasks)
    engine_scores = scores(encoder, mteb_tasks)
    published = published_scores(encoder.manifest.source.name)
    precision = encoder.manifest.precision
    return Comparison(
        bundle=encoder.manifest.source.name,
        precision=precision,
        reference=reference.backend,
        engine=encoder.backend,
        revision=revision(encoder),
        results=tuple(
            TaskResult(
                task=local_task.task.metadata.name,
                kind=local_task.task.metadata.type,
                size=local_task.size,
                reference=reference_scores[local_task.task.metadata.name],
                engine=engine_scores[local_task.task.metadata.name],
                tolerance=tolerance_of(precision, local_task.size),
                published=published.get(local_task.task.metadata.name),
            )
            for local_task in tasks
        ),
        versions=installed_versions(RECORDED) | {"python": platform.python_version()},
    )


def as_table(comparison: Comparison) -> str:
    """Formats the results as a Markdown table, with the published scores if there are any."""
    has_published = any(task.published is not None for task in comparison.results)
    lines = [
        "| task | type | size | PyTorch fp32 | engine | difference | tolerance |" + " published |" * has_published,
        "| --- | --- | --- | --- | --- | --- | --- |" + " --- |" * has_published,
    ]
    for task in comparison.results:
        mark = "" if task.passed else " **beyond**"
        lines.append(
            f"| {task.task} | {task.kind} | {task.size or '?'} | {task.reference:.3f} | {task.engine:.3f} | "
            f"{task.difference:+.3f}{mark} | {task.tolerance:.3f} |"
            + ("" if not has_published else " - |" if task.published is None else f" {task.published:.2f} |")
        )
    return "\n".join(lines) + "\n"
