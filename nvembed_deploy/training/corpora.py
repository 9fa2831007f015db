"""Reads training pairs and corpora from a folder that contains one folder for each data set.

Layouts (UTF-8), recognized by the files in a data set's folder; the folder's name is the name of the set:
    corpus.jsonl, queries.jsonl      {"_id" or "id", "title", "text"} and {"_id" or "id", "text"}, with judgements in
                                     qrels.tsv or qrels/train.tsv (see `nvembed_deploy/files/qrels.py`): BEIR's and
                                     MTEB's layout
    *.jsonl with a, b                {"a", "b"}: a query or title and its passage; with "score" (0 to 5) or "label"
                                     (0 or 1): similar texts, in both directions, from a score of 4 or where it is 1
    triplets*.jsonl                  {"query", "positive", "negative"}: similar texts; a blend can say otherwise
    *.jsonl with premise             {"premise", "hypothesis", "label"}: a premise, what it entails, and as negatives
                                     what contradicts it
    *.jsonl with text, label         {"text", "label"}: a text and its class
    examples*.jsonl                  lines as in `examples.py`
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.json_lines import read_rows
from nvembed_deploy.files.qrels import read_qrels
from nvembed_deploy.sample_texts import docstring_pairs, topic_pairs
from nvembed_deploy.training.examples import Document, Example, read_examples
from nvembed_deploy.training.instructions import Kind

MIN_CHARS = 3
MAX_CHARS = 2400
"""About 600 tokens; training would truncate longer texts anyway."""
ENTAILMENT, CONTRADICTION = "entailment", "contradiction"
SIMILAR_SCORE = 4
"""Lowest score of a pair that counts as similar, on the scale of the STS sets. Source: NV-Embed, section 4."""
SPLIT = "train"
"""Split whose judgements are trained on."""

log = logging.getLogger(__name__)


def read_data(folder: Path, *, split: str = SPLIT) -> Iterator[Example]:
    """Yields the examples of every data set of a folder, set by set.

    Args:
        folder: Contains one folder for each data set.
        split: Split of the judgements, for sets with one file of judgements for each split.

    Raises:
        ConfigError: The folder does not exist, has no data set of a known layout, or a set lacks the split.
    """
    is_empty = True
    for path in set_folders(folder):
        count = 0
        for example in read_set(path, split=split):
            count += 1
            yield from trimmed(example)
        if not count:
            log.warning("%s contains no data set in a supported layout and is left out", path)
        is_empty &= not count
    if is_empty:
        raise ConfigError(
            f"--data {folder} contains no data set in a supported layout; see nvembed_deploy/training/corpora.py"
        )


def read_documents(folder: Path, *, split: str = SPLIT) -> Iterator[Document]:
    """Yields the documents of every corpus of a folder, with the queries that each answers; see `read_data`."""
    for path in set_folders(folder):
        if (path / "corpus.jsonl").is_file():
            yield from _documents(path, split)


def python_documentation() -> Iterator[Example]:
    """Yields pairs from the documentation that this Python brings: a summary or a topic, and its text."""
    for source, pairs in (("python_docstrings", docstring_pairs()), ("python_topics", topic_pairs())):
        for query, positive in pairs:
            yield from trimmed(Example(query=query, positive=positive, kind=Kind.RETRIEVAL, source=source))


def set_folders(folder: Path) -> list[Path]:
    """Returns the folders of the data sets, by name.

    Raises:
        ConfigError: The folder does not exist.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"--data {folder} is not a folder; pass the folder that contains one folder for each data set"
        )
    return sorted(path for path in folder.iterdir() if path.is_dir())


def trimmed(example: Example) -> Iterator[Example]:
    """Yields the example with texts of at most `MAX_CHARS`, or nothing if one has less than `MIN_CHARS`."""
    query, positive = _trimmed_text(example.query), _trimmed_text(example.positive)
    negatives = tuple(map(_trimmed_text, example.negatives))
    texts = [query, *([positive] if example.positive else []), *negatives]
    if min(map(len, texts)) >= MIN_CHARS:
        yield replace(example, query=query, positive=positive, negatives=negatives)


def _trimmed_text(text: str) -> str:
    return text.strip()[:MAX_CHARS]


def read_set(folder: Path, *, split: str = SPLIT) -> Iterator[Example]:
    """Yields the examples of one data set."""
    if (folder / "corpus.jsonl").is_file():
        for document in _documents(folder, split):
            for query in document.queries:
                yield Example(query=query, positive=document.text, kind=Kind.RETRIEVAL, source=folder.name)
        return
    for path in sorted(folder.glob("*.jsonl")):
        if path.name.startswith("examples"):
            yield from read_examples(path)
            continue
        yield from _inferences(path, folder.name)
        for row in read_rows(path):
            yield from _row_examples(row, folder.name)


def _row_examples(row: dict[str, Any], source: str) -> Iterator[Example]:
    if "a" in row and "b" in row:
        if "score" not in row and "label" not in row:
            yield Example(query=row["a"], positive=row["b"], kind=Kind.RETRIEVAL, source=source)
        elif float(row.get("score", 5 * float(row.get("label", 1)))) >= SIMILAR_SCORE:
            for query, positive in ((row["a"], row["b"]), (row["b"], row["a"])):
                yield Example(query=query, positive=positive, kind=Kind.SIMILARITY, source=source)
    elif "positive" in row:
        negatives = (row["negative"],) if row.get("negative") else ()
        kind = Kind.SIMILARITY
        yield Example(query=row["query"], positive=row["positive"], negatives=negatives, kind=kind, source=source)
    elif "text" in row:
        yield Example(query=row["text"], kind=Kind.LABEL, source=source, label=str(row.get("label", "")))


def _inferences(path: Path, source: str) -> Iterator[Example]:
    """Yields a premise with each hypothesis that it entails; those that contradict it are negatives."""
    by_premise: dict[str, dict[str, list[str]]] = {}
    for row in read_rows(path):
        if "premise" in row:
            by_label = by_premise.setdefault(row["premise"], {})
            by_label.setdefault(str(row.get("label", "")), []).append(row["hypothesis"])
    for premise, by_label in by_premise.items():
        negatives = tuple(dict.fromkeys(by_label.get(CONTRADICTION, ())))
        for hypothesis in dict.fromkeys(by_label.get(ENTAILMENT, ())):
            kind = Kind.SIMILARITY
            yield Example(query=premise, positive=hypothesis, negatives=negatives, kind=kind, source=source)


def _documents(folder: Path, split: str) -> Iterator[Document]:
    queries = {_row_id(row, folder): row["text"] for row in read_rows(folder / "queries.jsonl")}
    relevant: dict[str, dict[str, None]] = {}
    for query, document, _ in read_qrels(folder, split=split):
        if query in queries:
            relevant.setdefault(document, {})[_trimmed_text(queries[query])] = None
    for row in read_rows(folder / "corpus.jsonl"):
        text = _trimmed_text(f"{row.get('title') or ''} {row['text']}")
        answered = tuple(query for query in relevant.get(_row_id(row, folder), ()) if len(query) >= MIN_CHARS)
        if len(text) >= MIN_CHARS:
            yield Document(text=text, source=folder.name, queries=answered)


def _row_id(row: dict[str, Any], folder: Path) -> str:
    for name in ("_id", "id"):
        if name in row:
            return str(row[name])
    raise ConfigError(f"{folder}: a row of corpus.jsonl or queries.jsonl has neither '_id' nor 'id'")
