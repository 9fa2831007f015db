"""Reads the architecture of a checkpoint from its `config.json` and its sentence-transformers files.

Nothing is guessed. A checkpoint belongs to a family of `family.py`, or is of one of transformers' own decoder classes
and states its pooling. transformers is the definition of those classes, fields that the file leaves out included; a
file that contradicts itself, or requests what is not computed here, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvembed_deploy.errors import CheckpointError, ConfigError
from nvembed_deploy.model.config import LatentAttention, Mask, ModelConfig, Pooling, RopeScaling, UserStatement
from nvembed_deploy.model.family import (
    E5_MISTRAL,
    GRITLM,
    GTE_QWEN2,
    LLAMA_BIDIREC,
    LLAMA_EMBED,
    LLAMA_EMBEDQA,
    MODEL_FAMILIES,
    NV_EMBED,
    NVEMBED_MODEL_TYPE,
    QWEN3_EMBEDDING,
    STOCK_CLASSES,
    STOCK_FAMILIES,
    ModelFamily,
    StockClass,
)
from nvembed_deploy.model.fields import Fields
from nvembed_deploy.model.rope import read_rope
from nvembed_deploy.model.sentence_transformers_files import (
    POOLINGS,
    StatedPooling,
    StatedPrompts,
    read_pooling,
    read_prompts,
)
from nvembed_deploy.model.window import read_window
from nvembed_deploy.spec import read_json

CONFIG_JSON = "config.json"
ADAPTER = "adapter_config.json"
EMBEDQA_HIDDEN, LLAMA_EMBED_HIDDEN = 2048, 4096
"""NVIDIA's bidirectional Llamas have the same model type; their prompts are known by the hidden size."""
E5_VOCABULARY = 32000
"""Checkpoints with more tokens, such as bge-en-icl, have prompts of their own."""
NOTHING_STATED = UserStatement()
LLAMA_REMOTE = StockClass(name="LlamaBidirectional", max_positions=2048)
NVEMBED_TEXT = StockClass(name="NVEmbed", max_positions=32768)


def read_checkpoint_architecture(
    folder: Path, statement: UserStatement = NOTHING_STATED, origins: dict[str, str] | None = None
) -> ModelConfig:
    """Reads the architecture of a checkpoint.

    Args:
        folder: A local folder in Hugging Face layout.
        statement: What the user states about it.
        origins: Filled with where each property was read.

    Raises:
        CheckpointError: A file is missing or damaged, the model is not supported, or the files contradict each other.
        ConfigError: The user states what the files state otherwise.
    """
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder} has an unmerged adapter ({ADAPTER}), whose weights would be left out; merge it first: python -c "
            f"\"from peft import AutoPeftModel as A; A.from_pretrained('{folder}').merge_and_unload()"
            ".save_pretrained('merged')\", and copy the tokenizer's files to the new folder"
        )
    return read_architecture(
        read_json(folder / CONFIG_JSON),
        source=str(folder / CONFIG_JSON),
        pooling=read_pooling(folder),
        prompts=read_prompts(folder),
        statement=statement,
        origins=origins,
    )


