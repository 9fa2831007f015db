"""Training examples and documents as JSON lines, and the exclusion of evaluation texts from them.

A line of an examples file:
    {"query": "who wrote Emma", "positive": "Emma is a novel by Jane Austen.", "negatives": ["Emma is a given name."],
     "kind": "retrieval", "source": "my_set", "label": "", "instruction": ""}
Only `query`, `kind` and `source` are required. `kind` decides which sides are instructed (see `instructions.py`); a
text without a positive is for recipes that distil a teacher; `label` is the class of a text of kind `label`, whose
positive and negatives are drawn from other texts of the same source; `instruction` is the task in words, by default
that of the set or the kind.

A line of a corpus file, which `data` writes beside the examples for `mine`:
    {"text": "Emma is a novel by Jane Austen.", "source": "my_set", "queries": ["who wrote Emma"]}
`queries` are the queries that the document is judged to answer, also those that no example was made of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nvembed_deploy.console import program
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import staged_file
from nvembed_deploy.files.json_lines import read_rows
from nvembed_deploy.training.instructions import Kind


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training example; the module's docstring describes the fields."""

    query: str
    positive: str = ""
    negatives: tuple[str, ...] = ()
    kind: Kind
    source: str
    label: str = ""
    instruction: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """Query, positive and negatives, without the empty ones."""
        return tuple(text for text in (self.query, self.positive, *self.negatives) if text)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document of a corpus that negatives are mined from; the module's docstring describes the fields."""

    text: str
    source: str
    queries: tuple[str, ...] = ()


def write_examples(path: Path, examples: Iterable[Example | Document]) -> int:
    """Writes a file of examples or documents in one step; empty fields are left out.

    Returns:
        The number of lines.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with staged_file(path) as out:
        for example in examples:
            row = {name: value for name, value in asdict(example).items() if value}
            out.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())
            count += 1
    return count


def corpus_path(examples_path: Path) -> Path:
    """Returns the corpus file that belongs to an examples file: `x.jsonl` has `x.corpus.jsonl`."""
    return examples_path.with_suffix(f".corpus{examples_path.suffix}")


def read_documents(path: Path) -> Iterator[Document]:
    """Yields the documents of a corpus file.

    Raises:
        ConfigError: The file cannot be read, or a line is not a document; the message names file and line.
    """
    for number, row in enumerate(read_rows(path), 1):
        queries = row.get("queries", [])
        strings = [row.get("text"), row.get("source"), *(queries if isinstance(queries, list) else [None])]
        if not all(isinstance(text, str) for text in strings):
            raise ConfigError(f"{path}, line {number}: a document needs strings 'text' and 'source'")
        yield Document(text=row["text"], source=row["source"], queries=tuple(queries))


def read_examples(path: Path) -> list[Example]:
    """Reads an examples file.

    Raises:
        ConfigError: The file is missing or empty, or a line is not an example; the message names file, line and field.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; create an examples file with: {program('train')} data")
    examples = [_example(row, f"{path}, line {line}") for line, row in enumerate(read_rows(path), 1)]
    if not examples:
        raise ConfigError(f"{path} contains no examples; create an examples file with: {program('train')} data")
    return examples


