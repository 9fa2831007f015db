"""One-line descriptions of Debian's packages: they cover what programmers write about and encyclopaedias hardly do.

Each is under its package's licence, in Debian's main archive a free one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nvembed_deploy.errors import ConfigError


def package_descriptions(control: Path) -> Iterator[tuple[str, str]]:
    """Yields (package, one-line description) for each package of a file in Debian's control format.

    Args:
        control: Output of `apt-cache dumpavail`, or /var/lib/dpkg/status.

    Raises:
        ConfigError: The file cannot be read or describes no package.
    """
    name, descriptions = "", set()
    try:
        lines = control.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(
            f"--packages {control} cannot be read ({err}); create it with: apt-cache dumpavail > {control}"
        ) from err
    for line in lines:
        field, _, content = line.partition(": ")
        if field == "Package":
            name = content.strip()
        elif field in ("Description", "Description-en") and name and content not in descriptions:
            descriptions.add(content)
            yield name, content.strip()
    if not descriptions:
        raise ConfigError(f"--packages {control} describes no package; create it with: apt-cache dumpavail > {control}")
