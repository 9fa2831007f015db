"""The ranking of a quantization as a picture: what each group of layers costs, and which were kept."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from nvembed_deploy.export.quantization.record import QuantizationRecord

SHORT = (
    ("embedding_model.layers.", "layer "),
    ("latent_attention_model.", "pooler "),
    (".self_attn", ""),
    (".mlp", ""),
)
MOST = 60
"""Groups that are drawn: the costliest."""


def draw_ranking(record: QuantizationRecord, path: Path) -> None:
    """Draws the groups by cost, the costliest on top.

    Args:
        record: What was found.
        path: Of the PNG.
    """
    groups = sorted(record.groups, key=lambda item: item.cost)[-MOST:]
    figure, axis = pyplot.subplots(figsize=(8, 0.22 * len(groups) + 1.4), layout="constrained")
    for place, item in enumerate(groups):
        axis.barh(place, max(item.cost, 1e-8), color="tab:orange" if item.kept else "tab:blue")
    axis.set_yticks(range(len(groups)), [_short(item.name) for item in groups], fontsize=8)
    axis.set_xscale("log")
    axis.set_xlabel("1 - mean cosine when this group alone is quantized")
    kept = sum(item.kept for item in record.groups)
    axis.set_title(
        f"{record.precision.value}: {len(record.groups) - kept} groups quantized, {kept} kept (orange); "
        f"{record.texts} texts, {record.tokens} tokens",
        fontsize=10,
    )
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _short(name: str) -> str:
    for long, short in SHORT:
        name = name.replace(long, short)
    return name
