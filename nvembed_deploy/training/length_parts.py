"""Cuts a batch into parts of like length, in few shapes.

Padding a whole batch to its longest row wastes most of the work where queries stand beside passages. And a new shape
costs a CPU's matrix library half a second of preparation, so widths and row counts come in steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PART_ROWS = 16
PART_SPREAD = 1.6
"""Rows are computed together that differ in length by no more than this; a part has at least `PART_ROWS` rows."""
WIDTH_STEP = 16
ROW_STEP = 8


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows that are computed together."""

    rows: list[int]
    width: int
    """Tokens of the longest row, rounded up."""

    def take(self, batch: Tensor) -> Tensor:
        """The part's rows of a batch [R, T], its last row repeated up to a round number of rows: [P, width].

        Columns beyond the batch's own are 0: no real tokens.
        """
        filled = self.rows + self.rows[-1:] * (-len(self.rows) % ROW_STEP)
        taken = batch[torch.tensor(filled, device=batch.device), : self.width]
        return F.pad(taken, (0, self.width - taken.shape[1]))


def length_parts(lengths: Sequence[int]) -> list[Part]:
    """Puts rows of like length together.

    Args:
        lengths: Tokens of each row.

    Returns:
        Parts that hold every row once.
    """
    found: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if not found or (len(found[-1]) >= PART_ROWS and lengths[row] > lengths[found[-1][0]] * PART_SPREAD):
            found.append([])
        found[-1].append(row)
    return [Part(rows=rows, width=-(-max(lengths[row] for row in rows) // WIDTH_STEP) * WIDTH_STEP) for rows in found]
