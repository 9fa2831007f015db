"""Tasks of all six kinds, made from the documentation that every Python carries: parity without a download.

They show how much an engine differs from PyTorch, not how good a model is.
"""

from __future__ import annotations

import random
from typing import Any

from nvembed_deploy.evaluation.tasks import (
    LocalTask,
    Rows,
    class_data,
    cluster_data,
    make_task,
    pair_data,
    reranking_data,
    retrieval_data,
)
from nvembed_deploy.sample_texts import docstring_pairs, in_mixed_order

PACKAGES = ("asyncio", "ctypes", "email", "http", "logging", "multiprocessing", "tkinter", "unittest", "urllib", "xml")
"""Packages of Python's library that texts are taken from; also the classes."""
QUERIES = 500
"""Number of queries, and of passages. A score is a mean over them, so that one query counts for 0.2 points."""
CANDIDATES = 3
CHARS = 80
"""Length of a text: enough to distinguish it from others, and short, since PyTorch embeds it on a CPU as well."""
SHARED_WORDS = 12
"""Maximum number of words that the two texts of an STS pair share."""
CLASS_TEXTS = 60
"""Texts of each class: a third for training, the rest for the test."""
CLUSTERS, CLUSTER_TEXTS = ("email", "tkinter"), 250
"""Two distant clusters, each text prefixed with its package's name. With touching clusters, or more than two, k-means
changes the score by one to three points when vectors change as little as they do in BF16 or INT8."""
SEED = 0
Pairs = list[tuple[str, str]]


def built_in_tasks() -> list[LocalTask]:
    """Returns fixed tasks for retrieval, reranking, STS, pair classification, classification and clustering."""
    by_package = _pairs_by_package()
    selected = _select(by_package)
    rng = random.Random(SEED)
    return [
        make_task("PythonDocsRetrieval", "retrieval", lambda: _retrieval(selected), size=len(selected)),
        make_task(
            "PythonDocsReranking", "reranking", lambda: reranking_data(_candidates(selected)), size=len(selected)
        ),
        _sts(selected),
        _pairs(selected, rng),
        *_classes(by_package),
    ]


def retrieval_texts() -> Pairs:
    """Returns the queries of the retrieval task, each with its only relevant passage."""
    return _select(_pairs_by_package())


def _pairs_by_package() -> dict[str, Pairs]:
    return {
        name: in_mixed_order((query, body[:CHARS]) for query, body in docstring_pairs(under=(name,)))
        for name in PACKAGES
    }


def _select(by_package: dict[str, Pairs]) -> Pairs:
    pairs = in_mixed_order(pair for package_pairs in by_package.values() for pair in package_pairs)
    # No query and no passage occurs twice: equal passages would tie, and rounding would decide their order.
    unique = list({query: (query, body) for query, body in pairs}.values())
    unique = list({body: (query, body) for query, body in unique}.values())
    return unique[:QUERIES]


def _retrieval(pairs: Pairs) -> dict[str, Any]:
    """Makes a retrieval task: from a docstring's summary to its body."""
    corpus = [{"id": f"d{index}", "text": body} for index, (_, body) in enumerate(pairs)]
    queries = [{"id": f"q{index}", "text": query} for index, (query, _) in enumerate(pairs)]
    judged = {f"q{index}": {f"d{index}": 1} for index in range(len(queries))}
    return retrieval_data(corpus, queries, judged)


def _candidates(pairs: Pairs) -> list[dict[str, Any]]:
    """Makes reranking rows: each query with its own body and its neighbours' bodies."""
    bodies = [body for _, body in pairs]
    return [
        {
            "query": query,
            "positive": [body],
            "negative": [bodies[(index + step) % len(bodies)] for step in range(1, CANDIDATES)],
        }
        for index, (query, body) in enumerate(pairs)
    ]


def _sts(pairs: Pairs) -> LocalTask:
    """Makes an STS task: each passage is paired with another one in which a growing part is replaced by the first."""
    rows: Rows = []
    for index, (_, body) in enumerate(pairs):
        next_body = pairs[(index + 1) % len(pairs)][1]
        words, next_words = body.split()[:SHARED_WORDS], next_body.split()[:SHARED_WORDS]
        score = index % 6
        shared = len(words) * score // 5
        rows.append({"a": body, "b": " ".join(words[:shared] + next_words[shared:]), "score": score})
    return make_task(
        "PythonDocsSTS",
        "sts",
        lambda: pair_data(rows, {"score": [float(row["score"]) for row in rows]}),
        size=len(rows),
    )


def _pairs(pairs: Pairs, rng: random.Random) -> LocalTask:
    """Makes a pair classification task: summary and body of the same text, or of two texts."""
    rows: Rows = []
    for index, (query, body) in enumerate(pairs):
        is_pair = rng.random() < 0.5
        rows.append({"a": query, "b": body if is_pair else pairs[(index + 7) % len(pairs)][1], "label": int(is_pair)})
    labels = [row["label"] for row in rows]
    return make_task("PythonDocsPairs", "pairs", lambda: pair_data(rows, {"labels": labels}), size=len(rows))


def _classes(by_package: dict[str, Pairs]) -> list[LocalTask]:
    """Makes a classification and a clustering task: the package that a text belongs to."""
    rows: Rows = [
        {"text": f"{query} {body}", "label": package, "index": index}
        for package, pairs in by_package.items()
        for index, (query, body) in enumerate(pairs[:CLASS_TEXTS])
    ]
    train = [row for row in rows if row["index"] < CLASS_TEXTS // 3]
    test = [row for row in rows if row["index"] >= CLASS_TEXTS // 3]
    clusters: Rows = [
        {"text": f"{package}: {query}", "label": package}
        for package in CLUSTERS
        for query, _ in by_package[package][:CLUSTER_TEXTS]
    ]
    return [
        make_task("PythonDocsClassification", "classification", lambda: class_data(train, test), size=len(test)),
        make_task("PythonDocsClustering", "clustering", lambda: cluster_data(clusters), size=len(clusters)),
    ]
