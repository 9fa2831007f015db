"""Smaller number formats of vectors: conversion, search and rescoring, and which of them a bundle offers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy import ConfigError, Encoder
from nvembed_deploy.bundle.manifest import MANIFEST, Manifest
from nvembed_deploy.bundle.vector_kinds import BOUNDS, VectorLoss
from nvembed_deploy.engines.check import main as check
from nvembed_deploy.vectors import (
    INT8_MAX,
    OutputDtype,
    convert,
    fit_int8_step,
    hamming_distances,
    rescore,
    search,
)
from tests.readme import BLOCK, ROOT

MINI = ROOT / "models" / "nv-embed-mini"
TEXTS = ["how do I undo a commit?", "a", "", "Salt lowers the freezing point of water.", "salt on roads"]
DTYPES = {"float16": "f2", "int8": "i1", "uint8": "u1", "binary": "i1", "ubinary": "u1"}


@pytest.fixture(scope="module")
def mini() -> Encoder:
    return Encoder(MINI, device="cpu", backend="onnxruntime")


@pytest.fixture
def vectors() -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((500, 64)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_formats_are_those_of_hosted_interfaces(vectors: np.ndarray) -> None:
    step = fit_int8_step(vectors)
    int8 = convert(vectors, OutputDtype.INT8, int8_step=step)
    np.testing.assert_array_equal(int8, np.clip(np.round(vectors / np.float32(step)), -127, 127))
    assert np.abs(int8 * step - vectors).max() <= max(step / 2 * 1.001, np.abs(vectors).max() - INT8_MAX * step)
    uint8 = convert(vectors, OutputDtype.UINT8, int8_step=step)
    np.testing.assert_array_equal(uint8.astype(int) - 128, int8)
    ubinary = convert(vectors, OutputDtype.UBINARY)
    np.testing.assert_array_equal(np.unpackbits(ubinary, axis=1), vectors > 0)
    np.testing.assert_array_equal(convert(vectors, OutputDtype.BINARY).astype(int) + 128, ubinary)


def test_sentence_transformers_has_the_same_bits(vectors: np.ndarray) -> None:
    quantization = pytest.importorskip("sentence_transformers.util.quantization")
    for dtype in (OutputDtype.UBINARY, OutputDtype.BINARY):
        np.testing.assert_array_equal(
            convert(vectors, dtype), quantization.quantize_embeddings(vectors, precision=dtype.value)
        )


@pytest.mark.parametrize("width", [8, 24, 64])
def test_distances_of_bits(width: int) -> None:
    bits = np.random.default_rng(1).integers(0, 2, (40, width), dtype=np.uint8)
    packed = np.packbits(bits, axis=1)
    expected = (bits[:5, None] != bits[None]).sum(axis=2)
    np.testing.assert_array_equal(hamming_distances(packed[:5], packed), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "ubinary"])
def test_search_is_exact(vectors: np.ndarray, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvembed_deploy.vectors.BLOCK_VECTORS", 77)  # several blocks, the last one smaller
    converted = convert(np.concatenate([vectors, vectors[:9]]), OutputDtype(dtype), int8_step=0.003)  # with ties
    indices, scores = search(converted[:20], converted, top_k=12)
    if dtype == "ubinary":
        expected = -hamming_distances(converted[:20], converted)
    else:
        expected = converted[:20].astype(np.float64) @ converted.astype(np.float64).T
    order = np.argsort(-expected, axis=1, kind="stable")[:, :12]
    np.testing.assert_allclose(scores, np.take_along_axis(expected, order, axis=1), rtol=1e-5)
    if dtype in ("int8", "ubinary"):  # integers: equal scores are equal, and come in order
        np.testing.assert_array_equal(indices, order)
    assert search(converted[:2], converted[:3], top_k=10)[0].shape == (2, 3)


def test_rescoring_ranks_the_candidates(vectors: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    bits = convert(vectors, OutputDtype.UBINARY)
    candidates, _ = search(bits[:10], bits, top_k=400)
    indices, scores = rescore(vectors[:10], candidates, mapped, top_k=5)
    exact, exact_scores = search(vectors[:10], vectors, top_k=5)
    assert (indices[:, 0] == np.arange(10)).all()
    assert np.mean(indices == exact) > 0.9
    np.testing.assert_allclose(scores[:, 0], exact_scores[:, 0], rtol=1e-5)
    with pytest.raises(ConfigError, match="convert both to one format"):
        search(vectors, bits, top_k=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_encoder_returns_them(mini: Encoder, dtype: str) -> None:
    floats = mini.encode(TEXTS)
    vectors = mini.encode(TEXTS, output_dtype=dtype)
    assert vectors.dtype == np.dtype(DTYPES[dtype])
    step = mini.manifest.vectors.int8_step
    np.testing.assert_array_equal(vectors, convert(floats, OutputDtype(dtype), int8_step=step))
    assert mini.encode(TEXTS[0], output_dtype=dtype).ndim == 1
    assert mini.encode([], output_dtype=dtype).shape == (0, vectors.shape[1])
    np.testing.assert_array_equal(np.concatenate(list(mini.encode_stream(TEXTS, output_dtype=dtype))), vectors)
    np.testing.assert_array_equal(
        mini.encode_query(TEXTS, output_dtype=dtype),
        convert(mini.encode_query(TEXTS), OutputDtype(dtype), int8_step=step),
    )


def test_no_range_comes_from_the_batch(mini: Encoder) -> None:
    """A text alone has the int8 vector that it has among others: rounding differs where floats do, by one step."""
    together = mini.encode(TEXTS, output_dtype="int8").astype(int)
    alone = np.stack([mini.encode(text, output_dtype="int8").astype(int) for text in TEXTS])
    assert np.abs(together - alone).max() <= 1
    assert (together != alone).mean() < 0.002
    assert np.abs(alone).max() > 20


def test_what_costs_too_much_is_not_offered(mini: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = mini.manifest.vectors
    for losses, message in (
        (
            {"int8": VectorLoss(overlap=0.5, ndcg_share=1.0)},
            "int8 vectors are not offered by this bundle: as int8 they keep",
        ),
        ({"ubinary+int8": VectorLoss(overlap=0.9, ndcg_share=0.5)}, "ubinary vectors are not offered by this bundle"),
    ):
        kinds = replace(measured, losses=measured.losses | losses)
        bundle = replace(mini._bundle, manifest=replace(mini.manifest, vectors=kinds))
        with monkeypatch.context() as patch:
            patch.setattr(mini, "_bundle", bundle)
            with pytest.raises(ConfigError, match=message):
                mini.encode(TEXTS, output_dtype=message.split()[0])
            assert mini.encode(TEXTS, output_dtype="float16").dtype == np.float16
    monkeypatch.setattr(mini, "_bundle", replace(mini._bundle, manifest=replace(mini.manifest, vectors=None)))
    with pytest.raises(ConfigError, match=r"were not measured for this bundle .* check BUNDLE --measure-vectors"):
        mini.encode(TEXTS, output_dtype="int8")


def test_wrong_options_are_named(mini: Encoder) -> None:
    with pytest.raises(ConfigError, match="output_dtype is 'int4'; it can be 'float32', 'float16', 'int8'"):
        mini.encode(TEXTS, output_dtype="int4")
    with pytest.raises(ConfigError, match="unit length; omit normalize=False"):
        mini.encode(TEXTS, output_dtype="int8", normalize=False)


def test_the_embedded_model_meets_the_bounds(mini: Encoder) -> None:
    losses = mini.manifest.vectors.losses
    for name, bound in BOUNDS.items():
        assert losses[name].overlap >= bound.overlap
        assert losses[name].ndcg_share >= bound.ndcg_share
    assert losses["int8"].overlap >= 0.99


def test_check_measures_on_its_machine(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest.from_bytes((bundle / MANIFEST).read_bytes())
    assert manifest.vectors is not None  # the export measured it
    (bundle / MANIFEST).write_bytes(replace(manifest, vectors=None).to_bytes())
    assert check([str(bundle), "--device", "cpu", "--measure-vectors"]) == 0
    assert "int8: " in capsys.readouterr().err
    measured = json.loads((bundle / MANIFEST).read_text())["vectors"]
    assert measured["losses"].keys() == manifest.vectors.losses.keys()
    assert measured["int8_step"] == pytest.approx(manifest.vectors.int8_step, rel=1e-3)
    Encoder(bundle, device="cpu").encode("a")  # the manifest's own hash is right


def test_faiss_and_usearch_take_them(mini: Encoder) -> None:
    """Run where they are installed; the project itself needs neither."""
    faiss = pytest.importorskip("faiss")
    usearch = pytest.importorskip("usearch.index")
    bits, int8 = (mini.encode(TEXTS, output_dtype=dtype) for dtype in ("ubinary", "int8"))
    index = faiss.IndexBinaryFlat(mini.dimension)
    index.add(bits)
    distances, _ = index.search(bits, len(TEXTS))
    np.testing.assert_array_equal(distances, -search(bits, bits, top_k=len(TEXTS))[1])
    neighbours = usearch.Index(ndim=mini.dimension, metric="ip", dtype="i8")
    neighbours.add(np.arange(len(TEXTS)), int8)
    found = neighbours.search(int8, 2, exact=True).keys
    np.testing.assert_array_equal(found, search(int8, int8, top_k=2)[0])


def test_the_block_of_the_page_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "vectors.md").read_text(encoding="utf-8")
    [block] = [body for language, body in BLOCK.findall(page) if language == "python"]
    exec(block, {})
    assert capsys.readouterr().out == "Salt lowers the freezing point of water.\n"
