"""The page in a real browser."""

import csv
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

CHROMIUM = Path("/usr/bin/chromium")
for library in ("gradio", "gradio_client"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[app]")

from tests.app.conftest import DANGER  # noqa: E402
from tests.app.test_documents import make_zip  # noqa: E402

TIMEOUT_MS = 30_000
"""Timeout in milliseconds: two loaded cores are slow."""
DESKTOP, PHONE = {"width": 1280, "height": 720}, {"width": 390, "height": 844}
PASS_OVER = """() => {
  const plane = document.querySelector("#plane"), tip = document.querySelector("#tip");
  const box = plane.getBoundingClientRect();
  for (let x = box.left + 4; x < box.right; x += 8)
    for (let y = box.top + 4; y < box.bottom; y += 8) {
      plane.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: y, pointerType: "mouse" }));
      if (tip.textContent) return [x, y, tip.querySelector("b").textContent];
    }
}"""
"""Moves the pointer over the map until a point says what it is; returns where, and its title."""
VIEWS = ("search", "documents", "compare", "map", "engine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip("Chromium is not installed: apt-get install chromium")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed: pip install playwright"
    )
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=str(CHROMIUM), headless=True, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def shared_tab(browser: Any, page: SimpleNamespace) -> Iterator[Any]:
    """One open page for all tests of this file: opening one takes most of a test's time."""
    context = browser.new_context(viewport=DESKTOP)
    opened = open_tab(context, page)
    yield opened
    outside = [url for url in opened.requested if not url.startswith((page.url, "data:", "blob:"))]
    context.close()
    assert outside == []  # no request leaves the machine
    assert opened.errors == []


@pytest.fixture
def tab(shared_tab: Any) -> Any:
    """The open page, with no results and the first collection."""
    view(shared_tab, "search")
    choose(shared_tab, "Python documentation")
    shared_tab.get_by_label("Query", exact=True).fill("")
    shared_tab.locator("#result-1").wait_for(state="detached")
    return shared_tab


def open_tab(context: Any, page: SimpleNamespace, address: str = "") -> Any:
    opened = context.new_page()
    opened.requested, opened.errors = [], []
    opened.on("request", lambda request: opened.requested.append(request.url))
    opened.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.set_default_timeout(TIMEOUT_MS)
    opened.goto(f"{page.url}{address}")
    opened.get_by_label("Query", exact=True).wait_for()
    opened.wait_for_function("document.querySelector('#collection').value !== ''")
    return opened


def view(tab: Any, name: str) -> None:
    tab.locator(f'nav a[href="#{name}"]').click()
    tab.locator(f"#view-{name}").wait_for()


def choose(tab: Any, collection: str) -> None:
    tab.wait_for_function(
        "name => [...document.querySelector('#collection').options].some(option => option.value === name)",
        arg=collection,
    )
    if tab.locator("#collection").input_value() != collection:
        tab.locator("#collection:visible, #documents-collection:visible").select_option(collection)


def search(tab: Any, query: str) -> None:
    box = tab.get_by_label("Query", exact=True)
    box.fill(query)
    box.press("Enter")
    status_has(tab, f"“{query}”")


def status_has(tab: Any, text: str, name: str = "status") -> None:
    tab.wait_for_function(
        "([name, text]) => document.querySelector(`#${name}`).textContent.includes(text)", arg=[name, text]
    )


def add(tab: Any, collection: str, *paths: Path) -> None:
    view(tab, "documents")
    tab.locator("#files").set_input_files([str(path) for path in paths])
    tab.get_by_label("Collection to add to").fill(collection)
    tab.locator("#add").click()


def test_results_are_seen_at_once_and_name_their_query(tab: Any, page: SimpleNamespace) -> None:
    search(tab, "rows of a table")
    expected = page.searcher.search(
        page.library.open("Python documentation"), "rows of a table", instruction=python_instruction(), count=3
    )
    titles = [text.split(" ", 1)[1] for text in tab.locator("#results h3").all_inner_texts()]
    assert titles == [hit.passage.label for hit in expected.hits]  # the instruction is the page's
    text = tab.locator("#status").inner_text()
    assert "3 of 3 passages in Python documentation for “rows of a table”, " in text
    assert text.endswith(" s")
    first = tab.locator("#result-1").bounding_box()
    assert first["y"] + first["height"] < DESKTOP["height"] / 2
    tab.locator("#results mark").first.wait_for()
    tab.locator("#result-1 .title").click()
    assert tab.locator("#result-1 .whole").is_visible()
    tab.get_by_role("button", name="More like this").first.click()
    status_has(tab, "like “")
    assert tab.locator(".hit").count() == 2
    assert tab.evaluate("document.activeElement.className") == "title"


def python_instruction() -> str:
    from nvembed_deploy.app.requests import default_instruction

    return default_instruction("Python documentation")


def test_the_last_query_wins(tab: Any, page: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the answer to an earlier one arrives later, and old results are dimmed until then."""
    embed = page.searcher.embed_query

    def slow(query: str, instruction: str) -> Any:
        time.sleep({"first": 1.5, "second": 0.4}.get(query, 0))
        return embed(query, instruction)

    search(tab, "rows")
    monkeypatch.setattr(page.searcher, "embed_query", slow)
    box = tab.get_by_label("Query", exact=True)
    for query in ("first", "second"):
        box.fill(query)
        box.press("Enter")
        assert "old" in (tab.locator("#results").get_attribute("class") or "")
    status_has(tab, "“second”")
    tab.wait_for_timeout(1500)
    status_has(tab, "“second”")
    assert tab.locator(".hit").count() == 3


def test_results_go_when_the_query_or_the_collection_changes(
    tab: Any, page: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvembed_deploy.app.passages import Passage

    list(page.library.add_steps("other", [Passage(source="o.txt", title="", text="Something else entirely.")]))
    tab.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    search(tab, "rows")
    choose(tab, "other")
    status_has(tab, "1 of 1 passage in other for “rows”")  # asked again, in the chosen collection
    assert tab.locator("#instruction").input_value() != python_instruction()
    monkeypatch.setattr("nvembed_deploy.app.results.LIVE_MS", 0.0)  # an engine too slow to search while one types
    search(tab, "cells")
    tab.get_by_label("Query", exact=True).press_sequentially("x")
    tab.locator("#result-1").wait_for(state="detached")
    assert tab.locator("#status").inner_text() == ""
    page.library.delete("other")


def test_it_searches_as_one_types_where_the_engine_is_fast(
    tab: Any, monkeypatch: pytest.MonkeyPatch, page: SimpleNamespace
) -> None:
    monkeypatch.setattr("nvembed_deploy.app.results.LIVE_MS", 1e6)
    search(tab, "rows")  # its answer tells the page that the engine is fast
    tab.get_by_label("Query", exact=True).press_sequentially(" of a file", delay=20)
    status_has(tab, "“rows of a file”")


def test_hostile_text_is_shown_as_text(tab: Any) -> None:
    search(tab, f"what is {DANGER}?")
    assert DANGER in tab.locator("#results").inner_text().replace("\n", " ")
    assert tab.title() == "Semantic search"
    assert tab.locator("img").count() == 0


def test_mistakes_are_told_in_the_status_line(tab: Any) -> None:
    tab.locator("#search-button").click()
    status_has(tab, "Enter a query first")
    view(tab, "documents")
    tab.locator("#add").click()
    status_has(tab, "Choose files to add first", "state")
    assert tab.locator(".toast-body").count() == 0


def test_nothing_near_is_said(tab: Any, page: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page.searcher, "threshold", lambda *_: 2.0)
    search(tab, "bread")
    status_has(tab, "Nothing near “bread” in Python documentation: the closest of 3 passages")
    assert tab.locator(".hit.far").count() == 3


def test_keys_and_address(tab: Any, browser: Any, page: SimpleNamespace) -> None:
    search(tab, "rows of a table")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.closest('.hit').id") == "result-2"
    tab.keyboard.press("Enter")
    assert tab.locator("#result-2 .whole").is_visible()
    tab.keyboard.press("Escape")
    assert tab.evaluate("document.activeElement.id") == "query"
    tab.keyboard.press("Escape")
    assert tab.get_by_label("Query", exact=True).input_value() == ""
    tab.locator("#examples button").first.wait_for()
    tab.locator("#search-button").focus()
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.id") == "query"
    context = browser.new_context(viewport=PHONE)
    second = open_tab(context, page, "?q=compressed+file&in=Python+documentation")
    status_has(second, "“compressed file”")
    first = second.locator("#result-1").bounding_box()
    assert first["y"] < PHONE["height"] / 2
    assert second.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    context.close()


def test_documents_are_added_found_exported_and_deleted(tab: Any, page: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "=note.txt").write_text("The spare key lies under the third flower pot.")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 broken")
    hostile = "<img src=&#47;&#47;evil.example&#47;x.png>.txt"
    make_zip(tmp_path / "more.zip", {hostile: b"\xff\xfe\x00", "2023/a.txt": b"A rat.", "2024/a.txt": "Köln".encode()})
    add(tab, "keys", *(tmp_path / name for name in ("=note.txt", "broken.pdf", "more.zip")))
    tab.get_by_text("keys: 3 added, 2 skipped").wait_for()
    outcomes = tab.locator(".outcomes li").all_inner_texts()
    assert [text for text in outcomes if text.startswith("broken.pdf skipped: cannot be read as PDF")]
    assert [text for text in outcomes if "<img src=" in text and "skipped" in text]
    assert tab.locator("#chosen").inner_text() == ""  # the box is empty for the next files
    choose(tab, "keys")
    tab.get_by_role("rowheader", name="more.zip/2024/a.txt").wait_for()
    add(tab, "keys", tmp_path / "=note.txt")
    tab.get_by_text("keys: 0 added, 1 skipped").wait_for()
    tab.get_by_text("has the same content as =note.txt, which is there already").wait_for()
    view(tab, "search")
    search(tab, "where is the key?")
    assert "=note.txt" in tab.locator("#results").inner_text()
    tab.locator("#options summary").click()
    with tab.expect_download() as download:
        tab.locator("#export").click()
    rows = list(csv.reader(Path(download.value.path()).read_text(encoding="utf-8-sig").splitlines()))
    assert rows[0][:4] == ["query", "collection", "instruction", "rank"]
    assert {row[0] for row in rows[1:]} == {"where is the key?"}
    assert any(row[5] == "'=note.txt" for row in rows)  # no formula for a spreadsheet
    tab.locator("#options summary").click()
    view(tab, "documents")
    tab.locator('[data-delete-file="more.zip/2023/a.txt"]').click()
    tab.get_by_role("button", name="Keep").click()
    assert len(page.library.open("keys")) == 3
    tab.locator('[data-delete-file="more.zip/2023/a.txt"]').click()
    tab.locator("#confirm-yes").click()
    status_has(tab, "was deleted from keys", "state")
    assert len(page.library.open("keys")) == 2
    tab.locator("#delete").click()
    tab.locator("#confirm-yes").click()
    status_has(tab, "keys was deleted", "state")
    assert "keys" not in page.library.names()


def test_adding_is_seen_searched_meanwhile_and_cancelled(
    tab: Any, page: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = page.encoder.encode

    def slow(texts: Any, **options: Any) -> Any:
        time.sleep(0.2)  # a tiny model would be done before the button is pressed
        return encode(texts, **options)

    monkeypatch.setattr(page.encoder, "encode", slow)
    monkeypatch.setattr("nvembed_deploy.app.library.COMMIT_SECONDS", 0.1)
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps({"text": f"sentence {i}"}) for i in range(1500)))
    add(tab, "long", tmp_path / "long.jsonl")
    tab.wait_for_function("/\\d+ of 1,500 passages, .*left/.test(document.querySelector('#jobs').textContent)")
    choose(tab, "long")
    view(tab, "search")
    search(tab, "sentence")
    assert " passages in long for “sentence”" in tab.locator("#status").inner_text()
    tab.wait_for_function("document.querySelector('#growing').textContent.includes('of 1,500 passages')")
    view(tab, "documents")
    tab.get_by_role("button", name="Cancel").click()
    tab.get_by_text("– cancelled").wait_for()
    assert "long" not in page.library.names()


def test_compare_map_and_engine(tab: Any) -> None:
    search(tab, "rows of a table")
    view(tab, "compare")
    assert tab.get_by_label("Query to compare").input_value() == "rows of a table"
    tab.locator("#compare-button").click()
    tab.locator("#rankings li").get_by_text("csv.reader").first.wait_for()
    assert tab.locator("#rankings li").count() == 6
    assert tab.locator("#rankings path").count() == 3
    assert f"Instruction: {python_instruction()}" in tab.locator("#difference").inner_text()
    view(tab, "map")
    status_has(tab, "3 passages of Python documentation, by principal components: a map of", "map-status")
    inked = "const {width, height} = plane; return plane.getContext('2d').getImageData(0, 0, width, height).data"
    assert tab.evaluate(f"(() => {{ const plane = document.querySelector('#plane'); {inked}.some(Boolean) }})()")
    tab.locator("#plane").focus()
    tab.keyboard.press("ArrowLeft")
    first = tab.locator(".title").first.text_content().split(" ", 1)[1]
    assert tab.locator("#tip b").inner_text() == first  # the arrow keys begin at the best result
    tab.keyboard.press("Enter")
    tab.locator("#point h3").get_by_text(first).wait_for()
    tab.keyboard.press("+")
    tab.locator("#zoom-reset").click()
    x, y, title = tab.evaluate(PASS_OVER)
    tab.mouse.click(x, y)
    tab.locator("#point h3").get_by_text(title).wait_for()
    tab.wait_for_function("document.querySelector('#tip span').textContent")  # the beginning of its text
    tab.locator("#point .similar").click()
    status_has(tab, f"like “{title}”")
    view(tab, "engine")
    assert "onnxruntime" in tab.locator("#engine-details").inner_text()
    assert "Lowest cosine" in tab.locator("#engine-details").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Any, page: SimpleNamespace, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    context = browser.new_context(viewport=DESKTOP if scheme == "light" else PHONE, color_scheme=scheme)
    tab = open_tab(context, page)
    background = tab.evaluate(
        "getComputedStyle(document.querySelector('.page')).backgroundColor.match(/[0-9.]+/g).slice(0, 3).map(Number)"
    )
    assert (sum(background) < 3 * 100) == (scheme == "dark")
    search(tab, "rows of a table")
    tab.locator("#results mark").first.wait_for()
    tab.locator("#options summary").click()
    serious = []
    for name in VIEWS:
        view(tab, name)
        if name == "compare":
            tab.locator("#compare-button").click()
            tab.locator("#rankings").wait_for()
        found = axe.Axe().run(tab).response["violations"]
        serious += [
            (name, fault["id"], [node["html"][:120] for node in fault["nodes"]][:3])
            for fault in found
            if fault["impact"] in ("serious", "critical")
        ]
        if scheme == "dark":
            assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
    context.close()
    assert serious == []


def test_a_screen_reader_finds_headings_list_and_status(tab: Any) -> None:
    search(tab, "rows of a table")
    assert tab.get_by_role("list", name="Results").get_by_role("listitem").count() == 3
    assert tab.get_by_role("heading", level=1).count() == 1
    assert tab.get_by_role("search").count() == 1
    assert tab.locator("#results").get_by_role("heading", level=3).count() == 3
    assert tab.get_by_role("status").filter(has_text="3 of 3 passages").count() == 1
    assert tab.evaluate("document.activeElement.id") == "query"  # stays where it was
    view(tab, "map")
    assert tab.evaluate("document.activeElement.id") == "heading-map"


def test_two_users_at_once(tab: Any, browser: Any, page: SimpleNamespace) -> None:
    context = browser.new_context()
    other = open_tab(context, page)
    other.get_by_label("Query", exact=True).fill("compressed file")
    tab.get_by_label("Query", exact=True).fill("rows of a table")
    for one in (other, tab):
        one.locator("#search-button").click()
    status_has(other, "“compressed file”")
    status_has(tab, "“rows of a table”")
    context.close()


def test_words_both_and_filters(tab: Any, browser: Any, page: SimpleNamespace) -> None:
    search(tab, "gzip file")
    try:
        tab.get_by_label("Words").check()
        status_has(tab, "2 of 3 passages in Python documentation for “gzip file”")
        tab.get_by_label("Both").check()
        status_has(tab, "3 of 3 passages")
        pressed = tab.get_by_role("button", name="gzip 1")
        pressed.click()
        status_has(tab, "1 of 3 passages")
        assert tab.get_by_role("button", name="gzip 1").get_attribute("aria-pressed") == "true"
        assert "mode=both" in tab.url
        assert "source=gzip" in tab.url
        context = browser.new_context()
        colleague = open_tab(context, page, tab.url.removeprefix(page.url))
        status_has(colleague, "1 of 3 passages in Python documentation for “gzip file”")
        assert colleague.get_by_label("Both").is_checked()
        context.close()
        tab.get_by_role("button", name="gzip 1").click()
        status_has(tab, "3 of 3 passages")
        tab.get_by_label("Words").check()
        search_box = tab.get_by_label("Query", exact=True)
        search_box.fill("zebra")
        search_box.press("Enter")
        status_has(tab, "No passage of Python documentation has these words")
    finally:
        tab.get_by_label("Meaning").check()


def test_a_collection_of_another_engine_is_offered_to_be_indexed_again(tab: Any, page: SimpleNamespace) -> None:
    from nvembed_deploy.app.passages import Passage
    from nvembed_deploy.app.store import FolderStore

    engine = replace(page.library.engine, precision="int8", manifest_sha256="0" * 64)
    vectors = np.eye(2, page.encoder.dimension, dtype=np.float32)
    passages = [Passage(source="o.txt", title=DANGER, text=text) for text in ("A kept text.", "Another one.")]
    FolderStore.write(page.library.folder / "foreign", engine, passages, vectors)
    tab.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    choose(tab, "foreign")
    tab.locator("#view-search .offer").get_by_text("made by another engine").wait_for()
    tab.get_by_label("Query", exact=True).fill("kept")
    tab.get_by_label("Query", exact=True).press("Enter")
    assert tab.locator("#status").inner_text() == ""  # the offer stands there already
    tab.locator("#view-search .offer button").click()
    tab.locator("#view-search .offer").wait_for(state="hidden")
    assert page.library.open("foreign").engine == page.library.engine
    search(tab, "kept text")
    page.library.delete("foreign")


def test_an_address_with_nonsense_is_a_page_that_works(browser: Any, page: SimpleNamespace) -> None:
    context = browser.new_context(viewport=PHONE)
    address = "?q=rows%00%22%3E%3Cimg+src=x%3E&in=../none&mode=%22%5D&source=nothing&source=%3Cb%3E&similar=9#nowhere"
    tab = open_tab(context, page, address)
    status_has(tab, "3 of 3 passages in Python documentation")
    assert tab.locator("img").count() == 0
    search(tab, "cells")
    assert "source=" not in tab.url  # those that do not exist are left out
    tab.go_back()
    status_has(tab, "for “rows")
    tab.go_forward()
    status_has(tab, "for “cells”")
    tab.goto(f"{page.url}?q={'x' * 2500}")
    tab.locator("#status").wait_for(state="attached")
    status_has(tab, "the query has 2500 characters; the maximum is 2000")
    assert tab.errors == []
    context.close()
