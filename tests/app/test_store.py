"""Passages and collections, tested without the page."""

import json
import shutil
import threading
from collections import OrderedDict
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest

from nvembed_deploy import BundleError, ConfigError, Encoder
from nvembed_deploy.app.index import Content, ExactIndex
from nvembed_deploy.app.library import PYTHON, BusyError, Library
from nvembed_deploy.app.passages import MAX_TEXT_CHARS, Passage, library_passages
from nvembed_deploy.app.search import Searcher, sentences
from nvembed_deploy.app.store import PASSAGES, RECORD, VECTORS, Engine, FolderStore, StoredFile
from tests.app.conftest import few_passages


@pytest.fixture
def library(encoder: Encoder, tmp_path: Path) -> Library:
    return Library(tmp_path / "collections", encoder)


def test_the_library_contains_pythons_documentation() -> None:
    passages = list(library_passages())
    titles = {passage.title for passage in passages}
    assert {"csv.Sniffer", "math.gcd", "shutil.copytree", "with"} <= titles
    assert len(passages) > 3000
    assert all(passage.text and len(passage.text) <= MAX_TEXT_CHARS for passage in passages)
    assert not any("._" in passage.title for passage in passages)


def test_search_is_exact_and_filters_by_source(library: Library, encoder: Encoder) -> None:
    store = library.add_python(few_passages())
    query = encoder.encode("some rows of a file")
    scores = encoder.encode([passage.embedded_text for passage in few_passages()]) @ query
    hits = store.search(library.engine, query, count=3)
    assert [hit.passage.title for hit in hits] == [few_passages()[i].title for i in np.argsort(-scores)]
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1], atol=2e-6)
    assert [hit.passage.source for hit in store.search(library.engine, query, count=9, sources=["gzip"])] == ["gzip"]
    assert store.search(library.engine, query, count=9, sources=["nothing"]) == []
    assert store.sources() == ["csv", "danger", "gzip"]


def test_another_engine_is_refused(library: Library, bundles: dict[str, Path], tmp_path: Path) -> None:
    list(library.add_steps("mine", few_passages()))
    fp16_encoder = Encoder(bundles["fp16"], device="cpu", backend="onnxruntime")
    fp16_library = Library(tmp_path / "collections", fp16_encoder)
    store = fp16_library.open("mine")
    with pytest.raises(ConfigError, match=r"was made by another model or precision .*index the passages again"):
        store.search(fp16_library.engine, fp16_encoder.encode("a"), count=1)
    with pytest.raises(ConfigError, match="index it again with this engine, or add to another collection"):
        list(fp16_library.add_steps("mine", few_passages()))
    assert fp16_library.names() == ["mine"]  # the other engine's copy of Python's documentation is not shown


def test_a_folder_that_cannot_be_created_is_named_with_the_option(encoder: Encoder, tmp_path: Path) -> None:
    """As that of a user whose home is the root folder, in many containers."""
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"file/collections cannot be created \(Not a directory\); pass --collections"
    ):
        Library(tmp_path / "file" / "collections", encoder)


def test_collections_grow_persist_and_can_be_deleted(library: Library, encoder: Encoder) -> None:
    library.add_python(few_passages())
    assert [done for done, _ in library.add_steps("mine", few_passages()[:1])] == [0, 1]
    list(library.add_steps("mine", few_passages()[1:]))
    reopened = Library(library.folder, encoder)
    assert reopened.names() == [PYTHON, "mine"]
    assert [passage.title for passage in reopened.open("mine").passages] == [
        passage.title for passage in few_passages()
    ]
    reopened.delete("mine")
    assert Library(library.folder, encoder).names() == [PYTHON]
    with pytest.raises(ConfigError, match="there is no collection 'mine'"):
        reopened.open("mine")
    with pytest.raises(ConfigError, match="cannot be deleted: it would be indexed again"):
        reopened.delete(PYTHON)
    for name in ("", "../up", "a/b", ".hidden", "x" * 41):
        with pytest.raises(ConfigError, match="is not a valid collection name"):
            list(reopened.add_steps(name, few_passages()))


@pytest.mark.parametrize("name", [PYTHON, f"{PYTHON}.mine", PYTHON.lower()])
def test_the_name_of_pythons_documentation_is_reserved(library: Library, name: str) -> None:
    library.add_python(few_passages())
    with pytest.raises(ConfigError, match="is reserved for Python's documentation"):
        list(library.add_steps(name, few_passages()))
    assert len(library.open(PYTHON)) == len(few_passages())


