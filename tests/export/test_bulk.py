"""Shards of a bulk job: every row of every kind of file is read once, and what cannot be read is named."""

import gzip
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nvembed_deploy import ConfigError, Encoder, InputError

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install nvembed-deploy[ray]")
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from nvembed_deploy.export.bulk.inputs import InputFile, input_files
from nvembed_deploy.export.bulk.output import Output
from nvembed_deploy.export.bulk.shards import BLOCK_BYTES, Plan, ShardReader, plan
from nvembed_deploy.export.bulk.worker import Embedder, Task


def write_lines(path: Path, rows: list[dict], *, end: str = "\n") -> Path:
    content = "".join(json.dumps(row) + end for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def make_plan(*patterns: Path | str, shard_rows: int = 10, skip_invalid: bool = False) -> Plan:
    return plan(input_files([str(pattern) for pattern in patterns]), shard_rows, skip_invalid=skip_invalid)


def read_all(job: Plan, *, order: int = 1) -> list[dict]:
    """Returns the rows of all shards; they are read by one worker, in order or backwards."""
    reader = ShardReader(job.schema)
    tables = [reader.read(shard)[0] for shard in job.shards[::order]]
    return [row for table in tables[::order] for row in table.to_pylist()]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n", " \n\t\n"])
def test_every_row_is_read_once(tmp_path: Path, end: str) -> None:
    rows = [{"text": f"row {index}\u2028 with\x85 breaks \r\n", "id": index} for index in range(23)]
    path = write_lines(tmp_path / "a.jsonl", rows, end=end)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().removesuffix(end.encode()))  # a mark, and no last line end
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()[:99]) + gzip.compress(path.read_bytes()[99:]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=9)
    for shard_rows in (1, 4, 9, 100):
        for order in (1, -1):
            assert read_all(make_plan(tmp_path, shard_rows=shard_rows), order=order) == rows * 3
    names = [shard.name for shard in make_plan(tmp_path, shard_rows=4).shards]
    assert len(set(names)) == len(names) == 6 + 6 + 3 + 3 + 2
    assert names[6] == "0001-b-000000.parquet"


def test_lines_may_be_longer_than_a_block(tmp_path: Path) -> None:
    rows = [{"text": "a" * length} for length in (BLOCK_BYTES - 13, 5, 3 * BLOCK_BYTES, 0)]
    for end in ("\r\n", "\r"):  # the first CR is the last byte of a block
        assert read_all(make_plan(write_lines(tmp_path / "a.jsonl", rows, end=end), shard_rows=1)) == rows


