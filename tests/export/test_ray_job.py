"""A bulk job on two local workers: every text is embedded once, and an interrupted job continues."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy import ConfigError, Encoder, EngineError
from nvembed_deploy.bundle.manifest import TOKENIZER
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.tokenization import TextContract, TextEncoder

pytest.importorskip("ray", reason="ray is not installed: pip install nvembed-deploy[ray]")
import pyarrow as pa
import pyarrow.parquet as pq

from nvembed_deploy.export import ray_job
from nvembed_deploy.export.bulk import schedule as bulk_schedule
from nvembed_deploy.export.bulk.inputs import input_files
from nvembed_deploy.export.bulk.output import RECORD, REJECTS
from nvembed_deploy.export.bulk.schedule import Job, Progress, ShardQueue, Totals, Workers, duration, require_resources
from nvembed_deploy.export.bulk.shards import Shard, plan
from nvembed_deploy.export.bulk.worker import Report, Task
from nvembed_deploy.export.ray_job import EMBEDDING, main

TEXTS = [f"text number {index} " + "over the water " * (index % 5) for index in range(57)]
ROWS = [{"id": index, "title": f"title {index}" if index >= 20 else None, "text": TEXTS[index]} for index in range(57)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": "."}})
    yield
    ray.shutdown()


def write_lines(path: Path, rows: list[dict]) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with rows of which two have no text: JSON lines, the same compressed, and Parquet."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [row | {"title": None, "text": None} if row["id"] in (5, 33) else row for row in ROWS]
    write_lines(folder / "a.jsonl", rows[:30])
    write_lines(folder / "b.jsonl.gz", rows[30:40])
    pq.write_table(pa.Table.from_pylist(rows[40:]), folder / "c.parquet", row_group_size=10)
    return folder


def run(bundle: Path, corpus: Path, out: Path, *flags: str) -> int:
    return main(
        [str(bundle), "--input", str(corpus), "--out", str(out), "--shard-rows", "16", "--workers", "2", *flags]
    )


JOB = ("--text-column", "title", "--text-column", "text", "--skip-invalid", "--prompt-name", "query")


@pytest.fixture(scope="module")
def output(bundles: dict[str, Path], cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The corpus and the output of a job, and what the job wrote to stderr."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("bulk")
    inputs, stderr = corpus.__wrapped__(folder), io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert run(bundles["fp32"], inputs, folder / "out", *JOB, "--output-dtype", "float16") == 0
    return inputs, folder / "out", stderr.getvalue()


@pytest.mark.slow
def test_each_row_is_in_the_output_or_in_the_rejects(output: tuple[Path, Path, str], bundles: dict[str, Path]) -> None:
    _, out, stderr = output
    files = sorted(out.glob("*.parquet"))
    assert len(files) == 2 + 1 + 2
    table = pa.concat_tables([pq.read_table(file) for file in files])
    valid = [row for row in ROWS if row["id"] not in (5, 33)]
    assert table.select(["id", "title", "text"]).to_pylist() == valid
    texts = [row["text"] if row["title"] is None else f"{row['title']}\n{row['text']}" for row in valid]
    expected = Encoder(bundles["fp32"], device="cpu").encode_query(texts)
    np.testing.assert_allclose(np.array(table.column(EMBEDDING).to_pylist()), expected, atol=2.5e-4)  # float16
    metadata = table.schema.field(EMBEDDING).metadata
    assert (metadata[b"output_dtype"], metadata[b"prompt"][:9]) == (b"float16", b"Instruct:")
    rejects = [json.loads(line) for file in sorted((out / REJECTS).iterdir()) for line in file.read_text().splitlines()]
    assert [(Path(reject["path"]).name, reject["row"]) for reject in rejects] == [("a.jsonl", 5), ("b.jsonl.gz", 3)]
    assert all(reject["reason"].startswith("the text is a NoneType, not a str") for reject in rejects)
    lines = stderr.splitlines()
    assert "2 rows were left out; they are in" in lines[-2]
    assert "done: 55 texts embedded by this run" in lines[-1]
    assert len(lines) <= 7  # and nothing of Ray's log


def pandas_texts(folder: Path) -> list[str]:
    return pytest.importorskip("pandas").read_parquet(folder)["text"].tolist()


def polars_texts(folder: Path) -> list[str]:
    return pytest.importorskip("polars").read_parquet(folder / "*.parquet")["text"].to_list()


def duckdb_texts(folder: Path) -> list[str]:
    query = f"SELECT text, embedding FROM '{folder}/*.parquet'"
    rows = pytest.importorskip("duckdb").sql(query).fetchall()
    assert all(abs(np.linalg.norm(embedding) - 1) < 0.01 for _, embedding in rows)
    return [text for text, _ in rows]


def datasets_texts(folder: Path) -> list[str]:
    datasets = pytest.importorskip("datasets")
    return datasets.load_dataset(str(folder), cache_dir=str(folder.parent / "cache"))["train"]["text"][:]


def ray_texts(folder: Path) -> list[str]:
    rows = (
        pytest.importorskip("ray.data").read_parquet(str(folder), override_num_blocks=1).take_all()
    )  # in no particular order
    return [row["text"] for row in sorted(rows, key=lambda row: row["id"])]


READERS: dict[str, Callable[[Path], list[str]]] = {
    "pandas": pandas_texts,
    "pyarrow": lambda folder: pq.read_table(folder).column("text").to_pylist(),
    "polars": polars_texts,
    "duckdb": duckdb_texts,
    "datasets": datasets_texts,
    "ray": ray_texts,
}


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_the_output_is_read_as_one_table(reader: str, output: tuple[Path, Path, str]) -> None:
    assert READERS[reader](output[1]) == [text for index, text in enumerate(TEXTS) if index not in (5, 33)]


@pytest.mark.slow
def test_an_interrupted_job_continues_and_another_is_refused(
    output: tuple[Path, Path, str], bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, out, _ = output
    files = sorted(out.glob("*.parquet"))
    flags = [*JOB, "--output-dtype", "float16"]
    content = files[1].read_bytes()
    files[1].unlink()
    written_at = {file: file.stat().st_mtime_ns for file in files if file != files[1]}
    assert run(bundles["fp32"], inputs, out, *flags) == 0
    err = capsys.readouterr().err
    assert "5 shards, 4 already done" in err
    assert "done: 14 texts embedded by this run" in err
    assert files[1].read_bytes() == content
    assert {file: file.stat().st_mtime_ns for file in written_at} == written_at
    assert run(bundles["fp32"], inputs, out, *flags) == 0
    assert "5 shards, 5 already done" in capsys.readouterr().err
    as_before = ["--column", "text", "--skip-invalid", "--output-dtype", "float16"]
    for others, difference in ((JOB, "output_dtype differs"), (as_before, "prompt, text_columns differ")):
        assert run(bundles["fp32"], inputs, out, *others) == 1
        assert f"of another bundle, input or setting ({difference}, see its _job.json)" in capsys.readouterr().err
    with (inputs / "a.jsonl").open("r+b") as file:  # of the same size
        file.write(b'{"id": 9')
    assert run(bundles["fp32"], inputs, out, *flags) == 1
    assert "(inputs differs, see its _job.json)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_driver_loses_no_row(cluster: None, bundles: dict[str, Path], tmp_path: Path) -> None:
    """The driver of another process is killed on the same cluster; its worker may be in the middle of a shard."""
    import ray

    path, out = write_lines(tmp_path / "a.jsonl", ROWS), tmp_path / "out"
    flags = [str(bundles["fp32"]), "--input", str(path), "--out", str(out), "--shard-rows", "2"]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with subprocess.Popen([sys.executable, "-m", "nvembed_deploy", "bulk", *flags], env=environment) as driver:
        while driver.poll() is None and len(list(out.glob("*.parquet"))) < 3:
            time.sleep(0.01)
        driver.kill()
    written_at = {file: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    assert 3 <= len(written_at) < 29
    assert main(flags) == 0
    assert {file: file.stat().st_mtime_ns for file in written_at} == written_at
    table = pq.read_table(out)
    assert table.select(["id", "title", "text"]).to_pylist() == ROWS
    expected = Encoder(bundles["fp32"], device="cpu").encode(TEXTS)
    np.testing.assert_allclose(np.array(table.column(EMBEDDING).to_pylist()), expected, atol=1e-6)


@pytest.mark.slow
def test_rows_without_a_text_are_named(
    cluster: None, bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*({"text": "a"} for _ in range(16)), {"text": "b"}, {"text": None}])
    assert run(bundles["fp32"], path, tmp_path / "out", "--workers", "1") == 1
    err = capsys.readouterr().err
    assert f"1 of 2 shards failed; the first: {path}, row 17: the text is a NoneType, not a str" in err
    assert "pass --skip-invalid to write such rows to _rejects/ instead" in err
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 1


def test_wrong_settings_are_refused_before_ray_starts(
    bundles: dict[str, Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("x")
    for flags, message in (
        (["--text-column", "body"], "there is no column 'body', only id, title, text; pass --text-column NAME"),
        (["--text-column", "id"], "column 'id' has values of type int64, not texts"),
        (["--output-column", "id"], "the input has a column 'id' already; pass another --output-column NAME"),
        (["--prompt-name", "xyz"], "prompt_name is 'xyz'; this model's prompts are: 'query', 'document'"),
        (["--prompt-name", "query", "--instruction", "x"], "are mutually exclusive"),
        (["--out", str(full)], f"is not empty and has no {RECORD}"),
        (["--out", "fsspec+memory:///out"], "on which a killed job could leave half a file"),
    ):
        assert run(bundles["fp32"], corpus, tmp_path / "out", *flags) == 1
        assert message in capsys.readouterr().err
    for flags in (["--workers", "0"], ["--gpus", "-1"], ["--cpus", "0"]):
        with pytest.raises(SystemExit):
            run(bundles["fp32"], corpus, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_worker_takes_its_share_of_the_cores(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--cpus` is what Ray reserves and the number of the engine's threads; without it the workers share the cores."""
    jobs = []

    class Recorded:
        def __init__(self, shards: list[Shard], task: Task, workers: Workers) -> None:
            jobs.append((workers.count, workers.cpus, task.threads))

        def run(self) -> Totals:
            return Totals()

    monkeypatch.setattr(bulk_schedule, "Job", Recorded)
    monkeypatch.setattr(ray_job, "_ray", lambda: nullcontext(False))
    monkeypatch.setattr(ray_job, "usable_cores", lambda: 7)
    path = write_lines(tmp_path / "a.jsonl", ROWS[:1])
    for index, (flags, job) in enumerate(
        (([], (2, 3, 3)), (["--cpus", "0.5"], (2, 0.5, 1)), (["--workers", "9", "--cpus", "4"], (9, 4, 4)))
    ):
        assert run(bundles["fp32"], path, tmp_path / str(index), *flags) == 0
        assert jobs[-1] == job


