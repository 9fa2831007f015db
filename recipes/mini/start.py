"""Makes a base for contrastive training that starts from a teacher's layers: tokenizer, sizes and folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import move_into_place, staged_folder
from recipes.mini.bert_states import bert_of
from recipes.mini.pieces import teacher_pieces
from recipes.mini.teacher import Teacher
from recipes.mini.tokenizer import piece_tokenizer
from recipes.mini.transplant import BOS_ID, EOS_ID, Transplant, transplant

CALIBRATION_TEXTS, CALIBRATION_TEXT_TOKENS = 4000, 256
"""Maximum number of texts that weights are solved for on, and maximum number of tokens of a text."""
POSITION_HEADS = 2
"""Heads in addition to the teacher's; in the first layer they encode positions."""
ROPE_THETA = 1e12
"""High enough that most rotary pairs hardly rotate within a text."""
MAX_POSITIONS = 4096


def make_base(
    out: Path, teacher: Teacher, texts: Sequence[str], *, vocab_size: int, neurons: int | None = None
) -> Transplant:
    """Makes a base for contrastive training that starts from a teacher's layers: tokenizer, sizes and weights.

    Args:
        out: Folder to create, a Mistral in Hugging Face layout without the language model's head.
        teacher: A BERT with GELU, preferably with mean pooling, since the agreement compares means.
        texts: Real text of the kind that will be embedded. The vocabulary is chosen on all of it; the weights are
            solved for on the first `CALIBRATION_TEXTS`, or fewer if they have more than `CALIBRATION_TOKENS`.
        vocab_size: Number of tokens; the teacher's pieces among them are chosen on the texts.
        neurons: Neurons of each feed-forward block; by default as many as the teacher has. Fewer keep the most
            important ones.

    Returns:
        The weights, and how well they agree with the teacher.

    Raises:
        ConfigError: The teacher is not such a BERT, a size does not fit, or the texts are too few.
    """
    bert_config = bert_of(teacher).config
    neurons = bert_config.intermediate_size if neurons is None else neurons
    if not 1 <= neurons <= bert_config.intermediate_size:
        raise ConfigError(
            f"--neurons must be from 1 to {bert_config.intermediate_size}, the teacher's number; got {neurons}"
        )
    tokenizer_json = piece_tokenizer(teacher_pieces(teacher, texts), vocab_size=vocab_size).to_str()
    heads = bert_config.num_attention_heads + POSITION_HEADS
    config: dict[str, Any] = {
        "_name_or_path": out.name,
        "architectures": ["MistralModel"],
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "head_dim": bert_config.hidden_size // bert_config.num_attention_heads,
        "hidden_act": "silu",
        "hidden_size": bert_config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": neurons,
        "max_position_embeddings": MAX_POSITIONS,
        "model_type": "mistral",
        "num_attention_heads": heads,
        "num_hidden_layers": bert_config.num_hidden_layers,
        "num_key_value_heads": heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": ROPE_THETA,
        "sliding_window": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": vocab_size,
    }
    transplanted = transplant(
        teacher,
        texts[:CALIBRATION_TEXTS],
        config=config,
        tokenizer_json=tokenizer_json,
        max_length=min(CALIBRATION_TEXT_TOKENS, bert_config.max_position_embeddings),
    )
    with staged_folder(out) as staging:
        (staging / "model.safetensors").write_bytes(save(transplanted.weights))
        (staging / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        move_into_place(staging, out)
    return transplanted
