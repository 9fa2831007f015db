"""Finds the modules of a model that must stay in FP32 when the rest is converted to FP16.

The largest FP16 number is 65,504. A tensor that exceeds it becomes infinite, and after the next norm NaN or silently
zero. Before anything is built, the model runs on the texts of the parity gate: first tokens, punctuation, texts with an
instruction and the longest input, which is where large models have their outliers. Exactly the modules whose tensors
come near the limit compute in FP32 in the graph. The squares inside norms, which a value of 256 would already overflow,
need no care here: norms always compute in FP32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle as Handle

from nvembed_deploy.export.layerwise import POOLER, LayerwiseModel
from nvembed_deploy.model.decoder import Attention, RMSNorm, SwiGLU
from nvembed_deploy.model.fold import FoldedLatentAttention
from nvembed_deploy.model.latent_attention import GEGLU, CrossAttention, LatentAttentionModel, PreNorm
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.parity.probes import probe_rows
from nvembed_deploy.tokenization import TextEncoder

FP16_MAX = 65504.0
HEADROOM = 4.0
"""Other texts may reach higher values than the probes: a value above a quarter of the limit counts as near it."""
DECODER = "embedding_model"
Record = Callable[[str, Tensor], None]
"""Takes a tensor's name and the tensor, of which it records the largest absolute value."""


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Largest absolute values that were measured."""

    max_abs: dict[str, float]
    """Largest absolute value of each tensor, by the tensor's name."""

    @property
    def near_limit(self) -> dict[str, float]:
        """The tensors that come near FP16's limit, or are not finite even in FP32."""
        return {name: peak for name, peak in self.max_abs.items() if not peak <= FP16_MAX / HEADROOM}


def measure_ranges(layerwise: LayerwiseModel, text: TextEncoder, *, longest: int) -> Ranges:
    """Records the largest absolute value of every tensor while the FP32 model runs the gate's texts.

    Args:
        layerwise: The FP32 model.
        text: The model's text encoder.
        longest: Tokens of the longest text, to which the others are cut.

    Returns:
        Values by name. A module's name stands for its output; with the suffix `.product`, for the gated product in
        front of a down-projection; with `.scores`, for an upper bound of the attention's scores; with `.residual`, for
        the residual stream that a norm takes.
    """
    max_abs: dict[str, float] = {}

    def record(name: str, tensor: Tensor) -> None:
        peak = float(tensor.abs().max())
        max_abs[name] = peak if peak != peak else max(max_abs.get(name, 0.0), peak)  # NaN is not replaced again

    handles = [
        handle for name, module in layerwise.model.named_modules() for handle in _register_hooks(name, module, record)
    ]
    try:
        layerwise.embed(text, probe_rows(text, longest)[1])
    finally:
        for handle in handles:
            handle.remove()
    return Ranges(max_abs=max_abs)


def _register_hooks(name: str, module: nn.Module, record: Record) -> list[Handle]:
    if isinstance(module, SwiGLU):
        return [module.down_proj.register_forward_pre_hook(lambda _, args: record(f"{name}.product", args[0]))]
    if isinstance(module, Attention):
        return _register_score_hooks(name, module, record)
    if isinstance(module, RMSNorm) and name.endswith(("q_norm", "k_norm")):
        return [module.register_forward_hook(lambda _, args, out: record(name, out))]
    if isinstance(module, RMSNorm):  # its input is the residual stream
        return [
            module.register_forward_pre_hook(lambda _, args: record(f"{name}.residual", args[0])),
            module.register_forward_hook(lambda _, args, out: record(name, out)),
        ]
    if isinstance(module, PreNorm):  # its input is the pooler's residual stream
        return [module.register_forward_pre_hook(lambda _, args: record(f"{name}.residual", args[0]))]
    if isinstance(module, CrossAttention):
        return _register_latent_score_hooks(name, module, record)
    if isinstance(module, FoldedLatentAttention):
        return [
            module.get_submodule("norm").register_forward_hook(
                lambda _, args, out: record(f"{name}.scores", out @ module.scores)
            ),
            module.register_forward_hook(lambda _, args, out: record(name, out)),
        ]
    if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm | nn.Sequential | GEGLU) or name == POOLER:
        return [module.register_forward_hook(lambda _, args, out: record(name, out))]
    return []