def test_a_worker_reads_a_gzip_file_and_a_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"row {index}"} for index in range(40)]
    write_lines(tmp_path / "a.jsonl.gz", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    job = make_plan(tmp_path, shard_rows=4)
    opened = []
    open_stream, open_parquet = InputFile.open_stream, pq.ParquetFile
    monkeypatch.setattr(InputFile, "open_stream", lambda file: opened.append(file.name) or open_stream(file))
    monkeypatch.setattr(pq, "ParquetFile", lambda path, **options: opened.append(path) or open_parquet(path, **options))
    reader = ShardReader(job.schema)
    for shard in job.shards[::3]:  # another worker takes the others
        assert reader.read(shard)[0].to_pylist() == rows[shard.first_row :][:4]
    assert len(opened) == 2


def test_all_shards_have_one_schema(tmp_path: Path) -> None:
    """A column that is null, missing or whole numbers in some shards has the type that holds all rows."""
    rows = [
        {"text": "a", "title": None, "meta": {}},
        {"text": "b", "meta": {"x": 1}},
        {"text": "c", "title": "C", "size": 1, "meta": None},
        {"text": "d", "size": 2.5, "meta": {"y": [None, "z"]}},
    ]
    job = make_plan(write_lines(tmp_path / "a.jsonl", rows), shard_rows=1)
    tables = [ShardReader(job.schema).read(shard)[0] for shard in job.shards]
    assert all(table.schema == job.schema for table in tables)
    columns = {name: [row.get(name) for row in rows] for name in ("text", "title", "size")}
    merged = pa.concat_tables(tables).to_pydict()
    meta = merged.pop("meta")
    assert merged == columns
    assert meta == [{"x": None, "y": None}, {"x": 1, "y": None}, None, {"x": None, "y": [None, "z"]}]


ODD_LINES = (
    (b'{"text": "a"}\n[1]\n', 1, "row 1, at byte 14: not a JSON object"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', 1, "row 1, at byte 14: not a JSON object on one line"),
    (b'{"text": "a"}\n{"text": \n"b"}\n', 1, "row 1, at byte 14: not a JSON object on one line"),
    (b'{"text": "a"}\n' + b'{"x": ' * 99_999 + b"\n", 1, "row 1, at byte 14: not a JSON object on one line"),
    (b'{"text": "a", "id": 1}\n{"text": "b", "id": 12345678901234567890123}', 1, "row 1, column 'id': Python int too"),
    (b'{"text": "a", "x": "x"}\n{"text": "b", "x": "\\ud800"}\n', 1, "row 1, column 'x': 'utf-8' codec can't encode"),
)


@pytest.mark.parametrize(("content", "row", "message"), ODD_LINES)
def test_odd_lines_and_values_are_named_or_left_out(tmp_path: Path, content: bytes, row: int, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"{path}, {message}")):
        make_plan(path)
    job = make_plan(path, skip_invalid=True)
    table, rejects = ShardReader(job.schema, skip_invalid=True).read(job.shards[0])
    assert table.column("text").to_pylist() == ["a"]
    assert rejects[row].startswith(message.partition(", ")[2][:30])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"x": 1}, {"x": 2}, {"x": "3"}], "row 2, column 'x': its type is another one than in the rows before"),
        ([{"x": 1}] * 10 + [{"x": "3"}], "whose types cannot be combined (Unable to merge: Field x"),
        ([{"x": {}}], "column 'x' cannot be written to Parquet"),
        (
            [{"x": json.loads("[" * 900 + "]" * 900)}],
            "column 'x' cannot be written to Parquet (Parquet schema too deeply",
        ),
        ([{"x\ud800": 1}], "row 0: the column name 'x\\ud800' has half a surrogate pair"),
    ],
)
def test_a_column_has_one_type(tmp_path: Path, lines: list[dict], message: str) -> None:
    for skip_invalid in (False, True):  # no row alone is at fault
        with pytest.raises(InputError, match=re.escape(message)):
            make_plan(write_lines(tmp_path / "a.jsonl", lines), skip_invalid=skip_invalid)


def test_strings_of_every_kind_are_one_column(tmp_path: Path) -> None:
    """Parquet has several types of strings, and columns that one file declares to have no nulls."""
    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
    for index, kind in enumerate(kinds):
        table = pa.table({"text": pa.array(["a"]).cast(kind)})
        pq.write_table(table, tmp_path / f"{index}.parquet")
        alone = make_plan(tmp_path / f"{index}.parquet").schema.field("text").type
        assert alone == (pa.large_string() if kind == pa.string_view() else kind)  # few readers know views
    schema = pa.schema([pa.field("text", pa.string(), nullable=False), pa.field("id", pa.int64(), nullable=False)])
    pq.write_table(pa.table({"text": ["a"], "id": [1]}, schema=schema), tmp_path / "4.parquet")
    write_lines(tmp_path / "5.jsonl", [{"text": "a"}])
    job = make_plan(tmp_path)
    tables = [ShardReader(job.schema).read(shard)[0] for shard in job.shards]
    for table in tables:
        pq.write_table(table, pa.BufferOutputStream())
    assert pa.concat_tables(tables).to_pydict() == {"text": ["a"] * 6, "id": [None] * 4 + [1, None]}


def test_views_are_written_as_what_all_readers_know(tmp_path: Path) -> None:
    inner = pa.struct([pa.field("x", pa.list_view(pa.string_view()))])
    rows = [{"a": [{"x": ["b", None]}, None]}, {"a": None}]
    kinds = {"a": pa.large_list(inner), "b": pa.large_list_view(inner)}
    columns = {name: pa.array([row["a"] for row in rows], kind) for name, kind in kinds.items()}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    job = make_plan(tmp_path)
    assert "view" not in str(job.schema)
    assert read_all(job) == [row | {"b": row["a"]} for row in rows]
    ShardReader(job.schema).read(job.shards[0])[0].validate(full=True)


