"""Splits a batch into buckets of similar length, in few distinct shapes.

Padding a whole batch to its longest row wastes most of the work when short queries and long passages share a batch. A
new shape costs a CPU's matrix library half a second of preparation, so lengths and row counts are rounded up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_BUCKET_ROWS = 16
MAX_LENGTH_RATIO = 1.6
"""Longest over shortest row of a bucket; a bucket grows beyond it until it has `MIN_BUCKET_ROWS` rows."""
LENGTH_STEP = 16
ROW_STEP = 8


@dataclass(frozen=True, kw_only=True)
class LengthBucket:
    """Rows of similar length that are computed together."""

    rows: list[int]
    length: int
    """Tokens of the longest row, rounded up to a multiple of `LENGTH_STEP`."""

    def take(self, batch: Tensor) -> Tensor:
        """Returns the bucket's rows of a batch [R, T], the last one repeated up to a round number of rows: [P, length].

        Columns beyond the batch's own are 0, which the masks mark as no real tokens.
        """
        row_indices = self.rows + self.rows[-1:] * (-len(self.rows) % ROW_STEP)
        bucket_rows = batch[torch.tensor(row_indices, device=batch.device), : self.length]
        return F.pad(bucket_rows, (0, self.length - bucket_rows.shape[1]))


def length_buckets(lengths: Sequence[int]) -> list[LengthBucket]:
    """Groups rows of similar length.

    Args:
        lengths: Tokens of each row.

    Returns:
        Buckets that together hold every row once.
    """
    buckets: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        is_full = buckets and len(buckets[-1]) >= MIN_BUCKET_ROWS
        if not buckets or (is_full and lengths[row] > lengths[buckets[-1][0]] * MAX_LENGTH_RATIO):
            buckets.append([])
        buckets[-1].append(row)
    return [
        LengthBucket(rows=rows, length=-(-max(lengths[row] for row in rows) // LENGTH_STEP) * LENGTH_STEP)
        for rows in buckets
    ]
