"""Checkpoints that contradict themselves, or state what is not computed here, are refused in a sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as torch_save_file
from tokenizers.processors import TemplateProcessing

from nvembed_deploy.errors import CheckpointError
from nvembed_deploy.model.config_json import read_architecture, read_checkpoint_architecture
from nvembed_deploy.model.text_contract import text_contract
from tests.model.stock import ANY, PROMPTS, SETTINGS, SIZES, TOKENS, our_vectors, remove_pooling, write_pooling
from tests.tiny import make_tokenizer

pytest.importorskip("transformers", reason="transformers is not installed: make test installs it")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma2", "architectures": ["Gemma2Model"]}, "is not a supported embedding model"),
        ({"model_type": "gemma3_text", "architectures": ["Gemma3TextModel"]}, "is not a supported embedding model"),
        ({"model_type": "modernbert", "architectures": ["ModernBertModel"]}, "is not a supported embedding model"),
        ({"model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"]}, "is not a supported embedding model"),
        ({"model_type": "nvretriever", "architectures": ["NVRetrieverModel"]}, "is not a supported embedding model"),
        (
            {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "text_config": {}},
            "vision-language layout",
        ),
        ({}, "architectures is None"),
        ({"model_type": "mistral", "architectures": None}, "architectures is None"),
        ({"model_type": "mistral", "architectures": "MistralModel"}, "architectures is 'MistralModel'"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "pooling of this .* is not stated"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "pooling of this .* is not stated"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "pooling of this .* is not stated"),
        ({"model_type": "qwen2", "architectures": ["Qwen2Model"]}, "pooling of this .* is not stated"),
        (
            {"model_type": "qwen2", "architectures": ["Qwen2Model"], "auto_map": {"AutoModel": "modeling_qwen.Q"}},
            "pooling of this .* is not stated",
        ),
        ({"model_type": "mistral", "architectures": ["MistralModel"], "vocab_size": 32003}, "is not stated"),
        (
            {"model_type": "llama", "architectures": ["LlamaBiModel"], "auto_map": {"AutoModel": "m.LlamaEncoder"}},
            "is not a supported embedding model",
        ),
        (
            {"model_type": "qwen3", "architectures": ["Qwen3Model"], "auto_map": {"AutoModel": "m.BidirectionalQ"}},
            "auto_map names 'm.BidirectionalQ'",
        ),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForSequenceClassification"]}, "a classifier returns scores"),
        (
            {"model_type": "llama_bidirec", "architectures": ["LlamaBidirectionalForSequenceClassification"]},
            "a classifier returns scores",
        ),
        (
            {"model_type": "llama_bidirec", "architectures": ["LlamaBidirectionalModel"], "hidden_size": 3072},
            "the prompts of a LlamaBidirectionalModel of hidden size 3072 are not known",
        ),
    ],
)
def test_what_does_not_state_itself_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_architecture({**ANY, **config})


def damage_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def damage_index(folder: Path) -> None:
    (folder / "old.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    from safetensors import safe_open

    with safe_open(folder / "old.safetensors", framework="np") as shard:
        keys = list(shard.keys())
    weight_map = dict.fromkeys(keys, "old.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def damage_pooling_path(folder: Path) -> None:
    write_pooling(folder, "lasttoken", where="9_Pooling")  # and 1_Pooling still says mean


def damage_missing_pooling(folder: Path) -> None:
    shutil.rmtree(folder / "1_Pooling")


def damage_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch_save_file({**weights, "model.head.weight": torch.zeros(2)}, folder / "model.safetensors")


def damage_eos(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"add_eos_token": true}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_adapter, r"has an unmerged adapter .* merge it first: python -c .*merge_and_unload"),
        (damage_index, "has both model.safetensors and model.safetensors.index.json"),
        (damage_pooling_path, "has pooling lasttoken and .*1_Pooling.config.json mean"),
        (damage_missing_pooling, "1_Pooling.config.json"),
        (remove_pooling, "the pooling of this LlamaModel is not stated"),
        (damage_head, "has unexpected head.weight; its weights do not match"),
        (damage_eos, "tokenizer_config.json says add_eos_token"),
    ],
)
def test_folders_that_contradict_themselves_are_refused(
    checkpoints: Callable[[str], Path], damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "damaged")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        our_vectors(folder)


CHAT = {"method": "forward", "method_output_name": "last_hidden_state", "format": "flat"}


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (SETTINGS, {"do_lower_case": True}, "do_lower_case is True"),
        (
            "sentence_roberta_config.json",
            {"do_lower_case": True},
            "sentence_roberta_config.json: do_lower_case is True",
        ),
        (SETTINGS, {"max_seq_length": "64"}, "'max_seq_length' must be an integer"),
        (SETTINGS, {"max_seq_length": 0}, "max_seq_length in .* is 0"),
        (SETTINGS, {"config_args": {"sliding_window": 3}}, "config_args has sliding_window"),
        (SETTINGS, {"tokenizer_args": {"truncation_side": "left"}}, "tokenizer_args has truncation_side"),
        (SETTINGS, {"model_kwargs": []}, r"model_kwargs has \[\]"),
        (SETTINGS, {"processing_kwargs": {"text": {"add_special_tokens": False}}}, "processing_kwargs is"),
        (SETTINGS, {"transformer_task": "text-generation"}, "transformer_task is 'text-generation'"),
        (SETTINGS, {"modality_config": {"message": CHAT}}, "modality_config is"),
        (SETTINGS, {"new": 1}, "'new' is not a known setting"),
        (PROMPTS, {"model_type": "SparseEncoder"}, "model_type is 'SparseEncoder'"),
        (PROMPTS, {"truncate_dim": 16}, "truncate_dim is 16"),
        (PROMPTS, {"prompts": {}, "default_prompt_name": []}, r"default_prompt_name is \[\]"),
        (
            "1_Pooling/config.json",
            {"pooling_mode": "mean", "include_prompt": 0},
            "'include_prompt' must be true or fal",
        ),
        ("1_Pooling/config.json", {"pooling_mode": None}, "has pooling None"),
    ],
)
def test_what_sentence_transformers_would_compute_otherwise_is_refused(
    checkpoints: Callable[[str], Path], file: str, fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "other")
    (folder / file).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=message):
        text_contract(folder, read_checkpoint_architecture(folder))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("my_code.Pooling", "names 'my_code.Pooling', which is not a class of sentence-transformers"),
        ("sentence_transformers.models.CLIPModel", "begins with CLIPModel"),
    ],
)
def test_modules_of_other_code_are_refused(
    checkpoints: Callable[[str], Path], kind: str, message: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "other")
    (folder / "modules.json").write_text(json.dumps([{"type": kind, "path": ""}]))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint_architecture(folder)


def test_settings_that_change_no_vector_are_accepted(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """What sentence-transformers 6 writes, and the arguments that older checkpoints pass on."""
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "st6")
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "module_output_name": "token_embeddings",
        "unpad_inputs": None,
        "model_args": {"torch_dtype": "bfloat16", "attn_implementation": "sdpa"},
        "tokenizer_args": {"padding_side": "left"},
    }
    (folder / SETTINGS).write_text(json.dumps(settings))
    (folder / PROMPTS).write_text(json.dumps({"model_type": "SentenceTransformer", "prompts": {}}))
    assert text_contract(folder, read_checkpoint_architecture(folder)).max_tokens == SIZES["max_position_embeddings"]


LEFT = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
WATER = {"content": "water", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (TOKENS, {"truncation_side": "left"}, "tokenizer_config.json truncates longer texts on the left"),
        ("tokenizer.json", {"truncation": LEFT}, "tokenizer.json truncates longer texts on the left"),
        (TOKENS, {"split_special_tokens": True}, "split_special_tokens is True"),
        (TOKENS, {"auto_map": {"AutoTokenizer": ["tokens.Own", None]}}, "auto_map names"),
        (TOKENS, {"added_tokens_decoder": {"290": WATER}}, "adds the token 'water'"),
        (TOKENS, {"additional_special_tokens": ["the"]}, "adds the token 'the'"),
        ("added_tokens.json", {"over": 290}, "adds the token 'over'"),
        (TOKENS, {"model_max_length": "512"}, "'model_max_length' must be a number"),
    ],
)
def test_files_that_change_what_the_tokenizer_states_are_refused(
    checkpoints: Callable[[str], Path], file: str, fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "other")
    path = folder / file
    stated = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**stated, **fields}))
    with pytest.raises(CheckpointError, match=message):
        text_contract(folder, read_checkpoint_architecture(folder))


@pytest.mark.parametrize(
    ("flags", "prompt", "is_served"),
    [
        ({}, "the </s> ask: ", True),
        ({"lstrip": True}, "the </s> ask: ", True),
        ({"rstrip": True}, "ask: ", True),
        ({"rstrip": True}, "the </s> ask: ", False),
        ({"single_word": True}, "</s>", False),
    ],
)
def test_special_tokens_of_a_prompt_that_change_the_text_are_refused(
    checkpoints: Callable[[str], Path], flags: dict[str, bool], prompt: str, is_served: bool, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "prompted")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token.update(flags if token["content"] == "</s>" else {})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / PROMPTS).write_text(json.dumps({"prompts": {"query": prompt}}))
    config = read_checkpoint_architecture(folder)
    if is_served:
        assert text_contract(folder, config).prompts == {"query": prompt}
    else:
        with pytest.raises(CheckpointError, match=r"a special token in the prompt .* changes the tokens"):
            text_contract(folder, config)


def test_two_tokens_after_a_text_whose_prompt_is_not_pooled_are_refused(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "two")
    tokenizer = make_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s> </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert text_contract(folder, read_checkpoint_architecture(folder)).suffix_ids == (2, 2)
    write_pooling(folder, "mean", include_prompt=False)
    with pytest.raises(CheckpointError, match="adds 2 tokens after a text"):
        text_contract(folder, read_checkpoint_architecture(folder))
