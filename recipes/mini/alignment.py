"""Aligns a teacher's tokens with the student's: the two tokenizers split the same text at different characters.

The target of a student's token is the mean of the teacher's tokens that share characters with it, weighted by the
number of shared characters. Control tokens before the text (`<s>` and `[CLS]`) and after it (`</s>` and `[SEP]`)
correspond to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nvembed_deploy.tokenization import TextContract, TokenRow

Span = tuple[int, int]
"""First character of a token, and the character after its last."""

BEFORE: Span = (-2, -1)
"""Span of the control token before a text."""
AFTER: Span = (2**30, 2**30 + 1)
"""Span of the control token after a text."""
PADDING: Span = (-4, -4)
"""Span of a padding token."""


def student_spans(row: TokenRow, contract: TextContract) -> list[Span]:
    """Returns the spans of a row that was tokenized with spans, its control tokens marked."""
    spans = list(row.spans or ())
    prefix_length = len(contract.prefix_ids)
    spans[:prefix_length] = [BEFORE] * min(prefix_length, len(spans))
    if not row.truncated and contract.suffix_ids:
        spans[-len(contract.suffix_ids) :] = [AFTER] * len(contract.suffix_ids)
    return spans


def overlaps(
    spans: Sequence[Sequence[Span]], teacher_spans: Sequence[Sequence[Span]], *, tokens: int, teacher_tokens: int
) -> tuple[Tensor, Tensor]:
    """Returns the weights that combine the teacher's states into a target for each of the student's tokens.

    Args:
        spans: Spans of the student's tokens, R rows.
        teacher_spans: Spans of the teacher's tokens, R rows.
        tokens: T, the student's padded length.
        teacher_tokens: U, the teacher's padded length.

    Returns:
        float32 [R, T, U], rows that sum to 1 or 0; and bool [R, T], True where a token has a target.
    """
    student = _padded(spans, tokens)[:, :, None]
    teacher = _padded(teacher_spans, teacher_tokens)[:, None]
    shared_chars = torch.minimum(student[..., 1], teacher[..., 1]) - torch.maximum(student[..., 0], teacher[..., 0])
    weights = shared_chars.clamp_min(0).float()
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.clamp_min(1.0), total[..., 0] > 0


def _padded(rows: Sequence[Sequence[Span]], length: int) -> Tensor:
    return torch.tensor([[*row, *[PADDING] * (length - len(row))] for row in rows], dtype=torch.int64)
