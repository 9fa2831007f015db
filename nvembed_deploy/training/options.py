"""Numbers of the training loop. No torch here, so that a command's help shows them fast."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much each part of the loss counts."""

    distillation: float = 2.0
    """Of 1 - cosine to the teacher."""
    match: float = 1.0
    """Of finding one's own teacher vector in the batch."""
    pairs: float = 0.3
    """Of finding the positive of each query in the batch."""


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Numbers of the optimizer and of the checkpoints."""

    learning_rate: float = 6e-4
    weight_decay: float = 0.01
    warmup_steps: int = 50
    schedule: str = "cosine"
    save_steps: int = 100
    keep: int = 3
    """Checkpoints that stay on disk."""
    log_steps: int = 10
    seed: int = 1
    bf16: bool = True
    """Autocast: faster than FP32 where the processor has bf16 matrix units."""
