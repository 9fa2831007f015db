"""Tiny checkpoints of transformers' own classes, their vectors by transformers, and ours."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.config import Pooling
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.model.sentence_transformers_files import StatedPooling
from nvembed_deploy.model.text_contract import text_contract
from tests.tiny import make_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed: make test installs it")

TOLERANCE = 5e-6
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {
    "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 256,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaModel"], "rope_theta": 500000.0, "is_causal": False},
    "llama linear": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "llama yarn": {
        "model_type": "llama", "architectures": ["LlamaModel"], "is_causal": True,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4, "original_max_position_embeddings": 512,
        },
    },
    "mistral": {
        "model_type": "mistral", "architectures": ["MistralModel"], "is_causal": False, "sliding_window": 7,
        "rope_theta": 10000.0,
    },
    "ministral3": {
        "model_type": "ministral3", "architectures": ["Ministral3Model"], "is_causal": False, "rope_parameters": YARN,
        "sliding_window": None,
    },
    "qwen2": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000000.0,
        "use_sliding_window": False,
    },
    "qwen3": {
        "model_type": "qwen3", "architectures": ["Qwen3Model"], "rope_theta": 1000000.0, "is_causal": False,
        "sliding_window": 5, "use_sliding_window": True, "attention_bias": False,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen3 causal": {
        "model_type": "qwen3", "architectures": ["Qwen3Model"], "rope_theta": 1000000.0, "sliding_window": 5,
        "use_sliding_window": True, "max_window_layers": 2,
    },
}  # fmt: skip
ANY = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 1000, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
SETTINGS = "sentence_bert_config.json"
PROMPTS = "config_sentence_transformers.json"
TOKENS = "tokenizer_config.json"
POOLINGS = {"llama": "mean", "mistral": "mean", "ministral3": "mean", "qwen3": "mean"}
TEXTS = ("the water over the passage", "a", "question in the question and on the query over and over " * 3)
STATED_MEAN = StatedPooling(modes=frozenset({"mean"}), include_prompt=True, path="1_Pooling/config.json")
STATED_LAST = StatedPooling(modes=frozenset({"lasttoken"}), include_prompt=True, path="1_Pooling/config.json")


def make_checkpoint(name: str, folder: Path) -> Path:
    """Makes a tiny random checkpoint of one of transformers' classes, with its sentence-transformers files."""
    folder.mkdir(parents=True)
    config = {**SIZES, "vocab_size": make_tokenizer().get_vocab_size(), **CONFIGS[name]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(make_tokenizer().to_str())
    write_pooling(folder, POOLINGS.get(name, "lasttoken"))
    torch.manual_seed(3)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.12)
    save_file({key: value.numpy() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def write_pooling(folder: Path, mode: str, where: str = "1_Pooling", **settings: object) -> None:
    """Writes the sentence-transformers files of a pooling."""
    modules = [("Transformer", ""), ("Pooling", where), ("Normalize", "2_Normalize")]
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": index, "name": str(index), "type": f"sentence_transformers.models.{kind}", "path": path}
                for index, (kind, path) in enumerate(modules)
            ]
        )
    )
    (folder / where).mkdir(exist_ok=True)
    (folder / where / "config.json").write_text(json.dumps({"pooling_mode": mode, **settings}))


def batch_of(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns right-padded ids and their mask, by the tokenizer's own rules."""
    rows = [tokens.ids for tokens in transformers_tokenizer(folder).encode_batch(list(TEXTS))]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


def transformers_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@torch.no_grad()
def transformers_vectors(folder: Path) -> np.ndarray:
    """Embeds the texts with the class that transformers loads from the folder, and the pooling of its files."""
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ids, attended = batch_of(folder)
    states = model(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state
    settings = json.loads((folder / "1_Pooling" / "config.json").read_text())
    if settings.get("pooling_mode") == "lasttoken" or settings.get("pooling_mode_lasttoken"):
        pooled = states[torch.arange(len(ids)), attended.sum(dim=1) - 1]
    else:
        pooled = (states * attended[..., None]).sum(dim=1) / attended.sum(dim=1, keepdim=True)
    return torch.nn.functional.normalize(pooled, dim=-1).numpy()


@torch.no_grad()
def our_vectors(folder: Path) -> np.ndarray:
    """Embeds the same ids with the reference."""
    config = read_checkpoint_architecture(folder)
    text_contract(folder, config)
    ids, attended = batch_of(folder)
    pooled = attended.clone()
    if config.pooling is Pooling.LAST:
        pooled = torch.zeros_like(attended)
        pooled[torch.arange(len(ids)), attended.sum(dim=1) - 1] = 1
    return load_checkpoint(folder)(ids, attended, pooled)[0].numpy()


def remove_pooling(folder: Path) -> None:
    """Removes the files that state the pooling."""
    shutil.rmtree(folder / "1_Pooling")
    (folder / "modules.json").unlink()
