"""A served page for the tiny model and a small collection, shared by the tests of the page."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from nvembed_deploy import Encoder

DANGER = "<img src=x onerror=\"document.title='taken over'\">"


def few_passages() -> list:
    from nvembed_deploy.app.passages import Passage

    texts = {
        "csv.reader": "Reads rows of a CSV file. Each row is a list of cells.",
        "gzip.open": "Opens a gzip file. It is compressed.",
        "danger": f"A passage with {DANGER} in it. And a second sentence.",
    }
    return [
        Passage(source=title.split(".")[0], title=title, text=text, prefix=title.replace(".", " "))
        for title, text in texts.items()
    ]


@pytest.fixture(scope="package")
def page(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    from nvembed_deploy.app.command import QUIET, listen_port

    os.environ.update(QUIET)
    from nvembed_deploy.app.documents import Limits
    from nvembed_deploy.app.library import Library
    from nvembed_deploy.app.page import Page
    from nvembed_deploy.app.search import Searcher
    from nvembed_deploy.app.server import PageServer

    encoder = Encoder(bundles["fp32"], device="cpu", backend="onnxruntime")
    library = Library(tmp_path_factory.mktemp("collections"), encoder)
    library.add_python(few_passages())
    searcher = Searcher(encoder)
    searcher.threshold = lambda *_: -1.0  # to a random model all texts are about as unrelated as any others
    int8_encoder = Encoder(bundles["int8"], device="cpu", backend="onnxruntime")
    limits = Limits(files=20, file_bytes=2**20, unpacked_bytes=2**21, chars=400_000)
    engines = {"left fp32": lambda: encoder, "right int8": lambda: int8_encoder}
    search_page = Page(searcher, library, engines, limits)
    server = PageServer(search_page, "127.0.0.1", listen_port("127.0.0.1", 0))
    yield SimpleNamespace(url=server.url, library=library, encoder=encoder, searcher=searcher, search_page=search_page)
    server.close()
    searcher.close()
