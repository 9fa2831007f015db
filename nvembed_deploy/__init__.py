"""NV-Embed on TensorRT: text in, vectors out, provably the same as in PyTorch.

>>> from nvembed_deploy import Encoder
>>> vectors = Encoder("engine.plan").encode(["What is idempotent?"], instruction="Given a question, retrieve passages")

Importing the package loads nothing else; a name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

from nvembed_deploy.version import __version__

if TYPE_CHECKING:
    from nvembed_deploy.coalescer import Coalescer
    from nvembed_deploy.encoder import Encoder
    from nvembed_deploy.errors import (
        BundleError,
        CheckpointError,
        ConfigError,
        DeadlineError,
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

__all__ = [
    "BundleError",
    "CheckpointError",
    "Coalescer",
    "ConfigError",
    "DeadlineError",
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
_MODULES = {"Coalescer": "coalescer", "Encoder": "encoder"}
"""Modules of the public names that are not in `errors`."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
