"""Search by words (BM25), and its fusion with search by meaning."""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from typing import Any

import bm25s
import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.app.index import Vectors
from nvembed_deploy.app.store import FolderStore

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells each step, whatever level is set
WORD = re.compile(r"\w+")
PARTS = re.compile(r"[^\W_]+")
"""Words within a name such as `read_csv`, which are found alone too."""
OPEN_INDEXES = 4
FUSED = 100
"""Number of best passages by meaning, and by words, that are ranked together."""
WORDS_WEIGHT = 0.2
"""Weight of the words beside that of the meaning. On two FAQ sets, covidfaq and stackfaq, nDCG@10 was 66.7 and 94.6
with it, 67.9 and 93.9 by meaning alone, and 51.0 and 93.2 with reciprocal rank fusion at its usual constant of 60."""
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


def fuse(cosines: Vectors, word_scores: Vectors) -> Rows:
    """Returns the order of passages by meaning and words together, the best one first.

    The cosines are scaled from 0 to 1, the scores by words to at most 1, and added with `WORDS_WEIGHT`.

    Args:
        cosines: float32 [N], of the passages.
        word_scores: float32 [N], of the same passages; 0 for those without a word of the query.
    """
    spread, best = float(np.ptp(cosines)), float(word_scores.max())
    by_meaning = (cosines - cosines.min()) / spread if spread else np.zeros_like(cosines)
    by_words = word_scores / best if best else word_scores
    return np.argsort(-((1 - WORDS_WEIGHT) * by_meaning + WORDS_WEIGHT * by_words), kind="stable")
