"""Options of a training run. Imports no torch, so that a command's help is fast."""

from __future__ import annotations

from dataclasses import dataclass

NEGATIVES = 7
NEGATIVE_MARGIN = 0.95
"""A text is a negative only below this fraction of the teacher's score of the positive.

Source: NV-Retriever's TopKPercPos, arXiv 2407.15831, as used by NV-Embed."""


BLENDED, BY_SET = "blended", "by-set"
"""Orders of the examples: each step draws from all sets, as in the paper, or from one."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters instead of full fine-tuning. Source of the values: NV-Embed, section 4."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.1


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """Options of one contrastive stage. The defaults are the paper's for a 7 B base, where it gives them."""

    in_batch: bool
    """Stage one: all documents of the batch are candidates. Stage two: only a query's own negatives."""
    queries_compete: bool = False
    """With `in_batch`, other queries and single texts are candidates too; in the paper, documents only."""
    negatives: int = NEGATIVES
    temperature: float = 0.02
    """Divides the cosines. The paper does not give its value; 0.02 is usual for models of this size."""
    learning_rate: float = 2e-5
    weight_decay: float = 0.03
    warmup_steps: int = 500
    schedule: str = "linear"
    epochs: int = 1
    max_steps: int = -1
    """Stops after this many steps; -1 trains on all data."""
    batch_queries: int = 128
    """Examples of a step over all devices, each with its positive and its negatives."""
    order: str = BLENDED
    """What a step consists of: examples of all sets, or of one set."""
    chunk_tokens: int = 16384
    """Maximum number of padded tokens of one forward pass; a larger batch is computed in chunks."""
    instructed: float = 1.0
    """Fraction of the examples that are instructed."""
    max_length: int = 512
    """Maximum number of tokens of a text, instruction included."""
    held_out: int = 0
    """Number of examples held out for evaluation at every save."""
    save_steps: int = 100
    keep: int = 2
    """Number of training states that are kept on disk."""
    log_steps: int = 10
    seed: int = 1
    bf16: bool = True
    """Autocast to bf16 if `device.bf16_is_fast`."""
    shard: bool = False
    """Shards weights, gradients and optimizer state over all processes; see `sharding.py`."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward pass instead of storing them: for large models."""


STAGE_1 = StageOptions(in_batch=True)
STAGE_2 = StageOptions(in_batch=False, learning_rate=1.5e-5)
"""Source of learning rates, warm-up and decay: NV-Embed's table of parameters, as quoted by others."""
