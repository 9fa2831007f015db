"""`python -m tools.screenshots BUNDLE`: screenshots of the search page. Needs Chromium and Playwright."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvembed_deploy.app.command import QUIET, listen_port, make_page
from nvembed_deploy.console import echo, run

OUT = Path("docs") / "app"
QUERY = "how do I read a CSV file?"
MAP_MS = 300_000
DESKTOP, PHONE = {"width": 1280, "height": 720}, {"width": 390, "height": 844}


def take_screenshots(
    bundle: Path, collections: Path, compare: Sequence[Path], reference: Path | None, chromium: Path
) -> None:
    """Opens the page and takes a screenshot of each view."""
    os.environ.update(QUIET)
    from playwright.sync_api import sync_playwright

    from nvembed_deploy.app.server import PageServer

    page = make_page(bundle, "cpu", collections, index="exact", compare=compare, reference=reference)
    page.library.add_python()
    server = PageServer(page, "127.0.0.1", listen_port("127.0.0.1", 0))
    page.start()
    OUT.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(chromium), headless=True, args=["--no-sandbox"])
        for name, size, scheme in (("search", DESKTOP, "light"), ("dark", DESKTOP, "dark"), ("phone", PHONE, "light")):
            tab = browser.new_context(viewport=size, color_scheme=scheme).new_page()
            tab.goto(server.url)
            _search(tab)
            _save_screenshot(tab, name)
            if name == "search":
                _other_views(tab, page.searcher.encoder.manifest.source.name)
        browser.close()
    server.close()


def _search(tab: Any) -> None:
    tab.wait_for_function("document.querySelector('#collection')?.value")
    box = tab.get_by_label("Query", exact=True)
    box.fill(QUERY)
    box.press("Enter")
    tab.locator("#results mark").first.wait_for()


def _other_views(tab: Any, model: str) -> None:
    _open(tab, "documents")
    tab.locator("#files").set_input_files(["CHANGELOG.md", "constraints.txt", "LICENSE"])
    tab.locator("#add").click()
    tab.get_by_text("my documents: 2 added, 1 skipped").wait_for()
    tab.wait_for_function("document.querySelector('#collection').value === 'my documents'")
    tab.get_by_role("rowheader", name="CHANGELOG.md").wait_for()
    _save_screenshot(tab, "documents")
    tab.locator("#delete").click()
    tab.locator("#confirm-yes").click()
    tab.wait_for_function("document.querySelector('#state').textContent.includes('was deleted')")
    tab.wait_for_function("document.querySelector('#collection').value.startsWith('Python')")
    _open(tab, "search")
    _search(tab)
    _open(tab, "engine")
    tab.locator("#engine-details").get_by_text(model).first.wait_for()
    _save_screenshot(tab, "engine")
    _open(tab, "compare")
    tab.locator("#compare-button").click()
    tab.locator("#rankings").wait_for()
    _save_screenshot(tab, "compare")
    _open(tab, "map")
    tab.wait_for_function(
        "document.querySelector('#map-status').textContent.includes('are neighbours here')", timeout=MAP_MS
    )
    tab.locator("#plane").focus()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("document.querySelector('#tip span').textContent")
    tab.wait_for_timeout(1000)  # the points have moved
    _save_screenshot(tab, "map")


def _open(tab: Any, view: str) -> None:
    tab.locator(f'nav a[href="#{view}"]').click()


def _save_screenshot(tab: Any, name: str) -> None:
    path = OUT / f"{name}.png"
    tab.screenshot(path=path)
    echo(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.screenshots", description=__doc__.split(": ", 1)[1])
    parser.add_argument("bundle", type=Path, help="bundle of the page")
    parser.add_argument(
        "--collections", type=Path, metavar="DIR", help="folder for the collections (default: a temporary folder)"
    )
    parser.add_argument(
        "--compare", type=Path, action="append", default=[], metavar="BUNDLE", help="another bundle to compare with"
    )
    parser.add_argument("--reference", type=Path, metavar="DIR", help="the bundle's checkpoint, for the Compare tab")
    parser.add_argument(
        "--chromium", type=Path, default=Path("/usr/bin/chromium"), help="Chromium (default: %(default)s)"
    )
    flags = parser.parse_args(argv)

    def command() -> None:
        with tempfile.TemporaryDirectory() as folder:  # not the user's folder: a collection is added and deleted
            collections = flags.collections or Path(folder)
            take_screenshots(flags.bundle, collections, flags.compare, flags.reference, flags.chromium)

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
