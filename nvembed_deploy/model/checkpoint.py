"""Loading a checkpoint folder into the reference model, with every key and shape checked."""

from __future__ import annotations

from pathlib import Path

import torch

from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.model.weights import StoredWeights


def load_checkpoint(
    folder: str | Path, *, config: ModelConfig | None = None, dtype: torch.dtype = torch.float32
) -> NVEmbed:
    """Loads a checkpoint of a supported model family.

    Args:
        folder: A local folder in Hugging Face layout (`config.json`, safetensors in one file or in shards).
        config: Its architecture, perhaps sliced; None to read it from the folder.
        dtype: Type of the parameters; stored values are converted tensor by tensor.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        CheckpointError: A file is missing or damaged, or a tensor is missing, unexpected or of another shape than
            `config.json` requires; the message names it.
    """
    folder = Path(folder)
    config = config or read_checkpoint_architecture(folder)
    weights = StoredWeights(folder, config)
    with torch.device("meta"):
        model = NVEmbed(config)
    state = {name: weights.read(name).to(dtype) for name in weights.tensors}
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()
