"""Search: from a query to its vector, the nearest passages, and the best sentences in them."""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from nvembed_deploy import Coalescer, Encoder, InputError
from nvembed_deploy.app.index import Vectors
from nvembed_deploy.app.store import Engine, FolderStore, Hit, require_same_engine
from nvembed_deploy.app.words import FUSED, WordIndexes, best_rows, fuse

MAX_QUERY_CHARS = 2000
"""Maximum length of a query; the limit in the page is not enforced on the server."""
MAX_RESULTS = 100
MEANING, WORDS, BOTH = MODES = ("meaning", "words", "both")
"""How passages are ranked: by their vectors, by the words of the query, or by both rankings."""
SENTENCE = re.compile(r".+?(?:(?<!\bi\.e)(?<!\be\.g)[.!?](?=\s)\s*|\n\s*\n\s*|\Z)", re.DOTALL)
MAX_SENTENCES = 10
"""Maximum number of sentences of a passage that are compared; the remainder of a long passage is not marked."""
MAX_MARKS = 3
"""Maximum number of sentences of a passage that are marked."""
MATCH_MARGIN = 0.03
"""Sentences within this cosine of the best one are marked as well."""
MAX_SENTENCE_CHARS = 300
"""Maximum number of characters of a sentence that are compared."""
CACHED_PASSAGES = 5000
"""Number of passages whose sentence vectors are kept: 30 MB at width 384, if each has four sentences."""
CACHED_QUERIES = 256
UNRELATED_QUERIES = (
    "how to bake sourdough bread",
    "symptoms of the flu in children",
    "the best beaches in southern Italy",
    "how to repair a leaking tap",
    "history of the Roman empire",
    "rules of the offside trap in football",
    "lyrics of a song about summer",
    "when to plant tomatoes in the garden",
    "how volcanoes erupt",
    "cheap flights to New York in May",
    "exercises against back pain",
    "who painted the Mona Lisa",
    "interest rates for a mortgage",
    "how to train a puppy",
    "the life of bees in winter",
    "what is the capital of Australia",
    "knitting pattern for a baby blanket",
    "how do electric cars charge",
    "famous quotes about love",
    "how to remove red wine stains",
    "why is the sky blue",
    "tax return for freelancers",
    "the plot of Hamlet",
    "how to tie a bow tie",
)
"""Queries of many topics: what most of them reach in a collection is no sign of a match."""
NOISE_MADS = 3.0
"""A match is this many deviations above the median of what unrelated queries reach; see `Searcher.threshold`."""
MIN_NOISE_MAD = 0.01


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Passages that a search found, and how long it took."""

    hits: list[Hit]
    query: Vectors
    """float32 [D], the vector of the query."""
    milliseconds: dict[str, float]
    """Time of each step."""


class Searcher:
    """Runs the searches of many users through one engine.

    Args:
        encoder: Encoder of the bundle.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.engine = encoder, Engine.of(encoder)
        self._coalescer = Coalescer(encoder)
        self._words = WordIndexes()
        self._lock = threading.Lock()
        self._sentences: OrderedDict[tuple[str, int], Vectors] = OrderedDict()
        self._queries: OrderedDict[tuple[str, str], Vectors] = OrderedDict()
        self._unrelated: dict[str, Vectors] = {}
        self._thresholds: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._embedding_ms: deque[float] = deque(maxlen=9)

    @property
    def query_ms(self) -> float | None:
        """Median time to embed one of the last queries, in milliseconds; None before the first."""
        times = list(self._embedding_ms)
        return statistics.median(times) if times else None

    def embed(self, texts: Sequence[str], *, instruction: str = "") -> Vectors:
        """Embeds texts, batched with those of other threads; returns float32 [N, D]."""
        return self._coalescer.submit(self._rows(texts, instruction)).result()

    def embed_query(self, query: str, instruction: str) -> Vectors:
        """Embeds a query, or returns the vector of the same recent one; float32 [D].

        Raises:
            InputError: The query is empty or too long.
            OverloadedError: Too many searches are waiting.
        """
        check_query(query, instruction)
        key = (query, instruction)
        with self._lock:
            if key in self._queries:
                self._queries.move_to_end(key)
                return self._queries[key]
        started = time.perf_counter()
        vector: Vectors = self.embed([query], instruction=instruction)[0]
        with self._lock:
            self._embedding_ms.append((time.perf_counter() - started) * 1000)
            _keep(self._queries, key, vector, CACHED_QUERIES)
        return vector

    def search(
        self,
        store: FolderStore,
        query: str,
        *,
        instruction: str,
        count: int,
        sources: Sequence[str] = (),
        mode: str = MEANING,
    ) -> SearchResult:
        """Finds the best passages of a collection.

        Args:
            store: The collection.
            query: Text of the query.
            instruction: The task in words; empty for none.
            count: Maximum number of results.
            sources: Sources to search; all if empty.
            mode: One of `MODES`. Scores are cosines in all of them.

        Raises:
            InputError: The query is empty or too long, or the mode does not exist.
            ConfigError: The collection was made by another engine.
            OverloadedError: Too many searches are waiting.
        """
        if mode not in MODES:
            raise InputError(f"mode must be {', '.join(MODES[:-1])} or {MODES[-1]}, got {mode!r}")
        started = time.perf_counter()
        vector = self.embed_query(query, instruction)
        embedded = time.perf_counter()
        if mode == MEANING:
            hits = store.search(self.engine, vector, count=count, sources=sources)
        else:
            hits = self._by_words(store, query, vector, count, sources, mode)
        times = {"embedding": embedded - started, "searching": time.perf_counter() - embedded}
        return SearchResult(
            hits=hits,
            query=vector,
            milliseconds={name: round(seconds * 1000, 1) for name, seconds in times.items()},
        )

    def _by_words(
        self, store: FolderStore, query: str, vector: Vectors, count: int, sources: Sequence[str], mode: str
    ) -> list[Hit]:
        """Returns the passages that have words of the query, with `BOTH` fused with the nearest ones."""
        require_same_engine(store.engine, self.engine)
        allowed = store.rows_of(sources) if sources else None
        word_scores = self._words.scores(store, query)
        rows = best_rows(word_scores, allowed, max(count, FUSED))
        if mode == BOTH:
            nearest = store.search(self.engine, vector, count=max(count, FUSED), sources=sources)
            rows = np.union1d(rows, np.array([hit.row for hit in nearest], dtype=np.int64))
        cosines = store.vectors[rows] @ vector
        if mode == BOTH and len(rows):
            order = fuse(cosines, word_scores[rows])
            rows, cosines = rows[order], cosines[order]
        best = zip(rows[:count].tolist(), cosines[:count].tolist(), strict=True)
        return [Hit(store.passages[row], cosine, row) for row, cosine in best]

    def mark(self, store: FolderStore, query: Vectors, rows: Sequence[int]) -> list[list[tuple[str, bool]]]:
        """Splits passages into sentences and marks those nearest to the query.

        Returns:
            For each row the sentences of its text, which joined are the text, and whether each is marked. Vectors of
            sentences are kept, so that another query that finds the same passage needs none.
        """
        split_texts = [sentences(store.passages[row].text) for row in rows]
        keys = [(store.record.lineage, row) for row in rows]
        with self._lock:
            vectors = {key: self._sentences[key] for key in keys if key in self._sentences}
        missing = [index for index, key in enumerate(keys) if key not in vectors]
        compared = [
            sentence[:MAX_SENTENCE_CHARS] or " " for index in missing for sentence in split_texts[index][:MAX_SENTENCES]
        ]
        if compared:
            embedded = self.embed(compared)
            start = 0
            with self._lock:
                for index in missing:
                    size = len(split_texts[index][:MAX_SENTENCES])
                    vectors[keys[index]] = embedded[start : start + size]
                    start += size
                    _keep(self._sentences, keys[index], vectors[keys[index]], CACHED_PASSAGES)
        return [_marked(split_text, vectors[key] @ query) for split_text, key in zip(split_texts, keys, strict=True)]

    def known_threshold(self, store: FolderStore, instruction: str) -> float | None:
        """Returns `threshold` if it was computed before."""
        with self._lock:
            return self._thresholds.get((store.identity, instruction))

    def threshold(self, store: FolderStore, instruction: str) -> float:
        """Returns the cosine below which a passage of a collection is not near to a query.

        That is what unrelated queries reach in this collection: the median of their best cosines, and some deviations
        more. The few of them that a collection does answer do not move a median.
        """
        key = (store.identity, instruction)
        with self._lock:
            if key in self._thresholds:
                return self._thresholds[key]
            unrelated = self._unrelated.get(instruction)
        if unrelated is None:
            unrelated = self.embed(UNRELATED_QUERIES, instruction=instruction)
            self._unrelated[instruction] = unrelated
        best = np.full(len(unrelated), -1.0, np.float32)
        for start in range(0, len(store), 20_000):
            best = np.maximum(best, (store.vectors[start : start + 20_000] @ unrelated.T).max(axis=0))
        median = float(np.median(best))
        deviation = 1.4826 * float(np.median(np.abs(best - median)))
        threshold = median + NOISE_MADS * max(deviation, MIN_NOISE_MAD)
        with self._lock:
            _keep(self._thresholds, key, threshold, CACHED_QUERIES)
        return threshold

    def close(self) -> None:
        """Finishes the waiting searches and stops; later searches fail."""
        self._coalescer.close()

    def _rows(self, texts: Sequence[str], instruction: str) -> list[Any]:
        if instruction and not self.encoder.manifest.text.instruction_template:
            return list(self.encoder.tokenize(texts, prompt=self.encoder.query_prompt(instruction)))
        return list(self.encoder.tokenize(texts, instruction=instruction or None))


