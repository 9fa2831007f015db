"""What training minimises. All inputs are unit rows; all arithmetic is FP32 whatever autocast does around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.05
NEGATIVE_MARGIN = 0.95
"""A candidate is a negative only below this share of the positive's score by the teacher.

Source: NV-Embed's positive-aware mining of hard negatives (TopKPercPos, 95 %), arXiv 2407.15831."""


def distillation(vectors: Tensor, targets: Tensor) -> Tensor:
    """1 - cosine to the teacher, averaged over rows.

    Args:
        vectors: [R, D], the student's.
        targets: [R, D], the teacher's.
    """
    return 1 - (vectors.float() * targets.float()).sum(dim=-1).mean()


def match_targets(vectors: Tensor, targets: Tensor, numbers: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
    """Cross-entropy of finding one's own target among those of the batch.

    Args:
        vectors: [R, D], the student's.
        targets: [R, D], the teacher's.
        numbers: int64 [R], the texts' numbers: other rows of the same text are no wrong answers.
        temperature: Divides the cosines.
    """
    scores = vectors.float() @ targets.float().T / temperature
    same = numbers[:, None] == numbers[None, :]
    same.fill_diagonal_(False)
    return F.cross_entropy(scores.masked_fill(same, float("-inf")), torch.arange(len(scores), device=scores.device))


def find_positives(
    vectors: Tensor,
    *,
    queries: Tensor,
    positives: Tensor,
    blocked: Tensor,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """InfoNCE: cross-entropy of finding each query's positive among all rows of the batch that are not blocked.

    Args:
        vectors: [R, D]; queries, positives, hard negatives and unrelated texts alike.
        queries: int64 [P], rows of the queries.
        positives: int64 [P], rows of their positives.
        blocked: bool [P, R], candidates that are no negatives; see `false_negatives`.
        temperature: Divides the cosines.

    Returns:
        A scalar, 0 without any pair.
    """
    if not len(queries):
        return vectors.sum() * 0.0
    rows = vectors.float()
    scores = rows[queries] @ rows.T / temperature
    return F.cross_entropy(scores.masked_fill(blocked, float("-inf")), positives)


def false_negatives(
    targets: Tensor, *, queries: Tensor, positives: Tensor, hard: Tensor, margin: float = NEGATIVE_MARGIN
) -> Tensor:
    """Which rows may not count as negatives: the query itself, and what the teacher scores close to the positive.

    Args:
        targets: [R, D], the teacher's vectors.
        queries: int64 [P], rows of the queries.
        positives: int64 [P], rows of their positives.
        hard: int64 [P], row of each query's labelled negative, -1 without one: labelled ones always count.
        margin: Share of the positive's score from which a candidate is left out.

    Returns:
        bool [P, R], True where a row is left out; never at the positive.
    """
    wide = targets.float()
    scores = wide[queries] @ wide.T
    places = torch.arange(len(queries), device=targets.device)
    limit = (scores[places, positives] * margin)[:, None]
    blocked = scores > limit
    labelled = hard >= 0
    blocked[places[labelled], hard[labelled]] = False
    blocked[places, queries] = True
    blocked[places, positives] = False
    return blocked
