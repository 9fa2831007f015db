"""Hard negatives for pairs, chosen by a teacher: near the query but clearly below its positive.

The positive-aware rule (TopKPercPos): of the texts that the teacher puts nearest to the query, those count whose score
is below 95 % of the positive's. Source: NV-Retriever, arXiv 2407.15831; NV-Embed, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        examples: Those without a positive, and texts of kind `label`, come back as they are.
        vectors: bf16 or float32 [N, D], the teacher's unit vectors by text number.
        table: Texts to numbers.
        negatives: Wanted for each pair; labelled ones count and come first.
        margin: Share of the positive's score from which a text is left out.

    Returns:
        The examples in their order. A pair whose positive the teacher finds no better than chance may get fewer.
    """
    found = list(examples)
    by_source: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        if example.positive and example.kind in PAIRED:
            by_source.setdefault(example.source, []).append(index)
    bar = tqdm(total=sum(map(len, by_source.values())), desc="hard negatives", unit="query", disable=None)
    for members in by_source.values():
        _mine_source(examples, members, found, vectors, table, negatives, margin, bar)
    bar.close()
    return found


def _mine_source(
    examples: Sequence[Example],
    members: list[int],
    found: list[Example],
    vectors: Tensor,
    table: dict[str, int],
    negatives: int,
    margin: float,
    bar: tqdm[None],
) -> None:
    candidates = list(dict.fromkeys(examples[index].positive for index in members))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    documents = vectors[[table[text] for text in candidates]].to(device).float()
    column = {text: place for place, text in enumerate(candidates)}
    answers: dict[str, set[int]] = {}
    for index in members:
        answers.setdefault(examples[index].query, set()).add(column[examples[index].positive])
    for start in range(0, len(members), BLOCK_QUERIES):
        block = members[start : start + BLOCK_QUERIES]
        queries = vectors[[table[examples[index].query] for index in block]].to(device).float()
        scores = (queries @ documents.T).cpu()
        for row, index in enumerate(block):
            example = examples[index]
            closed = answers[example.query] | ({column[example.query]} if example.query in column else set())
            limit = below(float(scores[row, column[example.positive]]), margin)
            wanted = negatives - len(example.negatives)
            chosen = hardest(scores[row], limit=limit, closed=closed, count=max(0, wanted))
            mined = tuple(candidates[place] for place in chosen)
            found[index] = replace(example, negatives=(*example.negatives[:negatives], *mined))
        bar.update(len(block))


def below(score: float, margin: float) -> float:
    """A share of a score; as far below it where it is negative."""
    return score - abs(score) * (1 - margin)


def hardest(scores: Tensor, *, limit: float, closed: set[int], count: int) -> list[int]:
    """Places of the highest scores below a limit.

    Args:
        scores: float32 [N], one query's by the teacher.
        limit: Scores from here on are no negatives.
        closed: Places that are no negatives: the query's answers, and the query itself.
        count: Most places wanted.
    """
    open_scores = torch.where(scores < limit, scores, torch.tensor(float("-inf")))
    if closed:
        open_scores[sorted(closed)] = float("-inf")
    best = open_scores.topk(min(count, len(open_scores)))
    return [place for place, score in zip(best.indices.tolist(), best.values.tolist(), strict=True) if score > -2.0]
