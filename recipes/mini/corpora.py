"""Reads the mini's data: the recipe's data sets, and what only the mini is trained on.

That is: articles (`*.txt`: a title line, paragraphs, an empty line) cut into texts and halves of paragraphs; all texts
of inference sets; pairs of queries that share a document; Python's documentation; and WordNet and Debian's packages
where they are given. Most are single texts, which teach by distillation.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from nvembed_deploy.files.json_lines import read_rows
from nvembed_deploy.training.corpora import (
    ENTAILMENT,
    MIN_CHARS,
    python_documentation,
    read_documents,
    read_set,
    set_folders,
    trimmed,
)
from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.instructions import Kind
from recipes.mini.debian import package_descriptions
from recipes.mini.wordnet import definitions

HALVES_FROM_CHARS = 240
"""Paragraphs of at least this length also become a pair (first half, second half)."""
WORDNET = "wordnet"
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])")


def read_data(folder: Path, *, wordnet: Path | None = None, packages: Path | None = None) -> Iterator[Example]:
    """Yields the mini's examples in a fixed order.

    Args:
        folder: Contains one folder for each data set; see `nvembed_deploy/training/corpora.py`.
        wordnet: Folder of WordNet's database files (`data.noun` and others), as Debian's package wordnet-base
            installs them.
        packages: File with the output of `apt-cache dumpavail`; the packages' descriptions are added as texts.

    Raises:
        ConfigError: A folder or a file does not exist or is damaged.
    """
    for path in set_folders(folder):
        for example in _set_examples(path):
            yield from trimmed(example)
    for document in read_documents(folder):
        for query, next_query in pairwise(document.queries):
            yield Example(query=query, positive=next_query, kind=Kind.SIMILARITY, source=document.source)
    yield from python_documentation()
    for terms, definition in () if wordnet is None else definitions(wordnet):
        yield from trimmed(Example(query=terms, positive=definition, kind=Kind.RETRIEVAL, source=WORDNET))
        yield from trimmed(Example(query=f"{terms}: {definition}", kind=Kind.TEXT, source=f"{WORDNET}_entries"))
    for _, description in () if packages is None else package_descriptions(packages):
        yield from trimmed(Example(query=description, kind=Kind.TEXT, source="debian_packages"))


def _set_examples(folder: Path) -> Iterator[Example]:
    is_inference = False
    for path in sorted(folder.glob("*.jsonl")):
        if path.name not in ("corpus.jsonl", "queries.jsonl"):
            for example in _inferences(path, folder.name):
                is_inference = True
                yield example
    if not is_inference:
        yield from read_set(folder)
    for path in sorted(folder.glob("*.txt")):
        yield from _articles(path, folder.name)


def _inferences(path: Path, source: str) -> Iterator[Example]:
    """Yields an entailed hypothesis with its premise, and the texts of all other rows."""
    for row in read_rows(path):
        if "premise" in row and row.get("label") == ENTAILMENT:
            yield Example(query=row["hypothesis"], positive=row["premise"], kind=Kind.SIMILARITY, source=source)
        elif "premise" in row:  # a premise occurs in several rows; equal texts count once
            for text in (row["hypothesis"], row["premise"]):
                yield Example(query=text, kind=Kind.TEXT, source=source)


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
