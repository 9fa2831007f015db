"""Search by words (BM25), and its fusion with search by meaning."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import bm25s
import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.app.index import Vectors
from nvembed_deploy.app.store import FolderStore

WORD = re.compile(r"\w+")
PARTS = re.compile(r"[^\W_]+")
"""Words within a name such as `read_csv`, which are found alone too."""
OPEN_INDEXES = 4
FUSED = 100
"""Number of passages of each ranking that are fused."""
RRF_K = 60
"""Constant of reciprocal rank fusion. Source: Cormack, Clarke and Buettcher, SIGIR 2009."""
Rows = NDArray[np.int64]


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case, names with an underscore also in parts."""
    found = []
    for word in WORD.findall(text.casefold()):
        found.append(word)
        if "_" in word:
            found += PARTS.findall(word)
    return found


class WordIndexes:
    """Word indexes of collections, made at their first search by words."""

    def __init__(self) -> None:
        self._indexes: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def scores(self, store: FolderStore, query: str) -> Vectors:
        """Returns how well each passage of a collection matches the words of a query; 0 without any of them."""
        with self._lock:
            index = self._indexes.get(store.identity)
            if index is None:
                index = bm25s.BM25(method="lucene")
                corpus = [words(f"{passage.label} {passage.embedded_text}") or [""] for passage in store.passages]
                index.index(corpus, show_progress=False)
                self._indexes[store.identity] = index
                if len(self._indexes) > OPEN_INDEXES:
                    self._indexes.popitem(last=False)
        known = [word for word in words(query) if word in index.vocab_dict]
        if not known:
            return np.zeros(len(store), np.float32)
        return np.asarray(index.get_scores(known), np.float32)


def best_rows(scores: Vectors, allowed: NDArray[np.bool_] | None, count: int) -> Rows:
    """Returns the rows with the best scores above 0, the best one first."""
    scores = scores if allowed is None else np.where(allowed, scores, 0)
    count = min(count, int(np.count_nonzero(scores > 0)))
    if not count:
        return np.zeros(0, np.int64)
    rows = np.argpartition(-scores, count - 1)[:count]
    return rows[np.lexsort((rows, -scores[rows]))]


def fuse(rankings: Sequence[Sequence[int]]) -> list[int]:
    """Fuses rankings of rows by the sum of their reciprocal ranks."""
    fused: dict[int, float] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking, 1):
            fused[row] = fused.get(row, 0.0) + 1 / (RRF_K + rank)
    return sorted(fused, key=lambda row: (-fused[row], row))
