"""Loads the Python bindings of TensorRT or TensorRT-RTX, which share one API."""

from __future__ import annotations

import functools
import importlib
import logging
import platform
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from nvembed_deploy.console import install_command
from nvembed_deploy.errors import EngineError, MissingExtra

TENSORRT = "tensorrt"
TENSORRT_RTX = "tensorrt_rtx"
RUNTIMES = (TENSORRT, TENSORRT_RTX)
RTX_GPUS = ("8.0", "8.6", "8.9", "12.0")
"""Compute capabilities that TensorRT-RTX 1.7 builds for ahead of time by default; 7.5 and 12.1 are optional. It does
not support 9.0 (H200)."""
SPARK_GPU = "12.1"
"""DGX Spark's GPU. TensorRT-RTX 1.6 and newer also run on its Arm processor."""
AARCH64 = "linux_aarch64"
MAX_KEPT_ERRORS = 100

_log = logging.getLogger(__name__)


def install_runtime(runtime: str) -> str:
    """Returns how a TensorRT is installed, for messages."""
    if runtime == TENSORRT_RTX:
        return f"{install_command('rtx')} (on Linux, x86-64 or aarch64)"
    return (
        f"{install_command('trt')}, or on a Jetson use JetPack's own package in a virtual environment made with "
        "--system-site-packages, and for a fused graph that of the archive's requirements.txt"
    )


def load_bindings(runtime: str) -> ModuleType:
    """Imports the bindings of a runtime.

    Args:
        runtime: `tensorrt` or `tensorrt_rtx`; a manifest names it, so other modules are never imported.

    Raises:
        MissingExtra: The bindings are not installed, or their libraries cannot be loaded.
        EngineError: The runtime is unknown.
    """
    if runtime not in RUNTIMES:
        raise EngineError(f"the plan is for an unknown runtime {runtime!r}; supported: {', '.join(RUNTIMES)}")
    try:
        return importlib.import_module(runtime)
    except (ImportError, OSError) as err:
        failure: Exception = err
    if runtime == TENSORRT_RTX:  # without the meta package the module has another name
        try:
            importlib.import_module("tensorrt_rtx_libs")
            return importlib.import_module("tensorrt_rtx_bindings")
        except (ImportError, OSError) as err:
            failure = err
    raise MissingExtra(
        f"{runtime} is not installed here ({failure}); install it: {install_runtime(runtime)}"
    ) from failure


def this_platform() -> str:
    """Returns the operating system and processor that plans depend on, such as `linux_x86_64`."""
    return f"{sys.platform}_{platform.machine().lower()}"


@functools.cache
def make_logger(bindings: Any) -> Any:
    """Returns the TensorRT logger of this process, which forwards messages to `logging` and collects `errors`.

    There is only one, and it is never freed: TensorRT keeps the first logger that it receives, ignores later ones, and
    would call the first one after Python has freed it.
    """
    severities = bindings.ILogger.Severity
    levels = {
        severities.INTERNAL_ERROR: logging.ERROR,
        severities.ERROR: logging.ERROR,
        severities.WARNING: logging.INFO,  # many warnings are about intended behavior; `-v` shows them
        severities.INFO: logging.DEBUG,
        severities.VERBOSE: logging.DEBUG,
    }

    class Logger(bindings.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.errors_seen = 0

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                self.errors.append(message.strip())
                self.errors_seen += 1
                del self.errors[:-MAX_KEPT_ERRORS]  # bounds the memory of a long-running process
                level = logging.INFO  # the caller raises them in an exception
            _log.log(level, "TensorRT: %s", message.strip())

    return Logger()


def checked_call(logger: Any, step: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Calls TensorRT, which reports failures as False, as None or as an exception.

    Args:
        logger: The logger of `make_logger`; the errors of this call are added to the message, the cause first.
        step: Name of the step, for the message.
        call: A constructor or a method of the bindings.
        arguments: Passed to `call`.

    Returns:
        What TensorRT returned.

    Raises:
        EngineError: The call failed; the message gives the step and TensorRT's errors.
    """
    errors_before = logger.errors_seen
    try:
        returned = call(*arguments)
    except (TypeError, RuntimeError) as err:  # a constructor's null pointer, shapes that cannot be inferred
        raise _failure(logger, step, errors_before, str(err)) from err
    finally:
        del call  # otherwise an error's traceback keeps an execution context and its memory alive
    if returned is False or returned is None:
        raise _failure(logger, step, errors_before)
    return returned


def _failure(logger: Any, step: str, errors_before: int, *messages: str) -> EngineError:
    new_errors = logger.errors[len(logger.errors) - (logger.errors_seen - errors_before) :]
    reasons = "; ".join(dict.fromkeys((*messages, *new_errors)))
    return EngineError(f"TensorRT: {step} failed{': ' if reasons else ''}{reasons}")
