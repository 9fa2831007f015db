"""What a model is: sizes, mask and pooling, as frozen dataclasses. `family.py` tells how a checkpoint says it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from nvembed_deploy.errors import ConfigError


class Mask(str, Enum):
    """Which real tokens a token sees."""

    BIDIRECTIONAL = "bidirectional"
    CAUSAL = "causal"
    """Itself and those before it."""


class Pooling(str, Enum):
    """What makes one vector of a text's tokens."""

    LATENT = "latent"
    """NV-Embed's latent attention, then the mean."""
    MEAN = "mean"
    LAST = "last"
    """The last token's state."""


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Sizes of the pooler. Source: `latent_attention_config` and NVIDIA's `configuration_nvembed.py` defaults."""

    latents: int = 512
    heads: int = 8
    head_dim: int = 4096
    """Width of one head: the inner width is `heads * head_dim` (32,768 in NV-Embed), not the hidden size."""
    feed_forward_mult: int = 4


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretching of the long wavelengths. Source: `rope_scaling` with `rope_type` llama3."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and self.high_freq_factor > self.low_freq_factor > 0):
            raise ConfigError(
                f"config.json: rope_scaling has factor {self.factor}, low_freq_factor {self.low_freq_factor} and "
                f"high_freq_factor {self.high_freq_factor}; it needs factor >= 1 and high > low > 0"
            )


@dataclass(frozen=True, kw_only=True)
class Matryoshka:
    """Widths that vectors may be cut to, because the model was trained for it. Source: arXiv 2205.13147."""

    smallest: int
    listed: tuple[int, ...] = ()
    """The only ones; empty where every width from `smallest` on will do."""

    def allows(self, width: int, full: int) -> bool:
        """True if vectors of `full` numbers may be cut to `width`."""
        return width == full or (width in self.listed if self.listed else self.smallest <= width <= full)

    def __str__(self) -> str:
        return ", ".join(map(str, self.listed)) if self.listed else f"{self.smallest} and more"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a checkpoint of any size: a decoder, its mask, and what pools its tokens."""

    relative: str
    """Name of the row in `family.FAMILY`."""
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
    mask: Mask
    pooling: Pooling
    latent: LatentAttention | None
    """Sizes of the pooler where `pooling` is latent, else None."""
    mask_instruction: bool
    """True where instruction tokens attend but are not pooled (`is_mask_instruction`)."""
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    """Tokens that a causal token sees, itself included; None for all before it."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """True where each head's query and key are normed before they are turned."""
    matryoshka: Matryoshka | None = None
    sliced: bool = False
    """True where the checkpoint has more layers, and only the first ones are taken."""

    def parameters(self, *, fold: bool) -> dict[str, int]:
        """Numbers of each component: embeddings, linear layers of the decoder, pooler, norms.

        Args:
            fold: Whether the latent attention is folded.
        """
        D, h = self.hidden_size, self.head_dim
        attention = D * h * (2 * self.heads + 2 * self.kv_heads)
        biases = h * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        norms = self.layers * (2 * D + (2 * h if self.qk_norm else 0)) + D
        pooler = 0
        if self.latent is not None:
            inner, wide = self.latent.heads * self.latent.head_dim, self.latent.feed_forward_mult * D
            feed_forward = 2 * wide * (D + 1) + D * (wide + 1) + 2 * D
            folded = 2 * D * self.latent.heads * self.latent.latents + 2 * D
            unfolded = 4 * inner * D + self.latent.latents * D + 4 * D
            pooler = feed_forward + (folded if fold else unfolded)
        return {
            "embeddings": self.vocab_size * D,
            "decoder": self.layers * (attention + 3 * D * self.intermediate_size + biases),
            "norms": norms,
            "pooler": pooler,
        }

    def linear_weights(self) -> dict[str, int]:
        """Of `parameters`, those that a quantized precision stores in its own format."""
        D = self.hidden_size
        attention = D * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return {
            "decoder": self.layers * (attention + 3 * D * self.intermediate_size),
            "pooler": 0 if self.latent is None else 3 * self.latent.feed_forward_mult * D * D,
        }

    def slice(self, layers: int | None) -> ModelConfig:
        """The model of the first `layers` layers; of all for None.

        Raises:
            ConfigError: There are fewer.
        """
        if layers is None or layers == self.layers:
            return self
        if not 1 <= layers <= self.layers:
            raise ConfigError(f"--layers is {layers}; this checkpoint has 1 to {self.layers}")
        return replace(self, layers=layers, sliced=True)

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
        if (self.latent is None) != (self.pooling is not Pooling.LATENT):
            raise ConfigError(f"config.json: pooling is {self.pooling.value}, which does not fit its latent attention")
        if self.sliding_window is not None and (self.sliding_window < 1 or self.mask is not Mask.CAUSAL):
            raise ConfigError(f"config.json: sliding_window is {self.sliding_window}; only a causal mask has one")
