"""Strict reading of JSON Lines files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvembed_deploy.errors import ConfigError, failure_reason


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON Lines file.

    Raises:
        ConfigError: The file cannot be read, or a line is not a JSON object; the message has the line number.
    """
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for line_number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as err:
                    raise ConfigError(f"{path}, line {line_number}: not JSON ({err})") from err
                if not isinstance(row, dict):
                    raise ConfigError(f"{path}, line {line_number}: not a JSON object")
                yield row
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} cannot be read ({failure_reason(err)}); check the path") from err
