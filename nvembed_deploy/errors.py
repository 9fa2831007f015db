"""The exceptions of this library. Each message says what was asked, what was found and what to do."""

from __future__ import annotations


class DeployError(Exception):
    """Base class of every error that this library raises deliberately; commands print it as one line and exit 1."""


class ConfigError(DeployError, ValueError):
    """A setting or an option is invalid: the message names the flag or the field."""


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
    """A plan was built for another device, TensorRT version or operating system than the one found."""


class ParityError(DeployError):
    """A candidate's vectors differ from the reference's by more than the tolerances allow."""


class MaskError(ParityError):
    """A graph's attention mask differs from its model's: a fault that a higher precision does not fix."""


class NumericsError(DeployError):
    """An engine returned a vector that is not finite or not of unit length."""


class OverloadedError(DeployError):
    """Too many texts wait for the engine, or it is shutting down: the same request may succeed later."""


class DeadlineError(DeployError):
    """A request could not be completed before its deadline, and was not run to its end."""


class MissingExtra(DeployError, ImportError):
    """An optional dependency is not installed: the message names the extra that provides it."""


def failure_reason(err: Exception) -> str:
    """Returns why a file cannot be read, without the path and the number that Python adds to a system error."""
    return (err.strerror if isinstance(err, OSError) else None) or str(err)


THREAD_LIMIT = "this process cannot start more threads; raise the limit (ulimit -u, or the container's pids limit)"


def is_thread_limit(err: RuntimeError) -> bool:
    """Whether Python could not start a thread, for which it has no class of error."""
    return "can't start new thread" in str(err)
