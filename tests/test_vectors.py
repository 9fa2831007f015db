"""Smaller number formats of vectors: conversion, search and rescoring, and which of them a bundle offers."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy import ConfigError, Encoder, InputError
from nvembed_deploy.bundle.manifest import MANIFEST, Manifest
from nvembed_deploy.bundle.vector_kinds import BOUNDS, VectorLoss
from nvembed_deploy.engines.check import main as check
from nvembed_deploy.parity.vector_kinds import overlap
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
    uint8 = convert(vectors, OutputDtype.UINT8, int8_step=step)
    np.testing.assert_array_equal(uint8.astype(int) - 128, int8)
    ubinary = convert(vectors, OutputDtype.UBINARY)
    np.testing.assert_array_equal(np.unpackbits(ubinary, axis=1), vectors > 0)
    np.testing.assert_array_equal(convert(vectors, OutputDtype.BINARY).astype(int) + 128, ubinary)


def test_int8_keeps_the_length(vectors: np.ndarray) -> None:
    """Each component is one of its two integers, and the length is nearer than by rounding each by itself."""
    step = float(np.abs(vectors).max()) / INT8_MAX
    scaled = vectors / np.float32(step)
    int8 = convert(vectors, OutputDtype.INT8, int8_step=step)
    assert ((int8 == np.floor(scaled)) | (int8 == np.ceil(scaled))).all()

    def excess(rounded: np.ndarray) -> np.ndarray:
        return np.abs(np.linalg.norm(rounded.astype(np.float64), axis=1) * step - 1)

    plain, kept = excess(np.rint(scaled)), excess(int8)
    assert (kept <= plain).all()
    assert kept.mean() < plain.mean() / 4
    other_way = int8 != np.rint(scaled)
    assert 0 < other_way.mean() < 0.2
    assert np.abs(int8 - scaled)[other_way].mean() < 0.6  # those next to the middle


def test_int8_of_clipped_zero_and_long_vectors(vectors: np.ndarray) -> None:
    clipped = convert(vectors, OutputDtype.INT8, int8_step=0.001)
    assert np.abs(clipped.astype(int)).max() == INT8_MAX
    np.testing.assert_array_equal(convert(np.zeros((2, 64), np.float32), OutputDtype.INT8, int8_step=0.001), 0)
    one_row, no_rows = vectors[0], vectors[:0]
    np.testing.assert_array_equal(convert(one_row, OutputDtype.INT8, int8_step=0.001), clipped[0])
    assert convert(no_rows, OutputDtype.INT8, int8_step=0.001).shape == (0, 64)


@pytest.mark.parametrize("width", [24, 384, 4096])
def test_int8_is_the_same_alone_in_any_layout_and_of_any_float(width: int) -> None:
    rows = np.random.default_rng(0).standard_normal((40, width)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    step = fit_int8_step(rows) * 2  # nothing is clipped
    together = convert(rows, OutputDtype.INT8, int8_step=step)
    np.testing.assert_array_equal(np.stack([convert(row, OutputDtype.INT8, int8_step=step) for row in rows]), together)
    for same in (np.asfortranarray(rows), np.repeat(rows, 2, axis=1)[:, ::2], rows.astype(np.float64), rows.tolist()):
        np.testing.assert_array_equal(convert(same, OutputDtype.INT8, int8_step=step), together)
    lengths = np.linalg.norm(together.astype(np.float64), axis=1) * step
    if width == 4096:  # most need more than 128 components
        assert np.abs(lengths - 1).max() < 3e-5
    assert np.array_equal(convert(np.eye(1, 1, dtype=np.float32), OutputDtype.INT8, int8_step=1 / INT8_MAX), [[127]])


def test_what_has_no_smaller_format_is_refused(vectors: np.ndarray) -> None:
    for value in (np.nan, np.inf):
        broken = vectors.copy()
        broken[3, 4] = value
        for dtype in ("int8", "ubinary"):
            with pytest.raises(InputError, match=f"a component is not finite, and {dtype} has no such value"):
                convert(broken, OutputDtype(dtype), int8_step=0.01)
    broken[3, 4] = np.nan
    with pytest.raises(InputError, match="a product is not a number"):
        search(vectors, broken, top_k=1)
    for step in (None, 0.0, -0.1, np.nan):
        with pytest.raises(ConfigError, match=f"the step of int8 vectors is {step}; pass the one"):
            convert(vectors, OutputDtype.INT8, int8_step=step)


def test_searches_that_mean_nothing_are_refused(vectors: np.ndarray) -> None:
    int8, uint8 = (convert(vectors, OutputDtype(dtype), int8_step=0.003) for dtype in ("int8", "uint8"))
    candidates = np.tile(np.arange(5), (3, 1))
    for top_k in (0, -1, 2.0, True):
        for call in (partial(search, int8[:3], int8), partial(rescore, int8[:3], candidates, int8)):
            with pytest.raises(ConfigError, match=f"top_k is {top_k}; pass a whole number of at least 1"):
                call(top_k=top_k)
    for queries, documents in ((int8[0], int8), (int8[:3, :8], int8), (int8[:3].astype(int), int8), (uint8[:3], int8)):
        with pytest.raises(ConfigError, match=r"pass \[Q, D\] and \[N, D\]|queries are (int64|uint8)[ ;]"):
            search(queries, documents, top_k=1)
        with pytest.raises(ConfigError):  # the products of uint8 say nothing about the texts
            rescore(queries, candidates[: len(queries)], documents, top_k=1)
    for wrong in (candidates[:2], candidates[0], candidates.astype(float), candidates + 500, candidates - 2):
        with pytest.raises(InputError, match="the candidates "):
            rescore(int8[:3], wrong, int8, top_k=1)


def test_rescoring_takes_what_indexes_return(vectors: np.ndarray) -> None:
    """faiss pads with -1 where it finds fewer, usearch's keys are unsigned, and queries may stay floats."""
    int8 = convert(vectors, OutputDtype.INT8, int8_step=0.003)
    candidates = np.array([[5, -1, 0], [-1, -1, -1], [7, 2, -1]])
    for queries in (int8[:3], vectors[:3]):
        indices, scores = rescore(queries, candidates, int8, top_k=9)
        expected = queries.astype(np.float64) @ int8.astype(np.float64).T
        np.testing.assert_array_equal(indices[:2], [[0, 5, -1], [-1, -1, -1]])
        assert set(indices[2]) == {7, 2, -1}
        np.testing.assert_allclose(scores[indices >= 0], np.take_along_axis(expected, indices, 1)[indices >= 0], 1e-5)
    assert rescore(int8[:1], np.array([[3, 0]], dtype=np.uint64), int8, top_k=1)[0].tolist() == [[0]]
    assert rescore(int8[:0], candidates[:0], int8, top_k=2)[0].shape == (0, 2)


