"""The supported model families: backbone, mask, pooling and prompts of each, recognized from `config.json` alone.

Sources: the checkpoints' own `config.json` and remote code, and their model cards. Weights are read by `checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvembed_deploy.errors import CheckpointError
from nvembed_deploy.model.config import LatentAttention, Mask, Matryoshka, ModelConfig, Pooling, RopeScaling
from nvembed_deploy.spec import read_json

NVEMBED_MODEL_TYPE = "nvembed"
INSTRUCT = "Instruct: {instruction}\nQuery: "
"""Source: NV-Embed section 4.3 and the model card; passages get no prompt. E5, Linq, SFR and gte use the same."""


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """A group of published checkpoints with the same architecture options and prompts."""

    name: str
    published: str
    """Names of the published checkpoints."""
    mask: Mask
    pooling: Pooling
    qkv_bias: bool = False
    qk_norm: bool = False
    uses_sliding_window: bool = False
    """True if `sliding_window` is applied; NV-Embed's own code bypasses it with the causal mask."""
    add_bos: bool = True
    """True if texts begin with a BOS token."""
    add_eos: bool = True
    """True if texts end with an EOS token."""
    tokenizer_adds_eos: bool = False
    """True if `tokenizer.json` itself adds the EOS; `config.json` may name another token."""
    keep_eos_on_truncation: bool = False
    """True if truncation keeps the EOS; NV-Embed's own code removes it."""
    mask_instruction: bool = False
    """True if instruction tokens are not pooled, unless `config.json` says otherwise."""
    exclude_bos_from_pooling: bool = False
    """True if the BOS of a text with an instruction is not pooled either."""
    template: str = INSTRUCT
    """Template of a query's prompt; empty for models without instructions."""
    default_prompt: str = ""
    """Prompt used when no instruction is given."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Named prompts, for checkpoints whose `config_sentence_transformers.json` has none."""
    matryoshka: Matryoshka | None = None


NV_EMBED = ModelFamily(
    name="NV-Embed",
    published="nvidia/NV-Embed-v1, nvidia/NV-Embed-v2",
    mask=Mask.BIDIRECTIONAL,
    pooling=Pooling.LATENT,
    mask_instruction=True,
)
LLAMA_EMBED = ModelFamily(
    name="llama-embed-nemotron",
    published="nvidia/llama-embed-nemotron-8b",
    mask=Mask.BIDIRECTIONAL,
    pooling=Pooling.MEAN,
    add_eos=False,
)
LLAMA_EMBEDQA = ModelFamily(
    name="llama-nv-embedqa",
    published="nvidia/llama-3.2-nv-embedqa-1b-v2",
    mask=Mask.BIDIRECTIONAL,
    pooling=Pooling.MEAN,
    add_eos=False,
    template="",
    default_prompt="passage: ",
    prompts={"query": "query: ", "document": "passage: "},
    matryoshka=Matryoshka(min_dim=384, dims=(384, 512, 768, 1024, 2048)),
)
E5_MISTRAL = ModelFamily(
    name="e5-mistral",
    published="intfloat/e5-mistral-7b-instruct, Salesforce/SFR-Embedding-Mistral, Linq-AI-Research/Linq-Embed-Mistral",
    mask=Mask.CAUSAL,
    pooling=Pooling.LAST,
    uses_sliding_window=True,
    keep_eos_on_truncation=True,
)
GRITLM = ModelFamily(
    name="GritLM",
    published="GritLM/GritLM-7B",
    mask=Mask.BIDIRECTIONAL,
    pooling=Pooling.MEAN,
    add_eos=False,
    mask_instruction=True,
    exclude_bos_from_pooling=True,
    template="<|user|>\n{instruction}\n<|embed|>\n",
    default_prompt="<|embed|>\n",
)
QWEN3_EMBEDDING = ModelFamily(
    name="Qwen3-Embedding",
    published="Qwen/Qwen3-Embedding-0.6B, -4B, -8B",
    mask=Mask.CAUSAL,
    pooling=Pooling.LAST,
    qk_norm=True,
    add_bos=False,
    tokenizer_adds_eos=True,
    keep_eos_on_truncation=True,
    template="Instruct: {instruction}\nQuery:",
    matryoshka=Matryoshka(min_dim=32),
)
GTE_QWEN2 = ModelFamily(
    name="gte-Qwen2",
    published="Alibaba-NLP/gte-Qwen2-7B-instruct, -1.5B-instruct",
    mask=Mask.BIDIRECTIONAL,
    pooling=Pooling.LAST,
    qkv_bias=True,
    add_bos=False,
    keep_eos_on_truncation=True,
)
MODEL_FAMILIES = {
    family.name: family
    for family in (NV_EMBED, LLAMA_EMBED, LLAMA_EMBEDQA, E5_MISTRAL, GRITLM, QWEN3_EMBEDDING, GTE_QWEN2)
}
EMBEDQA_HIDDEN = 2048
"""Both bidirectional Llamas have the same model type; the 1 B model is recognized by its hidden size."""
RMS_NORM_EPS = 1e-6
"""Default if `config.json` has none, as in transformers' Mistral, Llama, Qwen2 and Qwen3."""


