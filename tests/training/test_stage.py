"""Masks, batches, whole stages, and interrupted and resumed runs, on a model of a few thousand weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")
for library in ("transformers", "accelerate", "peft", "matplotlib"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[train]")

from safetensors.torch import load_file  # noqa: E402

from nvembed_deploy.errors import CheckpointError, ConfigError  # noqa: E402
from nvembed_deploy.model.checkpoint import load_checkpoint  # noqa: E402
from nvembed_deploy.model.config import Pooling  # noqa: E402
from nvembed_deploy.tokenization import TextEncoder  # noqa: E402
from nvembed_deploy.training import loop, stage  # noqa: E402
from nvembed_deploy.training.batch_loss import batch_loss  # noqa: E402
from nvembed_deploy.training.batches import Collator, pair_rows  # noqa: E402
from nvembed_deploy.training.groups import Row  # noqa: E402
from nvembed_deploy.training.options import STAGE_1, STAGE_2, Lora, LossWeights  # noqa: E402
from nvembed_deploy.training.student import read_base  # noqa: E402
from nvembed_deploy.training.trainable import Trainable  # noqa: E402
from nvembed_deploy.training.variants import shape_model  # noqa: E402
from tests.tiny import make_tokenizer  # noqa: E402
from tests.training.tiny_training import LATENT, TinyTeacher, make_base, sizes, some_examples  # noqa: E402

PROMPT = "Instruct: question\nQuery: "
TINY = replace(
    STAGE_1,
    negatives=2,
    learning_rate=5e-3,
    schedule="constant_with_warmup",
    warmup_steps=3,
    batch_queries=6,
    max_length=64,
    save_steps=4,
    log_steps=1,
    bf16=False,
)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def encoder(base_folder) -> TextEncoder:
    student = read_base(base_folder, latent=LATENT)
    return TextEncoder(student.tokenizer_json.encode(), student.contract)


def weights(folder: Path) -> dict:
    return load_checkpoint(folder).state_dict()


def equal(state: dict, other_state: dict) -> bool:
    return state.keys() == other_state.keys() and all(torch.equal(state[name], other_state[name]) for name in state)


def test_instructions_are_attended_to_and_not_pooled(encoder):
    collator = Collator(encoder, max_length=64)
    groups = [(Row(text="the water", prompt=PROMPT, question=True), Row(text="over")), (Row(text="in"),)]
    batch = collator([groups])
    skipped = encoder.tokenize(["x"], prompt=PROMPT, max_length=64)[0].prompt_tokens
    lengths = [
        len(encoder.tokenize([row.text], prompt=row.prompt, max_length=64)[0]) for group in groups for row in group
    ]
    padded_length = batch["input_ids"].shape[1]
    for row, (length, hidden) in enumerate(zip(lengths, (skipped, 0, 0), strict=True)):
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (padded_length - length)
        assert batch["pool_mask"][row].tolist() == [0] * hidden + [1] * (length - hidden) + [0] * (
            padded_length - length
        )


def test_a_prompt_that_fills_the_row_is_dropped(encoder):
    batch = Collator(encoder, max_length=8)([[(Row(text="water", prompt=PROMPT),)]])
    assert torch.equal(batch["pool_mask"], batch["attention_mask"])


def test_pairs_are_found_across_joined_batches(encoder):
    queries, positives = pair_rows([0, 1, 1, 2, 2, 2, 3])
    assert (queries.tolist(), positives.tolist()) == ([1, 3], [2, 4])
    collator = Collator(encoder, max_length=64)
    groups = [(Row(text="a"), Row(text="b")), (Row(text="c"),)]
    joined = collator([groups, groups])
    assert joined["queries"].tolist() == [0, 3]
    assert joined["group_ids"].tolist() == [0, 0, 1, 2, 2, 3]
    ids = joined["text_ids"].tolist()
    assert (ids[:3], len(set(ids))) == (ids[3:], 3)


def test_length_buckets_change_nothing(base_folder, encoder):
    model = read_base(base_folder, latent=LATENT).model.eval()
    rows = [" ".join(["the water"] * (index % 9 + 1)) for index in range(50)]
    groups = [(Row(text=text, prompt=PROMPT if index % 2 else ""),) for index, text in enumerate(rows)]
    batch = Collator(encoder, max_length=64)([groups])
    inputs = [batch[name] for name in ("input_ids", "attention_mask", "pool_mask")]
    with torch.no_grad():
        vectors, states = Trainable(model)(*inputs)
        expected, _ = model(*inputs)
        hidden = model.latent_attention_model(model.embedding_model(*inputs[:2]))
    assert torch.allclose(vectors, expected, atol=1e-6)
    real = batch["attention_mask"].bool()
    assert torch.allclose(states[real], hidden[real], atol=1e-5)


def test_noise_scales_with_each_channel_and_only_in_training():
    torch.manual_seed(1)
    layer = torch.nn.Linear(8, 3)
    layer.weight.data[1] *= 100
    x = torch.randn(500, 40, 8)
    plain = layer(x)
    hooks = loop.add_noise(torch.nn.Sequential(layer), 0.05)
    with torch.no_grad():
        noise_ratio = (layer.train()(x) - plain).square().mean(dim=(0, 1)).sqrt() / plain.square().mean(
            dim=(0, 1)
        ).sqrt()
    assert torch.allclose(noise_ratio, torch.full((3,), 0.05), rtol=0.05)
    assert torch.equal(layer.eval()(x), plain)
    for hook in hooks:
        hook.remove()
    assert torch.equal(layer.train()(x), plain)


FOLLOWING = LossWeights(pairs=0.3, distillation=2.0, tokens=1.0, match=1.0)


@pytest.mark.parametrize(
    ("weights_", "changes"),
    [
        (LossWeights(), {}),
        (FOLLOWING, {"muon_learning_rate": 2e-3}),
        pytest.param(FOLLOWING, {"relative_steps": True, "learning_rate": 1e-2, "noise": 0.01}, marks=pytest.mark.slow),
        (replace(FOLLOWING, consistency=5.0, centering=1.0), {"in_batch": False}),
        pytest.param(LossWeights(pairs=0.0, consistency=5.0), {}, marks=pytest.mark.slow),
    ],
    ids=["AdamW", "Muon", "relative", "consistent", "consistency alone"],
)
def test_a_resumed_run_reaches_the_same_weights_and_learns(tmp_path, base_folder, weights_, changes):
    options = replace(TINY, weights=weights_, held_out=6, epochs=2, **changes)
    teacher = TinyTeacher() if weights_.need_teacher else None

    def run(name: str, stage_options):
        torch.manual_seed(
            99 if stage_options.max_steps > 0 else 7
        )  # what stands outside the run's seed must not matter
        student = read_base(base_folder, latent=LATENT, seed=3)
        history = stage.train_student(
            student, some_examples(), work=tmp_path / name, stage=stage_options, teacher=teacher
        )
        return student.model.state_dict(), [step for step in history if "loss" in step]

    uninterrupted, history = run("whole", options)
    run("cut", replace(options, max_steps=7))
    saved = loop.last_checkpoint(tmp_path / "cut" / "training")
    assert saved.name in ("checkpoint-4", "checkpoint-7")
    resumed, resumed_history = run("cut", options)
    assert [step["loss"] for step in resumed_history] == [step["loss"] for step in history]
    assert equal(uninterrupted, resumed)
    losses = [step["loss"] for step in history]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_consistency_pulls_an_instructed_text_to_its_uninstructed_vector(base_folder, encoder):
    rows = [Row(text="a cat", prompt=PROMPT, question=True), Row(text="a dog", prompt=PROMPT)]
    rows.append(Row(text="a bird"))
    batch = Collator(encoder, max_length=64, plain=True)([[(row,) for row in rows]])
    assert batch["instructed"].tolist() == [0, 1]
    ids, _, _ = encoder.pad(encoder.tokenize(["a cat", "a dog"], max_length=64))
    assert batch["plain_ids"].tolist() == ids.tolist()

    vectors = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    plain = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)
    centre = 0.2 * torch.randn(8)
    options = replace(TINY, weights=LossWeights(pairs=0.0, consistency=5.0))
    targets = torch.stack(
        (torch.nn.functional.normalize(plain[0] - centre, dim=0), plain[1])
    )  # the question alone loses it
    expected = 5.0 * (1 - (vectors[:2] * targets).sum(dim=1).mean())
    states = torch.zeros(3, 1, 8)
    loss = batch_loss(vectors, states, batch, stage=options, teacher=None, centre=centre, plain=plain)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    without = Collator(encoder, max_length=64, plain=True)([[(rows[2],)]])
    assert "instructed" not in without


def test_two_stages_make_a_checkpoint_that_loads(tmp_path, base_folder):
    first_stage, second_stage = tmp_path / "one", tmp_path / "two"
    stage.run_stage(
        base_folder, some_examples(), first_stage, work=tmp_path / "w1", stage=TINY, latent=LATENT, card="# one\n"
    )
    second_options = replace(TINY, in_batch=False, held_out=8, gradient_checkpointing=True, bf16=True)
    stage.run_stage(first_stage, some_examples(), second_stage, work=tmp_path / "w2", stage=second_options)
    assert not equal(weights(first_stage), weights(second_stage))
    assert weights(first_stage).keys() == weights(second_stage).keys()
    assert (first_stage / "README.md").read_text() == "# one\n"
    config = json.loads((second_stage / "config.json").read_text())
    assert config["latent_attention_config"]["num_latents_value"] == 4
    history = json.loads((tmp_path / "w2" / "history.json").read_text())
    assert {"eval_loss", "eval_accuracy"} <= history[-1].keys()
    assert (tmp_path / "w2" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in second_stage.rglob("*") if path.is_file())
    from transformers import AutoTokenizer

    for text in ("the Water over", "</s> in", "  2 ü"):
        assert AutoTokenizer.from_pretrained(second_stage)(text).input_ids == make_tokenizer().encode(text).ids


def test_adapters_leave_the_embeddings_and_are_merged_and_resumed(tmp_path, base_folder):
    start = read_base(base_folder, latent=LATENT, seed=1).model.state_dict()

    def run(out: Path) -> dict:
        options = replace(TINY, bf16=True)  # where the CPU multiplies it
        settings = {"stage": options, "latent": LATENT, "lora": Lora(rank=2)}
        stage.run_stage(base_folder, some_examples(), out, work=tmp_path / "w", **settings)
        return weights(out)

    trained = run(tmp_path / "out")
    assert trained.keys() == start.keys()
    changed = {name for name in trained if not torch.equal(trained[name], start[name].half().float())}
    projections = {name for name in trained if "_proj.weight" in name}
    assert projections <= changed
    assert changed - projections == {name for name in changed if name.startswith("latent_attention_model.")}
    assert "latent_attention_model.latents" in changed

    last = loop.last_checkpoint(tmp_path / "w" / "training")
    saved_names = load_file(last / "model.safetensors").keys()
    assert all("lora_" in name or "latent_attention_model" in name for name in saved_names)
    (last / loop.STATE_NAME).unlink()
    assert equal(run(tmp_path / "resumed"), trained)


def test_the_ablations_variants_compute_what_they_name(base_folder, encoder):
    collator = Collator(encoder, max_length=64)
    batch = collator([[(Row(text="the water over"),), (Row(text="in"),)]])
    inputs = [batch[name] for name in ("input_ids", "attention_mask", "pool_mask")]
    changed = inputs[0].clone()
    changed[0, 3] = 300  # a token in the middle of the first row
    states = {}
    for pooling, causal in ((Pooling.LATENT, False), (Pooling.MEAN, True), (Pooling.LAST, True)):
        model = shape_model(read_base(base_folder, latent=LATENT).model.eval(), pooling=pooling, causal=causal)
        with torch.no_grad():
            vectors, before = Trainable(model)(*inputs)
            _, after = Trainable(model)(changed, *inputs[1:])
            hidden = model.embedding_model(*inputs[:2])
        assert torch.equal(before[0, 0], after[0, 0]) == causal
        assert not torch.equal(before[0, 4], after[0, 4])
        states[pooling] = (vectors, before, hidden)
    vectors, before, hidden = states[Pooling.LAST]
    last_token = int(batch["attention_mask"][1].sum()) - 1
    assert torch.allclose(vectors[1], torch.nn.functional.normalize(hidden[1, last_token], dim=-1), atol=1e-6)
    vectors, before, hidden = states[Pooling.MEAN]
    assert torch.allclose(before[0], hidden[0], atol=1e-6)


def test_invalid_stage_options_are_explained(tmp_path, base_folder):
    examples = some_examples()
    needing = replace(TINY, weights=LossWeights(distillation=1.0))
    with pytest.raises(ConfigError, match="pass --teacher"):
        stage.run_stage(base_folder, examples, tmp_path / "o", work=tmp_path / "w", stage=needing, latent=LATENT)
    teacher = TinyTeacher()
    teacher.dim = 17
    with pytest.raises(ConfigError, match="dimension 17, the base's 16"):
        stage.run_stage(
            base_folder, examples, tmp_path / "o", work=tmp_path / "w", stage=needing, latent=LATENT, teacher=teacher
        )
    with pytest.raises(ConfigError, match="none of 4 examples can be trained on"):
        stage.run_stage(
            base_folder,
            examples[:4],
            tmp_path / "o",
            work=tmp_path / "w",
            stage=replace(TINY, held_out=9),
            latent=LATENT,
        )
    with pytest.raises(ConfigError, match="other settings or examples"):
        stage.run_stage(base_folder, examples, tmp_path / "o", work=tmp_path / "w", stage=STAGE_2, latent=LATENT)
    assert not (tmp_path / "o").exists()


def test_options_that_change_the_weights_cannot_change_during_a_run(tmp_path, base_folder):
    """The training state would be loaded into another base and written with that base's tokenizer."""
    import shutil

    shutil.copytree(base_folder, tmp_path / "base")
    stage_options = replace(TINY, max_steps=2, weights=FOLLOWING)
    teacher = TinyTeacher()

    def run(**changes):
        stage.run_stage(
            **{
                "base": tmp_path / "base",
                "examples": some_examples(),
                "out": tmp_path / "o",
                "work": tmp_path / "w",
                "stage": stage_options,
                "teacher": teacher,
                "latent": LATENT,
            }
            | changes
        )

    run()
    run()
    other_teacher = TinyTeacher()
    other_teacher.name = "another"
    for changes in (
        {"teacher": other_teacher},
        {"latent": replace(LATENT, latents=8)},
        {"examples": some_examples(seed=1)},
    ):
        with pytest.raises(ConfigError, match="other settings or examples"):
            run(**changes)
    content = bytearray((tmp_path / "base" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "base" / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="other settings or examples"):
        run()


def test_stage_two_needs_negatives(tmp_path, base_folder):
    bare = [replace(example, negatives=(), label="") for example in some_examples()]
    with pytest.raises(ConfigError, match=r"no example has any; run .*mine"):
        stage.run_stage(
            base_folder, bare, tmp_path / "o", work=tmp_path / "w", stage=replace(TINY, in_batch=False), latent=LATENT
        )


def test_a_base_without_a_hidden_size_is_read(tmp_path, base_folder):
    """NV-Embed-v1's config.json is such a case."""
    stage.run_stage(base_folder, some_examples(), tmp_path / "one", work=tmp_path / "w1", stage=TINY, latent=LATENT)
    path = tmp_path / "one" / "config.json"
    config = json.loads(path.read_text())
    del config["hidden_size"]
    path.write_text(json.dumps(config))
    stage.run_stage(tmp_path / "one", some_examples(), tmp_path / "two", work=tmp_path / "w2", stage=TINY)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["hidden_size"] == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "a base needs a tokenizer.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "a base must be a Mistral"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "is damaged"),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps({**sizes(), "num_hidden_layers": 3})),
            "has no embedding_model.layers.2",
        ),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps({**sizes(), "intermediate_size": 25})),
            "does not match config.json",
        ),
    ],
)
def test_a_damaged_base_is_explained(tmp_path, base_folder, change, message):
    import shutil

    folder = tmp_path / "base"
    shutil.copytree(base_folder, folder)
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        read_base(folder, latent=LATENT)


def test_an_incomplete_checkpoint_is_skipped(tmp_path):
    assert loop.last_checkpoint(tmp_path) is None
    for step, content in ((5, "{}"), (20, "{}"), (100, '{"global_st'), (110, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if content is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    assert loop.last_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
