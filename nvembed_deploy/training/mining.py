"""Hard negatives for pairs, chosen by a teacher: close to the query but clearly below its positive.

The positive-aware rule (TopKPercPos): of the documents that the teacher ranks closest to the query, only those count
whose score is below 95 % of the positive's. Source: NV-Retriever, arXiv 2407.15831; NV-Embed, section 4.

Candidates are the documents of the set's corpus; of a set without a corpus, the positives and labelled negatives of its
examples of the same kind. No candidate shares an answer with the query: everything that judgements connect to it, over
any distance, is left out (`blend.answer_clusters`); so is, for retrieval, every text that is a query itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.training.blend import answer_clusters
from nvembed_deploy.training.examples import Document, Example
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.options import NEGATIVE_MARGIN, NEGATIVES

BLOCK_QUERIES = 1024
BLOCK_DOCUMENTS = 16384
"""Documents whose vectors are in memory at a time; with `BLOCK_QUERIES`, 64 MB of scores."""
SETTINGS_NAME = "settings.sha256"
PAIRED = (Kind.RETRIEVAL, Kind.SIMILARITY)


class DualEncoder(Protocol):
    """What mining needs of a teacher."""

    name: str

    def encode(self, texts: Sequence[str], *, is_query: bool) -> Tensor:
        """Returns unit vectors, float32 [N, D]."""
        ...


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the negatives of all pairs are, labelled ones included."""

    pairs: int
    negatives: int
    sharing: int
    """Negatives that share an answer with their query by the judgements."""
    incomplete: int
    """Pairs with fewer negatives than asked for."""

    def __str__(self) -> str:
        share = 100 * self.sharing / max(1, self.negatives)
        return (
            f"{self.negatives} negatives for {self.pairs} pairs; by the judgements, {self.sharing} of them "
            f"({share:.2f} %) share an answer with their query; {self.incomplete} pairs have fewer than asked for"
        )


def mine(
    examples: Sequence[Example],
    teacher: DualEncoder,
    *,
    documents: Iterable[Document] = (),
    negatives: int = NEGATIVES,
    margin: float = NEGATIVE_MARGIN,
    work: Path | None = None,
) -> tuple[list[Example], Report]:
    """Fills up each pair's negatives from the documents of its own source.

    Args:
        examples: Examples without a positive, and texts of kind `label`, are returned unchanged.
        teacher: Embeds queries and documents.
        documents: The corpora of the sources that have one, with their judgements.
        negatives: Number of negatives for each pair; labelled ones count and come first.
        margin: Fraction of the positive's score from which a text is not a negative.
        work: Folder for the state of the search, from which the same call continues; the caller deletes it in the end.

    Returns:
        The examples in their order, and a report. A pair may get fewer negatives: if its positive has a low score, or
        if judgements connect it to most of a small corpus.
    """
    corpora: dict[str, list[Document]] = {}
    for document in documents:
        corpora.setdefault(document.source, []).append(document)
    by_pool: dict[tuple[str, Kind], list[int]] = {}
    for index, example in enumerate(examples):
        if example.positive and example.kind in PAIRED:
            by_pool.setdefault((example.source, example.kind), []).append(index)
    if work is not None:
        _claim(work, [teacher.name, negatives, margin], examples, corpora)
    mined_examples = list(examples)
    reports: list[Report] = []
    for number, ((source, kind), members) in enumerate(by_pool.items()):
        pairs = [examples[index] for index in members]
        corpus = corpora.get(source, [])
        clusters = answer_clusters([*_judgements(corpus), *((pair.query, pair.positive) for pair in pairs)])
        pool = _Pool(pairs, _candidates(pairs, corpus, kind), clusters)
        state = _State(work and work / str(number))
        best = pool.closest(teacher, state, description=f"{source}, {kind.value}", count=negatives, margin=margin)
        for index, pair, closest in zip(members, pairs, best, strict=True):
            texts = dict.fromkeys([*pair.negatives[:negatives], *closest])
            mined_examples[index] = replace(pair, negatives=tuple(texts)[:negatives])
        reports.append(report([mined_examples[index] for index in members], corpus, asked=negatives))
    totals = {name: sum(getattr(part, name) for part in reports) for name in Report.__dataclass_fields__}
    return mined_examples, Report(**totals)


def report(pairs: Sequence[Example], corpus: Sequence[Document], *, asked: int) -> Report:
    """Counts the negatives that share an answer with their query, from the judgements themselves.

    Two texts share an answer if one answers the other, or if both are connected to the same query or document.
    """
    neighbours: dict[str, set[str]] = {}
    for query, answer in [*_judgements(corpus), *((pair.query, pair.positive) for pair in pairs)]:
        neighbours.setdefault(query, set()).add(answer)
        neighbours.setdefault(answer, set()).add(query)
    sharing = 0
    for pair in pairs:
        answers = neighbours[pair.query] | {pair.query}
        for negative in pair.negatives:
            sharing += negative in answers or not answers.isdisjoint(neighbours.get(negative, ()))
    return Report(
        pairs=len(pairs),
        negatives=sum(len(pair.negatives) for pair in pairs),
        sharing=sharing,
        incomplete=sum(len(pair.negatives) < asked for pair in pairs),
    )


def _judgements(corpus: Iterable[Document]) -> Iterator[tuple[str, str]]:
    return ((query, document.text) for document in corpus for query in document.queries)


