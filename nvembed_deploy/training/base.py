"""A small base language model: a Mistral trained to tell the next token, with the causal mask on.

transformers' own model, loss and `Trainer`; ours is only how the text is packed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import MistralConfig, MistralForCausalLM, Trainer, default_data_collator

from nvembed_deploy.atomic import staged_folder, switch_in
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.training.loop import arguments, last_checkpoint
from nvembed_deploy.training.options import StageOptions

SIZES: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 384,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "mistral",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
"""Fields of `MistralConfig` for a base that a CPU can train; the vocabulary's size is missing."""
OPTIONS = StageOptions(
    in_batch=False,
    learning_rate=6e-4,
    weight_decay=0.01,
    warmup_steps=15,
    schedule="cosine",
    batch_tokens=4096,
    max_length=256,
    save_steps=100,
    seed=1,
)
TEXTS_AT_A_TIME = 1000


def pretrain(
    out: Path,
    texts: Iterable[str],
    *,
    config: dict[str, Any],
    tokenizer_json: str,
    folder: Path,
    options: StageOptions,
    tokens: int,
) -> list[dict[str, float]]:
    """Trains a base from random weights and writes its folder; resumed where it was killed.

    Args:
        out: Folder to make, in Hugging Face layout.
        texts: Plain text, in a fixed order.
        config: Fields of `MistralConfig`.
        tokenizer_json: Content of `tokenizer.json`.
        folder: Where checkpoints lie.
        options: Optimizer, length and rows of a batch; the losses are not used.
        tokens: How many to train on.

    Returns:
        The logged steps.

    Raises:
        ConfigError: The texts have fewer tokens than asked for.
    """
    torch.manual_seed(options.seed)
    model = MistralForCausalLM(MistralConfig(**config))
    data = packed(texts, Tokenizer.from_str(tokenizer_json), length=options.max_length, tokens=tokens)
    rows = max(1, options.batch_tokens // options.max_length)
    trainer = Trainer(
        model=model,
        args=arguments(folder, options, rows=rows),
        train_dataset=data,
        data_collator=default_data_collator,
    )
    last = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    with staged_folder(out) as staged:
        model.to(torch.float16).save_pretrained(staged)
        (staged / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        stated = json.loads((staged / "config.json").read_text(encoding="utf-8"))
        stated["_name_or_path"] = config.get("_name_or_path", out.name)
        (staged / "config.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
        switch_in(staged, out)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def packed(texts: Iterable[str], tokenizer: Tokenizer, *, length: int, tokens: int) -> Dataset:
    """Rows of exactly `length` ids: `<s>` text `</s>` one after the other.

    Raises:
        ConfigError: The texts have fewer tokens than asked for.
    """
    rows: list[list[int]] = []
    stream = _ids(texts, tokenizer)
    wanted = max(1, tokens // length)
    bar = tqdm(total=wanted, desc="packing text", unit="row", disable=None)
    row: list[int] = []
    for number in stream:
        row.append(number)
        if len(row) == length:
            rows.append(row)
            row = []
            bar.update()
            if len(rows) == wanted:
                break
    bar.close()
    if len(rows) < wanted:
        raise ConfigError(f"the texts have {len(rows) * length} tokens, fewer than {tokens}; add text or ask for fewer")
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def _ids(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[int]:
    end: int = tokenizer.encode("</s>", add_special_tokens=False).ids[0]
    batch: list[str] = []
    for text in chain(texts, [None]):
        if text is not None:
            batch.append(text)
        if batch and (text is None or len(batch) == TEXTS_AT_A_TIME):
            for encoding in tokenizer.encode_batch(batch):
                yield from encoding.ids
                yield end
            batch = []
