"""The model to be trained: a decoder-only language model without its causal mask and with a new pooler on top.

A base is a folder in Hugging Face layout: a Mistral (`model_type` mistral, safetensors, tokenizer.json), or an NV-Embed
checkpoint, such as the output of the first stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nvembed_deploy.errors import CheckpointError
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.config import LatentAttention, ModelConfig
from nvembed_deploy.model.config_json import read_architecture
from nvembed_deploy.model.family import NVEMBED_MODEL_TYPE
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.model.weights import weight_files
from nvembed_deploy.spec import read_json
from nvembed_deploy.tokenization import TextContract

INIT_STD = 0.02
RESIDUAL_SCALE = 0.1
"""The pooler's projections back into the residual stream start small, so that pooling starts close to a plain mean."""
_RESIDUAL = re.compile(r"(to_out|fn\.net\.2)\.weight$")
POOLER = "latent_attention_model."


@dataclass(frozen=True, kw_only=True)
class Student:
    """A model to be trained, with the other contents of its checkpoint folder."""

    model: NVEmbed
    config: dict[str, Any]
    """Content of `config.json`."""
    tokenizer_json: str
    contract: TextContract


def read_base(folder: Path, *, latent: LatentAttention | None = None, seed: int = 1) -> Student:
    """Reads a base, with its pooler if it has one.

    Args:
        folder: Folder of the base; see the module's docstring.
        latent: Sizes of a new pooler; by default NVIDIA's, with heads as wide as the base. Ignored for NV-Embed bases.
        seed: Seed of the new pooler's weights.

    Raises:
        CheckpointError: A file is missing, or the architecture is not supported.
    """
    base_config = read_json(folder / "config.json")
    if base_config.get("model_type") == NVEMBED_MODEL_TYPE:
        model = load_checkpoint(folder).requires_grad_(True)
        config = {**base_config, "text_config": {**base_config["text_config"]}}
        config.setdefault("hidden_size", model.config.hidden_size)  # missing from NV-Embed-v1
        config["text_config"].setdefault("max_position_embeddings", model.config.max_positions)
    else:
        hidden_size = base_config.get("hidden_size", 4096)
        config = nvembed_config(
            base_config, latent or LatentAttention(head_dim=hidden_size), source=str(folder / "config.json")
        )
        model = _with_pooler(folder, read_architecture(config), seed)
    tokenizer_path = folder / "tokenizer.json"
    try:
        tokenizer_json = tokenizer_path.read_text(encoding="utf-8")
    except OSError as err:
        raise CheckpointError(
            f"{tokenizer_path} cannot be read ({err.strerror}); a base needs a tokenizer.json"
        ) from err
    return Student(
        model=model, config=config, tokenizer_json=tokenizer_json, contract=contract(read_architecture(config))
    )


def nvembed_config(base: dict[str, Any], latent: LatentAttention, *, source: str = "config.json") -> dict[str, Any]:
    """Wraps the `config.json` of a Mistral in NVIDIA's.

    Raises:
        CheckpointError: The base is not a Mistral.
    """
    if base.get("model_type") != "mistral":
        raise CheckpointError(
            f"{source}: model_type is {base.get('model_type')!r}; a base must be a Mistral or an NV-Embed checkpoint"
        )
    name = base.get("_name_or_path") or "nv-embed"
    copied_fields = (
        *("attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range"),
        *("intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
        *("num_key_value_heads", "rms_norm_eps", "sliding_window", "vocab_size"),
    )
    text_config = {name: base[name] for name in copied_fields if name in base}
    rope = base.get("rope_parameters") or {}  # transformers 5 stores rope_theta there
    return {
        "_name_or_path": name,
        "add_eos": True,
        "add_pad_token": True,
        "architectures": ["NVEmbedModel"],
        "hidden_size": base["hidden_size"],
        "is_mask_instruction": True,
        "latent_attention_config": {
            "model_type": "latent_attention",
            "num_latents_value": latent.latents,
            "num_cross_heads": latent.heads,
            "output_normalize": True,
            "hidden_dim": base["hidden_size"],
            "latent_dim": base["hidden_size"],
            "cross_dim_head": latent.head_dim,
        },
        "mask_type": "b",
        "model_type": NVEMBED_MODEL_TYPE,
        "padding_side": "right",
        "text_config": {
            "_name_or_path": name,
            "architectures": ["MistralModel"],
            **text_config,
            "head_dim": base.get("head_dim") or base["hidden_size"] // base["num_attention_heads"],
            "model_type": "bidir_mistral",
            "pad_token_id": None,
            "rope_theta": base.get("rope_theta", rope.get("rope_theta", 10000.0)),
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "use_cache": False,
        },
        "torch_dtype": "float16",
    }


def contract(config: ModelConfig) -> TextContract:
    """Returns the rules for ids and masks: `<s>` text `</s>`, padded with `</s>`, as NVIDIA's."""
    return TextContract(
        prefix_ids=(1,), suffix_ids=(2,), pad_id=2, mask_prompt=config.mask_instruction, max_tokens=config.max_positions
    )


def _with_pooler(folder: Path, config: ModelConfig, seed: int) -> NVEmbed:
    with torch.device("meta"):
        model = NVEmbed(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in _decoder_tensors(folder):
        if shapes.get(name) != tensor.shape:
            raise CheckpointError(f"{folder}: {name} has shape {list(tensor.shape)}, which does not match config.json")
        tensors[name] = tensor.float()
    missing_keys = [name for name in shapes if name not in tensors and not name.startswith(POOLER)]
    if missing_keys:
        raise CheckpointError(f"{folder} has no {missing_keys[0]}; the weights do not match config.json")
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        if name.startswith(POOLER):
            tensors[name] = _initial_weight(name, shape, generator)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def _decoder_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the decoder's tensors under NVIDIA's names, without the language model's head."""
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in sorted(shard.keys()):
                    if not name.startswith("lm_head."):
                        yield f"embedding_model.{name.removeprefix('model.')}", shard.get_tensor(name)
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{path} is damaged ({err}); download it again") from err


def _initial_weight(name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith((".norm.weight", ".norm_context.weight")) else torch.zeros(shape)
    scale = INIT_STD * (RESIDUAL_SCALE if _RESIDUAL.search(name) else 1.0)
    return torch.randn(shape, generator=generator) * scale
