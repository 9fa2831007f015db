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
        remember: Keep every batch's output: an export asks for the same batches once for each graph and attempt.

    Raises:
        CheckpointError: See `load_checkpoint`.
    """

    profile = None

    def __init__(self, checkpoint: str | Path, *, layers: int | None = None, remember: bool = False) -> None:
        self.model = load_checkpoint(checkpoint, layers=layers)
        self._known: dict[bytes, Output] | None = {} if remember else None
        self.name = f"PyTorch {torch.__version__} fp32 (CPU)"

    def run(self, batch: TokenBatch) -> Output:
        """Embeds a batch."""
        if self._known is None:
            return self._compute(batch)
        key = repr(batch.input_ids.shape).encode() + b"".join(part.tobytes() for part in batch)
        if key not in self._known:
            self._known[key] = self._compute(batch)
        return self._known[key]

    @torch.inference_mode()
    def _compute(self, batch: TokenBatch) -> Output:
        embeddings, norms = self.model(*(torch.from_numpy(part) for part in batch))
        return Output(embeddings.numpy(), norms.numpy())
