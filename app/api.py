"""The page's API for programs: the functions that `gradio_client` calls."""

from __future__ import annotations

from typing import Any

from nvembed_deploy import DeployError
from nvembed_deploy.app.compare import Comparer
from nvembed_deploy.app.library import PYTHON
from nvembed_deploy.app.requests import ApiErrors, SearchRequest, default_instruction, refusal
from nvembed_deploy.app.results import Results
from nvembed_deploy.app.search import MEANING


class Api:
    """Searches, lists collections and compares engines, for programs.

    Args:
        results: Answers the searches.
        comparer: Compares engines.
    """

    def __init__(self, results: Results, comparer: Comparer) -> None:
        self._results, self._comparer = results, comparer
        self._library = results.library

    def search(
        self,
        query: str,
        instruction: str | None = None,
        count: int = 5,
        collection: str = PYTHON,
        sources: list[str] | None = None,
        mode: str = MEANING,
    ) -> list[dict[str, Any]]:
        """Returns the nearest passages, for programs, with their cosine and whether it is near for this collection.

        Without an instruction the collection's own is used, as in the page; an empty one means none.
        """
        if not all(isinstance(text, str) for text in (query, collection)) or not isinstance(instruction, str | None):
            raise refusal("query, instruction and collection must be strings")
        data = {"collection": collection, "query": query, "instruction": instruction, "count": count}
        with ApiErrors():
            request = SearchRequest.parse(data | {"sources": sources, "mode": mode}, self._library)
            hits, _ = self._results.hits(request)
            threshold = self._results.searcher.threshold(request.store, request.instruction)
        return [
            {
                "title": hit.passage.label,
                "source": hit.passage.source,
                "place": hit.passage.place,
                "id": hit.passage.record_id,
                "link": hit.passage.link,
                "text": hit.passage.text,
                "score": hit.score,
                "near": hit.score >= threshold,
            }
            for hit in hits
        ]

    def collections(self) -> list[dict[str, Any]]:
        """Returns the collections, for programs, with their sources and the instruction of their queries."""
        collections = []
        for state in self._library.states():
            sources: list[str] = []
            is_searchable = state.is_usable
            if is_searchable:
                try:
                    sources = self._library.open(state.name).sources()
                except DeployError:  # damaged, or deleted since it was listed
                    is_searchable = False
            collections.append(
                {
                    "name": state.name,
                    "passages": state.rows,
                    "sources": sources,
                    "instruction": default_instruction(state.name),
                    "searchable": is_searchable,
                    "complete": state.is_complete,
                }
            )
        return collections

    def compare(
        self, query: str, left: str, right: str, collection: str = PYTHON, instruction: str | None = None
    ) -> dict[str, Any]:
        """Returns two engines' rankings of the same passages, for programs."""
        data = {"collection": collection, "query": query, "instruction": instruction}
        with ApiErrors():
            comparison = self._comparer.compare(SearchRequest.parse(data, self._library), left, right)
        return comparison.as_json()