def test_a_ray_that_does_not_start_is_one_sentence(
    bundles: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import ray

    def fail(**options: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    assert run(bundles["fp32"], corpus, tmp_path / "out") == 1
    assert "error: Ray did not start (The current node timed out during startup); check" in capsys.readouterr().err


def test_prompts_by_name(bundles: dict[str, Path]) -> None:
    bundle = Bundle.open(bundles["fp32"])
    fixed = TextContract(  # as of llama-3.2-nv-embedqa
        prefix_ids=(1,),
        suffix_ids=(),
        pad_id=0,
        mask_prompt=False,
        max_tokens=128,
        instruction_template="",
        default_prompt="passage: ",
        prompts={"query": "query: ", "document": "passage: "},
    )
    for contract, prompts in (
        (bundle.manifest.text, {"query": "Instruct: Given a question", "document": "", None: ""}),
        (fixed, {"query": "query: ", "document": "passage: ", None: "passage: "}),
    ):
        encoder = TextEncoder(bundle.read(TOKENIZER), contract)
        for name, prompt in prompts.items():
            assert encoder.prompt(None, None, name).startswith(prompt)
    with pytest.raises(ConfigError, match="takes no instructions; pass prompt_name"):
        encoder.prompt("x", None)


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_a_few_times(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}] * 3)
    deaths = {"0000-a-000001.parquet": 1, "0000-a-000002.parquet": 2}
    monkeypatch.setattr(bulk_schedule, "MAX_ATTEMPTS", 2)

    class Dying:
        def __init__(self, folder: str) -> None:
            self.folder = Path(folder)

        def open(self) -> Report:
            return Report(worker=str(os.getpid()), backend="a fake")

        def embed(self, shard: Shard) -> Report:
            with (self.folder / shard.name).open("ab") as attempts:
                attempts.write(b".")
                attempts.flush()
                if attempts.tell() <= deaths.get(shard.name, 0):
                    os.kill(os.getpid(), signal.SIGKILL)
            return Report(rows=shard.rows)

    monkeypatch.setattr(bulk_schedule, "Embedder", Dying)
    shards = plan(input_files([str(path)]), 1).shards
    (tmp_path / "out").mkdir()
    totals = Job(shards, str(tmp_path / "out"), Workers(count=1, cpus=1, gpus=0)).run()
    attempts = [(tmp_path / "out" / shard.name).stat().st_size for shard in shards]
    assert attempts == [1, 2, 2]
    assert totals.rows == 2
    assert totals.errors == [f"{path}, from row 2: 2 workers died at these rows, one after another"]
    err = capsys.readouterr().err
    assert f"died at {path}, from row 1 (killed, or it crashed); trying again, 2 of 2" in err
    assert err.count("note: worker") == 3

    class Unopened(Dying):
        def open(self) -> Report:
            return Report(error="worker 1 cannot open the bundle: no GPU")

    monkeypatch.setattr(bulk_schedule, "Embedder", Unopened)
    with pytest.raises(EngineError, match="cannot open the bundle: no GPU"):
        Job(shards, str(tmp_path / "out"), Workers(count=1, cpus=1, gpus=0)).run()
    with pytest.raises(ConfigError, match="--gpus 1 per worker, and this machine has 0 GPUs; pass fewer"):
        require_resources(Workers(count=1, cpus=1, gpus=1))


