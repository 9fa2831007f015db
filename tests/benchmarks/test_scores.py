"""The ablation's metrics compared with values computed by hand."""

import json
import math

import numpy as np
import pytest

from benchmarks.ablation.scores import ndcg, score_folder
from nvembed_deploy.errors import ConfigError


def test_ndcg_equals_its_definition():
    assert ndcg([1.0, 0.0, 2.0], {"a": 1.0, "b": 2.0}) == pytest.approx((1 + 2 / 2) / (2 + 1 / math.log2(3)))
    assert ndcg([0.0], {"a": 1.0}) == 0.0


def test_a_folder_of_sets(tmp_path):
    (tmp_path / "sts").mkdir()
    rows = [{"a": "x", "b": "x", "score": 4}, {"a": "x", "b": "y", "score": 1}, {"a": "y", "b": "y", "score": 5}]
    (tmp_path / "sts" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    retrieval_folder = tmp_path / "search"
    retrieval_folder.mkdir()
    (retrieval_folder / "corpus.jsonl").write_text(
        '{"id": "1", "title": null, "text": "x"}\n{"id": "2", "text": "y"}\n'
    )
    (retrieval_folder / "queries.jsonl").write_text('{"id": "q", "text": "x"}\n{"id": "r", "text": "x"}\n')
    (retrieval_folder / "qrels.tsv").write_text("query\tdocument\tscore\nq\t1\t1\nr\t2\t1\nr\t1\t0\n")
    instructions = []

    def embed(texts, instruction):
        instructions.append(instruction)
        return np.array([[1.0, 0.0] if text == "x" else [0.1, 1.0] for text in texts], dtype=np.float32)

    scores = score_folder(tmp_path, embed)
    assert scores["search"] == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert scores["sts"] == pytest.approx(1.0)
    assert instructions.count("") == 1
    with pytest.raises(ConfigError, match="contains no data set of scored pairs"):
        score_folder(retrieval_folder, embed)
