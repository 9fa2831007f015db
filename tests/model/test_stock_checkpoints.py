"""Checkpoints of transformers' own classes: the same vectors as transformers', in the reference and in the graph."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nvembed_deploy import Encoder
from nvembed_deploy.engines import show
from nvembed_deploy.errors import CheckpointError, ConfigError
from nvembed_deploy.export.to_onnx import main as to_onnx
from nvembed_deploy.model.config import Mask, Pooling, UserStatement
from nvembed_deploy.model.config_json import read_architecture, read_checkpoint_architecture
from nvembed_deploy.model.sentence_transformers_files import StatedPooling, StatedPrompts
from nvembed_deploy.model.text_contract import text_contract
from nvembed_deploy.tokenization import TextEncoder
from tests.model.stock import (
    ANY,
    CONFIGS,
    POOLINGS,
    SETTINGS,
    SIZES,
    STATED_LAST,
    STATED_MEAN,
    TEXTS,
    TOKENS,
    TOLERANCE,
    YARN,
    our_vectors,
    remove_pooling,
    transformers_vectors,
    write_pooling,
)

pytest.importorskip("transformers", reason="transformers is not installed: make test installs it")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_equals_transformers(checkpoints: Callable[[str], Path], name: str) -> None:
    assert np.abs(our_vectors(checkpoints(name)) - transformers_vectors(checkpoints(name))).max() <= TOLERANCE


@pytest.mark.parametrize("name", ["ministral3", "qwen3", *[pytest.param(name, marks=pytest.mark.slow) for name in (
    "llama", "llama linear", "llama yarn", "mistral", "qwen2", "qwen3 causal",
)]])  # fmt: skip
def test_the_exported_graph_equals_transformers(checkpoints: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    folder = checkpoints(name)
    flags = ["--model", str(folder), "--precision", "fp32", "--max", "4x256", "--out", str(tmp_path / "bundle")]
    assert to_onnx(flags) == 0
    vectors = Encoder(tmp_path / "bundle", device="cpu", backend="onnxruntime").encode(list(TEXTS))
    assert np.abs(vectors - transformers_vectors(folder)).max() <= TOLERANCE


def config_of(model_type: str, architecture: str, **fields: object) -> dict[str, Any]:
    return {**ANY, "model_type": model_type, "architectures": [architecture], **fields}


@pytest.mark.parametrize(
    ("config", "pooling", "family", "mask"),
    [
        (config_of("ministral3", "Ministral3Model", is_causal=False), STATED_MEAN, "Ministral3", "bidirectional"),
        (config_of("qwen2", "Qwen2ForCausalLM"), STATED_LAST, "Qwen2", "causal"),
        (config_of("qwen3", "Qwen3Model", is_causal=False), STATED_MEAN, "Qwen3", "bidirectional"),
        (config_of("qwen3", "Qwen3ForCausalLM"), STATED_LAST, "Qwen3", "causal"),
        (config_of("mistral", "MistralModel", vocab_size=32000), STATED_LAST, "e5-mistral", "causal"),
        (config_of("mistral", "MistralModel", vocab_size=32003), STATED_LAST, "Mistral", "causal"),
        (config_of("llama", "LlamaModel", is_causal=False, pooling="avg"), None, "Llama", "bidirectional"),
    ],
)
def test_what_states_itself_is_served(
    config: dict[str, Any], pooling: StatedPooling | None, family: str, mask: str
) -> None:
    model = read_architecture(config, pooling=pooling)
    assert (model.family, model.mask.value) == (family, mask)


def test_prompts_decide_who_is_a_relative_of_a_published_model() -> None:
    """The template of instructions is known from a family, or read off the prompts, and otherwise there is none."""
    config = {**ANY, "model_type": "qwen3", "architectures": ["Qwen3Model"]}

    def family(*prompts: str) -> tuple[str, str | None]:
        stated = StatedPrompts(prompts=dict(zip("abc", prompts, strict=False)), default_prompt_name=None, path="x")
        return read_architecture(config, pooling=STATED_LAST, prompts=stated).family, stated.template

    assert family() == ("Qwen3", None)  # as sentence-transformers, which then adds no prompt to a query
    assert family("Instruct: find\nQuery:", "") == ("Qwen3-Embedding", "Instruct: {instruction}\nQuery:")
    assert family("Instruct: find\nQuery: ") == ("Qwen3", "Instruct: {instruction}\nQuery: ")
    assert family("query: ", "document: ") == ("Qwen3", "")


def test_a_prompt_that_is_stated_by_hand_changes_no_family() -> None:
    """Or e5-mistral would lose the EOS that its tokenizer.json forgets."""
    config = config_of("mistral", "MistralModel", vocab_size=32000)
    statement = UserStatement(document_prompt="passage: ")
    assert read_architecture(config, pooling=STATED_LAST, statement=statement).family == "e5-mistral"


def test_the_pooling_is_read_where_modules_json_says(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "moved")
    shutil.rmtree(folder / "1_Pooling")
    write_pooling(folder, "lasttoken", where="2_Pooling")
    assert read_checkpoint_architecture(folder).pooling is Pooling.LAST


def test_a_prompt_that_is_not_pooled(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """sentence-transformers leaves out the tokens of the prompt and the BOS before them."""
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "masked")
    write_pooling(folder, "mean", include_prompt=False)
    contract = text_contract(folder, read_checkpoint_architecture(folder))
    assert (contract.mask_prompt, contract.exclude_prefix_from_pooling) == (True, True)


@pytest.mark.parametrize(
    ("prompts", "default", "query", "document"),
    [
        ({"retrieval": "find: ", "sts": "compare: "}, "sts", "", ""),
        ({"query": "query: ", "passage": "text: "}, "query", "query: ", "text: "),
        ({"retrieval": "find: "}, None, "", ""),
    ],
)
def test_a_default_prompt_is_none_for_queries_and_documents(
    checkpoints: Callable[[str], Path],
    prompts: dict[str, str],
    default: str | None,
    query: str,
    document: str,
    tmp_path: Path,
) -> None:
    """sentence-transformers takes `default_prompt_name` in `encode` only, not in `encode_query`."""
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "prompts")
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": prompts, "default_prompt_name": default})
    )
    contract = text_contract(folder, read_checkpoint_architecture(folder))
    encoder = TextEncoder((folder / "tokenizer.json").read_bytes(), contract)
    assert encoder.prompt(None, None) == prompts.get(str(default), "")
    assert [encoder.prompts(None)[name] for name in ("query", "document")] == [query, document]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({SETTINGS: {"max_seq_length": 9}, TOKENS: {"model_max_length": 5}}, 9),
        ({SETTINGS: {"max_seq_length": None}, TOKENS: {"model_max_length": 11}}, 11),
        ({TOKENS: {"model_max_length": 10**30}}, SIZES["max_position_embeddings"]),
    ],
)
def test_longer_texts_are_cut_where_sentence_transformers_cuts_them(
    checkpoints: Callable[[str], Path], limits: dict[str, dict[str, object]], expected: int, tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "short")
    write_pooling(folder, "mean", embedding_dimension=32)
    (folder / "2_Normalize").mkdir()
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<unk>"}
    for name, fields in {TOKENS: {}, **limits}.items():
        (folder / name).write_text(json.dumps({**(tokenizer if name == TOKENS else {}), **fields}))
    contract = text_contract(folder, read_checkpoint_architecture(folder))
    assert contract.max_tokens == expected
    text = TextEncoder((folder / "tokenizer.json").read_bytes(), contract)
    rows = text.tokenize([*TEXTS, TEXTS[0] * 400], max_length=contract.max_tokens)
    assert max(map(len, rows)) == expected
    model = library.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
    ids = model.preprocess([*TEXTS, TEXTS[0] * 400])["input_ids"]
    assert ids.tolist() == text.pad(rows).input_ids.tolist()


def test_what_no_file_states_can_be_stated_by_hand(
    checkpoints: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(checkpoints("qwen2"), tmp_path / "silent")
    expected = transformers_vectors(folder)
    remove_pooling(folder)
    assert to_onnx(["--model", str(folder), "--out", str(tmp_path / "b")]) == 1
    assert "pass --pooling mean or --pooling last" in capsys.readouterr().err
    stated = ["--pooling", "last", "--query-prompt", "ask {instruction}: ", "--document-prompt", "text: "]
    flags = ["--model", str(folder), "--precision", "fp32", "--max", "4x256", "--out", str(tmp_path / "b"), *stated]
    assert to_onnx(flags) == 0
    encoder = Encoder(tmp_path / "b", device="cpu", backend="onnxruntime")
    assert np.abs(encoder.encode(list(TEXTS), prompt="") - expected).max() <= TOLERANCE
    assert encoder.query_prompt("what") == "ask what: "
    assert (encoder.encode("water") == encoder.encode("water", prompt="text: ")).all()
    reference = Encoder.from_checkpoint(folder, like=encoder)  # which the files alone would refuse
    assert np.abs(reference.encode(list(TEXTS), prompt="") - expected).max() <= TOLERANCE
    assert show.main([str(tmp_path / "b")]) == 0
    assert "stated by hand, not by the checkpoint: pooling, query prompt, document prompt" in capsys.readouterr().out


def test_statements_that_contradict_the_files_are_refused(checkpoints: Callable[[str], Path]) -> None:
    folder = checkpoints("llama")
    with pytest.raises(ConfigError, match=r"--mask is causal, but the mask is bidirectional according to is_causal"):
        read_checkpoint_architecture(folder, UserStatement(mask=Mask.CAUSAL))
    with pytest.raises(CheckpointError, match=r"the pooling is mean according to .* and last according to --pooling"):
        read_checkpoint_architecture(folder, UserStatement(pooling=Pooling.LAST))
    assert read_checkpoint_architecture(folder, UserStatement(mask=Mask.BIDIRECTIONAL)).stated_by_user == ("mask",)


def test_longer_texts_than_the_query_scale_allows_are_cut(checkpoints: Callable[[str], Path]) -> None:
    config = read_checkpoint_architecture(checkpoints("ministral3"))
    assert config.max_positions == YARN["original_max_position_embeddings"]


def test_show_says_where_each_property_was_read(
    checkpoints: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints("ministral3")
    assert show.main([str(folder)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["mask"] == "bidirectional: is_causal in config.json"
    assert lines["pooling"] == "mean: 1_Pooling/config.json"
    assert lines["rope"] == "base 1e+06, yarn x 16: rope_parameters in config.json"
    assert lines["window"] == "none: config.json"
    assert lines["tokens"] == "[1] text []: tokenizer.json"
    assert lines["prompts"] == "none: no file states any"
    assert lines["length"].startswith("256 tokens, beyond which queries grow")


@pytest.mark.parametrize(
    ("name", "prompts", "settings"),
    [
        ("ministral3", {"query": "query: ", "document": "passage: "}, {}),
        ("llama yarn", {"query": "Instruct: find it\nQuery: "}, {}),
        ("llama", {"query": "the question: "}, {"include_prompt": False}),
    ],
)
def test_sentence_transformers_agrees(
    checkpoints: Callable[[str], Path], name: str, prompts: dict[str, str], settings: dict[str, object], tmp_path: Path
) -> None:
    """The whole way from texts to vectors, with and without a prompt.

    For qwen2 and qwen3 transformers 5 replaces a `tokenizer.json` that is not Qwen's, as the tests' is not.
    """
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    folder = shutil.copytree(checkpoints(name), tmp_path / "model")
    write_pooling(folder, POOLINGS.get(name, "lasttoken"), **{"embedding_dimension": 32, **settings})
    (folder / "2_Normalize").mkdir()
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256, "do_lower_case": False}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<unk>", "model_max_length": 256})
    )
    model = library.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
    flags = ["--model", str(folder), "--precision", "fp32", "--max", "4x256", "--out", str(tmp_path / "bundle")]
    assert to_onnx(flags) == 0
    encoder = Encoder(tmp_path / "bundle", device="cpu", backend="onnxruntime")
    texts = [text for text in TEXTS if len(text) > 1 or not settings]  # a prompt's last space and "a" are one token
    for prompt_name in (None, *prompts):
        expected = model.encode(texts, prompt_name=prompt_name)
        vectors = encoder.encode(texts, prompt_name=prompt_name)
        assert np.abs(vectors - expected).max() <= TOLERANCE, prompt_name
