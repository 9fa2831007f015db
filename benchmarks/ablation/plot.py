"""The picture of the ablation's table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot


def plot_ablation(record: dict[str, Any], path: Path) -> None:
    """Draws each variant's mean as a bar, each seed as a dot, and the paper's figure beside it.

    Args:
        record: The record that `runs.run` returns.
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