def not_utf8() -> pa.Array:
    offsets, content = pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xff\xfe")
    return pa.Array.from_buffers(pa.string(), 2, [None, offsets, content])


def test_texts_without_a_value_or_not_in_utf8_are_rejected(tmp_path: Path, encoder: Encoder) -> None:
    """Also where no row of a shard is left."""
    pq.write_table(pa.table({"text": not_utf8()}), tmp_path / "a.parquet", row_group_size=2)
    write_lines(tmp_path / "b.jsonl", [{"text": None}] * 2)
    job = make_plan(tmp_path)
    for skip_invalid in (False, True):
        embedder = Embedder(
            Task(
                bundle="",
                output=Output.open(str(tmp_path / "out")),
                schema=job.schema,
                text_columns=("text",),
                output_column="embedding",
                prompt="",
                output_dtype="float16",
                skip_invalid=skip_invalid,
                device="cpu",
                threads=1,
            )
        )
        embedder.encoder = encoder
        reports = [embedder.embed(shard) for shard in job.shards]
        if not skip_invalid:
            assert "a.parquet, row 1: the text is not valid UTF-8; pass --skip-invalid" in reports[0].error
            assert "b.jsonl, row 0: the text is a NoneType" in reports[1].error
    assert [(report.error, report.rows, report.rejected) for report in reports] == [("", 1, 1), ("", 0, 2)]
    assert pq.read_table(tmp_path / "out").column("text").to_pylist() == ["a"]


def test_a_value_that_the_jobs_type_does_not_hold_is_named(tmp_path: Path) -> None:
    """Each shard has one type, and the type of all of them, float64, does not hold the last value."""
    path = write_lines(tmp_path / "a.jsonl", [{"x": 1.5}, {"x": 1}, {"x": 2**53 + 1}])
    job = make_plan(path, shard_rows=1)
    with pytest.raises(InputError, match="row 2, column 'x': Integer value 9007199254740993 is outside"):
        read_all(job)
    table, rejects = ShardReader(job.schema, skip_invalid=True).read(job.shards[2])
    assert (table.num_rows, list(rejects)) == (0, [0])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = write_lines(tmp_path / "a.jsonl.gz", [{"text": "abc"}] * 99).read_bytes()
    for name, content in (("a.jsonl.gz", whole[:-9]), ("b.jsonl.gz", b'{"text": "a"}'), ("c.parquet", b"PAR1")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=re.escape(f"{tmp_path / name} cannot be read")):
            make_plan(tmp_path / name)


def test_an_edited_input_is_another_job(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "abc"}])
    before = make_plan(path)
    write_lines(path, [{"text": "xyz"}])  # of the same size
    assert make_plan(path).inputs != before.inputs
    with pytest.raises(InputError, match=r"a\.jsonl has changed; start the job again"):
        read_all(before)
    gzipped = make_plan(write_lines(tmp_path / "a.jsonl.gz", [{"text": "xyz"}]))
    assert gzipped.inputs[0]["sha256"] == make_plan(path).inputs[0]["sha256"]  # of the content


def test_rows_that_are_missing_are_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that fails in the middle of a gzip file, as of a network, neither shortens nor skips a shard."""
    rows = [{"text": f"row {index}"} for index in range(9)]
    job = make_plan(write_lines(tmp_path / "a.jsonl.gz", rows), shard_rows=3)
    reader, open_stream = ShardReader(job.schema), InputFile.open_stream

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError("the network is gone")

    monkeypatch.setattr(InputFile, "open_stream", lambda file: Failing())
    with pytest.raises(OSError, match="the network is gone"):
        reader.read(job.shards[0])
    monkeypatch.setattr(InputFile, "open_stream", open_stream)
    assert [row for shard in job.shards for row in reader.read(shard)[0].to_pylist()] == rows
    with pytest.raises(InputError, match="from row 6: 3 rows were read instead of 9; start the job again"):
        ShardReader(job.schema).read(replace(job.shards[2], rows=9))


def test_two_jobs_do_not_begin_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find it empty; the second finds the record of the first when it writes its own."""
    output = Output.open(str(tmp_path))
    assert output.require_job({"prompt": "a"}) == set()
    monkeypatch.setattr(Output, "names", lambda output: set())
    assert output.require_job({"prompt": "a"}) == set()  # the same job
    with pytest.raises(ConfigError, match=r"\(prompt differs, see its _job\.json\)"):
        output.require_job({"prompt": "b"})
    assert [path.name for path in tmp_path.iterdir()] == ["_job.json"]