def _example(row: dict[str, Any], location: str) -> Example:
    unknown = row.keys() - Example.__dataclass_fields__.keys()
    if unknown:
        raise ConfigError(f"{location}: unknown field {min(unknown)!r}; see nvembed_deploy/training/examples.py")
    for name in ("query", "kind", "source"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ConfigError(f"{location}: field {name!r} must be a non-empty string")
    negatives = row.get("negatives", [])
    texts = [row.get(name, "") for name in ("positive", "label", "instruction")]
    if not isinstance(negatives, list) or not all(isinstance(text, str) for text in [*negatives, *texts]):
        raise ConfigError(f"{location}: positive, label and instruction must be strings, negatives a list of strings")
    if negatives and not texts[0]:
        raise ConfigError(f"{location}: negatives without a positive cannot be trained on; add 'positive'")
    try:
        kind = Kind(row["kind"])
    except ValueError as err:
        raise ConfigError(f"{location}: kind is {row['kind']!r}; use {', '.join(kind.value for kind in Kind)}") from err
    return Example(**{**row, "kind": kind, "negatives": tuple(negatives)})


class Exclusion:
    """Keeps texts out of training: equal texts, near-duplicates, and longer texts that share a run of words.

    Two texts of at least four words are near-duplicates if at most one word in four differs (Jaccard similarity of
    the sets of words at least 0.6, the value for one changed word in four).

    Args:
        texts: The excluded texts, for example those of the evaluation sets.
        run_words: Length in words of a shared run that excludes a text.
    """

    MIN_WORDS = 4
    SIMILARITY = 0.6

    def __init__(self, texts: Iterable[str], *, run_words: int = 8) -> None:
        self.run_words = run_words
        self._texts: set[str] = set()
        self._runs: set[int] = set()
        self._bags: list[frozenset[str]] = []
        self._by_word: dict[str, list[int]] = {}
        counts: dict[str, int] = {}
        bags: set[frozenset[str]] = set()
        for text in texts:
            words = plain_words(text)
            self._texts.add(" ".join(words))
            self._runs.update(self._hashes(words))
            bag = frozenset(words)
            if self.MIN_WORDS <= len(bag) <= self.run_words * 4 and bag not in bags:
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
        if " ".join(words) in self._texts or any(run in self._runs for run in self._hashes(words)):
            return True
        return self._is_near_duplicate(frozenset(words))

    def filter(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Yields the examples of which no text is excluded."""
        return (example for example in examples if not any(text in self for text in example.texts))

    def filter_documents(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yields the documents whose text is not excluded, without the excluded ones of their queries."""
        for document in documents:
            if document.text not in self:
                yield replace(document, queries=tuple(query for query in document.queries if query not in self))

    def _rarest(self, bag: frozenset[str]) -> list[str]:
        """Returns enough of the rarest words that two bags at least `SIMILARITY` alike share one (prefix filtering)."""
        ordered = sorted(bag, key=lambda word: (self._counts.get(word, 0), word))
        return ordered[: len(bag) - -(-len(bag) * 6 // 10) + 1]

    def _is_near_duplicate(self, bag: frozenset[str]) -> bool:
        if not self.MIN_WORDS <= len(bag) <= self.run_words * 7:
            return False
        min_size, max_size = len(bag) * self.SIMILARITY, len(bag) / self.SIMILARITY
        candidates = {index for word in self._rarest(bag) for index in self._by_word.get(word, ())}
        for index in candidates:
            candidate = self._bags[index]
            if min_size <= len(candidate) <= max_size and len(bag & candidate) >= self.SIMILARITY * len(
                bag | candidate
            ):
                return True
        return False

    def _hashes(self, words: list[str]) -> Iterator[int]:
        for start in range(len(words) - self.run_words + 1):
            yield hash(tuple(words[start : start + self.run_words]))


def read_exclusion(folder: Path) -> Exclusion:
    """Reads every text in a folder of data sets, recursively, as an exclusion.

    Raises:
        ConfigError: The folder does not exist or holds no texts.
    """
    strings: list[str] = []
    for path in sorted(folder.rglob("*.jsonl")):
        for row in read_rows(path):
            for field in row.values():
                texts = field if isinstance(field, list) else [field]
                strings += [text for text in texts if isinstance(text, str)]
    for path in sorted([*folder.rglob("*.txt"), *folder.rglob("*.tokens")]):
        strings += path.read_text(encoding="utf-8").splitlines()
    if not strings:
        raise ConfigError(f"--exclude {folder} contains no texts; pass the folder of the evaluation sets")
    return Exclusion(strings)


def plain_words(text: str) -> list[str]:
    """Returns the words and numbers of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())
