"""Tasks for mteb that need no download: a local folder of data sets, as mteb's own task classes.

Layout of a data set's folder, by the `type` in its `meta.json`:
    sts             test.jsonl {"a", "b", "score"}
    pairs           test.jsonl {"a", "b", "label": 0 or 1}
    classification  train.jsonl and test.jsonl {"text", "label"}
    clustering      test.jsonl {"text", "label"}
    reranking       test.jsonl {"query", "positive": [...], "negative": [...]}
    retrieval       corpus.jsonl {"id", "title", "text"}, queries.jsonl {"id", "text"}, qrels.tsv query, document, score
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.clustering import AbsTaskClustering
from mteb.abstasks.pair_classification import AbsTaskPairClassification
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.evaluation.instructions import QUESTION
from nvembed_deploy.files.json_lines import read_rows

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """A type of task: mteb's class and its score."""

    base: type
    name: str
    main_score: str
    prompt: str


KINDS = {
    "sts": Kind(AbsTaskSTS, "STS", "cosine_spearman", "Retrieve semantically similar text"),
    "pairs": Kind(
        AbsTaskPairClassification, "PairClassification", "similarity_ap", "Retrieve semantically similar text"
    ),
    "classification": Kind(
        AbsTaskClassification, "Classification", "accuracy", "Classify the text by its topic or intent"
    ),
    "clustering": Kind(AbsTaskClustering, "Clustering", "v_measure", "Identify the topic of the text"),
    "reranking": Kind(AbsTaskRetrieval, "Reranking", "map_at_1000", QUESTION),
    "retrieval": Kind(AbsTaskRetrieval, "Retrieval", "ndcg_at_10", QUESTION),
}


@dataclass(frozen=True)
class LocalTask:
    """An mteb task, and how many queries, pairs or texts its score is a mean over; None if unknown."""

    task: Any
    size: int | None


def make_task(name: str, kind: str, load: Callable[[], Any], *, size: int) -> LocalTask:
    """An mteb task on data at hand.

    Args:
        name: Of the task.
        kind: A key of `KINDS`.
        load: Makes the data in the shape that mteb's class of the kind takes.
        size: Queries, pairs or texts that the score is a mean over.
    """
    chosen = KINDS[kind]

    class Local(chosen.base):  # type: ignore[name-defined]
        metadata = TaskMetadata(
            name=name,
            type=chosen.name,
            main_score=chosen.main_score,
            prompt=chosen.prompt,
            description=f"{name}, local",
            reference=None,
            dataset={"path": "local/none", "revision": "1"},
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

        def load_data(self, num_proc: int | None = None, **_: Any) -> None:
            self.dataset = load()
            self.data_loaded = True

    if kind == "clustering":
        Local.max_document_to_embed = None
        Local.max_fraction_of_documents_to_embed = None
    if kind == "sts":
        Local.min_score, Local.max_score = 0, 5
    return LocalTask(Local(), size)


def folder_tasks(folder: Path, *, names: Sequence[str] = (), max_documents: int | None = None) -> list[LocalTask]:
    """Tasks of a folder of data sets.

    Args:
        folder: Holds a folder for each set; sets of unknown types are passed over.
        names: Only these; all where empty.
        max_documents: Cuts larger corpora, judged documents first.

    Raises:
        ConfigError: The folder holds no set of a known type, or not a named one.
    """
    found: dict[str, LocalTask] = {}
    metas = sorted(folder.glob("*/meta.json"))
    for meta in metas:
        kind = json.loads(meta.read_text(encoding="utf-8")).get("type")
        if kind in KINDS and (not names or meta.parent.name in names):
            found[meta.parent.name] = _read(meta.parent, kind, max_documents)
    if missing := sorted(set(names) - found.keys()):
        known = ", ".join(path.parent.name for path in metas)
        raise ConfigError(f"--data {folder} has no task {missing[0]!r}; it has {known or 'none'}")
    if not found:
        raise ConfigError(f"--data {folder} holds no data set with a meta.json of a known type ({', '.join(KINDS)})")
    return list(found.values())


def _read(folder: Path, kind: str, max_documents: int | None) -> LocalTask:
    name = folder.name
    if kind == "retrieval":
        corpus, queries, judged = _retrieval(folder, max_documents)
        return make_task(name, kind, lambda: retrieval_data(corpus, queries, judged), size=len(judged))
    test = list(read_rows(folder / "test.jsonl"))
    if kind == "reranking":
        return make_task(name, kind, lambda: reranking_data(test), size=len(test))
    if kind in ("sts", "pairs"):
        column = "score" if kind == "sts" else "labels"
        rows = [row for row in test if kind == "sts" or str(row["label"]) in ("0", "1")]
        scores = [float(row["score"]) if kind == "sts" else int(row["label"]) for row in rows]
        return make_task(name, kind, lambda: pair_data(rows, {column: scores}), size=len(rows))
    if kind == "clustering":
        return make_task(name, kind, lambda: cluster_data(test), size=len(test))
    train = list(read_rows(folder / "train.jsonl"))
    return make_task(name, kind, lambda: class_data(train, test), size=len(test))


def pair_data(rows: Rows, column: dict[str, list[Any]]) -> DatasetDict:
    """For STS and pair classification."""
    sides = {"sentence1": [row["a"] for row in rows], "sentence2": [row["b"] for row in rows]}
    return DatasetDict(test=Dataset.from_dict(sides | column))


def class_data(train: Rows, test: Rows) -> DatasetDict:
    """For classification: labels as numbers."""
    numbers = {label: number for number, label in enumerate(sorted({str(row["label"]) for row in train}))}
    known = {"train": train, "test": [row for row in test if str(row["label"]) in numbers]}
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"text": [row["text"] for row in rows], "label": [numbers[str(row["label"])] for row in rows]}
            )
            for split, rows in known.items()
        }
    )


