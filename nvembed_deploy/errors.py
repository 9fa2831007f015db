"""The errors that users meet: one small family, each message says what was asked, what was found and what to do."""

from __future__ import annotations


class DeployError(Exception):
    """Base of every error this library raises on purpose; a command line prints it as one line and exits 1."""


class ConfigError(DeployError, ValueError):
    """A setting or an option does not fit: the message names the flag or the field."""


class InputError(DeployError, ValueError):
    """A text cannot be embedded: the message names its index in the input."""


class InputTypeError(DeployError, TypeError):
    """A text is not a `str`: the message names its index in the input."""


class CheckpointError(DeployError):
    """A checkpoint folder is incomplete, damaged, or of another architecture."""


class BundleError(DeployError):
    """A bundle's files are missing, damaged, or do not belong together."""


class HubError(CheckpointError, BundleError):
    """A model could not be downloaded from the Hugging Face hub."""


class ExportError(DeployError):
    """A graph or a plan could not be made."""


class EngineError(DeployError):
    """A backend could not load or run an engine."""


class DeviceMismatchError(EngineError):
    """A plan was built for another device, TensorRT or operating system than the one found."""


class ParityError(DeployError):
    """A candidate's vectors are not within the tolerance table of the reference's."""


class MaskError(ParityError):
    """A graph's mask is not its model's: a fault that no higher precision mends."""


class NumericsError(DeployError):
    """A vector came out that is not finite or not of unit length."""


class OverloadedError(DeployError):
    """Too much is waiting for the engine, or it shuts down: the same request may succeed later."""


class DeadlineError(DeployError):
    """A request could not be done in its time, and was not run to its end."""


class MissingExtra(DeployError, ImportError):
    """An optional dependency is not installed: the message names the extra that holds it."""
