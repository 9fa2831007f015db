"""Masks, batches, and a run that is cut and taken up again, on a model of a few thousand weights."""

import json
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")
for library in ("transformers", "accelerate", "datasets"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[train]")

from nvembed_deploy.config import ModelConfig  # noqa: E402
from nvembed_deploy.model.checkpoint import load_checkpoint  # noqa: E402
from nvembed_deploy.text import TextEncoder  # noqa: E402
from nvembed_deploy.training.batches import Collator, batch_dataset, pair_rows  # noqa: E402
from nvembed_deploy.training.blend import Row  # noqa: E402
from nvembed_deploy.training.loop import last_checkpoint, train  # noqa: E402
from nvembed_deploy.training.options import LoopOptions, LossWeights  # noqa: E402
from nvembed_deploy.training.student import (  # noqa: E402
    contract,
    mini_config,
    new_student,
    token_start,
    write_checkpoint,
)
from tests.tiny import make_tokenizer  # noqa: E402

PROMPT = "Instruct: question\nQuery: "


def tiny_config() -> dict:
    config = mini_config(vocab_size=make_tokenizer().get_vocab_size())
    config["hidden_size"] = 16
    config["text_config"] |= {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    config["latent_attention_config"] |= {
        "num_latents_value": 4,
        "num_cross_heads": 2,
        "cross_dim_head": 8,
        "hidden_dim": 16,
        "latent_dim": 16,
    }
    return config


@pytest.fixture(scope="module")
def sizes() -> ModelConfig:
    return ModelConfig.from_json(tiny_config())


@pytest.fixture(scope="module")
def encoder(sizes) -> TextEncoder:
    return TextEncoder(make_tokenizer().to_str().encode(), contract(sizes))


@pytest.fixture(scope="module")
def groups():
    rng = random.Random(0)
    words = ["the", "water", "question", "over", "passage", "in", "and", "a long phrase of words"]
    found = []
    for index in range(120):
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(index % 3 + 1)]
        prompts = [PROMPT if index % 2 and place == 0 else "" for place in range(len(texts))]
        targets = range(3 * index, 3 * index + 3)
        rows = zip(texts, prompts, targets, strict=False)
        found.append(tuple(Row(text=text, prompt=prompt, target=target) for text, prompt, target in rows))
    return found


@pytest.fixture(scope="module")
def targets():
    generator = torch.Generator().manual_seed(5)
    return torch.nn.functional.normalize(torch.randn(360, 16, generator=generator), dim=-1).to(torch.bfloat16)


@pytest.fixture(scope="module")
def dataset(groups, encoder):
    return batch_dataset([groups, groups[::-1]], encoder, max_rows=8, max_tokens=400, max_length=64, seed=1)


def test_every_epoch_holds_every_row_once(dataset, groups):
    seen = [number for entry in dataset for number in entry["target"]]
    once = sorted(row.target for group in groups for row in group)
    half = len(once)
    assert sorted(seen[:half]) == once
    assert sorted(seen[half:]) == once


def test_instructions_attend_and_are_not_pooled(dataset, encoder, targets, groups):
    collator = Collator(encoder, targets)
    prompts = {row.target: row.prompt for group in groups for row in group}
    ids = encoder.tokenize(["x"], prompt=PROMPT, max_length=64)[0]
    instructed = 0
    for entry in dataset:
        batch = collator([entry])
        for row, number in enumerate(entry["target"]):
            length = len(entry["input_ids"][row])
            skipped = ids.prompt_tokens if prompts[number] else 0
            width = batch["input_ids"].shape[1]
            assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (width - length)
            pooled = [0] * skipped + [1] * (length - skipped) + [0] * (width - length)
            assert batch["pool_mask"][row].tolist() == pooled
            instructed += skipped > 0
    assert instructed == 2 * 60


def test_a_prompt_that_fills_the_row_is_dropped(encoder):
    row = Row(text="water", prompt=PROMPT, target=0)
    entry = batch_dataset([[(row,)]], encoder, max_rows=8, max_tokens=400, max_length=8, seed=1)[0]
    assert entry["prompt_tokens"] == [0]


def test_pairs_are_found_also_over_joined_batches(dataset, encoder, targets):
    queries, positives, hard = pair_rows([0, 1, 1, 2, 2, 2, 3])
    assert (queries.tolist(), positives.tolist(), hard.tolist()) == ([1, 3], [2, 4], [-1, 5])
    first, second = dataset[0], dataset[1]
    collator = Collator(encoder, targets)
    joined, offset = collator([first, second]), len(first["target"])
    alone = [collator([first])["queries"], collator([second])["queries"] + offset]
    assert joined["queries"].tolist() == torch.cat(alone).tolist()


class Recorder(Collator):
    """Remembers which batches were asked for."""

    def __call__(self, entries):
        self.seen = [*getattr(self, "seen", []), *(entry["target"] for entry in entries)]
        return super().__call__(entries)


def run(folder: Path, sizes, dataset, encoder, targets, *, max_steps: int = -1):
    torch.manual_seed(99 if max_steps > 0 else 7)  # what stands outside the run's seed must not matter
    model, collator = new_student(sizes, seed=3), Recorder(encoder, targets)
    options = LoopOptions(
        learning_rate=5e-3, save_steps=5, warmup_steps=3, schedule="constant_with_warmup", log_steps=1, bf16=False
    )
    history = train(
        model, dataset, collator, folder=folder, options=options, weights=LossWeights(), max_steps=max_steps
    )
    return model, history, collator.seen


def test_a_cut_run_ends_at_the_same_weights_and_learns(tmp_path, sizes, dataset, encoder, targets):
    whole, history, seen = run(tmp_path / "whole", sizes, dataset, encoder, targets)
    assert seen == list(dataset["target"])
    run(tmp_path / "cut", sizes, dataset, encoder, targets, max_steps=12)
    saved = int(last_checkpoint(tmp_path / "cut").name.removeprefix("checkpoint-"))
    resumed, resumed_history, seen = run(tmp_path / "cut", sizes, dataset, encoder, targets)
    assert saved in (10, 12)
    assert seen == list(dataset["target"])[saved:]
    assert [entry["loss"] for entry in resumed_history] == [entry["loss"] for entry in history]
    for (name, expected), found in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name
    losses = [entry["loss"] for entry in history]
    assert len(losses) == len(dataset)
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_a_checkpoint_cut_in_writing_is_passed_over(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, content in ((5, "{}"), (20, "{}"), (100, '{"global_st'), (110, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if content is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-20"


def test_token_vectors_start_centred_and_leave_silent_tokens_random(sizes):
    strings = ["", "a", "b", "c"]
    vectors = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    start = token_start(vectors, strings)
    expected = torch.tensor([[0.0, 0.0], [0.0, -1.0], [-1.0, 0.0], [1.0, 1.0]]) * 1.5**0.5  # mean square 4/6 before
    assert torch.allclose(start, expected)
    table = torch.zeros(sizes.vocab_size, sizes.hidden_size)
    table[5] = 0.5
    weight = new_student(sizes, seed=1, token_vectors=table).embedding_model.embed_tokens.weight
    assert torch.equal(weight[5], table[5])
    assert weight[4].abs().sum() > 0


def test_checkpoint_is_whole_readable_and_keeps_its_card(tmp_path, sizes):
    out = tmp_path / "models" / "tiny"
    model = new_student(sizes, seed=3)
    tokenizer_json = make_tokenizer().to_str()
    write_checkpoint(out, model, config=tiny_config(), tokenizer_json=tokenizer_json, card="# card\n")
    write_checkpoint(out, model, config=tiny_config(), tokenizer_json=tokenizer_json)
    assert (out / "README.md").read_text() == "# card\n"
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
    loaded = load_checkpoint(out)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    stated = json.loads((out / "tokenizer_config.json").read_text())
    assert (stated["pad_token"], stated["add_eos_token"]) == ("</s>", False)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in out.rglob("*") if path.is_file())
