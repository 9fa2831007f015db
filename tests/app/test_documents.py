"""Uploaded files: kinds, encodings, limits, and what is told about each."""

import json
import zipfile
from pathlib import Path

import pytest

from nvembed_deploy import Encoder
from nvembed_deploy.app.documents import (
    CHUNK_TOKENS,
    OVERLAP_TOKENS,
    Limits,
    ReadFile,
    SkippedFile,
    chunks,
    file_passages,
    read_files,
)
from nvembed_deploy.app.readers import FileRecord, find_delimiter


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


def read(folder: Path, limits: Limits | None = None, **contents: bytes) -> list[ReadFile | SkippedFile]:
    """Reads files whose names are given with `__` for the dot."""
    paths = []
    for name, content in contents.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content)
        paths.append(path)
    return list(read_files(paths, limits or Limits()))


def test_one_record_is_one_passage(tmp_path: Path, encoder: Encoder) -> None:
    csv_file, json_file, array = read(
        tmp_path,
        a__csv=b"id,title,text,url,year\n7,Keys,The spare key.,https://x.example/k,2020\n8,Cars,,javascript:x,2021\n",
        b__jsonl=b'{"title": "Wi-Fi", "text": "Router", "n": 2}\n\n"alone"\n{"name": "only a name"}\n',
        c__json=b'{"rows": [{"body": "one"}, {"body": "two", "tags": ["x"]}]}',
    )
    assert isinstance(csv_file, ReadFile)
    assert isinstance(json_file, ReadFile)
    assert isinstance(array, ReadFile)
    assert csv_file.records == [
        FileRecord(
            text="The spare key.\nyear: 2020", title="Keys", place="row 1", record_id="7", link="https://x.example/k"
        ),
        FileRecord(text="url: javascript:x; year: 2021", title="Cars", place="row 2", record_id="8"),
    ]
    assert [(record.text, record.title, record.place) for record in json_file.records] == [
        ("Router\nn: 2", "Wi-Fi", "row 1"),
        ("alone", "", "row 3"),
        ("only a name", "", "row 4"),
    ]
    assert [record.text for record in array.records] == ["one", 'two\ntags: ["x"]']
    passages = list(file_passages(csv_file, encoder.token_spans))
    assert next(passage.embedded_text for passage in passages) == "Keys\nThe spare key.\nyear: 2020"
    assert (passages[0].source, passages[0].place, passages[0].record_id) == ("a.csv", "row 1", "7")
    assert passages[0].link == "https://x.example/k"


@pytest.mark.parametrize(
    ("content", "text", "note"),
    [
        ("plain ü".encode(), "plain ü", ""),
        (b"\xef\xbb\xbfplain", "plain", ""),
        ("Köln €".encode("cp1252"), "Köln €", "read as Windows-1252"),
        ("Köln".encode("utf-16"), "Köln", "read as UTF-16"),
        ("Köln, a longer text".encode("utf-16-le"), "Köln, a longer text", "read as UTF-16"),
        ("Köln, a longer text".encode("utf-16-be"), "Köln, a longer text", "read as UTF-16"),
    ],
)
def test_encodings_are_recognized(tmp_path: Path, content: bytes, text: str, note: str) -> None:
    (file,) = read(tmp_path, a__txt=content)
    assert isinstance(file, ReadFile)
    assert (file.records[0].text, file.note) == (text, note)


