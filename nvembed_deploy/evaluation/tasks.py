"""Tasks for mteb without a download: a local folder of data sets, loaded into mteb's task classes.

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
from nvembed_deploy.files.json_lines import read_rows
from nvembed_deploy.files.qrels import read_qrels
from nvembed_deploy.tokenization import DEFAULT_QUERY_INSTRUCTION

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """Type of a task: mteb's class, type name, main score and default prompt."""

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
    "reranking": Kind(AbsTaskRetrieval, "Reranking", "map_at_1000", DEFAULT_QUERY_INSTRUCTION),
    "retrieval": Kind(AbsTaskRetrieval, "Retrieval", "ndcg_at_10", DEFAULT_QUERY_INSTRUCTION),
}


@dataclass(frozen=True)
class LocalTask:
    """An mteb task, and the number of queries, pairs or texts that its score is a mean over; None if unknown."""

    task: Any
    size: int | None


def make_task(name: str, kind: str, load: Callable[[], Any], *, size: int) -> LocalTask:
    """Makes an mteb task from local data.

    Args:
        name: Name of the task.
        kind: A key of `KINDS`.
        load: Returns the data in the format of mteb's class for the kind.
        size: Number of queries, pairs or texts that the score is a mean over.
    """
    task_kind = KINDS[kind]

    class Local(task_kind.base):  # type: ignore[name-defined]
        metadata = TaskMetadata(
            name=name,
            type=task_kind.name,
            main_score=task_kind.main_score,
            prompt=task_kind.prompt,
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
    """Makes the tasks of a folder of data sets.

    Args:
        folder: Contains a folder for each data set; unknown types are ignored.
        names: Names of the data sets to use; all if empty.
        max_documents: Maximum size of a corpus; judged documents are kept first.

    Raises:
        ConfigError: The folder has no data set of a known type, or lacks a named one.
    """
    tasks: dict[str, LocalTask] = {}
    meta_paths = sorted(folder.glob("*/meta.json"))
    for meta_path in meta_paths:
        kind = json.loads(meta_path.read_text(encoding="utf-8")).get("type")
        if kind in KINDS and (not names or meta_path.parent.name in names):
            tasks[meta_path.parent.name] = _read(meta_path.parent, kind, max_documents)
    if missing_names := sorted(set(names) - tasks.keys()):
        available = ", ".join(path.parent.name for path in meta_paths)
        raise ConfigError(f"--data {folder} has no task {missing_names[0]!r}; available: {available or 'none'}")
    if not tasks:
        raise ConfigError(
            f"--data {folder} contains no data set whose meta.json has a supported type ({', '.join(KINDS)})"
        )
    return list(tasks.values())


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
    """Returns the data of a task for STS or pair classification."""
    sides = {"sentence1": [row["a"] for row in rows], "sentence2": [row["b"] for row in rows]}
    return DatasetDict(test=Dataset.from_dict(sides | column))


def class_data(train: Rows, test: Rows) -> DatasetDict:
    """Returns the data of a classification task, with labels as integers."""
    label_ids = {label: label_id for label_id, label in enumerate(sorted({str(row["label"]) for row in train}))}
    splits = {"train": train, "test": [row for row in test if str(row["label"]) in label_ids]}
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"text": [row["text"] for row in rows], "label": [label_ids[str(row["label"])] for row in rows]}
            )
            for split, rows in splits.items()
        }
    )


def cluster_data(test: Rows) -> DatasetDict:
    """Returns the data of a clustering task."""
    texts, labels = [row["text"] for row in test], [str(row["label"]) for row in test]
    return DatasetDict(test=Dataset.from_dict({"sentences": texts, "labels": labels}))


def retrieval_data(
    corpus: Rows, queries: Rows, judged: dict[str, dict[str, int]], ranked: dict[str, list[str]] | None = None
) -> dict[str, Any]:
    """Returns the data of a retrieval task or, with `ranked` (documents by query), of a reranking task."""
    documents = [{"id": row["id"], "title": row.get("title") or "", "text": row["text"]} for row in corpus]
    judged_queries = [{"id": row["id"], "text": row["text"]} for row in queries if row["id"] in judged]
    split = RetrievalSplitData(
        corpus=Dataset.from_list(documents),
        queries=Dataset.from_list(judged_queries),
        relevant_docs=judged,
        top_ranked=ranked,
    )
    return {"default": {"test": split}}


def reranking_data(rows: Rows) -> dict[str, Any]:
    """Returns the data of a reranking task; a candidate of several queries is in the corpus once."""
    corpus, queries, judged, ranked = [], [], {}, {}
    document_names: dict[str, str] = {}
    for query_index, row in enumerate(rows):
        query = f"q{query_index}"
        candidates = [(text, 1) for text in row["positive"]] + [(text, 0) for text in row["negative"]]
        names: list[str] = []
        for candidate_index, (text, _) in enumerate(candidates):
            name = document_names.get(text, "")
            if not name or name in names:  # a text that is twice among a query's candidates counts twice
                name = f"{query}-{candidate_index}"
                corpus.append({"id": name, "text": text})
            document_names.setdefault(text, name)
            names.append(name)
        queries.append({"id": query, "text": row["query"]})
        judged[query] = {name: relevant for name, (_, relevant) in zip(names, candidates, strict=True) if relevant}
        ranked[query] = names
    return retrieval_data(corpus, queries, judged, ranked)


def _retrieval(folder: Path, max_documents: int | None) -> tuple[Rows, Rows, dict[str, dict[str, int]]]:
    queries = list(read_rows(folder / "queries.jsonl"))
    query_ids = {row["id"] for row in queries}
    judged: dict[str, dict[str, int]] = {}
    for query, document, relevance in read_qrels(folder):
        if query in query_ids:
            judged.setdefault(query, {})[document] = int(relevance)
    corpus = list(read_rows(folder / "corpus.jsonl"))
    if max_documents is not None and len(corpus) > max_documents:
        judged_documents = {document for documents in judged.values() for document in documents}
        corpus.sort(key=lambda row: row["id"] not in judged_documents)
        corpus = corpus[: max(max_documents, len(judged_documents))]
    return corpus, queries, judged