@pytest.mark.parametrize("file", [RECORD, PASSAGES, VECTORS])
def test_a_damaged_collection_can_be_deleted_and_pythons_is_rebuilt(
    encoder: Encoder, tmp_path: Path, file: str
) -> None:
    library = Library(tmp_path, encoder)
    library.add_python(few_passages())
    list(library.add_steps("mine", few_passages()))
    for record in tmp_path.glob(f"*/{file}"):
        record.write_bytes(b"damaged")
    reopened = Library(tmp_path, encoder)
    with pytest.raises(BundleError, match="delete it and index again"):
        reopened.open("mine")
    reopened.delete("mine")
    assert reopened.names() == [PYTHON]
    assert len(reopened.add_python(few_passages())) == len(few_passages())
    with pytest.raises(ConfigError, match="there is no collection 'mine'; it may have been deleted"):
        reopened.delete("mine")


def test_an_unfinished_folder_is_not_a_collection(library: Library, encoder: Encoder) -> None:
    """Neither are the leftovers of an interrupted run, which the next start removes."""
    list(library.add_steps("mine", few_passages()))
    leftovers = library.folder / ".mine.staging-abc"
    shutil.copytree(library.folder / "mine", leftovers)
    assert library.names() == ["mine"]
    Library(library.folder, encoder)
    assert not leftovers.exists()


def test_a_failed_index_loses_and_doubles_nothing(encoder: Encoder, tmp_path: Path) -> None:
    library = Library(tmp_path, encoder)
    library._index_kind = "qdrant"  # an index that is built when the passages are stored
    ends = iter([ConfigError("down"), None])

    def open_index(content: Content) -> ExactIndex:
        if (err := next(ends)) is not None:
            raise err
        return ExactIndex(content)

    library._open_index = open_index
    with pytest.raises(ConfigError, match="down"):
        list(library.add_steps("mine", few_passages()))
    assert len(library.open("mine")) == len(few_passages())


