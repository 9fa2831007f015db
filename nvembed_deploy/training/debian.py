"""One-line descriptions of Debian's packages: they name what programmers write about, which encyclopaedias hardly do.

Each stands under its package's licence, in Debian's main archive a free one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nvembed_deploy.errors import ConfigError


def package_descriptions(control: Path) -> Iterator[tuple[str, str]]:
    """Yields (package, its one-line description) of a file in Debian's control format.

    Args:
        control: Such as `apt-cache dumpavail` prints, or /var/lib/dpkg/status.

    Raises:
        ConfigError: The file cannot be read, or holds no package.
    """
    name, found, seen = "", False, set()
    try:
        lines = control.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"--packages {control} cannot be read ({err}); apt-cache dumpavail > {control}") from err
    for line in lines:
        key, _, value = line.partition(": ")
        if key == "Package":
            name = value.strip()
        elif key in ("Description", "Description-en") and name and value not in seen:
            seen.add(value)
            found = True
            yield name, value.strip()
    if not found:
        raise ConfigError(f"--packages {control} describes no package; apt-cache dumpavail > {control}")
