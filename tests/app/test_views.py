"""What the views of the page are made from: the comparison, the map, and the engine."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest

from nvembed_deploy import Encoder
from nvembed_deploy.app import plane
from nvembed_deploy.app.compare import Comparer, Comparison, RankedPassage
from nvembed_deploy.app.compare_view import compare_view
from nvembed_deploy.app.engine_view import _position, engine_view
from nvembed_deploy.app.library import PYTHON, Library
from nvembed_deploy.app.passages import Passage
from nvembed_deploy.app.plane import MAX_POINTS, Maps, Plane, draw, sampled_rows
from nvembed_deploy.app.requests import SearchRequest
from nvembed_deploy.app.search import Searcher
from nvembed_deploy.app.store import Engine, FolderStore
from tests.app.conftest import DANGER, few_passages
from tests.app.test_cards import Reader


@pytest.fixture(scope="module")
def encoder(bundles: dict[str, Path]) -> Encoder:
    return Encoder(bundles["fp32"], device="cpu", backend="onnxruntime")


def test_two_engines_side_by_side(encoder: Encoder, bundles: dict[str, Path], tmp_path: Path) -> None:
    library = Library(tmp_path, encoder)
    library.add_python(few_passages())
    int8_encoder = Encoder(bundles["int8"], device="cpu", backend="onnxruntime")
    searcher = Searcher(encoder)
    comparer = Comparer(searcher, {"fp32": lambda: encoder, "int8": lambda: int8_encoder})
    request = {"collection": PYTHON, "query": "rows of a table", "instruction": "Find passages"}
    try:
        same = comparer.compare(SearchRequest.parse(request | {"instruction": ""}, library), "fp32", "fp32")
        compared = comparer.compare(SearchRequest.parse(request, library), "fp32", "int8")
    finally:
        searcher.close()
    assert (same.overlap, same.largest_difference, same.candidates) == (1.0, 0.0, 3)
    assert [passage.ranks[0] for passage in compared.passages] == [1, 2, 3]
    prompt = encoder.query_prompt("Find passages")
    texts = [passage.embedded_text for passage in few_passages()]
    scores = [side.encode(texts) @ side.encode("rows of a table", prompt=prompt) for side in (encoder, int8_encoder)]
    assert compared.largest_difference == pytest.approx(np.abs(scores[0] - scores[1]).max(), abs=1e-6)
    assert compared.largest_difference > 0


def ranked(left: int, right: int, title: str = "") -> RankedPassage:
    return RankedPassage(title=title or f"p{left}", source="s", ranks=(left, right), cosines=(0.5, 0.4))


def test_moved_ranks_are_seen() -> None:
    """A line goes from each place to the other, and what leaves or enters the ten best says where to or from."""
    passages = [ranked(1, 3, DANGER), ranked(2, 2), ranked(3, 1), *(ranked(n, n) for n in range(4, 10)), ranked(10, 17)]
    passages.append(ranked(12, 10, "newcomer"))
    html = compare_view(
        Comparison(passages=passages, overlap=0.9, largest_difference=0.1, milliseconds=(1.0, 2.0), candidates=40),
        "a<b",
        "c",
        "",
    )
    read = Reader(html)
    assert "img" not in read.tags
    assert html.count("<li>") == 20
    assert html.count("<path") == 11
    assert [html.count(f'<path class="{way}"') for way in ("up", "down", "same")] == [2, 2, 7]
    assert '<b class="down">to 17</b>' in html
    assert '<b class="up">from 12</b>' in html
    assert '▲</span><span class="sr">up </span>2' in html
    for few in ([], [ranked(1, 1)]):
        compare_view(
            Comparison(passages=few, overlap=0.0, largest_difference=0.0, milliseconds=(1, 1), candidates=len(few)),
            "a",
            "a",
            "i",
        )


def test_the_engine_is_a_picture(encoder: Encoder) -> None:
    html = engine_view(encoder)
    read = Reader(html)
    (report, *_) = encoder.manifest.parity
    assert html.count('class="parity"') == len(encoder.manifest.parity)
    assert f"{report.min_cosine:.6f}" in read.text
    assert f"{encoder.manifest.dimension} numbers" in read.text
    assert "your text" in read.text
    assert [_position(cosine) for cosine in (0.0, 0.99, 0.9999, 1.0)] == pytest.approx([1, 0.75, 0.5, 0])


def test_the_map_begins_as_the_plane_of_the_principal_components(encoder: Encoder, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(200, 16)) * np.array([9, 5, *[1] * 14])).astype(np.float32)
    points = Plane.of(vectors).points(vectors)
    centred = vectors - vectors.mean(axis=0)
    expected = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    np.testing.assert_allclose(np.abs(points), np.abs(expected), rtol=1e-3, atol=1e-2)
    store = Library(tmp_path, encoder).add_python(few_passages())
    shown = Maps().get(PYTHON, store, is_growing=False)
    drawn = draw(store, shown, [1], store.vectors[0])
    assert [point[3:] for point in drawn["points"]] == [[row, store.passages[row].label] for row in range(3)]
    assert (drawn["hits"], len(drawn["query"]), len(drawn["sources"])) == ([1], 2, 3)
    assert shown.reason == "a map of neighbours needs 30 passages"
    rows = sampled_rows(2 * MAX_POINTS - 1)
    assert len(rows) == len(set(rows.tolist())) == MAX_POINTS
    assert {row % 2 for row in rows.tolist()} == {0, 1}  # a regular step would miss sources that alternate


def made(maps: Maps, store: FolderStore) -> plane.CollectionMap:
    """Returns the map when it is ready, or has a reason not to be."""
    for _ in range(1200):
        shown = maps.get("c", store, is_growing=False)
        if shown.progress is None:
            return shown
        time.sleep(0.05)
    raise AssertionError(shown.progress)


def stored(folder: Path, encoder: Encoder, vectors: np.ndarray) -> FolderStore:
    passages = [Passage(source="s", title="", text=f"text {row}") for row in range(len(vectors))]
    return FolderStore.write(folder, replace(Engine.of(encoder), dimension=vectors.shape[1]), passages, vectors)


def clusters(count: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(count, 16)), size, axis=0) + 0.2 * rng.normal(size=(count * size, 16))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_the_map_keeps_neighbours(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And places a query and passages outside the sample among theirs."""
    pytest.importorskip("openTSNE", reason="openTSNE is not installed: pip install nvembed-deploy[app]")
    monkeypatch.setattr(plane, "ITERATIONS", (100, 100))
    monkeypatch.setattr(plane, "MAX_POINTS", 60)
    vectors = clusters(6, 12)
    store, maps = stored(tmp_path / "c", encoder, vectors), Maps()
    growing = maps.get("c", store, is_growing=True)
    assert (growing.kind, growing.progress) == (plane.COMPONENTS, None)
    assert maps.get("c", store, is_growing=False).progress == 0.0
    shown = made(maps, store)
    assert (shown.kind, shown.reason, len(shown.rows)) == (plane.NEIGHBOURS, "", 60)
    assert shown.version != growing.version
    distances = np.linalg.norm(shown.positions[:, None] - shown.positions[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    groups = shown.rows // 12
    assert np.mean(groups[distances.argmin(axis=1)] == groups) > 0.95
    (outside,) = np.setdiff1d(np.arange(72), shown.rows)[:1]
    drawn = draw(store, shown, [int(outside)], vectors[outside])
    places = {point[3]: np.array(point[:2]) for point in drawn["points"]}
    assert len(places) == 61
    assert maps.get("c", store, is_growing=False) == shown  # placing others changes nothing
    for place in (places[outside], np.array(drawn["query"])):
        nearest = min(shown.rows, key=lambda row: np.linalg.norm(places[row] - place))
        assert nearest // 12 == outside // 12


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_passages_have_a_map_too(encoder: Encoder, tmp_path: Path, count: int) -> None:
    store = stored(tmp_path / "c", encoder, clusters(count, 1))
    shown = made(Maps(), store)
    drawn = draw(store, shown, [0], store.vectors[0])
    assert len(drawn["points"]) == count
    assert np.isfinite([point[:2] for point in drawn["points"]]).all()
    assert shown.reason == "a map of neighbours needs 30 passages"


def test_a_map_of_neighbours_that_cannot_be_made_says_why(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    equal = stored(tmp_path / "equal", encoder, clusters(1, 1).repeat(40, axis=0))
    monkeypatch.setitem(sys.modules, "openTSNE", MagicMock())
    assert made(Maps(), equal).reason == "no map of neighbours could be made (all passages are equal)"
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    shown = made(Maps(), stored(tmp_path / "c", encoder, clusters(6, 6)))
    assert shown.reason.startswith("a map of neighbours needs openTSNE (")
    assert shown.kind == plane.COMPONENTS
