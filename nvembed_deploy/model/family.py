"""NV-Embed's relatives as data: backbone, mask, pooling and prompts of each, chosen from `config.json` alone.

Sources: the checkpoints' own `config.json` and remote code, and their model cards. Weights are read by
`model/checkpoint.py`.
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
"""Source: NV-Embed section 4.3 and the model card; passages get no prompt. E5, Linq, SFR and gte write the same."""


@dataclass(frozen=True, kw_only=True)
class Relative:
    """One row of the family."""

    name: str
    published: str
    """Checkpoints of this kind."""
    mask: Mask
    pooling: Pooling
    qkv_bias: bool = False
    qk_norm: bool = False
    windowed: bool = False
    """True where `sliding_window` is honoured; NV-Embed's own code bypasses it with the causal mask."""
    begins: bool = True
    """True where texts begin with a BOS."""
    ends: bool = True
    """True where texts end with an EOS."""
    end_by_tokenizer: bool = False
    """True where `tokenizer.json` itself adds the EOS, and `config.json` may name another."""
    end_survives: bool = False
    """True where truncation keeps the EOS; NV-Embed's own code cuts it off."""
    mask_instruction: bool = False
    mask_begin: bool = False
    """True where the BOS of an instructed text is not pooled either."""
    template: str = INSTRUCT
    """Empty where the model takes no instructions."""
    default_prompt: str = ""
    """Of a text without an instruction."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Prompts with a name, where the checkpoint's `config_sentence_transformers.json` has none."""
    matryoshka: Matryoshka | None = None


NV_EMBED = Relative(
    name="NV-Embed",
    published="nvidia/NV-Embed-v1, nvidia/NV-Embed-v2",
    mask=Mask.BIDIRECTIONAL,
    pooling=Pooling.LATENT,
    mask_instruction=True,
)
LLAMA_EMBED = Relative(
    name="llama-embed-nemotron",
    published="nvidia/llama-embed-nemotron-8b",
    mask=Mask.BIDIRECTIONAL,
    pooling=Pooling.MEAN,
    ends=False,
)
LLAMA_EMBEDQA = Relative(
    name="llama-nv-embedqa",
    published="nvidia/llama-3.2-nv-embedqa-1b-v2",
    mask=Mask.BIDIRECTIONAL,
    pooling=Pooling.MEAN,
    ends=False,
    template="",
    default_prompt="passage: ",
    prompts={"query": "query: ", "document": "passage: "},
    matryoshka=Matryoshka(smallest=384, listed=(384, 512, 768, 1024, 2048)),
)
E5_MISTRAL = Relative(
    name="e5-mistral",
    published="intfloat/e5-mistral-7b-instruct, Salesforce/SFR-Embedding-Mistral, Linq-AI-Research/Linq-Embed-Mistral",
    mask=Mask.CAUSAL,
    pooling=Pooling.LAST,
    windowed=True,
    end_survives=True,
)
GRITLM = Relative(
    name="GritLM",
    published="GritLM/GritLM-7B",
    mask=Mask.BIDIRECTIONAL,
    pooling=Pooling.MEAN,
    ends=False,
    mask_instruction=True,
    mask_begin=True,
    template="<|user|>\n{instruction}\n<|embed|>\n",
    default_prompt="<|embed|>\n",
)
QWEN3_EMBEDDING = Relative(
    name="Qwen3-Embedding",
    published="Qwen/Qwen3-Embedding-0.6B, -4B, -8B",
    mask=Mask.CAUSAL,
    pooling=Pooling.LAST,
    qk_norm=True,
    begins=False,
    end_by_tokenizer=True,
    end_survives=True,
    template="Instruct: {instruction}\nQuery:",
    matryoshka=Matryoshka(smallest=32),
)
GTE_QWEN2 = Relative(
    name="gte-Qwen2",
    published="Alibaba-NLP/gte-Qwen2-7B-instruct, -1.5B-instruct",
    mask=Mask.BIDIRECTIONAL,
    pooling=Pooling.LAST,
    qkv_bias=True,
    begins=False,
    end_survives=True,
)
FAMILY = {
    item.name: item for item in (NV_EMBED, LLAMA_EMBED, LLAMA_EMBEDQA, E5_MISTRAL, GRITLM, QWEN3_EMBEDDING, GTE_QWEN2)
}
EMBEDQA_HIDDEN = 2048
"""Both bidirectional Llamas have one model type; the 1 B model is told by its width."""


RMS_NORM_EPS = 1e-6
"""Where a config leaves it out: the default of transformers' Mistral, Llama, Qwen2 and Qwen3."""


def recognize(config: Mapping[str, Any], *, source: str = "config.json") -> Relative:
    """The row of the family that a `config.json` belongs to.

    Raises:
        CheckpointError: It belongs to none, or does not tell its mask; the known ones are listed.
    """
    kind = config.get("model_type")
    names = config.get("architectures") or [""]
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    remote = str(config.get("auto_map") or "").lower()
    found: Relative | None = None
    if kind == NVEMBED_MODEL_TYPE:
        found = NV_EMBED
    elif kind == "llama_bidirec" or architecture == "LlamaBidirectionalModel":
        found = LLAMA_EMBEDQA if config.get("hidden_size") == EMBEDQA_HIDDEN else LLAMA_EMBED
    elif kind == "mistral" and "gritlm" in remote:
        found = GRITLM
    elif kind == "mistral" and architecture == "MistralModel":
        found = E5_MISTRAL
    elif kind == "qwen3":
        found = QWEN3_EMBEDDING
    elif kind == "qwen2" and (config.get("is_causal") is False or "modeling_qwen." in remote):
        found = GTE_QWEN2
    if found is None:
        known = "; ".join(f"{item.name} ({item.published})" for item in FAMILY.values())
        raise CheckpointError(
            f"{source}: model_type {kind!r} with architecture {architecture!r} is no embedder that this toolkit knows, "
            f"so its mask and pooling would be guesses; known are: {known}"
        )
    stated = config.get("is_causal")
    if isinstance(stated, bool) and stated != (found.mask is Mask.CAUSAL):
        raise CheckpointError(
            f"{source}: is_causal is {stated}, and {found.name} is {found.mask.value}: one of the two is wrong, and so "
            "would the vectors be; correct the file"
        )
    return found


