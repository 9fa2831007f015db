"""Reads training text and pairs: a folder of data sets in plain JSON lines and text files, and Python's documentation.

Layouts (UTF-8), told apart by the files in a data set's folder:
    pairs.jsonl                      {"a", "b"}: a query or title and its passage
    corpus.jsonl, queries.jsonl,
        qrels.tsv                    {"id", "title", "text"}, {"id", "text"}, and a table query, document, score
    triplets*.jsonl                  {"query", "positive", "negative"}
    *.jsonl with premise             {"premise", "hypothesis"}: texts only
    *.jsonl with text, label         {"text", "label"}: texts only
    *.txt                            articles: a title line, paragraphs, an empty line
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.pydocs import docstring_pairs, topic_pairs

SHORTEST_CHARS = 3
LONGEST_CHARS = 2400
"""About 600 tokens: more would be cut off in training anyway."""
HALVES_FROM_CHARS = 240
"""Paragraphs this long are also taught as (first half, second half)."""
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One thing to learn from: a text alone, a query and its positive, or these and a hard negative."""

    texts: tuple[str, ...]
    kind: Kind
    source: str
    """Name of the data set."""


def read_data(folder: Path) -> list[Example]:
    """Reads every data set of a folder and Python's documentation, in a fixed order.

    Raises:
        ConfigError: The folder does not exist or holds no data set of a known layout.
    """
    if not folder.is_dir():
        raise ConfigError(f"--data {folder} is not a folder; pass the folder that holds the data sets' folders")
    examples: list[Example] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            examples += _read_set(path)
    if not examples:
        raise ConfigError(
            f"--data {folder} holds no data set in a known layout; see nvembed_deploy/training/corpora.py"
        )
    for pairs, source in ((docstring_pairs(), "python_docstrings"), (topic_pairs(), "python_topics")):
        examples += [Example(texts=pair, kind=Kind.RETRIEVAL, source=source) for pair in pairs]
    return [example for example in map(_tidy, examples) if example is not None]


def _tidy(example: Example) -> Example | None:
    texts = tuple(text.strip()[:LONGEST_CHARS] for text in example.texts)
    if min(map(len, texts)) < SHORTEST_CHARS:
        return None
    return Example(texts=texts, kind=example.kind, source=example.source)


def _read_set(folder: Path) -> Iterator[Example]:
    if (folder / "corpus.jsonl").is_file():
        yield from _retrieval(folder)
        return
    for path in sorted(folder.glob("*.jsonl")):
        for row in read_rows(path):
            if example := _row_example(row, folder.name):
                yield example
    for path in sorted(folder.glob("*.txt")):
        yield from _articles(path, folder.name)


def _row_example(row: dict[str, Any], source: str) -> Example | None:
    if "a" in row and "b" in row:
        return Example(texts=(row["a"], row["b"]), kind=Kind.RETRIEVAL, source=source)
    if "positive" in row:
        return Example(texts=(row["query"], row["positive"], row["negative"]), kind=Kind.SIMILARITY, source=source)
    if "premise" in row:
        return Example(texts=(row["hypothesis"],), kind=Kind.TEXT, source=source)
    if "text" in row:
        return Example(texts=(row["text"],), kind=Kind.LABEL, source=source)
    return None


def _retrieval(folder: Path) -> Iterator[Example]:
    corpus = {row["id"]: row for row in read_rows(folder / "corpus.jsonl")}
    queries = {row["id"]: row["text"] for row in read_rows(folder / "queries.jsonl")}
    lines = (folder / "qrels.tsv").read_text(encoding="utf-8").splitlines()[1:]
    relevant: dict[str, list[str]] = {}
    for line in lines:
        query, document, score = line.split("\t")[:3]
        if float(score) > 0 and query in queries and document in corpus:
            relevant.setdefault(document, []).append(queries[query])
    for document, asked in relevant.items():
        text = f"{corpus[document].get('title', '')} {corpus[document]['text']}".strip()
        for query in asked:
            yield Example(texts=(query, text), kind=Kind.RETRIEVAL, source=folder.name)
        for first, second in pairwise(asked):
            yield Example(texts=(first, second), kind=Kind.SIMILARITY, source=folder.name)