def recognize(config: Mapping[str, Any], *, source: str = "config.json") -> ModelFamily:
    """Returns the model family of a `config.json`.

    Raises:
        CheckpointError: The file belongs to no supported family, or contradicts the family's mask; the message lists
            the supported families.
    """
    model_type = config.get("model_type")
    names = config.get("architectures") or [""]
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    remote_code = str(config.get("auto_map") or "").lower()
    family: ModelFamily | None = None
    if model_type == NVEMBED_MODEL_TYPE:
        family = NV_EMBED
    elif model_type == "llama_bidirec" or architecture == "LlamaBidirectionalModel":
        family = LLAMA_EMBEDQA if config.get("hidden_size") == EMBEDQA_HIDDEN else LLAMA_EMBED
    elif model_type == "mistral" and "gritlm" in remote_code:
        family = GRITLM
    elif model_type == "mistral" and architecture == "MistralModel":
        family = E5_MISTRAL
    elif model_type == "qwen3":
        family = QWEN3_EMBEDDING
    elif model_type == "qwen2" and (config.get("is_causal") is False or "modeling_qwen." in remote_code):
        family = GTE_QWEN2
    if family is None:
        supported = "; ".join(f"{family.name} ({family.published})" for family in MODEL_FAMILIES.values())
        raise CheckpointError(
            f"{source}: model_type {model_type!r} with architecture {architecture!r} is not a supported embedding "
            f"model, so its mask and pooling are unknown. Supported: {supported}"
        )
    is_causal = config.get("is_causal")
    if isinstance(is_causal, bool) and is_causal != (family.mask is Mask.CAUSAL):
        raise CheckpointError(
            f"{source}: is_causal is {is_causal}, but the mask of {family.name} is {family.mask.value}. One of them is "
            "wrong and would lead to wrong vectors; correct the file"
        )
    return family


