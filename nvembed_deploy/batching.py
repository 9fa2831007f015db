"""Which texts run together: ordered by length, cut by a budget of padded tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


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
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) == max_rows or (len(batch) + 1) * width > max_tokens):
            yield batch
            batch = []
        if not batch:
            width = lengths[index]
        batch.append(index)
    if batch:
        yield batch
