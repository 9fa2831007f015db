"""The mini's wordings, batches and losses, and stages that use them."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")
for library in ("transformers", "accelerate", "matplotlib"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[train]")

from nvembed_deploy.errors import ConfigError  # noqa: E402
from nvembed_deploy.tokenization import TextEncoder  # noqa: E402
from nvembed_deploy.training import stage  # noqa: E402
from nvembed_deploy.training.examples import read_examples  # noqa: E402
from nvembed_deploy.training.groups import Row  # noqa: E402
from nvembed_deploy.training.instructions import Kind  # noqa: E402
from nvembed_deploy.training.student import read_base  # noqa: E402
from recipes.mini import make  # noqa: E402
from recipes.mini.make import STAGE_1, STAGE_2  # noqa: E402
from recipes.mini.options import LossWeights, MiniOptions  # noqa: E402
from recipes.mini.recipe import Distillation, MiniRecipe, length_batches  # noqa: E402
from recipes.mini.trainer import MiniCollator, add_noise, mini_loss  # noqa: E402
from recipes.mini.wordings import INSTRUCTED, WORDINGS  # noqa: E402
from tests.training.tiny_training import (  # noqa: E402
    LATENT,
    TINY,
    TinyTeacher,
    check_resumed_run,
    make_base,
    some_examples,
)

PROMPT = "Instruct: question\nQuery: "
FOLLOWING = LossWeights(pairs=0.3, distillation=2.0, tokens=1.0, match=1.0)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def encoder(base_folder) -> TextEncoder:
    student = read_base(base_folder, latent=LATENT)
    return TextEncoder(student.tokenizer_json.encode(), student.contract)


def mini_options(weights: LossWeights, **changes) -> MiniOptions:
    return MiniOptions(**(vars(TINY) | {"weights": weights} | changes))


def test_the_usual_wording_has_the_requested_frequency():
    recipe, rng = MiniRecipe(None, max_rows=16, max_tokens=600, main_wording=0.7), random.Random(1)
    for example in some_examples(4):
        kind, draws = example.kind, [recipe.choose(STAGE_1)(example, rng) for _ in range(2000)]
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
def test_the_minis_stages_run(tmp_path, base_folder, options):
    student = read_base(base_folder, latent=LATENT)
    history = stage.train_student(
        student,
        some_examples(),
        work=tmp_path / "work",
        stage=replace(options, max_steps=2, log_steps=1, held_out=4, bf16=False, max_length=64),
        recipe=MiniRecipe(TinyTeacher(), max_rows=16, max_tokens=600),
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


@pytest.mark.parametrize(
    ("weights", "changes"),
    [
        pytest.param(FOLLOWING, {"relative_steps": True, "learning_rate": 1e-2, "noise": 0.01}, marks=pytest.mark.slow),
        (replace(FOLLOWING, consistency=5.0, centering=1.0), {"in_batch": False}),
        pytest.param(LossWeights(pairs=0.0, consistency=5.0), {}, marks=pytest.mark.slow),
    ],
    ids=["relative", "consistent", "consistency alone"],
)
def test_a_resumed_run_reaches_the_same_weights_and_learns(tmp_path, base_folder, weights, changes):
    recipe = Distillation(TinyTeacher() if weights.need_teacher else None)
    check_resumed_run(tmp_path, base_folder, mini_options(weights, held_out=6, epochs=2, **changes), recipe)


def test_a_teacher_that_is_missing_does_not_fit_or_changes_is_refused(tmp_path, base_folder):
    options = mini_options(LossWeights(distillation=1.0), max_steps=1, save_steps=1)

    def run(teacher) -> None:
        settings = {"stage": options, "latent": LATENT, "recipe": Distillation(teacher)}
        stage.run_stage(base_folder, some_examples(), tmp_path / "o", work=tmp_path / "w", **settings)

    with pytest.raises(ConfigError, match="pass --teacher"):
        run(None)
    other_teacher = TinyTeacher()
    other_teacher.dim = 17
    with pytest.raises(ConfigError, match="dimension 17, the base's 16"):
        run(other_teacher)
    assert not (tmp_path / "o").exists()
    run(TinyTeacher())
    other_teacher.dim, other_teacher.name = 16, "another"
    with pytest.raises(ConfigError, match="other settings or examples"):
        run(other_teacher)


def test_consistency_pulls_an_instructed_text_to_its_uninstructed_vector(base_folder, encoder):
    rows = [Row(text="a cat", prompt=PROMPT, question=True), Row(text="a dog", prompt=PROMPT)]
    rows.append(Row(text="a bird"))
    batch = MiniCollator(encoder, max_length=64, plain=True)([[(row,) for row in rows]])
    assert batch["instructed"].tolist() == [0, 1]
    ids, _, _ = encoder.pad(encoder.tokenize(["a cat", "a dog"], max_length=64))
    assert batch["plain_ids"].tolist() == ids.tolist()

    vectors = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    plain = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)
    centre = 0.2 * torch.randn(8)
    options = mini_options(LossWeights(pairs=0.0, consistency=5.0))
    targets = torch.stack(
        (torch.nn.functional.normalize(plain[0] - centre, dim=0), plain[1])
    )  # the question alone loses it
    expected = 5.0 * (1 - (vectors[:2] * targets).sum(dim=1).mean())
    states = torch.zeros(3, 1, 8)
    loss = mini_loss(vectors, states, batch, stage=options, teacher=None, centre=centre, plain=plain)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    without = MiniCollator(encoder, max_length=64, plain=True)([[(rows[2],)]])
    assert "instructed" not in without


def test_noise_scales_with_each_channel_and_only_in_training():
    torch.manual_seed(1)
    layer = torch.nn.Linear(8, 3)
    layer.weight.data[1] *= 100
    x = torch.randn(500, 40, 8)
    plain = layer(x)
    hooks = add_noise(torch.nn.Sequential(layer), 0.05)
    with torch.no_grad():
        noise_ratio = (layer.train()(x) - plain).square().mean(dim=(0, 1)).sqrt() / plain.square().mean(
            dim=(0, 1)
        ).sqrt()
    assert torch.allclose(noise_ratio, torch.full((3,), 0.05), rtol=0.05)
    assert torch.equal(layer.eval()(x), plain)
    for hook in hooks:
        hook.remove()
    assert torch.equal(layer.train()(x), plain)
