"""`Encoder` on ONNX Runtime: conformance in every precision, device selection, and imports at start."""

import asyncio
import pickle
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy import (
    BundleError,
    CheckpointError,
    ConfigError,
    DeviceMismatchError,
    Encoder,
    EngineError,
    InputError,
    InputTypeError,
    NumericsError,
)
from nvembed_deploy.backends.base import Output
from nvembed_deploy.encoder import windows
from nvembed_deploy.model import source
from nvembed_deploy.tokenization import TokenBatch
from tests import numpy_reference
from tests.conformance import TEXTS, check_encoder
from tests.conftest import ROOT, needs_rtx


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-6), ("fp16", 2e-3), ("bf16", 2e-2)])
def test_conformance(bundles: dict[str, Path], precision: str, tolerance: float) -> None:
    check_encoder(Encoder(bundles[precision], device="cpu"), tolerance=tolerance)


def test_equals_independent_program(encoder: Encoder, checkpoint: Path) -> None:
    rows = encoder._text.tokenize(TEXTS, prompt="find the passage: ", max_length=128)
    expected = [numpy_reference.embed(checkpoint, row.ids, row.prompt_tokens) for row in rows]
    assert np.abs(encoder.encode(TEXTS, prompt="find the passage: ") - np.stack(expected)).max() <= 5e-6


@needs_rtx
def test_without_a_gpu_one_warning_is_given(bundles: dict[str, Path]) -> None:
    with pytest.warns(UserWarning, match=r"engine\.plan is not used: .*runs on onnxruntime") as caught:
        encoder = Encoder(bundles["fp16"] / "engine.plan")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert encoder.backend.startswith("onnxruntime")


@needs_rtx
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_is_not_replaced_silently(bundles: dict[str, Path], device: str) -> None:
    with pytest.raises(DeviceMismatchError, match=r"no NVIDIA driver|no CUDA device"):
        Encoder(bundles["fp16"], device=device)


@pytest.mark.parametrize("name", ["", "model.onnx"])
def test_an_explicit_choice_gives_no_warning(bundles: dict[str, Path], name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Encoder(bundles["fp16"] / name, device="auto" if name else "cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:", "CUDA", "", "cpu:0", None])
def test_unknown_device(bundles: dict[str, Path], device: str) -> None:
    with pytest.raises(ConfigError, match="pass 'auto', 'cpu', 'cuda' or 'cuda:N'"):
        Encoder(bundles["fp16"], device=device)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length is 0; pass a whole number of at least 1"),
        ({"max_length": 10_000}, "max_length is 10000; this engine accepts at most 2048"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"batch_size": True}, "batch_size is True"),
        ({"batch_tokens": 2.5}, r"batch_tokens is 2\.5"),
        ({"instruction": "a", "prompt": "b"}, "mutually exclusive"),
    ],
)
def test_bad_options(encoder: Encoder, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder.encode(["a"], **options)


def test_unknown_option_is_not_swallowed(encoder: Encoder) -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        encoder.encode(["a"], instuction="typo")


def test_bad_text_deep_in_a_generator(encoder: Encoder) -> None:
    def texts() -> Iterator[str | None]:
        yield from (f"text number {index}" for index in range(5000))
        yield None

    with pytest.raises(TypeError, match="text 5000 is a NoneType"):
        encoder.encode(texts())  # type: ignore[arg-type]


def test_truncation_is_reported(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    encoder.encode(TEXTS, max_length=8)
    assert "4 of 6 texts were longer than max_length=8 tokens and were truncated" in caplog.text


def test_the_default_max_length_is_the_plans(encoder: Encoder) -> None:
    assert encoder.max_length == 128
    long = "over the water " * 200
    np.testing.assert_array_equal(encoder.encode(long), encoder.encode(long, max_length=128))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 0.5])
