"""Both CPU runtimes report their use to their makers unless told otherwise; here they are told otherwise.

ONNX Runtime (1.32) sends events to Microsoft and keeps an id and a queue in the user's cache folder; OpenVINO (2026.4)
sends an event to Google Analytics when it is imported and keeps an id in the home folder. A user who turned either on
explicitly keeps it: `ORT_DISABLE_TELEMETRY=0`, or OpenVINO's own consent file (`opt_in_out --opt_in`).
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
    """Sets ONNX Runtime's switch for this process and its children, if the user has not; before it is imported."""
    os.environ.setdefault(ORT_SWITCH, "1")
    imported = sys.modules.get("onnxruntime")
    if imported is not None and os.environ[ORT_SWITCH] != "0":  # imported by somebody else, before the switch was set
        imported.disable_telemetry_events()


@contextmanager
def without_openvino_telemetry() -> Iterator[None]:
    """Hides OpenVINO's telemetry package while OpenVINO is imported: it then takes its own stub in its place."""
    if OPENVINO_TELEMETRY in sys.modules or _user_opted_in():
        yield
        return
    sys.modules[OPENVINO_TELEMETRY] = None  # type: ignore[assignment]  # an import of it raises ImportError
    try:
        yield
    finally:
        sys.modules.pop(OPENVINO_TELEMETRY, None)


def _user_opted_in() -> bool:
    """Whether OpenVINO's consent file says yes, which only its own command writes."""
    try:
        folder = Path(os.environ["LOCALAPPDATA"], "Intel Corporation") if os.name == "nt" else Path.home() / "intel"
        return (folder / OPENVINO_TELEMETRY).read_text(encoding="utf-8").strip() == "1"
    except (OSError, ValueError, RuntimeError, KeyError):  # no file, or no home
        return False
