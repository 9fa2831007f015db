"""NV-Embed in plain PyTorch: a bidirectional Mistral decoder, latent attention, masked mean, L2.

The reference that every later form is compared with. It serves any size: the 7.85 B model and the mini differ in
numbers only. Module names are NVIDIA's, so that the keys of `state_dict()` are those of the published safetensors.
Reading a checkpoint is in `checkpoint.py`, folding the pooler's weights in `fold.py`.

Notation:
    B  batch, number of texts                 H  attention heads of the decoder
    T  tokens in the padded batch             K  key/value heads of the decoder (H is a multiple of K)
    D  hidden and embedding width             h  width of one head
    L  latents of the pooler                  I  inner width of the pooler, its heads x head width

Source: NV-Embed, arXiv 2405.17428, sections 3.1 and 3.2; NVIDIA's `modeling_nvembed.py`, revision c50d55f.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvembed_deploy.config import LatentAttention, ModelConfig

LAYER_NORM_EPS = 1e-5
NORM_FLOOR = 1e-12
"""As in `torch.nn.functional.normalize`. Below FP16's smallest number, which is one reason for pooling in FP32."""

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


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions; the angles are FP32 whatever `dtype` is.

    Args:
        positions: int64 [T], 0 at the first token.
        head_dim: h, even.
        theta: Base of the wavelengths.
        dtype: Type of the result.

    Returns:
        Two tensors [T, h]. Source: arXiv 2104.09864, in Llama's half-split layout.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = positions.float()[:, None] * inverse.to(positions.device)[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns query or key heads [B, H, T, h] by their positions' angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


Rotary = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Grouped-query self-attention, every token to every real token. Source: arXiv 2305.13245."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.rotate: Rotary = rotate  # the export puts one operator here where the ONNX dialect has it
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)  # [B, H, T, h]
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)  # [B, K, T, h]
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
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


class BidirectionalMistral(nn.Module):
    """Mistral's decoder with the causal mask removed (NV-Embed section 3.1).

    `sliding_window` of the published config has no effect in NVIDIA's code, since the window lives in the causal mask
    that is bypassed: attention is global at any length, and so it is here.
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
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        mask = self.visible(attention_mask)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)

    @staticmethod
    def visible(attention_mask: Tensor) -> Tensor:
        """Which keys (last) a query sees, bool [B, 1, T, T]: all real tokens."""
        B, T = attention_mask.shape
        return attention_mask.bool()[:, None, None, :].expand(B, 1, T, T)


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


def masked_mean(hidden: Tensor, pool_mask: Tensor) -> Tensor:
    """Mean of the rows' pooled tokens in FP32: [B, T, D] and int64 [B, T] (1 = pooled) to float32 [B, D].

    Tokens that are not pooled are replaced, not multiplied by 0, so that nothing non-finite in them spreads.
    """
    mask = pool_mask.bool()[:, :, None]
    total = torch.where(mask, hidden.float(), torch.zeros((), dtype=torch.float32, device=hidden.device)).sum(dim=1)
    return total / mask.sum(dim=1).float()


class NVEmbed(nn.Module):
    """The whole encoder, ids to unit vectors."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding_model = BidirectionalMistral(config)
        self.latent_attention_model: nn.Module = LatentAttentionModel(config.hidden_size, config.latent)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pool_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds a batch of right-padded rows.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, T], 1 at real tokens, 0 at padding. It comes from lengths, never from ids:
                the padding id is the EOS id.
            pool_mask: int64 [B, T], 1 at tokens that the mean takes: the attention mask without the instruction.
                A row of zeros gives NaN; `text.py` refuses texts that would make one.

        Returns:
            float32 [B, D], rows of unit length; and float32 [B], their lengths before that.
        """
        hidden = self.embedding_model(input_ids, attention_mask)
        hidden = self.latent_attention_model(hidden)
        pooled = masked_mean(hidden, pool_mask)
        norm = torch.linalg.vector_norm(pooled, dim=-1)
        return pooled / norm.clamp_min(NORM_FLOOR)[:, None], norm
