"""`python -m benchmarks.search_modes WORK --data DIR`: what search by meaning, by words and by both finds.

Each retrieval set is added to a collection of the search page, as a visitor would add a file, and its queries are
searched by the page's own code; a document's rank is that of its best passage. Reported is nDCG@10. WORK keeps the
collections: a stopped run goes on where it was. Writes benchmarks/results/search_modes.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.vector_data import RetrievalSet, retrieval_sets
from nvembed_deploy import ConfigError, Encoder
from nvembed_deploy.app.documents import Limits
from nvembed_deploy.app.jobs import Jobs
from nvembed_deploy.app.library import Library
from nvembed_deploy.app.requests import default_instruction
from nvembed_deploy.app.search import MAX_RESULTS, MODES, Searcher
from nvembed_deploy.app.store import FolderStore
from nvembed_deploy.console import echo, run, step
from nvembed_deploy.export.options import default_model
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.parity.vector_kinds import TOP_K, ndcg
from nvembed_deploy.system import describe_machine, installed_versions

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "search_modes.json"
RECORDED = ("numpy", "onnxruntime", "bm25s")
NO_DOCUMENT = -1
UNLIMITED = Limits(file_bytes=2**40, chars=2**40)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_modes", description=__doc__)
    parser.add_argument("work", type=Path, help="folder for the collections, which later runs search again")
    parser.add_argument("--data", type=Path, help="folder of retrieval and reranking sets beside the built-in one")
    parser.add_argument("--bundle", type=Path, default=default_model(), help="bundle (default: the embedded model)")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="names of the sets (default: all)")
    flags = parser.parse_args(argv)

    def command() -> None:
        sets = retrieval_sets(flags.data)
        if unknown := set(flags.sets or []) - {retrieval_set.name for retrieval_set in sets}:
            raise ConfigError(f"there is no set {min(unknown)!r}; there are {', '.join(each.name for each in sets)}")
        encoder = Encoder(flags.bundle, device="cpu", backend="onnxruntime")
        library, searcher = Library(flags.work / "collections", encoder), Searcher(encoder)
        try:
            rows = [
                measure(retrieval_set, indexed(library, retrieval_set, flags.work), searcher)
                for retrieval_set in sets
                if not flags.sets or retrieval_set.name in flags.sets
            ]
        finally:
            searcher.close()
        options = (" --data DIR" if flags.data else "") + (f" --sets {' '.join(flags.sets)}" if flags.sets else "")
        record = {
            "command": f"python -m benchmarks.search_modes WORK{options}",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "versions": installed_versions(RECORDED),
            "model": encoder.manifest.source.name,
            "precision": encoder.manifest.precision.value,
            "rows": rows,
        }
        write_file(RESULT, (json.dumps(record, indent=1) + "\n").encode())
        echo(f"done: {RESULT.relative_to(ROOT)}; now run: python -m tools.readme")

    return run(command)


def indexed(library: Library, retrieval_set: RetrievalSet, work: Path) -> FolderStore:
    """Adds the documents of a set to a collection, unless it has them, and opens it."""
    file = work / f"{retrieval_set.name}.jsonl"
    lines = (json.dumps({"id": index, "text": text}) for index, text in enumerate(retrieval_set.documents))
    write_file(file, ("\n".join(lines) + "\n").encode())
    job = Jobs(library, UNLIMITED).add_files(retrieval_set.name, [file])
    with tqdm(desc=f"indexing {retrieval_set.name}", unit="passage") as progress_bar:
        while job.is_active:
            progress_bar.total = job.total
            progress_bar.update(job.done - progress_bar.n)
            time.sleep(0.5)
    if job.state != "done":
        raise ConfigError(f"{retrieval_set.name} was not indexed: {job.message}")
    return library.open(retrieval_set.name)


def measure(retrieval_set: RetrievalSet, store: FolderStore, searcher: Searcher) -> dict[str, Any]:
    """Searches a set's queries in every mode, and returns its sizes and nDCG@10 in points."""
    rankings: dict[str, list[list[int]]] = {mode: [] for mode in MODES}
    instruction = default_instruction(retrieval_set.name)
    with step(f"searching {retrieval_set.name}, {len(retrieval_set.queries):,} queries"):
        for query in retrieval_set.queries:
            for mode in MODES:
                result = searcher.search(store, query, instruction=instruction, count=MAX_RESULTS, mode=mode)
                best = list(dict.fromkeys(int(hit.passage.record_id) for hit in result.hits))[:TOP_K]
                rankings[mode].append(best + [NO_DOCUMENT] * (TOP_K - len(best)))
    return {
        "set": retrieval_set.name,
        "documents": len(retrieval_set.documents),
        "passages": len(store),
        "queries": len(retrieval_set.queries),
        "ndcg": {
            mode: round(100 * ndcg(np.array(ranking, dtype=np.int64), retrieval_set.judged), 2)
            for mode, ranking in rankings.items()
        },
    }


if __name__ == "__main__":
    raise SystemExit(main())
