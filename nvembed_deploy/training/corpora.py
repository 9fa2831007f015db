"""Reads training text and pairs: a folder of data sets, Python's documentation, and WordNet where it is installed.

Layouts (UTF-8), told apart by the files in a data set's folder:
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
from nvembed_deploy.sample_texts import docstring_pairs, topic_pairs
from nvembed_deploy.training.debian import package_descriptions
from nvembed_deploy.training.examples import Example, read_examples
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.wordnet import definitions

SHORTEST_CHARS = 3
LONGEST_CHARS = 2400
"""About 600 tokens: more would be cut off in training anyway."""
HALVES_FROM_CHARS = 240
"""Paragraphs this long are also taught as (first half, second half)."""
ENTAILMENT = "entailment"
WORDNET = "wordnet"
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])")


def read_data(folder: Path, *, wordnet: Path | None = None, packages: Path | None = None) -> Iterator[Example]:
    """Yields every data set of a folder, Python's documentation, WordNet and package descriptions, in a fixed order.

    Args:
        folder: Holds a folder for each data set.
        wordnet: WordNet's database files (`data.noun` and others), such as those of Debian's package wordnet-base.
        packages: What `apt-cache dumpavail` prints; their descriptions join in as texts.

    Raises:
        ConfigError: The folder does not exist or holds no data set of a known layout.
    """
    if not folder.is_dir():
        raise ConfigError(f"--data {folder} is not a folder; pass the folder that holds the data sets' folders")
    found = False
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            for example in _read_set(path):
                found = True
                yield from _tidy(example)
    if not found:
        raise ConfigError(
            f"--data {folder} holds no data set in a known layout; see nvembed_deploy/training/corpora.py"
        )
    yield from _carried(wordnet, packages)


def _carried(wordnet: Path | None, packages: Path | None) -> Iterator[Example]:
    """What Python and Debian carry."""
    pairs = [("python_docstrings", docstring_pairs()), ("python_topics", topic_pairs())]
    if wordnet is not None:
        pairs.append((WORDNET, definitions(wordnet)))
    for source, texts in pairs:
        for query, positive in texts:
            yield from _tidy(Example(query=query, positive=positive, kind=Kind.RETRIEVAL, source=source))
            if source == WORDNET:
                yield from _tidy(Example(query=f"{query}: {positive}", kind=Kind.TEXT, source=f"{source}_entries"))
    for _, description in () if packages is None else package_descriptions(packages):
        yield from _tidy(Example(query=description, kind=Kind.TEXT, source="debian_packages"))


def _tidy(example: Example) -> Iterator[Example]:
    query, positive = (text.strip()[:LONGEST_CHARS] for text in (example.query, example.positive))
    negatives = tuple(text.strip()[:LONGEST_CHARS] for text in example.negatives)
    texts = [query, *([positive] if example.positive else []), *negatives]
    if min(map(len, texts)) >= SHORTEST_CHARS:
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
    elif "premise" in row:  # a premise stands in several rows; equal texts count once
        for text in (row["hypothesis"], row["premise"]):
            yield Example(query=text, kind=Kind.TEXT, source=source)
    elif "text" in row:
        yield Example(query=row["text"], kind=Kind.LABEL, source=source, label=str(row.get("label", "")))


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
            yield Example(query=query, positive=text, kind=Kind.RETRIEVAL, source=folder.name)
        for first, second in pairwise(asked):
            yield Example(query=first, positive=second, kind=Kind.SIMILARITY, source=folder.name)


def _articles(path: Path, source: str) -> Iterator[Example]:
    """Whole paragraphs, single sentences, runs of sentences, and halves of paragraphs."""
    rng = random.Random(path.name)
    for article in path.read_text(encoding="utf-8").split("\n\n"):
        title, _, body = article.strip().partition("\n")
        for paragraph in body.split("\n"):
            sentences = [part for part in _SENTENCE_END.split(paragraph) if len(part) >= SHORTEST_CHARS * 5]
            for sentence in sentences:
                if rng.random() < 0.5:
                    yield Example(query=sentence, kind=Kind.TEXT, source=source)
            if len(sentences) > 1 and rng.random() < 0.5:
                start = rng.randrange(len(sentences) - 1)
                run = " ".join(sentences[start : start + rng.randint(2, 4)])
                yield Example(query=run, kind=Kind.TEXT, source=f"{source}_runs")
            if len(paragraph) >= HALVES_FROM_CHARS and len(sentences) > 1:
                middle = len(sentences) // 2
                first, second = " ".join(sentences[:middle]), " ".join(sentences[middle:])
                yield Example(query=first, positive=second, kind=Kind.RETRIEVAL, source=f"{source}_halves")
        if len(body) > HALVES_FROM_CHARS:
            whole = f"{title}\n{body}" if rng.random() < 0.5 else body.replace("\n", " ")
            yield Example(query=whole, kind=Kind.TEXT, source=f"{source}_whole")
