"""The search page: its HTML, and the functions that its script calls on the server.

The page is one HTML component. Its script (page.js and the files beside it) sends what a visitor does to the functions
here, one at a time for each kind, and shows only the answer to the last one; `cards` makes the HTML of an answer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from nvembed_deploy import DeployError, Encoder, InputError
from nvembed_deploy.app import cards
from nvembed_deploy.app.api import Api
from nvembed_deploy.app.compare import Comparer
from nvembed_deploy.app.compare_view import compare_view
from nvembed_deploy.app.documents import Limits
from nvembed_deploy.app.engine_view import engine_view
from nvembed_deploy.app.jobs import Jobs
from nvembed_deploy.app.library import PYTHON, CollectionState, Library
from nvembed_deploy.app.plane import Maps, draw
from nvembed_deploy.app.readers import READERS
from nvembed_deploy.app.requests import (
    DEFAULT_INSTRUCTION,
    PYTHON_INSTRUCTION,
    SearchRequest,
    default_instruction,
    server_function,
    text_field,
)
from nvembed_deploy.app.results import Results
from nvembed_deploy.app.search import MAX_QUERY_CHARS, MAX_RESULTS, Searcher

PRESETS = {
    "Questions": DEFAULT_INSTRUCTION,
    "Questions about Python": PYTHON_INSTRUCTION,
    "Claims": "Given a claim, find documents that refute the claim",
    "Similar texts": "Retrieve semantically similar text.",
    "No instruction": "",
}
EXAMPLES = (
    "how do I read a CSV file?",
    "run a command and capture its output",
    "wait for several coroutines at once",
    "compress data with gzip",
    "what does the with statement do?",
)
SCRIPTS = ("page.js", "search.js", "documents.js", "compare.js", "map.js", "start.js")
"""Files of the page's script, which are one function."""
HOUR = 3600
"""Seconds for which uploaded files are kept."""
FOLDER = Path(__file__).parent
_log = logging.getLogger(__name__)


@cache
def asset(name: str) -> str:
    """Returns a file of the page."""
    return (FOLDER / name).read_text(encoding="utf-8")


