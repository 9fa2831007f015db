"""Training examples as plain JSON lines, and what must not be among them.

A line of an examples file:
    {"query": "who wrote Emma", "positive": "Emma is a novel by Jane Austen.", "negatives": ["Emma is a given name."],
     "kind": "retrieval", "source": "my_set", "label": "", "instruction": ""}
Only `query`, `kind` and `source` are needed. `kind` decides which sides are instructed (see `instructions.py`); a text
without a positive teaches by distillation alone; `label` is the class of a text of kind `label`, whose positive and
negatives are drawn from other texts of the same source; `instruction` fixes the wording of the task.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvembed_deploy.console import program
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import staged_file
from nvembed_deploy.files.json_lines import read_rows
from nvembed_deploy.training.instructions import Kind


@dataclass(frozen=True, kw_only=True)
class Example:
    """One thing to learn from; see the module's text for the fields."""

    query: str
    positive: str = ""
    negatives: tuple[str, ...] = ()
    kind: Kind
    source: str
    label: str = ""
    instruction: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """Query, positive and negatives, without empty ones."""
        return tuple(text for text in (self.query, self.positive, *self.negatives) if text)


def write_examples(path: Path, examples: Iterable[Example]) -> int:
    """Writes an examples file in one step; empty fields are left out.

    Returns:
        The number of examples.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with staged_file(path) as out:
        for example in examples:
            row = {name: value for name, value in asdict(example).items() if value}
            out.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())
            count += 1
    return count


def read_examples(path: Path) -> list[Example]:
    """Reads an examples file.

    Raises:
        ConfigError: The file is missing or empty, or a line is not an example: file, line and field are named.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; {program('train')} data makes such a file")
    examples = [_example(row, f"{path}, line {number}") for number, row in enumerate(read_rows(path), 1)]
    if not examples:
        raise ConfigError(f"{path} holds no examples")
    return examples


def _example(row: dict[str, Any], where: str) -> Example:
    unknown = row.keys() - Example.__dataclass_fields__.keys()
    if unknown:
        raise ConfigError(f"{where}: unknown field {min(unknown)!r}; see nvembed_deploy/training/examples.py")
    for name in ("query", "kind", "source"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ConfigError(f"{where}: field {name!r} must be a text that is not empty")
    negatives = row.get("negatives", [])
    texts = [row.get(name, "") for name in ("positive", "label", "instruction")]
    if not isinstance(negatives, list) or not all(isinstance(text, str) for text in [*negatives, *texts]):
        raise ConfigError(f"{where}: positive, label and instruction are texts, negatives is a list of texts")
    if negatives and not texts[0]:
        raise ConfigError(f"{where}: negatives without a positive teach nothing; add 'positive'")
    try:
        kind = Kind(row["kind"])
    except ValueError as err:
        raise ConfigError(f"{where}: kind is {row['kind']!r}; use {', '.join(kind.value for kind in Kind)}") from err
    return Example(**{**row, "kind": kind, "negatives": tuple(negatives)})


class Exclusion:
    """Texts that must not enter training: equal ones, near-duplicates, and longer ones that share a run of words.

    Two texts of at least four words are near-duplicates if at most one word in four differs (Jaccard similarity of
    the sets of words at least 0.6, which one word changed in four gives).

    Args:
        texts: The texts, for example of evaluation sets.
        run_words: Words in a row that count as shared.
    """

    LEAST_WORDS = 4
    SIMILARITY = 0.6

    def __init__(self, texts: Iterable[str], *, run_words: int = 8) -> None:
        self.run_words = run_words
        self._whole: set[str] = set()
        self._runs: set[int] = set()
        self._bags: list[frozenset[str]] = []
        self._by_word: dict[str, list[int]] = {}
        counts: dict[str, int] = {}
        bags: set[frozenset[str]] = set()
        for text in texts:
            words = plain_words(text)
            self._whole.add(" ".join(words))
            self._runs.update(self._hashes(words))
            bag = frozenset(words)
            if self.LEAST_WORDS <= len(bag) <= self.run_words * 4 and bag not in bags:
                bags.add(bag)
                for word in bag:
                    counts[word] = counts.get(word, 0) + 1
        self._counts = counts
        for bag in sorted(bags, key=sorted):
            for word in self._rarest(bag):
                self._by_word.setdefault(word, []).append(len(self._bags))
            self._bags.append(bag)

    def __contains__(self, text: str) -> bool:
        words = plain_words(text)
        if " ".join(words) in self._whole or any(run in self._runs for run in self._hashes(words)):
            return True
        return self._is_near(frozenset(words))

    def keep(self, examples: Iterable[Example]) -> Iterator[Example]:
        """The examples none of whose texts is excluded."""
        return (example for example in examples if not any(text in self for text in example.texts))

    def _rarest(self, bag: frozenset[str]) -> list[str]:
        """So many of the rarest words that two bags as alike as `SIMILARITY` share one of them (prefix filtering)."""
        ordered = sorted(bag, key=lambda word: (self._counts.get(word, 0), word))
        return ordered[: len(bag) - -(-len(bag) * 6 // 10) + 1]

    def _is_near(self, bag: frozenset[str]) -> bool:
        if not self.LEAST_WORDS <= len(bag) <= self.run_words * 7:
            return False
        least, most = len(bag) * self.SIMILARITY, len(bag) / self.SIMILARITY
        candidates = {number for word in self._rarest(bag) for number in self._by_word.get(word, ())}
        for number in candidates:
            other = self._bags[number]
            if least <= len(other) <= most and len(bag & other) >= self.SIMILARITY * len(bag | other):
                return True
        return False

    def _hashes(self, words: list[str]) -> Iterator[int]:
        for start in range(len(words) - self.run_words + 1):
            yield hash(tuple(words[start : start + self.run_words]))


def read_exclusion(folder: Path) -> Exclusion:
    """Reads every text below a folder of data sets as an exclusion.

    Raises:
        ConfigError: The folder does not exist or holds no texts.
    """
    strings: list[str] = []
    for path in sorted(folder.rglob("*.jsonl")):
        for row in read_rows(path):
            for value in row.values():
                strings += [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
    for path in sorted([*folder.rglob("*.txt"), *folder.rglob("*.tokens")]):
        strings += path.read_text(encoding="utf-8").splitlines()
    if not strings:
        raise ConfigError(f"--exclude {folder} holds no texts; pass the folder of the evaluation sets")
    return Exclusion(strings)


def plain_words(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation."""
    return re.findall(r"\w+", text.lower())
