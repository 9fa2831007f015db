"""Small measures for ablations: rank correlation on scored pairs, and nDCG@10 on a corpus with judgements.

For comparing runs with each other; published scores are measured with `mteb`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.json_lines import read_rows

Vectors = NDArray[np.float32]
Embed = Callable[[Sequence[str], str], Vectors]
"""Texts and an instruction (empty for none) to unit rows."""

SIMILARITY_INSTRUCTION = "Retrieve semantically similar text."
RETRIEVAL_INSTRUCTION = "Given a question, retrieve passages that answer the question"
DEPTH = 10
MOST_DOCUMENTS = 500
"""A corpus is cut to the documents judged for its first queries: a few seconds instead of minutes."""


def score_folder(folder: Path, embed: Embed) -> dict[str, float]:
    """Scores every set of a folder that has a known layout.

    Layouts: `test.jsonl` with {"a", "b", "score"}; or `corpus.jsonl`, `queries.jsonl` and `qrels.tsv`.

    Returns:
        Name of each set to its score, 0 to 1.

    Raises:
        ConfigError: The folder holds no such set.
    """
    found: dict[str, float] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (path / "corpus.jsonl").is_file():
            found[path.name] = retrieval(path, embed)
        elif (path / "test.jsonl").is_file():
            rows = list(read_rows(path / "test.jsonl"))
            if {"a", "b", "score"} <= rows[0].keys():
                vectors = [embed([row[side] for row in rows], SIMILARITY_INSTRUCTION) for side in ("a", "b")]
                cosines = (vectors[0] * vectors[1]).sum(axis=1)
                found[path.name] = spearman(cosines, np.array([row["score"] for row in rows], dtype=np.float64))
    if not found:
        raise ConfigError(f"{folder} holds no set of scored pairs and no corpus with judgements")
    return found


def retrieval(folder: Path, embed: Embed) -> float:
    """Mean nDCG@10 over the first queries with judgements, among the documents judged for them."""
    corpus = list(read_rows(folder / "corpus.jsonl"))
    queries = {row["id"]: row["text"] for row in read_rows(folder / "queries.jsonl")}
    judged: dict[str, dict[str, float]] = {}
    for line in (folder / "qrels.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, document, score = line.split("\t")[:3]
        if float(score) > 0 and query in queries:
            judged.setdefault(query, {})[document] = float(score)
    asked_for: dict[str, dict[str, float]] = {}
    wanted: set[str] = set()
    for query, documents_of in judged.items():
        if len(wanted | documents_of.keys()) > MOST_DOCUMENTS:
            break
        asked_for[query] = documents_of
        wanted |= documents_of.keys()
    judged = asked_for
    corpus = [row for row in corpus if row["id"] in wanted]
    documents = embed([f"{row.get('title') or ''} {row['text']}".strip() for row in corpus], "")
    asked = embed([queries[query] for query in judged], RETRIEVAL_INSTRUCTION)
    order = np.argsort(-(asked @ documents.T), axis=1, kind="stable")[:, :DEPTH]
    gains = [
        ndcg([judged[query].get(corpus[place]["id"], 0.0) for place in row], judged[query])
        for query, row in zip(judged, order, strict=True)
    ]
    return float(np.mean(gains))


def ndcg(found: Sequence[float], judged: Mapping[str, float]) -> float:
    """Discounted gain of a ranking over that of the best one."""
    best = sorted(judged.values(), reverse=True)[:DEPTH]
    return _discounted(found) / _discounted(best)


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(place + 2) for place, gain in enumerate(gains))


def spearman(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Rank correlation of two rows of numbers; ties get their mean rank."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (counts.cumsum() - (counts - 1) / 2)[places]
    return ranks
