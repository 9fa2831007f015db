"""The architecture of a model: sizes, mask and pooling. `config_json.py` reads it from a checkpoint's `config.json`."""

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

    def __post_init__(self) -> None:
        if min(self.latents, self.heads, self.head_dim, self.feed_forward_mult) < 1:
            raise ConfigError(
                f"config.json: the latent attention has {self.latents} latents and {self.heads} heads of "
                f"{self.head_dim}; each must be at least 1"
            )


class RopeKind(str, Enum):
    """Scaling of the rotary position embedding's frequencies, by its name in `rope_type`."""

    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Parameters of a scaling of the rotary frequencies. Source: `rope_scaling` or `rope_parameters`."""

    kind: RopeKind = RopeKind.LLAMA3
    factor: float
    low_freq_factor: float = 0.0
    """Llama 3 only, as is the next."""
    high_freq_factor: float = 0.0
    original_max_positions: int = 0
    """Positions before the scaling; 0 for a linear one."""
    beta_fast: float = 32.0
    """YaRN only, as are the following."""
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether the range of blended frequencies is rounded to whole dimensions."""
    attention_factor: float = 1.0
    """Factor on the cosines and sines."""
    query_scale_beta: float = 0.0
    """Ministral 3's growth of queries beyond the original positions; texts are limited to those if it is not 0."""

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ConfigError(f"config.json: rope_scaling has factor {self.factor}; it must be at least 1")
        if self.kind is RopeKind.LLAMA3 and not self.high_freq_factor > self.low_freq_factor > 0:
            raise ConfigError(
                f"config.json: rope_scaling has low_freq_factor {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; they must satisfy high > low > 0"
            )
        if self.kind is RopeKind.YARN and not (self.beta_fast >= self.beta_slow > 0 and self.attention_factor > 0):
            raise ConfigError(
                f"config.json: rope_scaling has beta_fast {self.beta_fast}, beta_slow {self.beta_slow} and "
                f"attention_factor {self.attention_factor}; they must satisfy fast >= slow > 0 and attention_factor > 0"
            )
        if self.kind is not RopeKind.LINEAR and self.original_max_positions < 1:
            raise ConfigError(
                "config.json: rope_scaling has original_max_position_embeddings "
                f"{self.original_max_positions}; it must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class UserStatement:
    """What a user states about a checkpoint whose files leave it open."""

    mask: Mask | None = None
    pooling: Pooling | None = None
    query_prompt: str | None = None
    """Verbatim prefix of queries, or a template with `{instruction}`."""
    document_prompt: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What is stated, in words."""
        values = {
            "mask": self.mask,
            "pooling": self.pooling,
            "query prompt": self.query_prompt,
            "document prompt": self.document_prompt,
        }
        return tuple(name for name, value in values.items() if value is not None)


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
    """Window of attention, None for no limit. Under a causal mask it is the number of tokens that a token attends to,
    itself included; under a bidirectional one it is the number on each side, itself not included."""
    windowed_layers: tuple[int, ...] | None = None
    """Layers that apply the window; None for all of them."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """True if the queries and keys of each head are normalized before the rotary embedding."""
    matryoshka: Matryoshka | None = None
    sliced: bool = False
    """True if only the first layers of the checkpoint are used."""
    stated_by_user: tuple[str, ...] = ()
    """Properties that the checkpoint does not state and the user did, such as the mask or the pooling."""

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
        windowed = self.windowed_layers and tuple(layer for layer in self.windowed_layers if layer < layers)
        return replace(self, layers=layers, sliced=True, windowed_layers=windowed)

    def has_window(self, layer: int) -> bool:
        """Returns True if a decoder layer limits attention to the window."""
        if self.sliding_window is None:
            return False
        return self.windowed_layers is None or layer in self.windowed_layers

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim", "vocab_size")
        for name in (*sizes, "max_positions"):
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
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"config.json: sliding_window must be at least 1, got {self.sliding_window}")
        if self.windowed_layers is not None and not set(self.windowed_layers) <= set(range(self.layers)):
            raise ConfigError(
                f"config.json: layers {self.windowed_layers} have a window, but the model has {self.layers}"
            )
        if not (self.rms_norm_eps > 0 and self.rope_theta > 1):
            raise ConfigError(
                f"config.json: rms_norm_eps is {self.rms_norm_eps} and rope_theta {self.rope_theta}; they must be "
                "greater than 0 and 1"
            )
