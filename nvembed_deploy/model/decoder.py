"""The decoder in plain PyTorch: Mistral's, and with the options of its config Llama's, Qwen2's and Qwen3's.

Notation:
    B  batch, number of texts                 H  attention heads of the decoder
    T  tokens in the padded batch             K  key/value heads of the decoder (H is a multiple of K)
    D  hidden and embedding width             h  width of one head
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvembed_deploy.model.config import Mask, ModelConfig, RopeScaling

# Where MKL's first cos of a process is asked for by two threads at once, one may compute before the library has chosen
# its code, and is off by 1e-4: 2 of 70 fresh processes on a busy machine, 0 of 150 after one call alone (torch 2.13.0).
for _function in (torch.cos, torch.sin):
    _function(torch.zeros(1))


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in FP32: the square of a value above 255.9 is no FP16 number.

    Source: arXiv 1910.07467.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def rotary_tables(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions; the angles are FP32 whatever `dtype` is.

    Args:
        positions: int64 [T], 0 at the first token.
        head_dim: h, even.
        theta: Base of the wavelengths.
        dtype: Type of the result.
        scaling: Llama 3's, or None.

    Returns:
        Two tensors [T, h]. Source: arXiv 2104.09864, in Llama's half-split layout.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is not None:
        inverse = _stretched(inverse, scaling)
    angles = positions.float()[:, None] * inverse.to(positions.device)[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _stretched(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies of Llama 3.1: long wavelengths `factor` times longer, short ones as they are, a blend between.

    Source: Llama 3.1's `apply_scaling`.
    """
    turns = scaling.original_max_positions * inverse / (2 * math.pi)  # within the positions of the first training
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0, 1)
    return inverse * (share + (1 - share) / scaling.factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns query or key heads [B, H, T, h] by their positions' angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


Rotary = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Grouped-query self-attention. Source: arXiv 2305.13245; query and key norms, arXiv 2010.04245."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.rotate: Rotary = rotate  # the export puts one operator here where the ONNX dialect has it
        bias = config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)  # [B, H, T, h]
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)  # [B, K, T, h]
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)  # where the residual is FP32 and the heads are not
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.heads != self.kv_heads)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, self.heads * self.head_dim))


class SwiGLU(nn.Module):
    """Gated feed-forward. Source: arXiv 2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A decoder of Mistral's kind, with or without the causal mask (NV-Embed section 3.1 removes it).

    NV-Embed's `sliding_window` has no effect in NVIDIA's code, since the window lives in the causal mask that is
    bypassed: attention is global at any length, and so it is here. A causal mask honours it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token states after the final norm.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, T], 1 at real tokens, 0 at padding.

        Returns:
            [B, T, D] in the parameters' type.
        """
        x = self.embed_tokens(input_ids)  # [B, T, D]
        cos, sin = self.rotary(input_ids.shape[1], x)
        mask = self.visible(attention_mask)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)

    def rotary(self, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The tables of `tokens` positions, in the type and on the device of `like`."""
        positions = torch.arange(tokens, device=like.device)
        config = self.config
        return rotary_tables(positions, config.head_dim, config.rope_theta, like.dtype, config.rope_scaling)

    def visible(self, attention_mask: Tensor) -> Tensor:
        """Which keys (last) a query sees, bool [B, 1, T, T]: real tokens, and where causal those not behind it."""
        B, T = attention_mask.shape
        real = attention_mask.bool()[:, None, None, :].expand(B, 1, T, T)
        if self.config.mask is Mask.BIDIRECTIONAL:
            return real
        places = torch.arange(T, device=attention_mask.device)
        back = places[:, None] - places[None, :]
        if self.config.sliding_window is None:
            return real & (back >= 0)[None, None]
        seen = (back >= 0) & (back < self.config.sliding_window)
        # A padded query beyond the window would see nothing, and a mean over nothing is NaN: it sees itself.
        return (real & seen[None, None]) | (back == 0)[None, None]