def read_architecture(config: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
    """Reads a checkpoint's `config.json`.

    Args:
        config: The parsed file.
        source: Name of the file in error messages.

    Raises:
        CheckpointError: The model family is not supported, a field is missing or of another type, or a field requests
            an option that the family does not have.
    """
    family = recognize(config, source=source)
    text = _section(config, "text_config", source) if family is NV_EMBED else config
    latent = _section(config, "latent_attention_config", source) if family is NV_EMBED else {}
    _refuse_unknown_variants(family, text, config, latent, source)
    hidden_size = _number(text, "hidden_size", source)
    heads = _number(text, "num_attention_heads", source)
    rope = _rope(text, source)
    theta = rope.get("rope_theta")
    return ModelConfig(
        family=family.name,
        hidden_size=hidden_size,
        intermediate_size=_number(text, "intermediate_size", source),
        layers=_number(text, "num_hidden_layers", source),
        heads=heads,
        kv_heads=_number(text, "num_key_value_heads", source, heads),
        head_dim=_number(text, "head_dim", source, hidden_size // max(heads, 1)),
        vocab_size=_number(text, "vocab_size", source),
        max_positions=_number(text, "max_position_embeddings", source, 32768),
        rope_theta=float(_number(text, "rope_theta", source, 10000.0 if theta is None else float(theta))),
        rms_norm_eps=float(_number(text, "rms_norm_eps", source, RMS_NORM_EPS)),
        mask=family.mask,
        pooling=family.pooling,
        latent=_latent(latent, hidden_size, config, source) if family is NV_EMBED else None,
        mask_instruction=bool(config.get("is_mask_instruction", family.mask_instruction)),
        rope_scaling=_rope_scaling(rope, source),
        sliding_window=_number(text, "sliding_window", source, 0) or None if family.uses_sliding_window else None,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        matryoshka=family.matryoshka,
    )


def read_checkpoint_architecture(folder: Path) -> ModelConfig:
    """Reads `folder/config.json`.

    Raises:
        CheckpointError: The file is missing, is not JSON, or describes another architecture.
    """
    return read_architecture(read_json(folder / "config.json"), source=str(folder / "config.json"))


def _latent(latent: Mapping[str, Any], hidden_size: int, config: Mapping[str, Any], source: str) -> LatentAttention:
    top_level_size = config.get("hidden_size", hidden_size)  # v1's file has no top-level copy
    if top_level_size != hidden_size:
        raise CheckpointError(
            f"{source}: hidden_size is {top_level_size} at the top level but {hidden_size} in text_config"
        )
    defaults = LatentAttention()
    for name in ("hidden_dim", "latent_dim"):
        if latent.get(name, 4096) != hidden_size:
            raise CheckpointError(
                f"{source}: latent_attention_config.{name} must equal hidden_size {hidden_size}, "
                f"got {latent.get(name, 4096)}"
            )
    return LatentAttention(
        latents=_number(latent, "num_latents_value", source, defaults.latents),
        heads=_number(latent, "num_cross_heads", source, defaults.heads),
        head_dim=_number(latent, "cross_dim_head", source, defaults.head_dim),
    )


def _rope(text: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns the settings of the `rope_scaling` and `rope_parameters` sections; transformers 5 writes the latter."""
    fields = [field for field in ("rope_scaling", "rope_parameters") if text.get(field) is not None]
    return {key: value for field in fields for key, value in _section(text, field, source).items()}


def _rope_scaling(rope: Mapping[str, Any], source: str) -> RopeScaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise CheckpointError(
            f"{source}: rope_scaling has type {rope_type!r}, which is not supported and would lead to wrong vectors. "
            "Supported: 'llama3', or no scaling"
        )
    return RopeScaling(
        factor=_number(rope, "factor", source, 0.0),
        low_freq_factor=_number(rope, "low_freq_factor", source, 0.0),
        high_freq_factor=_number(rope, "high_freq_factor", source, 0.0),
        original_max_positions=_number(rope, "original_max_position_embeddings", source),
    )


def _section(config: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    section = config.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(f"{source}: {name!r} is missing or not an object, so this is not NV-Embed's config.json")
    return section


def _number(config: Mapping[str, Any], name: str, source: str, default: Any = None) -> Any:
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"{source}: {name!r} is missing")
    number_types = (int, float) if isinstance(default, float) else (int,)
    if isinstance(value, bool) or not isinstance(value, number_types):
        expected = "a number" if float in number_types else "an integer"
        raise CheckpointError(f"{source}: {name!r} must be {expected}, got {value!r}")
    return value


def _refuse_unknown_variants(
    family: ModelFamily, text: Mapping[str, Any], config: Mapping[str, Any], latent: Mapping[str, Any], source: str
) -> None:
    """Refuses variants that would load but compute something else."""
    allowed_values: list[tuple[Mapping[str, Any], str, tuple[Any, ...]]] = [
        (text, "hidden_act", ("silu", None)),
        (text, "mlp_bias", (False, None)),
        (text, "use_sliding_window", (False, None)),
        (config, "pooling", ("avg", "mean", None) if family.pooling is not Pooling.LAST else ("last", None)),
    ]
    if not family.qkv_bias:
        allowed_values.append((text, "attention_bias", (False, None)))
    if family is NV_EMBED:
        allowed_values += [
            (text, "model_type", ("bidir_mistral",)),
            (text, "rope_scaling", (None,)),
            (config, "padding_side", ("right", None)),
            (latent, "output_normalize", (True, None)),
        ]
    for section, name, allowed in allowed_values:
        if section.get(name) not in allowed:
            raise CheckpointError(
                f"{source}: {name} is {section.get(name)!r}, which is not supported for {family.name} and would lead "
                f"to wrong vectors. Supported: {allowed[0]!r}"
            )
