"""A bundle in sentence-transformers: the vectors of `Encoder`, in every way of its own library."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nvembed_deploy import Encoder
from nvembed_deploy.bundle.manifest import MODULES, SETTINGS
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.errors import BundleError, ConfigError, InputError
from nvembed_deploy.export.to_onnx import main as to_onnx
from tests.conformance import TEXTS
from tests.conftest import ROOT

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed: make test installs it")

import torch
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer import evaluation

from nvembed_deploy.integrations.sentence_transformers import BundleModule, load

MINI = ROOT / "models" / "nv-embed-mini"
QUERIES = ["why do cats purr?", "how is water boiled", "undo a commit in git", "who wrote the origin of species"]
PASSAGES = [
    "Cats purr when they are content, and to calm themselves.",
    "Water is heated in a kettle until it boils at a hundred degrees.",
    "git reset --soft HEAD~1 takes back the last commit.",
    "Charles Darwin published On the Origin of Species in 1859.",
    "The train leaves at nine in the morning.",
    "Bread is baked from flour, water, salt and yeast.",
]


@pytest.fixture(scope="module")
def model(bundles: dict[str, Path]) -> SentenceTransformer:
    """The bundle of the fixture `encoder`."""
    return load(bundles["fp32"], device="cpu")


@pytest.fixture(scope="module")
def mini() -> SentenceTransformer:
    return load(MINI, device="cpu")


@pytest.fixture(scope="module")
def mini_encoder() -> Encoder:
    return Encoder(MINI, device="cpu")


def close(actual: Any, expected: Any) -> None:
    """Batches are composed otherwise, which changes the last bits of a sum."""
    np.testing.assert_allclose(np.asarray(actual), expected, atol=2e-6)


def test_vectors_are_those_of_the_encoder(model: SentenceTransformer, encoder: Encoder) -> None:
    assert isinstance(model, SentenceTransformer)
    close(model.encode(TEXTS), encoder.encode(TEXTS))
    close(model.encode_query(TEXTS), encoder.encode_query(TEXTS))
    close(model.encode_document(TEXTS), encoder.encode_document(TEXTS))
    prompt = encoder.query_prompt("Find the passage")
    close(model.encode(TEXTS, prompt=prompt), encoder.encode(TEXTS, instruction="Find the passage"))
    close(model.encode(TEXTS, prompt_name="query"), encoder.encode_query(TEXTS))
    close(model.encode(TEXTS[0]), encoder.encode(TEXTS[0]))
    assert np.abs(model.encode_query(TEXTS) - model.encode(TEXTS)).max() > 0.01


def test_an_instruction_is_not_pooled(mini: SentenceTransformer, mini_encoder: Encoder) -> None:
    """Its text before the query's, as sentence-transformers would put it, gives other vectors."""
    prompt = mini.prompts["query"]
    close(mini.encode(QUERIES, prompt=prompt), mini_encoder.encode_query(QUERIES))
    pooled = mini.encode([prompt + query for query in QUERIES])
    assert np.abs(mini.encode_query(QUERIES) - pooled).max() > 0.01


def test_the_folder_itself_loads_with_the_flag_and_not_without(bundles: dict[str, Path], encoder: Encoder) -> None:
    folder = str(bundles["fp32"])
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(folder)
    model = SentenceTransformer(folder, trust_remote_code=True, model_kwargs={"device": "cpu"})
    assert (model.prompts, model.default_prompt_name) == (encoder.prompts, None)
    assert model.similarity_fn_name == encoder.similarity_fn_name == "cosine"
    close(model.encode(TEXTS), encoder.encode(TEXTS))
    close(model.encode_query(TEXTS), encoder.encode_query(TEXTS))
    assert not [path.name for path in Path(folder).iterdir() if path.suffix == ".py"]


def test_options_of_another_kind_of_model_are_refused(bundles: dict[str, Path]) -> None:
    folder = str(bundles["fp32"])
    for options in (
        {"model_kwargs": {"torch_dtype": "float16"}},
        {"model_kwargs": {"query_instruction": "x"}},
        {"processor_kwargs": {"padding_side": "left"}},
        {"config_kwargs": {"use_cache": False}},
    ):
        with pytest.raises(ConfigError, match="is not an option of a bundle; model_kwargs can have"):
            SentenceTransformer(folder, trust_remote_code=True, **options)
    model = SentenceTransformer(folder, trust_remote_code=True, backend="onnx", model_kwargs={"device": "cpu"})
    assert model[0].encoder.backend.startswith("onnxruntime")


