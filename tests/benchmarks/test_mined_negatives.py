"""The share of mined negatives that are answers by hidden judgements."""

import json

import pytest

for library in ("torch", "tqdm", "scipy", "safetensors"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[train]")

from benchmarks.mined_negatives import measure  # noqa: E402
from tests.training.test_mining import TableTeacher  # noqa: E402


def test_hidden_answers_are_counted_and_known_ones_are_none(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    files = {
        "corpus": [{"_id": f"d{i}", "text": f"document {i}"} for i in range(40)],
        "queries": [{"_id": f"q{i}", "text": f"question {i}"} for i in range(4)],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "qrels.tsv").write_text("\n".join(f"q{i % 4}\td{i}\t1" for i in range(32)))
    record = measure(folder, TableTeacher(), max_documents=36, max_pairs=9, chars=300)
    known, half = (record["rounds"][name] for name in ("all", "half"))
    assert (record["documents"], record["judgements"], known["pairs"], half["pairs"]) == (36, 32, 9, 9)
    assert (known["sharing"], known["hidden_answers"], half["sharing"]) == (0, 0, 0)
    assert 0 < half["hidden_answers"] < half["negatives"]
