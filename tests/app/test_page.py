"""The page in a real browser, and its API."""

import csv
import errno
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
for library in ("gradio", "pandas", "gradio_client"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[app]")

from tests.app.conftest import DANGER  # noqa: E402
from tests.app.test_store import make_zip  # noqa: E402

TIMEOUT_MS = 30_000
"""Timeout in milliseconds: two loaded cores are slow."""


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


@pytest.fixture
def tab(browser: Any, page: SimpleNamespace) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    opened = open_tab(context, page)
    yield opened
    outside = [url for url in opened.requested if not url.startswith((page.url, "data:", "blob:"))]
    context.close()
    assert outside == []


def open_tab(context: Any, page: SimpleNamespace) -> Any:
    opened = context.new_page()
    opened.requested = []
    opened.on("request", lambda request: opened.requested.append(request.url))
    opened.set_default_timeout(TIMEOUT_MS)
    opened.goto(page.url)
    opened.get_by_label("Query", exact=True).wait_for()
    return opened


def search(tab: Any, query: str) -> None:
    box = tab.get_by_label("Query", exact=True)
    box.fill(query)
    box.press("Enter")
    tab.locator("#result-1").wait_for(state="visible")
    tab.wait_for_function("document.querySelector('#times textarea, #times input').value.includes('searching')")


def test_enter_searches(tab: Any, page: SimpleNamespace) -> None:
    search(tab, "rows of a table")
    expected = page.searcher.search(page.library.add_python(), "rows of a table", instruction="", count=3)
    assert tab.locator("[id^=result-]:visible").count() == 3
    assert "ms" in tab.locator("#times textarea, #times input").first.input_value()
    titles = {hit.passage.title for hit in expected.hits}
    shown = [tab.locator(f"#result-{rank}").inner_text() for rank in (1, 2, 3)]
    assert all(any(title in text for text in shown) for title in titles)
    assert tab.locator("#bars").is_visible()


def test_hostile_text_is_shown_as_text(tab: Any) -> None:
    search(tab, f"what is {DANGER}?")
    assert DANGER in "".join(tab.locator(f"#result-{rank}").inner_text() for rank in (1, 2, 3)).replace("\n", " ")
    assert tab.title() == "Semantic search"
    assert tab.locator("img[src=x]").count() == 0


def test_results_can_be_filtered_by_source(tab: Any) -> None:
    tab.get_by_role("button", name="Instruction and filters").click()
    tab.get_by_label("Only from these sources").click()
    tab.get_by_role("option", name="gzip").click()
    search(tab, "anything")
    assert tab.locator("[id^=result-]:visible").count() == 1
    assert "gzip" in tab.locator("#result-1").inner_text()


def test_an_empty_query_is_explained(tab: Any) -> None:
    tab.locator("#search-button").click()
    tab.get_by_text("the query is empty; enter a search query").first.wait_for()


def test_an_example_fills_in_the_query(tab: Any) -> None:
    tab.get_by_text("compress data with gzip").first.click()
    tab.wait_for_function("document.querySelector('#query textarea, #query input').value.includes('gzip')")


def test_documents_are_added_found_and_deleted(tab: Any, page: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "=note.txt").write_text("The spare key lies under the third flower pot.")
    upload(tab, tmp_path / "=note.txt", "keys")
    tab.get_by_role("tab", name="Search").click()
    search(tab, "where is the key?")
    assert "flower pot" in tab.locator("#result-1").inner_text()
    tab.locator("#export").click()
    link = tab.locator("#csv").get_by_role("link").first
    link.wait_for()
    with tab.expect_download() as download:
        link.click()
    rows = list(csv.reader(Path(download.value.path()).read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["rank", "cosine", "source", "title", "text"]
    assert rows[1][2] == "'=note.txt"  # no formula for a spreadsheet
    tab.get_by_role("tab", name="Your documents").click()
    tab.get_by_label("Collection to delete").click()
    tab.get_by_role("option", name="keys").click()
    tab.locator("#delete").click()
    state_is(tab, "'keys' was deleted")
    assert "keys" not in page.library.names()


def upload(tab: Any, path: Path, name: str, *, wait: bool = True) -> None:
    tab.get_by_role("tab", name="Your documents").click()
    tab.locator("#files input[type=file]").set_input_files(str(path))
    tab.locator("#files").get_by_text(path.stem).first.wait_for()
    tab.get_by_label("Collection to add to").fill(name)
    tab.locator("#add").click()
    if wait:
        state_is(tab, "were added to")


def state_is(tab: Any, text: str) -> None:
    tab.wait_for_function(f"document.querySelector('#state textarea, #state input').value.includes({text!r})")


def test_adding_can_be_cancelled(
    tab: Any, page: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encode = page.encoder.encode

    def counted(texts: Any, **options: Any) -> Any:
        calls.append(len(texts))
        time.sleep(0.2)  # a tiny model would be done before the button is pressed
        return encode(texts, **options)

    monkeypatch.setattr(page.encoder, "encode", counted)
    (tmp_path / "long.txt").write_text("a sentence that is one of many. " * 12_000)
    upload(tab, tmp_path / "long.txt", "long", wait=False)
    state_is(tab, "passages embedded")
    tab.locator("#cancel").click()
    state_is(tab, "cancelled; nothing was added")
    stopped = len(calls)
    time.sleep(1)
    assert len(calls) == stopped
    assert "long" not in page.library.names()
    tab.locator("#cancel").click()
    tab.get_by_text("no documents are being added, so there is nothing to cancel").first.wait_for()


def test_an_upload_that_waits_for_others_can_be_cancelled(tab: Any, page: SimpleNamespace, tmp_path: Path) -> None:
    from nvembed_deploy.app.page import MAX_UPLOADS

    (tmp_path / "short.txt").write_text("a sentence")
    for _ in range(MAX_UPLOADS):
        page.search_page._uploads.acquire()
    try:
        upload(tab, tmp_path / "short.txt", "waiting", wait=False)
        state_is(tab, "waiting for other uploads")
        tab.locator("#cancel").click()
        state_is(tab, "cancelled; nothing was added")
    finally:
        page.search_page._uploads.release(MAX_UPLOADS)
    assert "waiting" not in page.library.names()


def test_file_names_are_not_rendered_as_html(tab: Any, tmp_path: Path) -> None:
    """This includes messages: Gradio renders them as HTML, and would request an image."""
    name = "<img src=&#47;&#47;evil.example&#47;x.png>.txt"
    upload(tab, make_zip(tmp_path / "hostile.zip", {name: b"\xff\xff"}), name[:38], wait=False)
    tab.get_by_text("is not UTF-8 text").first.wait_for()
    assert tab.locator("img[src*=evil]").count() == 0  # and `tab` looks at every request
    assert "<img src=" in tab.get_by_text("is not UTF-8 text").first.inner_text()


def test_wrong_files_are_explained(tab: Any, tmp_path: Path) -> None:
    bomb = make_zip(tmp_path / "bomb.zip", {"a.txt": b"0" * 3_000_000})
    upload(tab, bomb, "bomb", wait=False)
    tab.get_by_text("unpacks to more than the limit").first.wait_for()


def test_compare_shows_both_rankings(tab: Any) -> None:
    tab.get_by_role("tab", name="Compare").click()
    box = tab.get_by_label("Query to compare")
    box.fill("rows of a table")
    box.press("Enter")
    tab.wait_for_function(
        "document.querySelector('#difference textarea, #difference input').value.includes('of the top ten')"
    )
    assert "csv.reader" in tab.locator("#rankings").inner_text()


def test_the_map_is_drawn(tab: Any) -> None:
    search(tab, "rows of a table")
    tab.get_by_role("tab", name="Map").click()
    tab.locator("#draw").click()
    tab.locator("#plane canvas, #plane svg.marks").first.wait_for()


def test_the_engine_tab_shows_the_engines_details(tab: Any) -> None:
    tab.get_by_role("tab", name="Engine").click()
    card = tab.get_by_label("Engine details").input_value()
    assert "onnxruntime" in card
    assert "lowest cosine" in card


def test_the_page_works_in_dark_mode_and_on_narrow_screens(browser: Any, page: SimpleNamespace) -> None:
    dark = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark")
    tab = open_tab(dark, page)
    search(tab, "rows of a table")
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.locator("#search-button").bounding_box()["width"] >= 44
    light = sum(
        tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).slice(0, 3).map(Number)")
    )
    dark.close()
    assert light < 3 * 100


def test_two_users_at_once(browser: Any, page: SimpleNamespace) -> None:
    contexts = [browser.new_context() for _ in range(2)]
    tabs = [open_tab(context, page) for context in contexts]
    for tab, query in zip(tabs, ("rows of a table", "compressed file"), strict=True):
        tab.get_by_label("Query", exact=True).fill(query)
    for tab in tabs:
        tab.locator("#search-button").click()
    for tab in tabs:
        tab.locator("#result-1").wait_for(state="visible")
    shown = [tab.locator("#result-1").inner_text() for tab in tabs]
    for context in contexts:
        context.close()
    table_title, file_title = (
        page.searcher.search(page.library.add_python(), query, instruction=preset(), count=1).hits[0].passage.title
        for query in ("rows of a table", "compressed file")
    )
    assert table_title in shown[0]
    assert file_title in shown[1]


def preset() -> str:
    from nvembed_deploy.app.page import PRESETS

    return next(iter(PRESETS.values()))


def test_programs_can_search(page: SimpleNamespace) -> None:
    from gradio_client import Client

    client = Client(page.url, verbose=False)
    expected = page.searcher.search(page.library.add_python(), "rows", instruction="", count=2)
    with ThreadPoolExecutor(4) as pool:
        for hits in pool.map(lambda _: client.predict(query="rows", count=2, api_name="/search"), range(8)):
            assert [hit["title"] for hit in hits] == [hit.passage.title for hit in expected.hits]
    with pytest.raises(Exception, match="there is no collection 'none'"):
        client.predict(query="rows", collection="none", api_name="/search")
    with pytest.raises(Exception, match="the query has 3000 characters"):
        client.predict(query="x" * 3000, api_name="/search")
    for wrong in ({"query": None}, {"query": "rows", "instruction": None}, {"query": "rows", "count": 2.5}):
        with pytest.raises(Exception, match="must be strings, and count an integer"):
            client.predict(**wrong, api_name="/search")


def test_a_full_disk_is_reported() -> None:
    from nvembed_deploy.app.page import shown_errors

    with pytest.raises(Exception, match=r"No space left on device: .* check its disk"), shown_errors():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "..%2f..%2fetc%2fpasswd", "http://169.254.169.254/latest", "/proc/self/environ"]
)
def test_no_file_of_this_machine_is_served(page: SimpleNamespace, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{page.url}gradio_api/file={path}", timeout=20)
    assert caught.value.code in (400, 403, 404)


def test_cells_that_look_like_formulas_are_escaped() -> None:
    from nvembed_deploy.app.page import safe_cell

    for start in "=+-@\t\r":
        assert safe_cell(f"{start}1") == f"'{start}1"
    assert safe_cell("a=1") == "a=1"