def read_architecture(
    config: Mapping[str, Any],
    *,
    source: str = CONFIG_JSON,
    pooling: StatedPooling | None = None,
    prompts: StatedPrompts | None = None,
    statement: UserStatement = NOTHING_STATED,
    origins: dict[str, str] | None = None,
) -> ModelConfig:
    """Reads a parsed `config.json`; see `read_checkpoint_architecture`.

    Args:
        config: The parsed file.
        source: Name of the file in error messages.
        pooling: What the checkpoint's pooling module states.
        prompts: What the checkpoint's prompts state.
        statement: What the user states.
        origins: Filled with where each property was read.
    """
    top = Fields(config, source, {} if origins is None else origins)
    family = recognize(top, pooling=pooling, prompts=prompts, statement=statement)
    text = top.section("text_config") if family is NV_EMBED else top
    for section in (top, text):
        section.require("quantization_config", (None,), family.name)
        section.require("transformers_weights", (None,), family.name)
    stock = _class_of(family, top)
    _refuse_unknown_variants(family, stock, text, top)
    mask = _mask(family, top, statement)
    model_pooling = _pooling(family, top, pooling, statement)
    hidden_size, heads = text.number("hidden_size"), text.number("num_attention_heads")
    if hidden_size < 1 or heads < 1:
        raise ConfigError(
            f"{source}: hidden_size is {hidden_size} and num_attention_heads {heads}; both must be at least 1"
        )
    layers = text.number("num_hidden_layers")
    theta, scaling = read_rope(text, stock.rope)
    # NVIDIA's, GritLM's and gte's own code bypasses the window.
    windowed = replace(stock, has_window=False, has_layer_windows=False) if family.own_code else stock
    window, windowed_layers = read_window(text, windowed, layers)
    return ModelConfig(
        family=family.name,
        hidden_size=hidden_size,
        intermediate_size=text.number("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=text.number("num_key_value_heads", stock.kv_heads or heads, null=heads),
        head_dim=_head_dim(stock, text, hidden_size // heads),
        vocab_size=text.number("vocab_size"),
        max_positions=_max_positions(stock, text, scaling),
        rope_theta=theta,
        rms_norm_eps=text.number("rms_norm_eps", stock.rms_norm_eps),
        mask=mask,
        pooling=model_pooling,
        latent=_latent(top, hidden_size) if family is NV_EMBED else None,
        mask_instruction=_masks_instruction(family, top, pooling, model_pooling),
        rope_scaling=scaling,
        sliding_window=window,
        windowed_layers=windowed_layers,
        qkv_bias=stock.qkv_bias,
        qk_norm=stock.qk_norm,
        matryoshka=family.matryoshka,
        stated_by_user=statement.names,
    )


def recognize(
    top: Fields,
    *,
    pooling: StatedPooling | None = None,
    prompts: StatedPrompts | None = None,
    statement: UserStatement = NOTHING_STATED,
) -> ModelFamily:
    """Returns the family of a checkpoint.

    Raises:
        CheckpointError: It belongs to none, its code is unknown, or its prompts are not known and not stated.
    """
    model_type, architecture = top.values.get("model_type"), _architecture(top)
    code = _remote_code(top)
    stock = STOCK_CLASSES.get(str(model_type))
    family: ModelFamily | None
    if model_type == NVEMBED_MODEL_TYPE and architecture == "NVEmbedModel":
        family = NV_EMBED
    elif model_type == "llama_bidirec" and architecture == "LlamaBidirectionalModel":
        by_size = {EMBEDQA_HIDDEN: LLAMA_EMBEDQA, LLAMA_EMBED_HIDDEN: LLAMA_EMBED}
        family = by_size.get(top.values.get("hidden_size", 0), LLAMA_BIDIREC)
    elif stock is not None and architecture in stock.architectures:
        remote = {"mistral": GRITLM, "qwen2": GTE_QWEN2}.get(str(model_type))
        family = remote if code else _stock_family(str(model_type), top, pooling, prompts, statement)
    else:
        raise CheckpointError(
            f"{top.path}: model_type {model_type!r} with architecture {architecture!r} is not a supported embedding "
            f"model{_hint(top)}, so its mask and pooling are unknown. Supported: {_supported()}"
        )
    if family is None or (code and not _is_known(code, family)):
        raise CheckpointError(
            f"{top.path}: auto_map names {code!r}, which is not the code of a supported model and may compute another "
            "mask or pooling. If it computes what transformers' own class does, remove auto_map and state the rest "
            "with --mask and --pooling"
        )
    no_prompts = prompts is None and statement.query_prompt is None and statement.document_prompt is None
    if family is LLAMA_BIDIREC and no_prompts:
        raise CheckpointError(
            f"{top.path}: the prompts of a {architecture} of hidden size {top.values.get('hidden_size')} are not "
            "known; add its config_sentence_transformers.json, or pass --query-prompt and --document-prompt"
        )
    top.note("family", f"{family.name}: model_type {model_type!r}, architecture {architecture!r} in {top.path}")
    return family


def _stock_family(
    model_type: str,
    top: Fields,
    pooling: StatedPooling | None,
    prompts: StatedPrompts | None,
    statement: UserStatement,
) -> ModelFamily:
    """Returns the family of published checkpoints that a checkpoint of transformers' own class belongs to, if any.

    Qwen3-Embedding is known by its prompts: without them sentence-transformers adds none, and a family would.
    e5-mistral's relatives do not all state theirs, and need the EOS that their tokenizer.json forgets.
    """
    candidates = {"qwen3": QWEN3_EMBEDDING, "mistral": E5_MISTRAL}
    family = candidates.get(model_type, STOCK_FAMILIES[model_type])
    template = None if prompts is None else prompts.template
    is_relative = (
        family.mask is Mask.CAUSAL
        and top.values.get("is_causal", True) is True
        and pooling is not None
        and pooling.pooling is Pooling.LAST
        and statement.mask in (None, Mask.CAUSAL)
        and (template == family.template or (template is None and family is E5_MISTRAL))
        and top.values.get("use_sliding_window") in (None, False)
    )
    if family is E5_MISTRAL:
        has_own_tokens = top.number("vocab_size") > E5_VOCABULARY
        is_relative = is_relative and _architecture(top) == "MistralModel" and not has_own_tokens
    return family if is_relative else STOCK_FAMILIES[model_type]


def _architecture(top: Fields) -> str:
    """Returns the only name in `architectures`."""
    names = top.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(
            f"{top.path}: architectures is {names!r}; it must be a list with the name of the model's class, because "
            "the class defines what is computed"
        )
    return names[0]


def _remote_code(top: Fields) -> str:
    """Returns the module and class that `auto_map` names for the model, or "" if it names none."""
    auto_map = top.values.get("auto_map")
    if auto_map is None:
        return ""
    if not isinstance(auto_map, dict):
        raise CheckpointError(f"{top.path}: auto_map must be an object, got {auto_map!r}")
    names = [auto_map.get(key) for key in ("AutoModel", "AutoModelForCausalLM")]
    return str(next((name for name in (*names, *auto_map.values()) if name), ""))


def _is_known(code: str, family: ModelFamily) -> bool:
    module, _, class_name = code.rpartition("--")[2].partition(".")
    return module in family.own_code or class_name in family.own_code


def _hint(top: Fields) -> str:
    if isinstance(top.values.get("text_config"), dict):
        return " (it is a vision-language layout, whose text decoder is one of several parts)"
    return (
        " (a classifier returns scores instead of vectors)" if "ForSequenceClassification" in _architecture(top) else ""
    )


def _supported() -> str:
    return "; ".join(f"{family.name} ({family.published})" for family in MODEL_FAMILIES.values())


def _class_of(family: ModelFamily, top: Fields) -> StockClass:
    if family is NV_EMBED:
        return NVEMBED_TEXT
    return STOCK_CLASSES.get(str(top.values["model_type"]), LLAMA_REMOTE)


def _mask(family: ModelFamily, top: Fields, statement: UserStatement) -> Mask:
    is_causal = top.values.get("is_causal")
    if "is_causal" in top.values and not isinstance(is_causal, bool):
        raise CheckpointError(f"{top.path}: is_causal is {is_causal!r}; it must be true or false")
    in_file = None if is_causal is None else Mask.CAUSAL if is_causal else Mask.BIDIRECTIONAL
    if in_file is not None and family.mask not in (None, in_file):
        raise CheckpointError(
            f"{top.path}: is_causal is {is_causal}, but the mask of {family.name} is {family.mask.value}. One of them "
            "is wrong and would lead to wrong vectors; correct the file"
        )
    bidirectional = top.values.get("use_bidirectional_attention")
    mask = family.mask or in_file or statement.mask or Mask.CAUSAL
    if bidirectional not in (None, mask is Mask.BIDIRECTIONAL) or (bidirectional and family.name in _stock_names()):
        raise CheckpointError(
            f"{top.path}: use_bidirectional_attention is {bidirectional!r}, which transformers ignores for this class; "
            'write "is_causal": false for a bidirectional mask, or remove the field'
        )
    if statement.mask not in (None, mask):
        known_from = f"is_causal in {top.path}" if in_file is not None else f"the family {family.name}"
        raise ConfigError(f"--mask is {statement.mask.value}, but the mask is {mask.value} according to {known_from}")
    origin = f"family {family.name}"
    if family.mask is None:
        origin = (
            "stated by --mask"
            if statement.mask
            else "transformers' default of the class, as is_causal is not in the file"
        )
        origin = f"is_causal in {top.path}" if in_file is not None else origin
    top.note("mask", f"{mask.value}: {origin}")
    return mask


def _stock_names() -> set[str]:
    return {family.name for family in (*STOCK_FAMILIES.values(), E5_MISTRAL, QWEN3_EMBEDDING)}


def _pooling(family: ModelFamily, top: Fields, module: StatedPooling | None, statement: UserStatement) -> Pooling:
    """Returns the pooling, on which the family, the pooling module, `pooling` of `config.json` and the user agree."""
    statements: dict[str, Pooling] = {}
    if family.pooling is not None:
        # NV-Embed's last step after its latent attention is a mean, which is what its pooling module states.
        statements[f"family {family.name}"] = family.pooling
    if module is not None:
        if module.pooling is None:
            raise CheckpointError(
                f"{module.path} has pooling {', '.join(sorted(module.modes))}, which is not supported. Supported: "
                "mean, lasttoken"
            )
        statements[module.path] = module.pooling
    name = top.values.get("pooling")
    if name is not None:
        if not isinstance(name, str) or name not in POOLINGS:
            raise CheckpointError(
                f"{top.path}: pooling is {name!r}, which is not supported for {family.name} and would lead to wrong "
                "vectors. Supported: 'avg', 'mean', 'last'"
            )
        statements[f"pooling in {top.path}"] = POOLINGS[name]
    if statement.pooling is not None:
        statements["--pooling"] = statement.pooling
    if not statements or (family is GTE_QWEN2 and module is None):
        raise CheckpointError(
            f"{top.path}: the pooling of this {_architecture(top)} is not stated, so its vectors would be a guess. Add "
            "the checkpoint's 1_Pooling/config.json, or pass --pooling mean or --pooling last"
        )
    effective = {Pooling.MEAN if pooling is Pooling.LATENT else pooling for pooling in statements.values()}
    if len(effective) > 1:
        words = " and ".join(f"{pooling.value} according to {origin}" for origin, pooling in statements.items())
        raise CheckpointError(
            f"the pooling is {words}. One of them is wrong and would lead to wrong vectors; correct it"
        )
    pooling = family.pooling or next(iter(statements.values()))
    top.note("pooling", f"{pooling.value}: {', '.join(statements)}")
    return pooling


def _masks_instruction(family: ModelFamily, top: Fields, module: StatedPooling | None, pooling: Pooling) -> bool:
    excluded = module is not None and not module.include_prompt and pooling is not Pooling.LAST
    if family.pooling is None:
        return excluded
    masked = top.boolean("is_mask_instruction", family.mask_instruction)
    if excluded and not masked:
        assert module is not None
        raise CheckpointError(
            f"{module.path} excludes the prompt from pooling, but {family.name} pools it. One of them is wrong and "
            "would lead to wrong vectors; correct the file, or remove it"
        )
    return masked


def _head_dim(stock: StockClass, text: Fields, quotient: int) -> int:
    default = quotient if stock.head_dim is None else stock.head_dim
    if stock.name == "Qwen3" and "head_dim" in text.values:
        return int(text.number("head_dim"))
    return int(text.number("head_dim", default, null=quotient))


def _max_positions(stock: StockClass, text: Fields, scaling: RopeScaling | None) -> int:
    positions = int(text.number("max_position_embeddings", stock.max_positions))
    if scaling is not None and scaling.query_scale_beta:
        text.note(
            "length",
            f"{scaling.original_max_positions} tokens, beyond which queries grow (llama_4_scaling_beta in {text.path})",
        )
        return min(positions, scaling.original_max_positions)
    text.note("length", f"{positions} tokens: max_position_embeddings")
    return positions


def _latent(top: Fields, hidden_size: int) -> LatentAttention:
    latent = top.section("latent_attention_config")
    top_level_size = top.values.get("hidden_size", hidden_size)  # v1's file has no top-level copy
    if top_level_size != hidden_size:
        raise CheckpointError(
            f"{top.path}: hidden_size is {top_level_size} at the top level but {hidden_size} in text_config"
        )
    for name in ("hidden_dim", "latent_dim"):
        if (size := latent.values.get(name, 4096)) != hidden_size:
            raise CheckpointError(
                f"{top.path}: latent_attention_config.{name} must equal hidden_size {hidden_size}, got {size}"
            )
    latent.require("output_normalize", (True,), NV_EMBED.name)
    defaults = LatentAttention()
    return LatentAttention(
        latents=latent.number("num_latents_value", defaults.latents),
        heads=latent.number("num_cross_heads", defaults.heads),
        head_dim=latent.number("cross_dim_head", defaults.head_dim),
    )


def _refuse_unknown_variants(family: ModelFamily, stock: StockClass, text: Fields, top: Fields) -> None:
    """Refuses variants that would load but compute something else."""
    text.require("hidden_act", ("silu",), family.name)
    text.require("mlp_bias", (False,), family.name)
    if not stock.qkv_bias:  # or transformers ignores it, as Qwen2's biases are fixed
        text.require("attention_bias", (False,), family.name)
    if family is NV_EMBED:
        if "model_type" not in text.values:
            raise CheckpointError(f"{text.path}: text_config has no model_type; it must be 'bidir_mistral'")
        text.require("model_type", ("bidir_mistral",), family.name)
        text.require("rope_scaling", (None,), family.name)
        top.require("padding_side", ("right",), family.name)
        top.require("mask_type", ("b",), family.name)
    elif family.own_code:
        text.require("use_sliding_window", (False,), family.name)
