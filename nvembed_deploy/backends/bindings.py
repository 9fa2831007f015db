"""Finds the Python bindings of TensorRT or TensorRT-RTX; their API is the same, so other code serves either."""

from __future__ import annotations

import importlib
import logging
import platform
import sys
from types import ModuleType
from typing import Any

from nvembed_deploy.errors import MissingExtra

TENSORRT = "tensorrt"
TENSORRT_RTX = "tensorrt_rtx"
CURES = {
    TENSORRT: "pip install 'nvembed-deploy[trt]', or on a Jetson use JetPack's own package in a virtual environment "
    "made with --system-site-packages",
    TENSORRT_RTX: "pip install 'nvembed-deploy[rtx]' (wheels exist for Linux and Windows on x86-64)",
}

_log = logging.getLogger(__name__)


def load_bindings(runtime: str) -> ModuleType:
    """Imports the bindings of a runtime.

    Args:
        runtime: `tensorrt` or `tensorrt_rtx`.

    Raises:
        MissingExtra: They are not installed, or their libraries do not load.
    """
    try:
        return importlib.import_module(runtime)
    except ImportError as err:
        first = err
    if runtime == TENSORRT_RTX:  # the wheels without the meta package bring another module name
        try:
            importlib.import_module("tensorrt_rtx_libs")
            return importlib.import_module("tensorrt_rtx_bindings")
        except ImportError as err:
            first = err
    raise MissingExtra(f"{runtime} is not installed here ({first}); {CURES[runtime]}") from first


def this_platform() -> str:
    """Operating system and processor as plans are bound to them, such as `linux_x86_64`."""
    return f"{sys.platform}_{platform.machine().lower()}"


def make_logger(bindings: Any) -> Any:
    """A TensorRT logger that hands messages to `logging` and remembers errors in `errors`."""
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

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                self.errors.append(message.strip())
                level = logging.INFO  # the caller raises them as one sentence
            _log.log(level, "TensorRT: %s", message.strip())

    return Logger()
