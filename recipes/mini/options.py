"""Options of the mini's stages. Imports no torch, so that a command's help is fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from nvembed_deploy.training.options import StageOptions


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms of the loss; all but `pairs` and `consistency` need a teacher."""

    pairs: float = 1.0
    """Weight of finding the positive of each query among its candidates."""
    distillation: float = 0.0
    """Weight of 1 - cosine to the teacher's vector."""
    tokens: float = 0.0
    """Weight of the squared error to the teacher's token states."""
    match: float = 0.0
    """Weight of finding a row's own teacher vector in the batch."""
    centering: float = 0.0
    """Fraction of the teacher's mean vector that is subtracted from the targets of instructed questions; see
    `losses.centered`. The teacher knows no instructions; without this, distillation teaches to ignore them."""
    consistency: float = 0.0
    """Weight of 1 - cosine of an instructed text to the student's vector of the same text without the instruction: it
    removes what the prompt leaks into the text's tokens. With `centering`, the target of a question is centered."""

    @property
    def need_teacher(self) -> bool:
        """True if a term compares with the teacher."""
        return bool(self.distillation or self.tokens or self.match)


@dataclass(frozen=True, kw_only=True)
class MiniOptions(StageOptions):
    """Options of a stage that distils a teacher."""

    weights: LossWeights = field(default_factory=LossWeights)
    relative_steps: bool = False
    """The decoder's learning rate is relative to the size of each row; see `optimizer.RelativeAdamW`."""
    noise: float = 0.0
    """Noise on every linear layer's output during training, relative to its size; it prepares for quantization."""