def test_delimiters_are_recognized(tmp_path: Path) -> None:
    semicolon, excel, tab = read(
        tmp_path,
        a__csv="Name;Ort;Notiz\nAnna;Köln;mag Tee, Kaffee\n".encode("cp1252"),
        b__csv=b"sep=;\r\na;b\r\n1;2\r\n",
        c__tsv=b"a\tb\n1,5\t2\n",
    )
    assert isinstance(semicolon, ReadFile)
    assert semicolon.records[0].text == "Ort: Köln; Notiz: mag Tee, Kaffee"
    assert semicolon.records[0].title == "Anna"
    assert semicolon.note == "read as Windows-1252; delimiter ;"
    assert isinstance(excel, ReadFile)
    assert excel.records[0].text == "a: 1; b: 2"
    assert isinstance(tab, ReadFile)
    assert tab.records[0].text == "a: 1,5; b: 2"
    assert find_delimiter("one column\nsecond, with a comma\nthird\n") == ","


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a__csv", b"\n,\nReport 2024\na,b\n", "Report 2024: a; b"),  # a title line, blank lines before it
        ("a__csv", b"x\n1,2,3\n", "x: 1; 2; 3"),
        ("a__csv", b"x,y\n1\n", "x: 1"),
        ("a__jsonl", rb'{"text": "cut \ud83d"}', "cut \ufffd"),
        ("a__jsonl", rb'{"text": "\ud83d\ude00"}', "\U0001f600"),
        (
            "a__jsonl",
            json.dumps({"text": "one\u2028two\u0085three"}, ensure_ascii=False).encode(),
            "one\u2028two\u0085three",
        ),
        ("a__html", b"<title>T</title><style>x</style><body><p>One &amp; two</p><script>no</script>", "One & two"),
    ],
)
def test_no_text_is_lost(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (file,) = read(tmp_path, **{name: content})
    assert isinstance(file, ReadFile)
    assert [record.text for record in file.records] == [text]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a__csv", b"h" * 1000 + b"\nx" * 100_000, "has more than the 5,000,000 characters left"),
        ("a__csv", b"h\n" + b"x" * 200_000, "is not valid CSV .*or save it as .txt"),
        ("a__exe", b"MZ", r"has the type .exe; supported: .csv, .htm, .html, .json, .*\.zip"),
        ("a__txt", b"\x00\x01\x02binary" * 50, "is not text but binary data"),
        ("a__txt", b"\x81\x8d\x8f", "is not text in UTF-8, UTF-16 or Windows-1252"),
        ("a__txt", b"", "is empty"),
        ("a__txt", b" \n", "contains no text"),
        ("a__jsonl", b"{\n[", r"is not JSON lines \(lines 1, 2 are not valid JSON\)"),
        ("a__json", b"[" * 100_000, "is not valid JSON"),
        ("a__pdf", b"%PDF-1.4 broken", "cannot be read as PDF"),
        ("a__zip", b"PK\x03\x04 broken", "is not a readable archive"),
        ("a__txt", b"x" * 2000, "has 0.0 MB; the maximum is 0 MB, split it"),
    ],
)
def test_a_bad_file_is_told_and_refuses_no_other(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    if name.endswith("pdf"):
        pytest.importorskip("pypdf", reason="pypdf is not installed: pip install nvembed-deploy[app]")
    limits = Limits(file_bytes=1000) if len(content) == 2000 else Limits()
    bad, good = read(tmp_path, limits, **{name: content, "z__txt": b"good"})
    assert isinstance(bad, SkippedFile)
    assert isinstance(good, ReadFile)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(bad.reason)


def test_a_bad_line_is_noted(tmp_path: Path) -> None:
    (file,) = read(tmp_path, a__jsonl=b'{"text": "a"}\n{\n{"text": "b"}')
    assert isinstance(file, ReadFile)
    assert ([record.place for record in file.records], file.note) == (
        ["row 1", "row 3"],
        "left out: line 2 is not valid JSON",
    )


def test_pages_of_pdf_files(tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf", reason="pypdf is not installed: pip install nvembed-deploy[app]")
    (tmp_path / "one.pdf").write_bytes(make_pdf("from a page"))
    (page,) = pypdf.PdfReader(tmp_path / "one.pdf").pages
    for name in ("mixed", "scanned", "locked"):
        writer = pypdf.PdfWriter()
        writer.add_blank_page(200, 200)
        if name != "scanned":
            writer.add_page(page)
        if name == "locked":
            writer.encrypt("secret", algorithm="RC4-128")
        writer.write(tmp_path / f"{name}.pdf")
    mixed, scanned, locked = read_files([tmp_path / f"{name}.pdf" for name in ("mixed", "scanned", "locked")], Limits())
    assert isinstance(mixed, ReadFile)
    assert [(record.text, record.place) for record in mixed.records] == [("from a page", "page 2")]
    assert mixed.note == "1 of 2 pages has no text, perhaps scanned"
    assert isinstance(scanned, SkippedFile)
    assert "perhaps only scanned pages; run OCR" in scanned.reason
    assert isinstance(locked, SkippedFile)
    assert locked.reason == "is encrypted; remove its password and add it again"
    (tiny,) = read_files([tmp_path / "one.pdf"], Limits(chars=5))  # checked while it is read
    assert isinstance(tiny, SkippedFile)


def test_archives_keep_paths_and_tell_what_is_left_out(tmp_path: Path) -> None:
    inner = make_zip(tmp_path / "inner.zip", {"a.txt": b"in"})
    path = make_zip(
        tmp_path / "all.zip",
        {
            "2023/notes.txt": b"old",
            "2024/notes.txt": b"new",
            "__MACOSX/._a.txt": b"\x00\xff",
            ".hidden.txt": b"\xff",
            "b.docx": b"PK",
            "inner.zip": inner.read_bytes(),
            "folder/": b"",
        },
    )
    files = list(read_files([path], Limits()))
    assert [file.name for file in files if isinstance(file, ReadFile)] == [
        "all.zip/2023/notes.txt",
        "all.zip/2024/notes.txt",
    ]
    reasons = {file.name: file.reason for file in files if isinstance(file, SkippedFile)}
    assert reasons["all.zip/b.docx"].startswith("has the type .docx; supported:")
    assert reasons["all.zip/inner.zip"] == "is an archive in an archive; add it separately"
    assert len(files) == 4


def test_a_corrupt_member_refuses_no_other(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "bad.zip", {"a.txt": bytes(range(256)) * 400, "b.txt": b"good"})
    content = bytearray(path.read_bytes())
    content[60:90] = b"\xff" * 30
    path.write_bytes(content)
    bad, good = read_files([path], Limits())
    assert isinstance(bad, SkippedFile)
    assert bad.reason.startswith("is damaged in the archive")
    assert isinstance(good, ReadFile)


def test_zip_bombs_and_too_many_files(tmp_path: Path) -> None:
    limits = Limits(file_bytes=10_000, unpacked_bytes=20_000, files=5, chars=30_000)
    bomb = make_zip(tmp_path / "bomb.zip", {"a.txt": b"0" * 1_000_000})
    crowd = make_zip(tmp_path / "crowd.zip", {f"{index}.txt": b"0" * 9_000 for index in range(4)})
    many = make_zip(tmp_path / "many.zip", {f"{index}.txt": b"0" for index in range(7)})
    for path, added, reason in ((bomb, 0, "unpacks to more"), (crowd, 2, "unpacks to more"), (many, 5, "is beyond")):
        files = list(read_files([path], limits))
        assert sum(isinstance(file, ReadFile) for file in files) == added
        assert all(file.reason.startswith(reason) for file in files if isinstance(file, SkippedFile))


def test_a_missing_file_and_equal_names(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path / "other"):
        (folder / "a.txt").write_text(str(folder))
    first, second, missing = read_files(
        [tmp_path / "a.txt", tmp_path / "other" / "a.txt", tmp_path / "b.txt"], Limits()
    )
    assert (first.name, second.name) == ("a.txt", "a (2).txt")
    assert isinstance(missing, SkippedFile)
    assert missing.reason.startswith("no longer exists")


def test_chunks_overlap_end_at_words_and_lose_no_text(encoder: Encoder) -> None:
    text = " ".join(f"word{index}" for index in range(900))
    spans = encoder.token_spans(text)
    pieces = list(chunks(text, spans))
    words = set(text.split())
    assert all(text[start:].startswith(piece) for start, piece in pieces)
    assert all(set(piece.split()) <= words for _, piece in pieces)  # no word is cut
    assert words == {word for _, piece in pieces for word in piece.split()}
    assert len(pieces) == -(-(len(spans) - OVERLAP_TOKENS) // (CHUNK_TOKENS - OVERLAP_TOKENS))
    blank = "intro" + "\n" * 2000 + "end"
    assert [piece for _, piece in chunks(blank, encoder.token_spans(blank))] == ["intro", "end"]
    long_word = "x" * 4000
    assert all(piece for _, piece in chunks(long_word, encoder.token_spans(long_word)))


def test_long_records_are_split_for_a_short_engine(encoder: Encoder) -> None:
    text = "# Heading\n\n" + "a word and another one " * 200
    file = ReadFile(name="a.md", bytes=1, sha256="", records=[FileRecord(text=text)])
    passages = list(file_passages(file, encoder.token_spans, max_tokens=40))
    for passage in passages:
        assert len(encoder.tokenize([passage.text])[0]) <= 40 + 8
    assert {passage.title for passage in passages} == {"Heading"}
    assert passages[0].place == f"part 1 of {len(passages)}"
