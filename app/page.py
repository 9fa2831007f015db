"""The search page, made of Gradio's components: texts of users and documents are shown as text, never as HTML."""

from __future__ import annotations

import csv
import html
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import pandas

from nvembed_deploy import DeployError, Encoder
from nvembed_deploy.app.compare import compare
from nvembed_deploy.app.documents import Limits, chunks, read_files
from nvembed_deploy.app.library import PYTHON, Library
from nvembed_deploy.app.passages import Passage
from nvembed_deploy.app.plane import OTHERS, QUERY, RESULT, Plane, draw
from nvembed_deploy.app.search import MATCH, MAX_QUERY_CHARS, MAX_RESULTS, Searcher, SearchResult
from nvembed_deploy.engines.show import lines
from nvembed_deploy.tokenization import DEFAULT_QUERY_INSTRUCTION

PRESETS = {
    "Questions about Python": "Given a question about Python, retrieve documentation that answers the question",
    "Questions": DEFAULT_QUERY_INSTRUCTION,
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
DEFAULT_RESULTS = 5
MAX_UPLOADS, MAX_QUEUED_UPLOADS = 2, 8
"""Uploads that are embedded at a time, and uploads that can be started; a waiting one can be cancelled too."""
CANCELLED = "cancelled; nothing was added"
HOUR = 3600
"""Seconds for which uploaded files and exports are kept."""
MARK_COLOURS = {MATCH: "#f2c94c"}
PLANE_COLOURS = {OTHERS: "#c3c9d4", RESULT: "#d62828", QUERY: "#c800c8"}
SOURCE_COLOURS = ("#4e79a7", "#59a14f", "#f28e2b", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#ff9da7")
"""Colours of the named sources in the map."""
SPECIAL_TOKENS = 8
"""Tokens of a passage reserved for special tokens, and for a split that tokenizes into more tokens."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
CSS = """
.results textarea, .results .textfield { font-size: 0.95rem; }
#plane { overflow: visible; padding-bottom: 32px; }
#times { opacity: 0.75; }
#engine-details textarea { font-family: monospace; }
.results * { overflow-wrap: anywhere !important; word-break: normal !important; }
@media (max-width: 640px) { .gradio-container main { padding: 4px !important; } }
"""


def refusal(message: str) -> gr.Error:
    """Returns an error that the page shows; escaped, since Gradio renders messages as HTML and they name files."""
    return gr.Error(html.escape(message, quote=False), print_exception=False)


def safe_cell(text: str) -> str:
    """Returns a CSV cell that no spreadsheet evaluates as a formula."""
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


@contextmanager
def shown_errors() -> Iterator[None]:
    """Shows expected errors on the page, in one sentence; a context manager or a decorator."""
    try:
        yield
    except DeployError as err:
        raise refusal(str(err)) from err
    except OSError as err:
        raise refusal(f"{err.strerror or err}: the server could not read or write a file; check its disk") from err


class Page:
    """The page for one engine and its collections.

    Args:
        searcher: Searches with the engine.
        library: The collections.
        engines: Functions that open the engines of the Compare tab, by name; called at first use.
        limits: Limits of an upload.
    """

    def __init__(
        self,
        searcher: Searcher,
        library: Library,
        engines: Mapping[str, Callable[[], Encoder]],
        limits: Limits | None = None,
    ) -> None:
        self.searcher, self.library, self.limits = searcher, library, limits or Limits()
        self._engines = dict(engines)
        self._opened: dict[str, Encoder] = {}
        self._planes: dict[str, tuple[str, Plane]] = {}
        """Map of each collection by name, with the identity of the content that it was made from."""
        self._opening = threading.Lock()
        self._stops: dict[str, threading.Event] = {}
        """Event that `Cancel` sets, for each session that adds documents."""
        self._uploads = threading.Semaphore(MAX_UPLOADS)
        self._exports = tempfile.TemporaryDirectory(prefix="nvembed-results-")

    def build(self) -> gr.Blocks:
        """Builds the components and their event handlers."""
        with gr.Blocks(title="Semantic search", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
            gr.Markdown("# Semantic search\nAsk in your own words: passages are found by meaning, not by shared words.")
            with gr.Row():
                collection = gr.Dropdown(
                    self.library.names(), value=PYTHON, label="Collection", elem_id="collection", scale=2
                )
                last_search = gr.State(None)
            with gr.Tab("Search", id="search"):
                sources = self._search_tab(collection, last_search)
            with gr.Tab("Your documents", id="documents"):
                unwanted = self._documents_tab(collection)
            with gr.Tab("Compare", id="compare"):
                self._compare_tab(collection)
            with gr.Tab("Map", id="map"):
                self._map_tab(collection, last_search)
            with gr.Tab("Engine", id="engine"):
                manifest = self.searcher.encoder.manifest
                gr.Textbox(
                    "\n".join([f"backend    {self.searcher.encoder.backend}", *lines(manifest)]),
                    label="Engine details",
                    lines=22,
                    interactive=False,
                    elem_id="engine-details",
                )
            page.load(self._refresh, None, [collection, sources, unwanted], api_visibility="private")
        return page

    def _refresh(self) -> Any:
        """Updates the lists of collections and sources, which may have changed since the page was built."""
        names = self.library.names()
        return (
            gr.update(choices=names, value=PYTHON),
            self._sources(PYTHON),
            gr.update(choices=self._user_collections()),
        )

    def _search_tab(self, collection: gr.Dropdown, last_search: gr.State) -> gr.Dropdown:
        """Builds the search tab; returns the filter for sources."""
        with gr.Row():
            query = gr.Textbox(
                label="Query",
                placeholder=EXAMPLES[0],
                max_length=MAX_QUERY_CHARS,
                scale=5,
                elem_id="query",
                autofocus=True,
            )
            button = gr.Button("Search", variant="primary", scale=1, elem_id="search-button")
        gr.Examples([[text] for text in EXAMPLES], [query], label="Examples")
        with gr.Accordion("Instruction and filters", open=False):
            with gr.Row():
                preset = gr.Dropdown(list(PRESETS), value=next(iter(PRESETS)), label="Task")
                instruction = gr.Textbox(
                    next(iter(PRESETS.values())),
                    label="Instruction",
                    max_length=MAX_QUERY_CHARS,
                    scale=3,
                    elem_id="instruction",
                )
            with gr.Row():
                count = gr.Slider(1, MAX_RESULTS, DEFAULT_RESULTS, step=1, label="Results")
                sources = gr.Dropdown([], multiselect=True, label="Only from these sources", elem_id="sources", scale=3)
        times = gr.Textbox(label="Time", interactive=False, elem_id="times", visible=False)
        bars = gr.Label(
            label="Cosine to the query", num_top_classes=MAX_RESULTS, show_heading=False, visible=False, elem_id="bars"
        )
        slots = [
            gr.HighlightedText(
                visible=False,
                color_map=MARK_COLOURS,
                show_legend=False,
                show_inline_category=False,
                elem_id=f"result-{rank}",
                elem_classes="results",
            )
            for rank in range(1, MAX_RESULTS + 1)
        ]
        with gr.Row():
            export = gr.Button("Results as CSV", visible=False, elem_id="export")
            file = gr.File(label="CSV", visible=False, elem_id="csv")
        preset.change(lambda name: PRESETS.get(name, ""), preset, instruction, api_visibility="private")
        collection.change(self._sources, collection, sources, api_visibility="private")
        gr.on(
            [button.click, query.submit],
            self._search,
            [query, instruction, count, sources, collection],
            [last_search, times, bars, export, file, *slots],
            api_visibility="private",
            concurrency_limit=8,
            concurrency_id="engine",
        )
        export.click(self._csv, last_search, file, api_visibility="private")
        gr.api(self.api_search, api_name="search", concurrency_limit=8, concurrency_id="engine")
        return sources

    @shown_errors()
    def _search(self, query: str, instruction: str, count: int, sources: list[str], collection: str) -> list[Any]:
        search_result = self.searcher.search(
            self.library.open(collection), query, instruction=instruction, count=int(count), sources=sources or ()
        )
        hits = search_result.hits
        titles = [f"{rank}. {hit.passage.title}" for rank, hit in enumerate(hits, 1)]
        slots: list[Any] = [
            gr.update(value=marked, label=f"{title}   ·   {hit.score:.3f}   ·   {hit.passage.source}", visible=True)
            for title, hit, marked in zip(titles, hits, search_result.marked, strict=True)
        ]
        slots += [gr.update(visible=False, value=[])] * (MAX_RESULTS - len(slots))
        bars = {title: max(0.0, hit.score) for title, hit in zip(titles, hits, strict=True)}
        times = ", ".join(f"{step} {milliseconds} ms" for step, milliseconds in search_result.milliseconds.items())
        return [
            search_result,
            gr.update(value=times, visible=True),
            gr.update(value=bars, visible=bool(bars)),
            gr.update(visible=bool(bars)),
            gr.update(value=None, visible=False),
            *slots,
        ]

    @shown_errors()
    def api_search(
        self, query: str, instruction: str = "", count: int = DEFAULT_RESULTS, collection: str = PYTHON
    ) -> list[dict[str, Any]]:
        """Returns title, source, text and cosine of the nearest passages, for programs."""
        if not all(isinstance(text, str) for text in (query, instruction, collection)) or not isinstance(count, int):
            raise refusal("query, instruction and collection must be strings, and count an integer")
        store = self.library.open(collection)
        hits = self.searcher.search(store, query, instruction=instruction, count=count).hits
        return [
            {"title": hit.passage.title, "source": hit.passage.source, "text": hit.passage.text, "score": hit.score}
            for hit in hits
        ]

    def _csv(self, last_search: SearchResult | None) -> Any:
        if last_search is None:
            raise refusal("there are no results to export; search first")
        with tempfile.NamedTemporaryFile(
            "w", suffix=".csv", prefix="results-", dir=self._exports.name, delete=False, newline="", encoding="utf-8"
        ) as file:
            writer = csv.writer(file)
            writer.writerow(["rank", "cosine", "source", "title", "text"])
            for rank, hit in enumerate(last_search.hits, 1):
                cells = (hit.passage.source, hit.passage.title, hit.passage.text)
                writer.writerow([rank, f"{hit.score:.6f}", *map(safe_cell, cells)])
        return gr.update(value=file.name, visible=True)

    def _documents_tab(self, collection: gr.Dropdown) -> gr.Dropdown:
        """Builds the documents tab; returns the list of collections to delete."""
        files = gr.File(
            label="Files: .txt, .md, .pdf, .csv, .jsonl, or a .zip of them",
            file_count="multiple",
            file_types=[".txt", ".md", ".pdf", ".csv", ".jsonl", ".zip"],
            elem_id="files",
        )
        with gr.Row():
            name = gr.Textbox("my documents", label="Collection to add to", max_length=40, elem_id="collection-name")
            add = gr.Button("Add", variant="primary", elem_id="add")
            stop = gr.Button("Cancel", variant="stop", elem_id="cancel")
        state = gr.Textbox(label="State", interactive=False, elem_id="state")
        with gr.Row():
            unwanted = gr.Dropdown(self._user_collections(), label="Collection to delete", elem_id="unwanted")
            delete = gr.Button("Delete", variant="stop", elem_id="delete")
        add.click(
            self._add,
            [files, name],
            [state, collection, unwanted],
            api_visibility="private",
            concurrency_limit=MAX_QUEUED_UPLOADS,
        )
        stop.click(self._cancel, None, None, api_visibility="private")
        delete.click(self._delete, unwanted, [state, collection, unwanted], api_visibility="private")
        return unwanted

    def _add(
        self,
        files: list[str] | None,
        name: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Any:
        """Adds files to a collection step by step; `_cancel` stops it between two steps."""
        if not files:
            raise refusal("no files are chosen; choose files to add")
        session = str(request.session_hash)
        stop = self._stops[session] = threading.Event()
        try:
            while not self._uploads.acquire(timeout=0.5):
                yield "waiting for other uploads", gr.update(), gr.update()
                if stop.is_set():
                    yield CANCELLED, gr.update(), gr.update()
                    return
            try:
                yield from self._add_until(stop, files, name.strip(), progress)
            finally:
                self._uploads.release()
        finally:
            if self._stops.get(session) is stop:  # another upload of the same session may have started
                del self._stops[session]

    def _cancel(self, request: gr.Request) -> None:
        if (stop := self._stops.get(str(request.session_hash))) is None:
            raise refusal("no documents are being added, so there is nothing to cancel")
        stop.set()

    def _add_until(self, stop: threading.Event, files: list[str], name: str, progress: gr.Progress) -> Any:
        with shown_errors():
            texts = read_files([Path(path) for path in files], self.limits)
            passages = [passage for title, text in texts for passage in self._chunks(title, text)]
            amount = f"{len(passages)} passages from {len(texts)} {'text' if len(texts) == 1 else 'texts'}"
            yield f"embedding {amount}", gr.update(), gr.update()
            steps = self.library.add_steps(name, passages)
            for done, total in steps:
                if stop.is_set():
                    steps.close()
                    yield CANCELLED, gr.update(), gr.update()
                    return
                progress((done, total), desc="embedding", unit="passages")
                yield f"{done} of {total} passages embedded", gr.update(), gr.update()
            yield (
                f"{amount} were added to {name!r}",
                gr.update(choices=self.library.names(), value=name),
                gr.update(choices=self._user_collections()),
            )

    def _chunks(self, title: str, text: str) -> list[Passage]:
        encoder = self.searcher.encoder
        return list(chunks(title, text, encoder.token_spans(text), max_tokens=encoder.max_length - SPECIAL_TOKENS))

    @shown_errors()
    def _delete(self, name: str | None) -> Any:
        if not name:
            raise refusal("choose a collection to delete")
        self.library.delete(name)
        names = self.library.names()
        return (
            f"{name!r} was deleted",
            gr.update(choices=names, value=PYTHON),
            gr.update(choices=self._user_collections(), value=None),
        )

    def _user_collections(self) -> list[str]:
        return [name for name in self.library.names() if name != PYTHON]

    @shown_errors()
    def _sources(self, collection: str) -> Any:
        return gr.update(choices=self.library.open(collection).sources(), value=[])

    def _compare_tab(self, collection: gr.Dropdown) -> None:
        names = list(self._engines)
        with gr.Row():
            query = gr.Textbox(label="Query to compare", placeholder=EXAMPLES[1], scale=3, elem_id="compare-query")
            button = gr.Button("Compare", variant="primary", elem_id="compare-button")
        with gr.Row():
            left_engine = gr.Dropdown(names, value=names[0], label="Left", elem_id="left")
            right_engine = gr.Dropdown(names, value=names[-1], label="Right", elem_id="right")
        summary = gr.Textbox(label="Difference", interactive=False, elem_id="difference")
        table = gr.Dataframe(
            headers=["rank left", "cosine left", "rank right", "cosine right", "passage"],
            datatype="str",
            interactive=False,
            wrap=True,
            elem_id="rankings",
        )
        gr.on(
            [button.click, query.submit],
            self._compare,
            [query, left_engine, right_engine, collection],
            [summary, table],
            api_name="compare",
            concurrency_limit=1,
        )

    @shown_errors()
    def _compare(self, query: str, left: str, right: str, collection: str = PYTHON) -> Any:
        comparison = compare(
            self.searcher,
            self.library.open(collection),
            self._compare_engine(left),
            self._compare_engine(right),
            query,
            instruction=next(iter(PRESETS.values())),
        )
        left_ms, right_ms = comparison.milliseconds
        summary = (
            f"{comparison.overlap:.0%} of the top ten are the same, out of {comparison.candidates} candidates of the "
            f"page's engine; largest cosine difference {comparison.largest_difference:.4f}; embedding the query: "
            f"{left} {left_ms:.1f} ms, {right} {right_ms:.1f} ms"
        )
        if left == right:
            summary = f"Both engines are the same; start the page with --compare BUNDLE for another one. {summary}"
        return summary, comparison.rows

    def _compare_engine(self, name: str) -> Encoder:
        with self._opening:
            if name not in self._opened:
                if name not in self._engines:
                    raise refusal(f"there is no engine {name!r}; choose one from the list")
                self._opened[name] = self._engines[name]()
            return self._opened[name]

    def _map_tab(self, collection: gr.Dropdown, last_search: gr.State) -> None:
        button = gr.Button("Draw the collection and the last search", variant="primary", elem_id="draw")
        plot = gr.ScatterPlot(
            x="x",
            y="y",
            color="source",
            tooltip=["title", "source"],
            color_title=" ",
            x_title=" ",
            y_title=" ",
            label="Nearby points are similar. Red: results, magenta: your query, gray: smaller sources",
            height=520,
            elem_id="plane",
        )
        button.click(self._draw, [collection, last_search], plot, api_visibility="private")

    @shown_errors()
    def _draw(self, collection: str, last_search: SearchResult | None) -> Any:
        store = self.library.open(collection)
        identity, plane = self._planes.get(collection, ("", None))
        if plane is None or identity != store.identity:
            plane = Plane.of(store.vectors)
            self._planes[collection] = (store.identity, plane)
        if last_search is not None and store.engine != self.searcher.engine:
            last_search = None  # the query's vector is not comparable with another engine's vectors
        columns = draw(store, plane, last_search)
        named_sources = sorted(set(columns["source"]) - PLANE_COLOURS.keys())
        colours = PLANE_COLOURS | dict(zip(named_sources, SOURCE_COLOURS, strict=False))
        return gr.ScatterPlot(pandas.DataFrame(columns), color_map=colours)
