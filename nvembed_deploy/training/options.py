"""Numbers of a training run. No torch here, so that a command's help shows them fast."""

from __future__ import annotations

from dataclasses import dataclass, field

NEGATIVES = 7
NEGATIVE_MARGIN = 0.95
"""A text is a negative only below this share of the positive's score by the teacher.

Source: NV-Retriever's TopKPercPos, arXiv 2407.15831, as used by NV-Embed."""


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much each part of the loss counts; all but `pairs` and `consistency` need a teacher."""

    pairs: float = 1.0
    """Of finding the positive of each query among its candidates."""
    distillation: float = 0.0
    """Of 1 - cosine to the teacher's vector."""
    tokens: float = 0.0
    """Of the squared error to the teacher's token states."""
    match: float = 0.0
    """Of finding one's own teacher vector in the batch."""
    centering: float = 0.0
    """Share of the teacher's mean vector of texts that the targets of instructed questions lose, `losses.centered`. The
    teacher knows no instructions; without this, distillation teaches that they mean nothing."""
    consistency: float = 0.0
    """Of 1 - cosine of an instructed text to the same model's own vector of it without the instruction: what the prompt
    tokens leave in a text's tokens by accident. With `centering`, a question is held to that vector centered."""

    @property
    def need_teacher(self) -> bool:
        """True where a part compares with the teacher."""
        return bool(self.distillation or self.tokens or self.match)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters instead of full fine-tuning. Source of the numbers: NV-Embed, section 4."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.1


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """One contrastive stage. The defaults are the paper's for a 7 B base, where it tells them."""

    in_batch: bool
    """Stage one: all texts of the batch compete. Stage two: a query's own negatives alone."""
    negatives: int = NEGATIVES
    temperature: float = 0.02
    """Divides the cosines. The paper does not tell its own; 0.02 is usual for models of this size."""
    weights: LossWeights = field(default_factory=LossWeights)
    learning_rate: float = 2e-5
    muon_learning_rate: float = 0.0
    """Of weight matrices by Muon; 0 for AdamW alone. For training from scratch, not for a trained base."""
    relative_steps: bool = False
    """The decoder's learning rate counts in units of its own rows; see `optimizer.RelativeAdamW`."""
    main_wording: float = 0.0
    """Share of instructed texts with the first wording of their kind; the others, and those with a label, get any."""
    noise: float = 0.0
    """Of every linear layer's output, as a share of its size, during training: what stands it can be quantized."""
    weight_decay: float = 0.03
    warmup_steps: int = 500
    schedule: str = "linear"
    epochs: int = 1
    max_steps: int = -1
    """Stops there; -1 for the end of the data."""
    batch_rows: int = 128
    """Most texts of a batch, negatives included."""
    batch_tokens: int = 65536
    """Most padded tokens of a batch."""
    max_length: int = 512
    """Most tokens of a text, instruction included."""
    held_out: int = 0
    """Examples that are not trained on, for evaluation at every save."""
    save_steps: int = 100
    keep: int = 2
    """Training states that stay on disk."""
    log_steps: int = 10
    seed: int = 1
    bf16: bool = True
    """Autocast, where `device.bf16_is_fast`."""
    gradient_checkpointing: bool = False
    """Computes activations again instead of keeping them: for large models."""


STAGE_1 = StageOptions(in_batch=True)
STAGE_2 = StageOptions(in_batch=False, learning_rate=1.5e-5)
"""Source of the rates, the warm-up and the decay: NV-Embed's table of parameters, as recalled by others."""