def read_architecture(config: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
    """Reads a checkpoint's `config.json`.

    Args:
        config: The parsed file.
        source: What to call the file in an error.

    Raises:
        CheckpointError: The architecture is not in the family, a field is missing or of another type, or a field asks
            for something the models of this kind do not have.
    """
    relative = recognize(config, source=source)
    text = _section(config, "text_config", source) if relative is NV_EMBED else config
    latent = _section(config, "latent_attention_config", source) if relative is NV_EMBED else {}
    _refuse_unknown_variants(relative, text, config, latent, source)
    hidden = _number(text, "hidden_size", source)
    heads = _number(text, "num_attention_heads", source)
    rope = _rope(text, source)
    theta = rope.get("rope_theta")
    return ModelConfig(
        relative=relative.name,
        hidden_size=hidden,
        intermediate_size=_number(text, "intermediate_size", source),
        layers=_number(text, "num_hidden_layers", source),
        heads=heads,
        kv_heads=_number(text, "num_key_value_heads", source, heads),
        head_dim=_number(text, "head_dim", source, hidden // max(heads, 1)),
        vocab_size=_number(text, "vocab_size", source),
        max_positions=_number(text, "max_position_embeddings", source, 32768),
        rope_theta=float(_number(text, "rope_theta", source, 10000.0 if theta is None else float(theta))),
        rms_norm_eps=float(_number(text, "rms_norm_eps", source, RMS_NORM_EPS)),
        mask=relative.mask,
        pooling=relative.pooling,
        latent=_latent(latent, hidden, config, source) if relative is NV_EMBED else None,
        mask_instruction=bool(config.get("is_mask_instruction", relative.mask_instruction)),
        rope_scaling=_rope_scaling(rope, source),
        sliding_window=_number(text, "sliding_window", source, 0) or None if relative.windowed else None,
        qkv_bias=relative.qkv_bias,
        qk_norm=relative.qk_norm,
        matryoshka=relative.matryoshka,
    )


def read_checkpoint_architecture(folder: Path) -> ModelConfig:
    """Reads `folder/config.json`.

    Raises:
        CheckpointError: The file is missing, is not JSON, or describes another architecture.
    """
    return read_architecture(read_json(folder / "config.json"), source=str(folder / "config.json"))


def _latent(latent: Mapping[str, Any], hidden: int, config: Mapping[str, Any], source: str) -> LatentAttention:
    stated = config.get("hidden_size", hidden)  # v1's file has no top-level copy
    if stated != hidden:
        raise CheckpointError(f"{source}: hidden_size is {stated} at the top and {hidden} in text_config")
    defaults = LatentAttention()
    for name in ("hidden_dim", "latent_dim"):
        if latent.get(name, 4096) != hidden:
            raise CheckpointError(
                f"{source}: latent_attention_config.{name} is {latent.get(name, 4096)}; it must equal "
                f"hidden_size {hidden}"
            )
    return LatentAttention(
        latents=_number(latent, "num_latents_value", source, defaults.latents),
        heads=_number(latent, "num_cross_heads", source, defaults.heads),
        head_dim=_number(latent, "cross_dim_head", source, defaults.head_dim),
    )


def _rope(text: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What stands of the rotary positions in a section of their own; transformers 5 has the second."""
    fields = [field for field in ("rope_scaling", "rope_parameters") if text.get(field) is not None]
    return {key: value for field in fields for key, value in _section(text, field, source).items()}


def _rope_scaling(rope: Mapping[str, Any], source: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(
            f"{source}: rope_scaling is of type {kind!r}; this toolkit computes 'llama3' or none, so its vectors would "
            "be wrong"
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
        raise CheckpointError(f"{source}: {name!r} is missing or not an object; this is not NV-Embed's config.json")
    return section


def _number(config: Mapping[str, Any], name: str, source: str, default: Any = None) -> Any:
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"{source}: {name!r} is missing")
    kinds = (int, float) if isinstance(default, float) else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise CheckpointError(f"{source}: {name!r} is {value!r}, not a number of the expected kind")
    return value


def _refuse_unknown_variants(
    relative: Relative, text: Mapping[str, Any], config: Mapping[str, Any], latent: Mapping[str, Any], source: str
) -> None:
    """Refuses what would load and then compute something else."""
    wanted: list[tuple[Mapping[str, Any], str, tuple[Any, ...]]] = [
        (text, "hidden_act", ("silu", None)),
        (text, "mlp_bias", (False, None)),
        (text, "use_sliding_window", (False, None)),
        (config, "pooling", ("avg", "mean", None) if relative.pooling is not Pooling.LAST else ("last", None)),
    ]
    if not relative.qkv_bias:
        wanted.append((text, "attention_bias", (False, None)))
    if relative is NV_EMBED:
        wanted += [
            (text, "model_type", ("bidir_mistral",)),
            (text, "rope_scaling", (None,)),
            (config, "padding_side", ("right", None)),
            (latent, "output_normalize", (True, None)),
        ]
    for section, name, allowed in wanted:
        if section.get(name) not in allowed:
            raise CheckpointError(
                f"{source}: {name} is {section.get(name)!r}; this model computes {allowed[0]!r} only, so its vectors "
                "would be wrong"
            )
