"""Search by words, its fusion with search by meaning, and the filters, without the page."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nvembed_deploy import Encoder, InputError
from nvembed_deploy.app.library import Library
from nvembed_deploy.app.passages import Passage
from nvembed_deploy.app.requests import SearchRequest
from nvembed_deploy.app.results import MAX_FACETS, Results
from nvembed_deploy.app.search import MODES, Searcher
from nvembed_deploy.app.words import WORDS_WEIGHT, WordIndexes, best_rows, fuse, words

TEXTS = {
    "a.txt": ["The valve E-4711 is closed.", "Nothing of note.", "Straße und Größe"],
    "b.txt": ["The valve is open, the valve is old.", "Call read_csv for a table.", "数据库 连接"],
}


@pytest.fixture(scope="module")
def found(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A searched collection of two files."""
    library = Library(tmp_path_factory.mktemp("c"), Encoder(bundles["fp32"], device="cpu", backend="onnxruntime"))
    for source, texts in TEXTS.items():
        list(library.add_steps("mine", [Passage(source=source, title="", text=text) for text in texts]))
    searcher = Searcher(library.encoder)
    yield SimpleNamespace(library=library, searcher=searcher, results=Results(searcher, library))
    searcher.close()


def test_words_are_those_of_any_language_and_names_count_in_parts_too() -> None:
    assert words("Call read_csv(E-4711)!") == ["call", "read_csv", "read", "csv", "e", "4711"]
    assert words("STRASSE Größe ΣΊΣΥΦΟΣ") == ["strasse", "grösse", "σίσυφοσ"]
    assert words("?!") == []


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("valve", [3, 0]),  # twice in one of them
        ("E-4711", [0]),
        ("csv", [4]),
        ("STRASSE", [2]),
        ("连接", [5]),
        ("absent", []),
        ("?!", []),
    ],
)
def test_words_find_the_passages_that_have_them(found: SimpleNamespace, query: str, expected: list[int]) -> None:
    store = found.library.open("mine")
    hits = found.searcher.search(store, query, instruction="", count=10, mode="words").hits
    assert [hit.row for hit in hits] == expected
    vector = found.searcher.embed_query(query, "")
    assert [hit.score for hit in hits] == pytest.approx([float(store.vectors[row] @ vector) for row in expected])


def test_both_has_the_passages_of_either_and_a_filter_holds_in_every_mode(found: SimpleNamespace) -> None:
    store = found.library.open("mine")
    for mode in MODES:
        options = {"instruction": "", "count": 10, "mode": mode}
        assert len(found.searcher.search(store, "valve", **options).hits) == (2 if mode == "words" else 6)
        hits = found.searcher.search(store, "valve", sources=["a.txt"], **options).hits
        assert {hit.passage.source for hit in hits} == {"a.txt"}
        assert len(found.searcher.search(store, "valve", **options | {"count": 1}).hits) == 1
    with pytest.raises(InputError, match="mode must be meaning, words or both, got 'none'"):
        found.searcher.search(store, "valve", instruction="", count=1, mode="none")


def test_fusion_weighs_the_scaled_scores() -> None:
    cosines = np.array([0.5, 0.45, 0.3, 0.1], np.float32)
    scores = np.array([0, 0, 9, 3], np.float32)
    fused = [(1 - WORDS_WEIGHT) * (c - 0.1) / 0.4 + WORDS_WEIGHT * s / 9 for c, s in zip(cosines, scores, strict=True)]
    assert fuse(cosines, scores).tolist() == np.argsort(-np.array(fused), kind="stable").tolist()
    assert fuse(cosines, np.zeros(4, np.float32)).tolist() == [0, 1, 2, 3]
    assert fuse(np.full(3, 0.2, np.float32), np.array([0, 1, 2], np.float32)).tolist() == [2, 1, 0]
    assert best_rows(np.array([0, 2, 2, 1], np.float32), None, 2).tolist() == [1, 2]
    assert best_rows(np.array([5, 2], np.float32), np.array([False, True]), 2).tolist() == [1]


def test_a_word_index_follows_its_collection(found: SimpleNamespace, tmp_path: Path) -> None:
    library, indexes = Library(tmp_path, found.library.encoder), WordIndexes()
    for number, text in enumerate(("first", "second")):
        list(library.add_steps("mine", [Passage(source=f"{number}.txt", title="", text=text)]))
        assert np.count_nonzero(indexes.scores(library.open("mine"), "second")) == number


def test_facets_count_the_sources_and_keep_those_that_are_chosen(found: SimpleNamespace) -> None:
    data = {"collection": "mine", "query": "valve", "mode": "words", "instruction": ""}
    assert found.results.search(data)["facets"] == [("b.txt", 1), ("a.txt", 1)]
    chosen = found.results.search(data | {"sources": ["a.txt"]})
    assert (chosen["rows"], chosen["facets"]) == ([0], [("a.txt", 1), ("b.txt", 1)])
    assert found.results.search(data | {"query": "csv"})["facets"] == []  # one source is no choice
    none = found.results.search(data | {"query": "absent", "sources": ["a.txt"]})
    assert (none["far"], none["nothing"], none["facets"]) == (
        True,
        "No passage of mine has these words",
        [("a.txt", 0)],
    )
    passages = [Passage(source=f"{number}.txt", title="", text="valve") for number in range(MAX_FACETS + 3)]
    list(found.library.add_steps("many", passages))
    assert len(found.results.search(data | {"collection": "many"})["facets"]) == MAX_FACETS


def test_more_like_this_leaves_the_passage_out(found: SimpleNamespace) -> None:
    lineage = found.library.open("mine").record.lineage
    data = {"collection": "mine", "query": "", "similar": 3, "lineage": lineage, "count": 2}
    request = SearchRequest.parse(data, found.library)
    hits, _ = found.results.hits(request)
    scores = request.store.vectors @ request.store.vectors[3]
    assert [hit.row for hit in hits] == [row for row in np.argsort(-scores) if row != 3][:2]
    with pytest.raises(InputError, match="has changed in the meantime"):
        SearchRequest.parse(data | {"lineage": "old"}, found.library)