def test_what_a_folder_has_besides_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    for name in ("._a.jsonl", "_meta.jsonl", "b.ndjson"):
        (tmp_path / name).write_bytes(b"\x00")
    (tmp_path / "c.parquet").mkdir()  # as Spark writes them
    pq.write_table(pa.table({"text": ["c"]}), tmp_path / "c.parquet" / "part-0.parquet")
    for uri in ("", "file://"):
        assert [file.name for file in input_files([f"{uri}{tmp_path}"])] == ["a.jsonl"]
        assert f"note: of {uri}{tmp_path} are not read: b.ndjson, c.parquet\n" in capsys.readouterr().err
        names = [file.name for file in input_files([f"{uri}{tmp_path}/**/[a-z]*[lt]"])]
        assert names == ["a.jsonl", "part-0.parquet"]
    assert [file.name for file in input_files([f"{tmp_path}/*.parquet"])] == ["part-0.parquet"]
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "b.ndjson")  # as in Hugging Face's cache
    assert input_files([str(tmp_path / "link.jsonl")])[0].suffix == ".jsonl"
    long = write_lines(tmp_path / f"{'é' * 120}.jsonl", [{"text": "a"}])
    assert len(make_plan(long).shards[0].name.encode()) < 200


def test_paths_folders_patterns_and_uris_name_files(tmp_path: Path) -> None:
    files = [write_lines(tmp_path / f"{name}.jsonl", [{"text": name}]) for name in "ba"]
    (tmp_path / "notes.txt").write_text("")
    both = sorted(map(str, files))
    for pattern in (f"{tmp_path}", f"{tmp_path}/*.jsonl"):
        assert [file.label for file in input_files([pattern, str(files[0])])] == both
    for pattern in (
        f"file://{tmp_path}",
        f"file://{tmp_path}/*.jsonl",
        f"file://{tmp_path.parent}/*{tmp_path.name[3:]}/*.jsonl",
    ):
        assert [file.path for file in input_files([pattern])] == both
    assert [row["text"] for row in read_all(make_plan(f"file://{files[0]}"))] == ["b"]
    for pattern, message in (
        (str(tmp_path / "*.json"), "matches no file"),
        (f"file://{tmp_path}/none.jsonl", "matches no file"),
        ("", "--input is empty"),
        (str(tmp_path / "notes.txt"), "unsupported file type"),
        (f"file://{tmp_path}/notes.txt", "unsupported file type"),
        ("nowhere://a/b", "cannot be opened"),
    ):
        with pytest.raises(ConfigError, match=message):
            input_files([pattern])


def test_other_file_systems_are_read(tmp_path: Path) -> None:
    """One of pyarrow's own, and one of fsspec's, which pyarrow opens by URI."""
    rows = [{"text": f"row {index}"} for index in range(9)]
    write_lines(tmp_path / "a.jsonl", rows)
    tree = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    assert read_all(plan([InputFile(filesystem=tree, path="a.jsonl", label="a.jsonl")], 4)) == rows
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.jsonl", (tmp_path / "a.jsonl").read_bytes())
    memory.pipe("/corpus/b.jsonl.gz", gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    memory.pipe("/corpus/c.parquet", (tmp_path / "c.parquet").read_bytes())
    for pattern in ("fsspec+memory:///corpus", "fsspec+memory:///corp*/*"):
        assert read_all(make_plan(pattern, shard_rows=4)) == rows * 3
    with pytest.raises(ConfigError, match="on which a killed job could leave half a file; write to a folder"):
        Output.open("fsspec+memory:///vectors")
    with pytest.raises(ConfigError, match="--out is empty"):
        Output.open("")
    assert Output.open(f"file://{tmp_path}/out").path == f"{tmp_path}/out"
