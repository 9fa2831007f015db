"""Losses of the training recipe. Vectors are unit rows; all arithmetic is FP32, also under autocast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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


def find_positives(
    vectors: Tensor, *, queries: Tensor, positives: Tensor, blocked: Tensor, temperature: float
) -> Tensor:
    """InfoNCE: cross-entropy of finding each query's positive among all rows of the batch that are not blocked.

    Args:
        vectors: [R, D], of queries, positives, negatives and unrelated texts.
        queries: int64 [P], rows of the queries.
        positives: int64 [P], rows of their positives.
        blocked: bool [P, R], True where a row is not a candidate: `in_batch_blocked` or `own_only_blocked`.
        temperature: Divides the cosines.

    Returns:
        A scalar, 0 if there is no pair.
    """
    if not len(queries):
        return vectors.sum() * 0.0
    rows = vectors.float()
    scores = rows[queries] @ rows.T / temperature
    return F.cross_entropy(scores.masked_fill(blocked, float("-inf")), positives)


def own_only_blocked(group_ids: Tensor, *, queries: Tensor, positives: Tensor) -> Tensor:
    """Blocks all rows but a query's own positive and negatives: stage two, in-batch negatives off.

    Args:
        group_ids: int64 [R], group of each row.
        queries: int64 [P], rows of the queries.
        positives: int64 [P], rows of their positives.

    Returns:
        bool [P, R], True where a row is blocked; never at the positive.
    """
    blocked = group_ids[queries][:, None] != group_ids[None, :]
    pair_indices = torch.arange(len(queries), device=group_ids.device)
    blocked[pair_indices, queries] = True
    blocked[pair_indices, positives] = False
    return blocked


def in_batch_blocked(
    group_ids: Tensor,
    text_ids: Tensor,
    *,
    queries: Tensor,
    positives: Tensor,
    targets: Tensor | None = None,
    margin: float = NEGATIVE_MARGIN,
    queries_compete: bool = False,
) -> Tensor:
    """Blocks rows that are no documents or are likely to be correct answers: stage one, in-batch negatives on.

    Blocked are other queries and single texts (unless they compete), rows of the same text as the query or as an answer
    that it shares with another query of the batch, and, if there is a teacher, rows that it scores at or above `margin`
    of the positive. A query's own negatives always compete: they were mined by that rule or are labelled.

    Args:
        group_ids: int64 [R], group of each row.
        text_ids: int64 [R], equal for rows of the same text.
        queries: int64 [P], rows of the queries.
        positives: int64 [P], rows of their positives.
        targets: [R, D], the teacher's vectors, or None.
        margin: Fraction of the positive's score from which a row of another group is blocked.
        queries_compete: Other queries and single texts are candidates too.

    Returns:
        bool [P, R], True where a row is blocked; never at the positive.
    """
    pair_indices = torch.arange(len(queries), device=group_ids.device)
    other_group = group_ids[queries][:, None] != group_ids[None, :]
    answers = text_ids[positives][:, None] == text_ids[None, :]
    is_answer = (shared_answers(text_ids[queries], text_ids[positives]).float() @ answers.float()) > 0
    blocked = (text_ids[queries][:, None] == text_ids[None, :]) | is_answer
    if not queries_compete:
        is_document = torch.zeros(len(group_ids), dtype=torch.bool, device=group_ids.device)
        is_document[torch.isin(group_ids, group_ids[queries])] = True
        is_document[queries] = False
        blocked = blocked | ~is_document[None, :]
    if targets is not None:
        scores = targets.float()[queries] @ targets.float().T
        positive_scores = scores[pair_indices, positives][:, None]
        too_similar = scores >= positive_scores - positive_scores.abs() * (1 - margin)  # as `mining.negative_limit`
        blocked = blocked | (too_similar & other_group)
    blocked[pair_indices, queries] = True
    blocked[pair_indices, positives] = False
    return blocked


def shared_answers(query_ids: Tensor, positive_ids: Tensor) -> Tensor:
    """Returns which pairs share an answer: those connected by equal queries or equal positives, over any distance.

    Args:
        query_ids: int64 [P], equal for equal queries.
        positive_ids: int64 [P], equal for equal positives.

    Returns:
        bool [P, P].
    """
    shares = (query_ids[:, None] == query_ids[None, :]) | (positive_ids[:, None] == positive_ids[None, :])
    while True:  # each round doubles the distance
        wider = (shares.float() @ shares.float()) > 0
        if torch.equal(wider, shares):
            return shares
        shares = wider
