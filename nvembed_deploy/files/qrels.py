"""Relevance judgements of a retrieval set.

Layouts: `qrels.tsv`; or a folder `qrels` with one file for each split, `train.tsv` as BEIR's sets have it, or
`train.jsonl` as MTEB's have it on the hub. A table has rows of query, document, relevance, and may have a header; a
line of JSON has `query-id`, `corpus-id` and `score`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.json_lines import read_rows

COLUMNS = 3


def read_qrels(folder: Path, *, split: str = "test") -> Iterator[tuple[str, str, float]]:
    """Yields the query's id, the document's id and the relevance of each relevant document.

    Args:
        folder: Folder of the set.
        split: Which file of the folder `qrels`; ignored for a set with a `qrels.tsv`.

    Raises:
        ConfigError: The split does not exist, or a row is damaged.
    """
    path = folder / "qrels.tsv"
    if not path.is_file():
        path = _split_path(folder, split)
    rows = _json_rows(path) if path.suffix == ".jsonl" else _table_rows(path)
    for query, document, relevance in rows:
        if relevance > 0:
            yield query, document, relevance


def _split_path(folder: Path, split: str) -> Path:
    for suffix in (".tsv", ".jsonl"):
        path = folder / "qrels" / f"{split}{suffix}"
        if path.is_file():
            return path
    splits = sorted(path.stem for path in (folder / "qrels").glob("*") if path.suffix in (".tsv", ".jsonl"))
    raise ConfigError(
        f"{folder} has no judgements of the split {split!r}: neither qrels.tsv nor qrels/{split}.tsv exists"
        + (f"; the splits there are {', '.join(splits)}" if splits else "")
    )


def _table_rows(path: Path) -> Iterator[tuple[str, str, float]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        columns = line.split("\t")
        if not line.strip() or (number == 1 and not _is_number(columns[-1])):  # an empty line or the header
            continue
        if len(columns) != COLUMNS or not _is_number(columns[-1]):
            raise ConfigError(
                f"{path}, line {number}: not a query, a document and a number, separated by tabs, but {line[:80]!r}"
            )
        query, document, relevance = columns
        yield query, document, float(relevance)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _json_rows(path: Path) -> Iterator[tuple[str, str, float]]:
    for number, row in enumerate(read_rows(path), 1):
        try:
            yield str(row["query-id"]), str(row["corpus-id"]), float(row.get("score", 1))
        except (KeyError, TypeError, ValueError) as err:
            raise ConfigError(
                f"{path}, line {number}: 'query-id', 'corpus-id' and a number 'score' are needed"
            ) from err
