"""The PyTorch reference behind the backend protocol: what every other backend is compared with. Needs torch."""

from __future__ import annotations

from pathlib import Path

import torch

from nvembed_deploy.backends import Output
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.text import TokenBatch


class ReferenceBackend:
    """A checkpoint in FP32 on the CPU, unfolded.

    Args:
        checkpoint: A local folder in Hugging Face layout.
        layers: Take this many of the decoder's layers; None for all.

    Raises:
        CheckpointError: See `load_checkpoint`.
    """

    profile = None

    def __init__(self, checkpoint: str | Path, *, layers: int | None = None) -> None:
        self.model = load_checkpoint(checkpoint, layers=layers)
        self.name = f"PyTorch {torch.__version__} fp32 (CPU)"

    @torch.inference_mode()
    def run(self, batch: TokenBatch) -> Output:
        """Embeds a batch."""
        embeddings, norms = self.model(*(torch.from_numpy(part) for part in batch))
        return Output(embeddings.numpy(), norms.numpy())
