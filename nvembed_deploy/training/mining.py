"""Hard negatives for pairs, chosen by a teacher: close to the query but clearly below its positive.

The positive-aware rule (TopKPercPos): of the texts that the teacher ranks closest to the query, only those count whose
score is below 95 % of the positive's. Source: NV-Retriever, arXiv 2407.15831; NV-Embed, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.options import NEGATIVE_MARGIN, NEGATIVES

BLOCK_QUERIES = 256
PAIRED = (Kind.RETRIEVAL, Kind.SIMILARITY)


def mine(
    examples: Sequence[Example],
    vectors: Tensor,
    table: dict[str, int],
    *,
    negatives: int = NEGATIVES,
    margin: float = NEGATIVE_MARGIN,
) -> list[Example]:
    """Fills up each pair's negatives from the positives of its own source.

    Args:
        examples: Examples without a positive, and texts of kind `label`, are returned unchanged.
        vectors: bf16 or float32 [N, D], the teacher's unit vectors by row of `table`.
        table: Row of each text in `vectors`.
        negatives: Number of negatives for each pair; labelled ones count and come first.
        margin: Fraction of the positive's score from which a text is not a negative.

    Returns:
        The examples in their order. A pair whose positive the teacher ranks no better than chance may get fewer
        negatives.
    """
    mined_examples = list(examples)
    by_source: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        if example.positive and example.kind in PAIRED:
            by_source.setdefault(example.source, []).append(index)
    with tqdm(
        total=sum(map(len, by_source.values())), desc="hard negatives", unit="query", disable=None
    ) as progress_bar:
        for members in by_source.values():
            pairs = [examples[index] for index in members]
            source_negatives = _source_negatives(pairs, vectors, table, negatives=negatives, margin=margin)
            for index, example, mined in zip(members, pairs, source_negatives, strict=True):
                mined_examples[index] = replace(example, negatives=(*example.negatives[:negatives], *mined))
                progress_bar.update()
    return mined_examples


def _source_negatives(
    pairs: Sequence[Example], vectors: Tensor, table: dict[str, int], *, negatives: int, margin: float
) -> Iterator[list[str]]:
    """Yields the mined negatives of each pair of one source: as many as its labelled ones leave of `negatives`."""
    candidates = list(dict.fromkeys(example.positive for example in pairs))
    columns = {text: column for column, text in enumerate(candidates)}
    answers: dict[str, set[int]] = {}
    for example in pairs:
        answers.setdefault(example.query, set()).add(columns[example.positive])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    documents = vectors[[table[text] for text in candidates]].to(device).float()
    for start in range(0, len(pairs), BLOCK_QUERIES):
        block = pairs[start : start + BLOCK_QUERIES]
        queries = vectors[[table[example.query] for example in block]].to(device).float()
        block_scores = (queries @ documents.T).cpu()
        for example, scores in zip(block, block_scores, strict=True):
            excluded = answers[example.query] | ({columns[example.query]} if example.query in columns else set())
            limit = negative_limit(float(scores[columns[example.positive]]), margin)
            count = max(0, negatives - len(example.negatives))
            yield [candidates[column] for column in hardest(scores, limit=limit, excluded=excluded, count=count)]


def negative_limit(positive_score: float, margin: float) -> float:
    """Returns the fraction `margin` of a positive's score, or as far below the score if it is negative."""
    return positive_score - abs(positive_score) * (1 - margin)


def hardest(scores: Tensor, *, limit: float, excluded: set[int], count: int) -> list[int]:
    """Returns the columns of the highest scores below a limit.

    Args:
        scores: float32 [N], the teacher's scores of one query.
        limit: Texts with this score or a higher one are not negatives.
        excluded: Columns that are not negatives: the query's answers, and the query itself.
        count: Maximum number of columns.
    """
    open_scores = torch.where(scores < limit, scores, torch.tensor(float("-inf")))
    if excluded:
        open_scores[sorted(excluded)] = float("-inf")
    best = open_scores.topk(min(count, len(open_scores)))
    return [column for column, score in zip(best.indices.tolist(), best.values.tolist(), strict=True) if score > -2.0]
