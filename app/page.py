"""The page, of Gradio's own components: every text of a user or a corpus is shown as text, never as HTML."""

from __future__ import annotations

import csv
import html
import tempfile
import threading
from collections.abc import Callable, Mapping
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
from nvembed_deploy.app.search import LONGEST_QUERY, MATCH, MOST_RESULTS, Found, Searcher
from nvembed_deploy.engines.show import lines

PRESETS = {
    "Questions about Python": "Given a question about Python, retrieve documentation that answers the question",
    "Questions": "Given a question, retrieve passages that answer the question",
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
UPLOADS, WAITING = 2, 8
"""That are embedded at a time, and that are begun: one that waits can be cancelled too."""
CANCELLED = "cancelled; nothing was added"
HOUR = 3600
"""Uploaded files and exports are kept so long."""
MARK_COLOURS = {MATCH: "#f2c94c"}
PLANE_COLOURS = {OTHERS: "#c3c9d4", RESULT: "#d62828", QUERY: "#c800c8"}
SOURCE_COLOURS = ("#4e79a7", "#59a14f", "#f28e2b", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#ff9da7")
"""One for each of the plane's named sources."""
SPECIAL_TOKENS = 8
"""Of a passage, left room for: what stands around a text, and a cut that tokenizes into more."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
CSS = """
.results textarea, .results .textfield { font-size: 0.95rem; }
#plane { overflow: visible; padding-bottom: 32px; }
#times { opacity: 0.75; }
#engine-card textarea { font-family: monospace; }
.results * { overflow-wrap: anywhere !important; word-break: normal !important; }
@media (max-width: 640px) { .gradio-container main { padding: 4px !important; } }
"""


def refusal(message: str) -> gr.Error:
    """What is shown instead of a result. Gradio takes the message for HTML, and names of files stand in it."""
    return gr.Error(html.escape(message, quote=False), print_exception=False)


def safe_cell(value: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{value}" if value.startswith(FORMULA_STARTS) else value


class Page:
    """The page of one engine and its collections.

    Args:
        searcher: The engine.
        library: Its collections.
        sides: Engines that Compare offers, by name; opened when they are first asked for.
        limits: Of an upload.
    """

    def __init__(
        self,
        searcher: Searcher,
        library: Library,
        sides: Mapping[str, Callable[[], Encoder]],
        limits: Limits | None = None,
    ) -> None:
        self.searcher, self.library, self.limits = searcher, library, limits or Limits()
        self._sides = dict(sides)
        self._opened: dict[str, Encoder] = {}
        self._planes: dict[str, tuple[str, Plane]] = {}
        """Of collections by name, each for one identity of its content."""
        self._opening = threading.Lock()
        self._stops: dict[str, threading.Event] = {}
        """What `Cancel` sets, for each session that adds documents."""
        self._uploads = threading.Semaphore(UPLOADS)
        self._exports = tempfile.TemporaryDirectory(prefix="nvembed-results-")

    def build(self) -> gr.Blocks:
        """The components and what they do."""
        with gr.Blocks(title="Semantic search", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
            gr.Markdown(
                "# Semantic search\nAsk in your own words; what answers need not share a word with the question."
            )
            with gr.Row():
                collection = gr.Dropdown(
                    self.library.names(), value=PYTHON, label="Collection", elem_id="collection", scale=2
                )
                last = gr.State(None)
            with gr.Tab("Search", id="search"):
                sources = self._search_tab(collection, last)
            with gr.Tab("Your documents", id="documents"):
                unwanted = self._documents_tab(collection)
            with gr.Tab("Compare", id="compare"):
                self._compare_tab(collection)
            with gr.Tab("Map", id="map"):
                self._map_tab(collection, last)
            with gr.Tab("Engine", id="engine"):
                manifest = self.searcher.encoder.manifest
                gr.Textbox(
                    "\n".join([f"backend    {self.searcher.encoder.backend}", *lines(manifest)]),
                    label="The engine behind this page",
                    lines=22,
                    interactive=False,
                    elem_id="engine-card",
                )
            page.load(self._refresh, None, [collection, sources, unwanted], api_visibility="private")
        return page

    def _refresh(self) -> Any:
        """What may have changed since the page was built."""
        names = self.library.names()
        return gr.update(choices=names, value=PYTHON), self._sources(PYTHON), gr.update(choices=self._own())

    def _search_tab(self, collection: gr.Dropdown, last: gr.State) -> gr.Dropdown:
        """Returns the filter of sources."""
        with gr.Row():
            query = gr.Textbox(
                label="Query",
                placeholder=EXAMPLES[0],
                max_length=LONGEST_QUERY,
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
                    max_length=LONGEST_QUERY,
                    scale=3,
                    elem_id="instruction",
                )
            with gr.Row():
                count = gr.Slider(1, MOST_RESULTS, DEFAULT_RESULTS, step=1, label="Results")
                sources = gr.Dropdown([], multiselect=True, label="Only from these sources", elem_id="sources", scale=3)
        times = gr.Textbox(label="Time", interactive=False, elem_id="times", visible=False)
        bars = gr.Label(
            label="Cosine to the query", num_top_classes=MOST_RESULTS, show_heading=False, visible=False, elem_id="bars"
        )
        slots = [
            gr.HighlightedText(
                visible=False,
                color_map=MARK_COLOURS,
                show_legend=False,
                show_inline_category=False,
                elem_id=f"result-{number + 1}",
                elem_classes="results",
            )
            for number in range(MOST_RESULTS)
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
            [last, times, bars, export, file, *slots],
            api_visibility="private",
            concurrency_limit=8,
            concurrency_id="engine",
        )
        export.click(self._csv, last, file, api_visibility="private")
        gr.api(self.api_search, api_name="search", concurrency_limit=8, concurrency_id="engine")
        return sources

    def _search(self, query: str, instruction: str, count: int, sources: list[str], collection: str) -> list[Any]:
        found = self._guarded(
            lambda: self.searcher.search(
                self.library.open(collection), query, instruction=instruction, count=int(count), sources=sources or ()
            )
        )
        titles = [f"{rank}. {hit.passage.title}" for rank, hit in enumerate(found.hits, 1)]
        slots: list[Any] = [
            gr.update(value=marked, label=f"{title}   ·   {hit.score:.3f}   ·   {hit.passage.source}", visible=True)
            for title, hit, marked in zip(titles, found.hits, found.marked, strict=True)
        ]
        slots += [gr.update(visible=False, value=[])] * (MOST_RESULTS - len(slots))
        bars = {title: max(0.0, hit.score) for title, hit in zip(titles, found.hits, strict=True)}
        times = ", ".join(f"{name} {value} ms" for name, value in found.milliseconds.items())
        return [
            found,
            gr.update(value=times, visible=True),
            gr.update(value=bars, visible=bool(bars)),
            gr.update(visible=bool(bars)),
            gr.update(value=None, visible=False),
            *slots,
        ]

    def api_search(
        self, query: str, instruction: str = "", count: int = DEFAULT_RESULTS, collection: str = PYTHON
    ) -> list[dict[str, Any]]:
        """Title, source, text and cosine of the nearest passages, for programs."""
        if not all(isinstance(text, str) for text in (query, instruction, collection)) or not isinstance(count, int):
            raise refusal("query, instruction and collection are texts, and count is a whole number; send them so")
        found = self._guarded(
            lambda: self.searcher.search(self.library.open(collection), query, instruction=instruction, count=count)
        )
        return [
            {"title": hit.passage.title, "source": hit.passage.source, "text": hit.passage.text, "score": hit.score}
            for hit in found.hits
        ]

    def _csv(self, found: Found | None) -> Any:
        if found is None:
            raise refusal("there are no results yet; search first")
        with tempfile.NamedTemporaryFile(
            "w", suffix=".csv", prefix="results-", dir=self._exports.name, delete=False, newline="", encoding="utf-8"
        ) as file:
            writer = csv.writer(file)
            writer.writerow(["rank", "cosine", "source", "title", "text"])
            for rank, hit in enumerate(found.hits, 1):
                cells = (hit.passage.source, hit.passage.title, hit.passage.text)
                writer.writerow([rank, f"{hit.score:.6f}", *map(safe_cell, cells)])
        return gr.update(value=file.name, visible=True)

    def _documents_tab(self, collection: gr.Dropdown) -> gr.Dropdown:
        """Returns the choice of what to delete."""
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
            unwanted = gr.Dropdown(self._own(), label="Collection to delete", elem_id="unwanted")
            delete = gr.Button("Delete", variant="stop", elem_id="delete")
        add.click(
            self._add, [files, name], [state, collection, unwanted], api_visibility="private", concurrency_limit=WAITING
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
        """Embeds step by step; `_cancel` stops it between two of them."""
        if not files:
            raise refusal("there are no files yet; choose some")
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
            if self._stops.get(session) is stop:  # another upload of the same session may have begun
                del self._stops[session]

    def _cancel(self, request: gr.Request) -> None:
        if (stop := self._stops.get(str(request.session_hash))) is None:
            raise refusal("nothing is being added, so there is nothing to cancel")
        stop.set()

    def _add_until(self, stop: threading.Event, files: list[str], name: str, progress: gr.Progress) -> Any:
        texts = self._guarded(lambda: read_files([Path(path) for path in files], self.limits))
        passages = self._guarded(lambda: [part for title, text in texts for part in self._chunks(title, text)])
        what = f"{len(passages)} passages of {len(texts)} {'text' if len(texts) == 1 else 'texts'}"
        yield f"embedding {what}", gr.update(), gr.update()
        steps = self._guarded(lambda: self.library.add_steps(name, passages))
        while True:
            step = self._guarded(lambda: next(steps, None))
            if step is None:
                break
            if stop.is_set():
                steps.close()
                yield CANCELLED, gr.update(), gr.update()
                return
            done, total = step
            progress((done, total), desc="embedding", unit="passages")
            yield f"{done} of {total} passages embedded", gr.update(), gr.update()
        yield (
            f"{what} were added to {name!r}",
            gr.update(choices=self.library.names(), value=name),
            gr.update(choices=self._own()),
        )

    def _chunks(self, title: str, text: str) -> list[Passage]:
        encoder = self.searcher.encoder
        return list(chunks(title, text, encoder.token_spans(text), most=encoder.max_length - SPECIAL_TOKENS))

    def _delete(self, name: str | None) -> Any:
        if not name:
            raise refusal("choose a collection to delete")
        self._guarded(lambda: self.library.delete(name))
        names = self.library.names()
        return (
            f"{name!r} was deleted",
            gr.update(choices=names, value=PYTHON),
            gr.update(choices=self._own(), value=None),
        )

    def _own(self) -> list[str]:
        return [name for name in self.library.names() if name != PYTHON]

    def _sources(self, collection: str) -> Any:
        return gr.update(choices=self._guarded(lambda: self.library.open(collection)).sources(), value=[])

    def _compare_tab(self, collection: gr.Dropdown) -> None:
        names = list(self._sides)
        with gr.Row():
            query = gr.Textbox(label="Query to compare", placeholder=EXAMPLES[1], scale=3, elem_id="compare-query")
            button = gr.Button("Compare", variant="primary", elem_id="compare-button")
        with gr.Row():
            left = gr.Dropdown(names, value=names[0], label="Left", elem_id="left")
            right = gr.Dropdown(names, value=names[-1], label="Right", elem_id="right")
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
            [query, left, right, collection],
            [summary, table],
            api_name="compare",
            concurrency_limit=1,
        )

    def _compare(self, query: str, left: str, right: str, collection: str = PYTHON) -> Any:
        found = self._guarded(
            lambda: compare(
                self.searcher,
                self.library.open(collection),
                self._side(left),
                self._side(right),
                query,
                instruction=next(iter(PRESETS.values())),
            )
        )
        times = f"{left} {found.milliseconds[0]:.1f} ms, {right} {found.milliseconds[1]:.1f} ms"
        text = (
            f"{found.overlap:.0%} of the ten best are the same, among {found.candidates} that the page's engine found; "
            f"largest difference of two cosines {found.largest_difference:.4f}; the query's embedding: {times}"
        )
        if left == right:
            text = f"both sides are the same engine; for another one start with --compare BUNDLE. {text}"
        return text, found.rows

    def _side(self, name: str) -> Encoder:
        with self._opening:
            if name not in self._opened:
                if name not in self._sides:
                    raise refusal(f"there is no engine {name!r}; choose one of the list")
                self._opened[name] = self._guarded(self._sides[name])
            return self._opened[name]

    def _map_tab(self, collection: gr.Dropdown, last: gr.State) -> None:
        button = gr.Button("Draw the collection and the last search", variant="primary", elem_id="draw")
        plot = gr.ScatterPlot(
            x="x",
            y="y",
            color="source",
            tooltip=["title", "source"],
            color_title=" ",
            x_title=" ",
            y_title=" ",
            label="Near means alike. Red: results, magenta: your query, grey: smaller sources",
            height=520,
            elem_id="plane",
        )
        button.click(self._draw, [collection, last], plot, api_visibility="private")

    def _draw(self, collection: str, found: Found | None) -> Any:
        store = self._guarded(lambda: self.library.open(collection))
        identity, plane = self._planes.get(collection, ("", None))
        if plane is None or identity != store.identity:
            plane = Plane.of(store.vectors)
            self._planes[collection] = (store.identity, plane)
        if found is not None and store.engine != self.searcher.engine:
            found = None  # another engine's query has no place among these vectors
        columns = draw(store, plane, found)
        named = sorted(set(columns["source"]) - PLANE_COLOURS.keys())
        colours = PLANE_COLOURS | dict(zip(named, SOURCE_COLOURS, strict=False))
        return gr.ScatterPlot(pandas.DataFrame(columns), color_map=colours)

    def _guarded(self, action: Callable[[], Any]) -> Any:
        """Runs an action; what a user can mend is shown on the page, in its one sentence."""
        try:
            return action()
        except DeployError as err:
            raise refusal(str(err)) from err
        except OSError as err:
            raise refusal(
                f"{err.strerror or err}: the page's machine could not write or read; look at its disk"
            ) from err
