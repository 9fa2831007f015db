"""Selection, instructions, noise and batches: all from the seed, nothing lost."""

import random

import pytest

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.training.blend import MIX, groups, length_batches, noisy, select, text_table
from nvembed_deploy.training.corpora import Example, Exclusion, read_data
from nvembed_deploy.training.instructions import WORDINGS, Kind

TEMPLATE = "Instruct: {instruction}\nQuery: "


def some_examples(count: int = 400) -> list[Example]:
    kinds = list(Kind)
    found = []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        texts = (f"text number {index}",)
        if kind in (Kind.RETRIEVAL, Kind.SIMILARITY):
            texts = (*texts, f"its answer {index}")
        found.append(Example(texts=texts, kind=kind, source=f"set{index % 3}"))
    return found


def test_select_keeps_the_mix_and_the_seed():
    examples = some_examples()
    chosen = select(examples, mix={"set0": 10}, seed=1)
    assert sum(example.source == "set0" for example in chosen) == 10
    assert sum(example.source == "set1" for example in chosen) == sum(example.source == "set1" for example in examples)
    assert chosen == select(examples, mix={"set0": 10}, seed=1)
    assert chosen != select(examples, mix={"set0": 10}, seed=2)


def test_every_named_source_of_the_mix_has_a_positive_share():
    assert all(count > 0 for count in MIX.values())


def test_documents_get_no_instruction_and_similarity_gets_it_on_both_sides():
    examples = some_examples()
    table = text_table(examples)
    seen = {kind: 0 for kind in Kind}
    for example, group in zip(examples, groups(examples, table, template=TEMPLATE, seed=3), strict=True):
        assert [row.target for row in group] == [table[text] for text in example.texts]
        prompts = {row.prompt for row in group}
        if example.kind is Kind.RETRIEVAL:
            assert group[1].prompt == ""
        if example.kind is Kind.SIMILARITY:
            assert len(prompts) == 1
        wordings = {TEMPLATE.format(instruction=wording) for wording in WORDINGS[example.kind]}
        assert prompts <= wordings | {""}
        seen[example.kind] += bool(group[0].prompt)
    assert all(0 < seen[kind] < 100 for kind in Kind)


def test_groups_depend_on_the_seed_alone():
    examples = some_examples()
    table = text_table(examples)
    first, again, other = (list(groups(examples, table, template=TEMPLATE, seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_noise_never_empties_a_text_and_mostly_leaves_it():
    rng = random.Random(0)
    results = [noisy(text, rng) for text in ["?!.", "Is it?", "A longer sentence, with a comma."] * 500]
    assert all(result.strip() for result in results)
    kept = sum(
        result == text for result, text in zip(results[2::3], ["A longer sentence, with a comma."] * 500, strict=True)
    )
    assert 0.6 < kept / 500 < 0.85


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


def test_exclusion_finds_equal_texts_and_shared_runs():
    excluded = Exclusion(["How do I top up?", "one two three four five six seven eight nine"])
    assert "how do i top up" in excluded
    assert "Well: two, three four five six seven eight NINE!" in excluded
    assert "how do i top up my card" not in excluded
    assert "one two three four five six seven" not in excluded


def test_data_layouts_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("nvembed_deploy.training.corpora.docstring_pairs", lambda: [("summary", "body")])
    for name in ("pairs", "faq", "labels", "articles", "nli"):
        (tmp_path / name).mkdir()
    (tmp_path / "pairs" / "pairs.jsonl").write_text('{"a": "Rome", "b": "Rome is a city."}\n')
    (tmp_path / "faq" / "corpus.jsonl").write_text('{"id": "d", "title": "Title", "text": "Answer"}\n')
    (tmp_path / "faq" / "queries.jsonl").write_text('{"id": "q", "text": "Question?"}\n{"id": "r", "text": "Ask?"}\n')
    (tmp_path / "faq" / "qrels.tsv").write_text("query\tdocument\tscore\nq\td\t1\nr\td\t1\n")
    (tmp_path / "labels" / "train.jsonl").write_text('{"text": "play a song", "label": "music"}\n')
    (tmp_path / "nli" / "triplets.jsonl").write_text('{"query": "qqq", "positive": "ppp", "negative": "nnn"}\n')
    (tmp_path / "articles" / "a.txt").write_text("Title\n" + "A sentence that is here. " * 20 + "\n\n")
    found = {}
    for example in read_data(tmp_path):
        found.setdefault(example.source, []).append(example)
    assert found["pairs"] == [Example(texts=("Rome", "Rome is a city."), kind=Kind.RETRIEVAL, source="pairs")]
    assert [example.texts for example in found["faq"]] == [
        ("Question?", "Title Answer"),
        ("Ask?", "Title Answer"),
        ("Question?", "Ask?"),
    ]
    assert found["labels"][0].kind is Kind.LABEL
    assert found["nli"][0].texts == ("qqq", "ppp", "nnn")
    assert len(found["articles_halves"]) == 1
    assert found["python_docstrings"][0].texts == ("summary", "body")


def test_a_missing_folder_and_a_damaged_line_name_themselves(tmp_path):
    with pytest.raises(ConfigError, match=r"--data .* is not a folder"):
        read_data(tmp_path / "none")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "pairs.jsonl").write_text('{"a": "x"\n')
    with pytest.raises(ConfigError, match="line 1: not JSON"):
        read_data(tmp_path)
