"""The same tasks on both sides, and how far apart the scores are."""

from __future__ import annotations

import copy
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mteb

from nvembed_deploy.console import say
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.evaluation.model import MtebModel, revision
from nvembed_deploy.evaluation.published import published_scores
from nvembed_deploy.evaluation.tasks import LocalTask
from nvembed_deploy.spec import Precision
from nvembed_deploy.system import installed_versions

TOLERANCES: dict[Precision, float] = {
    # Points of the main score, 0 to 100. FP32 moves a rank only between two documents that score the same.
    Precision.FP32: 0.01,
    Precision.FP16: 0.1,
    Precision.BF16: 0.2,
    Precision.INT8: 0.5,
    Precision.FP8: 0.5,
    Precision.INT4: 2.0,
}
FULL_SIZE = 500
"""Queries or pairs from which on the tolerance holds as it is."""
RECORDED = ("mteb", "torch", "onnxruntime", "numpy", "scikit-learn")


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task, in points of its main score."""

    task: str
    kind: str
    """mteb's type."""
    size: int | None
    """Queries, pairs or texts; None where mteb does not say."""
    reference: float
    engine: float
    tolerance: float
    published: float | None = None
    """What the model's makers published; see `published.py`."""

    @property
    def difference(self) -> float:
        """Engine less reference."""
        return self.engine - self.reference

    @property
    def passed(self) -> bool:
        """True within the tolerance; rounding of the score's own float apart."""
        return abs(self.difference) <= self.tolerance + 1e-9


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All tasks of a bundle."""

    bundle: str
    precision: Precision
    reference: str
    """What ran the reference."""
    engine: str
    """What ran the bundle."""
    revision: str
    results: tuple[TaskResult, ...]
    versions: dict[str, str]

    @property
    def failures(self) -> tuple[TaskResult, ...]:
        """Tasks beyond their tolerance."""
        return tuple(result for result in self.results if not result.passed)


def tolerance_of(precision: Precision, size: int | None) -> float:
    """Points that a score over `size` queries may differ.

    Below 500 queries one of them counts for more than 0.2 points, and the tolerance grows with the standard error: by
    the square root.
    """
    points = TOLERANCES[precision]
    return points if size is None or size >= FULL_SIZE else points * (FULL_SIZE / size) ** 0.5


def scores(encoder: Encoder, tasks: Sequence[Any]) -> dict[str, float]:
    """Main score of each mteb task, in points. Nothing is read from mteb's cache, and nothing written to it."""
    fresh = copy.deepcopy(list(tasks))  # a task keeps its random state: the second run would draw other samples
    found = mteb.evaluate(MtebModel(encoder), fresh, cache=None, co2_tracker=False, show_progress_bar=False)
    return {result.task_name: 100 * float(result.get_score()) for result in found.task_results}


def compare(
    encoder: Encoder, reference: Encoder, tasks: Sequence[LocalTask], *, wanted: dict[str, float] | None = None
) -> Comparison:
    """Scores a bundle and the reference on the same tasks.

    Args:
        encoder: The bundle's.
        reference: `Encoder`.
        tasks: What to run.
        wanted: The reference's scores, where they are known from another bundle of the same checkpoint.
    """
    own = [item.task for item in tasks]
    if wanted is None:
        say(f"  {len(own)} tasks on {reference.backend} ...")
        wanted = scores(reference, own)
    say(f"  {len(own)} tasks on {encoder.backend} ...")
    found = scores(encoder, own)
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
                task=item.task.metadata.name,
                kind=item.task.metadata.type,
                size=item.size,
                reference=wanted[item.task.metadata.name],
                engine=found[item.task.metadata.name],
                tolerance=tolerance_of(precision, item.size),
                published=published.get(item.task.metadata.name),
            )
            for item in tasks
        ),
        versions=installed_versions(RECORDED) | {"python": platform.python_version()},
    )


def as_table(comparison: Comparison) -> str:
    """The results as Markdown; with the makers' own scores where there are some."""
    known = any(item.published is not None for item in comparison.results)
    lines = [
        "| task | type | size | PyTorch fp32 | engine | difference | tolerance |" + " published |" * known,
        "| --- | --- | --- | --- | --- | --- | --- |" + " --- |" * known,
    ]
    for item in comparison.results:
        mark = "" if item.passed else " **beyond**"
        lines.append(
            f"| {item.task} | {item.kind} | {item.size or '?'} | {item.reference:.3f} | {item.engine:.3f} | "
            f"{item.difference:+.3f}{mark} | {item.tolerance:.3f} |"
            + ("" if not known else " - |" if item.published is None else f" {item.published:.2f} |")
        )
    return "\n".join(lines) + "\n"
