"""Lays a teacher's tokens over the student's: two tokenizers cut the same text at different characters.

A student's token gets the mean of the teacher's tokens that share characters with it, each by the number of characters
shared. What stands in front of the text and behind it (`<s>` and `[CLS]`, `</s>` and `[SEP]`) belongs together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nvembed_deploy.tokenization import TextContract, TokenRow

Span = tuple[int, int]
"""First character of a token and the one behind its last."""

BEFORE: Span = (-2, -1)
"""Stands for the control token in front of a text."""
AFTER: Span = (2**30, 2**30 + 1)
"""Stands for the control token behind a text."""
NOWHERE: Span = (-4, -4)
"""Padding."""


def student_spans(row: TokenRow, contract: TextContract) -> list[Span]:
    """Spans of a row that was tokenized with them, its control tokens marked."""
    spans = list(row.spans or ())
    front = len(contract.prefix_ids)
    spans[:front] = [BEFORE] * min(front, len(spans))
    if not row.truncated and contract.suffix_ids:
        spans[-len(contract.suffix_ids) :] = [AFTER] * len(contract.suffix_ids)
    return spans


def overlaps(
    spans: Sequence[Sequence[Span]], teacher_spans: Sequence[Sequence[Span]], *, tokens: int, teacher_tokens: int
) -> tuple[Tensor, Tensor]:
    """Weights that make a target for each of the student's tokens out of the teacher's states.

    Args:
        spans: Of the student's tokens, R rows.
        teacher_spans: Of the teacher's tokens, R rows.
        tokens: T, the student's padded width.
        teacher_tokens: U, the teacher's padded width.

    Returns:
        float32 [R, T, U], rows that sum to 1 or to 0; and bool [R, T], True where there is a target.
    """
    own, other = _padded(spans, tokens)[:, :, None], _padded(teacher_spans, teacher_tokens)[:, None]
    shared = torch.minimum(own[..., 1], other[..., 1]) - torch.maximum(own[..., 0], other[..., 0])
    weights = shared.clamp_min(0).float()
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.clamp_min(1.0), total[..., 0] > 0


def _padded(rows: Sequence[Sequence[Span]], width: int) -> Tensor:
    return torch.tensor([[*row, *[NOWHERE] * (width - len(row))] for row in rows], dtype=torch.int64)
