"""The mini model's sizes, its starting weights, and its folder in NVIDIA's layout."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from nvembed_deploy.atomic import staged_folder, switch_in
from nvembed_deploy.config import ModelConfig
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.text import TextContract
from nvembed_deploy.training.tokenizer import BOS, EOS, UNK

NAME = "nv-embed-mini"
LONGEST_TRAINED = 512
INIT_STD = 0.02
RESIDUAL_SCALE = 0.1
"""Projections back into the residual stream start small, so that the model starts as a bag of the token vectors."""
_RESIDUAL = re.compile(r"(o_proj|down_proj|to_out|fn\.net\.2)\.weight$")


def mini_config(*, vocab_size: int = 16000) -> dict[str, Any]:
    """The mini's `config.json`: NVIDIA's fields, smaller numbers."""
    text = {
        "_name_or_path": NAME,
        "architectures": ["MistralModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 384,
        "initializer_range": INIT_STD,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "model_type": "bidir_mistral",
        "num_attention_heads": 6,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": False,
        "vocab_size": vocab_size,
    }
    return {
        "_name_or_path": NAME,
        "add_eos": True,
        "add_pad_token": True,
        "architectures": ["NVEmbedModel"],
        "hidden_size": 384,
        "is_mask_instruction": True,
        "latent_attention_config": {
            "model_type": "latent_attention",
            "num_latents_value": 64,
            "num_cross_heads": 8,
            "output_normalize": True,
            "hidden_dim": 384,
            "latent_dim": 384,
            "cross_dim_head": 64,
        },
        "mask_type": "b",
        "model_type": "nvembed",
        "padding_side": "right",
        "text_config": text,
        "torch_dtype": "float16",
    }


def contract(config: ModelConfig) -> TextContract:
    """How the mini's ids and masks are made: `<s>` text `</s>`, padded with `</s>`, as NVIDIA's."""
    return TextContract(
        prefix_ids=(1,), suffix_ids=(2,), pad_id=2, mask_prompt=config.mask_instruction, max_tokens=config.max_positions
    )


def new_student(config: ModelConfig, *, seed: int, token_vectors: Tensor | None = None) -> NVEmbed:
    """A model to be trained.

    Args:
        config: Sizes.
        seed: Of the random weights.
        token_vectors: [V, D] starting values of the token embeddings; rows of zeros stay random.

    Raises:
        ConfigError: The token vectors have another shape than the embeddings.
    """
    model = NVEmbed(config)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("norm.weight") or "norm" in name.split(".")[-2] else 0.0)
                if name.endswith("bias"):
                    parameter.zero_()
                continue
            parameter.normal_(0.0, INIT_STD, generator=source)
            if _RESIDUAL.search(name):
                parameter.mul_(RESIDUAL_SCALE)
            if name.endswith("embed_tokens.weight"):
                parameter.div_(INIT_STD)  # entries of size 1, as `token_start` makes them
        if token_vectors is not None:
            table = model.embedding_model.embed_tokens.weight
            if token_vectors.shape != table.shape:
                raise ConfigError(f"token vectors are {list(token_vectors.shape)}, embeddings {list(table.shape)}")
            known = token_vectors.abs().sum(dim=-1) > 0
            table[known] = token_vectors[known].to(table.dtype)
    return model


def token_start(vectors: Tensor, strings: Sequence[str]) -> Tensor:
    """Starting values of token embeddings: a teacher's vectors of the token strings, centred; 0 without a string.

    They are scaled to entries of size 1. At the teacher's own scale (unit rows) the first steps of training throw the
    start away: behind the first norm, gradients grow as the embeddings shrink.
    """
    known = torch.tensor([bool(string) for string in strings])
    start = vectors.float() - vectors.float()[known].mean(dim=0)
    start = start / start[known].pow(2).mean().sqrt()
    return torch.where(known[:, None], start, torch.zeros(()))


def write_checkpoint(out: Path, model: NVEmbed, *, config: dict[str, Any], tokenizer_json: str, card: str = "") -> Path:
    """Writes the checkpoint folder whole: FP16 weights in one file, tokenizer, and sentence-transformers' files.

    Args:
        out: Destination; what stands there is replaced in one step, its README.md kept unless `card` is given.
        model: Trained.
        config: As from `mini_config`.
        tokenizer_json: Content of `tokenizer.json`.
        card: Content of `README.md`.

    Returns:
        The destination.

    Raises:
        ConfigError: A weight is not finite in FP16.
    """
    tensors = {name: tensor.detach().to("cpu", torch.float16) for name, tensor in model.state_dict().items()}
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ConfigError(f"{broken[0]} holds values that FP16 cannot hold; lower --learning-rate and train again")
    old_card = out / "README.md"
    if not card and old_card.is_file():
        card = old_card.read_text(encoding="utf-8")
    with staged_folder(out) as folder:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
        (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        for name, content in _small_files(config).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
        switch_in(folder, out)
    return out


def _small_files(config: dict[str, Any]) -> dict[str, Any]:
    width = config["hidden_size"]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    modules = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    return {
        "config.json": config,
        "tokenizer_config.json": {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(number): {"content": token, **flags, "special": True}
                for number, token in enumerate((UNK, BOS, EOS))
            },
            "bos_token": BOS,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "legacy": True,
            "model_max_length": config["text_config"]["max_position_embeddings"],
            "pad_token": EOS,
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": UNK,
        },
        "special_tokens_map.json": {
            name: {"content": token, **flags}
            for name, token in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", EOS), ("unk_token", UNK))
        },
        "modules.json": [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for place, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": LONGEST_TRAINED, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_weightedmean_tokens": False,
            "pooling_mode_lasttoken": False,
            "include_prompt": False,
        },
    }


def parse_tokenizer_file(path: Path) -> Tokenizer:
    """Reads a `tokenizer.json`.

    Raises:
        ConfigError: It is no tokenizer.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as err:  # tokenizers raises bare Exception
        raise ConfigError(f"{path} is no tokenizer ({err}); delete it and start again") from err
