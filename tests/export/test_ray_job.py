"""A bulk job on two local workers: every text is embedded once, and an interrupted job continues."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy import Encoder

pytest.importorskip("ray", reason="ray is not installed: pip install nvembed-deploy[ray]")
import pyarrow as pa
import pyarrow.parquet as pq

from nvembed_deploy.export import ray_job
from nvembed_deploy.export.ray_job import EMBEDDING, RECORD, main

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
    assert "5 of 5 shards failed; the first: " in (err := capsys.readouterr().err)
    assert "there is no column 'body', only id, text; pass --column NAME" in err
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    assert run(bundle, [tmp_path / "c.jsonl"], tmp_path / "y") == 1
    assert "c.jsonl from row 0" in capsys.readouterr().err
    for path, message in ((tmp_path / "none.jsonl", "is not a file"), (tmp_path / "a.csv", "unsupported file type")):
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


def test_columns_that_only_some_rows_have_are_kept(tmp_path: Path) -> None:
    from nvembed_deploy.export.ray_job import _read

    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two", "title": "second"}\n')
    table = _read({"path": str(path), "start": 0, "rows": 2})
    assert table.to_pydict() == {"text": ["one", "two"], "title": [None, "second"]}