def cluster_data(test: Rows) -> DatasetDict:
    """For clustering."""
    texts, labels = [row["text"] for row in test], [str(row["label"]) for row in test]
    return DatasetDict(test=Dataset.from_dict({"sentences": texts, "labels": labels}))


def retrieval_data(
    corpus: Rows, queries: Rows, judged: dict[str, dict[str, int]], ranked: dict[str, list[str]] | None = None
) -> dict[str, Any]:
    """For retrieval, and with `ranked` (query to documents) for reranking."""
    documents = [{"id": row["id"], "title": row.get("title") or "", "text": row["text"]} for row in corpus]
    asked = [{"id": row["id"], "text": row["text"]} for row in queries if row["id"] in judged]
    split = RetrievalSplitData(
        corpus=Dataset.from_list(documents), queries=Dataset.from_list(asked), relevant_docs=judged, top_ranked=ranked
    )
    return {"default": {"test": split}}


def reranking_data(rows: Rows) -> dict[str, Any]:
    """For reranking: each query's own candidates; one that several queries have is in the corpus once."""
    corpus, queries, judged, ranked = [], [], {}, {}
    known: dict[str, str] = {}
    for number, row in enumerate(rows):
        query = f"q{number}"
        candidates = [(text, 1) for text in row["positive"]] + [(text, 0) for text in row["negative"]]
        names: list[str] = []
        for place, (text, _) in enumerate(candidates):
            name = known.get(text, "")
            if not name or name in names:  # twice among a query's own candidates, it counts twice
                name = f"{query}-{place}"
                corpus.append({"id": name, "text": text})
            known.setdefault(text, name)
            names.append(name)
        queries.append({"id": query, "text": row["query"]})
        judged[query] = {name: relevant for name, (_, relevant) in zip(names, candidates, strict=True) if relevant}
        ranked[query] = names
    return retrieval_data(corpus, queries, judged, ranked)


def _retrieval(folder: Path, max_documents: int | None) -> tuple[Rows, Rows, dict[str, dict[str, int]]]:
    queries = list(read_rows(folder / "queries.jsonl"))
    known = {row["id"] for row in queries}
    judged: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, document, score = line.split("\t")[:3]
        if query in known and float(score) > 0:
            judged.setdefault(query, {})[document] = int(float(score))
    corpus = list(read_rows(folder / "corpus.jsonl"))
    if max_documents is not None and len(corpus) > max_documents:
        needed = {document for documents in judged.values() for document in documents}
        corpus.sort(key=lambda row: row["id"] not in needed)
        corpus = corpus[: max(max_documents, len(needed))]
    return corpus, queries, judged
