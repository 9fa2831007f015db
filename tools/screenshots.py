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
DESKTOP, PHONE = {"width": 1100, "height": 1150}, {"width": 390, "height": 1500}


def take_screenshots(bundle: Path, collections: Path, reference: Path | None, chromium: Path) -> None:
    """Opens the page and takes a screenshot of each view."""
    os.environ.update(QUIET)
    import gradio
    from playwright.sync_api import sync_playwright

    from nvembed_deploy.app.page import CSS

    demo = make_page(bundle, "cpu", collections, index="exact", compare=[], reference=reference)
    _, url, _ = demo.queue().launch(
        server_name="127.0.0.1",
        server_port=listen_port("127.0.0.1", 0),
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        theme=gradio.themes.Soft(),
        css=CSS,
        footer_links=[],
    )
    OUT.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(chromium), headless=True, args=["--no-sandbox"])
        for name, size, scheme in (("search", DESKTOP, "light"), ("dark", DESKTOP, "dark"), ("phone", PHONE, "light")):
            page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
            page.goto(url)
            _search(page)
            _save_screenshot(page, name)
            if name == "search":
                _other_views(page)
        browser.close()
    demo.close()


def _search(page: Any) -> None:
    box = page.get_by_label("Query", exact=True)
    box.fill(QUERY)
    box.press("Enter")
    page.wait_for_function("document.querySelector('#times textarea, #times input')?.value.includes('searching')")
    page.wait_for_timeout(1500)


def _other_views(page: Any) -> None:
    page.get_by_role("tab", name="Your documents").click()
    page.locator("#files input[type=file]").set_input_files("CHANGELOG.md")
    page.locator("#files").get_by_text("CHANGELOG").first.wait_for()
    page.locator("#add").click()
    page.wait_for_function("document.querySelector('#state textarea, #state input').value.includes('were added to')")
    page.wait_for_timeout(1500)
    _save_screenshot(page, "documents")
    page.get_by_label("Collection to delete").click()
    page.get_by_role("option", name="my documents").click()
    page.locator("#delete").click()
    page.wait_for_function("document.querySelector('#state textarea, #state input').value.includes('was deleted')")
    page.get_by_role("tab", name="Engine").click()
    page.wait_for_timeout(1500)
    _save_screenshot(page, "engine")
    page.get_by_role("tab", name="Compare").click()
    box = page.get_by_label("Query to compare")
    box.fill(QUERY)
    box.press("Enter")
    page.wait_for_function("document.querySelector('#difference textarea, #difference input').value.includes('top')")
    page.wait_for_timeout(1500)
    _save_screenshot(page, "compare")
    page.get_by_role("tab", name="Map").click()
    page.locator("#draw").click()
    page.locator("#plane canvas, #plane svg.marks").first.wait_for()
    page.wait_for_timeout(3000)
    _save_screenshot(page, "map")


def _save_screenshot(page: Any, name: str) -> None:
    path = OUT / f"{name}.png"
    page.screenshot(path=path)
    echo(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.screenshots", description=__doc__.split(": ", 1)[1])
    parser.add_argument("bundle", type=Path, help="bundle of the page")
    parser.add_argument(
        "--collections", type=Path, metavar="DIR", help="folder for the collections (default: a temporary folder)"
    )
    parser.add_argument("--reference", type=Path, metavar="DIR", help="the bundle's checkpoint, for the Compare tab")
    parser.add_argument(
        "--chromium", type=Path, default=Path("/usr/bin/chromium"), help="Chromium (default: %(default)s)"
    )
    flags = parser.parse_args(argv)

    def command() -> None:
        with tempfile.TemporaryDirectory() as folder:  # not the user's folder: a collection is added and deleted
            take_screenshots(flags.bundle, flags.collections or Path(folder), flags.reference, flags.chromium)

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
