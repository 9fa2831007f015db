"""The PyTorch checkpoint that a bundle was made from, behind the same interface. Needs torch."""

from __future__ import annotations

from pathlib import Path

from nvembed_deploy.backends.reference import ReferenceBackend
from nvembed_deploy.bundle import hash_file
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError


class ReferenceEncoder(Encoder):
    """The checkpoint in PyTorch, FP32, given exactly the tokens that a bundle's engine is given.

    Args:
        checkpoint: A local folder in Hugging Face layout.
        like: The bundle's encoder.

    Raises:
        ConfigError: The bundle was made from other weights.
        CheckpointError: The folder cannot be read.
    """

    def __init__(self, checkpoint: Path, like: Encoder) -> None:
        for name, entry in like.manifest.source.files.items():
            path = checkpoint / name
            if path.suffix == ".safetensors" and (not path.is_file() or hash_file(path) != entry):
                raise ConfigError(
                    f"{name} of {checkpoint} is not what the bundle was made from; pass its own checkpoint as "
                    "--reference, or export it again"
                )
        self._bundle, self._text = like._bundle, like._text
        self._backend = ReferenceBackend(checkpoint, layers=like.manifest.source.architecture.layers)
