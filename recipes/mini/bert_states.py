"""States of a BERT on real text with a decoder's tokens; `transplant` solves for them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.tokenization import TokenBatch
from nvembed_deploy.training.checkpoint_folder import BOS, EOS
from recipes.mini.teacher import Teacher
from recipes.mini.tokenizer import SPACE, token_strings


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch of calibration text, float32."""

    ids: Tensor
    """int64 [R, T]."""
    real: Tensor
    """bool [R, T], True for real tokens."""
    states: list[Tensor]
    """The teacher's states [R, T, D], without mean and of unit size: the input of its first layer, then the states
    after each layer's attention and feed-forward block; gain and bias are not applied."""
    sizes: list[Tensor]
    """[R, T, 1], the size of each state before its norm."""


def calibration(bert: Any, rows: Tensor, batches: Iterable[TokenBatch]) -> Iterator[Batch]:
    """Runs the teacher on the decoder's tokens and yields its states.

    Args:
        bert: The teacher's model.
        rows: Embedding of each of the decoder's tokens in the teacher; see `token_rows`.
        batches: Right-padded batches.
    """
    for batch in tqdm(batches, desc="teacher's states", unit="batch", disable=None):
        ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
        normalized = [unit(state) for state in _norm_inputs(bert, rows[ids], mask)]
        states, sizes = [state for state, _ in normalized], [size for _, size in normalized]
        yield Batch(ids=ids, real=mask.bool(), states=states, sizes=sizes)


def bert_of(teacher: Teacher) -> Any:
    """Returns a copy of the teacher's `BertModel`, float32, on the CPU.

    Raises:
        ConfigError: The teacher is not a BERT, or its activation is not GELU.
    """
    bert = getattr(next(teacher.model.children()), "auto_model", None)
    if bert is None or bert.config.model_type != "bert":
        kind = "none" if bert is None else bert.config.model_type
        raise ConfigError(f"the teacher's model type is {kind}, but only a BERT can be the teacher")
    if bert.config.hidden_act != "gelu":
        raise ConfigError(f"the teacher's activation is {bert.config.hidden_act}, but only GELU is supported")
    return copy.deepcopy(bert).float().cpu()


def norms_of(bert: Any) -> list[Any]:
    """Returns the layer norms in the order in which data passes them."""
    blocks = (block for layer in bert.encoder.layer for block in (layer.attention.output, layer.output))
    return [bert.embeddings.LayerNorm, *(block.LayerNorm for block in blocks)]


@torch.no_grad()
def _norm_inputs(bert: Any, rows: Tensor, mask: Tensor) -> list[Tensor]:
    """Returns the input of each norm, [R, T, D]."""
    norm_inputs: list[Tensor] = []
    hooks = [norm.register_forward_pre_hook(lambda _, args: norm_inputs.append(args[0])) for norm in norms_of(bert)]
    bert(inputs_embeds=rows, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return norm_inputs


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows without their mean and of unit root mean square, and the root mean square that they had."""
    x = x - x.mean(dim=-1, keepdim=True)
    size = x.square().mean(dim=-1, keepdim=True).sqrt()
    return x / size.clamp_min(1e-9), size


@torch.no_grad()
def token_rows(tokenizer: Tokenizer, teacher: Teacher) -> Tensor:
    """Returns the teacher's embedding of each token, float32 [V, D].

    A token that the teacher splits into several pieces gets their mean; a token inside a word uses such pieces.
    Control tokens get the teacher's control tokens; a token that the teacher cannot spell gets its unknown token.
    """
    words = bert_of(teacher).embeddings.word_embeddings.weight
    teacher_tokenizer = teacher.tokenizer
    vocabulary = teacher_tokenizer.get_vocab()
    strings = token_strings(tokenizer)
    starts = [token.startswith(SPACE) for _, token in sorted((n, t) for t, n in tokenizer.get_vocab().items())]
    rows = words[teacher_tokenizer.unk_token_id].repeat(len(strings), 1)
    for token_id, (string, starts_word) in enumerate(zip(strings, starts, strict=True)):
        pieces = teacher_tokenizer.tokenize(string) if string else []
        if pieces and not starts_word and string.isalnum():
            if f"##{string}" in vocabulary:
                pieces = [f"##{string}"]
            elif f"##{pieces[0]}" in vocabulary:
                pieces[0] = f"##{pieces[0]}"
        if pieces:
            rows[token_id] = words[[vocabulary[piece] for piece in pieces]].mean(dim=0)
    rows[tokenizer.token_to_id(BOS)] = words[teacher_tokenizer.cls_token_id]
    rows[tokenizer.token_to_id(EOS)] = words[teacher_tokenizer.sep_token_id]
    return rows
