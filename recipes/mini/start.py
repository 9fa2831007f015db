"""A base for contrastive training that starts from a teacher's layers: its tokenizer, its sizes, its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import staged_folder, switch_in
from nvembed_deploy.training.teacher import Teacher
from recipes.mini.bert_states import bert_of
from recipes.mini.pieces import teacher_pieces
from recipes.mini.tokenizer import piece_tokenizer
from recipes.mini.transplant import BOS_ID, EOS_ID, Transplant, transplant

CALIBRATION_TEXTS, TEXT_TOKENS = 4000, 256
"""Most texts that weights are solved for on, and most tokens of one."""
POSITION_HEADS = 2
"""More heads than the teacher's: the first layer's tell places."""
ROPE_THETA = 1e12
"""So high that most rotary pairs hardly turn within a text."""
MOST_POSITIONS = 4096


def make_base(
    out: Path, teacher: Teacher, texts: Sequence[str], *, vocab_size: int, neurons: int | None = None
) -> Transplant:
    """Makes a base for contrastive training that starts from a teacher's layers: tokenizer, sizes and weights.

    Args:
        out: Folder to make, a Mistral in Hugging Face layout; its head for the next token is left out.
        teacher: A BERT with GELU; best one that pools its tokens' mean, as the agreement tells of means.
        texts: Real text of the kind that will be embedded. All of it chooses the vocabulary, the weights are solved
            for on the first `CALIBRATION_TEXTS`, or fewer where they have more than `CALIBRATION_TOKENS`.
        vocab_size: Tokens, of which the text picks the teacher's pieces.
        neurons: Of each feed-forward block; by default as many as the teacher has. Of fewer, those that matter most.

    Raises:
        ConfigError: The teacher is no such BERT, a size does not fit, or the texts are too few.
    """
    stated = bert_of(teacher).config
    neurons = stated.intermediate_size if neurons is None else neurons
    if not 1 <= neurons <= stated.intermediate_size:
        raise ConfigError(f"--neurons is {neurons}; it must be from 1 to {stated.intermediate_size}, the teacher's")
    tokenizer_json = piece_tokenizer(teacher_pieces(teacher, texts), vocab_size=vocab_size).to_str()
    heads = stated.num_attention_heads + POSITION_HEADS
    config: dict[str, Any] = {
        "_name_or_path": out.name,
        "architectures": ["MistralModel"],
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "head_dim": stated.hidden_size // stated.num_attention_heads,
        "hidden_act": "silu",
        "hidden_size": stated.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": neurons,
        "max_position_embeddings": MOST_POSITIONS,
        "model_type": "mistral",
        "num_attention_heads": heads,
        "num_hidden_layers": stated.num_hidden_layers,
        "num_key_value_heads": heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": ROPE_THETA,
        "sliding_window": MOST_POSITIONS,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": vocab_size,
    }
    found = transplant(
        teacher,
        texts[:CALIBRATION_TEXTS],
        config=config,
        tokenizer_json=tokenizer_json,
        max_length=min(TEXT_TOKENS, stated.max_position_embeddings),
    )
    with staged_folder(out) as staged:
        (staged / "model.safetensors").write_bytes(save(found.weights))
        (staged / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        switch_in(staged, out)
    return found
