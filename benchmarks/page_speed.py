"""`python -m benchmarks.page_speed BUNDLE`: time from Enter to the first hit and to the marks, in a browser.

Writes benchmarks/results/page_speed.json. The collections hold passages of Python's documentation, repeated;
their vectors are those of the engine, repeated with a little noise. Needs Chromium and Playwright.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_deploy.app.command import QUIET, listen_port
from nvembed_deploy.app.passages import library_passages
from nvembed_deploy.console import echo, run
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import describe_machine

RECORD_PATH = Path("benchmarks") / "results" / "page_speed.json"
SIZES = (5_000, 50_000)
EMBEDDED = 500
"""Number of passages that are embedded; the others have their vectors with noise."""
NOISE = 0.02
VIEWPORTS = {"desktop": {"width": 1280, "height": 720}, "phone": {"width": 390, "height": 844}}
QUERIES = (
    "how do I read a CSV file?",
    "wait for several coroutines at once",
    "compress data with gzip",
    "generate a random number",
    "copy a whole directory tree",
    "compute the median of a list of numbers",
    "make a temporary file",
    "connect to a SQLite database",
    "cache the results of a function",
    "parse a URL into its parts",
    "run a command and capture its output",
)
"""The first query of a collection is not counted: it reads the vectors from the disk."""
ENTER = """query => new Promise((done) => {
  performance.clearMarks();
  const box = document.querySelector("#query"), started = performance.now();
  box.value = query;
  document.querySelector("#search-form").requestSubmit();
  const wait = () => {
    const [hits] = performance.getEntriesByName("hits"), [marks] = performance.getEntriesByName("marks");
    if (hits && marks) done({ hits: hits.startTime - started, marks: marks.startTime - started });
    else setTimeout(wait, 2);
  };
  wait();
})"""


def measure(bundle: Path, chromium: Path) -> dict[str, Any]:
    """Fills collections, opens the page, and searches each of them."""
    os.environ.update(QUIET)
    from playwright.sync_api import sync_playwright

    from nvembed_deploy.app.library import Library
    from nvembed_deploy.app.page import Page
    from nvembed_deploy.app.search import Searcher
    from nvembed_deploy.app.server import PageServer
    from nvembed_deploy.app.store import FolderStore

    encoder = Encoder(bundle, device="cpu")
    samples = list(itertools.islice(library_passages(), 0, 10 * EMBEDDED, 10))[:EMBEDDED]
    embedded = encoder.encode([sample.embedded_text for sample in samples])
    rng = np.random.default_rng(0)
    measured: dict[str, Any] = {"engine": encoder.backend, "precision": encoder.manifest.precision.value, "sizes": {}}
    measured["queries"] = len(QUERIES) - 1
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        library = Library(Path(folder), encoder)
        for size in SIZES:
            rows = rng.integers(0, len(samples), size)
            vectors = embedded[rows] + NOISE * rng.normal(size=(size, encoder.dimension)).astype(np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            passages = [replace(samples[row], place=f"copy {copy}") for copy, row in enumerate(rows.tolist())]
            FolderStore.write(Path(folder) / f"{size}", library.engine, passages, vectors)
        searcher = Searcher(encoder)
        server = PageServer(
            Page(searcher, library, {"page": lambda: encoder}), "127.0.0.1", listen_port("127.0.0.1", 0)
        )
        browser = driver.chromium.launch(executable_path=str(chromium), headless=True, args=["--no-sandbox"])
        for size in SIZES:
            measured["sizes"][str(size)] = _searches(browser, f"{server.url}?in={size}")
        measured["first_hit_at"] = {}
        for name, viewport in VIEWPORTS.items():
            tab = browser.new_context(viewport=viewport).new_page()
            tab.goto(f"{server.url}?in={SIZES[0]}&q=read+a+CSV+file")
            box = tab.locator("#result-1").bounding_box()
            window = {f"{side}_px": pixels for side, pixels in viewport.items()}
            measured["first_hit_at"][name] = {"y": round(box["y"]), **window}
        browser.close()
        server.close()
        searcher.close()
    return measured


def _searches(browser: Any, url: str) -> dict[str, Any]:
    tab = browser.new_context(viewport=VIEWPORTS["desktop"]).new_page()
    tab.goto(url)
    tab.wait_for_function("document.querySelector('#collection')?.value")
    times = [tab.evaluate(ENTER, query) for query in QUERIES][1:]
    again = [tab.evaluate(ENTER, query) for query in QUERIES][1:]
    tab.context.close()
    return {
        name: {"p50_ms": round(statistics.median(values), 1), "max_ms": round(max(values), 1)}
        for name, values in (
            ("first_hit", [query["hits"] for query in times]),
            ("marks", [query["marks"] for query in times]),
            ("marks_of_known_passages", [query["marks"] for query in again]),
        )
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page_speed", description=__doc__.split(": ", 1)[1])
    parser.add_argument("bundle", type=Path, help="bundle of the page")
    parser.add_argument(
        "--chromium", type=Path, default=Path("/usr/bin/chromium"), help="Chromium (default: %(default)s)"
    )
    flags = parser.parse_args(argv)

    def command() -> None:
        record = {
            "command": "python -m benchmarks.page_speed BUNDLE",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            **measure(flags.bundle, flags.chromium),
        }
        write_file(RECORD_PATH, (json.dumps(record, indent=1) + "\n").encode())
        echo(json.dumps(record))

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