class Page:
    """The page for one engine and its collections.

    Args:
        searcher: Searches with the engine.
        library: The collections.
        engines: Functions that open the engines of the Compare view, by name; called at first use.
        limits: Limits of an upload.
        has_login: Whether visitors log in, so that they can log out.
    """

    def __init__(
        self,
        searcher: Searcher,
        library: Library,
        engines: Mapping[str, Callable[[], Encoder]],
        limits: Limits | None = None,
        *,
        has_login: bool = False,
    ) -> None:
        self.searcher, self.library, self.limits = searcher, library, limits or Limits()
        self.jobs = Jobs(library, self.limits)
        self.results, self.comparer = Results(searcher, library), Comparer(searcher, engines)
        self._has_login, self._maps = has_login, Maps()

    def start(self) -> None:
        """Starts to index Python's documentation and to prepare the first search, in the background."""
        self.jobs.add_python()
        threading.Thread(target=self._prepare, name="prepare", daemon=True).start()

    def _prepare(self) -> None:
        """Measures the engine's speed, and what unrelated queries reach, before somebody waits for it."""
        try:
            for text in EXAMPLES[:3]:
                self.searcher.embed_query(text, PYTHON_INSTRUCTION)
            if self.library.is_indexed(PYTHON):
                self.searcher.threshold(self.library.open(PYTHON), PYTHON_INSTRUCTION)
        except DeployError as err:
            _log.warning("the page's first search was not prepared: %s", err)

    def build(self) -> gr.Blocks:
        """Builds the page's component and its API."""
        functions = (
            self.state,
            self.results.search,
            self.results.marks,
            self.results.export,
            self.results.passage,
            self.add,
            self.cancel,
            self.delete,
            self.index_again,
            self.compare,
            self.map,
        )
        with gr.Blocks(title="Semantic search", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
            gr.HTML(
                html_template=self._template(),
                js_on_load="\n".join(map(asset, SCRIPTS)),
                apply_default_css=False,
                elem_id="page",
                server_functions=[server_function(function) for function in functions],
            )
            api = Api(self.results, self.comparer)
            gr.api(api.search, api_name="search", concurrency_limit=8, concurrency_id="engine")
            gr.api(api.collections, api_name="collections")
            gr.api(api.compare, api_name="compare", concurrency_limit=1)
        return page

    def _template(self) -> str:
        """Returns the page's HTML with what does not change while it runs."""
        options = "".join(f"<option>{cards.escape(name)}</option>" for name in self.comparer.names)
        presets = "".join(
            f'<option value="{cards.escape(text)}">{cards.escape(name)}</option>' for name, text in PRESETS.items()
        )
        examples = "".join(
            f'<li><button type="button" class="example">{cards.escape(text)}</button></li>' for text in EXAMPLES
        )
        values = {
            "ENGINES": options,
            "PRESETS": presets,
            "EXAMPLES": examples,
            "LOGOUT": '<a href="logout" id="logout">Log out</a>' if self._has_login else "",
            "ENGINE_VIEW": engine_view(self.searcher.encoder),
            "TYPES": ",".join(sorted([*READERS, ".zip"])),
            "TYPES_IN_WORDS": ", ".join(sorted([*READERS, ".zip"])),
            "LIMITS": cards.escape(str(self.limits)),
            "MAX_QUERY_CHARS": str(MAX_QUERY_CHARS),
        }
        template = asset("page.html")
        for name, value in values.items():
            # The component reads its HTML as a template too: no text of an engine may be a part of one.
            template = template.replace(f"<!--{name}-->", value.replace("{{", "{ {").replace("${", "$ {"))
        return template

    def state(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the page shows besides results: collections, files and uploads."""
        owner, collection = text_field(data, "client"), text_field(data, "collection")
        jobs = self.jobs.all()
        states = self.library.states()
        names = [state.name for state in states]
        chosen = collection if collection in names else next(iter(names), PYTHON)
        active = [job for job in jobs if job.is_active and job.collection == chosen]
        return {
            "collections": [self._collection(state) for state in states],
            "chosen": chosen,
            "files": self._files(chosen),
            "jobs": cards.jobs(jobs, owner),
            "busy": any(job.is_active for job in jobs),
            "growing": f"{chosen}: {cards.progress_line(active[0])}" if active else "",
            "failed": next((job.message for job in jobs if job.state == "failed" and job.collection == PYTHON), ""),
            "live": self.results.is_live,
        }

    def _collection(self, state: CollectionState) -> dict[str, Any]:
        passages = detail = cards.plural(state.rows, "passage")
        offer = ""
        if state.is_damaged:
            detail = "damaged"
        elif not state.is_usable:
            detail = f"of another engine: {state.engine}"
            offer = (
                f"{state.name} was made by another engine, {state.engine}, whose vectors cannot be compared with those "
                f"of this one, {self.library.engine.model} {self.library.engine.precision}. Its {passages} can be "
                "indexed again with this one; what the other engine has made is replaced."
            )
        return {
            "name": state.name,
            "label": f"{state.name} ({detail})",
            "rows": state.rows,
            "identity": state.identity,
            "damaged": state.is_damaged,
            "offer": offer,
            "instruction": default_instruction(state.name),
        }

    def _files(self, collection: str) -> str:
        entries = self.library.files(collection)
        if collection == PYTHON:
            return cards.files(entries, unnamed=0, can_delete=False)
        state = next((state for state in self.library.states() if state.name == collection), None)
        unnamed = 0 if state is None else state.rows - sum(entry.rows for entry in entries)
        return cards.files(entries, unnamed=unnamed, can_delete=True)

    def add(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Starts to add uploaded files to a collection."""
        paths = data.get("paths")
        if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
            raise InputError("no files are chosen; choose files to add")
        folder = Path(get_upload_folder()).resolve()
        resolved = [Path(path).resolve() for path in paths]
        if not all(path.is_relative_to(folder) for path in resolved):
            raise InputError("only uploaded files can be added")
        job = self.jobs.add_files(text_field(data, "collection").strip(), resolved, text_field(data, "client"))
        return {"job": job.number}

    def cancel(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Stops an upload of this visitor."""
        number = data.get("job")
        self.jobs.cancel(number if isinstance(number, int) else -1, text_field(data, "client"))
        return {}

    def delete(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Deletes a collection, or one of its files."""
        collection = text_field(data, "collection")
        if data.get("file") is None:
            self.library.delete(collection)
            return {"message": f"{collection} was deleted"}
        self.library.delete_file(collection, text_field(data, "file"))
        return {"message": f"{text_field(data, 'file')} was deleted from {collection}"}

    def index_again(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Starts to index a collection of another engine with this one."""
        job = self.jobs.index_again(text_field(data, "collection"), text_field(data, "client"))
        return {"job": job.number}

    def compare(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns two rankings of the same passages."""
        left, right = text_field(data, "left"), text_field(data, "right")
        request = SearchRequest.parse(data, self.library)
        return {"html": compare_view(self.comparer.compare(request, left, right), left, right, request.instruction)}

    def map(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the map of a collection with the last results, if they are of its present content.

        Without points if `version` is that of the points which would be returned.
        """
        request = SearchRequest.parse({**data, "similar": None, "sources": []}, self.library)
        store = request.store
        answer: dict[str, Any] = {"lineage": store.record.lineage, "total": len(store), "progress": None, "note": ""}
        if not len(store):
            return answer | {"points": [], "sources": [], "hits": [], "query": None, "version": store.identity}
        shown = self._maps.get(request.collection, store, is_growing=not self.library.is_indexed(request.collection))
        answer |= {"progress": shown.progress, "note": shown.reason, "version": shown.version}
        if data.get("version") == shown.version:
            return answer
        rows, hits = data.get("rows"), []
        if isinstance(rows, list) and data.get("lineage") == store.record.lineage:
            hits = [row for row in rows if isinstance(row, int) and 0 <= row < len(store)][:MAX_RESULTS]
        vector = None
        if request.query.strip() and store.engine == self.searcher.engine:  # vectors of two engines have no distance
            vector = self.searcher.embed_query(request.query, request.instruction)
        return answer | draw(store, shown, hits, vector)
