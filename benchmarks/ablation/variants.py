"""The variants of the recipe that an ablation compares, the paper's figures for them, and the table of results.

Imports no torch: the documentation's table is made from a committed record.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import product
from typing import Any

from nvembed_deploy.model.config import Pooling


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One variant of the recipe, a row of the table."""

    name: str
    pooling: Pooling = Pooling.LATENT
    causal: bool = False
    stages: tuple[str, ...] = ("first", "second")
    """Names of the stages whose examples are trained on, in order; `both` is one stage over all examples."""
    in_batch: tuple[bool, ...] = (True, False)
    mined: bool = True
    paper: float | None = None
    """Mean over MTEB's 56 tasks. Source: NV-Embed, arXiv 2405.17428v3, tables 2 (v2 data) and 4."""


_PAPER_SHAPES = {
    ("last", False): 71.63,
    ("last", True): 70.85,
    ("mean", False): 71.71,
    ("mean", True): 71.38,
    ("latent", False): 72.31,
    ("latent", True): 71.61,
}
VARIANTS = (
    *(
        Variant(
            name=f"{pooling.value}, {'causal' if causal else 'bidirectional'}",
            pooling=pooling,
            causal=causal,
            paper=_PAPER_SHAPES[pooling.value, causal],
        )
        for pooling, causal in product(Pooling, (False, True))
    ),
    Variant(name="one stage, in-batch on", stages=("both",), in_batch=(True,), paper=70.83),
    Variant(name="one stage, in-batch off", stages=("both",), in_batch=(False,), paper=71.94),
    Variant(name="no mined negatives", mined=False),
)
"""The first six are two stages with mined negatives; `latent, bidirectional` is the full recipe."""


def as_table(record: dict[str, Any]) -> str:
    """Formats the record of an ablation as a Markdown table."""
    set_names = list(next(iter(record["variants"][0]["seeds"].values())))
    lines = [
        f"| variant | {' | '.join(set_names)} | mean (each seed) | paper, MTEB 56 |",
        "| --- |" + " --- |" * (len(set_names) + 2),
    ]
    for row in record["variants"]:
        set_means = [statistics.fmean(scores[name] for scores in row["seeds"].values()) for name in set_names]
        seed_means = ", ".join(f"{mean:.4f}" for mean in row["means"])
        paper = "-" if row["paper"] is None else f"{row['paper']:.2f}"
        cells = [*(f"{score:.4f}" for score in set_means), f"**{row['mean']:.4f}** ({seed_means})", paper]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
