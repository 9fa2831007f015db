"""NV-Embed's pooler before the mean. Source: NV-Embed, arXiv 2405.17428, section 3.2.

Notation:
    B  batch, number of texts                 L  latents of the pooler
    T  tokens in the padded batch             I  inner width of the pooler, its heads x head width
    D  hidden and embedding width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvembed_deploy.model.config import LatentAttention

LAYER_NORM_EPS = 1e-5


class CrossAttention(nn.Module):
    """Tokens attend to the latents: the tokens are queries, the latents keys and values (section 3.2)."""

    def __init__(self, width: int, latent: LatentAttention) -> None:
        super().__init__()
        self.heads, self.head_dim = latent.heads, latent.head_dim
        inner = latent.heads * latent.head_dim
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.to_q(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)  # [B, heads, T, head_dim]
        k, v = (
            part.view(-1, self.heads, self.head_dim).transpose(0, 1) for part in self.to_kv(context).chunk(2, dim=-1)
        )  # [heads, L, head_dim] each
        weights = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(dim=-1)  # [B, heads, T, L]
        return self.to_out((weights @ v).transpose(1, 2).reshape(B, T, self.heads * self.head_dim))


class GEGLU(nn.Module):
    """Second half gates the first, with the exact (erf) GELU. Source: arXiv 2002.05202."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class GatedFeedForward(nn.Module):
    """The pooler's feed-forward, with biases."""

    def __init__(self, width: int, mult: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 2 * mult * width), GEGLU(), nn.Linear(mult * width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class PreNorm(nn.Module):
    """LayerNorm in front of a block, and one for its context where it has one."""

    def __init__(self, width: int, fn: nn.Module, *, context: bool = False) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.norm_context = nn.LayerNorm(width, eps=LAYER_NORM_EPS) if context else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.norm_context is None or context is None:
            out: Tensor = self.fn(self.norm(x))
        else:
            out = self.fn(self.norm(x), self.norm_context(context))
        return out


class LatentAttentionModel(nn.Module):
    """NV-Embed's pooler before the mean: cross-attention to trained latents, then a gated feed-forward."""

    def __init__(self, width: int, latent: LatentAttention) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(latent.latents, width))
        self.cross_attend_blocks = nn.ModuleList(
            (
                PreNorm(width, CrossAttention(width, latent), context=True),
                PreNorm(width, GatedFeedForward(width, latent.feed_forward_mult)),
            )
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] token states to [B, T, D]; the residual is the un-normed input, no norm follows."""
        cross, feed_forward = self.cross_attend_blocks
        hidden = cross(hidden, self.latents) + hidden
        out: Tensor = feed_forward(hidden) + hidden
        return out
