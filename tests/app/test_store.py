"""Passages, uploads and collections, tested without the page."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy import BundleError, ConfigError, Encoder, InputError
from nvembed_deploy.app.compare import compare
from nvembed_deploy.app.documents import CHUNK_TOKENS, OVERLAP_TOKENS, Limits, chunks, read_files
from nvembed_deploy.app.index import Content, ExactIndex
from nvembed_deploy.app.library import PYTHON, Library
from nvembed_deploy.app.passages import MAX_TEXT_CHARS, Passage, library_passages
from nvembed_deploy.app.plane import QUERY, RESULT, Plane, draw
from nvembed_deploy.app.search import MATCH, Searcher, sentences
from nvembed_deploy.app.store import PASSAGES, RECORD, VECTORS, Engine, FolderStore
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
    scores = encoder.encode([passage.text for passage in few_passages()]) @ query
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
    with pytest.raises(ConfigError, match="delete it, or add to another collection"):
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


def test_a_failed_index_leaves_the_collection_unchanged(encoder: Encoder, tmp_path: Path) -> None:
    """Adding again must not store the same passages twice."""
    library = Library(tmp_path, encoder)
    ends = iter([ConfigError("down"), None, ConfigError("down"), None])

    def open_index(content: Content) -> ExactIndex:
        if (err := next(ends)) is not None:
            raise err
        return ExactIndex(content)

    library._open_index = open_index
    for size in (0, len(few_passages())):
        with pytest.raises(ConfigError, match="down"):
            list(library.add_steps("mine", few_passages()))
        assert library.names() == (["mine"] if size else [])
        if size:
            assert len(library.open("mine")) == size
        else:
            list(library.add_steps("mine", few_passages()))
            assert len(library.open("mine")) == len(few_passages())


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


def test_two_pages_started_together_index_pythons_documentation_once(encoder: Encoder, tmp_path: Path) -> None:
    first_library, second_library = (Library(tmp_path, encoder) for _ in range(2))
    steps = second_library._add(PYTHON, few_passages())
    next(steps)
    first_library.add_python(few_passages())
    list(steps)
    assert second_library.open(PYTHON).passages == few_passages()


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
    assert "its index outside the folder may remain: the server is down" in caplog.text


def test_a_stopped_upload_leaves_nothing(library: Library) -> None:
    steps = library.add_steps("mine", few_passages())
    next(steps)
    steps.close()
    assert library.names() == []


@pytest.mark.parametrize("name", [RECORD, PASSAGES, VECTORS])
def test_damaged_files_are_named(library: Library, encoder: Encoder, name: str) -> None:
    list(library.add_steps("mine", few_passages()))
    path = library.folder / "mine" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BundleError, match=r"collection mine is damaged .*delete it and index again"):
        FolderStore(library.folder / "mine")


def test_nothing_is_unpickled(library: Library) -> None:
    list(library.add_steps("mine", few_passages()))
    np.save(library.folder / "mine" / VECTORS, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(BundleError, match="is damaged"):
        FolderStore(library.folder / "mine")


def test_blank_text_is_not_a_passage(encoder: Encoder) -> None:
    text = "intro" + "\n" * 2000 + "end"
    passages = list(chunks("a.txt", text, encoder.token_spans(text)))
    assert [passage.text for passage in passages] == ["intro", "end"]


def test_chunks_overlap_and_lose_no_text(encoder: Encoder) -> None:
    text = " ".join(f"word{index}" for index in range(900))
    spans = encoder.token_spans(text)
    passages = list(chunks("a.txt", text, spans))
    assert all(passage.text in text for passage in passages)
    assert all(f"word{index}" in " ".join(passage.text for passage in passages) for index in range(900))
    assert len(passages) == -(-(len(spans) - OVERLAP_TOKENS) // (CHUNK_TOKENS - OVERLAP_TOKENS))
    assert [passage.title for passage in passages[:2]] == ["a.txt, part 1", "a.txt, part 2"]
    assert [passage.text for passage in chunks("b.txt", "one", encoder.token_spans("one"))] == ["one"]


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def make_pdf(text: str) -> bytes:
    """Returns a PDF of one page with a line of text."""
    stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]
    out, offsets = b"%PDF-1.4\n", []
    for object_number, pdf_object in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (object_number, pdf_object)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return (
        out
        + b"xref\n0 5\n0000000000 65535 f \n"
        + table
        + (b"trailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(out))
    )


def test_mac_archives_and_line_breaks_within_strings(tmp_path: Path) -> None:
    row = json.dumps({"text": "one\u2028two\u0085three"}, ensure_ascii=False).encode()
    path = make_zip(
        tmp_path / "mac.zip",
        {"a.txt": b"text", "__MACOSX/._a.txt": b"\x00\xff", ".hidden.txt": b"\xff", "b.jsonl": row},
    )
    assert read_files([path], Limits()) == [("a.txt", "text"), ("b.jsonl", "one\u2028two\u0085three")]


def test_a_zip_with_a_corrupt_stream_is_named(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "bad.zip", {"a.txt": bytes(range(256)) * 400})
    content = bytearray(path.read_bytes())
    content[60:90] = b"\xff" * 30
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.zip is damaged or encrypted"):
        read_files([path], Limits())


def test_chunks_fit_a_short_engine(encoder: Encoder) -> None:
    text = "a word and another one " * 200
    for passage in chunks("a.txt", text, encoder.token_spans(text), max_tokens=40):
        assert len(encoder.tokenize([passage.text])[0]) <= 40 + 8


def test_two_engines_side_by_side(library: Library, encoder: Encoder, bundles: dict[str, Path]) -> None:
    store = library.add_python(few_passages())
    int8_encoder = Encoder(bundles["int8"], device="cpu", backend="onnxruntime")
    searcher = Searcher(encoder)
    try:
        self_comparison = compare(searcher, store, encoder, encoder, "rows of a table", instruction="")
        comparison = compare(searcher, store, encoder, int8_encoder, "rows of a table", instruction="Find passages")
    finally:
        searcher.close()
    assert (self_comparison.overlap, self_comparison.largest_difference, self_comparison.candidates) == (1.0, 0.0, 3)
    assert [row[0] for row in comparison.rows] == ["1", "2", "3"]
    prompt = encoder.query_prompt("Find passages")
    texts = [passage.text for passage in few_passages()]
    scores = [side.encode(texts) @ side.encode("rows of a table", prompt=prompt) for side in (encoder, int8_encoder)]
    assert comparison.largest_difference == pytest.approx(np.abs(scores[0] - scores[1]).max(), abs=1e-6)
    assert comparison.largest_difference > 0
    assert [row[1] for row in comparison.rows] == [f"{score:.4f}" for score in sorted(scores[0], reverse=True)]


def test_the_unscored_end_of_a_long_passage_is_not_highlighted(encoder: Encoder) -> None:
    searcher = Searcher(encoder)
    try:
        text = "Another sentence. " * 10 + "The rest of it. " * 20
        marked = searcher.mark(encoder.encode("The rest of it."), [text])[0]
    finally:
        searcher.close()
    assert "".join(sentence for sentence, _ in marked) == text
    assert marked[-1][1] is None


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    pytest.importorskip("pypdf", reason="pypdf is not installed: pip install nvembed-deploy[app]")
    contents = {
        "a.txt": "plain ü".encode(),
        "b.md": b"\xef\xbb\xbf# marked",
        "c.csv": b'name,age\nAda,36\n"Bob, Jr",4\n',
        "d.jsonl": b'{"text": "first"}\n\n{"title": "second", "n": 2}\n"third"\n',
        "e.pdf": make_pdf("from a page"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    packed = make_zip(tmp_path / "f.zip", {"in/side.txt": b"packed", "skipped.png": b"\x89PNG", "in/": b""})
    texts = dict(read_files([*(tmp_path / name for name in contents), packed], Limits()))
    assert texts == {
        "a.txt": "plain ü",
        "b.md": "# marked",
        "c.csv": "name: Ada; age: 36\n\nname: Bob, Jr; age: 4",
        "d.jsonl": "first\n\nsecond\n\nthird",
        "e.pdf": "from a page",
        "side.txt": "packed",
    }


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", b"\n,\nReport 2024\na,b\n", "Report 2024: a; b"),  # a title line, blank lines before it
        ("a.csv", b"x\n1,2,3\n", "x: 1; 2; 3"),
        ("a.csv", b"x,y\n1\n", "x: 1"),
        ("a.jsonl", rb'{"text": "cut \ud83d"}', "cut \ufffd"),
        ("a.jsonl", rb'{"text": "\ud83d\ude00"}', "\U0001f600"),
    ],
)
def test_no_text_is_lost(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_files([tmp_path / name], Limits()) == [(name, text)]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone.txt no longer exists: .* choose it again"):
        read_files([tmp_path / "gone.txt"], Limits())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"h" * 1000 + b"\nx" * 100_000, "more than 5,000,000 characters"),
        ("a.csv", b"h\n" + b"x" * 200_000, "a.csv is not valid CSV .*or save it as .txt"),
        ("a.exe", b"MZ", r"unsupported file type: a.exe. Supported: .csv, .jsonl, .md, .pdf, .txt, .zip"),
        ("a.txt", b"\xff\xfe\x00", "a.txt is not UTF-8 text .*save it as UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{', "line 2 of a.jsonl is not valid JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 of a.jsonl is not valid JSON"),
        ("a.pdf", b"%PDF-1.4 broken", "a.pdf cannot be read as PDF"),
        ("a.zip", b"PK\x03\x04 broken", "a.zip is damaged or encrypted"),
        ("a.txt", b"x" * 2000, "a.txt is larger than 0 MiB; split it"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith(".pdf"):
        pytest.importorskip("pypdf", reason="pypdf is not installed: pip install nvembed-deploy[app]")
    (tmp_path / name).write_bytes(content)
    limits = Limits(file_bytes=1000) if len(content) == 2000 else Limits()
    with pytest.raises(InputError, match=message):
        read_files([tmp_path / name], limits)


def test_zip_bombs_and_archives_of_too_many_files_are_refused(tmp_path: Path) -> None:
    limits = Limits(file_bytes=10_000, unpacked_bytes=20_000, files=5, chars=30_000)
    bomb = make_zip(tmp_path / "bomb.zip", {"a.txt": b"0" * 1_000_000})
    crowd = make_zip(tmp_path / "crowd.zip", {f"{index}.txt": b"0" * 9_000 for index in range(4)})
    many = make_zip(tmp_path / "many.zip", {f"{index}.txt": b"0" for index in range(6)})
    for path, message in ((bomb, "unpacks to more"), (crowd, "unpacks to more"), (many, "more than 5 texts")):
        with pytest.raises(InputError, match=message):
            read_files([path], limits)
    nested = io.BytesIO()
    make_zip(tmp_path / "inner.zip", {"a.txt": b"in"})
    nested.write((tmp_path / "inner.zip").read_bytes())
    assert read_files([make_zip(tmp_path / "outer.zip", {"inner.zip": nested.getvalue()})], limits) == []


def test_highlighting_keeps_the_text(encoder: Encoder) -> None:
    searcher = Searcher(encoder)
    try:
        texts = [passage.text for passage in few_passages()] + ["", "no end", "a.b c! d?\n\n\n e"]
        for text, marked_sentences in zip(texts, searcher.mark(encoder.encode("rows"), texts), strict=True):
            assert "".join(sentence for sentence, _ in marked_sentences) == text
            assert any(label == MATCH for _, label in marked_sentences)
        assert sentences("One. Two.") == ["One. ", "Two."]
    finally:
        searcher.close()


def test_the_map_is_the_plane_of_the_principal_components(library: Library, encoder: Encoder) -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(200, 16)) * np.array([9, 5, *[1] * 14])).astype(np.float32)
    plane = Plane.of(vectors)
    centred = vectors - vectors.mean(axis=0)
    expected = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    np.testing.assert_allclose(np.abs(plane.points(vectors)), np.abs(expected), rtol=1e-3, atol=1e-2)
    store = library.add_python(few_passages())
    searcher = Searcher(encoder)
    try:
        search_result = searcher.search(store, "rows", instruction="", count=2)
    finally:
        searcher.close()
    columns = draw(store, Plane.of(store.vectors), search_result)
    assert columns["source"].count(RESULT) == 2
    assert columns["source"][-1] == QUERY
    assert len({len(column) for column in columns.values()}) == 1


def test_the_record_names_the_engine(library: Library, encoder: Encoder) -> None:
    list(library.add_steps("mine", few_passages()))
    record = json.loads((library.folder / "mine" / RECORD).read_text())
    assert record.pop("identity")
    assert record == vars(Engine.of(encoder))
    assert FolderStore(library.folder / "mine").passages == few_passages()
    assert isinstance(few_passages()[0], Passage)