def test_workers_keep_to_a_file_and_help_with_others_at_the_end(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / f"{name}.jsonl", [{"text": "a"}] * 3) for name in "ab"]
    queue = ShardQueue(plan(input_files([str(path) for path in paths]), 1).shards)
    first, second = queue.take(None), queue.take(None)
    assert [first.name, second.name] == ["0000-a-000000.parquet", "0001-b-000000.parquet"]
    queue.put_back(first)
    assert queue.take(None) == first
    for expected in ("0000-a-000001.parquet", "0000-a-000002.parquet", "0001-b-000001.parquet"):
        first = queue.take(first)
        assert first.name == expected
    assert queue.take(second).name == "0001-b-000002.parquet"
    assert not queue
    assert queue.take(first) is None


def test_progress_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [1000.0]
    monkeypatch.setattr(bulk_schedule.time, "monotonic", lambda: clock[0])
    progress = Progress(4000)
    assert progress.line() == "starting the workers"
    progress.started, progress.done = clock[0], 1000
    clock[0] += 10
    progress.show()
    assert capsys.readouterr().err == ""
    clock[0] += 30
    for _ in range(2):
        progress.show()
    assert capsys.readouterr().err == "  1,000 of 4,000 rows, 25%, 25 rows/s, 120 s left\n".replace("120 s", "2 min")
    assert [duration(seconds) for seconds in (5, 99, 400, 86_400)] == ["5 s", "99 s", "7 min", "24 h 0 min"]
