"""Which parts of a model must stay in FP32 when the rest goes to FP16: found on real tokens, before anything is built.

FP16 ends at 65,504. A tensor that passes it becomes infinite, and one norm later NaN or silent zeros. The probes are
the gate's: first tokens, punctuation, instructed texts and the longest input, where large models keep their outliers.
What comes near the limit is computed in FP32 in the graph, exactly that and no more. Norms compute in FP32 anyway, so
the square inside them, which a value of 256 would already overflow, needs no care here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle as Handle

from nvembed_deploy.export.layerwise import POOLER, Parts
from nvembed_deploy.model.decoder import Attention, RMSNorm, SwiGLU
from nvembed_deploy.model.fold import FoldedLatentAttention
from nvembed_deploy.model.latent_attention import GEGLU, CrossAttention, LatentAttentionModel, PreNorm
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.parity.probes import probe_rows
from nvembed_deploy.tokenization import TextEncoder

FP16_MAX = 65504.0
HEADROOM = 4.0
"""Texts that were not probed may reach further: what passes a quarter of the limit counts as near it."""
DECODER = "embedding_model"


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """What the probe saw."""

    largest: dict[str, float]
    """Name of each tensor to its largest absolute value."""

    @property
    def near(self) -> dict[str, float]:
        """The tensors that come near FP16's limit, or are not finite even in FP32."""
        return {name: value for name, value in self.largest.items() if not value <= FP16_MAX / HEADROOM}


def probe(parts: Parts, text: TextEncoder, *, longest: int) -> Ranges:
    """Runs the gate's texts through the FP32 reference and keeps every tensor's largest value.

    Args:
        parts: The reference.
        text: The model's text encoder.
        longest: Tokens of the longest probe.

    Returns:
        Values by name: a module's name for its output; with `.product` behind, the gated product in front of a
        down-projection; with `.scores`, a bound on the attention's scores; with `.residual`, the sum behind a block.
    """
    largest: dict[str, float] = {}

    def keep(name: str, tensor: Tensor) -> None:
        value = float(tensor.abs().max())
        largest[name] = value if value != value else max(largest.get(name, 0.0), value)  # NaN stays

    hooks = [handle for name, module in parts.model.named_modules() for handle in _watch(name, module, keep)]
    try:
        parts.embed(text, probe_rows(text, longest)[1])
    finally:
        for handle in hooks:
            handle.remove()
    return Ranges(largest=largest)


def _watch(name: str, module: nn.Module, keep: Callable[[str, Tensor], None]) -> list[Handle]:
    if isinstance(module, SwiGLU):
        return [module.down_proj.register_forward_pre_hook(lambda _, args: keep(f"{name}.product", args[0]))]
    if isinstance(module, Attention):
        return _watch_scores(name, module, keep)
    if isinstance(module, RMSNorm) and name.endswith(("q_norm", "k_norm")):
        return [module.register_forward_hook(lambda _, args, out: keep(name, out))]
    if isinstance(module, RMSNorm):  # what it takes is the residual
        return [
            module.register_forward_pre_hook(lambda _, args: keep(f"{name}.residual", args[0])),
            module.register_forward_hook(lambda _, args, out: keep(name, out)),
        ]
    if isinstance(module, PreNorm):  # what it takes is the pooler's residual
        return [module.register_forward_pre_hook(lambda _, args: keep(f"{name}.residual", args[0]))]
    if isinstance(module, CrossAttention):
        return _watch_latents(name, module, keep)
    if isinstance(module, FoldedLatentAttention):
        return [
            module.get_submodule("norm").register_forward_hook(
                lambda _, args, out: keep(f"{name}.scores", out @ module.scores)
            ),
            module.register_forward_hook(lambda _, args, out: keep(name, out)),
        ]
    if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm | nn.Sequential | GEGLU) or name == POOLER:
        return [module.register_forward_hook(lambda _, args, out: keep(name, out))]
    return []


def _watch_scores(name: str, attention: Attention, keep: Callable[[str, Tensor], None]) -> list[Handle]:
    """A score is at most the product of the longest query and the longest key; turning keeps lengths."""
    longest: dict[str, Tensor] = {}

    def measure(side: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, args: object, out: Tensor) -> None:
            longest[side] = out.reshape(*out.shape[:-1], -1, attention.head_dim).norm(dim=-1).max()
            if side == "key":
                keep(f"{name}.scores", longest["query"] * longest["key"] * attention.head_dim**-0.5)

        return hook

    query, key = attention.q_norm or attention.q_proj, attention.k_norm or attention.k_proj
    return [query.register_forward_hook(measure("query")), key.register_forward_hook(measure("key"))]