def _candidates(pairs: Sequence[Example], corpus: Sequence[Document], kind: Kind) -> list[str]:
    texts = [document.text for document in corpus]
    if not texts:
        texts = [text for pair in pairs for text in (pair.positive, *pair.negatives)]
    queries = {pair.query for pair in pairs} | {query for document in corpus for query in document.queries}
    if kind is Kind.SIMILARITY:  # both sides are of the same sort, and a text may be on either
        queries = set()
    return [text for text in dict.fromkeys(texts) if text not in queries]


def _claim(
    work: Path, settings: list[Any], examples: Sequence[Example], corpora: Mapping[str, Sequence[Document]]
) -> None:
    """Empties the work folder if it belongs to a search with other settings, examples or documents."""
    sha256 = hashlib.sha256(json.dumps(settings).encode())
    items: Iterable[Example | Document] = chain(examples, *corpora.values())
    for item in items:
        sha256.update(json.dumps(asdict(item)).encode())
    path = work / SETTINGS_NAME
    if path.is_file() and path.read_text(encoding="utf-8") == sha256.hexdigest():
        log.info("continuing the search in %s", work)
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_file(path, sha256.hexdigest().encode())


class _State:
    """The state of one pool's search on disk: the queries' vectors, and the closest documents so far.

    Args:
        path: Beginning of the files' names; None to store nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def get(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns stored tensors, or computes and stores them."""
        path = self._file(name)
        if path is not None and path.is_file():
            return load(path.read_bytes())
        tensors = compute()
        self.put(name, tensors)
        return tensors

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Stores tensors in one step."""
        path = self._file(name)
        if path is not None:
            write_file(path, save(tensors))

    def _file(self, name: str) -> Path | None:
        return self._path and self._path.with_name(f"{self._path.name}-{name}.safetensors")


class _Pool:
    """The pairs of one source and kind, and the documents that their negatives come from.

    Args:
        pairs: At least one.
        candidates: Distinct texts.
        clusters: See `blend.answer_clusters`.
    """

    def __init__(self, pairs: Sequence[Example], candidates: Sequence[str], clusters: dict[str, int]) -> None:
        self.pairs = pairs
        self.candidates = candidates
        self.clusters = torch.tensor([clusters.get(text, -1) for text in self.candidates], dtype=torch.int64)
        self.query_clusters = torch.tensor([clusters[pair.query] for pair in pairs], dtype=torch.int64)

    def closest(
        self, teacher: DualEncoder, state: _State, *, description: str, count: int, margin: float
    ) -> list[list[str]]:
        """Returns each pair's closest documents that the rule allows, the closest first."""
        rated = state.get("queries", lambda: self._rate(teacher, margin))
        queries, limits = rated["queries"], rated["limits"]
        best = state.get("best", lambda: _nothing(len(self.pairs), count))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        starts = range(int(best["next"]), len(self.candidates), BLOCK_DOCUMENTS)
        for start in tqdm(starts, desc=f"negatives, {description}", unit="block", disable=None):
            columns = torch.arange(start, min(start + BLOCK_DOCUMENTS, len(self.candidates)))
            documents = teacher.encode([self.candidates[column] for column in columns.tolist()], is_query=False)
            for first in range(0, len(self.pairs), BLOCK_QUERIES):
                rows = slice(first, first + BLOCK_QUERIES)
                scores = (queries[rows].to(device) @ documents.to(device).T).cpu()
                shares_answer = self.query_clusters[rows, None] == self.clusters[None, columns]
                scores[shares_answer | (scores >= limits[rows, None])] = float("-inf")
                merged_scores = torch.cat((best["scores"][rows], scores), dim=1)
                merged_columns = torch.cat((best["columns"][rows], columns.expand(len(scores), -1)), dim=1)
                best["scores"][rows], order = merged_scores.topk(count, dim=1)
                best["columns"][rows] = merged_columns.gather(1, order)
            best["next"] = torch.tensor(start + BLOCK_DOCUMENTS)
            state.put("best", best)
        return [
            [self.candidates[column] for column, score in zip(columns, scores, strict=True) if score > float("-inf")]
            for columns, scores in zip(best["columns"].tolist(), best["scores"].tolist(), strict=True)
        ]

    def _rate(self, teacher: DualEncoder, margin: float) -> dict[str, Tensor]:
        """Returns the vectors of all queries and the score from which a document is no negative of each."""
        queries = _encode_distinct(teacher, [pair.query for pair in self.pairs], is_query=True)
        positives = _encode_distinct(teacher, [pair.positive for pair in self.pairs], is_query=False)
        return {"queries": queries, "limits": negative_limit((queries * positives).sum(dim=1), margin)}


def _nothing(pairs: int, count: int) -> dict[str, Tensor]:
    """Returns the state before the first document."""
    scores = torch.full((pairs, count), float("-inf"))
    return {"scores": scores, "columns": torch.zeros(pairs, count, dtype=torch.int64), "next": torch.tensor(0)}


def _encode_distinct(teacher: DualEncoder, texts: Sequence[str], *, is_query: bool) -> Tensor:
    table = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    return teacher.encode(list(table), is_query=is_query)[[table[text] for text in texts]]


def negative_limit(positive_scores: Tensor, margin: float) -> Tensor:
    """Returns the fraction `margin` of each positive's score, or as far below the score if it is negative."""
    return positive_scores - positive_scores.abs() * (1 - margin)