def test_invalid_vectors_are_never_returned(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    encoder = Encoder(bundles["fp32"], device="cpu")
    before = encoder.encode(TEXTS)
    good = encoder._backend.run

    def bad(batch: TokenBatch) -> Output:
        output = good(batch)
        lengths = batch.attention_mask.sum(axis=1)
        output.embeddings[lengths == 3] = value
        return output

    monkeypatch.setattr(encoder._backend, "run", bad)
    with pytest.raises(NumericsError, match=r"text 1: onnxruntime .* returned a vector of length"):
        encoder.encode(TEXTS)
    monkeypatch.undo()
    np.testing.assert_allclose(encoder.encode(TEXTS), before, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_length_is_refused(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    good = encoder._backend.run
    monkeypatch.setattr(
        encoder._backend, "run", lambda batch: good(batch)._replace(norms=np.full(len(batch.input_ids), value, "f4"))
    )
    with pytest.raises(NumericsError, match="pooled length"):
        encoder.encode("text", normalize=False)


def test_batches_in_flight_keep_their_order(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that runs two batches at a time, as a plan does, returns the same rows; an error stops the rest."""
    expected = encoder.encode(TEXTS, batch_size=1)
    monkeypatch.setattr(encoder._backend, "in_flight", 2, raising=False)
    np.testing.assert_array_equal(encoder.encode(TEXTS, batch_size=1), expected)
    calls: list[int] = []

    def fails(batch: TokenBatch) -> Output:
        calls.append(len(batch.input_ids))
        time.sleep(0.001)  # or all of them have failed before the first is looked at
        raise EngineError("no")

    monkeypatch.setattr(encoder._backend, "run_concurrent", fails)
    with pytest.raises(EngineError, match="no"):
        encoder.encode(["text"] * 1000, batch_size=1)
    assert len(calls) < 1000


@pytest.mark.parametrize("calls_each", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_threads_return_the_vectors_of_one_thread(encoder: Encoder, calls_each: int) -> None:
    expected = [encoder.encode(text) for text in TEXTS]
    with ThreadPoolExecutor(16) as pool:
        calls = pool.map(lambda index: encoder.encode(TEXTS[index % len(TEXTS)]), range(16 * calls_each))
        for index, vector in enumerate(calls):
            assert np.abs(vector - expected[index % len(TEXTS)]).max() <= 2e-6


STREAM = """
import sys, itertools
from nvembed_deploy import Encoder
from nvembed_deploy.system import peak_memory_bytes
encoder = Encoder(sys.argv[1], device="cpu", backend="onnxruntime")
def texts(count):
    return (f"short text {number}" for number in range(count))
for part in encoder.encode_stream(texts(10_000)):
    pass
before, rows = peak_memory_bytes(), 0
for part in encoder.encode_stream(texts(int(sys.argv[2]))):
    rows += len(part)
print(rows, peak_memory_bytes() - before)
"""
MOST_STREAM_BYTES = 20 * 2**20
"""For 60,000 texts more: what grows with their number would show; a million takes no more."""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_stream(bundles: dict[str, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(bundles["fp32"]), "60000"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=ROOT,
    )
    rows, grown = map(int, done.stdout.split())
    assert rows == 60_000
    assert grown < MOST_STREAM_BYTES


def test_a_stream_is_read_one_window_ahead(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are read in the caller's thread, since many sources, such as SQLite's cursors, require it."""
    monkeypatch.setattr(windows, "WINDOW_TEXTS", 8)
    words = [f"word {index}" * (1 + index % 5) for index in range(30)]
    read: list[int] = []

    def texts() -> Iterator[str]:
        for index, word in enumerate(words):
            assert threading.current_thread() is threading.main_thread()
            read.append(index)
            yield word

    expected = encoder.encode(words)
    blocks, sizes = [], []
    for block in encoder.encode_stream(texts()):
        blocks.append(block)
        sizes.append((len(block), len(read)))
    assert sizes == [(8, 16), (8, 24), (8, 30), (6, 30)]
    np.testing.assert_allclose(np.concatenate(blocks), expected, atol=2e-6)


def test_a_stream_yields_what_was_read_before_its_source_fails(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW_TEXTS", 8)

    def texts() -> Iterator[str]:
        yield from ["a word"] * 20
        raise OSError("the connection was lost")

    sizes: list[int] = []
    with pytest.raises(OSError, match="the connection was lost"):
        sizes.extend(map(len, encoder.encode_stream(texts())))
    assert sizes == [8, 8]


def test_a_stream_checks_its_options_before_it_reads(encoder: Encoder) -> None:
    def texts() -> Iterator[str]:
        raise AssertionError("read")
        yield ""

    with pytest.raises(ConfigError, match="batch_size is 0"):
        encoder.encode_stream(texts(), batch_size=0)
    with pytest.raises(InputTypeError, match="texts is a str"):
        encoder.encode_stream("one text")
    assert list(encoder.encode_stream([])) == []


def test_an_error_in_a_later_window_names_its_text(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WINDOW_TEXTS", 4)
    texts = [*["fine"] * 9, None]
    monkeypatch.setattr(encoder._backend, "run", None)  # a list is checked before anything runs
    with pytest.raises(InputTypeError, match="text 9 is a NoneType"):
        encoder.encode_stream(texts)  # type: ignore[arg-type]
    monkeypatch.undo()
    monkeypatch.setattr(windows, "WINDOW_TEXTS", 4)
    blocks = encoder.encode_stream(text for text in texts)  # type: ignore[misc]
    assert len(next(blocks)) == 4
    with pytest.raises(InputTypeError, match="text 9 is a NoneType"):
        list(blocks)


def test_paths(bundles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"does not exist; check the path, or export one: .* --model CHECKPOINT"):
        Encoder(tmp_path / "nothing" / "engine.plan")
    (tmp_path / "engine.plan").write_bytes(b"plan")
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        Encoder(tmp_path / "engine.plan")
    with pytest.raises(BundleError, match=r"is not a bundle; pass a bundle's folder"):
        Encoder(bundles["fp16"] / "tokenizer.json")
    assert "fp16" in repr(Encoder(str(bundles["fp16"]), device="cpu"))


def test_checkpoints_and_bundles_are_told_apart(
    bundles: dict[str, Path], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message exports that checkpoint; on a device, which cannot export, it names no such command."""
    with pytest.raises(CheckpointError, match=f"is a bundle; pass the checkpoint .* build {bundles['fp16']}$"):
        source.resolve(str(bundles["fp16"]), None)
    with pytest.raises(
        BundleError, match=f"is a checkpoint, not a bundle; .* export --model {checkpoint} --out FOLDER"
    ):
        Encoder(checkpoint)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BundleError, match=r"is a checkpoint, not a bundle; pass a bundle$"):
        Encoder(checkpoint)


def test_opening_a_bundle_imports_no_heavy_packages(bundles: dict[str, Path]) -> None:
    """No torch, transformers or onnx from import to first vector; the time varies too much to be tested."""
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from nvembed_deploy import Encoder\n"
        "heavy = {'torch', 'transformers', 'onnx', 'tensorrt', 'tensorrt_rtx', 'tensorrt_rtx_bindings', 'scipy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        f"print(Encoder({str(bundles['fp16'])!r}).encode('water').shape)\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "(32,)\n"), done.stderr


def test_queries_and_documents_have_their_prompts(bundles: dict[str, Path]) -> None:
    """The names and conventions of sentence-transformers."""
    plain = Encoder(bundles["fp32"], device="cpu")
    default = "Given a question, retrieve passages that answer the question"
    assert plain.prompts == {"query": f"Instruct: {default}\nQuery: ", "document": ""}
    np.testing.assert_array_equal(plain.encode_query(TEXTS), plain.encode(TEXTS, instruction=default))
    np.testing.assert_array_equal(plain.encode_document(TEXTS), plain.encode(TEXTS))
    np.testing.assert_array_equal(
        plain.encode_query(TEXTS, instruction="other"), plain.encode(TEXTS, instruction="other")
    )
    np.testing.assert_array_equal(plain.encode_query(TEXTS, prompt=""), plain.encode(TEXTS))
    other = Encoder(bundles["fp32"], device="cpu", query_instruction="find code")
    for encoder in (other, pickle.loads(pickle.dumps(other))):
        np.testing.assert_array_equal(encoder.encode_query("a"), plain.encode("a", instruction="find code"))
        np.testing.assert_array_equal(encoder.encode("a", prompt_name="query"), encoder.encode_query("a"))
    assert plain.get_embedding_dimension() == plain.dimension
    assert plain.similarity_fn_name == "cosine"


def test_similarity(encoder: Encoder) -> None:
    vectors = encoder.encode(TEXTS)
    np.testing.assert_allclose(encoder.similarity(vectors, 3 * vectors), vectors @ vectors.T, atol=1e-6)
    np.testing.assert_allclose(encoder.similarity_pairwise(vectors, vectors), np.ones(len(TEXTS)), atol=1e-6)
    assert encoder.similarity(vectors[0], vectors).shape == (1, len(TEXTS))
    with pytest.raises(InputError, match="dimensions; compare vectors of one model"):
        encoder.similarity(vectors, vectors[:, :3])
    with pytest.raises(InputError, match="pass the same number of both"):
        encoder.similarity_pairwise(vectors, vectors[:1])
    with pytest.raises(InputError, match=r"the vectors are not numbers .* pass what `encode` returns, not texts"):
        encoder.similarity("a question", "a passage")


def test_aencode_shares_batches(bundles: dict[str, Path]) -> None:
    async def embed() -> list:
        one = encoder.aencode("a single text")
        several = [encoder.aencode([text], instruction="find it") for text in TEXTS]
        return await asyncio.gather(one, encoder.aencode(TEXTS), encoder.aencode([]), *several)

    with Encoder(bundles["fp32"], device="cpu") as encoder:
        single, several, none, *instructed = asyncio.run(embed())
        np.testing.assert_allclose(single, encoder.encode("a single text"), atol=2e-6)
        np.testing.assert_allclose(several, encoder.encode(TEXTS), atol=2e-6)
        assert none.shape == (0, encoder.dimension)
        np.testing.assert_allclose(np.concatenate(instructed), encoder.encode(TEXTS, instruction="find it"), atol=2e-6)
        with pytest.raises(InputTypeError, match="text 0 is a int"):
            asyncio.run(encoder.aencode([1]))  # type: ignore[list-item]
    with pytest.raises(EngineError, match="closed"):
        asyncio.run(encoder.aencode("a"))


def test_the_beginning_of_a_long_text_can_be_dropped(encoder: Encoder) -> None:
    body, end = "filler " * 300, "the end matters"
    rows = encoder.tokenize([body + end], prompt="find: ", max_length=40, truncate="start")
    whole = encoder.tokenize([body + end], prompt="find: ", max_length=encoder.max_length, truncate="start")[0].ids
    prompt_tokens = rows[0].prompt_tokens
    assert len(rows[0]) == 40
    assert rows[0].truncated
    assert rows[0].ids[:prompt_tokens] == whole[:prompt_tokens]
    full = encoder._text.tokenize([body + end], prompt="find: ", max_length=2048)[0].ids
    assert rows[0].ids == full[: prompt_tokens + 1] + full[len(full) - (40 - prompt_tokens - 1) :]
    with pytest.raises(ConfigError, match="truncate is 'middle'"):
        encoder.encode("a", truncate="middle")  # type: ignore[arg-type]
