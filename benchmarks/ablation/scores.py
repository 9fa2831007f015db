"""Small metrics for ablations: rank correlation on scored pairs, and nDCG@10 on a corpus with judgements.

They compare runs with each other; published scores are measured with `mteb`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.json_lines import read_rows
from nvembed_deploy.files.qrels import read_qrels
from nvembed_deploy.tokenization import DEFAULT_QUERY_INSTRUCTION

Vectors = NDArray[np.float32]
Embed = Callable[[Sequence[str], str], Vectors]
"""Embeds texts with an instruction (empty for none) as unit rows."""

SIMILARITY_INSTRUCTION = "Retrieve semantically similar text."
DEPTH = 10
MAX_DOCUMENTS = 500
"""A corpus is reduced to the documents judged for its first queries: a few seconds instead of minutes."""


def score_folder(folder: Path, embed: Embed) -> dict[str, float]:
    """Scores every data set of a folder that has a known layout.

    Layouts: `test.jsonl` with {"a", "b", "score"}; or `corpus.jsonl`, `queries.jsonl` and `qrels.tsv`.

    Returns:
        Score of each data set by its name, 0 to 1.

    Raises:
        ConfigError: The folder holds no such data set.
    """
    scores: dict[str, float] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (path / "corpus.jsonl").is_file():
            scores[path.name] = retrieval(path, embed)
        elif (path / "test.jsonl").is_file():
            rows = list(read_rows(path / "test.jsonl"))
            if {"a", "b", "score"} <= rows[0].keys():
                vectors = [embed([row[side] for row in rows], SIMILARITY_INSTRUCTION) for side in ("a", "b")]
                cosines = (vectors[0] * vectors[1]).sum(axis=1)
                scores[path.name] = float(spearmanr(cosines, [row["score"] for row in rows]).statistic)
    if not scores:
        raise ConfigError(
            f"{folder} contains no data set of scored pairs and no corpus with judgements; pass the folder of the "
            "evaluation sets"
        )
    return scores


def retrieval(folder: Path, embed: Embed) -> float:
    """Returns the mean nDCG@10 of the first queries with judgements, among the documents judged for them."""
    corpus = list(read_rows(folder / "corpus.jsonl"))
    queries = {row["id"]: row["text"] for row in read_rows(folder / "queries.jsonl")}
    judged: dict[str, dict[str, float]] = {}
    for query, document, relevance in read_qrels(folder):
        if query in queries:
            judged.setdefault(query, {})[document] = relevance
    scored: dict[str, dict[str, float]] = {}
    document_ids: set[str] = set()
    for query, judgements in judged.items():
        if len(document_ids | judgements.keys()) > MAX_DOCUMENTS:
            break
        scored[query] = judgements
        document_ids |= judgements.keys()
    corpus = [row for row in corpus if row["id"] in document_ids]
    documents = embed([f"{row.get('title') or ''} {row['text']}".strip() for row in corpus], "")
    query_vectors = embed([queries[query] for query in scored], DEFAULT_QUERY_INSTRUCTION)
    rankings = np.argsort(-(query_vectors @ documents.T), axis=1, kind="stable")[:, :DEPTH]
    gains = [
        ndcg([scored[query].get(corpus[index]["id"], 0.0) for index in ranking], scored[query])
        for query, ranking in zip(scored, rankings, strict=True)
    ]
    return float(np.mean(gains))


def ndcg(gains: Sequence[float], judged: Mapping[str, float]) -> float:
    """Returns the discounted gain of a ranking over that of the best ranking."""
    best_gains = sorted(judged.values(), reverse=True)[:DEPTH]
    return _discounted(gains) / _discounted(best_gains)


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))
