"""Writes a trained model as a checkpoint folder in NVIDIA's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import move_into_place, staged_folder

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
"""Mistral's control tokens, ids 0, 1 and 2."""


def write_checkpoint(
    out: Path,
    weights: Mapping[str, Tensor],
    *,
    config: dict[str, Any],
    tokenizer_json: str,
    max_length: int,
    card: str = "",
) -> Path:
    """Writes a complete checkpoint folder: FP16 weights in one file, tokenizer, and sentence-transformers' files.

    Args:
        out: Destination; an existing folder is replaced in one step, its README.md is kept unless `card` is given.
        weights: The trained weights under NVIDIA's names.
        config: Content of `config.json`, as from `student.nvembed_config`.
        tokenizer_json: Content of `tokenizer.json`.
        max_length: Maximum number of tokens of a text in training.
        card: Content of `README.md`.

    Returns:
        The destination.

    Raises:
        ConfigError: A weight is not finite in FP16.
    """
    tensors = {name: tensor.detach().to("cpu", torch.float16) for name, tensor in weights.items()}
    non_finite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if non_finite:
        raise ConfigError(
            f"{non_finite[0]} has values outside the range of FP16; lower --learning-rate and train again"
        )
    old_card = out / "README.md"
    if not card and old_card.is_file():
        card = old_card.read_text(encoding="utf-8")
    with staged_folder(out) as folder:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        (folder / "model.safetensors").chmod(0o644)  # safetensors makes the file readable by its owner only
        (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        for name, content in _small_files(config, max_length).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
        move_into_place(folder, out)
    return out


def _small_files(config: dict[str, Any], max_length: int) -> dict[str, Any]:
    hidden_size = config["hidden_size"]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    modules = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    return {
        "config.json": config,
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(token_id): {"content": token, **flags, "special": True}
                for token_id, token in enumerate((UNK, BOS, EOS))
            },
            "bos_token": BOS,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "model_max_length": config["text_config"]["max_position_embeddings"],
            "pad_token": EOS,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": UNK,
        },
        "special_tokens_map.json": {
            name: {"content": token, **flags}
            for name, token in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", EOS), ("unk_token", UNK))
        },
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": hidden_size,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_weightedmean_tokens": False,
            "pooling_mode_lasttoken": False,
            "include_prompt": False,
        },
    }
