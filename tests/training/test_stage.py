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
from nvembed_deploy.tokenization import TextEncoder  # noqa: E402
from nvembed_deploy.training import loop, stage  # noqa: E402
from nvembed_deploy.training.batches import Collator, pair_rows  # noqa: E402
from nvembed_deploy.training.groups import Row  # noqa: E402
from nvembed_deploy.training.options import STAGE_2, Lora  # noqa: E402
from nvembed_deploy.training.student import read_base  # noqa: E402
from nvembed_deploy.training.trainable import Trainable  # noqa: E402
from tests.tiny import make_tokenizer  # noqa: E402
from tests.training.tiny_training import LATENT, TINY, check_resumed_run, equal, make_base, sizes, some_examples  # noqa: E402

PROMPT = "Instruct: question\nQuery: "


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def encoder(base_folder) -> TextEncoder:
    student = read_base(base_folder, latent=LATENT)
    return TextEncoder(student.tokenizer_json.encode(), student.contract)


def weights(folder: Path) -> dict:
    return load_checkpoint(folder).state_dict()


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


def test_a_resumed_run_reaches_the_same_weights_and_learns(tmp_path, base_folder):
    check_resumed_run(tmp_path, base_folder, replace(TINY, held_out=6, epochs=2))


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


def test_adapters_are_added_to_the_exact_weights_of_the_base(base_folder):
    from nvembed_deploy.training.adapters import add_adapters, merged_state

    exact, model = (read_base(base_folder, latent=LATENT).model for _ in range(2))
    add_adapters(model, Lora(rank=2), bf16=True)  # rounds what is adapted
    assert equal(merged_state(model, exact), exact.state_dict())
    layer = model.embedding_model.layers[1].mlp.up_proj
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    name = "embedding_model.layers.1.mlp.up_proj.weight"
    expected = exact.state_dict()[name] + 16 * layer.lora_A["default"].weight.sum(dim=0)
    merged = merged_state(model, exact)
    assert torch.allclose(merged[name], expected, atol=1e-6)
    assert equal(merged | {name: exact.state_dict()[name]}, exact.state_dict())


def test_invalid_stage_options_are_explained(tmp_path, base_folder):
    examples = some_examples()
    with pytest.raises(ConfigError, match=r"--shard needs several processes; start .* torchrun --nproc_per_node"):
        stage.run_stage(base_folder, examples, tmp_path / "o", work=tmp_path / "w", stage=replace(TINY, shard=True))
    with pytest.raises(ConfigError, match="pass either --lora or --shard"):
        stage.run_stage(
            base_folder,
            examples,
            tmp_path / "o",
            work=tmp_path / "w",
            stage=replace(TINY, shard=True),
            lora=Lora(rank=2),
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
    stage_options = replace(TINY, max_steps=2)

    def run(**changes):
        stage.run_stage(
            **{
                "base": tmp_path / "base",
                "examples": some_examples(),
                "out": tmp_path / "o",
                "work": tmp_path / "w",
                "stage": stage_options,
                "latent": LATENT,
            }
            | changes
        )

    run()
    run(stage=replace(stage_options, chunk_tokens=64, save_steps=1, gradient_checkpointing=True))
    for changes in (
        {"stage": replace(stage_options, temperature=0.1)},
        {"lora": Lora(rank=2)},
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