def test_the_embedded_model_is_one_too(mini: SentenceTransformer, mini_encoder: Encoder) -> None:
    model = SentenceTransformer(str(MINI), trust_remote_code=True)
    close(model.encode_query(QUERIES), mini_encoder.encode_query(QUERIES))
    close(mini.encode_document(PASSAGES), mini_encoder.encode_document(PASSAGES))


def test_the_files_state_the_bundles_prompts(checkpoint: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    settings = json.loads((bundles["fp16"] / SETTINGS).read_bytes())
    query = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "
    assert settings == {
        "prompts": {"query": query, "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    (module,) = json.loads((bundles["fp16"] / MODULES).read_bytes())
    assert module["type"] == f"{BundleModule.__module__}.{BundleModule.__qualname__}"
    assert module["path"] == ""
    flags = ["--model", str(checkpoint), "--precision", "fp32", "--no-parity", "--out", str(tmp_path / "out")]
    assert to_onnx([*flags, "--query-prompt", "ask: ", "--document-prompt", "text: "]) == 0
    settings = json.loads((tmp_path / "out" / SETTINGS).read_bytes())
    assert settings["prompts"] == {"query": "ask: ", "document": "text: "}
    model, encoder = load(tmp_path / "out", device="cpu"), Encoder(tmp_path / "out", device="cpu")
    close(model.encode_query(TEXTS), encoder.encode(TEXTS, prompt="ask: "))
    close(model.encode_document(TEXTS), encoder.encode(TEXTS, prompt="text: "))
    close(model.encode(TEXTS), encoder.encode(TEXTS))


def test_what_a_model_says_of_itself(model: SentenceTransformer, encoder: Encoder) -> None:
    assert model.get_embedding_dimension() == encoder.dimension
    assert model.max_seq_length == encoder.max_length
    assert model.device == torch.device("cpu")
    assert model.modalities == ["text"]
    assert str(encoder.bundle.folder) in repr(model)
    assert model.tokenizer.encode("the water", add_special_tokens=False).ids
    assert list(model.parameters()) == []


def test_max_seq_length_truncates(bundles: dict[str, Path], encoder: Encoder) -> None:
    model = load(bundles["fp32"], device="cpu")
    model.max_seq_length = 8
    close(model.encode(TEXTS), encoder.encode(TEXTS, max_length=8))
    close(model.encode(TEXTS, truncate="start"), encoder.encode(TEXTS, max_length=8, truncate="start"))
    with pytest.raises(InputError, match=r"^text '.*' is longer than max_length=8 tokens"):
        model.encode(TEXTS, truncate=False)
    for value in (0, True, "8", 10**9):
        with pytest.raises(ConfigError, match=r"max_seq_length is .*; pass a whole number from 1 to 2048"):
            model.max_seq_length = value
    assert pickle.loads(pickle.dumps(model)).max_seq_length == 8


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", 3], "a bundle embeds texts, and 3 is a int; pass a str"),
        (["a", None], "None is a NoneType"),
        ([("a", "b"), ("c", "d")], "is a tuple"),
        ([{"text": "a"}], "is a dict"),
        (b"a", "is a bytes"),
        (["fine", "half \ud800 of it"], r"^text 'half .* contains half a surrogate pair"),
    ],
)
@pytest.mark.parametrize("prompt", [None, "query: "])
def test_other_inputs_are_refused(model: SentenceTransformer, texts: Any, message: str, prompt: str | None) -> None:
    with pytest.raises(InputError, match=message) as caught:
        model.encode(texts, prompt=prompt)
    assert "\n" not in str(caught.value)


def test_images_are_refused_by_sentence_transformers(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="Modality 'image' is not supported"):
        model.encode([np.zeros((4, 4, 3), dtype=np.uint8)])


def test_forms_of_the_output(model: SentenceTransformer, encoder: Encoder) -> None:
    expected = encoder.encode(TEXTS)
    tensor = model.encode(TEXTS, convert_to_tensor=True)
    assert (tensor.dtype, tensor.device.type) == (torch.float32, "cpu")
    close(tensor, expected)
    close(torch.stack(model.encode(TEXTS, convert_to_numpy=False)), expected)
    close(model.encode(TEXTS, normalize_embeddings=True), expected)
    close(model.encode(TEXTS, truncate_dim=16), expected[:, :16])
    close(
        model.encode(TEXTS, truncate_dim=16, normalize_embeddings=True),
        expected[:, :16] / np.linalg.norm(expected[:, :16], axis=1, keepdims=True),
    )
    close([output["sentence_embedding"] for output in model.encode(TEXTS, output_value=None)], expected)
    assert model.encode(TEXTS, precision="int8").dtype == np.int8
    assert model.encode(TEXTS, precision="ubinary").shape == (len(TEXTS), encoder.dimension // 8)
    assert model.encode([]).shape == (0,)
    assert model.encode([], convert_to_tensor=True).shape == (0,)
    with pytest.raises(ConfigError, match="one vector per text and no token_embeddings"):
        model.encode(TEXTS, output_value="token_embeddings")
    with pytest.raises(ConfigError, match="takes no processing_kwargs"):
        model.encode(TEXTS, processing_kwargs={"text": {"max_length": 4}})
    with pytest.raises(InputError, match="what its preprocess returns, not input_ids"):
        model({"input_ids": torch.zeros(1, 4)})


def test_tensors_follow_the_model_to_another_device(bundles: dict[str, Path]) -> None:
    """PyTorch's `meta` stands for a GPU."""
    model = load(bundles["fp32"], device="cpu").to("meta")
    assert model.device == torch.device("meta")
    assert model(model.preprocess(TEXTS))["sentence_embedding"].device == torch.device("meta")


def test_more_texts_per_batch_than_the_engine_takes(model: SentenceTransformer, encoder: Encoder) -> None:
    texts = [f"{text} {number}" for number in range(8) for text in TEXTS]
    assert len(texts) > encoder.manifest.profile.max.batch
    close(model.encode(texts, batch_size=1000), encoder.encode(texts))
    close(model.encode(texts, batch_size=1), encoder.encode(texts))


def test_training_is_refused(model: SentenceTransformer) -> None:
    with pytest.raises(ConfigError, match="no parameters to train; train its checkpoint and export it again"):
        model.train()
    assert not model.eval().training


class Direct:
    """Cosines of the encoder's vectors, by which the evaluators' numbers are checked."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def pairs(self, a: list[str], b: list[str]) -> np.ndarray:
        return self.encoder.similarity_pairwise(self.encoder.encode(a), self.encoder.encode(b))

    def search(self, queries: list[str], documents: list[str]) -> np.ndarray:
        return self.encoder.similarity(self.encoder.encode_query(queries), self.encoder.encode_document(documents))


@pytest.fixture(scope="module")
def direct(mini_encoder: Encoder) -> Direct:
    return Direct(mini_encoder)


def test_evaluator_of_similarity(mini: SentenceTransformer, direct: Direct) -> None:
    from scipy.stats import pearsonr, spearmanr

    a, b = QUERIES + QUERIES, PASSAGES[:4] + PASSAGES[2:]
    scores = [1.0, 0.9, 0.8, 1.0, 0.2, 0.1, 0.0, 0.3]
    result = evaluation.EmbeddingSimilarityEvaluator(a, b, scores, write_csv=False)(mini)
    assert result["spearman_cosine"] == pytest.approx(spearmanr(scores, direct.pairs(a, b))[0])
    assert result["pearson_cosine"] == pytest.approx(pearsonr(scores, direct.pairs(a, b))[0], abs=1e-5)


def test_evaluator_of_retrieval(mini: SentenceTransformer, direct: Direct) -> None:
    queries, corpus = dict(enumerate(QUERIES)), dict(enumerate(PASSAGES))
    relevant = {0: {4}, 1: {1}, 2: {2}, 3: {5}}  # two of them are wrong, so that no rank is trivial
    result = evaluation.InformationRetrievalEvaluator(
        {str(index): query for index, query in queries.items()},
        {str(index): passage for index, passage in corpus.items()},
        {str(index): {str(hit) for hit in hits} for index, hits in relevant.items()},
        mrr_at_k=[6], ndcg_at_k=[6], accuracy_at_k=[1], precision_recall_at_k=[1], map_at_k=[6], write_csv=False,
    )(mini)  # fmt: skip
    order = np.argsort(-direct.search(QUERIES, PASSAGES), axis=1)
    ranks = np.array([list(order[index]).index(*relevant[index]) + 1 for index in queries])
    assert len(set(ranks)) > 1
    assert result["cosine_mrr@6"] == pytest.approx((1 / ranks).mean())
    assert result["cosine_ndcg@6"] == pytest.approx((1 / np.log2(ranks + 1)).mean())
    assert result["cosine_accuracy@1"] == pytest.approx((ranks == 1).mean())


def test_evaluator_of_triplets(mini: SentenceTransformer, direct: Direct) -> None:
    positives, negatives = PASSAGES[:3] + PASSAGES[4:5], PASSAGES[1:4] + PASSAGES[3:4]
    result = evaluation.TripletEvaluator(QUERIES, positives, negatives, write_csv=False)(mini)
    expected = (direct.pairs(QUERIES, positives) > direct.pairs(QUERIES, negatives)).mean()
    assert result["cosine_accuracy"] == pytest.approx(expected)
    assert 0 < expected < 1


def test_evaluator_of_binary_classification(mini: SentenceTransformer, direct: Direct) -> None:
    from sklearn.metrics import average_precision_score

    a, b, labels = QUERIES + QUERIES, PASSAGES[:4] + PASSAGES[2:], [1, 1, 1, 1, 0, 0, 1, 0]
    result = evaluation.BinaryClassificationEvaluator(a, b, labels, write_csv=False)(mini)
    cosines = direct.pairs(a, b)
    assert result["cosine_ap"] == pytest.approx(average_precision_score(labels, cosines))
    accuracies = [((cosines >= threshold) == labels).mean() for threshold in cosines]
    assert result["cosine_accuracy"] == pytest.approx(max(accuracies))


def test_evaluator_of_reranking(mini: SentenceTransformer, direct: Direct) -> None:
    samples = [
        {"query": query, "positive": [PASSAGES[(index + 1) % 6]], "negative": [PASSAGES[index], PASSAGES[5 - index]]}
        for index, query in enumerate(QUERIES[:2])
    ]
    result = evaluation.RerankingEvaluator(samples, at_k=3, write_csv=False)(mini)
    ranks = []
    for sample in samples:
        cosines = direct.search([sample["query"]], sample["positive"] + sample["negative"])[0]
        ranks.append(1 + (cosines[1:] > cosines[0]).sum())
    assert result["map"] == pytest.approx(np.mean(1 / np.array(ranks)))
    assert result["mrr@3"] == pytest.approx(np.mean(1 / np.array(ranks)))


def test_evaluator_of_paraphrase_mining(mini: SentenceTransformer, direct: Direct) -> None:
    from sklearn.metrics import average_precision_score

    texts = [*QUERIES, *PASSAGES[:4]]
    duplicates = [(str(index), str(index + 4)) for index in range(4)]
    result = evaluation.ParaphraseMiningEvaluator(
        {str(index): text for index, text in enumerate(texts)}, duplicates, write_csv=False
    )(mini)
    vectors = direct.encoder.encode(texts)
    pairs = [(i, j) for i in range(len(texts)) for j in range(i + 1, len(texts))]
    cosines = [float(vectors[i] @ vectors[j]) for i, j in pairs]
    assert result["average_precision"] == pytest.approx(
        average_precision_score([j == i + 4 for i, j in pairs], cosines), abs=1e-6
    )


def test_evaluator_of_translation(mini: SentenceTransformer, direct: Direct) -> None:
    targets = [PASSAGES[1], PASSAGES[0], PASSAGES[2], PASSAGES[3]]
    result = evaluation.TranslationEvaluator(QUERIES, targets, write_csv=False)(mini)
    cosines = direct.encoder.similarity(direct.encoder.encode(QUERIES), direct.encoder.encode(targets))
    assert result["src2trg_accuracy"] == pytest.approx((cosines.argmax(axis=1) == np.arange(4)).mean())
    assert result["trg2src_accuracy"] == pytest.approx((cosines.argmax(axis=0) == np.arange(4)).mean())
    assert result["src2trg_accuracy"] < 1


def test_search_and_mining(mini: SentenceTransformer, direct: Direct) -> None:
    hits = util.semantic_search(mini.encode_query(QUERIES), mini.encode_document(PASSAGES), top_k=3)
    cosines = direct.search(QUERIES, PASSAGES)
    assert [[hit["corpus_id"] for hit in row] for row in hits] == np.argsort(-cosines, axis=1)[:, :3].tolist()
    close([[hit["score"] for hit in row] for row in hits], -np.sort(-cosines, axis=1)[:, :3])
    pairs = util.paraphrase_mining(mini, [*PASSAGES, "Cats purr if they are content."])
    assert {pairs[0][1], pairs[0][2]} == {0, 6}


def test_mteb_takes_the_model(mini: SentenceTransformer, mini_encoder: Encoder) -> None:
    mteb = pytest.importorskip("mteb", reason="mteb is not installed: make test installs it")
    import datasets
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from mteb.types import PromptType
    from torch.utils.data import DataLoader

    metadata = mteb.get_task("STS12").metadata
    batches = DataLoader(datasets.Dataset.from_dict({"text": QUERIES}), batch_size=2)
    wrapper = SentenceTransformerEncoderWrapper(mini)
    vectors = wrapper.encode(
        batches, task_metadata=metadata, hf_split="test", hf_subset="default", prompt_type=PromptType.query
    )
    close(vectors, mini_encoder.encode_query(QUERIES))


def test_a_saved_model_is_the_bundle_again(model: SentenceTransformer, encoder: Encoder, tmp_path: Path) -> None:
    out = tmp_path / "saved"
    model.save(str(out))
    assert Bundle.open(out).manifest.files == encoder.manifest.files
    close(load(out, device="cpu").encode_query(TEXTS), encoder.encode_query(TEXTS))
    close(SentenceTransformer(str(out), trust_remote_code=True).encode(TEXTS), encoder.encode(TEXTS))
    load(out, device="cpu").save(str(out.with_name("again")))
    assert Bundle.open(out.with_name("again")).manifest == encoder.manifest


def test_changed_prompts_are_saved(bundles: dict[str, Path], encoder: Encoder, tmp_path: Path) -> None:
    model = load(bundles["fp32"], device="cpu", query_instruction="Find the passage")
    close(model.encode_query(TEXTS), encoder.encode(TEXTS, instruction="Find the passage"))
    model.prompts["code"] = "code: "
    model.default_prompt_name = "code"
    model.save(str(tmp_path / "saved"), create_model_card=False)
    for saved in (
        load(tmp_path / "saved", device="cpu"),
        SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True),
    ):
        assert (saved.prompts, saved.default_prompt_name) == (model.prompts, "code")
    assert Encoder(tmp_path / "saved", device="cpu").prompts == model.prompts


def test_saving_into_the_own_folder_is_refused(bundle: Path) -> None:
    model = load(bundle, device="cpu")
    with pytest.raises(ConfigError, match="is the folder of the open bundle; save to another one"):
        model.save(str(bundle))
    Bundle.open(bundle)
    shutil.copy(bundle / "tokenizer.json", bundle / "model.onnx")
    with pytest.raises(BundleError, match="changed since it was opened"):
        model.save(str(bundle.with_name("other")))


def test_a_model_with_further_modules_is_saved(bundles: dict[str, Path], encoder: Encoder, tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Normalize

    modules = [BundleModule(Encoder(bundles["fp32"], device="cpu")), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "saved"), create_model_card=False)
    saved = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True)
    assert len(saved) == 2
    close(saved.encode(TEXTS), encoder.encode(TEXTS))


def test_a_pickled_model_opens_the_bundle_again(model: SentenceTransformer, encoder: Encoder) -> None:
    close(pickle.loads(pickle.dumps(model)).encode(TEXTS), encoder.encode(TEXTS))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "pool.py"
    path.write_text(
        "import json, sys\n"
        "import numpy as np\n"
        "from nvembed_deploy.integrations.sentence_transformers import load\n"
        "if __name__ == '__main__':\n"
        "    texts = json.loads(sys.argv[2])\n"
        "    model = load(sys.argv[1], device='cpu', threads=1)\n"
        "    vectors = model.encode_query(texts, device=['cpu', 'cpu'], chunk_size=4)\n"
        "    np.testing.assert_allclose(vectors, model.encode_query(texts), atol=2e-6)\n"
        "    print(vectors.shape)\n"
    )
    return path


@pytest.mark.slow
def test_a_pool_of_processes(bundles: dict[str, Path], encoder: Encoder, script: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script), str(bundles["fp32"]), json.dumps(TEXTS)],
        env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str((len(TEXTS), encoder.dimension))


def test_without_the_library_the_error_names_the_cure() -> None:
    code = (
        "import sys\n"
        "import nvembed_deploy\n"
        "assert 'sentence_transformers' not in sys.modules\n"
        "sys.modules['sentence_transformers'] = None\n"
        "from nvembed_deploy.errors import MissingExtra\n"
        "try:\n"
        "    import nvembed_deploy.integrations.sentence_transformers\n"
        "except MissingExtra as err:\n"
        "    print(err)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "install it: pip install -e" in done.stdout
    assert "[sentence-transformers]'" in done.stdout
