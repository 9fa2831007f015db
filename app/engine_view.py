"""HTML of the engine's view: the way from the checkpoint to vectors, its distance from PyTorch, sizes and prompts."""

from __future__ import annotations

import math

from nvembed_deploy import Encoder
from nvembed_deploy.app.cards import escape, plural, size, table

DECADES = 8
"""Powers of ten on the axis of the distances: from 1 down to 1e-8, below which float32 cosines say nothing."""
LARGE_FILE = 0.005
"""Files below this share of the bundle are one row."""


def engine_view(encoder: Encoder) -> str:
    """Returns the sections of the view."""
    manifest = encoder.manifest
    architecture = manifest.source.architecture
    total = sum(entry.bytes for entry in manifest.files.values())
    stages = (
        (manifest.source.name, f"{architecture.family}, {plural(architecture.layers, 'layer')}"),
        (manifest.precision.value, f"bundle for {manifest.target}, {size(total)}"),
        (encoder.backend.split(" (")[0], encoder.backend.partition(" (")[2].rstrip(")") or "runs the bundle"),
        (f"{manifest.dimension} numbers", f"unit length, from up to {encoder.max_length:,} tokens"),
    )
    return "".join(
        (
            "<ol class='stages'>",
            *(f"<li><b>{escape(name)}</b><span>{escape(text)}</span></li>" for name, text in stages),
            "</ol>",
            "<h3>Distance from PyTorch</h3>",
            _parity(encoder),
            f"<h3>Size: {size(total)}</h3>",
            _sizes({name: entry.bytes for name, entry in manifest.files.items()}),
            "<h3>What the model reads</h3>",
            _prompts(encoder),
            f"<p class='hint'>Made {escape(manifest.created)} by version {escape(manifest.tool_version)}; bundle "
            f"{escape(manifest.manifest_sha256[:16])}.</p>",
        )
    )


def _parity(encoder: Encoder) -> str:
    """Returns a picture of the distances on a logarithmic axis, and their table."""
    reports = encoder.manifest.parity
    if not reports:
        return "<p>Not compared with PyTorch.</p>"
    rows = []
    for report in reports:
        bound, worst, mean = (
            _position(cosine) for cosine in (report.tolerance.min_cosine, report.min_cosine, report.mean_cosine)
        )
        label = (
            f"{report.candidate}: cosine {report.mean_cosine:.6f} on average, {report.min_cosine:.6f} at the lowest, "
            f"where {report.tolerance.min_cosine:g} is required"
        )
        rows.append(
            f'<div class="parity"><span dir="auto">{escape(report.candidate)}</span>'
            f'<div class="axis" role="img" aria-label="{escape(label)}">'
            f'<i class="allowed" style="width:{bound:.1%}"></i><i class="range" style="left:{min(mean, worst):.1%};'
            f'width:{abs(worst - mean):.1%}"></i><i class="mean" style="left:{mean:.1%}"></i>'
            f'<i class="worst" style="left:{worst:.1%}"></i></div></div>'
        )
    ticks = "".join(f"<span>1e-{DECADES - step}</span>" for step in range(0, DECADES, 2)) + "<span>1</span>"
    cells = [
        (
            report.candidate,
            report.precision.value,
            f"{report.min_cosine:.6f}",
            f"{report.mean_cosine:.6f}",
            "" if report.overlap is None else f"{report.overlap:.1%}",
            str(report.texts),
        )
        for report in reports
    ]
    head = ("Runtime", "Precision", "Lowest cosine", "Mean cosine", "Top-10 overlap", "Texts")
    return (
        f"<div class='parities'>{''.join(rows)}<div class='ticks' aria-hidden='true'>{ticks}</div></div>"
        "<p class='hint'>1 - cosine to PyTorch's vectors, further left is nearer: ● mean, ◆ worst text; shaded: what "
        f"the tolerance of the precision allows.</p>{table(head, cells, label='Distance from PyTorch')}"
    )


def _position(cosine: float) -> float:
    """Returns the place of a cosine on the axis, from 0 at 1e-8 to 1."""
    return 1 - min(DECADES, max(0.0, -math.log10(max(1e-12, 1 - cosine)))) / DECADES


def _sizes(files: dict[str, int]) -> str:
    """Returns a bar for each large file and one for the others."""
    total = max(1, sum(files.values()))
    large = {name: count for name, count in files.items() if count >= LARGE_FILE * total}
    small = {name: count for name, count in files.items() if name not in large}
    rows = sorted(large.items(), key=lambda item: -item[1])
    if small:
        rows.append((plural(len(small), "smaller file"), sum(small.values())))
    bars = "".join(
        f'<li title="{escape(", ".join(small) if name not in large else name)}">'
        f'<i style="width:{count / total:.1%}" aria-hidden="true"></i><span dir="auto">{escape(name)}</span>'
        f"<b>{size(count)}</b></li>"
        for name, count in rows
    )
    return f"<ul class='sizes'>{bars}</ul>"


def _prompts(encoder: Encoder) -> str:
    """Returns the text that the model reads for a query and for a document, with the visitor's part marked."""
    text = encoder.manifest.text
    kinds = {"document": text.default_prompt, **encoder.prompts}
    if text.instruction_template:
        kinds = {"query with an instruction": text.instruction_template, **kinds}
    rows = "".join(
        f'<li><span>{escape(kind)}</span><p dir="auto">{_template(prompt)}<mark>your text</mark></p></li>'
        for kind, prompt in kinds.items()
    )
    return f"<ul class='prompts'>{rows}</ul>"


def _template(prompt: str) -> str:
    """Returns a prompt with its line ends visible and its instruction marked."""
    return escape(prompt).replace("\n", "<i>↵</i> ").replace("{instruction}", "<mark>the instruction</mark>")
