"""Groups of linear layers that take the same input: the units of calibration and of quantization.

SmoothQuant (arXiv 2211.10438) divides the channels of a group's input by factors and multiplies the columns of the
group's weights by them, which changes nothing in exact arithmetic. The division is folded into the module that produces
the input: a norm's weight, or rows of the preceding layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nvembed_deploy.model.decoder import DecoderLayer
from nvembed_deploy.model.fold import FoldedLatentAttention
from nvembed_deploy.model.latent_attention import GatedFeedForward, LatentAttentionModel, PreNorm
from nvembed_deploy.model.nvembed import NVEmbed


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers that take the same input [.., K]."""

    name: str
    linears: tuple[str, ...]
    """Module names of the layers."""
    tie: Callable[[Tensor], Tensor]
    """Makes factors [K] equal for channels of the input that come from the same channel of its producer."""
    divide: Callable[[Tensor], None]
    """Divides the input's channels by tied factors, in the weights of its producer."""


def linear_groups(model: NVEmbed) -> tuple[LinearGroup, ...]:
    """Returns the groups of a model, in the order in which they compute.

    The pooler's products with its latents are attention, not linear layers, and are in no group.
    """
    groups: list[LinearGroup] = []
    for index, layer in enumerate(model.embedding_model.layers):
        groups += _decoder_groups(f"embedding_model.layers.{index}", layer)
    pooler = model.latent_attention_model
    if isinstance(pooler, FoldedLatentAttention):
        groups += _pooler_groups("latent_attention_model.feed_forward", pooler.feed_forward)
    elif isinstance(pooler, LatentAttentionModel):
        groups += _pooler_groups("latent_attention_model.cross_attend_blocks.1", pooler.cross_attend_blocks[1])
    return tuple(groups)


def _decoder_groups(name: str, layer: DecoderLayer) -> list[LinearGroup]:
    attention, mlp = layer.self_attn, layer.mlp
    heads_per_kv_head, head_dim = attention.heads // attention.kv_heads, attention.head_dim

    def tie_heads(factors: Tensor) -> Tensor:  # for query heads that share a value head
        tied = factors.view(attention.kv_heads, heads_per_kv_head, head_dim).amax(dim=1, keepdim=True)
        return tied.expand(-1, heads_per_kv_head, -1).reshape(-1)

    def divide_values(factors: Tensor) -> None:
        kv_factors = factors.view(attention.kv_heads, heads_per_kv_head, head_dim)[:, 0].reshape(-1)
        attention.v_proj.weight /= kv_factors[:, None]
        if attention.v_proj.bias is not None:
            attention.v_proj.bias /= kv_factors

    def divide_product(factors: Tensor) -> None:
        mlp.up_proj.weight /= factors[:, None]

    return [
        LinearGroup(
            f"{name}.self_attn.qkv",
            tuple(f"{name}.self_attn.{projection}_proj" for projection in "qkv"),
            _untied,
            _divide_norm(layer.input_layernorm),
        ),
        LinearGroup(f"{name}.self_attn.o", (f"{name}.self_attn.o_proj",), tie_heads, divide_values),
        LinearGroup(
            f"{name}.mlp.gate_up",
            (f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"),
            _untied,
            _divide_norm(layer.post_attention_layernorm),
        ),
        LinearGroup(f"{name}.mlp.down", (f"{name}.mlp.down_proj",), _untied, divide_product),
    ]


def _pooler_groups(name: str, block: PreNorm) -> list[LinearGroup]:
    feed_forward = block.fn
    assert isinstance(feed_forward, GatedFeedForward)
    up_proj = feed_forward.net[0]

    def divide_value(factors: Tensor) -> None:  # the first half of the rows is the value, the second half gates it
        half = len(factors)
        up_proj.weight[:half] /= factors[:, None]
        up_proj.bias[:half] /= factors

    return [
        LinearGroup(f"{name}.first", (f"{name}.fn.net.0",), _untied, _divide_norm(block.norm)),
        LinearGroup(f"{name}.second", (f"{name}.fn.net.2",), _untied, divide_value),
    ]


def _untied(factors: Tensor) -> Tensor:
    return factors


def _divide_norm(norm: nn.Module) -> Callable[[Tensor], None]:
    def divide(factors: Tensor) -> None:
        for parameter in norm.parameters():  # LayerNorm has a bias as well
            parameter /= factors

    return divide


@torch.no_grad()
def smooth(model: NVEmbed, group: LinearGroup, factors: Tensor) -> None:
    """Divides a group's input by factors [K] and multiplies the columns of its weights by them, in place."""
    group.divide(factors)
    for name in group.linears:
        weight_of(model, name).mul_(factors)


def weight_of(model: NVEmbed, name: str) -> Tensor:
    """Returns the weight [out, in] of a linear layer."""
    return model.get_parameter(f"{name}.weight")