def _keep(cache: OrderedDict[Any, Any], key: Any, value: Any, size: int) -> None:
    """Stores a value in a cache, and removes the oldest one if there are too many."""
    cache[key] = value
    if len(cache) > size:
        cache.popitem(last=False)


def _marked(split_text: list[str], scores: Vectors) -> list[tuple[str, bool]]:
    """Marks the best sentences; those behind the compared ones have no score."""
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[:MAX_MARKS]
    marked = {index for index in best if scores[index] >= scores[best[0]] - MATCH_MARGIN}
    return [(sentence, index in marked) for index, sentence in enumerate(split_text)]


def check_query(query: str, instruction: str) -> None:
    """Checks the length of a query and its instruction.

    Raises:
        InputError: The query is empty, or one of them is too long.
    """
    if not query.strip():
        raise InputError("the query is empty; enter a search query")
    for name, text in (("query", query), ("instruction", instruction)):
        if len(text) > MAX_QUERY_CHARS:
            raise InputError(f"the {name} has {len(text)} characters; the maximum is {MAX_QUERY_CHARS}")


def sentences(text: str) -> list[str]:
    """Splits a text into up to `MAX_SENTENCES` sentences and the remainder; joined they are the text."""
    ends = [match.end() for match in SENTENCE.finditer(text)][:MAX_SENTENCES]
    split_text = [text[start:end] for start, end in pairwise([0, *ends])]
    return [*split_text, text[ends[-1] :]] if ends and ends[-1] < len(text) else split_text or [text]
