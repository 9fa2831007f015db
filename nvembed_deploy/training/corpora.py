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
from collections.abc import Collection, Iterator
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
INFERENCE_LABELS = (ENTAILMENT, "neutral", CONTRADICTION, "not_entailment", "-")
"""Those of SNLI and MultiNLI, where `-` is a row that the annotators did not agree on, and of GLUE's RTE and QNLI,
where what is not entailed may contradict or not, so that it is no negative."""
LAYOUTS = ({"a", "b"}, {"query", "positive"}, {"premise", "hypothesis"}, {"text"})
MAX_SCORE = 5
SIMILAR_SCORE = 4
"""Lowest score of a pair that counts as similar, on the scale of the STS sets. Source: NV-Embed, section 4."""
NO_SET = "contains no folder with a data set in a supported layout; docs/training.md lists the layouts"
SPLIT = "train"
"""Split whose judgements are trained on."""

log = logging.getLogger(__name__)


def read_data(folder: Path, *, split: str = SPLIT, names: Collection[str] | None = None) -> Iterator[Example]:
    """Yields the examples of the data sets of a folder, set by set.

    Args:
        folder: Contains one folder for each data set.
        split: Split of the judgements, for sets with one file of judgements for each split.
        names: The sets that are needed; folders that cannot have any of them are not read. By default all of them.

    Raises:
        ConfigError: The folder does not exist, has no data set of a known layout, or a set lacks the split.
    """
    is_empty = True
    for path in set_folders(folder):
        if not _is_named(path, names):
            is_empty = False
            continue
        count = 0
        for example in read_set(path, split=split):
            count += 1
            yield from trimmed(example)
        if not count:
            log.warning("%s contains no data set in a supported layout and is left out", path)
        is_empty &= not count
    if is_empty:
        is_set = any(folder.glob("*.jsonl"))
        raise ConfigError(
            f"--data {folder} "
            + (f"is itself a data set; pass {folder.parent}, the folder that contains it" if is_set else NO_SET)
        )


def read_documents(folder: Path, *, split: str = SPLIT, names: Collection[str] | None = None) -> Iterator[Document]:
    """Yields the documents of the corpora of a folder, with the queries that each answers; see `read_data`."""
    for path in set_folders(folder):
        if _is_named(path, names) and (path / "corpus.jsonl").is_file():
            yield from set_documents(path, split=split)


def python_documentation() -> Iterator[Example]:
    """Yields pairs from the documentation that this Python brings: a summary or a topic, and its text."""
    for source, pairs in (("python_docstrings", docstring_pairs()), ("python_topics", topic_pairs())):
        for query, positive in pairs:
            yield from trimmed(Example(query=query, positive=positive, kind=Kind.RETRIEVAL, source=source))


def _is_named(folder: Path, names: Collection[str] | None) -> bool:
    """Returns True if examples of a folder can be of a set with one of the names; None names every set."""
    return names is None or folder.name in names or any(folder.glob("examples*.jsonl"))


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
        for document in set_documents(folder, split=split):
            for query in document.queries:
                yield Example(query=query, positive=document.text, kind=Kind.RETRIEVAL, source=folder.name)
        return
    for path in sorted(folder.glob("*.jsonl")):
        if path.name.startswith("examples"):
            yield from read_examples(path)
            continue
        yield from _inferences(path, folder.name)
        field_names: set[str] = set()
        for number, row in enumerate(read_rows(path), 1):
            yield from _row_examples(row, folder.name, f"{path}, row {number}")
            field_names |= row.keys()
        if not any(field_names.issuperset(layout) for layout in LAYOUTS):
            log.warning("%s is left out: fields %s are no supported layout", path, ", ".join(sorted(field_names)))


