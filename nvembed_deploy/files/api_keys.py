"""Reading API keys from a file, so that they appear in no list of processes."""

from __future__ import annotations

from pathlib import Path

from nvembed_deploy.errors import ConfigError, failure_reason


def read_keys(path: Path) -> list[str]:
    """Reads a file with one key per line; several let a key be replaced without an interruption.

    Raises:
        ConfigError: The file cannot be read, or has no key.
    """
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(
            f"--api-key-file {path} cannot be read ({failure_reason(err)}); pass a text file with one key per line"
        ) from err
    if not keys:
        raise ConfigError(f"--api-key-file {path} has no key; write one key per line")
    return keys
