"""The mini's wordings and batches, and a stage that is fed with them."""

import json
import random
from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")
for library in ("transformers", "accelerate", "matplotlib"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[train]")

from nvembed_deploy.training import stage  # noqa: E402
from nvembed_deploy.training.examples import read_examples  # noqa: E402
from nvembed_deploy.training.instructions import Kind  # noqa: E402
from nvembed_deploy.training.student import read_base  # noqa: E402
from recipes.mini import make  # noqa: E402
from recipes.mini.feed import MiniFeed, length_batches  # noqa: E402
from recipes.mini.make import STAGE_1, STAGE_2  # noqa: E402
from recipes.mini.wordings import INSTRUCTED, WORDINGS  # noqa: E402
from tests.training.tiny_training import LATENT, TinyTeacher, make_base, some_examples  # noqa: E402


def test_the_usual_wording_has_the_requested_frequency():
    feed, rng = MiniFeed(max_rows=16, max_tokens=600, main_wording=0.7), random.Random(1)
    for example in some_examples(4):
        kind, draws = example.kind, [feed.choose(STAGE_1)(example, rng) for _ in range(2000)]
        instructed = [wording for wording in draws if wording]
        assert len(instructed) / 2000 == pytest.approx(INSTRUCTED[kind], abs=0.05)
        share = (0 if kind is Kind.LABEL else 0.7) + (1 if kind is Kind.LABEL else 0.3) / len(WORDINGS[kind])
        assert instructed.count(WORDINGS[kind][0]) / len(instructed) == pytest.approx(share, abs=0.08)


def test_the_minis_examples_are_selected_and_mined(tmp_path, monkeypatch):
    for name in ("docstring_pairs", "topic_pairs"):
        monkeypatch.setattr(f"nvembed_deploy.training.corpora.{name}", lambda: [])
    monkeypatch.setattr(make, "word_lists", lambda teacher, seed: [])
    (tmp_path / "data" / "wiki_title_intro").mkdir(parents=True)
    rows = [json.dumps({"a": f"{index} water", "b": f"{index} passage over"}) for index in range(30)]
    (tmp_path / "data" / "wiki_title_intro" / "pairs.jsonl").write_text("\n".join(rows))
    sources = make.Sources(data=tmp_path / "data", exclude=None, wordnet=None, packages=None, teacher=None)
    make.prepare_examples(tmp_path, sources, TinyTeacher())
    for mix in make.MIXES:
        examples = read_examples(tmp_path / f"examples-{mix}.jsonl")
        assert len(examples) == 30
        assert sum(len(example.negatives) for example in examples) > 30


@pytest.mark.parametrize("options", [STAGE_1, STAGE_2], ids=["stage 1", "stage 2"])
def test_the_minis_stages_run(tmp_path, options):
    make_base(tmp_path / "base")
    student = read_base(tmp_path / "base", latent=LATENT)
    history = stage.train_student(
        student,
        some_examples(),
        work=tmp_path / "work",
        stage=replace(options, max_steps=2, log_steps=1, held_out=4, bf16=False, max_length=64),
        teacher=TinyTeacher(),
        feed=MiniFeed(max_rows=16, max_tokens=600),
    )
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]


@pytest.mark.parametrize("seed", [0, 1])
def test_length_batches_hold_every_group_once_within_the_limits(seed: int):
    rng = random.Random(seed)
    lengths, sizes = [rng.randint(3, 200) for _ in range(500)], [rng.randint(1, 3) for _ in range(500)]
    batches = length_batches(lengths, sizes, max_rows=16, max_tokens=1024, seed=seed)
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    for batch in batches:
        rows = sum(sizes[index] for index in batch)
        assert rows <= 16
        assert len(batch) == 1 or rows * max(lengths[index] for index in batch) <= 1024
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(spread) / len(spread) < 40
