"""Backend that runs a checkpoint in PyTorch, the reference for all other backends. Needs torch."""

from __future__ import annotations

from pathlib import Path

import torch

from nvembed_deploy.backends.base import Output
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.model.float32 import full_float32
from nvembed_deploy.tokenization import TokenBatch


class PyTorchBackend:
    """A checkpoint in PyTorch without folding: in FP32 on the CPU as the reference, or in FP16 on a GPU as deployed.

    Args:
        checkpoint: A local folder in Hugging Face layout.
        config: Architecture of the checkpoint, such as a bundle's; None to read it from the folder.
        device: PyTorch's name of the device.
        half: Use FP16 weights and arithmetic instead of FP32; pooling stays in FP32.

    Raises:
        CheckpointError: See `load_checkpoint`.
    """

    profile = None
    in_flight = 1

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        config: ModelConfig | None = None,
        device: str = "cpu",
        half: bool = False,
    ) -> None:
        self.model = load_checkpoint(checkpoint, config=config, dtype=torch.float16 if half else torch.float32).to(
            device
        )
        self._device = device
        self.name = f"PyTorch {torch.__version__} {'fp16' if half else 'fp32'} ({device.upper()})"

    @full_float32()
    @torch.inference_mode()
    def run(self, batch: TokenBatch) -> Output:
        """Embeds a batch."""
        embeddings, norms = self.model(*(torch.from_numpy(array).to(self._device) for array in batch))
        return Output(embeddings.cpu().numpy(), norms.cpu().numpy())

    run_concurrent = run
