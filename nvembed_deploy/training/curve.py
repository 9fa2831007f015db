"""A run's history, and an ablation's table, as pictures."""

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
        history: As from `loop.train`; nothing is drawn of an empty one.
        path: Of the PNG.
    """
    if not history:
        return
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), layout="constrained", sharex=True)
    for axis, series in (
        (above, (("loss", "loss"), ("eval_loss", "held-out loss"))),
        (below, (("eval_accuracy", "held-out accuracy"),)),
    ):
        for name, label in series:
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                axis.plot(
                    *zip(*points, strict=True), linewidth=1.2, marker="o" if "eval" in name else None, label=label
                )
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(loc="best")
    rate = below.twinx()
    points = [(entry["step"], entry["learning_rate"]) for entry in history if "learning_rate" in entry]
    if points:
        rate.plot(*zip(*points, strict=True), color="tab:gray", alpha=0.6, linewidth=1)
    rate.set_ylabel("learning rate (gray)")
    above.set_ylabel("loss")
    below.set_ylabel("positive ranked first")
    below.set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_ablation(result: dict[str, Any], path: Path) -> None:
    """Draws each variant's mean as a bar, each seed as a dot, and the paper's figure beside it.

    Args:
        result: As from `ablation.run`.
        path: Of the PNG.
    """
    rows = result["variants"][::-1]
    figure, (own, paper) = pyplot.subplots(
        1, 2, figsize=(10, 0.45 * len(rows) + 1.2), layout="constrained", sharey=True
    )
    places = range(len(rows))
    own.barh(places, [row["mean"] for row in rows], color="tab:blue", alpha=0.6)
    for place, row in zip(places, rows, strict=True):
        own.plot(row["means"], [place] * len(row["means"]), "k.", markersize=6)
        if row["paper"] is not None:
            paper.plot(row["paper"], place, "o", color="tab:orange")
    every = [mean for row in rows for mean in row["means"]]
    margin = max(0.01, (max(every) - min(every)) * 0.3)
    own.set_xlim(min(0, *every), max(every) + margin)
    own.set_yticks(list(places), [row["name"] for row in rows])
    own.set_xlabel("here: mean over the sets (dots: seeds)")
    paper.set_xlabel("paper: mean over MTEB's 56 tasks")
    for axis in (own, paper):
        axis.grid(alpha=0.3, axis="x")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
