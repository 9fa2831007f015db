"""A bulk job on two local workers: every text is embedded once, and an interrupted job continues."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy import ConfigError, Encoder, InputError

pytest.importorskip("ray", reason="ray is not installed: pip install nvembed-deploy[ray]")
import pyarrow as pa
import pyarrow.parquet as pq

from nvembed_deploy.export import ray_job
from nvembed_deploy.export.bulk_shards import input_files, plan, read
from nvembed_deploy.export.ray_job import EMBEDDING, RECORD, REJECTS, main

TEXTS = [f"text number {index} " + "over the water " * (index % 5) for index in range(57)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": "."}})
    yield
    ray.shutdown()


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    lines = [json.dumps({"id": index, "text": text}) for index, text in enumerate(TEXTS[:40])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    table = pa.table({"id": list(range(40, 57)), "text": TEXTS[40:]})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=10)
    return [tmp_path / "a.jsonl", tmp_path / "b.parquet"]


def run(bundle: Path, corpus: list[Path], out: Path, *flags: str) -> int:
    inputs = [str(path) for path in corpus]
    return main([str(bundle), "--input", *inputs, "--out", str(out), "--shard-rows", "16", "--workers", "2", *flags])


@pytest.mark.slow
def test_a_corpus_is_embedded_and_an_interrupted_job_continues(
    bundles: dict[str, Path], corpus: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(bundles["fp32"], corpus, out) == 0
    files = sorted(out.glob("*.parquet"))
    assert len(files) == 3 + 2
    table = pa.concat_tables([pq.read_table(file) for file in files])
    assert table.column("id").to_pylist() == list(range(57))
    assert table.column("text").to_pylist() == TEXTS
    expected = Encoder(bundles["fp32"], device="cpu").encode(TEXTS)
    np.testing.assert_allclose(np.array(table.column(EMBEDDING).to_pylist()), expected, atol=1e-6)
    files[1].unlink()
    written_at = {file: file.stat().st_mtime_ns for file in files if file != files[1]}
    assert run(bundles["fp32"], corpus, out) == 0
    err = capsys.readouterr().err
    assert "5 shards, 4 already done" in err
    assert "done: 16 texts embedded by this run" in err
    assert files[1].is_file()
    assert {file: file.stat().st_mtime_ns for file in written_at} == written_at
    for flags, message in ((["--column", "id"], "of another bundle, input or setting"), ([], "")):
        assert run(bundles["fp32"], corpus, out, *flags) == (1 if flags else 0)
        assert message in capsys.readouterr().err
    assert run(bundles["fp16"], corpus, out) == 1


@pytest.mark.slow
def test_wrong_rows_and_files_are_named(
    bundles: dict[str, Path], corpus: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bundles["fp32"]
    assert run(bundle, corpus, tmp_path / "x", "--column", "body") == 1
    assert "there is no column 'body', only id, text; pass --column NAME" in capsys.readouterr().err
    assert run(bundle, corpus, tmp_path / "x", "--output-column", "id") == 1
    assert "the input has a column 'id' already; pass another --output-column NAME" in capsys.readouterr().err
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    assert run(bundle, [tmp_path / "c.jsonl"], tmp_path / "y") == 1
    err = capsys.readouterr().err
    assert "1 of 1 shards failed; the first: " in err
    assert "c.jsonl from row 0: text 1 is a NoneType, not a str" in err
    for path, message in ((tmp_path / "none.jsonl", "names no file"), (tmp_path / "a.csv", "unsupported file type")):
        if path.suffix == ".csv":
            path.write_text("a,b")
        assert run(bundle, [path], tmp_path / "z") == 1
        assert message in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    assert run(bundle, corpus, tmp_path / "full") == 1
    assert f"is not empty and has no {RECORD}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(bundle, corpus, tmp_path / "w", "--workers", "0")
    assert ray_job.SHARD_ROWS > 0


def write_lines(path: Path, rows: list[dict], *, end: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps(row) + end for row in rows).encode())
    return path


def read_all(files: list[Path], shard_rows: int) -> list[dict]:
    """Returns the rows of all shards, in order."""
    job = plan(files, shard_rows)
    return [row for shard in job.shards for row in read(shard, job.schema).to_pylist()]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", " \n\t\n"])
def test_every_row_is_read_once(tmp_path: Path, end: str) -> None:
    rows = [{"text": f"row {index}\u2028 with\x85 breaks", "id": index} for index in range(23)]
    path = write_lines(tmp_path / "a.jsonl", rows, end=end)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().removesuffix(end.encode()))  # a mark, and no last line end
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet", row_group_size=9)
    files = [path, tmp_path / "b.parquet"]
    for shard_rows in (1, 4, 9, 100):
        assert read_all(files, shard_rows) == rows + rows
    names = [shard.name for shard in plan(files, 4).shards]
    assert len(set(names)) == len(names) == 6 + 3 + 3 + 2


def test_all_shards_have_one_schema(tmp_path: Path) -> None:
    """A column that is null, missing or whole numbers in some shards has the type that holds all rows."""
    rows = [
        {"text": "a", "title": None},
        {"text": "b"},
        {"text": "c", "title": "C", "size": 1},
        {"text": "d", "size": 2.5},
    ]
    job = plan([write_lines(tmp_path / "a.jsonl", rows)], 1)
    tables = [read(shard, job.schema) for shard in job.shards]
    assert all(table.schema == job.schema for table in tables)
    assert pa.concat_tables(tables).to_pylist() == [
        {"text": text, "title": title, "size": size}
        for text, title, size in (("a", None, None), ("b", None, None), ("c", "C", 1.0), ("d", None, 2.5))
    ]
    with pytest.raises(InputError, match="no single type holds"):
        plan([write_lines(tmp_path / "b.jsonl", [{"text": "a", "x": "1"}, {"text": "b", "x": {"y": 1}}])], 1)


def test_what_cannot_be_read_is_named_before_the_job(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for content, message in (
        (b'{"text": "a"}\r{"text": "b"}\r', "a.jsonl, at byte 0: not a JSON object on one line"),
        (b'{"text": "a"}\n[1]\n', "a.jsonl, at byte 14: not a JSON object"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl, at byte 14"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(message)):
            plan([path], 10)
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"b\.parquet cannot be read as Parquet"):
        plan([tmp_path / "b.parquet"], 10)


def test_an_edited_input_is_another_job(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "abc"}])
    before = plan([path], 10)
    write_lines(path, [{"text": "xyz"}])  # of the same size
    assert plan([path], 10).inputs != before.inputs
    write_lines(path, [])
    with pytest.raises(InputError, match="the file changed; start the job again"):
        read(before.shards[0], before.schema)


def test_folders_and_patterns_name_files(tmp_path: Path) -> None:
    files = [write_lines(tmp_path / f"{name}.jsonl", [{"text": name}]) for name in "ba"]
    (tmp_path / "notes.txt").write_text("")
    assert input_files([str(tmp_path)]) == sorted(files)
    assert input_files([str(tmp_path / "*.jsonl"), str(files[0])]) == sorted(files)
    with pytest.raises(ConfigError, match="names no file"):
        input_files([str(tmp_path / "*.json")])


@pytest.mark.slow
def test_rejects_and_readers_of_the_output(
    bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": text, "title": None if index < 20 else "T"} for index, text in enumerate(TEXTS[:40])]
    rows[5]["text"], rows[33]["text"] = None, None
    out, path = tmp_path / "out", write_lines(tmp_path / "a.jsonl", rows)
    assert run(bundles["fp32"], [path], out, "--skip-invalid", "--output-dtype", "float16") == 0
    assert "2 rows have no valid text" in capsys.readouterr().err
    rejects = [json.loads(line) for file in sorted((out / REJECTS).iterdir()) for line in file.read_text().splitlines()]
    assert [reject["row"] for reject in rejects] == [5, 33]
    assert "text 5 is a NoneType" in rejects[0]["reason"]
    texts = [row["text"] for row in rows if row["text"] is not None]
    table = pq.read_table(out)
    assert table.column("text").to_pylist() == texts
    assert table.schema.field(EMBEDDING).metadata[b"output_dtype"] == b"float16"
    import datasets
    import pandas as pd
    import polars as pl
    import ray

    assert pd.read_parquet(out)["text"].tolist() == texts
    assert pl.read_parquet(out / "*.parquet")["text"].to_list() == texts
    assert datasets.load_dataset("parquet", data_files=str(out / "*.parquet"))["train"]["text"][:] == texts
    assert ray.data.read_parquet(str(out)).count() == len(texts)
