"""What training minimises. Vectors are unit rows; all arithmetic is FP32 whatever autocast does around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nvembed_deploy.training.options import NEGATIVE_MARGIN


def distillation(vectors: Tensor, targets: Tensor) -> Tensor:
    """1 - cosine to the teacher, averaged over rows.

    Args:
        vectors: [R, D], the student's.
        targets: [R, D], the teacher's.
    """
    return 1 - (vectors.float() * targets.float()).sum(dim=-1).mean()


def token_distillation(states: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """Squared error of the pooler's token outputs, as a share of the teacher's own mean square.

    A text gives one vector but many tokens: the same texts teach several times as much.

    Args:
        states: [R, T, D], the student's token outputs before the mean.
        targets: [R, T, D], the teacher's token states, laid over the student's tokens.
        known: bool [R, T], where there is a target.

    Returns:
        A scalar, 0 without any known token.
    """
    if not known.any():
        return states.sum() * 0.0
    wanted = targets.float()[known]
    return (states.float()[known] - wanted).square().sum() / wanted.square().sum()


def match_targets(vectors: Tensor, targets: Tensor, numbers: Tensor, *, temperature: float) -> Tensor:
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


def centered(rows: Tensor, centre: Tensor, lengths: Tensor | float = 1.0) -> Tensor:
    """Rows without what all texts have in common.

    A question's vector without it gives less to documents that are near everything: centering against hubs, Suzuki et
    al., EMNLP 2013.

    Args:
        rows: [..., D], unit rows; or others of which those are made.
        centre: float32 [D], the mean of texts' unit rows, or a share of it.
        lengths: Of the vector that each row belongs to, [..., 1]; 1 where the row is that vector itself.

    Returns:
        [..., D], not of unit length.
    """
    return rows - lengths * centre


def find_positives(
    vectors: Tensor, *, queries: Tensor, positives: Tensor, blocked: Tensor, temperature: float
) -> Tensor:
    """InfoNCE: cross-entropy of finding each query's positive among all rows of the batch that are not blocked.

    Args:
        vectors: [R, D]; queries, positives, negatives and unrelated texts alike.
        queries: int64 [P], rows of the queries.
        positives: int64 [P], rows of their positives.
        blocked: bool [P, R], candidates that are no negatives: `in_batch_blocked` or `own_only_blocked`.
        temperature: Divides the cosines.

    Returns:
        A scalar, 0 without any pair.
    """
    if not len(queries):
        return vectors.sum() * 0.0
    rows = vectors.float()
    scores = rows[queries] @ rows.T / temperature
    return F.cross_entropy(scores.masked_fill(blocked, float("-inf")), positives)


def own_only_blocked(owner: Tensor, *, queries: Tensor, positives: Tensor) -> Tensor:
    """Stage two, in-batch negatives off: a query competes with its own negatives alone.

    Args:
        owner: int64 [R], group of each row.
        queries: int64 [P], rows of the queries.
        positives: int64 [P], rows of their positives.

    Returns:
        bool [P, R], True where a row is left out; never at the positive.
    """
    blocked = owner[queries][:, None] != owner[None, :]
    places = torch.arange(len(queries), device=owner.device)
    blocked[places, queries] = True
    blocked[places, positives] = False
    return blocked


def in_batch_blocked(
    owner: Tensor,
    numbers: Tensor,
    *,
    queries: Tensor,
    positives: Tensor,
    targets: Tensor | None = None,
    margin: float = NEGATIVE_MARGIN,
) -> Tensor:
    """Stage one, in-batch negatives on: every row competes, but for those that may well be right answers.

    Left out are the query, rows of the same text as the query or its positive, and, where there is a teacher, rows that
    it scores at or above `margin` of the positive. A query's own negatives always compete: they were mined by that
    rule or are labelled.

    Args:
        owner: int64 [R], group of each row.
        numbers: int64 [R], the texts' numbers.
        queries: int64 [P], rows of the queries.
        positives: int64 [P], rows of their positives.
        targets: [R, D], the teacher's vectors, or None.
        margin: Share of the positive's score from which another group's row is left out.

    Returns:
        bool [P, R], True where a row is left out; never at the positive.
    """
    same_text = (numbers[queries][:, None] == numbers[None, :]) | (numbers[positives][:, None] == numbers[None, :])
    others = owner[queries][:, None] != owner[None, :]
    places = torch.arange(len(queries), device=owner.device)
    blocked = same_text
    if targets is not None:
        scores = targets.float()[queries] @ targets.float().T
        right = scores[places, positives][:, None]
        near = scores >= right - right.abs() * (1 - margin)  # as `mining.below`
        blocked = blocked | (near & others)
    blocked[places, queries] = True
    blocked[places, positives] = False
    return blocked
