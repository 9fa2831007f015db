"""Reads training text and pairs: a folder of data sets, Python's documentation, and WordNet where it is installed.

Layouts (UTF-8), recognized by the files in a data set's folder:
    pairs.jsonl                      {"a", "b"}: a query or title and its passage
    corpus.jsonl, queries.jsonl,
        qrels.tsv                    {"id", "title", "text"}, {"id", "text"}, and a table query, document, score
    triplets*.jsonl                  {"query", "positive", "negative"}
    *.jsonl with premise             {"premise", "hypothesis", "label"}: a pair where the label is entailment
    *.jsonl with text, label         {"text", "label"}: a text and its class
    examples*.jsonl                  lines as in `examples.py`
    *.txt                            articles: a title line, paragraphs, an empty line
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.json_lines import read_rows
from nvembed_deploy.files.qrels import read_qrels
from nvembed_deploy.sample_texts import docstring_pairs, topic_pairs
from nvembed_deploy.training.debian import package_descriptions
from nvembed_deploy.training.examples import Example, read_examples
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.wordnet import definitions

MIN_CHARS = 3
MAX_CHARS = 2400
"""About 600 tokens; training would truncate longer texts anyway."""
HALVES_FROM_CHARS = 240
"""Paragraphs of at least this length also become a pair (first half, second half)."""
ENTAILMENT = "entailment"
WORDNET = "wordnet"
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])")


def read_data(folder: Path, *, wordnet: Path | None = None, packages: Path | None = None) -> Iterator[Example]:
    """Yields every data set of a folder, Python's documentation, WordNet and package descriptions, in a fixed order.

    Args:
        folder: Holds a folder for each data set.
        wordnet: Folder of WordNet's database files (`data.noun` and others), as Debian's package wordnet-base
            installs them.
        packages: File with the output of `apt-cache dumpavail`; the packages' descriptions are added as texts.

    Raises:
        ConfigError: The folder does not exist or holds no data set of a known layout.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"--data {folder} is not a folder; pass the folder that contains one folder for each data set"
        )
    is_empty = True
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            for example in _read_set(path):
                is_empty = False
                yield from _trimmed(example)
    if is_empty:
        raise ConfigError(
            f"--data {folder} contains no data set in a supported layout; see nvembed_deploy/training/corpora.py"
        )
    yield from _system_examples(wordnet, packages)


def _system_examples(wordnet: Path | None, packages: Path | None) -> Iterator[Example]:
    """Yields examples from Python's documentation and, where given, from WordNet and Debian's packages."""
    pairs = [("python_docstrings", docstring_pairs()), ("python_topics", topic_pairs())]
    if wordnet is not None:
        pairs.append((WORDNET, definitions(wordnet)))
    for source, texts in pairs:
        for query, positive in texts:
            yield from _trimmed(Example(query=query, positive=positive, kind=Kind.RETRIEVAL, source=source))
            if source == WORDNET:
                yield from _trimmed(Example(query=f"{query}: {positive}", kind=Kind.TEXT, source=f"{source}_entries"))
    for _, description in () if packages is None else package_descriptions(packages):
        yield from _trimmed(Example(query=description, kind=Kind.TEXT, source="debian_packages"))


def _trimmed(example: Example) -> Iterator[Example]:
    query, positive = (text.strip()[:MAX_CHARS] for text in (example.query, example.positive))
    negatives = tuple(text.strip()[:MAX_CHARS] for text in example.negatives)
    texts = [query, *([positive] if example.positive else []), *negatives]
    if min(map(len, texts)) >= MIN_CHARS:
        yield Example(
            query=query,
            positive=positive,
            negatives=negatives,
            kind=example.kind,
            source=example.source,
            label=example.label,
            instruction=example.instruction,
        )


def _read_set(folder: Path) -> Iterator[Example]:
    if (folder / "corpus.jsonl").is_file():
        yield from _retrieval(folder)
        return
    for path in sorted(folder.glob("*.jsonl")):
        if path.name.startswith("examples"):
            yield from read_examples(path)
            continue
        for row in read_rows(path):
            yield from _row_examples(row, folder.name)
    for path in sorted(folder.glob("*.txt")):
        yield from _articles(path, folder.name)


def _row_examples(row: dict[str, Any], source: str) -> Iterator[Example]:
    if "a" in row and "b" in row:
        yield Example(query=row["a"], positive=row["b"], kind=Kind.RETRIEVAL, source=source)
    elif "positive" in row:
        negatives = (row["negative"],) if row.get("negative") else ()
        kind = Kind.SIMILARITY
        yield Example(query=row["query"], positive=row["positive"], negatives=negatives, kind=kind, source=source)
    elif "premise" in row and row.get("label") == ENTAILMENT:
        yield Example(query=row["hypothesis"], positive=row["premise"], kind=Kind.SIMILARITY, source=source)
    elif "premise" in row:  # a premise occurs in several rows; equal texts count once
        for text in (row["hypothesis"], row["premise"]):
            yield Example(query=text, kind=Kind.TEXT, source=source)
    elif "text" in row:
        yield Example(query=row["text"], kind=Kind.LABEL, source=source, label=str(row.get("label", "")))


def _retrieval(folder: Path) -> Iterator[Example]:
    corpus = {row["id"]: row for row in read_rows(folder / "corpus.jsonl")}
    queries = {row["id"]: row["text"] for row in read_rows(folder / "queries.jsonl")}
    relevant: dict[str, list[str]] = {}
    for query, document, _ in read_qrels(folder):
        if query in queries and document in corpus:
            relevant.setdefault(document, []).append(queries[query])
    for document, document_queries in relevant.items():
        text = f"{corpus[document].get('title', '')} {corpus[document]['text']}".strip()
        for query in document_queries:
            yield Example(query=query, positive=text, kind=Kind.RETRIEVAL, source=folder.name)
        for query, next_query in pairwise(document_queries):
            yield Example(query=query, positive=next_query, kind=Kind.SIMILARITY, source=folder.name)


def _articles(path: Path, source: str) -> Iterator[Example]:
    """Yields single sentences, runs of sentences, halves of paragraphs, and whole articles."""
    rng = random.Random(path.name)
    for article in path.read_text(encoding="utf-8").split("\n\n"):
        title, _, body = article.strip().partition("\n")
        for paragraph in body.split("\n"):
            sentences = [text for text in _SENTENCE_END.split(paragraph) if len(text) >= MIN_CHARS * 5]
            for sentence in sentences:
                if rng.random() < 0.5:
                    yield Example(query=sentence, kind=Kind.TEXT, source=source)
            if len(sentences) > 1 and rng.random() < 0.5:
                start = rng.randrange(len(sentences) - 1)
                run = " ".join(sentences[start : start + rng.randint(2, 4)])
                yield Example(query=run, kind=Kind.TEXT, source=f"{source}_runs")
            if len(paragraph) >= HALVES_FROM_CHARS and len(sentences) > 1:
                middle = len(sentences) // 2
                first_half, second_half = " ".join(sentences[:middle]), " ".join(sentences[middle:])
                yield Example(query=first_half, positive=second_half, kind=Kind.RETRIEVAL, source=f"{source}_halves")
        if len(body) > HALVES_FROM_CHARS:
            article_text = f"{title}\n{body}" if rng.random() < 0.5 else body.replace("\n", " ")
            yield Example(query=article_text, kind=Kind.TEXT, source=f"{source}_whole")
