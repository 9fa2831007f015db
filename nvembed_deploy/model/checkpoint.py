"""Reads a checkpoint folder into the reference model: every key and shape checked, nothing loaded silently."""

from __future__ import annotations

from pathlib import Path

import torch

from nvembed_deploy.model.family import read_checkpoint_architecture
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.model.weights import StoredWeights


def load_checkpoint(folder: str | Path, *, layers: int | None = None, dtype: torch.dtype = torch.float32) -> NVEmbed:
    """Loads a checkpoint of NV-Embed or a relative.

    Args:
        folder: A local folder in Hugging Face layout (`config.json`, safetensors in one file or in shards).
        layers: Take this many of the decoder's layers only: a smaller model of true width.
        dtype: Type of the parameters; stored values are converted tensor by tensor.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        CheckpointError: A file is missing or damaged, or a tensor is missing, extra or of another shape than
            `config.json` asks for: each is named.
        ConfigError: The decoder has fewer layers.
    """
    folder = Path(folder)
    config = read_checkpoint_architecture(folder).slice(layers)
    weights = StoredWeights(folder, config)
    with torch.device("meta"):
        model = NVEmbed(config)
    loaded = {name: weights.read(name).to(dtype) for name in weights.tensors}
    model.load_state_dict(loaded, strict=True, assign=True)
    return model.requires_grad_(False).eval()
