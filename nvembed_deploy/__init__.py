"""NV-Embed on TensorRT: text in, vectors out, provably the same as in PyTorch.

>>> from nvembed_deploy import Encoder
>>> vectors = Encoder("engine.plan").encode(["What is idempotent?"], instruction="Given a question, retrieve passages")

Importing this loads neither torch nor TensorRT.
"""

from nvembed_deploy.coalesce import Coalescer
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    DeployError,
    DeviceMismatchError,
    EngineError,
    ExportError,
    InputError,
    InputTypeError,
    MissingExtra,
    NumericsError,
    OverloadedError,
    ParityError,
)
from nvembed_deploy.version import __version__

__all__ = [
    "BundleError",
    "CheckpointError",
    "Coalescer",
    "ConfigError",
    "DeployError",
    "DeviceMismatchError",
    "Encoder",
    "EngineError",
    "ExportError",
    "InputError",
    "InputTypeError",
    "MissingExtra",
    "NumericsError",
    "OverloadedError",
    "ParityError",
    "__version__",
]
