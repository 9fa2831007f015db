"""Questions with well-known answers, searched with the embedded model."""

from pathlib import Path

import pytest

from nvembed_deploy import Encoder
from nvembed_deploy.app.library import Library
from nvembed_deploy.app.passages import library_passages
from nvembed_deploy.app.search import Searcher
from tests.conftest import needs_rtx

INSTRUCTION = "Given a question about Python, retrieve documentation that answers the question"
QUESTIONS = {
    "how do I read a CSV file?": "csv",
    "wait for several coroutines at once": "asyncio",
    "compress data with gzip": "gzip",
    "generate a random number": "random",
    "copy a whole directory tree": "shutil",
    "compute the median of a list of numbers": "statistics",
    "make a temporary file": "tempfile",
    "connect to a SQLite database": "sqlite3",
    "cache the results of a function": "functools",
    "parse a URL into its parts": "urllib",
}
OTHERS = ("bz2", "collections", "configparser", "glob", "heapq", "pathlib", "string")


@pytest.mark.slow
@needs_rtx
def test_known_answers_are_among_the_top_three(readme_folder: Path, tmp_path: Path) -> None:
    encoder = Encoder(readme_folder / "bundles" / "nv-embed-mini-fp16", device="cpu", backend="onnxruntime")
    modules = {*QUESTIONS.values(), *OTHERS}
    library = Library(tmp_path / "collections", encoder)
    store = library.add_python(passage for passage in library_passages() if passage.source in modules)
    searcher = Searcher(encoder)
    try:
        missed = []
        for question, module in QUESTIONS.items():
            hits = searcher.search(store, question, instruction=INSTRUCTION, count=3).hits
            if module not in [hit.passage.source for hit in hits]:
                missed.append((question, [hit.passage.title for hit in hits]))
    finally:
        searcher.close()
    assert missed == []
