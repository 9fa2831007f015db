"""The latent-attention layer that NV-Embed applies before the mean. Source: NV-Embed, arXiv 2405.17428, section 3.2.

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
    """Cross-attention from tokens (queries) to latents (keys and values); section 3.2."""

    def __init__(self, dim: int, latent: LatentAttention) -> None:
        super().__init__()
        self.heads, self.head_dim = latent.heads, latent.head_dim
        inner = latent.heads * latent.head_dim
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.to_q(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)  # [B, heads, T, head_dim]
        k, v = (
            heads.view(-1, self.heads, self.head_dim).transpose(0, 1) for heads in self.to_kv(context).chunk(2, dim=-1)
        )  # [heads, L, head_dim] each
        weights = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(dim=-1)  # [B, heads, T, L]
        return self.to_out((weights @ v).transpose(1, 2).reshape(B, T, self.heads * self.head_dim))


class GEGLU(nn.Module):
    """Gated GELU: the second half gates the first, with the exact (erf) GELU. Source: arXiv 2002.05202."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class GatedFeedForward(nn.Module):
    """Feed-forward block of the pooler, with biases."""

    def __init__(self, dim: int, mult: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, 2 * mult * dim), GEGLU(), nn.Linear(mult * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class PreNorm(nn.Module):
    """Applies LayerNorm to the input of a block, and to its context if it has one."""

    def __init__(self, dim: int, fn: nn.Module, *, context: bool = False) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm_context = nn.LayerNorm(dim, eps=LAYER_NORM_EPS) if context else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.norm_context is None or context is None:
            out: Tensor = self.fn(self.norm(x))
        else:
            out = self.fn(self.norm(x), self.norm_context(context))
        return out


class LatentAttentionModel(nn.Module):
    """Latent attention: cross-attention to trained latents, followed by a gated feed-forward."""

    def __init__(self, dim: int, latent: LatentAttention) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(latent.latents, dim))
        self.cross_attend_blocks = nn.ModuleList(
            (
                PreNorm(dim, CrossAttention(dim, latent), context=True),
                PreNorm(dim, GatedFeedForward(dim, latent.feed_forward_mult)),
            )
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps token states [B, T, D] to [B, T, D]; the residual is the input before its norm, and no norm follows."""
        cross, feed_forward = self.cross_attend_blocks
        hidden = cross(hidden, self.latents) + hidden
        out: Tensor = feed_forward(hidden) + hidden
        return out
