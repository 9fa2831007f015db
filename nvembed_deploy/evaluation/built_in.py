"""Tasks of all six kinds from the documentation that every Python carries: parity without a download.

They say how much an engine differs from PyTorch, not how good a model is.
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
"""Of Python's library; also the classes."""
QUERIES = 500
"""And as many passages. A score is a mean over so many, so that one of them counts for 0.2 points."""
CANDIDATES = 3
CHARS = 80
"""Of a text: enough to tell it from others, and short, since PyTorch embeds it on a CPU as well."""
SHARED_WORDS = 12
"""Most words that the two texts of an STS pair share."""
CLASS_TEXTS = 60
"""Of each class: a third to learn from, the rest to test on."""
CLUSTERS, CLUSTER_TEXTS = ("email", "tkinter"), 250
"""Two, far apart, each text with its package's name in front. Where clusters touch, or are more than two, k-means moves
the score by one to three points when vectors move by as little as BF16's or INT8's do."""
SEED = 0
Pairs = list[tuple[str, str]]


def built_in_tasks() -> list[LocalTask]:
    """Retrieval, reranking, STS, pair classification, classification and clustering, the same every time."""
    by_package = {
        name: in_mixed_order((query, body[:CHARS]) for query, body in docstring_pairs(under=(name,)))
        for name in PACKAGES
    }
    pairs = in_mixed_order(pair for found in by_package.values() for pair in found)
    # Neither a query nor a passage twice: equal passages tie, and rounding would order them.
    unique = list({query: (query, body) for query, body in pairs}.values())
    unique = list({body: (query, body) for query, body in unique}.values())
    asked = unique[:QUERIES]
    rng = random.Random(SEED)
    return [
        make_task("PythonDocsRetrieval", "retrieval", lambda: _retrieval(asked), size=len(asked)),
        make_task("PythonDocsReranking", "reranking", lambda: reranking_data(_candidates(asked)), size=len(asked)),
        _sts(asked),
        _pairs(asked, rng),
        *_classes(by_package),
    ]


def _retrieval(asked: Pairs) -> dict[str, Any]:
    """Summary to what stands below it."""
    corpus = [{"id": f"d{number}", "text": body} for number, (_, body) in enumerate(asked)]
    queries = [{"id": f"q{number}", "text": query} for number, (query, _) in enumerate(asked)]
    judged = {f"q{number}": {f"d{number}": 1} for number in range(len(queries))}
    return retrieval_data(corpus, queries, judged)


def _candidates(asked: Pairs) -> list[dict[str, Any]]:
    """The right body among its neighbours'."""
    bodies = [body for _, body in asked]
    return [
        {
            "query": query,
            "positive": [body],
            "negative": [bodies[(number + step) % len(bodies)] for step in range(1, CANDIDATES)],
        }
        for number, (query, body) in enumerate(asked)
    ]


def _sts(asked: Pairs) -> LocalTask:
    """A passage beside another one of which a growing part is its own."""
    rows: Rows = []
    for number, (_, body) in enumerate(asked):
        words, others = body.split()[:SHARED_WORDS], asked[(number + 1) % len(asked)][1].split()[:SHARED_WORDS]
        score = number % 6
        kept = len(words) * score // 5
        rows.append({"a": body, "b": " ".join(words[:kept] + others[kept:]), "score": score})
    return make_task(
        "PythonDocsSTS",
        "sts",
        lambda: pair_data(rows, {"score": [float(row["score"]) for row in rows]}),
        size=len(rows),
    )


def _pairs(asked: Pairs, rng: random.Random) -> LocalTask:
    """Summary and body of one text, or of two."""
    rows: Rows = []
    for number, (query, body) in enumerate(asked):
        is_pair = rng.random() < 0.5
        rows.append({"a": query, "b": body if is_pair else asked[(number + 7) % len(asked)][1], "label": int(is_pair)})
    labels = [row["label"] for row in rows]
    return make_task("PythonDocsPairs", "pairs", lambda: pair_data(rows, {"labels": labels}), size=len(rows))


def _classes(by_package: dict[str, Pairs]) -> list[LocalTask]:
    """Which package a text is of: learned from some, and found without."""
    rows: Rows = [
        {"text": f"{query} {body}", "label": package, "place": place}
        for package, pairs in by_package.items()
        for place, (query, body) in enumerate(pairs[:CLASS_TEXTS])
    ]
    train = [row for row in rows if row["place"] < CLASS_TEXTS // 3]
    test = [row for row in rows if row["place"] >= CLASS_TEXTS // 3]
    clusters: Rows = [
        {"text": f"{package}: {query}", "label": package}
        for package in CLUSTERS
        for query, _ in by_package[package][:CLUSTER_TEXTS]
    ]
    return [
        make_task("PythonDocsClassification", "classification", lambda: class_data(train, test), size=len(test)),
        make_task("PythonDocsClustering", "clustering", lambda: cluster_data(clusters), size=len(clusters)),
    ]
