"""Finds the Python bindings of TensorRT or TensorRT-RTX; their API is the same, so other code serves either."""

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
"""Compute capabilities that TensorRT-RTX 1.7 builds for by default ahead of time; 7.5 and 12.1 exist on request. On an
H200 (9.0) it says that it does not support it."""
MAX_KEPT_ERRORS = 100

_log = logging.getLogger(__name__)


def install_runtime(runtime: str) -> str:
    """Returns how a TensorRT is installed, for messages."""
    if runtime == TENSORRT_RTX:
        return f"{install_command('rtx')} (on Linux, x86-64)"
    return (
        f"{install_command('trt')}, or on a Jetson use JetPack's own package in a virtual environment made with "
        "--system-site-packages"
    )


def load_bindings(runtime: str) -> ModuleType:
    """Imports the bindings of a runtime.

    Args:
        runtime: `tensorrt` or `tensorrt_rtx`; a manifest names it, so no other module is imported.

    Raises:
        MissingExtra: They are not installed, or their libraries do not load.
        EngineError: There is no such runtime.
    """
    if runtime not in RUNTIMES:
        raise EngineError(f"the plan is for a runtime named {runtime!r}; this library knows {', '.join(RUNTIMES)}")
    try:
        return importlib.import_module(runtime)
    except (ImportError, OSError) as err:
        first: Exception = err
    if runtime == TENSORRT_RTX:  # the wheels without the meta package bring another module name
        try:
            importlib.import_module("tensorrt_rtx_libs")
            return importlib.import_module("tensorrt_rtx_bindings")
        except (ImportError, OSError) as err:
            first = err
    raise MissingExtra(f"{runtime} is not installed here ({first}); {install_runtime(runtime)}") from first


def this_platform() -> str:
    """Operating system and processor as plans are bound to them, such as `linux_x86_64`."""
    return f"{sys.platform}_{platform.machine().lower()}"


@functools.cache
def make_logger(bindings: Any) -> Any:
    """The TensorRT logger of a process: it hands messages to `logging` and remembers errors in `errors`.

    One for all and for ever: TensorRT keeps the first that it is given, ignores every later one, and would go on
    calling it after Python has freed it.
    """
    severities = bindings.ILogger.Severity
    levels = {
        severities.INTERNAL_ERROR: logging.ERROR,
        severities.ERROR: logging.ERROR,
        severities.WARNING: logging.INFO,  # TensorRT warns of much that is as intended; `-v` shows it
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
                del self.errors[:-MAX_KEPT_ERRORS]  # a process that runs for months shall not grow
                level = logging.INFO  # the caller raises them as one sentence
            _log.log(level, "TensorRT: %s", message.strip())

    return Logger()


def ask(logger: Any, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Calls TensorRT, which says no by False, by None or by an exception.

    Args:
        logger: What `make_logger` gave; its errors of this call go into the message, the first of them the cause.
        what: The step, for the message.
        call: A constructor or a method of the bindings.
        arguments: Passed on.

    Returns:
        What TensorRT returned.

    Raises:
        EngineError: With the step and TensorRT's own words.
    """
    before = logger.errors_seen
    try:
        result = call(*arguments)
    except (TypeError, RuntimeError) as err:  # a constructor's null pointer, shapes that cannot be inferred
        raise _failure(logger, what, before, str(err)) from err
    finally:
        del call  # else an error's traceback keeps an execution context alive, and its memory
    if result is False or result is None:
        raise _failure(logger, what, before)
    return result


def _failure(logger: Any, what: str, before: int, *words: str) -> EngineError:
    new = logger.errors[len(logger.errors) - (logger.errors_seen - before) :]
    told = "; ".join(dict.fromkeys((*words, *new)))
    return EngineError(f"TensorRT: {what} failed{': ' if told else ''}{told}")