def _row_examples(row: dict[str, Any], source: str, location: str) -> Iterator[Example]:
    if "a" in row and "b" in row:
        a, b = text_field(row, "a", location), text_field(row, "b", location)
        if "score" not in row and "label" not in row:
            yield Example(query=a, positive=b, kind=Kind.RETRIEVAL, source=source)
        elif _similarity(row, location) >= SIMILAR_SCORE:
            yield Example(query=a, positive=b, kind=Kind.SIMILARITY, source=source)
            yield Example(query=b, positive=a, kind=Kind.SIMILARITY, source=source)
    elif "positive" in row:
        query, positive = text_field(row, "query", location), text_field(row, "positive", location)
        negatives = (text_field(row, "negative", location),) if row.get("negative") else ()
        yield Example(query=query, positive=positive, negatives=negatives, kind=Kind.SIMILARITY, source=source)
    elif "text" in row:
        text = text_field(row, "text", location)
        yield Example(query=text, kind=Kind.LABEL, source=source, label=str(row.get("label", "")))


def _similarity(row: dict[str, Any], location: str) -> float:
    name = "score" if "score" in row else "label"
    try:
        number = float(row[name])
    except (TypeError, ValueError) as err:
        raise ConfigError(f"{location}: field {name!r} must be a number, got {row[name]!r}") from err
    return number if name == "score" else MAX_SCORE * number


def text_field(row: dict[str, Any], name: str, location: str) -> str:
    """Returns the text of a field.

    Raises:
        ConfigError: The field is missing or no string.
    """
    text = row.get(name)
    if not isinstance(text, str):
        raise ConfigError(f"{location}: field {name!r} must be a string, got {text!r}")
    return text


def _inferences(path: Path, source: str) -> Iterator[Example]:
    """Yields a premise with each hypothesis that it entails; those that contradict it are negatives."""
    by_premise: dict[str, dict[str, list[str]]] = {}
    for number, row in enumerate(read_rows(path), 1):
        if "premise" not in row:
            continue
        location = f"{path}, row {number}"
        label = row.get("label")
        if label not in INFERENCE_LABELS:
            names = ", ".join(INFERENCE_LABELS)
            raise ConfigError(f"{location}: label is {label!r}; use {names}")
        hypotheses = by_premise.setdefault(text_field(row, "premise", location), {}).setdefault(label, [])
        hypotheses.append(text_field(row, "hypothesis", location))
    for premise, by_label in by_premise.items():
        negatives = tuple(dict.fromkeys(by_label.get(CONTRADICTION, ())))
        for hypothesis in dict.fromkeys(by_label.get(ENTAILMENT, ())):
            kind = Kind.SIMILARITY
            yield Example(query=premise, positive=hypothesis, negatives=negatives, kind=kind, source=source)


def set_documents(folder: Path, *, split: str = SPLIT) -> Iterator[Document]:
    """Yields the documents of one data set's corpus, with the queries that each answers.

    Raises:
        ConfigError: A row is damaged, or no judgement names a query and a document of the set.
    """
    queries = {row_id: row["text"] for row_id, row in _identified_rows(folder / "queries.jsonl")}
    relevant: dict[str, dict[str, None]] = {}
    judgement_count, match_count = 0, 0
    for query, document, _ in read_qrels(folder, split=split):
        judgement_count += 1
        if query in queries:
            relevant.setdefault(document, {})[_trimmed_text(queries[query])] = None
    for row_id, row in _identified_rows(folder / "corpus.jsonl"):
        answered = relevant.get(row_id, {})
        match_count += bool(answered)
        text = _trimmed_text(f"{row.get('title') or ''} {row['text']}")
        if len(text) >= MIN_CHARS:
            long_enough = tuple(query for query in answered if len(query) >= MIN_CHARS)
            yield Document(text=text, source=folder.name, queries=long_enough)
    if judgement_count and not match_count:
        raise ConfigError(
            f"{folder}: none of {judgement_count} judgements names a query of queries.jsonl and a document of "
            "corpus.jsonl; compare the ids in the three files"
        )


def _identified_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the id and the row of each query or document."""
    for number, row in enumerate(read_rows(path), 1):
        location = f"{path}, row {number}"
        row_id = row.get("_id", row.get("id"))
        if row_id is None:
            raise ConfigError(f"{location}: there is neither '_id' nor 'id'")
        text_field(row, "text", location)
        yield str(row_id), row
