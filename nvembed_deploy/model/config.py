"""The architecture of a model: sizes, mask and pooling. `family.py` reads it from a checkpoint's `config.json`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from nvembed_deploy.errors import ConfigError


class Mask(str, Enum):
    """Attention mask: the tokens that a token attends to, padding excluded."""

    BIDIRECTIONAL = "bidirectional"
    CAUSAL = "causal"
    """Itself and the tokens before it."""


class Pooling(str, Enum):
    """Pooling of token states into one vector."""

    LATENT = "latent"
    """NV-Embed's latent attention, followed by the mean."""
    MEAN = "mean"
    LAST = "last"
    """The state of the last token."""


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Sizes of the pooler. Source: `latent_attention_config`, and defaults of NVIDIA's `configuration_nvembed.py`."""

    latents: int = 512
    heads: int = 8
    head_dim: int = 4096
    """Width of one head; the inner width is `heads * head_dim` (32,768 in NV-Embed), not the hidden size."""
    feed_forward_mult: int = 4


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Parameters of Llama 3's scaling of long wavelengths. Source: `rope_scaling` with `rope_type` llama3."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and self.high_freq_factor > self.low_freq_factor > 0):
            raise ConfigError(
                f"config.json: rope_scaling has factor {self.factor}, low_freq_factor {self.low_freq_factor} and "
                f"high_freq_factor {self.high_freq_factor}; they must satisfy factor >= 1 and high > low > 0"
            )


@dataclass(frozen=True, kw_only=True)
class Matryoshka:
    """Dimensions that vectors may be truncated to, if the model was trained for it. Source: arXiv 2205.13147."""

    min_dim: int
    dims: tuple[int, ...] = ()
    """The only dimensions allowed; empty if every dimension from `min_dim` on is."""

    def allows(self, dim: int, full_dim: int) -> bool:
        """Returns True if vectors of `full_dim` dimensions may be truncated to `dim`."""
        return dim == full_dim or (dim in self.dims if self.dims else self.min_dim <= dim <= full_dim)

    def __str__(self) -> str:
        return ", ".join(map(str, self.dims)) if self.dims else f"{self.min_dim} and more"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a checkpoint: a decoder, its attention mask, and the pooling of its tokens."""

    family: str
    """Name of the model family, a key of `family.MODEL_FAMILIES`."""
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
    """Sizes of the latent-attention pooler; None for other poolings."""
    mask_instruction: bool
    """True if instruction tokens take part in attention but not in pooling (`is_mask_instruction`)."""
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    """Tokens that a token attends to under a causal mask, itself included; None for all tokens before it."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """True if the queries and keys of each head are normalized before the rotary embedding."""
    matryoshka: Matryoshka | None = None
    sliced: bool = False
    """True if only the first layers of the checkpoint are used."""

    def parameters(self, *, fold: bool) -> dict[str, int]:
        """Returns the number of parameters of each component: embeddings, decoder, norms and pooler.

        Args:
            fold: Count the pooler with its latent attention folded, see `fold.py`.
        """
        D, h = self.hidden_size, self.head_dim
        attention = D * h * (2 * self.heads + 2 * self.kv_heads)
        biases = h * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        norms = self.layers * (2 * D + (2 * h if self.qk_norm else 0)) + D
        pooler = 0
        if self.latent is not None:
            inner, ffn_dim = self.latent.heads * self.latent.head_dim, self.latent.feed_forward_mult * D
            feed_forward = 2 * ffn_dim * (D + 1) + D * (ffn_dim + 1) + 2 * D
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
        """Returns the number of parameters of each component that a quantized precision stores in its own format."""
        D = self.hidden_size
        attention = D * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return {
            "decoder": self.layers * (attention + 3 * D * self.intermediate_size),
            "pooler": 0 if self.latent is None else 3 * self.latent.feed_forward_mult * D * D,
        }

    def slice(self, layers: int | None) -> ModelConfig:
        """Returns the architecture with only the first `layers` layers; None keeps all of them.

        Raises:
            ConfigError: The model has fewer layers.
        """
        if layers is None or layers == self.layers:
            return self
        if not 1 <= layers <= self.layers:
            raise ConfigError(
                f"--layers must be between 1 and {self.layers}, the layers of this checkpoint; got {layers}"
            )
        return replace(self, layers=layers, sliced=True)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config.json: {name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"config.json: {self.heads} attention heads are not a multiple of {self.kv_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"config.json: head_dim must be even for rotary position embeddings, got {self.head_dim}")
        if (self.latent is None) != (self.pooling is not Pooling.LATENT):
            raise ConfigError(f"config.json: pooling is {self.pooling.value}, which contradicts its latent attention")
        if self.sliding_window is not None and (self.sliding_window < 1 or self.mask is not Mask.CAUSAL):
            raise ConfigError(
                f"config.json: sliding_window must be at least 1 and needs a causal mask, got {self.sliding_window}"
            )
