"""The decoder in plain PyTorch. The options of its config cover Mistral, Ministral 3, Llama, Qwen2 and Qwen3.

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

from nvembed_deploy.model.config import Mask, ModelConfig, RopeKind, RopeScaling

# If two threads of a process make the first call of MKL's cos at the same time, one may run before the library has
# selected its kernel, with errors of 1e-4: 2 of 70 processes on a busy machine, 0 of 150 after one call (torch 2.13.0).
for _function in (torch.cos, torch.sin):
    _function(torch.zeros(1))


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in FP32 because the square of a value above 255.9 overflows FP16.

    Source: arXiv 1910.07467.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x_fp32 = x.float()
        scale = torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x_fp32 * scale).to(x.dtype)


def rotary_tables(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the cosines and sines of the rotary position embedding; the angles are FP32 for every `dtype`.

    Source: arXiv 2104.09864, in Llama's half-split layout.

    Args:
        positions: int64 [T], 0 at the first token.
        head_dim: h, even.
        theta: Base of the wavelengths.
        dtype: Type of the tables.
        scaling: Scaling of the frequencies, or None.

    Returns:
        Cosines and sines, [T, h] each.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    factor = 1.0
    if scaling is not None:
        scale = {RopeKind.LINEAR: _scale_linearly, RopeKind.LLAMA3: _scale_as_llama3, RopeKind.YARN: _scale_by_yarn}
        inverse, factor = scale[scaling.kind](inverse, scaling, theta), scaling.attention_factor
    angles = positions.float()[:, None] * inverse.to(positions.device)[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    if factor == 1:
        return angles.cos().to(dtype), angles.sin().to(dtype)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def _scale_linearly(inverse: Tensor, scaling: RopeScaling, _: float) -> Tensor:
    """Divides all frequencies by `factor`. Source: arXiv 2306.15595."""
    return inverse / scaling.factor


def _scale_by_yarn(inverse: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Divides the frequencies of long wavelengths by `factor`, short ones not, with a ramp between them.

    Source: YaRN, arXiv 2309.00071, section 3.2; rounding and limits as in transformers 5.23.
    """
    half = len(inverse)

    def dimension(rotations: float) -> float:
        """Dimension that rotates so many times within the original positions."""
        return half * math.log(scaling.original_max_positions / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inverse / scaling.factor * ramp + inverse * (1 - ramp)


def _scale_as_llama3(inverse: Tensor, scaling: RopeScaling, _: float) -> Tensor:
    """Scales the frequencies as Llama 3.1 does: long wavelengths by `factor`, short ones not, with a blend between.

    Source: Llama 3.1's `apply_scaling`.
    """
    rotations = scaling.original_max_positions * inverse / (2 * math.pi)  # within the original context length
    blend = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return inverse * (blend + (1 - blend) / scaling.factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary position embeddings to query or key heads [B, H, T, h]."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Computes attention with a fused kernel.

    Args:
        q: Queries [B, H, T, h].
        k: Keys [B, K, T, h].
        v: Values, as the keys.
        mask: bool [B, 1, T or 1, T], True at the keys that a query attends to.

    Returns:
        [B, H, T, h].
    """
    mask = mask.expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


Rotary = Callable[[Tensor, Tensor, Tensor], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Grouped-query self-attention. Source: arXiv 2305.13245; query and key norms, arXiv 2010.04245."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.rotate: Rotary = rotate  # the export replaces these two by what suits the ONNX dialect
        self.attend: Attend = attend
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
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)  # needed if the residual is FP32 and the heads are not
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        out = self.attend(q, k, v, mask)
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
    """Attention and feed-forward, each with a norm before it and a residual connection."""

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
    """A Mistral-like decoder with or without the causal mask, which NV-Embed removes (section 3.1).

    NV-Embed's `sliding_window` has no effect in NVIDIA's code, because the window is part of the causal mask that is
    bypassed: attention is global at any length, here as well. transformers' classes apply it, in some or all layers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Computes the token states after the final norm.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, T], 1 at real tokens, 0 at padding.

        Returns:
            [B, T, D] in the parameters' type.
        """
        x = self.embed_tokens(input_ids)  # [B, T, D]
        cos, sin = self.rotary(input_ids.shape[1], x)
        masks = {self.config.has_window(layer): self.visible(attention_mask, layer) for layer in self._first_of_kind()}
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, masks[self.config.has_window(index)])
        return self.norm(x)

    def _first_of_kind(self) -> list[int]:
        """Returns the first layer with the window and the first without, in their order."""
        kinds: dict[bool, int] = {}
        for layer in range(len(self.layers)):
            kinds.setdefault(self.config.has_window(layer), layer)
        return list(kinds.values())

    def rotary(self, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rotary tables of `tokens` positions, in the type and on the device of `like`."""
        positions = torch.arange(tokens, device=like.device)
        config = self.config
        return rotary_tables(positions, config.head_dim, config.rope_theta, like.dtype, config.rope_scaling)

    def visible(self, attention_mask: Tensor, layer: int) -> Tensor:
        """Returns the mask of keys (last axis) that a query attends to in a layer, bool [B, 1, T, T].

        It is [B, 1, 1, T] if all queries of a text attend to the same keys. Padding is excluded, with a causal mask
        also the tokens after the query, and those outside the layer's window.
        """
        T = attention_mask.shape[1]
        real = attention_mask.bool()[:, None, None, :]
        is_causal, window = self.config.mask is Mask.CAUSAL, self.config.sliding_window
        if not is_causal and not self.config.has_window(layer):
            return real
        positions = torch.arange(T, device=attention_mask.device)
        distance = positions[:, None] - positions[None, :]
        if window is None or not self.config.has_window(layer):
            return real & (distance >= 0)[None, None]
        in_window = (distance >= 0) & (distance < window) if is_causal else distance.abs() <= window
        # A padded query may have no real token in its window, and a softmax over nothing is NaN: it attends to itself.
        return (real & in_window[None, None]) | (distance == 0)[None, None]
