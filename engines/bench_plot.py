"""The plot of a benchmark: throughput and query latency, side by side."""

from __future__ import annotations

from pathlib import Path

from nvembed_deploy.engines.bench_report import BenchReport


def draw_bench(report: BenchReport, path: Path) -> None:
    """Draws a benchmark report.

    Args:
        report: Report from `bench`.
        path: PNG or SVG file to write.
    """
    from matplotlib.figure import Figure  # matplotlib takes a second to load

    engines = report.sides[::-1]
    names = [f"{Path(engine.name).name}\n{engine.backend.split(' (')[0]}" for engine in engines]
    figure = Figure(figsize=(11, 1.6 + 0.6 * len(engines)), layout="constrained")
    speed_axes, latency_axes = figure.subplots(1, 2, sharey=True)
    speeds = [engine.texts_per_second for engine in engines]
    speed_axes.bar_label(speed_axes.barh(names, speeds, color="#76b900"), fmt="%.0f", padding=3)
    speed_axes.set(xlabel="texts per second, in bulk", xlim=(0, max(speeds) * 1.15))
    p50 = [engine.query_ms.p50 for engine in engines]
    p99 = [engine.query_ms.p99 for engine in engines]
    latency_axes.barh(names, p99, color="#cfe3a0", label="p99")
    latency_axes.bar_label(latency_axes.barh(names, p50, color="#4a7300", label="p50"), fmt="%.1f", padding=3)
    latency_axes.set(xlabel="milliseconds per query")
    latency_axes.legend()
    figure.suptitle(f"{report.machine}, {report.date}: {report.passages} passages, {report.tokens} tokens")
    figure.savefig(path, dpi=120)
