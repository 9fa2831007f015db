"""The PyTorch reference behind the backend protocol: what every other backend is compared with. Needs torch."""

from __future__ import annotations

from pathlib import Path

import torch

from nvembed_deploy.backends.base import Output
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.tokenization import TokenBatch


class PyTorchBackend:
    """A checkpoint in PyTorch, unfolded: in FP32 on the CPU, which is the truth, or as one would deploy it on a GPU.

    Args:
        checkpoint: A local folder in Hugging Face layout.
        layers: Take this many of the decoder's layers; None for all.
        device: PyTorch's name of the device.
        half: Weights and arithmetic in FP16 in place of FP32; pooling stays in FP32.

    Raises:
        CheckpointError: See `load_checkpoint`.
    """

    profile = None
    in_flight = 1

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        layers: int | None = None,
        device: str = "cpu",
        half: bool = False,
    ) -> None:
        self.model = load_checkpoint(checkpoint, layers=layers, dtype=torch.float16 if half else torch.float32).to(
            device
        )
        self._device = device
        self.name = f"PyTorch {torch.__version__} {'fp16' if half else 'fp32'} ({device.upper()})"

    @torch.inference_mode()
    def run(self, batch: TokenBatch) -> Output:
        """Embeds a batch."""
        embeddings, norms = self.model(*(torch.from_numpy(part).to(self._device) for part in batch))
        return Output(embeddings.cpu().numpy(), norms.cpu().numpy())

    run_concurrent = run
