"""What a BERT computes on real text, cut into a decoder's tokens: the states that `transplant` solves for."""

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
from nvembed_deploy.training.teacher import Teacher
from recipes.mini.tokenizer import SPACE, token_strings


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch of calibration text, float32."""

    ids: Tensor
    """int64 [R, T]."""
    real: Tensor
    """bool [R, T]."""
    states: list[Tensor]
    """The teacher's states [R, T, D], without mean and of unit size: the input of its first layer, then behind each
    layer's attention and behind its feed-forward; gain and bias not applied."""
    sizes: list[Tensor]
    """[R, T, 1]: the size that each of them had in front of its norm."""


def calibration(bert: Any, rows: Tensor, batches: Iterable[TokenBatch]) -> Iterator[Batch]:
    """Runs the teacher over the decoder's tokens and keeps its states.

    Args:
        bert: The teacher's model.
        rows: See `token_rows`: what stands for each of the decoder's tokens.
        batches: Right-padded rows.
    """
    for batch in tqdm(batches, desc="teacher's states", unit="batch", disable=None):
        ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
        found = [unit(state) for state in _sums(bert, rows[ids], mask)]
        yield Batch(ids=ids, real=mask.bool(), states=[unit for unit, _ in found], sizes=[size for _, size in found])


def bert_of(teacher: Teacher) -> Any:
    """A copy of the teacher's `BertModel`, float32, on the CPU.

    Raises:
        ConfigError: It is no BERT, or has another activation than GELU.
    """
    bert = getattr(next(teacher.model.children()), "auto_model", None)
    if bert is None or bert.config.model_type != "bert":
        kind = "none" if bert is None else bert.config.model_type
        raise ConfigError(f"the teacher's model type is {kind}; layers can start from a BERT's alone")
    if bert.config.hidden_act != "gelu":
        raise ConfigError(f"the teacher's activation is {bert.config.hidden_act}; layers can start from GELU's alone")
    return copy.deepcopy(bert).float().cpu()


def norms_of(bert: Any) -> list[Any]:
    """The layer norms in the order of the data."""
    blocks = (block for layer in bert.encoder.layer for block in (layer.attention.output, layer.output))
    return [bert.embeddings.LayerNorm, *(block.LayerNorm for block in blocks)]


@torch.no_grad()
def _sums(bert: Any, rows: Tensor, mask: Tensor) -> list[Tensor]:
    """What each norm reads, [R, T, D]."""
    found: list[Tensor] = []
    hooks = [norm.register_forward_pre_hook(lambda _, args: found.append(args[0])) for norm in norms_of(bert)]
    bert(inputs_embeds=rows, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return found


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows without their mean and of unit root mean square, and what that was."""
    x = x - x.mean(dim=-1, keepdim=True)
    size = x.square().mean(dim=-1, keepdim=True).sqrt()
    return x / size.clamp_min(1e-9), size


@torch.no_grad()
def token_rows(tokenizer: Tokenizer, teacher: Teacher) -> Tensor:
    """Rows of the teacher's own table that stand for each token, float32 [V, D].

    A token that the teacher spells in several gets their mean; letters inside a word count as inside a word. Control
    tokens are the teacher's own; what it cannot spell is its unknown token.
    """
    words = bert_of(teacher).embeddings.word_embeddings.weight
    own = teacher.tokenizer
    vocabulary = own.get_vocab()
    strings = token_strings(tokenizer)
    starts = [token.startswith(SPACE) for _, token in sorted((n, t) for t, n in tokenizer.get_vocab().items())]
    rows = words[own.unk_token_id].repeat(len(strings), 1)
    for number, (string, start) in enumerate(zip(strings, starts, strict=True)):
        pieces = own.tokenize(string) if string else []
        if pieces and not start and string.isalnum():
            if f"##{string}" in vocabulary:
                pieces = [f"##{string}"]
            elif f"##{pieces[0]}" in vocabulary:
                pieces[0] = f"##{pieces[0]}"
        if pieces:
            rows[number] = words[[vocabulary[piece] for piece in pieces]].mean(dim=0)
    rows[tokenizer.token_to_id(BOS)] = words[own.cls_token_id]
    rows[tokenizer.token_to_id(EOS)] = words[own.sep_token_id]
    return rows
