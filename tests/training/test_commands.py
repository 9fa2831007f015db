"""The command line: help without torch, error messages, and a complete run on a few examples."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.training.command import _parser, main, stage_options
from nvembed_deploy.training.options import STAGE_1, STAGE_2

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("data", "mine", "stage")


def test_help_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from nvembed_deploy.training.command import main\n"
        f"for command in {COMMANDS}:\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f"train {command}" in done.stdout for command in COMMANDS)
    assert done.stdout.count("--teacher") >= 1
    assert not re.search(r"default:\s+(None|False)", done.stdout)


def test_the_documented_commands_parse():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    calls = [re.split(r"(?:nvembed(?:_deploy)?) train ", line, maxsplit=1)[1] for line in lines if " train " in line]
    assert len(calls) >= 7
    for call in calls:
        _parser("nvembed train").parse_args(shlex.split(call))
    others = [line.split()[2] for line in lines if " train " not in line]
    assert others == ["recipes.mini", "recipes.mini", "recipes.mini", "benchmarks.ablation"]


def options(*flags: str):
    return _parser("train").parse_args(["stage", "--base", "b", "--examples", "e", "--out", "o", *flags])


def test_a_stage_sets_the_papers_numbers_and_flags_change_them():
    assert stage_options(options("--stage", "1")) == STAGE_1
    assert stage_options(options("--stage", "2")) == STAGE_2
    changed = stage_options(options("--stage", "2", "--temperature", "0.1", "--negatives", "3", "--no-bf16"))
    assert (changed.temperature, changed.negatives, changed.bf16, changed.in_batch) == (0.1, 3, False, False)
    assert (STAGE_1.negatives, STAGE_1.in_batch, STAGE_2.in_batch) == (7, True, False)


@pytest.mark.parametrize(
    ("flag", "argument"),
    [
        ("--temperature", "0"),
        ("--max-length", "0"),
        ("--negatives", "-1"),
        ("--max-steps", "0"),
        ("--instructed", "1.5"),
        ("--learning-rate", "nan"),
        ("--lora-rank", "0"),
        ("--lora-dropout", "1.0"),
    ],
)
def test_a_number_out_of_range_names_its_flag(flag, argument):
    with pytest.raises(ConfigError, match=rf"{flag} must be .*, got {argument}"):
        stage_options(options("--stage", "1", flag, argument))


@pytest.mark.parametrize("argv", [[], ["stage", "--stage", "3"], ["stgae"]])
def test_a_wrong_call_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert "usage: python -m nvembed_deploy train" in capsys.readouterr().err


def last_error(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_missing_folder_or_file_is_a_one_line_error(tmp_path, capsys):
    pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")
    for library in ("transformers", "accelerate", "matplotlib", "sentence_transformers"):
        pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[train]")
    none, out = str(tmp_path / "none"), str(tmp_path / "out")
    assert main(["data", "--data", none, "--out", out]) == 1
    assert last_error(capsys).startswith("error: --data")
    assert main(["mine", "--examples", none, "--out", out]) == 1
    assert "does not exist" in last_error(capsys)
    assert main(["mine", "--examples", none, "--out", out, "--margin", "1.5"]) == 1
    assert "--margin in (0, 1], got 7 and 1.5" in last_error(capsys)
    assert main(["stage", "--base", none, "--examples", none, "--out", out, "--stage", "1"]) == 1
    assert "config.json does not exist" in last_error(capsys)
    assert not (tmp_path / "out").exists()


def test_data_writes_instructed_examples_of_the_blend_and_their_corpus(tmp_path, capsys):
    pytest.importorskip("scipy", reason="scipy is not installed: pip install nvembed-deploy[train]")
    for name, count in (("scifact", 3), ("faq", 3), ("other", 1)):
        (tmp_path / "sets" / name / "qrels").mkdir(parents=True)
        files = {
            "corpus.jsonl": [{"_id": f"d{i}", "text": f"answer {name} {i}"} for i in range(count + 1)],
            "queries.jsonl": [{"_id": f"q{i}", "text": f"question {name} {i}"} for i in range(count)],
        }
        for file_name, rows in files.items():
            (tmp_path / "sets" / name / file_name).write_text("\n".join(map(json.dumps, rows)))
        judgements = [f"q{i}\td{i}\t1" for i in range(count)]
        (tmp_path / "sets" / name / "qrels" / "train.tsv").write_text("\n".join(["q\td\tscore", *judgements]))
    (tmp_path / "sets" / "damaged").mkdir()  # the blend does not name it, so that it is not read
    (tmp_path / "sets" / "damaged" / "pairs.jsonl").write_text('{"a": 1, "b": 2}')
    (tmp_path / "sets" / "mixed").mkdir()
    row = {"query": "of another set", "kind": "text", "source": "faq"}
    (tmp_path / "sets" / "mixed" / "examples.jsonl").write_text(json.dumps(row))
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "test.jsonl").write_text(json.dumps({"text": "answer faq 0"}))
    blend = {"scifact": {"max_examples": 2}, "faq": {"instruction": "Find it"}, "absent": {}}
    (tmp_path / "blend.json").write_text(json.dumps(blend))
    paths = [str(tmp_path / name) for name in ("sets", "eval", "blend.json", "x.jsonl")]
    flags = [text for pair in zip(("--data", "--exclude", "--blend", "--out"), paths, strict=True) for text in pair]
    assert main(["data", *flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert sorted((row["source"], row["instruction"][:17]) for row in rows) == [
        *[("faq", "Find it")] * 3,
        *[("scifact", "Given a scientifi")] * 2,
    ]
    documents = [json.loads(line) for line in (tmp_path / "x.corpus.jsonl").read_text().splitlines()]
    assert sorted(document["text"] for document in documents) == [
        *(f"answer faq {i}" for i in (1, 2, 3)),
        *(f"answer scifact {i}" for i in (0, 1, 2, 3)),
    ]
    assert sum(len(document.get("queries", ())) for document in documents) == 5  # also of examples left out
    assert "sets of the blend without examples in --data: absent" in capsys.readouterr().err
    (tmp_path / "blend.json").write_text('{"absent": {}}')
    assert main(["data", *flags]) == 1
    assert "no example of --data" in last_error(capsys)
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == len(rows)


@pytest.mark.slow
def test_from_data_sets_to_a_checkpoint(tmp_path, capsys, monkeypatch):
    for library in ("torch", "transformers", "accelerate", "peft", "matplotlib", "sentence_transformers"):
        pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[train]")
    from nvembed_deploy.model.checkpoint import load_checkpoint
    from nvembed_deploy.training import teacher
    from tests.training.tiny_training import TinyTeacher, make_base, some_examples

    monkeypatch.setattr(teacher, "Teacher", lambda folder: TinyTeacher())
    make_base(tmp_path / "base")
    pairs = [example for example in some_examples(120) if example.positive]
    (tmp_path / "data" / "pairs").mkdir(parents=True)
    rows = [json.dumps({"a": example.query, "b": example.positive}) for example in pairs]
    (tmp_path / "data" / "pairs" / "pairs.jsonl").write_text("\n".join(rows))
    held_out = tmp_path / "eval" / "sts"
    held_out.mkdir(parents=True)
    (held_out / "test.jsonl").write_text(
        "\n".join(json.dumps({"a": row.query, "b": row.positive, "score": n % 5}) for n, row in enumerate(pairs[:9]))
    )
    examples, mined_examples, out = (str(tmp_path / name) for name in ("found.jsonl", "mined.jsonl", "out"))
    base = str(tmp_path / "base")
    data_flags = ["--data", str(tmp_path / "data"), "--exclude", str(tmp_path / "eval")]
    assert main(["data", *data_flags, "--out", examples]) == 0
    assert 20 < len((tmp_path / "found.jsonl").read_text().splitlines()) <= len(pairs) - 9
    assert main(["mine", "--examples", examples, "--out", mined_examples, "--negatives", "2"]) == 0
    assert all(json.loads(line)["negatives"] for line in (tmp_path / "mined.jsonl").read_text().splitlines())
    stage_flags = [
        "--max-steps",
        "3",
        "--latents",
        "4",
        "--batch-queries",
        "8",
        "--max-length",
        "64",
        "--warmup-steps",
        "1",
    ]
    assert (
        main(["stage", "--base", base, "--examples", mined_examples, "--stage", "1", "--out", out, *stage_flags]) == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == out
    assert load_checkpoint(out).config.hidden_size == 16
    assert (tmp_path / "out-work" / "loss.png").is_file()
