"""The ablation's variants of the model, and its command."""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")
for library in ("transformers", "accelerate", "matplotlib", "scipy"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[train]")

from benchmarks.ablation import runs  # noqa: E402
from benchmarks.ablation.__main__ import main  # noqa: E402
from benchmarks.ablation.shapes import shape_model  # noqa: E402
from benchmarks.ablation.variants import VARIANTS  # noqa: E402
from nvembed_deploy.model.config import Pooling  # noqa: E402
from nvembed_deploy.tokenization import TextEncoder  # noqa: E402
from nvembed_deploy.training.batches import Collator  # noqa: E402
from nvembed_deploy.training.examples import write_examples  # noqa: E402
from nvembed_deploy.training.groups import Row  # noqa: E402
from nvembed_deploy.training.student import read_base  # noqa: E402
from nvembed_deploy.training.trainable import Trainable  # noqa: E402
from tests.training.tiny_training import LATENT, TINY, check_resumed_run, make_base, some_examples  # noqa: E402


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def test_the_ablations_variants_compute_what_they_name(base_folder):
    student = read_base(base_folder, latent=LATENT)
    encoder = TextEncoder(student.tokenizer_json.encode(), student.contract)
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


def test_a_run_with_muon_is_resumed(tmp_path, base_folder):
    check_resumed_run(tmp_path, base_folder, TINY, runs.MuonRecipe())


@pytest.mark.slow
def test_the_command_trains_all_variants_and_keeps_finished_runs(tmp_path, base_folder, capsys, monkeypatch):
    pairs = [example for example in some_examples(120) if example.positive]
    write_examples(tmp_path / "examples.jsonl", pairs)
    (tmp_path / "eval" / "sts").mkdir(parents=True)
    rows = [{"a": pair.query, "b": pair.positive, "score": number % 5} for number, pair in enumerate(pairs[:9])]
    (tmp_path / "eval" / "sts" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["--base", str(base_folder), "--eval", str(tmp_path / "eval"), "--out", str(tmp_path / "table")]
    command += [text for name in ("--first", "--second") for text in (name, str(tmp_path / "examples.jsonl"))]
    command += ["--steps", "4", "--batch-queries", "6", "--latents", "4"]
    monkeypatch.setattr(runs.run, "__kwdefaults__", {"variants": VARIANTS[3:]})
    assert main(command) == 0
    assert main([*command, "--learning-rate", "1e-4"]) == 1
    assert "run with other settings" in capsys.readouterr().err.strip().splitlines()[-1]
    record = json.loads((tmp_path / "table" / "ablation.json").read_text())
    assert [row["name"] for row in record["variants"]] == [variant.name for variant in VARIANTS[3:]]
    assert all(len(row["means"]) == 2 for row in record["variants"])
    assert "| mean, causal |" in (tmp_path / "table" / "ablation.md").read_text()
    assert (tmp_path / "table" / "ablation.png").is_file()
    monkeypatch.setattr(runs, "train_student", None)  # nothing is trained again
    assert main(command) == 0
