"""Losses of the training recipe. Vectors are unit rows; all arithmetic is FP32, also under autocast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    queries_compete: bool = False,
) -> Tensor:
    """Blocks rows that are no documents or are correct answers: stage one, in-batch negatives on.

    Blocked are other queries and single texts (unless they compete), and rows of the same text as the query or as an
    answer that it shares with another query of the batch.

    Args:
        group_ids: int64 [R], group of each row.
        text_ids: int64 [R], equal for rows of the same text.
        queries: int64 [P], rows of the queries.
        positives: int64 [P], rows of their positives.
        queries_compete: Other queries and single texts are candidates too.

    Returns:
        bool [P, R], True where a row is blocked; never at the positive.
    """
    pair_indices = torch.arange(len(queries), device=group_ids.device)
    answers = text_ids[positives][:, None] == text_ids[None, :]
    is_answer = (shared_answers(text_ids[queries], text_ids[positives]).float() @ answers.float()) > 0
    blocked = (text_ids[queries][:, None] == text_ids[None, :]) | is_answer
    if not queries_compete:
        is_document = torch.zeros(len(group_ids), dtype=torch.bool, device=group_ids.device)
        is_document[torch.isin(group_ids, group_ids[queries])] = True
        is_document[queries] = False
        blocked = blocked | ~is_document[None, :]
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
