"""The latent attention with everything folded that does not depend on the text: exact algebra, 16 x fewer weights.

Keys and values come from the latents alone. Per head, with scale s = 1/sqrt(head width):
`softmax(s x Wq^T K^T) V Wout^T = softmax(x A) B` with `A = s Wq^T K^T` [D, L] and `B = V Wout^T` [L, D].
In NV-Embed this takes the cross-attention from 537 M to 34 M weights, and removes a head width of 4096 that no fused
attention kernel accepts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nvembed_deploy.model.nvembed import CrossAttention, LatentAttentionModel


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
    heads, width, D = cross.heads, cross.head_dim, context.shape[-1]
    key, value = (part.double() @ context.double().T for part in cross.to_kv.weight.chunk(2))
    key, value = key.view(heads, width, -1), value.view(heads, width, -1)  # [heads, head_dim, L]
    query = cross.to_q.weight.double().view(heads, width, D)
    out = cross.to_out.weight.double().view(D, heads, width)
    scores = torch.einsum("hwd,hwl->dhl", query, key).reshape(D, -1) * width**-0.5
    values = torch.einsum("hwl,dhw->hld", value, out).reshape(-1, D)
    return scores.to(context.dtype), values.to(context.dtype)
