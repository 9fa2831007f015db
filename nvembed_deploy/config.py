"""What a model, a precision and a shape are: frozen dataclasses, read from NVIDIA's `config.json` or from a flag.

No torch here, and no reading of weights: `model/checkpoint.py` does that.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from nvembed_deploy.errors import CheckpointError, ConfigError

NVEMBED_MODEL_TYPE = "nvembed"


class Precision(str, Enum):
    """Number format of the engine's weights and activations; norms, pooling and L2 stay in FP32 in all of them."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    """Linear layers in INT8, weights and inputs, and all else in FP16."""
    FP8 = "fp8"
    """The same in FP8 (E4M3)."""
    INT4 = "int4"
    """Weights of the linear layers in INT4, in blocks, and all else in FP16."""

    @property
    def quantized(self) -> bool:
        """True where linear layers have another format than all else."""
        return self in (Precision.INT8, Precision.FP8, Precision.INT4)

    @property
    def has_cpu_graph(self) -> bool:
        """True where CPUs run another graph than the engine's: they have neither BF16 nor FP16 arithmetic."""
        return self is Precision.BF16 or self.quantized

    @property
    def base(self) -> Precision:
        """The format of what is not quantized."""
        return Precision.FP16 if self.quantized else self


class Dialect(str, Enum):
    """Which ONNX operators a graph is written in."""

    FUSED = "fused"
    """Opset 23 with Attention, RMSNormalization and RotaryEmbedding: TensorRT 11 and TensorRT-RTX."""
    PORTABLE = "portable"
    """Opset 20 with primitive operators: TensorRT 10 and JetPack 6."""

    @property
    def opset(self) -> int:
        """ONNX opset version of the dialect. TensorRT 10 parses up to 20, TensorRT 11 up to 25."""
        return 23 if self is Dialect.FUSED else 20


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Sizes of the pooler. Source: `latent_attention_config` and NVIDIA's `configuration_nvembed.py` defaults."""

    latents: int = 512
    heads: int = 8
    head_dim: int = 4096
    """Width of one head: the inner width is `heads * head_dim` (32,768 in NV-Embed), not the hidden size."""
    feed_forward_mult: int = 4


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of an NV-Embed checkpoint of any size."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float
    latent: LatentAttention
    mask_instruction: bool
    """True where instruction tokens attend but are not pooled (`is_mask_instruction`)."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config.json: {name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"config.json: {self.heads} attention heads cannot share {self.kv_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise ConfigError(f"config.json: head_dim is {self.head_dim}; rotary positions need an even width")

    @classmethod
    def from_json(cls, config: dict[str, Any], *, source: str = "config.json") -> ModelConfig:
        """Reads NVIDIA's `config.json`.

        Args:
            config: The parsed file.
            source: What to call the file in an error.

        Raises:
            CheckpointError: The architecture is not NV-Embed's, a field is missing or of another type, or a field asks
                for something this model does not have (RoPE scaling, another activation, biases).
        """
        if config.get("model_type") != NVEMBED_MODEL_TYPE:
            raise CheckpointError(
                f"{source}: model_type is {config.get('model_type')!r}, not one this toolkit knows "
                f"({NVEMBED_MODEL_TYPE!r}); pass the folder of an NV-Embed checkpoint"
            )
        text = _section(config, "text_config", source)
        latent = _section(config, "latent_attention_config", source)
        _refuse_unknown_variants(text, config, latent, source)
        hidden = _number(text, "hidden_size", source)
        heads = _number(text, "num_attention_heads", source)
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
        return cls(
            hidden_size=hidden,
            intermediate_size=_number(text, "intermediate_size", source),
            layers=_number(text, "num_hidden_layers", source),
            heads=heads,
            kv_heads=_number(text, "num_key_value_heads", source, heads),
            head_dim=_number(text, "head_dim", source, hidden // max(heads, 1)),
            vocab_size=_number(text, "vocab_size", source),
            max_positions=_number(text, "max_position_embeddings", source, 32768),
            rope_theta=float(_number(text, "rope_theta", source, 10000.0)),
            rms_norm_eps=float(_number(text, "rms_norm_eps", source, 1e-5)),
            latent=LatentAttention(
                latents=_number(latent, "num_latents_value", source, defaults.latents),
                heads=_number(latent, "num_cross_heads", source, defaults.heads),
                head_dim=_number(latent, "cross_dim_head", source, defaults.head_dim),
            ),
            mask_instruction=bool(config.get("is_mask_instruction", True)),
        )

    @classmethod
    def from_checkpoint(cls, folder: Path) -> ModelConfig:
        """Reads `folder/config.json`.

        Raises:
            CheckpointError: The file is missing, is not JSON, or describes another architecture.
        """
        return cls.from_json(read_json(folder / "config.json"), source=str(folder / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a checkpoint.

    Raises:
        CheckpointError: The file is missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; a checkpoint folder holds config.json, tokenizer.json and *.safetensors"
        ) from None
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(f"{path} cannot be read as JSON ({err}); download the file again") from err
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object; download the file again")
    return value


def _section(config: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    section = config.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(f"{source}: {name!r} is missing or not an object; this is not NV-Embed's config.json")
    return section


def _number(config: dict[str, Any], name: str, source: str, default: Any = None) -> Any:
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"{source}: {name!r} is missing")
    kinds = (int, float) if isinstance(default, float) else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise CheckpointError(f"{source}: {name!r} is {value!r}, not a number of the expected kind")
    return value


def _refuse_unknown_variants(text: dict[str, Any], config: dict[str, Any], latent: dict[str, Any], source: str) -> None:
    """Refuses what would load and then compute something else."""
    wanted: tuple[tuple[dict[str, Any], str, tuple[Any, ...]], ...] = (
        (text, "model_type", ("bidir_mistral",)),
        (text, "hidden_act", ("silu", None)),
        (text, "rope_scaling", (None,)),
        (text, "attention_bias", (False, None)),
        (config, "padding_side", ("right", None)),
        (latent, "output_normalize", (True, None)),
    )
    for section, name, allowed in wanted:
        if section.get(name) not in allowed:
            raise CheckpointError(
                f"{source}: {name} is {section.get(name)!r}; this model computes {allowed[0]!r} only, so its vectors "
                "would be wrong"
            )


MAX_ELEMENTS = 2**31 - 1
_SHAPE = re.compile(r"^\s*(\d+)\s*[xX×]\s*(\d+)\s*$")


@dataclass(frozen=True, kw_only=True, order=True)
class Shape:
    """A batch of texts: `batch` rows of `tokens` ids."""

    batch: int
    tokens: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.tokens < 1:
            raise ConfigError(f"shape {self.batch}x{self.tokens}: batch and tokens must be at least 1")
        if self.batch * self.tokens > MAX_ELEMENTS:
            raise ConfigError(f"shape {self.batch}x{self.tokens} has more than {MAX_ELEMENTS} ids, TensorRT's limit")

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads `BATCHxTOKENS`, such as `8x64`.

        Raises:
            ConfigError: The text is not two whole numbers joined by x.
        """
        match = _SHAPE.match(text)
        if match is None:
            raise ConfigError(f"shape {text!r} is not BATCHxTOKENS; write 8x64 for 8 texts of 64 tokens")
        return cls(batch=int(match[1]), tokens=int(match[2]))

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}"


@dataclass(frozen=True, kw_only=True)
class ShapeProfile:
    """TensorRT's optimization profile: the shapes a plan accepts, and the one it is tuned for."""

    min: Shape
    opt: Shape
    max: Shape

    def __post_init__(self) -> None:
        for name, low, high in (("--opt", self.min, self.opt), ("--max", self.opt, self.max)):
            if high.batch < low.batch or high.tokens < low.tokens:
                raise ConfigError(
                    f"{name} {high} is smaller than {low}; profiles need --min <= --opt <= --max in batch and in tokens"
                )

    def __str__(self) -> str:
        return f"{self.min} .. {self.opt} .. {self.max}"

    def holds(self, batch: int, tokens: int) -> bool:
        """True if a batch of this size is inside the profile."""
        return self.min.batch <= batch <= self.max.batch and self.min.tokens <= tokens <= self.max.tokens
