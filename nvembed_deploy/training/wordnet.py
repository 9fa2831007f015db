"""Terms and their definitions from WordNet's database files, as Debian's package wordnet-base installs them.

Format: wndb(5WN). Licence: WordNet 3.0, free for any use.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nvembed_deploy.errors import ConfigError

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")


def definitions(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields (terms that mean the same, their definition with its examples).

    Raises:
        ConfigError: The folder lacks a database file.
    """
    for part in PARTS_OF_SPEECH:
        path = folder / f"data.{part}"
        if not path.is_file():
            raise ConfigError(f"--wordnet {folder} lacks {path.name}; install Debian's wordnet-base or leave it out")
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("  ") or "|" not in line:  # the licence stands in front, each line indented
                    continue
                head, definition = line.split("|", 1)
                fields = head.split()
                count = int(fields[3], 16)  # then word, number, word, number ...
                terms = [fields[4 + 2 * place].partition("(")[0].replace("_", " ") for place in range(count)]
                yield ", ".join(terms), definition.strip()
