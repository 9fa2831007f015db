"""Relevance judgements of a retrieval set: qrels.tsv, a header and rows of query, document, relevance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def read_qrels(folder: Path) -> Iterator[tuple[str, str, float]]:
    """Yields the query's id, the document's id and the relevance of each relevant document."""
    for line in (folder / "qrels.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, document, relevance = line.split("\t")[:3]
        if float(relevance) > 0:
            yield query, document, float(relevance)
