"""HTML of the engine's view: what it is, how far it is from PyTorch, its files, and its prompts."""

from __future__ import annotations

from nvembed_deploy import Encoder
from nvembed_deploy.app.cards import escape, size, table


def engine_view(encoder: Encoder) -> str:
    """Returns the sections of the view."""
    manifest = encoder.manifest
    architecture = manifest.source.architecture
    facts = [
        ("Model", f"{manifest.source.name}: {architecture.family}, {architecture.layers} layers"),
        ("Runs on", encoder.backend),
        ("Precision", manifest.precision.value),
        ("Vector", f"{manifest.dimension} dimensions, unit length"),
        ("Longest text", f"{encoder.max_length} tokens"),
        ("Built for", manifest.target),
        ("Made", f"{manifest.created} by version {manifest.tool_version}"),
        ("Bundle", manifest.manifest_sha256[:16]),
    ]
    parity = [
        (
            report.candidate,
            report.precision,
            f"{report.min_cosine:.6f}",
            f"{report.mean_cosine:.6f}",
            "" if report.overlap is None else f"{report.overlap:.1%}",
            str(report.texts),
        )
        for report in manifest.parity
    ]
    files = [(name, size(entry.bytes)) for name, entry in manifest.files.items()]
    prompts = [(name, prompt or "(none)") for name, prompt in encoder.prompts.items()]
    return "".join(
        (
            "<dl class='facts'>",
            *(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts),
            "</dl>",
            "<h3>Parity with PyTorch</h3>",
            table(("Runtime", "Precision", "Lowest cosine", "Mean cosine", "Top-10 overlap", "Texts"), parity)
            if parity
            else "<p>Not checked.</p>",
            "<h3>Files</h3>",
            table(("File", "Size"), files),
            "<h3>Prompts</h3>",
            table(("Kind", "Text before the input"), prompts) if prompts else "<p>None.</p>",
        )
    )