def test_a_killed_run_goes_on_where_it_stopped(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvembed_deploy.app import library as module

    monkeypatch.setattr(module, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(module, "FIRST_BLOCK", 2)
    monkeypatch.setattr(module, "MAX_BLOCK", 2)
    passages = [Passage(source="m", title=f"m.{i}", text=f"text number {i}") for i in range(7)]
    steps = Library(tmp_path, encoder).add_python_steps(passages)
    assert [next(steps) for _ in range(3)] == [(0, 7), (2, 7), (2, 7)]
    next(steps)
    steps.close()  # as a kill: nothing of what was stored is taken back
    folder = next(tmp_path.glob(f"{PYTHON}*"))
    for name in (PASSAGES, VECTORS):  # what a kill in the middle of a write leaves
        with (folder / name).open("ab") as file:
            file.write(b"half a row")
    library = Library(tmp_path, encoder)
    assert not library.is_indexed(PYTHON)
    assert len(library.open(PYTHON)) in (2, 4)  # it can be searched
    encoded: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(encoder, name)

        def encode(self, texts: list[str]) -> object:
            encoded.append(len(texts))
            return encoder.encode(texts)

    library.encoder = Counting()
    store = library.add_python(passages)
    assert sum(encoded) < len(passages)
    assert store.passages == passages
    expected = encoder.encode([passage.embedded_text for passage in passages])
    np.testing.assert_allclose(store.vectors, expected, atol=2e-6)
    np.testing.assert_array_equal(np.load(folder / VECTORS), store.vectors)
    changed = [*passages, Passage(source="m", title="new", text="added by another Python")]
    assert library.is_indexed(PYTHON)
    assert library.add_python(changed) is store  # complete: it is not indexed again


def test_files_are_replaced_by_name_and_removed(library: Library) -> None:
    first, second, third = few_passages()
    for name, passages in (("a", [first]), ("b", [second, third])):
        list(library.add_steps("mine", passages, file_record(name, passages)))
    list(library.add_steps("mine", [third], file_record("a", [third], sha256="other")))
    assert library.open("mine").passages == [second, third, third]
    assert [(file.name, file.rows) for file in library.files("mine")] == [("b", 2), ("a", 1)]
    library.delete_file("mine", "b")
    assert library.open("mine").passages == [third]
    with pytest.raises(ConfigError, match="there is no file 'b' in 'mine'"):
        library.delete_file("mine", "b")
    library.delete_file("mine", "a")
    assert library.names() == []


def file_record(name: str, passages: list[Passage], sha256: str = "") -> StoredFile:
    return StoredFile(name=name, bytes=9, sha256=sha256 or name, passages=len(passages), rows=0)


def test_a_collection_of_an_earlier_version_opens_and_grows(library: Library) -> None:
    list(library.add_steps("mine", few_passages()[:2]))
    folder = library.folder / "mine"
    record = json.loads((folder / RECORD).read_text())
    old = {name: record[name] for name in ("identity", "model", "precision", "manifest_sha256", "dimension")}
    (folder / RECORD).write_text(json.dumps(old))
    assert len(Library(library.folder, library.encoder).open("mine")) == 2
    list(library.add_steps("mine", few_passages()[2:]))
    store = library.open("mine")
    assert store.passages == few_passages()
    assert store.file_rows("danger") == range(2, 3)


def test_two_pages_on_one_folder_lose_no_passages(encoder: Encoder, tmp_path: Path) -> None:
    first_library, second_library = (Library(tmp_path, encoder) for _ in range(2))
    list(first_library.add_steps("mine", few_passages()[:1]))
    assert len(second_library.open("mine")) == 1
    list(first_library.add_steps("mine", few_passages()[1:2]))
    list(second_library.add_steps("mine", few_passages()[2:]))
    assert first_library.open("mine").passages == second_library.open("mine").passages == few_passages()
    second_library.delete("mine")
    with pytest.raises(ConfigError, match="there is no collection 'mine'"):
        first_library.open("mine")


def test_two_writers_of_one_collection_wait_for_each_other(encoder: Encoder, tmp_path: Path) -> None:
    first_library, second_library = (Library(tmp_path, encoder) for _ in range(2))
    steps = second_library.add_python_steps(few_passages())
    next(steps)
    with pytest.raises(BusyError, match="is being added to or deleted"):
        first_library.add_python(few_passages())
    list(steps)
    assert first_library.add_python(few_passages()).passages == few_passages()


def test_an_index_that_cannot_be_removed_is_reported(
    encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = Library(tmp_path, encoder)
    list(library.add_steps("mine", few_passages()))

    def refuse() -> None:
        raise ConfigError("the server is down")

    library.open("mine").drop_index = refuse
    library.delete("mine")
    assert library.names() == []
    assert "its previous index outside the folder may remain: the server is down" in caplog.text


def test_a_stopped_upload_leaves_nothing_of_its_file(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvembed_deploy.app import library as module

    monkeypatch.setattr(module, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(module, "FIRST_BLOCK", 1)
    monkeypatch.setattr(module, "MAX_BLOCK", 1)
    for before in ([], few_passages()[:1]):
        if before:
            list(library.add_steps("mine", before))
        steps = library.add_steps("mine", few_passages(), file_record("b", few_passages()))
        assert [done for done, _ in (next(steps), next(steps), next(steps))][-1] >= 1
        next(steps)
        steps.close()
        assert library.names() == (["mine"] if before else [])
        if before:
            assert library.open("mine").passages == before


@pytest.mark.parametrize("name", [RECORD, PASSAGES, VECTORS])
def test_damaged_files_are_named(library: Library, encoder: Encoder, name: str) -> None:
    list(library.add_steps("mine", few_passages()))
    path = library.folder / "mine" / name
    path.write_bytes(path.read_bytes()[:-9] if name != RECORD else b"{}")
    with pytest.raises(BundleError, match=r"collection mine is damaged .*delete it and index again"):
        FolderStore(library.folder / "mine")


def test_nothing_is_unpickled(library: Library) -> None:
    list(library.add_steps("mine", few_passages()))
    np.save(library.folder / "mine" / VECTORS, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(BundleError, match="is damaged"):
        FolderStore(library.folder / "mine")


def test_marks_keep_the_text_and_are_cached(
    library: Library, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_text = "Another sentence. " * 10 + "The rest of it. " * 20
    texts = [passage.text for passage in few_passages()] + ["no end", "a.b c! d?\n\n\n e", long_text]
    passages = [Passage(source="s", title="", text=text) for text in texts]
    list(library.add_steps("mine", passages))
    store, searcher = library.open("mine"), Searcher(encoder)
    try:
        query = searcher.embed_query("rows", "")
        marked = searcher.mark(store, query, range(len(texts)))
        assert ["".join(sentence for sentence, _ in parts) for parts in marked] == texts
        assert all(any(is_marked for _, is_marked in parts) for parts in marked)
        assert marked[-1][-1] == ("The rest of it. " * 20, False)  # not compared, so not marked
        monkeypatch.setattr(searcher, "embed", None)  # nothing is embedded a second time
        assert searcher.mark(store, query, [1, 0]) == [marked[1], marked[0]]
        assert sentences("One, i.e. the first. Two.") == ["One, i.e. the first. ", "Two."]
    finally:
        searcher.close()


def test_the_threshold_is_above_unrelated_and_below_related_queries() -> None:
    """It follows from the collection: vectors that are all alike need a higher one."""
    rng = np.random.default_rng(0)

    def unit(rows: np.ndarray) -> np.ndarray:
        return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)

    unrelated = unit(rng.normal(size=(24, 64)))
    thresholds = []
    for common in (0.0, 2.0):
        vectors = unit(rng.normal(size=(500, 64)) + common)
        store = MagicMock(identity=f"{common}", vectors=vectors)
        store.__len__.return_value = len(vectors)
        searcher = object.__new__(Searcher)
        searcher.__dict__ |= {"_lock": threading.Lock(), "_thresholds": OrderedDict(), "_unrelated": {"": unrelated}}
        threshold = searcher.threshold(store, "")
        best = (vectors @ unrelated.T).max(axis=0)
        assert np.mean(best < threshold) > 0.9
        assert threshold < 0.95
        assert searcher.known_threshold(store, "") == threshold
        thresholds.append(threshold)
    assert thresholds[0] < 0.7


def test_the_record_names_the_engine(library: Library, encoder: Encoder) -> None:
    list(library.add_steps("mine", few_passages()))
    record = json.loads((library.folder / "mine" / RECORD).read_text())
    engine = vars(Engine.of(encoder))
    assert {name: record[name] for name in engine} == engine
    assert FolderStore(library.folder / "mine").passages == few_passages()


def test_a_collection_of_another_engine_is_indexed_again(
    library: Library, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays as it is until the new vectors are complete, also if it is killed or cancelled in between."""
    passages = [Passage(source=f"{row // 20}.txt", title="", text=f"sentence {row}") for row in range(40)]
    for name in ("0.txt", "1.txt"):
        part = [passage for passage in passages if passage.source == name]
        list(library.add_steps("mine", part, StoredFile(name=name, bytes=1, sha256=name, passages=20, rows=0)))
    old = FolderStore(library.folder / "mine")
    other = Library(library.folder, Encoder(bundles["int8"], device="cpu", backend="onnxruntime"))
    (state,) = other.states()
    assert (state.is_usable, state.is_damaged, state.rows) == (False, False, 40)
    with pytest.raises(ConfigError, match="index it again with this engine"):
        list(other.add_steps("mine", few_passages()))
    monkeypatch.setattr("nvembed_deploy.app.library.COMMIT_SECONDS", 0.0)
    cancelled = other.index_again_steps("mine")
    assert [next(cancelled) for _ in range(2)] == [(0, 40), (16, 40)]
    with pytest.raises(BusyError):
        next(Library(library.folder, library.encoder).index_again_steps("mine"))
    cancelled.close()
    assert not other._staging("mine").exists()
    killed = other.index_again_steps("mine")
    assert [next(killed) for _ in range(3)] == [(0, 40), (16, 40), (16, 40)]  # stored before the third
    shutil.copytree(other._staging("mine"), library.folder / "copy")
    killed.close()
    (library.folder / "copy").rename(other._staging("mine"))  # as a killed run leaves it
    assert FolderStore(library.folder / "mine").identity == old.identity
    assert next(other.index_again_steps("mine")) == (16, 40)
    shutil.copytree(library.folder / "mine", library.folder / "kept")
    assert list(other.index_again_steps("mine"))[-1] == (40, 40)
    new = other.open("mine")
    assert (new.engine, new.passages, new.record.files) == (other.engine, old.passages, old.record.files)
    np.testing.assert_allclose(new.vectors, other.encoder.encode([each.text for each in passages]), atol=1e-5)
    assert list(other.index_again_steps("mine")) == [(40, 40)]
    assert sorted(path.name for path in library.folder.iterdir() if path.is_dir()) == ["kept", "mine"]
