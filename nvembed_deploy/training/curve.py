"""The loss curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot


def plot_loss(history: Sequence[dict[str, float]], path: Path) -> None:
    """Draws loss and learning rate over the steps.

    Args:
        history: As from `loop.train`; nothing is drawn of an empty one.
        path: Of the PNG.
    """
    if not history:
        return
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    steps = [entry["step"] for entry in history]
    axis.plot(steps, [entry["loss"] for entry in history], linewidth=1.2, color="tab:blue", label="loss")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3)
    rate = axis.twinx()
    rate.plot(steps, [entry.get("learning_rate", 0.0) for entry in history], color="tab:gray", alpha=0.6, linewidth=1)
    rate.set_ylabel("learning rate")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
