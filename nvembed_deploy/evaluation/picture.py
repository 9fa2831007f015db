"""Picture of the differences of an evaluation."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from nvembed_deploy.evaluation.compare import Comparison


def draw_differences(comparison: Comparison, path: Path) -> None:
    """Draws each task's difference as a bar over its tolerance, a gray band.

    Args:
        comparison: The results.
        path: Path of the PNG file.
    """
    results = comparison.results[::-1]
    figure, axis = pyplot.subplots(figsize=(8, 0.32 * len(results) + 1.4), layout="constrained")
    for position, task in enumerate(results):
        axis.barh(position, 2 * task.tolerance, left=-task.tolerance, color="0.9", height=0.8)
        axis.barh(position, task.difference, color="tab:blue" if task.passed else "tab:red", height=0.5)
    axis.set_yticks(range(len(results)), [f"{task.task} ({task.kind})" for task in results], fontsize=8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("points against PyTorch fp32 (gray: tolerance)")
    axis.set_title(f"{comparison.bundle}, {comparison.precision.value}: {comparison.engine}", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
