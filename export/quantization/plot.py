"""Draws the sensitivity of each group of layers to quantization, and which groups were excluded."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from nvembed_deploy.export.quantization.record import QuantizationRecord

ABBREVIATIONS = (
    ("embedding_model.layers.", "layer "),
    ("latent_attention_model.", "pooler "),
    (".self_attn", ""),
    (".mlp", ""),
)
MAX_GROUPS = 60
"""Number of groups that are drawn: the most sensitive ones."""


def draw_ranking(record: QuantizationRecord, path: Path) -> None:
    """Draws the groups by sensitivity, the most sensitive one on top.

    Args:
        record: The quantization record.
        path: The PNG file to write.
    """
    groups = sorted(record.groups, key=lambda group: group.sensitivity)[-MAX_GROUPS:]
    figure, axis = pyplot.subplots(figsize=(8, 0.22 * len(groups) + 1.4), layout="constrained")
    for position, group in enumerate(groups):
        axis.barh(position, max(group.sensitivity, 1e-8), color="tab:orange" if group.excluded else "tab:blue")
    axis.set_yticks(range(len(groups)), [_abbreviated(group.name) for group in groups], fontsize=8)
    axis.set_xscale("log")
    axis.set_xlabel("1 - mean cosine when only this group is quantized")
    excluded = sum(group.excluded for group in record.groups)
    axis.set_title(
        f"{record.precision.value}: {len(record.groups) - excluded} groups quantized, {excluded} excluded (orange); "
        f"{record.texts} texts, {record.tokens} tokens",
        fontsize=10,
    )
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _abbreviated(name: str) -> str:
    for full, abbreviation in ABBREVIATIONS:
        name = name.replace(full, abbreviation)
    return name
