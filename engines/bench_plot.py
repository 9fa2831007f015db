"""The picture of a benchmark: throughput, and how long one query takes, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw_bench(result: dict[str, Any], path: Path) -> None:
    """Draws `engines.bench`'s result.

    Args:
        result: What `bench` gave.
        path: A PNG or SVG file.
    """
    from matplotlib.figure import Figure  # matplotlib takes a second to load

    sides = result["sides"][::-1]
    names = [f"{Path(side['name']).name}\n{side['backend'].split(' (')[0]}" for side in sides]
    figure = Figure(figsize=(11, 1.6 + 0.6 * len(sides)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    speeds = [side["texts_per_second"] for side in sides]
    left.bar_label(left.barh(names, speeds, color="#76b900"), fmt="%.0f", padding=3)
    left.set(xlabel="texts a second, in bulk", xlim=(0, max(speeds) * 1.15))
    p50, p99 = ([side["query_ms"][which] for side in sides] for which in ("p50", "p99"))
    right.barh(names, p99, color="#cfe3a0", label="p99")
    right.bar_label(right.barh(names, p50, color="#4a7300", label="p50"), fmt="%.1f", padding=3)
    right.set(xlabel="milliseconds of one query")
    right.legend()
    figure.suptitle(f"{result['machine']}, {result['date']}: {result['passages']} passages, {result['tokens']} tokens")
    figure.savefig(path, dpi=120)
