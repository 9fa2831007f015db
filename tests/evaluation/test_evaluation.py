"""Evaluation: mteb's own smoke test, instructions, local data, and parity on the built-in tasks."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("mteb", reason="mteb is not installed: pip install nvembed-deploy[evaluation]")
pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[export]")

import mteb

from nvembed_deploy import Encoder
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.evaluation.command import main
from nvembed_deploy.evaluation.compare import TOLERANCES, Comparison, TaskResult, as_table, scores, tolerance_of
from nvembed_deploy.evaluation.instructions import OFFICIAL, STACKEXCHANGE, instruction_for
from nvembed_deploy.evaluation.model import MtebModel
from nvembed_deploy.evaluation.published import published_scores
from nvembed_deploy.evaluation.tasks import folder_tasks, reranking_data
from nvembed_deploy.spec import Precision
from nvembed_deploy.tokenization import DEFAULT_QUERY_INSTRUCTION


@pytest.mark.parametrize(
    ("name", "kind", "is_document", "expected"),
    [
        ("SciFact", "Retrieval", False, OFFICIAL["SciFact"]),
        ("SciFact", "Retrieval", True, ""),
        ("QuoraRetrieval", "Retrieval", True, OFFICIAL["QuoraRetrieval"]),
        ("NanoQuoraRetrieval", "Retrieval", True, OFFICIAL["QuoraRetrieval"]),
        ("ClimateFEVERHardNegatives", "Retrieval", False, OFFICIAL["ClimateFEVER"]),
        ("FEVERHardNegatives.v2", "Retrieval", False, OFFICIAL["FEVER"]),
        ("Touche2020Retrieval.v3", "Retrieval", False, OFFICIAL["Touche2020"]),
        ("CQADupstackUnixRetrieval", "Retrieval", False, STACKEXCHANGE),
        ("STS12", "STS", False, "Retrieve semantically similar text"),
        ("SummEval", "Summarization", True, "Given a news summary, retrieve other semantically similar summaries"),
        ("Banking77Classification", "Classification", False, "own"),
        ("AskUbuntuDupQuestions", "Reranking", True, ""),
        ("TwitterURLCorpus", "PairClassification", True, "own"),
        ("NQ", "Retrieval", False, DEFAULT_QUERY_INSTRUCTION),
    ],
)
def test_which_texts_get_an_instruction(name: str, kind: str, is_document: bool, expected: str) -> None:
    assert instruction_for(name, kind, is_document=is_document, default="own") == expected


def test_mteb_accepts_the_model(encoder: Encoder) -> None:
    run = mteb.mock_run(MtebModel(encoder))
    assert run.all_passed, dict(run.items())


def test_revisions_identify_the_engine(checkpoint: Path, bundles: dict[str, Path]) -> None:
    encoders = [Encoder(bundles[name], device="cpu") for name in ("fp32", "fp16")]
    models = [
        MtebModel(model_encoder) for model_encoder in (*encoders, Encoder.from_checkpoint(checkpoint, like=encoders[0]))
    ]
    assert len({model.mteb_model_meta.revision for model in models}) == 3
    assert len({model.mteb_model_meta.name for model in models}) == 1


def test_the_reference_is_given_the_same_tokens(checkpoint: Path, bundles: dict[str, Path]) -> None:
    encoder = Encoder(bundles["fp32"], device="cpu")
    reference = Encoder.from_checkpoint(checkpoint, like=encoder)
    texts = ["a", "water over the question " * 60, ""]
    assert (
        np.abs(encoder.encode(texts, instruction="Find it") - reference.encode(texts, instruction="Find it")).max()
        < 5e-6
    )
    assert "PyTorch" in reference.backend


def test_another_checkpoint_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    from tests.tiny import make_checkpoint

    wrong_checkpoint = make_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(ConfigError, match="differs from the file that the bundle was made from"):
        Encoder.from_checkpoint(wrong_checkpoint, like=Encoder(bundles["fp32"], device="cpu"))


def test_data_that_cannot_be_downloaded_are_named(bundles: dict[str, Path]) -> None:
    def unreachable() -> None:
        raise ConnectionError("no route to the hub\nand a second line")

    task = SimpleNamespace(metadata=SimpleNamespace(name="ArguAna"), data_loaded=False, load_data=unreachable)
    with pytest.raises(ConfigError, match=r"the data of ArguAna cannot be downloaded \(no route to the hub\); check"):
        scores(Encoder(bundles["fp32"], device="cpu"), [task])


def test_published_scores_are_shown_beside_the_reference() -> None:
    published = published_scores("nvidia/NV-Embed-v2")
    assert len(published) == 56
    assert set(published_scores("NV-Embed-v1")) < set(published)
    assert published_scores("my-own-NV-Embed-v2-tuned") == {}
    assert sum(published.values()) / len(published) == pytest.approx(72.31, abs=0.005)  # the mean that NVIDIA gives
    rows = [
        TaskResult(task=name, kind="Retrieval", size=500, reference=80.1, engine=80.1, tolerance=0.1, published=score)
        for name, score in (("SciFact", published["SciFact"]), ("Mine", None))
    ]
    comparison = Comparison(
        bundle="NV-Embed-v2", precision=Precision.FP16, reference="", engine="", revision="", results=(), versions={}
    )
    published_row, unpublished_row = as_table(replace(comparison, results=tuple(rows))).splitlines()[2:]
    assert published_row.endswith("| 0.100 | 80.13 |")
    assert unpublished_row.endswith("| 0.100 | - |")
    assert "published" not in as_table(replace(comparison, results=(rows[1],)))


def test_candidates_of_several_queries_are_embedded_once() -> None:
    rows = [
        {"query": "a", "positive": ["one"], "negative": ["two", "one"]},
        {"query": "b", "positive": ["two"], "negative": ["one", "three"]},
    ]
    split = reranking_data(rows)["default"]["test"]
    texts = {row["id"]: row["text"] for row in split["corpus"]}
    assert sorted(texts.values()) == ["one", "one", "three", "two"]
    assert [[texts[name] for name in split["top_ranked"][query]] for query in ("q0", "q1")] == [
        ["one", "two", "one"],
        ["two", "one", "three"],
    ]
    assert [[texts[name] for name in split["relevant_docs"][query]] for query in ("q0", "q1")] == [["one"], ["two"]]


def test_small_tasks_have_a_larger_tolerance() -> None:
    assert tolerance_of(Precision.FP16, 500) == tolerance_of(Precision.FP16, None) == TOLERANCES[Precision.FP16]
    assert tolerance_of(Precision.FP16, 125) == pytest.approx(2 * TOLERANCES[Precision.FP16])


def write_folder(folder: Path) -> Path:
    """Writes one small data set of each kind. No two pairs are equal: they would tie, and rounding would order them."""
    words = ["water", "question", "passage", "query", "over", "and", "the", "in"]
    rows = {
        "sts": [{"a": f"{words[i % 8]} {i}", "b": f"{words[i * 3 % 8]} {i * i}", "score": i % 6} for i in range(24)],
        "pairs": [{"a": f"{words[i % 8]} {i}", "b": f"{words[i * 3 % 8]} {i * i}", "label": i % 2} for i in range(24)],
        "classification": [{"text": f"{words[i % 8]} {i}", "label": f"class {i % 2}"} for i in range(40)],
        "clustering": [{"text": f"{words[i % 8]} {i}", "label": f"class {i % 2}"} for i in range(40)],
        "reranking": [
            {"query": words[i], "positive": [words[i] * 2], "negative": [f"{w} {i}" for w in words[:3]]}
            for i in range(8)
        ],
    }
    for kind, lines in rows.items():
        (folder / f"my_{kind}").mkdir(parents=True)
        for split in ("train", "test"):
            content = "\n".join(map(json.dumps, lines))
            (folder / f"my_{kind}" / f"{split}.jsonl").write_text(content)
    retrieval_folder = folder / "my_retrieval"
    retrieval_folder.mkdir()
    (retrieval_folder / "corpus.jsonl").write_text(
        "\n".join(json.dumps({"id": f"d{i}", "text": words[i]}) for i in range(8))
    )
    (retrieval_folder / "queries.jsonl").write_text(
        "\n".join(json.dumps({"id": f"q{i}", "text": words[i]}) for i in range(4))
    )
    (retrieval_folder / "qrels.tsv").write_text(
        "query\tdocument\tscore\n" + "\n".join(f"q{i}\td{i}\t1" for i in range(4))
    )
    for path in folder.iterdir():
        (path / "meta.json").write_text(json.dumps({"type": path.name.removeprefix("my_")}))
    return folder


def test_a_local_folder(
    checkpoint: Path, bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folder(tmp_path / "data")
    out = tmp_path / "out"
    common = ["--bundle", str(bundles["fp32"]), "--reference", str(checkpoint), "--data", str(data), "--device", "cpu"]
    assert main([*common, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert table.count("\n| my_") == 6
    record = json.loads((out / "parity.json").read_text())
    assert {task["kind"] for task in record["results"]} == {
        "STS", "PairClassification", "Classification", "Clustering", "Reranking", "Retrieval",
    }  # fmt: skip
    assert record["versions"]["mteb"]
    assert (out / "parity.png").stat().st_size > 1000
    assert (out / "parity.md").read_text() == table
    assert main([*common, "--tasks", "my_sts,nothing"]) == 1
    assert "has no task 'nothing'" in capsys.readouterr().err


def test_a_wrong_engine_is_detected(
    checkpoint: Path,
    bundles: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Detects an engine that returns wrong vectors, here with their components shifted by one."""
    encode = Encoder.encode

    def rolled(self: Encoder, texts: list[str], **options: object) -> np.ndarray:
        vectors = encode(self, texts, **options)  # type: ignore[arg-type]
        return vectors if self.backend.startswith("PyTorch") else np.roll(vectors, 1, axis=0)

    monkeypatch.setattr(Encoder, "encode", rolled)
    data = write_folder(tmp_path / "data")
    arguments = ["--bundle", str(bundles["fp32"]), "--reference", str(checkpoint), "--data", str(data)]
    assert main([*arguments, "--device", "cpu"]) == 1
    assert "exceed the tolerance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "MTEB(eng, v1)", "--tasks", "STS12"], "--benchmark defines its own tasks"),
        (["--benchmark", "MTEB(none)"], "mteb has no such task or benchmark"),
        (["--tasks", "NoSuchTask"], "mteb has no such task or benchmark"),
        (["--max-documents", "5"], "--max-documents applies to the corpora of --data only"),
        (["--data", "nowhere"], "contains no data set whose meta.json"),
    ],
)
def test_wrong_flags(
    checkpoint: Path, bundles: dict[str, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["--bundle", str(bundles["fp32"]), "--reference", str(checkpoint), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_reduced_corpus_keeps_the_judged_documents(tmp_path: Path) -> None:
    task = folder_tasks(write_folder(tmp_path), names=["my_retrieval"], max_documents=2)[0].task
    task.load_data()
    split = task.dataset["default"]["test"]
    assert set(split["corpus"]["id"]) == {f"d{index}" for index in range(4)}
