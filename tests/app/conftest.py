"""A served page for the tiny model and a small collection, shared by the tests of the page."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from nvembed_deploy import Encoder

DANGER = "<img src=x onerror=\"document.title='taken over'\">"


def few_passages() -> list:
    from nvembed_deploy.app.passages import Passage

    texts = {
        "csv.reader": "csv.reader(file): csv reader.\nReads rows of a CSV file. Each row is a list of cells.",
        "gzip.open": "gzip.open(name): gzip open.\nOpens a gzip file. It is compressed.",
        "danger": f"A passage with {DANGER} in it. And a second sentence.",
    }
    return [Passage(source=title.split(".")[0], title=title, text=text) for title, text in texts.items()]


@pytest.fixture(scope="package")
def page(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    import os

    from nvembed_deploy.app.command import QUIET, listen_port

    os.environ.update(QUIET)
    from nvembed_deploy.app.documents import Limits
    from nvembed_deploy.app.library import Library
    from nvembed_deploy.app.page import CSS, Page
    from nvembed_deploy.app.search import Searcher

    encoder = Encoder(bundles["fp32"], device="cpu", backend="onnxruntime")
    library = Library(tmp_path_factory.mktemp("collections"), encoder)
    library.add_python(few_passages())
    searcher = Searcher(encoder)
    int8_encoder = Encoder(bundles["int8"], device="cpu", backend="onnxruntime")
    limits = Limits(files=20, file_bytes=2**20, unpacked_bytes=2**21, chars=400_000)
    search_page = Page(searcher, library, {"left fp32": lambda: encoder, "right int8": lambda: int8_encoder}, limits)
    built = search_page.build()
    _, url, _ = built.queue(max_size=32).launch(
        server_name="127.0.0.1",
        server_port=listen_port("127.0.0.1", 0),
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        share=False,
        max_file_size="2mb",
        css=CSS,
        footer_links=[],
    )
    yield SimpleNamespace(
        url=url, library=library, encoder=encoder, searcher=searcher, lock=threading.Lock(), search_page=search_page
    )
    built.close()
    searcher.close()
