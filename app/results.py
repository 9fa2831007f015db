"""The answer to a search as the page shows it: hits, marks, filters, one passage, and the results as CSV."""

from __future__ import annotations

import csv
import io
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nvembed_deploy import InputError
from nvembed_deploy.app import cards
from nvembed_deploy.app.library import Library
from nvembed_deploy.app.requests import SearchRequest, checked_row, require_current, text_field
from nvembed_deploy.app.search import MAX_RESULTS, MEANING, Searcher
from nvembed_deploy.app.store import Hit

FACET_HITS, MAX_FACETS = 100, 8
"""Number of best passages whose sources are counted, and of sources that are offered as filters."""
LIVE_MS = 50.0
"""The page searches while a query is typed if the engine embeds one in less than this."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
CSV_COLUMNS = (
    "query",
    "collection",
    "instruction",
    "rank",
    "cosine",
    "source",
    "place",
    "id",
    "title",
    "link",
    "text",
)


def safe_cell(text: str) -> str:
    """Returns a CSV cell that no spreadsheet evaluates as a formula."""
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


class Results:
    """Answers the searches of visitors and programs.

    Args:
        searcher: Searches with the engine.
        library: The collections.
    """

    def __init__(self, searcher: Searcher, library: Library) -> None:
        self.searcher, self.library = searcher, library

    @property
    def is_live(self) -> bool:
        """Whether the engine is fast enough to search while a query is typed."""
        query_ms = self.searcher.query_ms
        return query_ms is not None and query_ms < LIVE_MS

    def hits(self, request: SearchRequest) -> tuple[list[Hit], dict[str, float]]:
        """Returns the best passages, and the time of each step in milliseconds."""
        store = request.store
        if request.similar is None:
            result = self.searcher.search(
                store,
                request.query,
                instruction=request.instruction,
                count=request.count,
                sources=request.sources,
                mode=request.mode,
            )
            return result.hits, result.milliseconds
        vector = store.vectors[request.similar]
        hits = store.search(self.searcher.engine, vector, count=request.count + 1, sources=request.sources)
        return [hit for hit in hits if hit.row != request.similar][: request.count], {}

    def search(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the best passages, without marks, which `marks` gives later."""
        started = time.perf_counter()
        request = SearchRequest.parse(data, self.library, drop_unknown=True)
        store, collection, query = request.store, request.collection, request.query.strip()
        best, times = self.hits(replace(request, count=max(request.count, FACET_HITS)))
        hits = best[: request.count]
        threshold = None
        # A passage with the query's words is no chance, and a passage is near to itself.
        if request.mode == MEANING and request.similar is None:
            threshold = self.searcher.known_threshold(store, request.instruction)
        passages = cards.plural(len(store), "passage")
        if request.similar is not None:
            summary = f"{len(hits)} of {passages} in {collection} like “{store.passages[request.similar].label}”"
        else:
            summary = f"{len(hits)} of {passages} in {collection} for “{query}”"
        nothing = f"No passage of {collection} has these words"
        if hits:
            nothing = (
                f"Nothing near “{query}” in {collection}: the closest of {passages} are no nearer than to unrelated "
                "queries"
            )
        return {
            "html": cards.results(hits, threshold=threshold),
            "summary": summary,
            "rows": [hit.row for hit in hits],
            "identity": store.identity,
            "lineage": store.record.lineage,
            "sources": request.sources,
            "facets": self._facets(request, best),
            "far": not hits or (threshold is not None and all(hit.score < threshold for hit in hits)),
            "nothing": nothing,
            "times": {**times, "server": round((time.perf_counter() - started) * 1000, 1)},
            "live": self.is_live,
        }

    def _facets(self, request: SearchRequest, best: list[Hit]) -> list[tuple[str, int]]:
        """Returns the sources of the best passages with their number, those chosen first; none if there is only one."""
        chosen = request.sources
        if chosen:  # those that could be chosen besides
            best = self.hits(replace(request, sources=[], count=FACET_HITS))[0]
        counts = Counter(hit.passage.source for hit in best)
        names = [*chosen, *(name for name, _ in counts.most_common() if name not in chosen)][:MAX_FACETS]
        return [(name, counts[name]) for name in names] if len(names) > 1 or chosen else []

    def marks(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the snippets of found passages with their best sentences marked, and which ones are near at all."""
        request = SearchRequest.parse(data, self.library, drop_unknown=True)
        store, rows = request.store, data.get("rows")
        require_current(store, data)
        if not isinstance(rows, list) or len(rows) > MAX_RESULTS:
            raise InputError("rows must be a list of row numbers")
        for row in rows:
            checked_row(store, row)
        vector = self.searcher.embed_query(request.query, request.instruction)
        marked = self.searcher.mark(store, vector, rows)
        threshold = self.searcher.threshold(store, request.instruction) if request.mode == MEANING else -1.0
        scores = store.vectors[rows] @ vector
        return {
            "marks": [
                [
                    row,
                    cards.snippet(sentences),
                    cards.whole(store.passages[row].prefix, sentences),
                    bool(score < threshold),
                ]
                for row, sentences, score in zip(rows, marked, scores, strict=True)
            ],
            "far": bool((scores < threshold).all()),
        }

    def export(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the results of a search as CSV, with their query, collection and instruction in every row."""
        request = SearchRequest.parse(data, self.library, drop_unknown=True)
        query, instruction = request.query, request.instruction
        if request.similar is not None:
            query, instruction = f"like: {request.store.passages[request.similar].label}", ""
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for rank, hit in enumerate(self.hits(request)[0], 1):
            passage = hit.passage
            cells = (passage.source, passage.place, passage.record_id, passage.title, passage.link, passage.text)
            about = map(safe_cell, (query, request.collection, instruction))
            writer.writerow([*about, rank, f"{hit.score:.6f}", *map(safe_cell, cells)])
        return {"csv": file.getvalue()}

    def passage(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the card of one passage, which the map opens."""
        store = self.library.open(text_field(data, "collection"))
        require_current(store, data)
        row = checked_row(store, data.get("row"))
        return {"html": cards.passage_card(store.passages[row], row)}
