"""Pictures of a run's history and of an ablation's table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def plot_ablation(record: dict[str, Any], path: Path) -> None:
    """Draws each variant's mean as a bar, each seed as a dot, and the paper's figure beside it.

    Args:
        record: The record that `ablation_run.run` returns.
        path: Path of the PNG file.
    """
    rows = record["variants"][::-1]
    figure, (measured, paper) = pyplot.subplots(
        1, 2, figsize=(10, 0.45 * len(rows) + 1.2), layout="constrained", sharey=True
    )
    positions = range(len(rows))
    measured.barh(positions, [row["mean"] for row in rows], color="tab:blue", alpha=0.6)
    for position, row in zip(positions, rows, strict=True):
        measured.plot(row["means"], [position] * len(row["means"]), "k.", markersize=6)
        if row["paper"] is not None:
            paper.plot(row["paper"], position, "o", color="tab:orange")
    means = [mean for row in rows for mean in row["means"]]
    margin = max(0.01, (max(means) - min(means)) * 0.3)
    measured.set_xlim(min(0, *means), max(means) + margin)
    measured.set_yticks(list(positions), [row["name"] for row in rows])
    measured.set_xlabel("this run: mean over the data sets (dots: seeds)")
    paper.set_xlabel("paper: mean over MTEB's 56 tasks")
    for axis in (measured, paper):
        axis.grid(alpha=0.3, axis="x")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
