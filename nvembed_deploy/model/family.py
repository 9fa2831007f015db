"""The supported model families: backbone, mask, pooling and prompts of each. `config_json.py` recognizes them.

Sources: the checkpoints' own `config.json` and remote code, their model cards, and transformers 5.23 for its classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nvembed_deploy.model.config import Mask, Matryoshka, Pooling

NVEMBED_MODEL_TYPE = "nvembed"
INSTRUCT = "Instruct: {instruction}\nQuery: "
"""Source: NV-Embed section 4.3 and the model card; passages get no prompt. E5, Linq, SFR and gte use the same."""
NVIDIAS_CODE = "vectors of NVIDIA's own code"
TRANSFORMERS = "vectors of transformers"
GOLDEN_TRANSFORMERS = "stored vectors of transformers"


@dataclass(frozen=True, kw_only=True)
class StockClass:
    """What one of transformers' decoder classes computes, and what it assumes of fields that `config.json` leaves out.

    Source: `configuration_*.py` and `modeling_*.py` of transformers 5.23.
    """

    name: str
    """The class is `{name}Model`, and `{name}ForCausalLM` with a head that embedding does not need."""
    max_positions: int
    kv_heads: int | None = None
    """None for as many as attention heads."""
    head_dim: int | None = None
    """None for the hidden size divided by the attention heads."""
    rms_norm_eps: float = 1e-6
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_theta": 10000.0})
    sliding_window: int | None = None
    has_window: bool = False
    """True if `sliding_window` is applied to all layers."""
    has_layer_windows: bool = False
    """True if `use_sliding_window` and `layer_types` apply `sliding_window` to some layers."""
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def architectures(self) -> tuple[str, ...]:
        """Values of `architectures` that mean this class."""
        return f"{self.name}Model", f"{self.name}ForCausalLM"


STOCK_CLASSES = {
    "llama": StockClass(name="Llama", max_positions=2048),
    "mistral": StockClass(name="Mistral", max_positions=131072, kv_heads=8, sliding_window=4096, has_window=True),
    "ministral3": StockClass(
        name="Ministral3",
        max_positions=262144,
        kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        has_window=True,
        rope={
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "qwen2": StockClass(
        name="Qwen2", max_positions=32768, kv_heads=32, sliding_window=4096, has_layer_windows=True, qkv_bias=True
    ),
    "qwen3": StockClass(
        name="Qwen3",
        max_positions=32768,
        kv_heads=32,
        head_dim=128,
        sliding_window=4096,
        has_layer_windows=True,
        qk_norm=True,
    ),
}
"""transformers' classes by `model_type`."""


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """A group of published checkpoints with the same architecture options and prompts."""

    name: str
    published: str
    """Names of the published checkpoints."""
    evidence: str
    """What the family's vectors are compared with in the tests."""
    mask: Mask | None
    """None if the checkpoint states it."""
    pooling: Pooling | None
    """None if the checkpoint states it."""
    own_code: tuple[str, ...] = ()
    """Modules or classes of `auto_map` that compute this; any other code is refused."""
    tokenizer_adds_specials: bool = False
    """True if `tokenizer.json` alone decides which tokens begin and end a text, as for transformers."""
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
    evidence=NVIDIAS_CODE,
    own_code=("configuration_nvembed", "modeling_nvembed"),
    mask=Mask.BIDIRECTIONAL,
    pooling=Pooling.LATENT,
    mask_instruction=True,
)
LLAMA_EMBED = ModelFamily(
    name="llama-embed-nemotron",
    published="nvidia/llama-embed-nemotron-8b",
    evidence=GOLDEN_TRANSFORMERS,
    own_code=("LlamaBidirectionalModel", "LlamaBidirectionalConfig"),
    mask=Mask.BIDIRECTIONAL,
    pooling=Pooling.MEAN,
    add_eos=False,
)
LLAMA_EMBEDQA = ModelFamily(
    name="llama-nv-embedqa",
    published="nvidia/llama-nemotron-embed-1b-v2, formerly llama-3.2-nv-embedqa-1b-v2",
    evidence=GOLDEN_TRANSFORMERS,
    own_code=("LlamaBidirectionalModel", "LlamaBidirectionalConfig"),
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
    evidence=GOLDEN_TRANSFORMERS,
    mask=Mask.CAUSAL,
    pooling=Pooling.LAST,
    keep_eos_on_truncation=True,
)
GRITLM = ModelFamily(
    name="GritLM",
    published="GritLM/GritLM-7B",
    evidence=TRANSFORMERS,
    own_code=("modeling_gritlm7b", "modeling_gritlm"),
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
    evidence=GOLDEN_TRANSFORMERS,
    mask=Mask.CAUSAL,
    pooling=Pooling.LAST,
    add_bos=False,
    tokenizer_adds_eos=True,
    keep_eos_on_truncation=True,
    template="Instruct: {instruction}\nQuery:",
    matryoshka=Matryoshka(min_dim=32),
)
GTE_QWEN2 = ModelFamily(
    name="gte-Qwen2",
    published="Alibaba-NLP/gte-Qwen2-7B-instruct, -1.5B-instruct",
    evidence=TRANSFORMERS,
    own_code=("modeling_qwen",),
    mask=Mask.BIDIRECTIONAL,
    pooling=Pooling.LAST,
    add_bos=False,
    keep_eos_on_truncation=True,
)
LLAMA_BIDIREC = replace(
    LLAMA_EMBED,
    name="llama-bidirec",
    published="other checkpoints of `LlamaBidirectionalModel`, with the prompts that they state",
    template="",
)
STOCK_FAMILIES = {
    model_type: ModelFamily(
        name=stock.name,
        published=f"any checkpoint of `{stock.name}Model` that states its pooling"
        + (", such as nvidia/Nemotron-3-Embed-1B and -8B" if model_type == "ministral3" else ""),
        evidence=TRANSFORMERS,
        mask=None,
        pooling=None,
        tokenizer_adds_specials=True,
        keep_eos_on_truncation=True,
        template="",
    )
    for model_type, stock in STOCK_CLASSES.items()
}
"""Checkpoints of transformers' own classes, which are served from what they state."""
MODEL_FAMILIES = {
    family.name: family
    for family in (
        NV_EMBED, LLAMA_EMBED, LLAMA_EMBEDQA, E5_MISTRAL, GRITLM, QWEN3_EMBEDDING, GTE_QWEN2,
        LLAMA_BIDIREC, *STOCK_FAMILIES.values(),
    )
}  # fmt: skip
