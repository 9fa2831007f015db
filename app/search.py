"""One search: query to vector to passages, the sentences that match best, and the time of each step."""

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

LONGEST_QUERY = 2000
"""Characters; the page's own limit is not enforced on the server."""
MOST_RESULTS = 20
SENTENCE = re.compile(r".+?(?:[.!?](?=\s)\s*|\n\s*\n\s*|\Z)", re.DOTALL)
MOST_SENTENCES = 10
"""Of a passage that are looked at; the rest of a long one stays unmarked."""
NEAR = 0.03
"""Sentences this near to the best one's cosine are marked as well."""
MATCH = "match"
LONGEST_SENTENCE = 300
"""Characters of a sentence that are looked at."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The answer to one search."""

    hits: list[Hit]
    marked: list[list[tuple[str, str | None]]]
    """For each hit its text in parts, those that match best with `MATCH`."""
    query: Vectors
    milliseconds: dict[str, float]


class Searcher:
    """Searches of many users through one engine.

    Args:
        encoder: Of the bundle.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.engine = encoder, Engine.of(encoder)
        self._coalescer = Coalescer(encoder)

    def embed(self, texts: Sequence[str], *, instruction: str = "") -> Vectors:
        """float32 [N, D]; runs together with what other threads ask for."""
        return self._coalescer.submit(self._rows(texts, instruction)).result()

    def search(
        self, store: FolderStore, query: str, *, instruction: str, count: int, sources: Sequence[str] = ()
    ) -> Found:
        """Finds passages.

        Args:
            store: Where to look.
            query: What is asked.
            instruction: The task in words; empty for none.
            count: Most results.
            sources: Only of these; of all where empty.

        Raises:
            InputError: The query is empty or too long.
            ConfigError: The store's vectors are of another engine.
            OverloadedError: Too many searches wait.
        """
        check_query(query, instruction)
        started = time.perf_counter()
        rows = self._rows([query], instruction)
        tokenized = time.perf_counter()
        vector = self._coalescer.submit(rows).result()[0]
        embedded = time.perf_counter()
        hits = store.search(self.engine, vector, count=max(1, min(count, MOST_RESULTS)), sources=sources)
        searched = time.perf_counter()
        marked = self.mark(vector, [hit.passage.text for hit in hits])
        ended = time.perf_counter()
        times = {
            "tokenizing": tokenized - started,
            "embedding": embedded - tokenized,
            "searching": searched - embedded,
            "marking": ended - searched,
        }
        return Found(
            hits=hits,
            marked=marked,
            query=vector,
            milliseconds={name: round(seconds * 1000, 1) for name, seconds in times.items()},
        )

    def mark(self, query: Vectors, texts: Sequence[str]) -> list[list[tuple[str, str | None]]]:
        """Cuts texts into sentences, and marks those nearest to the query."""
        parts = [sentences(text) for text in texts]
        flat = [part[:LONGEST_SENTENCE] for found in parts for part in found[:MOST_SENTENCES]]
        if not flat:
            return [[(text, None)] for text in texts]
        scores = self.embed(flat) @ query
        marked: list[list[tuple[str, str | None]]] = []
        start = 0
        for found in parts:
            looked_at, rest = found[:MOST_SENTENCES], found[MOST_SENTENCES:]
            own = scores[start : start + len(looked_at)]
            start += len(looked_at)
            bound = float(np.max(own, initial=-2.0)) - NEAR
            near = [(part, MATCH if score >= bound else None) for part, score in zip(looked_at, own, strict=True)]
            marked.append(near + [(part, None) for part in rest])
        return marked

    def close(self) -> None:
        """Ends the shared batches."""
        self._coalescer.close()

    def _rows(self, texts: Sequence[str], instruction: str) -> list[TokenRow]:
        if instruction and not self.encoder.manifest.text.instruction_template:
            return self.encoder.tokenize(texts, prompt=self.encoder.query_prompt(instruction))
        return self.encoder.tokenize(texts, instruction=instruction or None)


def check_query(query: str, instruction: str) -> None:
    """Refuses what cannot be searched.

    Raises:
        InputError: With the cure.
    """
    if not query.strip():
        raise InputError("the query is empty; type what you look for")
    for name, text in (("query", query), ("instruction", instruction)):
        if len(text) > LONGEST_QUERY:
            raise InputError(f"the {name} has {len(text)} characters, at most {LONGEST_QUERY} are taken; shorten it")


def sentences(text: str) -> list[str]:
    """The text in parts that join to it again, `MOST_SENTENCES` and the rest at most."""
    ends = [found.end() for found in SENTENCE.finditer(text)][:MOST_SENTENCES]
    parts = [text[start:end] for start, end in pairwise([0, *ends])]
    return [*parts, text[ends[-1] :]] if ends and ends[-1] < len(text) else parts or [text]
