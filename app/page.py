"""The search page: functions that the page's script calls on the server, and the API for programs.

The page is one HTML component. Its script (page.js) sends what a visitor does to the functions here, one at a time for
each kind, and shows only the answer to the last one; the HTML of an answer is made by `cards`.
"""

from __future__ import annotations

import csv
import html
import io
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from nvembed_deploy import DeployError, Encoder, InputError
from nvembed_deploy.app import cards
from nvembed_deploy.app.compare import compare
from nvembed_deploy.app.documents import Limits
from nvembed_deploy.app.engine_view import engine_view
from nvembed_deploy.app.jobs import Jobs
from nvembed_deploy.app.library import PYTHON, CollectionState, Library
from nvembed_deploy.app.plane import Plane, draw
from nvembed_deploy.app.readers import READERS
from nvembed_deploy.app.search import MAX_QUERY_CHARS, MAX_RESULTS, MEANING, Searcher
from nvembed_deploy.app.store import FolderStore, Hit

PYTHON_INSTRUCTION = "Given a question about Python, retrieve documentation that answers the question"
DEFAULT_INSTRUCTION = "Given a question, retrieve passages that answer the question"
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
DEFAULT_RESULTS = 10
FACET_HITS, MAX_FACETS = 100, 8
"""Number of best passages whose sources are counted, and of sources that are offered as filters."""
LIVE_MS = 50.0
"""The page searches while a query is typed if the engine embeds one in less than this."""
HOUR = 3600
"""Seconds for which uploaded files are kept."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
FOLDER = Path(__file__).parent
_log = logging.getLogger(__name__)


def safe_cell(text: str) -> str:
    """Returns a CSV cell that no spreadsheet evaluates as a formula."""
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def default_instruction(collection: str) -> str:
    """Returns the instruction of a collection's queries where none is given."""
    return PYTHON_INSTRUCTION if collection == PYTHON else DEFAULT_INSTRUCTION


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
        self._engines, self._has_login = dict(engines), has_login
        self._opened: dict[str, Encoder] = {}
        self._planes: dict[str, tuple[str, Plane]] = {}
        """Map of each collection by name, with the identity of the content that it was made from."""
        self._opening = threading.Lock()

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
            self.search,
            self.marks,
            self.export,
            self.add,
            self.cancel,
            self.delete,
            self.compare,
            self.map,
            self.passage,
        )
        with gr.Blocks(title="Semantic search", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
            gr.HTML(
                html_template=self._template(),
                js_on_load=asset("page.js"),
                apply_default_css=False,
                elem_id="page",
                server_functions=[_server_function(function) for function in functions],
            )
            gr.api(self.api_search, api_name="search", concurrency_limit=8, concurrency_id="engine")
            gr.api(self.api_collections, api_name="collections")
            gr.api(self.api_compare, api_name="compare", concurrency_limit=1)
        return page

    def _template(self) -> str:
        """Returns the page's HTML with what does not change while it runs."""
        options = "".join(f"<option>{cards.escape(name)}</option>" for name in self._engines)
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
        owner, collection = _text(data, "client"), _text(data, "collection")
        jobs = self.jobs.all()
        states = self.library.states()
        names = [state.name for state in states]
        chosen = collection if collection in names else next(iter(names), PYTHON)
        active = [job for job in jobs if job.is_active and job.collection == chosen]
        query_ms = self.searcher.query_ms
        return {
            "collections": [self._collection(state) for state in states],
            "chosen": chosen,
            "files": self._files(chosen),
            "jobs": cards.jobs(jobs, owner),
            "busy": any(job.is_active for job in jobs),
            "growing": f"{chosen}: {cards.progress_line(active[0])}" if active else "",
            "failed": next((job.message for job in jobs if job.state == "failed" and job.collection == PYTHON), ""),
            "live": query_ms is not None and query_ms < LIVE_MS,
        }

    def _collection(self, state: CollectionState) -> dict[str, Any]:
        detail = cards.plural(state.rows, "passage")
        if not state.is_usable:
            detail = f"of another engine: {state.engine}"
        return {
            "name": state.name,
            "label": f"{state.name} ({detail})",
            "rows": state.rows,
            "identity": state.identity,
            "usable": state.is_usable,
            "instruction": default_instruction(state.name),
        }

    def _files(self, collection: str) -> str:
        entries = self.library.files(collection)
        if collection == PYTHON:
            return cards.files(entries, unnamed=0, can_delete=False)
        state = next((state for state in self.library.states() if state.name == collection), None)
        unnamed = 0 if state is None else state.rows - sum(entry.rows for entry in entries)
        return cards.files(entries, unnamed=unnamed, can_delete=True)

    def _request(self, data: Mapping[str, Any]) -> tuple[FolderStore, str, str, list[str], int]:
        """Returns the collection, query, instruction, sources and count that a search names."""
        collection = _text(data, "collection")
        instruction = data.get("instruction")
        if not isinstance(instruction, str):
            instruction = default_instruction(collection)
        sources = data.get("sources") or []
        count = data.get("count", DEFAULT_RESULTS)
        if not (isinstance(sources, list) and all(isinstance(source, str) for source in sources)):
            raise InputError("sources must be a list of names")
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_RESULTS:
            raise InputError(f"count must be a whole number from 1 to {MAX_RESULTS}, got {count!r}")
        store = self.library.open(collection)
        if unknown := set(sources) - set(store.sources()):
            raise InputError(f"there is no source {min(unknown)!r} in {collection!r}")
        return store, _text(data, "query"), instruction, sources, count

    def _hits(self, data: Mapping[str, Any]) -> tuple[FolderStore, list[Hit], dict[str, float]]:
        store, query, instruction, sources, count = self._request(data)
        row = data.get("similar")
        if row is None:
            mode = _text(data, "mode") or MEANING
            result = self.searcher.search(
                store, query, instruction=instruction, count=count, sources=sources, mode=mode
            )
            return store, result.hits, result.milliseconds
        self._require_current(store, data)
        if not isinstance(row, int) or not 0 <= row < len(store):
            raise InputError("there is no such passage; search again")
        hits = store.search(self.searcher.engine, store.vectors[row], count=count + 1, sources=sources)
        return store, [hit for hit in hits if hit.row != row][:count], {}

    def _require_current(self, store: FolderStore, data: Mapping[str, Any]) -> None:
        if store.record.lineage != data.get("lineage"):
            raise InputError("the collection has changed in the meantime; search again")

    def search(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the nearest passages, without marks, which `marks` gives later."""
        started = time.perf_counter()
        _, query, instruction, _, count = self._request(data)
        store, best, times = self._hits({**data, "count": max(count, FACET_HITS)})
        collection, hits = _text(data, "collection"), best[:count]
        is_by_meaning = data.get("mode", MEANING) == MEANING  # a passage with the query's words is no chance
        threshold = self.searcher.known_threshold(store, instruction) if is_by_meaning else None
        summary = f"{len(hits)} of {cards.plural(len(store), 'passage')} in {collection}"
        if (row := data.get("similar")) is not None:
            summary += f" like “{store.passages[row].label}”"
        else:
            summary += f" for “{query.strip()}”"
        return {
            "html": cards.results(hits, threshold=threshold if data.get("similar") is None else None),
            "summary": summary,
            "rows": [hit.row for hit in hits],
            "identity": store.identity,
            "lineage": store.record.lineage,
            "facets": self._facets(data, best),
            "far": not hits or (threshold is not None and all(hit.score < threshold for hit in hits)),
            "nothing": self._nothing(store, query, collection)
            if hits
            else f"No passage of {collection} has these words",
            "times": {**times, "server": round((time.perf_counter() - started) * 1000, 1)},
            "live": (self.searcher.query_ms or LIVE_MS) < LIVE_MS,
        }

    def _facets(self, data: Mapping[str, Any], best: list[Hit]) -> list[tuple[str, int]]:
        """Returns the sources of the best passages with their number, those chosen first; none if there is only one."""
        chosen = data.get("sources") or []
        if chosen:  # those that could be chosen besides
            best = self._hits({**data, "sources": [], "count": FACET_HITS})[1]
        counts = Counter(hit.passage.source for hit in best)
        names = [*chosen, *(name for name, _ in counts.most_common() if name not in chosen)][:MAX_FACETS]
        return [(name, counts[name]) for name in names] if len(names) > 1 or chosen else []

    def _nothing(self, store: FolderStore, query: str, collection: str) -> str:
        return (
            f"Nothing near “{query.strip()}” in {collection}: the closest of "
            f"{cards.plural(len(store), 'passage')} are no nearer than to unrelated queries"
        )

    def marks(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the snippets of found passages with their best sentences marked, and which ones are near at all."""
        store, query, instruction, _, _ = self._request(data)
        self._require_current(store, data)
        rows = data.get("rows")
        if not isinstance(rows, list) or len(rows) > MAX_RESULTS:
            raise InputError("rows must be a list of row numbers")
        if not all(isinstance(row, int) and 0 <= row < len(store) for row in rows):
            raise InputError("there is no such passage; search again")
        vector = self.searcher.embed_query(query, instruction)
        marked = self.searcher.mark(store, vector, rows)
        is_by_meaning = data.get("mode", MEANING) == MEANING
        threshold = self.searcher.threshold(store, instruction) if is_by_meaning else -1.0
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
        store, hits, _ = self._hits(data)
        _, query, instruction, _, _ = self._request(data)
        if (row := data.get("similar")) is not None:
            query, instruction = f"like: {store.passages[row].label}", ""
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        columns = (
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
        writer.writerow(columns)
        for rank, hit in enumerate(hits, 1):
            passage = hit.passage
            request = [safe_cell(text) for text in (query, _text(data, "collection"), instruction)]
            cells = (passage.source, passage.place, passage.record_id, passage.title, passage.link, passage.text)
            writer.writerow([*request, rank, f"{hit.score:.6f}", *map(safe_cell, cells)])
        return {"csv": file.getvalue()}

    def passage(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the card of one passage, which the map opens."""
        store = self.library.open(_text(data, "collection"))
        self._require_current(store, data)
        row = data.get("row")
        if not isinstance(row, int) or not 0 <= row < len(store):
            raise InputError("there is no such passage; draw the map again")
        passage = store.passages[row]
        return {"title": passage.label, "source": passage.source, "html": cards.whole("", [(passage.text, False)])}

    def add(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Starts to add uploaded files to a collection."""
        paths = data.get("paths")
        if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
            raise InputError("no files are chosen; choose files to add")
        folder = Path(get_upload_folder()).resolve()
        resolved = [Path(path).resolve() for path in paths]
        if not all(path.is_relative_to(folder) for path in resolved):
            raise InputError("only uploaded files can be added")
        job = self.jobs.add_files(_text(data, "collection").strip(), resolved, _text(data, "client"))
        return {"job": job.number}

    def cancel(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Stops an upload of this visitor."""
        number = data.get("job")
        self.jobs.cancel(number if isinstance(number, int) else -1, _text(data, "client"))
        return {}

    def delete(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Deletes a collection, or one of its files."""
        collection = _text(data, "collection")
        if data.get("file") is None:
            self.library.delete(collection)
            return {"message": f"{collection} was deleted"}
        self.library.delete_file(collection, _text(data, "file"))
        return {"message": f"{_text(data, 'file')} was deleted from {collection}"}

    def compare(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns two rankings of the same passages."""
        store, query, instruction, _, _ = self._request(data)
        left, right = _text(data, "left"), _text(data, "right")
        comparison = compare(
            self.searcher,
            store,
            self._compare_engine(left),
            self._compare_engine(right),
            query,
            instruction=instruction,
        )
        return {"html": cards.comparison(comparison, left, right, instruction)}

    def _compare_engine(self, name: str) -> Encoder:
        with self._opening:
            if name not in self._opened:
                if name not in self._engines:
                    raise InputError(f"there is no engine {name!r}; available: {', '.join(self._engines)}")
                self._opened[name] = self._engines[name]()
            return self._opened[name]

    def map(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the map of a collection with the last results, if they are of its present content."""
        collection = _text(data, "collection")
        store = self.library.open(collection)
        identity, plane = self._planes.get(collection, ("", None))
        if plane is None or identity != store.identity:
            plane = Plane.of(store.vectors)
            self._planes[collection] = (store.identity, plane)
        rows, query = data.get("rows"), _text(data, "query")
        hits = [row for row in rows if isinstance(row, int) and 0 <= row < len(store)] if isinstance(rows, list) else []
        if data.get("lineage") != store.record.lineage:
            hits = []
        vector = None
        if query.strip() and store.engine == self.searcher.engine:  # vectors of different engines are not comparable
            vector = self.searcher.embed_query(query, self._request(data)[2])
        return {**draw(store, plane, hits[:MAX_RESULTS], vector), "lineage": store.record.lineage, "total": len(store)}

    def api_search(
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
            raise _refusal("query, instruction and collection must be strings")
        data = {"collection": collection, "query": query, "instruction": instruction, "count": count}
        with _ApiErrors():
            store, hits, _ = self._hits(data | {"sources": sources, "mode": mode})
            threshold = self.searcher.threshold(store, self._request(data)[2])
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

    def api_collections(self) -> list[dict[str, Any]]:
        """Returns the collections, for programs, with their sources and the instruction of their queries."""
        collections = []
        for state in self.library.states():
            with _ApiErrors():
                sources = self.library.open(state.name).sources() if state.is_usable else []
            collections.append(
                {
                    "name": state.name,
                    "passages": state.rows,
                    "sources": sources,
                    "instruction": default_instruction(state.name),
                    "searchable": state.is_usable,
                    "complete": state.is_complete,
                }
            )
        return collections

    def api_compare(
        self, query: str, left: str, right: str, collection: str = PYTHON, instruction: str | None = None
    ) -> dict[str, Any]:
        """Returns two engines' rankings of the same passages, for programs."""
        data = {"collection": collection, "query": query, "instruction": instruction}
        with _ApiErrors():
            store, _, used_instruction, _, _ = self._request(data)
            comparison = compare(
                self.searcher,
                store,
                self._compare_engine(left),
                self._compare_engine(right),
                query,
                instruction=used_instruction,
            )
        return vars(comparison)


def _text(data: Mapping[str, Any], name: str) -> str:
    """Returns a text field of a call, empty if it is missing.

    Raises:
        InputError: It is no text.
    """
    value = data.get(name, "")
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string")
    return value


def _server_function(function: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Makes a method callable by the page's script; an expected error is an answer with one sentence."""

    def call(data: Any) -> dict[str, Any]:
        try:
            return function(data if isinstance(data, dict) else {})
        except DeployError as err:
            return {"error": str(err)}
        except OSError as err:
            return {"error": f"{err.strerror or err}: the server could not read or write a file; check its disk"}

    call.__name__ = function.__name__
    return call


def _refusal(message: str) -> gr.Error:
    """Returns an error for a program; escaped, since Gradio's own pages render messages as HTML."""
    return gr.Error(html.escape(message, quote=False), print_exception=False)


class _ApiErrors:
    """Converts expected errors to those that a program gets, in one sentence."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, err: BaseException | None, __: Any) -> None:
        if isinstance(err, DeployError):
            raise _refusal(str(err)) from err
        if isinstance(err, OSError):
            raise _refusal(f"{err.strerror or err}: the server could not read or write a file; check its disk") from err