def test_int8_ranks_close_cosines_better_than_plain_rounding() -> None:
    """The vectors of some models share a large part, so that their cosines lie close together."""
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((1050, 256)) + 2.5 * rng.standard_normal(256)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    step = fit_int8_step(rows[:50])
    queries, documents = rows[:50], rows[50:]
    exact = search(queries, documents, top_k=10)[0]
    plain = [np.clip(np.rint(part / step), -127, 127).astype(np.int8) for part in (queries, documents)]
    kept = [convert(part, OutputDtype.INT8, int8_step=step) for part in (queries, documents)]
    lost_plain, lost = (1 - overlap(exact, search(*pair, top_k=10)[0]) for pair in (plain, kept))
    assert lost < 0.7 * lost_plain


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
@pytest.mark.parametrize("cores", [1, 3])
def test_search_is_exact(vectors: np.ndarray, dtype: str, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several blocks on several threads, the last of each smaller.
    for name, value in (("BLOCK_VECTORS", 77), ("BLOCK_QUERIES", 7), ("BLOCK_FLOATS", 640)):
        monkeypatch.setattr(f"nvembed_deploy.vectors.{name}", value)
    monkeypatch.setattr("nvembed_deploy.vectors.usable_cores", lambda: cores)
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
        assert scores.dtype == np.int32
    np.testing.assert_array_equal(search(converted[:1], converted, top_k=12)[0], indices[:1])  # on all cores
    assert search(converted[:2], converted[:3], top_k=10)[0].shape == (2, 3)
    assert search(converted[:2], converted[:0], top_k=10)[0].shape == (2, 0)
    assert search(converted[:0], converted, top_k=10)[0].shape == (0, 10)


@pytest.mark.parametrize("width", [384, 1025, 4096, 140_000])
def test_products_of_int8_are_exact(width: int) -> None:
    """Also where float32 no longer has every integer: 4,096 products of the largest components are 66 million."""
    documents = np.random.default_rng(0).choice(np.array([-128, -127, 126, 127], dtype=np.int8), (60, width))
    documents[:3] = np.array([[-128], [127], [-127]])
    indices, scores = search(documents[:4], documents, top_k=60)
    expected = documents[:4].astype(np.int64) @ documents.astype(np.int64).T
    np.testing.assert_array_equal(scores, np.take_along_axis(expected, indices, axis=1))
    np.testing.assert_array_equal(indices, np.argsort(-expected, axis=1, kind="stable"))
    candidates = np.tile(np.arange(50), (4, 1))
    np.testing.assert_array_equal(
        rescore(documents[:4], candidates, documents, top_k=1)[1][:, 0], expected[:, :50].max(1)
    )


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
    with pytest.raises(ConfigError, match=r"pass \[Q, D\] and \[N, D\] of one format"):
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


@pytest.mark.parametrize("model", ["mini", "fp16"])
def test_a_text_alone_has_the_vector_it_has_in_a_batch(request: pytest.FixtureRequest, model: str) -> None:
    """No range comes from the batch; but engines round floats differently in other batches, which shows at borders."""
    if model == "mini":
        encoder = request.getfixturevalue("mini")
    else:
        encoder = Encoder(request.getfixturevalue("bundles")[model], device="cpu")
    step = encoder.manifest.vectors.int8_step
    texts = [*TEXTS, *(f"{word} on the road {word}" for word in ("salt", "ice", "the cat", "a commit"))]
    together = encoder.encode(texts)
    np.testing.assert_array_equal(together, encoder.encode(texts))  # the same batch: equal
    alone = np.stack([encoder.encode(text) for text in texts])
    int8_together, int8_alone = (
        convert(rows, OutputDtype.INT8, int8_step=step).astype(int) for rows in (together, alone)
    )
    differs = int8_together != int8_alone
    in_steps, alone_in_steps = together / np.float32(step), alone / np.float32(step)
    assert np.abs(int8_together - int8_alone).max() <= 1
    assert differs.mean() <= 2 * np.abs(in_steps - alone_in_steps).mean() + 3 / differs.size
    border = (np.maximum(int8_together, int8_alone) - 0.5)[differs]  # between the two floats, and nowhere else
    assert (np.minimum(in_steps, alone_in_steps)[differs] <= border).all()
    assert (border <= np.maximum(in_steps, alone_in_steps)[differs]).all()
    flipped = (together > 0) != (alone > 0)
    assert flipped.mean() <= 0.002 + 2 / flipped.size


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


def test_faiss_takes_bits_and_int8(mini: Encoder) -> None:
    faiss = pytest.importorskip("faiss", reason="not installed: pip install nvembed-deploy[dev]")
    bits, int8 = (mini.encode(TEXTS, output_dtype=dtype) for dtype in ("ubinary", "int8"))
    index = faiss.IndexBinaryFlat(mini.dimension)
    index.add(bits)
    distances, _ = index.search(bits, len(TEXTS))
    np.testing.assert_array_equal(distances, -search(bits, bits, top_k=len(TEXTS))[1])
    kind = faiss.ScalarQuantizer.QT_8bit_direct_signed
    scalar = faiss.IndexScalarQuantizer(mini.dimension, kind, faiss.METRIC_INNER_PRODUCT)
    scalar.add(int8.astype(np.float32))  # stored as they are, in a byte each
    assert scalar.sa_code_size() == mini.dimension
    products, keys = scalar.search(int8.astype(np.float32), len(TEXTS))
    np.testing.assert_array_equal(keys, search(int8, int8, top_k=len(TEXTS))[0])
    np.testing.assert_array_equal(products, search(int8, int8, top_k=len(TEXTS))[1])


def test_usearch_takes_bits_and_int8(mini: Encoder) -> None:
    usearch = pytest.importorskip("usearch.index", reason="not installed: pip install nvembed-deploy[dev]")
    bits, int8 = (mini.encode(TEXTS, output_dtype=dtype) for dtype in ("ubinary", "int8"))
    for vectors, options in ((int8, {"metric": "ip", "dtype": "i8"}), (bits, {"metric": "hamming", "dtype": "b1"})):
        index = usearch.Index(ndim=mini.dimension, **options)
        index.add(np.arange(len(TEXTS)), vectors)
        np.testing.assert_array_equal(index.get(0), vectors[0])
        matches = index.search(vectors, 2, exact=True)
        np.testing.assert_array_equal(matches.keys, search(vectors, vectors, top_k=2)[0])


@pytest.mark.parametrize(("dtype", "stored", "distance"), [("float16", "Float16", "Dot"), ("uint8", "Uint8", "Euclid")])
def test_qdrant_stores_them_as_they_are(mini: Encoder, tmp_path: Path, dtype: str, stored: str, distance: str) -> None:
    """In Qdrant's own engine. Distances of uint8 are those of int8; its products are not."""
    edge = pytest.importorskip("qdrant_edge", reason="not installed: pip install nvembed-deploy[qdrant]")
    vectors = mini.encode(TEXTS, output_dtype=dtype)
    parameters = edge.EdgeVectorParams(
        size=mini.dimension,
        distance=getattr(edge.Distance, distance),
        datatype=getattr(edge.VectorStorageDatatype, stored),
    )
    shard = edge.EdgeShard.create(str(tmp_path), edge.EdgeConfig(vectors=parameters, wal_enabled=False))
    points = [edge.Point(index, row.tolist(), {}) for index, row in enumerate(vectors.astype(float))]
    shard.update(edge.UpdateOperation.upsert_points(points))
    records = shard.retrieve(list(range(len(TEXTS))), with_payload=False, with_vector=True)
    np.testing.assert_array_equal([record.vector for record in sorted(records, key=lambda record: record.id)], vectors)
    floats = mini.encode(TEXTS)
    for row, query in enumerate(vectors.astype(float)):
        request = edge.QueryRequest(limit=len(TEXTS), query=edge.Query.Nearest(query.tolist()))
        ranking = [point.id for point in shard.query(request)]
        cosines = floats[ranking] @ floats[row]
        assert (np.diff(cosines) < 0.02).all()  # the order of cosines, but for rounding
    shard.close()


def test_the_block_of_the_page_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "vectors.md").read_text(encoding="utf-8")
    [block] = [body for language, body in BLOCK.findall(page) if language == "python"]
    exec(block, {})
    assert capsys.readouterr().out == "Salt lowers the freezing point of water.\n"
