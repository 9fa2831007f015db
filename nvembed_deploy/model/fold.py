"""Folding the constant part of the latent attention into its weights: exact algebra, 16 x fewer weights.

Keys and values depend on the latents alone. Per head, with scale s = 1/sqrt(head width):
`softmax(s x Wq^T K^T) V Wout^T = softmax(x A) B` with `A = s Wq^T K^T` [D, L] and `B = V Wout^T` [L, D].
In NV-Embed this reduces the cross-attention from 537 M to 34 M weights, and removes a head width of 4096 that no fused
attention kernel supports.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nvembed_deploy.model.latent_attention import LAYER_NORM_EPS, CrossAttention, LatentAttentionModel
from nvembed_deploy.model.weights import StoredWeights, read_columns


class FoldedLatentAttention(nn.Module):
    """Computes the same function as `LatentAttentionModel`, [B, T, D] to [B, T, D], with folded weights."""

    def __init__(self, model: LatentAttentionModel) -> None:
        super().__init__()
        cross, feed_forward = model.cross_attend_blocks
        self.norm = cross.norm
        self.feed_forward = feed_forward
        scores, values = fold(cross.fn, cross.norm_context(model.latents))
        self.heads, self.latents = cross.fn.heads, model.latents.shape[0]
        self.scores = nn.Parameter(scores, requires_grad=False)
        self.values = nn.Parameter(values, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        B, T, _ = hidden.shape
        logits = (self.norm(hidden) @ self.scores).view(B, T, self.heads, self.latents)
        weights = logits.softmax(dim=-1).reshape(B, T, self.heads * self.latents)
        hidden = weights @ self.values + hidden
        out: Tensor = self.feed_forward(hidden) + hidden
        return out


@torch.no_grad()
def fold(cross: CrossAttention, context: Tensor) -> tuple[Tensor, Tensor]:
    """Folds the projections of a cross-attention with its constant context.

    Args:
        cross: The cross-attention.
        context: [L, D] latents after their norm.

    Returns:
        `A` [D, heads * L] and `B` [heads * L, D], computed in double precision and stored in the type of the context.
    """
    inner = cross.heads * cross.head_dim
    w_q, w_kv, w_out = (linear.weight for linear in (cross.to_q, cross.to_kv, cross.to_out))
    scores, values = _empty(cross.heads, context)
    for head in range(cross.heads):
        rows = slice(head * cross.head_dim, (head + 1) * cross.head_dim)
        columns = slice(head * len(context), (head + 1) * len(context))
        scores[:, columns] = _scores(w_q[rows], _project(w_kv[:inner][rows], context.double()))
        values[columns] = _values(w_out[:, rows], _project(w_kv[inner:][rows], context.double()))
    return scores, values


@torch.no_grad()
def fold_stored(weights: StoredWeights) -> tuple[Tensor, Tensor]:
    """Folds the stored weights of a checkpoint like `fold`, one head at a time and in FP32.

    The weights of a head are read one matrix at a time, so the memory stays small: a quarter of one of NV-Embed's heads
    takes 0.1 GB.

    Returns:
        `A` and `B`, float32.
    """
    latent = weights.config.latent
    assert latent is not None
    head_dim, inner = latent.head_dim, latent.heads * latent.head_dim
    latents, gain, shift = (
        weights.read(f"latent_attention_model.{name}").float()
        for name in (
            "latents",
            "cross_attend_blocks.0.norm_context.weight",
            "cross_attend_blocks.0.norm_context.bias",
        )
    )
    context = nn.functional.layer_norm(latents, (latents.shape[1],), gain, shift, LAYER_NORM_EPS)
    to_q, to_kv, to_out = (
        f"latent_attention_model.cross_attend_blocks.0.fn.to_{name}.weight" for name in ("q", "kv", "out")
    )
    scores, values = _empty(latent.heads, context)
    for head in range(latent.heads):
        rows = (head * head_dim, (head + 1) * head_dim)
        value_rows = (inner + rows[0], inner + rows[1])
        columns = slice(head * len(context), (head + 1) * len(context))
        keys = _project(weights.read(to_kv, rows=rows), context)
        scores[:, columns] = _scores(weights.read(to_q, rows=rows), keys)
        head_values = _project(weights.read(to_kv, rows=value_rows), context)
        out = read_columns(lambda row_range: weights.read(to_out, rows=row_range), len(scores), *rows)
        values[columns] = _values(out, head_values)
    return scores, values


def _empty(heads: int, context: Tensor) -> tuple[Tensor, Tensor]:
    L, D = context.shape
    return context.new_empty((D, heads * L)), context.new_empty((heads * L, D))


def _project(weight: Tensor, context: Tensor) -> Tensor:
    """Returns the keys or values of a head [head_dim, L], from its weight rows [head_dim, D], in the context's type."""
    return weight.to(context.dtype) @ context.T


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """Returns the `A` of a head [D, L], from its query rows [head_dim, D]."""
    return query.to(keys.dtype).T @ keys * query.shape[0] ** -0.5


def _values(out: Tensor, values: Tensor) -> Tensor:
    """Returns the `B` of a head [L, D], from its output columns [D, head_dim]."""
    return (out.to(values.dtype) @ values).T
