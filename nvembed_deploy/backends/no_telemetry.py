"""Switches off the telemetry of ONNX Runtime and OpenVINO, which is on by default.

ONNX Runtime (1.32) sends events to Microsoft and keeps an id and a queue in the user's cache folder; OpenVINO (2026.4)
sends an event to Google Analytics when it is imported and keeps an id in the home folder. Telemetry that
a user explicitly enabled stays on: `ORT_DISABLE_TELEMETRY=0`, or OpenVINO's own consent file (`opt_in_out --opt_in`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ORT_SWITCH = "ORT_DISABLE_TELEMETRY"
OPENVINO_TELEMETRY = "openvino_telemetry"


def switch_off_onnxruntime_telemetry() -> None:
    """Disables ONNX Runtime's telemetry in this process and its children unless the user set the switch."""
    os.environ.setdefault(ORT_SWITCH, "1")
    imported = sys.modules.get("onnxruntime")
    if imported is not None and os.environ[ORT_SWITCH] != "0":  # imported by other code before the switch was set
        imported.disable_telemetry_events()


@contextmanager
def without_openvino_telemetry() -> Iterator[None]:
    """Hides OpenVINO's telemetry package while OpenVINO is imported, which then uses its own stub."""
    if OPENVINO_TELEMETRY in sys.modules or _user_opted_in():
        yield
        return
    sys.modules[OPENVINO_TELEMETRY] = None  # type: ignore[assignment]  # makes its import raise ImportError
    try:
        yield
    finally:
        sys.modules.pop(OPENVINO_TELEMETRY, None)


def _user_opted_in() -> bool:
    """Returns True if OpenVINO's consent file, which only its own command writes, contains consent."""
    try:
        folder = Path(os.environ["LOCALAPPDATA"], "Intel Corporation") if os.name == "nt" else Path.home() / "intel"
        return (folder / OPENVINO_TELEMETRY).read_text(encoding="utf-8").strip() == "1"
    except (OSError, ValueError, RuntimeError, KeyError):  # no file, or no home directory
        return False
