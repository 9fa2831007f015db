"""Selection, instructions, negatives and batches are determined by the seed and lose no example."""

import random

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")
pytest.importorskip("tokenizers")

from nvembed_deploy.training.blend import groups, length_batches, select
from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.instructions import WORDINGS, Kind

TEMPLATE = "Instruct: {instruction}\nQuery: "


def some_examples(count: int = 400) -> list[Example]:
    examples = []
    for index in range(count):
        kind = list(Kind)[index % len(Kind)]
        paired = kind in (Kind.RETRIEVAL, Kind.SIMILARITY)
        examples.append(
            Example(
                query=f"text number {index}",
                positive=f"its answer {index}" if paired else "",
                negatives=tuple(f"wrong {index} {wrong}" for wrong in range(9)) if paired else (),
                kind=kind,
                source=f"set{index % 3}",
                label=str(index % 5) if kind is Kind.LABEL else "",
            )
        )
    return examples


def test_select_keeps_the_mixture_and_depends_on_the_seed():
    examples = some_examples()
    selected = select([*examples, *examples], mix={"set0": 10, "set1": 9999}, seed=1)
    assert sum(example.source == "set0" for example in selected) == 10
    assert sum(example.source == "set1" for example in selected) == sum(
        example.source == "set1" for example in examples
    )
    assert not any(example.source == "set2" for example in selected)
    assert selected == select(examples, mix={"set0": 10, "set1": 9999}, seed=1)
    assert selected != select(examples, mix={"set0": 10, "set1": 9999}, seed=2)


def test_documents_get_no_instruction_and_symmetric_tasks_get_it_on_both_sides():
    examples = some_examples()
    seen = dict.fromkeys(Kind, 0)
    for example, group in zip(examples, groups(examples, template=TEMPLATE, negatives=2, seed=3), strict=True):
        assert group[0].text == example.query
        if example.kind is Kind.RETRIEVAL:
            assert {row.prompt for row in group[1:]} == {""}
        if example.kind in (Kind.SIMILARITY, Kind.LABEL):
            assert len({row.prompt for row in group}) == 1
        wordings = {TEMPLATE.format(instruction=wording) for wording in WORDINGS[example.kind]}
        assert {row.prompt for row in group} <= wordings | {""}
        seen[example.kind] += bool(group[0].prompt)
        asks = example.kind is Kind.RETRIEVAL and bool(group[0].prompt)
        assert [row.question for row in group] == [asks] + [False] * (len(group) - 1)
    assert all(0 < count < 100 for count in seen.values())


def test_an_example_with_its_own_instruction_keeps_it():
    example = Example(query="q", positive="p", kind=Kind.RETRIEVAL, source="s", instruction="Only this")
    prompts = {next(groups([example], template=TEMPLATE, negatives=1, seed=seed))[0].prompt for seed in range(20)}
    assert prompts == {"", TEMPLATE.format(instruction="Only this")}


def test_the_usual_wording_has_the_requested_frequency():
    examples = some_examples(4000)
    prompts: dict[Kind, list[str]] = {kind: [] for kind in Kind}
    example_groups = groups(examples, template=TEMPLATE, negatives=2, seed=3, main_wording=0.7)
    for example, group in zip(examples, example_groups, strict=True):
        if group[0].prompt:
            prompts[example.kind].append(group[0].prompt)
    for kind, seen in prompts.items():
        usual = TEMPLATE.format(instruction=WORDINGS[kind][0])
        expected_share = (0 if kind is Kind.LABEL else 0.7) + (1 if kind is Kind.LABEL else 0.3) / len(WORDINGS[kind])
        assert seen.count(usual) / len(seen) == pytest.approx(expected_share, abs=0.08)


def test_negatives_are_drawn_from_the_mined_ones_again_each_epoch():
    examples = [example for example in some_examples() if example.kind is Kind.RETRIEVAL]
    epochs = [list(groups(examples, template=TEMPLATE, negatives=3, seed=seed)) for seed in (1, 2)]
    for example, group in zip(examples, epochs[0], strict=True):
        assert group[1].text == example.positive
        assert len(group) == 5
        assert {row.text for row in group[2:]} <= set(example.negatives)
    assert epochs[0] != epochs[1]


def test_positives_come_from_the_same_class_and_negatives_from_others():
    examples = some_examples()
    labels = {example.query: (example.source, example.label) for example in examples if example.kind is Kind.LABEL}
    for example, group in zip(examples, groups(examples, template=TEMPLATE, negatives=7, seed=1), strict=True):
        if example.kind is not Kind.LABEL:
            continue
        assert len(group) == 9
        assert group[1].text != example.query
        assert labels[group[1].text] == (example.source, example.label)
        for row in group[2:]:
            source, label = labels[row.text]
            assert source == example.source
            assert label != example.label


def test_a_class_of_one_text_has_no_positive():
    examples = [Example(query=text, kind=Kind.LABEL, source="s", label=text) for text in ("a", "b")]
    assert [len(group) for group in groups(examples, template=TEMPLATE, negatives=2, seed=1)] == [1, 1]


def test_groups_depend_on_the_seed_alone():
    examples = some_examples()
    groups_seed_3, groups_seed_3_again, groups_seed_4 = (
        list(groups(examples, template=TEMPLATE, negatives=2, seed=seed)) for seed in (3, 3, 4)
    )
    assert groups_seed_3 == groups_seed_3_again
    assert groups_seed_3 != groups_seed_4


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
