"""`nvembed embed`: every input and output format, streams, and files with unexpected content."""

import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nvembed_deploy import Encoder
from nvembed_deploy.cli.embed import embed as embed_texts
from nvembed_deploy.cli.embed import main

TEXTS = ["a first text", "naïve 日本", "", 'a, "quoted" one']


@pytest.fixture
def bundle(bundles: dict[str, Path]) -> str:
    return str(bundles["fp32"])


def embed(bundle: str, *arguments: str) -> int:
    return main([bundle, "--device", "cpu", "--backend", "onnxruntime", *arguments])


def write(path: Path, texts: list[str]) -> Path:
    """Writes texts in the format of the file's suffix."""
    if path.suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts), encoding="utf-8")
    elif path.suffix == ".csv":
        import csv

        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["id", "text"], *(["1", text] for text in texts)])
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.table({"id": [1] * len(texts), "text": texts}), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_files_to_npy(bundle: str, encoder: Encoder, tmp_path: Path, suffix: str) -> None:
    source, out = write(tmp_path / f"texts{suffix}", TEXTS), tmp_path / "vectors.npy"
    assert embed(bundle, str(source), "--out", str(out)) == 0
    vectors = np.load(out)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, encoder.encode(TEXTS))


def test_queries_to_json_lines_and_parquet(bundle: str, encoder: Encoder, tmp_path: Path) -> None:
    source = write(tmp_path / "texts.txt", TEXTS)
    expected = encoder.encode(TEXTS, instruction="find it")
    flags = [str(source), "--instruction", "find it", "--out"]
    assert embed(bundle, *flags, str(tmp_path / "out.jsonl")) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == TEXTS
    np.testing.assert_array_equal(np.float32([row["embedding"] for row in rows]), expected)
    parquet = pytest.importorskip("pyarrow.parquet")
    assert embed(bundle, *flags, str(tmp_path / "out.parquet")) == 0
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["text"].to_pylist() == TEXTS
    np.testing.assert_array_equal(np.float32(table["embedding"].to_pylist()), expected)


def test_standard_input_to_standard_output(
    bundle: str, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a first text\r\nanother\n"))
    assert embed(bundle) == 0
    rows = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["a first text", "another"]
    np.testing.assert_array_equal(
        np.float32([row["embedding"] for row in rows]), encoder.encode(["a first text", "another"])
    )


def test_no_texts_give_no_vectors(bundle: str, encoder: Encoder, tmp_path: Path) -> None:
    assert embed(bundle, str(write(tmp_path / "none.txt", [])), "--out", str(tmp_path / "none.npy")) == 0
    assert np.load(tmp_path / "none.npy").shape == (0, encoder.dimension)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("texts.pdf", "x", "Supported: .txt, .jsonl, .csv, .parquet, or -"),
        ("none.txt", None, "does not exist or is not a file"),
        ("broken.jsonl", '{"text": "a"}\n{"text"\n', "line 2: not JSON"),
        ("other.jsonl", '{"body": "a"}\n', "row 1 has no text in 'text'; pass --column with one of ['body']"),
        ("other.csv", "body\na\n", "row 1 has no text in 'text'; pass --column with one of ['body']"),
        ("broken.parquet", "no parquet", "cannot be read as Parquet"),
    ],
)
def test_unreadable_files_leave_no_output(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, message: str
) -> None:
    source, out = tmp_path / name, tmp_path / "vectors.npy"
    if content is not None:
        source.write_text(content)
    assert embed(bundle, str(source), "--out", str(out)) == 1
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.startswith("error: ")
    assert not out.exists()


def test_a_text_is_named_by_its_place_in_the_whole_file(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by that in the window of texts that are embedded together."""
    monkeypatch.setattr("nvembed_deploy.encoder.windows.WINDOW_TEXTS", 2)
    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "a"}\n' * 4 + '{"text": "\\ud800"}\n')
    assert embed(bundle, str(source), "--out", str(tmp_path / "vectors.npy")) == 1
    assert "text 4 " in capsys.readouterr().err


def test_an_unsupported_suffix_is_refused_before_anything_is_read(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(bundle, str(tmp_path / "none.txt"), "--out", str(tmp_path / "vectors.bin")) == 1
    assert "Supported: .npy, .jsonl, .parquet" in capsys.readouterr().err


def test_without_an_instruction_the_model_chooses_its_prompt() -> None:
    """A model with a prompt for passages uses it: an empty prompt would replace it."""
    prompts: list[object] = []

    def encode_stream(texts: Iterable[str], *, prompt: str | None, **_: object) -> Iterator[np.ndarray]:
        prompts.append(prompt)
        yield np.zeros((len(list(texts)), 2), np.float32)

    encoder = SimpleNamespace(encode_stream=encode_stream)
    options = {"batch_size": None, "output_dtype": "float32", "show_progress": False}
    for prompt in (None, "query: "):
        assert len(list(embed_texts(encoder, iter(["a", "b"]), prompt=prompt, **options))) == 2  # type: ignore[arg-type]
    assert prompts == [None, "query: "]
