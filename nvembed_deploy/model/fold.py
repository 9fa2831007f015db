"""The latent attention with everything folded that does not depend on the text: exact algebra, 16 x fewer weights.

Keys and values come from the latents alone. Per head, with scale s = 1/sqrt(head width):
`softmax(s x Wq^T K^T) V Wout^T = softmax(x A) B` with `A = s Wq^T K^T` [D, L] and `B = V Wout^T` [L, D].
In NV-Embed this takes the cross-attention from 537 M to 34 M weights, and removes a head width of 4096 that no fused
attention kernel accepts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nvembed_deploy.model.latent_attention import LAYER_NORM_EPS, CrossAttention, LatentAttentionModel
from nvembed_deploy.model.weights import StoredWeights, read_columns


class FoldedLatentAttention(nn.Module):
    """The same function as `LatentAttentionModel`: [B, T, D] to [B, T, D], on folded weights."""

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
        `A` [D, heads * L] and `B` [heads * L, D], multiplied in double precision, in the context's type.
    """
    inner = cross.heads * cross.head_dim
    query, both, out = (part.weight for part in (cross.to_q, cross.to_kv, cross.to_out))
    scores, values = _empty(cross.heads, context)
    for head in range(cross.heads):
        rows = slice(head * cross.head_dim, (head + 1) * cross.head_dim)
        here = slice(head * len(context), (head + 1) * len(context))
        scores[:, here] = _scores(query[rows], _projected(both[:inner][rows], context.double()))
        values[here] = _values(out[:, rows], _projected(both[inner:][rows], context.double()))
    return scores, values


@torch.no_grad()
def fold_stored(weights: StoredWeights) -> tuple[Tensor, Tensor]:
    """The same from a checkpoint's files, one head at a time and in FP32: a quarter of one of NV-Embed's takes 0.1 GB.

    Returns:
        `A` and `B`, float32.
    """
    latent = weights.config.latent
    assert latent is not None
    width, inner = latent.head_dim, latent.heads * latent.head_dim
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
        f"latent_attention_model.cross_attend_blocks.0.fn.to_{part}.weight" for part in ("q", "kv", "out")
    )
    scores, values = _empty(latent.heads, context)
    for head in range(latent.heads):
        rows = (head * width, (head + 1) * width)
        behind = (inner + rows[0], inner + rows[1])
        here = slice(head * len(context), (head + 1) * len(context))
        keys = _projected(weights.read(to_kv, rows=rows), context)
        scores[:, here] = _scores(weights.read(to_q, rows=rows), keys)
        projected = _projected(weights.read(to_kv, rows=behind), context)
        out = read_columns(lambda which: weights.read(to_out, rows=which), len(scores), *rows)
        values[here] = _values(out, projected)
    return scores, values


def _empty(heads: int, context: Tensor) -> tuple[Tensor, Tensor]:
    latents, width = context.shape
    return context.new_empty((width, heads * latents)), context.new_empty((heads * latents, width))


def _projected(part: Tensor, context: Tensor) -> Tensor:
    """A head's keys or values of the latents, [head_dim, L], from its rows [head_dim, D]; in the context's type."""
    return part.to(context.dtype) @ context.T


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """A head's `A` [D, L], from its rows [head_dim, D] of q."""
    return query.to(keys.dtype).T @ keys * query.shape[0] ** -0.5


def _values(out: Tensor, values: Tensor) -> Tensor:
    """A head's `B` [L, D], from its columns [D, head_dim]."""
    return (out.to(values.dtype) @ values).T
