"""Terms and their definitions from WordNet's database files, as Debian's package wordnet-base installs them.

Format: wndb(5WN). Licence: WordNet 3.0, free for any use.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nvembed_deploy.errors import ConfigError

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")


def definitions(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields (synonymous terms, their definition with its examples).

    Raises:
        ConfigError: A database file is missing from the folder.
    """
    for part_of_speech in PARTS_OF_SPEECH:
        path = folder / f"data.{part_of_speech}"
        if not path.is_file():
            raise ConfigError(
                f"--wordnet {folder} has no {path.name}; install Debian's wordnet-base or leave out --wordnet"
            )
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("  ") or "|" not in line:  # the file starts with the licence, each line indented
                    continue
                synset, definition = line.split("|", 1)
                fields = synset.split()
                count = int(fields[3], 16)  # then word, number, word, number ...
                terms = [fields[4 + 2 * index].partition("(")[0].replace("_", " ") for index in range(count)]
                yield ", ".join(terms), definition.strip()
