"""The model to be trained: a decoder-only language model with the causal mask removed and a fresh pooler on top.

A base is a folder in Hugging Face layout: a Mistral (`model_type` mistral, safetensors, tokenizer.json), or an NV-Embed
checkpoint, such as the first stage's.
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
from nvembed_deploy.model.family import NVEMBED_MODEL_TYPE, read_architecture
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.model.weights import weight_files
from nvembed_deploy.spec import read_json
from nvembed_deploy.tokenization import TextContract

INIT_STD = 0.02
RESIDUAL_SCALE = 0.1
"""The pooler's projections back into the residual stream start small, so that it starts as nearly a plain mean."""
_RESIDUAL = re.compile(r"(to_out|fn\.net\.2)\.weight$")
POOLER = "latent_attention_model."


@dataclass(frozen=True, kw_only=True)
class Student:
    """A model to be trained, and what its folder needs."""

    model: NVEmbed
    config: dict[str, Any]
    """Content of `config.json`."""
    tokenizer_json: str
    contract: TextContract


def read_base(folder: Path, *, latent: LatentAttention | None = None, seed: int = 1) -> Student:
    """Reads a base, with its pooler where it has one.

    Args:
        folder: See the module's text.
        latent: Sizes of a fresh pooler; by default NVIDIA's, its heads as wide as the base. Not for NV-Embed bases.
        seed: Of the fresh pooler's weights.

    Raises:
        CheckpointError: A file is missing, or the architecture is another one.
    """
    stated = read_json(folder / "config.json")
    if stated.get("model_type") == NVEMBED_MODEL_TYPE:
        model = load_checkpoint(folder).requires_grad_(True)
        config = {**stated, "text_config": {**stated["text_config"]}}
        config.setdefault("hidden_size", model.config.hidden_size)  # NV-Embed-v1 leaves it out
        config["text_config"].setdefault("max_position_embeddings", model.config.max_positions)
    else:
        width = stated.get("hidden_size", 4096)
        config = nvembed_config(stated, latent or LatentAttention(head_dim=width), source=str(folder / "config.json"))
        model = _with_pooler(folder, read_architecture(config), seed)
    tokenizer_path = folder / "tokenizer.json"
    try:
        tokenizer_json = tokenizer_path.read_text(encoding="utf-8")
    except OSError as err:
        raise CheckpointError(f"{tokenizer_path} cannot be read ({err.strerror}); a base needs it") from err
    return Student(
        model=model, config=config, tokenizer_json=tokenizer_json, contract=contract(read_architecture(config))
    )


def nvembed_config(base: dict[str, Any], latent: LatentAttention, *, source: str = "config.json") -> dict[str, Any]:
    """NVIDIA's `config.json` around a Mistral's.

    Raises:
        CheckpointError: The base is no Mistral.
    """
    if base.get("model_type") != "mistral":
        raise CheckpointError(
            f"{source}: model_type is {base.get('model_type')!r}; a base is a Mistral or an NV-Embed checkpoint"
        )
    name = base.get("_name_or_path") or "nv-embed"
    kept = (
        *("attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range"),
        *("intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
        *("num_key_value_heads", "rms_norm_eps", "sliding_window", "vocab_size"),
    )
    text = {name: base[name] for name in kept if name in base}
    rope = base.get("rope_parameters") or {}  # transformers 5 writes the base of the wavelengths there
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
            **text,
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
    """How ids and masks are made: `<s>` text `</s>`, padded with `</s>`, as NVIDIA's."""
    return TextContract(
        prefix_ids=(1,), suffix_ids=(2,), pad_id=2, mask_prompt=config.mask_instruction, max_tokens=config.max_positions
    )


def _with_pooler(folder: Path, config: ModelConfig, seed: int) -> NVEmbed:
    with torch.device("meta"):
        model = NVEmbed(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    loaded: dict[str, Tensor] = {}
    for name, tensor in _decoder_tensors(folder):
        if wanted.get(name) != tensor.shape:
            raise CheckpointError(f"{folder}: {name} has shape {list(tensor.shape)}, not what config.json asks for")
        loaded[name] = tensor.float()
    missing = [name for name in wanted if name not in loaded and not name.startswith(POOLER)]
    if missing:
        raise CheckpointError(f"{folder} lacks {missing[0]}; its weights are not those of its config.json")
    source = torch.Generator().manual_seed(seed)
    for name, shape in wanted.items():
        if name.startswith(POOLER):
            loaded[name] = _fresh(name, shape, source)
    model.load_state_dict(loaded, strict=True, assign=True)
    return model


def _decoder_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The decoder's tensors under NVIDIA's names; the language model's head is left out."""
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in sorted(shard.keys()):
                    if not name.startswith("lm_head."):
                        yield f"embedding_model.{name.removeprefix('model.')}", shard.get_tensor(name)
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{path} is damaged ({err}); download it again") from err


def _fresh(name: str, shape: Sequence[int], source: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith((".norm.weight", ".norm_context.weight")) else torch.zeros(shape)
    scale = INIT_STD * (RESIDUAL_SCALE if _RESIDUAL.search(name) else 1.0)
    return torch.randn(shape, generator=source) * scale
