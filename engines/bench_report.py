"""The figures of a benchmark, and their table in Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_TABLE_HEADER = (
    "| engine | texts/s | tokens/s | GFLOP/s | one query p50 / p99 | to first vector | memory | lowest cosine |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Percentiles of the latency of one shape, in milliseconds."""

    texts: int
    tokens: int
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class EngineFigures:
    """The figures of one engine."""

    name: str
    backend: str
    precision: str
    min_cosine: float
    """Minimum cosine of its vectors with those of the first engine, over the corpus."""
    query_ms: Latency
    latency_ms: tuple[Latency, ...]
    texts_per_second: float
    tokens_per_second: float
    gflops: float
    """Speed of the model's matrix products, padding excluded."""
    peak_share: float | None
    """Share of `peak_gflops`; None if the peak of the GPU is unknown."""
    joules_per_text: float | None
    """Energy of a GPU in bulk encoding, read by the vendor's tool; None elsewhere."""
    device_peak_mib: float | None
    """Peak memory of the GPU in bulk encoding, over all programs; None elsewhere."""
    start_seconds: float | None
    """Time from the start of a process to its first vector; None for the reference."""
    start_peak_mib: float | None
    """Peak memory of that process; None for the reference."""


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """The figures of all engines of a run."""

    machine: str
    date: str
    passages: int
    tokens: int
    padding_waste: float
    peak_gflops: float
    peak_source: str
    sides: tuple[EngineFigures, ...]

    def table(self) -> str:
        """Returns the figures as a table in Markdown."""
        lines = list(_TABLE_HEADER)
        for engine in self.sides:
            start = "-" if engine.start_seconds is None else f"{engine.start_seconds:.2f} s"
            memory = "-" if engine.start_peak_mib is None else f"{engine.start_peak_mib:.0f} MiB"
            query = engine.query_ms
            peak_share = "" if engine.peak_share is None else f" ({engine.peak_share:.0%} of {self.peak_source})"
            lines.append(
                f"| {Path(engine.name).name}: {engine.backend}, {engine.precision} | {engine.texts_per_second:.0f} | "
                f"{engine.tokens_per_second:.0f} | {engine.gflops:.0f}{peak_share} | "
                f"{query.p50:.1f} / {query.p99:.1f} ms | {start} | {memory} | {engine.min_cosine:.5f} |"
            )
        return "\n".join(lines) + "\n"
