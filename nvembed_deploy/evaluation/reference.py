"""The PyTorch checkpoint that a bundle was made from, behind the same interface. Needs torch."""

from __future__ import annotations

from pathlib import Path

import torch

from nvembed_deploy.backends.reference import ReferenceBackend
from nvembed_deploy.bundle import hash_file
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError


class ReferenceEncoder(Encoder):
    """The checkpoint in PyTorch, given exactly the tokens that a bundle's engine is given.

    Args:
        checkpoint: A local folder in Hugging Face layout.
        like: The bundle's encoder.
        device: PyTorch's name of the device: `cpu` for FP32, the truth; `cuda` for FP16, as one would deploy it.

    Raises:
        ConfigError: The bundle was made from other weights.
        CheckpointError: The folder cannot be read.
    """

    def __init__(self, checkpoint: Path, like: Encoder, *, device: str = "cpu") -> None:
        for name, entry in like.manifest.source.files.items():
            path = checkpoint / name
            if path.suffix == ".safetensors" and (not path.is_file() or hash_file(path) != entry):
                raise ConfigError(
                    f"{name} of {checkpoint} is not what the bundle was made from; pass its own checkpoint as "
                    "--reference, or export it again"
                )
        self._bundle, self._text = like._bundle, like._text
        dtype = torch.float32 if device == "cpu" else torch.float16
        layers = like.manifest.source.architecture.layers
        self._backend = ReferenceBackend(checkpoint, layers=layers, device=device, dtype=dtype)