def _articles(path: Path, source: str) -> Iterator[Example]:
    """Whole paragraphs, single sentences, runs of sentences, and halves of paragraphs."""
    rng = random.Random(path.name)
    for article in path.read_text(encoding="utf-8").split("\n\n"):
        title, _, body = article.strip().partition("\n")
        for paragraph in body.split("\n"):
            sentences = [part for part in _SENTENCE_END.split(paragraph) if len(part) >= SHORTEST_CHARS * 5]
            for sentence in sentences:
                if rng.random() < 0.3:
                    yield Example(texts=(sentence,), kind=Kind.TEXT, source=source)
            if len(sentences) > 1 and rng.random() < 0.5:
                start = rng.randrange(len(sentences) - 1)
                run = " ".join(sentences[start : start + rng.randint(2, 4)])
                yield Example(texts=(run,), kind=Kind.TEXT, source=f"{source}_runs")
            if len(paragraph) >= HALVES_FROM_CHARS and len(sentences) > 1:
                middle = len(sentences) // 2
                halves = (" ".join(sentences[:middle]), " ".join(sentences[middle:]))
                yield Example(texts=halves, kind=Kind.RETRIEVAL, source=f"{source}_halves")
        if len(body) > HALVES_FROM_CHARS:
            whole = f"{title}\n{body}" if rng.random() < 0.5 else body.replace("\n", " ")
            yield Example(texts=(whole,), kind=Kind.TEXT, source=f"{source}_whole")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON lines file.

    Raises:
        ConfigError: A line is not a JSON object.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as err:
                raise ConfigError(f"{path}, line {number}: not JSON ({err})") from err
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number}: not a JSON object")
            yield row


def tokenizer_text(folder: Path) -> Iterator[str]:
    """Yields what the tokenizer learns from: text files (every second line of books) and all strings of the data."""
    for path in sorted(folder.glob("*/*.txt")):
        step = 1 if path.name.startswith("wiki_") else 2
        yield from (line for line in path.read_text(encoding="utf-8").split("\n")[::step] if line)
    for path in sorted(folder.glob("*/*.jsonl")):
        for row in read_rows(path):
            yield from (
                value
                for key, value in row.items()
                if isinstance(value, str) and key != "id" and not key.startswith("label")
            )
    for pair in (*docstring_pairs(), *topic_pairs()):
        yield from pair


class Exclusion:
    """Texts that must not enter training: equal ones, and longer ones that share a run of words.

    Args:
        texts: The texts, for example of evaluation sets.
        run_words: Words in a row that count as shared.
    """

    def __init__(self, texts: Iterable[str], *, run_words: int = 8) -> None:
        self.run_words = run_words
        self._whole: set[str] = set()
        self._runs: set[int] = set()
        for text in texts:
            words = plain_words(text)
            self._whole.add(" ".join(words))
            self._runs.update(self._hashes(words))

    def __contains__(self, text: str) -> bool:
        words = plain_words(text)
        return " ".join(words) in self._whole or any(run in self._runs for run in self._hashes(words))

    def keep(self, examples: Iterable[Example]) -> list[Example]:
        """The examples none of whose texts is excluded."""
        return [example for example in examples if not any(text in self for text in example.texts)]

    def _hashes(self, words: list[str]) -> Iterator[int]:
        for start in range(len(words) - self.run_words + 1):
            yield hash(tuple(words[start : start + self.run_words]))


def read_exclusion(folder: Path) -> Exclusion:
    """Reads every text below a folder of data sets as an exclusion."""
    strings: list[str] = []
    for path in sorted(folder.rglob("*.jsonl")):
        for row in read_rows(path):
            for value in row.values():
                strings += [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
    for path in sorted([*folder.rglob("*.txt"), *folder.rglob("*.tokens")]):
        strings += path.read_text(encoding="utf-8").splitlines()
    return Exclusion(strings)


def plain_words(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation."""
    return re.findall(r"\w+", text.lower())