def _register_score_hooks(name: str, attention: Attention, record: Record) -> list[Handle]:
    """Bounds the scores by the norm of the longest query times that of the longest key; rotation keeps norms."""
    longest: dict[str, Tensor] = {}

    def measure(side: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, args: object, out: Tensor) -> None:
            longest[side] = out.reshape(*out.shape[:-1], -1, attention.head_dim).norm(dim=-1).max()
            if side == "key":
                record(f"{name}.scores", longest["query"] * longest["key"] * attention.head_dim**-0.5)

        return hook

    query, key = attention.q_norm or attention.q_proj, attention.k_norm or attention.k_proj
    return [query.register_forward_hook(measure("query")), key.register_forward_hook(measure("key"))]


def _register_latent_score_hooks(name: str, attention: CrossAttention, record: Record) -> list[Handle]:
    """Bounds the scores of tokens and latents, whose products are scaled only afterwards."""
    longest: dict[str, Tensor] = {}

    def max_norm(heads: Tensor) -> Tensor:
        norm: Tensor = heads.reshape(*heads.shape[:-1], attention.heads, attention.head_dim).norm(dim=-1).max()
        return norm

    def query_hook(_: nn.Module, args: object, out: Tensor) -> None:
        longest["query"] = max_norm(out)

    def key_hook(_: nn.Module, args: object, out: Tensor) -> None:
        record(f"{name}.scores", longest["query"] * max_norm(out.chunk(2, dim=-1)[0]))

    return [attention.to_q.register_forward_hook(query_hook), attention.to_kv.register_forward_hook(key_hook)]


def find_fp32_modules(model: NVEmbed, ranges: Ranges) -> frozenset[str]:
    """Returns the modules that must compute in FP32 so that no tensor near the limit is FP16.

    These are the modules that produce such a tensor and those that take it. A sum is FP32 if one of its terms is: once
    a block's output is FP32, the residual stream stays FP32 to the end.
    """
    fp32_modules: set[str] = set()
    for name in ranges.near_limit:
        if name.startswith(POOLER):
            fp32_modules.add(POOLER)
            continue
        parent, _, tensor = name.rpartition(".")
        if tensor == "product":
            fp32_modules |= {f"{parent}.{projection}_proj" for projection in ("gate", "up", "down")}
        elif tensor == "residual":
            fp32_modules.add(_last_residual_writer(parent, layers=len(model.embedding_model.layers)))
        elif tensor == "scores":
            fp32_modules |= {f"{parent}.{projection}_proj" for projection in "qkv"}
        else:
            fp32_modules |= {name, *_consumers(parent, tensor)}
    for name in list(fp32_modules):  # the attention takes queries, keys and values of one type
        parent, _, module = name.rpartition(".")
        if module in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"):
            fp32_modules |= {f"{parent}.{projection}_proj" for projection in "qkv"}
    return frozenset(fp32_modules)


def _consumers(parent: str, module: str) -> list[str]:
    """Returns the modules that take a module's output directly, not as part of a sum or a product."""
    if module == "input_layernorm":
        return [f"{parent}.self_attn.{projection}_proj" for projection in "qkv"]
    if module == "post_attention_layernorm":
        return [f"{parent}.mlp.gate_proj", f"{parent}.mlp.up_proj"]
    if module == "v_proj":
        return [f"{parent}.o_proj"]
    return [POOLER] if module == "norm" else []


def _last_residual_writer(norm: str, *, layers: int) -> str:
    """Returns the module whose output is the last one added to the residual stream that a norm takes."""
    if norm == f"{DECODER}.norm":
        return f"{DECODER}.layers.{layers - 1}.mlp.down_proj"
    layer, _, norm_name = norm.rpartition(".")
    if norm_name == "post_attention_layernorm":
        return f"{layer}.self_attn.o_proj"
    index = int(layer.rpartition(".")[2])
    return f"{DECODER}.layers.{index - 1}.mlp.down_proj" if index else f"{DECODER}.embed_tokens"


def convert_to_fp32(model: nn.Module, fp32_modules: frozenset[str]) -> None:
    """Converts modules to FP32 in place, and adds casts where FP32 and the model's own type meet.

    Args:
        model: In FP16, its pooler folded or not.
        fp32_modules: Module names, from `find_fp32_modules`.
    """
    if not fp32_modules:
        return
    for name in fp32_modules:
        for submodule in model.get_submodule(name).modules():
            for key, weight in list(submodule.named_parameters(recurse=False)):  # `float()` fails on fake tensors
                setattr(submodule, key, nn.Parameter(weight.float(), requires_grad=False))
    for name, module in model.named_modules():
        is_in_pooler = name.startswith(f"{POOLER}.")
        if isinstance(module, LatentAttentionModel | FoldedLatentAttention) or (
            isinstance(module, nn.Linear) and not is_in_pooler
        ):
            module.register_forward_pre_hook(_cast_inputs)


def _cast_inputs(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(arg.to(dtype) for arg in args)
