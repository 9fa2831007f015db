"""The picture of a run's history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot


def plot_history(history: Sequence[dict[str, float]], path: Path) -> None:
    """Draws loss, held-out loss and accuracy, and learning rate over the steps.

    Args:
        history: The log that `loop.train` returns; if it is empty, nothing is drawn.
        path: Path of the PNG file.
    """
    if not history:
        return
    figure, (loss_axis, accuracy_axis) = pyplot.subplots(2, 1, figsize=(8, 6), layout="constrained", sharex=True)
    for axis, series in (
        (loss_axis, (("loss", "loss"), ("eval_loss", "held-out loss"))),
        (accuracy_axis, (("eval_accuracy", "held-out accuracy"),)),
    ):
        for name, label in series:
            points = [(row["step"], row[name]) for row in history if name in row]
            if points:
                axis.plot(
                    *zip(*points, strict=True), linewidth=1.2, marker="o" if "eval" in name else None, label=label
                )
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(loc="best")
    rate_axis = accuracy_axis.twinx()
    points = [(row["step"], row["learning_rate"]) for row in history if "learning_rate" in row]
    if points:
        rate_axis.plot(*zip(*points, strict=True), color="tab:gray", alpha=0.6, linewidth=1)
    rate_axis.set_ylabel("learning rate (gray)")
    loss_axis.set_ylabel("loss")
    accuracy_axis.set_ylabel("positive ranked first")
    accuracy_axis.set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
