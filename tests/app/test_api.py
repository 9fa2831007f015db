"""The page's API for programs, and what the page's own functions refuse."""

import errno
import os
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

for library in ("gradio", "gradio_client"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[app]")

from nvembed_deploy.app.requests import PYTHON_INSTRUCTION, ApiErrors, server_function  # noqa: E402
from nvembed_deploy.app.results import safe_cell  # noqa: E402
from tests.app.test_guard import ask  # noqa: E402

PYTHON = "Python documentation"


@pytest.fixture(scope="module")
def client(page: SimpleNamespace) -> Any:
    from gradio_client import Client

    return Client(page.url, verbose=False)


def test_programs_search_as_the_page_does(page: SimpleNamespace, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page.searcher, "mark", None)  # marks are for the eye; a program does not wait for them
    for options, instruction in (({}, PYTHON_INSTRUCTION), ({"instruction": ""}, "")):
        expected = page.searcher.search(page.library.open(PYTHON), "rows", instruction=instruction, count=2).hits
        with ThreadPoolExecutor(4) as pool:
            calls = pool.map(
                lambda _, options=options: client.predict(query="rows", count=2, api_name="/search", **options),
                range(4),
            )
            for hits in calls:
                assert [(hit["title"], pytest.approx(hit["score"], abs=1e-6)) for hit in hits] == [
                    (hit.passage.title, hit.score) for hit in expected
                ]
    hits = client.predict(query="rows", sources=["gzip"], api_name="/search")
    assert [(hit["source"], hit["near"]) for hit in hits] == [("gzip", True)]


def test_programs_list_collections_also_new_ones(page: SimpleNamespace, client: Any) -> None:
    from nvembed_deploy.app.passages import Passage

    list(page.library.add_steps("later", [Passage(source="o.txt", title="", text="Something.", place="row 3")]))
    collections = client.predict(api_name="/collections")
    assert [(entry["name"], entry["passages"], entry["sources"]) for entry in collections] == [
        (PYTHON, 3, ["csv", "danger", "gzip"]),
        ("later", 1, ["o.txt"]),
    ]
    assert collections[0]["instruction"] == PYTHON_INSTRUCTION
    (hit,) = client.predict(query="rows", collection="later", api_name="/search")
    assert (hit["title"], hit["place"]) == ("o.txt", "row 3")
    compared = client.predict(
        query="rows", left="left fp32", right="right int8", collection="later", api_name="/compare"
    )
    assert compared["candidates"] == 1
    page.library.delete("later")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"collection": "none"}, "there is no collection 'none'; available: Python documentation"),
        ({"query": "x" * 3000}, "the query has 3000 characters"),
        ({"query": " "}, "the query is empty"),
        ({"query": None}, "must be strings"),
        ({"instruction": 3}, "must be strings"),
        ({"count": 2.5}, "count must be a whole number from 1 to 100, got 2.5"),
        ({"count": 0}, "count must be a whole number from 1 to 100, got 0"),
        ({"count": True}, "got True"),
        ({"count": 101}, "got 101"),
        ({"sources": ["nothing"]}, "there is no source 'nothing' in 'Python documentation'"),
        ({"sources": "csv"}, "sources must be a list of names"),
    ],
)
def test_what_the_api_cannot_do_is_refused(
    page: SimpleNamespace, client: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception) as caught:
        client.predict(**{"query": "rows", "api_name": "/search"} | arguments)
    assert message in str(caught.value)


def test_the_functions_of_the_page_check_their_input(page: SimpleNamespace, tmp_path: Path) -> None:
    own = page.search_page
    lineage = page.library.open(PYTHON).record.lineage
    base = {"collection": PYTHON, "query": "rows", "lineage": lineage}
    for function, data, message in (
        (own.add, {"paths": []}, "no files are chosen"),
        (own.add, {"paths": [str(tmp_path / "a.txt")], "collection": "mine"}, "only uploaded files"),
        (own.results.search, {"query": 1, "collection": PYTHON}, "query must be a string"),
        (own.results.search, "no object", "is not a valid collection name"),
        (own.results.search, base | {"similar": 99}, "there is no such passage"),
        (own.results.marks, base | {"rows": [-1]}, "there is no such passage"),
        (own.results.marks, base | {"rows": [0], "lineage": "old"}, "has changed in the meantime"),
        (own.results.marks, base | {"rows": "0"}, "rows must be a list"),
        (own.results.passage, base | {"row": None}, "there is no such passage"),
        (own.delete, {"collection": PYTHON}, "cannot be deleted"),
        (own.delete, {"collection": PYTHON, "file": PYTHON}, "nothing of it can be removed"),
        (own.cancel, {"job": 1, "client": ""}, "nothing to cancel"),
        (own.compare, base | {"left": "x", "right": "x"}, "there is no engine 'x'"),
    ):
        assert message in server_function(function)(data)["error"]


def test_a_full_disk_is_reported() -> None:
    def full(_: Any) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert "No space left on device: " in server_function(full)({})["error"]
    with pytest.raises(Exception, match=r"No space left on device: .* check its disk"), ApiErrors():
        full({})


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "..%2f..%2fetc%2fpasswd", "http://169.254.169.254/latest", "/proc/self/environ"]
)
def test_no_file_of_this_machine_is_served(page: SimpleNamespace, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{page.url}gradio_api/file={path}", timeout=20)
    assert caught.value.code in (400, 403, 404)


def test_other_websites_reach_nothing(page: SimpleNamespace) -> None:
    assert ask(page.url)[0] == 200
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        for path in ("", "config", "gradio_api/upload"):
            status, answer, _ = ask(f"{page.url}{path}", headers, method="POST" if "upload" in path else "GET")
            assert status == 403
            assert "access-control-allow-origin" not in answer


def test_cells_that_look_like_formulas_are_escaped() -> None:
    for start in "=+-@\t\r":
        assert safe_cell(f"{start}1") == f"'{start}1"
    assert safe_cell("a=1") == "a=1"
