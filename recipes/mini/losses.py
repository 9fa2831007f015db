"""Losses that compare with a teacher. Vectors are unit rows; all arithmetic is FP32, also under autocast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nvembed_deploy.training.mining import negative_limit
from nvembed_deploy.training.options import NEGATIVE_MARGIN


def distillation(vectors: Tensor, targets: Tensor) -> Tensor:
    """Returns 1 - cosine to the teacher, averaged over rows.

    Args:
        vectors: [R, D], the student's vectors.
        targets: [R, D], the teacher's vectors.
    """
    return 1 - (vectors.float() * targets.float()).sum(dim=-1).mean()


def token_distillation(states: Tensor, targets: Tensor, has_target: Tensor) -> Tensor:
    """Returns the squared error of the pooler's token outputs, relative to the teacher's mean square.

    A text has one vector but many tokens: the same texts teach several times as much.

    Args:
        states: [R, T, D], the student's token outputs before the mean.
        targets: [R, T, D], the teacher's token states, aligned with the student's tokens.
        has_target: bool [R, T], True where a token has a target.

    Returns:
        A scalar, 0 if no token has a target.
    """
    if not has_target.any():
        return states.sum() * 0.0
    target_states = targets.float()[has_target]
    return (states.float()[has_target] - target_states).square().sum() / target_states.square().sum()


def match_targets(vectors: Tensor, targets: Tensor, text_ids: Tensor, *, temperature: float) -> Tensor:
    """Returns the cross-entropy of finding a row's own target among those of the batch.

    Args:
        vectors: [R, D], the student's vectors.
        targets: [R, D], the teacher's vectors.
        text_ids: int64 [R], equal for rows of the same text, which do not count as wrong answers for each other.
        temperature: Divides the cosines.
    """
    scores = vectors.float() @ targets.float().T / temperature
    same_text = text_ids[:, None] == text_ids[None, :]
    same_text.fill_diagonal_(False)
    return F.cross_entropy(
        scores.masked_fill(same_text, float("-inf")), torch.arange(len(scores), device=scores.device)
    )


def centered(rows: Tensor, centre: Tensor, lengths: Tensor | float = 1.0) -> Tensor:
    """Subtracts the direction that all texts have in common.

    A centered question scores lower on documents that are close to everything: centering against hubs, Suzuki et al.,
    EMNLP 2013.

    Args:
        rows: [..., D], unit rows; or token states that such rows are pooled from.
        centre: float32 [D], the mean of texts' unit rows, or a fraction of it.
        lengths: [..., 1], length of the pooled vector that each row belongs to; 1 for unit rows.

    Returns:
        [..., D], not of unit length.
    """
    return rows - lengths * centre


def near_positives(
    targets: Tensor, group_ids: Tensor, *, queries: Tensor, positives: Tensor, margin: float = NEGATIVE_MARGIN
) -> Tensor:
    """Returns which rows of other groups are likely to be correct answers by the teacher, by the rule of mining.

    A query's own negatives are not among them: they were mined by that rule or are labelled.

    Args:
        targets: [R, D], the teacher's vectors.
        group_ids: int64 [R], group of each row.
        queries: int64 [P], rows of the queries.
        positives: int64 [P], rows of their positives.
        margin: Fraction of the positive's score from which a row counts.

    Returns:
        bool [P, R].
    """
    scores = targets.float()[queries] @ targets.float().T
    limits = negative_limit(scores.gather(1, positives[:, None]), margin)
    return (scores >= limits) & (group_ids[queries][:, None] != group_ids[None, :])
