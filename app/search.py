"""Search: from a query to its vector, the nearest passages, the best sentences, and the time of each step."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nvembed_deploy import Coalescer, Encoder
from nvembed_deploy.app.index import Vectors
from nvembed_deploy.app.store import Engine, FolderStore, Hit
from nvembed_deploy.errors import InputError
from nvembed_deploy.tokenization import TokenRow

MAX_QUERY_CHARS = 2000
"""Maximum length of a query; the limit in the page is not enforced on the server."""
MAX_RESULTS = 20
SENTENCE = re.compile(r".+?(?:[.!?](?=\s)\s*|\n\s*\n\s*|\Z)", re.DOTALL)
MAX_SENTENCES = 10
"""Maximum number of sentences of a passage that are compared; the remainder of a long passage is not marked."""
MATCH_MARGIN = 0.03
"""Sentences within this cosine of the best one are marked as well."""
MATCH = "match"
MAX_SENTENCE_CHARS = 300
"""Maximum number of characters of a sentence that are compared."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Passages that a search found, with marked sentences and timings."""

    hits: list[Hit]
    marked: list[list[tuple[str, str | None]]]
    """Text of each hit in sentences; the best ones are labelled `MATCH`."""
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

    def embed(self, texts: Sequence[str], *, instruction: str = "") -> Vectors:
        """Embeds texts, batched with those of other threads; returns float32 [N, D]."""
        return self._coalescer.submit(self._rows(texts, instruction)).result()

    def search(
        self, store: FolderStore, query: str, *, instruction: str, count: int, sources: Sequence[str] = ()
    ) -> SearchResult:
        """Finds the nearest passages of a collection.

        Args:
            store: The collection.
            query: Text of the query.
            instruction: The task in words; empty for none.
            count: Maximum number of results.
            sources: Sources to search; all if empty.

        Raises:
            InputError: The query is empty or too long.
            ConfigError: The collection was made by another engine.
            OverloadedError: Too many searches are waiting.
        """
        check_query(query, instruction)
        started = time.perf_counter()
        rows = self._rows([query], instruction)
        tokenized = time.perf_counter()
        vector = self._coalescer.submit(rows).result()[0]
        embedded = time.perf_counter()
        hits = store.search(self.engine, vector, count=max(1, min(count, MAX_RESULTS)), sources=sources)
        searched = time.perf_counter()
        marked = self.mark(vector, [hit.passage.text for hit in hits])
        ended = time.perf_counter()
        times = {
            "tokenizing": tokenized - started,
            "embedding": embedded - tokenized,
            "searching": searched - embedded,
            "marking": ended - searched,
        }
        return SearchResult(
            hits=hits,
            marked=marked,
            query=vector,
            milliseconds={name: round(seconds * 1000, 1) for name, seconds in times.items()},
        )

    def mark(self, query: Vectors, texts: Sequence[str]) -> list[list[tuple[str, str | None]]]:
        """Splits texts into sentences and marks those nearest to the query."""
        text_sentences = [sentences(text) for text in texts]
        compared = [
            sentence[:MAX_SENTENCE_CHARS] for split_text in text_sentences for sentence in split_text[:MAX_SENTENCES]
        ]
        if not compared:
            return [[(text, None)] for text in texts]
        scores = self.embed(compared) @ query
        marked: list[list[tuple[str, str | None]]] = []
        start = 0
        for split_text in text_sentences:
            scored, remainder = split_text[:MAX_SENTENCES], split_text[MAX_SENTENCES:]
            text_scores = scores[start : start + len(scored)]
            start += len(scored)
            min_score = float(np.max(text_scores, initial=-2.0)) - MATCH_MARGIN
            labelled = [
                (sentence, MATCH if score >= min_score else None)
                for sentence, score in zip(scored, text_scores, strict=True)
            ]
            marked.append(labelled + [(sentence, None) for sentence in remainder])
        return marked

    def close(self) -> None:
        """Finishes the waiting searches and stops; later searches fail."""
        self._coalescer.close()

    def _rows(self, texts: Sequence[str], instruction: str) -> list[TokenRow]:
        if instruction and not self.encoder.manifest.text.instruction_template:
            return self.encoder.tokenize(texts, prompt=self.encoder.query_prompt(instruction))
        return self.encoder.tokenize(texts, instruction=instruction or None)


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