def _watch_latents(name: str, attention: CrossAttention, keep: Callable[[str, Tensor], None]) -> list[Handle]:
    """The same for tokens and latents, whose products are scaled only afterwards."""
    longest: dict[str, Tensor] = {}

    def lengths(rows: Tensor) -> Tensor:
        found: Tensor = rows.reshape(*rows.shape[:-1], attention.heads, attention.head_dim).norm(dim=-1).max()
        return found

    def query(_: nn.Module, args: object, out: Tensor) -> None:
        longest["query"] = lengths(out)

    def key(_: nn.Module, args: object, out: Tensor) -> None:
        keep(f"{name}.scores", longest["query"] * lengths(out.chunk(2, dim=-1)[0]))

    return [attention.to_q.register_forward_hook(query), attention.to_kv.register_forward_hook(key)]


def wide_modules(model: NVEmbed, ranges: Ranges) -> frozenset[str]:
    """Modules that compute in FP32 so that no tensor near the limit is FP16.

    What makes such a tensor gives FP32, and what takes it takes FP32. A sum is FP32 where one of its terms is: once a
    block gives FP32, the residual stays FP32 to the end.
    """
    wide: set[str] = set()
    for name in ranges.near:
        if name.startswith(POOLER):
            wide.add(POOLER)
            continue
        parent, _, what = name.rpartition(".")
        if what == "product":
            wide |= {f"{parent}.{part}_proj" for part in ("gate", "up", "down")}
        elif what == "residual":
            wide.add(_feeds_residual(parent, layers=len(model.embedding_model.layers)))
        elif what == "scores":
            wide |= {f"{parent}.{part}_proj" for part in "qkv"}
        else:
            wide |= {name, *_takers(parent, what)}
    for name in list(wide):  # the attention takes three tensors of one type
        parent, _, what = name.rpartition(".")
        if what in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"):
            wide |= {f"{parent}.{part}_proj" for part in "qkv"}
    return frozenset(wide)


def _takers(parent: str, what: str) -> list[str]:
    """Modules that take a module's output, where it does not first become part of a sum or a product."""
    if what == "input_layernorm":
        return [f"{parent}.self_attn.{part}_proj" for part in "qkv"]
    if what == "post_attention_layernorm":
        return [f"{parent}.mlp.gate_proj", f"{parent}.mlp.up_proj"]
    if what == "v_proj":
        return [f"{parent}.o_proj"]
    return [POOLER] if what == "norm" else []


def _feeds_residual(norm: str, *, layers: int) -> str:
    """The module whose output was the last to be added to what a norm takes."""
    if norm == f"{DECODER}.norm":
        return f"{DECODER}.layers.{layers - 1}.mlp.down_proj"
    layer, _, which = norm.rpartition(".")
    if which == "post_attention_layernorm":
        return f"{layer}.self_attn.o_proj"
    number = int(layer.rpartition(".")[2])
    return f"{DECODER}.layers.{number - 1}.mlp.down_proj" if number else f"{DECODER}.embed_tokens"


def widen(model: nn.Module, wide: frozenset[str]) -> None:
    """Puts modules into FP32 in place, and casts where FP32 and the model's own type meet.

    Args:
        model: In FP16, its pooler folded or not.
        wide: As from `wide_modules`.
    """
    if not wide:
        return
    for name in wide:
        for part in model.get_submodule(name).modules():
            for own, weight in list(part.named_parameters(recurse=False)):  # `float()` cannot turn fake tensors
                setattr(part, own, nn.Parameter(weight.float(), requires_grad=False))
    for name, module in model.named_modules():
        inside_pooler = name.startswith(f"{POOLER}.")
        if isinstance(module, LatentAttentionModel | FoldedLatentAttention) or (
            isinstance(module, nn.Linear) and not inside_pooler
        ):
            module.register_forward_pre_hook(_cast_inputs)


def _cast_inputs(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(arg.to(dtype) for arg in args)
