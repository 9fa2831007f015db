"""Selection, instructions, negatives and batches are determined by the seed and lose no example."""

import json

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")
pytest.importorskip("tokenizers")

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.training.batches import plan
from nvembed_deploy.training.blend import Source, apply_blend, hold_out, read_blend, select
from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.groups import Groups, instruct
from nvembed_deploy.training.instructions import Kind, instruction_for
from nvembed_deploy.training.options import BLENDED, BY_SET

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


def groups(examples, *, negatives, seed, share=1.0):
    maker = Groups(examples, template=TEMPLATE, negatives=negatives, seed=seed, choose=instruct(share))
    return [maker.group(index, 0) for index in range(len(examples))]


def test_every_query_is_instructed_and_documents_are_in_symmetric_tasks_only():
    own = Example(query="own", positive="p", kind=Kind.RETRIEVAL, source="scifact", instruction="Only this")
    table = Example(query="table", positive="p", kind=Kind.RETRIEVAL, source="scifact")
    examples = [own, table, *some_examples()]
    for example, group in zip(examples, groups(examples, negatives=2, seed=3), strict=True):
        wording = example.instruction or instruction_for(example.source, example.kind)
        prompt = TEMPLATE.format(instruction=wording) if wording else ""
        assert (group[0].text, group[0].prompt, bool(prompt)) == (example.query, prompt, example.kind is not Kind.TEXT)
        assert {row.prompt for row in group[1:]} <= {"" if example.kind is Kind.RETRIEVAL else prompt}
        asks = example.kind is Kind.RETRIEVAL
        assert [row.question for row in group] == [asks] + [False] * (len(group) - 1)
    assert instruction_for("scifact", Kind.RETRIEVAL).startswith("Given a scientific claim")
    assert instruction_for("HotpotQA", Kind.RETRIEVAL).startswith("Given a multi-hop question")
    assert instruction_for("Banking77Classification", Kind.LABEL).startswith("Given a online banking query")
    shares = [bool(group[0].prompt) for group in groups([own] * 400, negatives=2, seed=3, share=0.7)]
    assert sum(shares) / 400 == pytest.approx(0.7, abs=0.08)


def test_negatives_are_drawn_from_the_mined_ones_again_each_epoch():
    examples = [example for example in some_examples() if example.kind is Kind.RETRIEVAL]
    maker = Groups(examples, template=TEMPLATE, negatives=3, seed=1)
    epochs = [[maker.group(index, epoch) for index in range(len(examples))] for epoch in (0, 1)]
    for example, group in zip(examples, epochs[0], strict=True):
        assert group[1].text == example.positive
        assert len(group) == 5
        assert {row.text for row in group[2:]} <= set(example.negatives)
    assert epochs[0] != epochs[1]


def test_positives_come_from_the_same_class_and_negatives_from_others():
    examples = some_examples()
    labels = {example.query: (example.source, example.label) for example in examples if example.kind is Kind.LABEL}
    for example, group in zip(examples, groups(examples, negatives=7, seed=1), strict=True):
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
    assert [len(group) for group in groups(examples, negatives=2, seed=1)] == [1, 1]


def test_groups_depend_on_the_seed_alone():
    examples = some_examples()
    groups_seed_3, groups_seed_3_again, groups_seed_4 = (groups(examples, negatives=2, seed=seed) for seed in (3, 3, 4))
    assert groups_seed_3 == groups_seed_3_again
    assert groups_seed_3 != groups_seed_4


def test_a_blend_file_names_sets_caps_instructions_and_kinds(tmp_path):
    examples = [example for example in some_examples() if example.positive or example.source != "set1"]
    path = tmp_path / "blend.json"
    path.write_text(json.dumps({"set0": {"max_examples": 10, "instruction": "Do"}, "set1": {"kind": "similarity"}}))
    chosen = apply_blend(examples, read_blend(path), seed=1)
    assert chosen == apply_blend(examples, read_blend(path), seed=1) != apply_blend(examples, read_blend(path), seed=2)
    first = [example for example in chosen if example.source == "set0"]
    assert (len(first), {example.instruction for example in first}) == (10, {"Do"})
    assert {example.kind for example in chosen if example.source == "set1"} == {Kind.SIMILARITY}
    assert {example.source for example in chosen} == {"set0", "set1"}
    wrong = {"[]": "names no set", '{"a": {"max": 1}}': "fields max_examples, instruction, kind", "{": "cannot be read"}
    wrong |= {'{"a": {"max_examples": 0}}': "set 'a': max_examples must", '{"a": {"kind": "x"}}': "kind is 'x'"}
    for text, message in wrong.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_blend(path)


def test_a_blend_cannot_make_pairs_of_single_texts():
    with pytest.raises(ConfigError, match=r"set 's': kind retrieval needs pairs, but .* such as 'alone'"):
        apply_blend(
            [Example(query="alone", kind=Kind.LABEL, source="s", label="x")], {"s": Source(kind=Kind.RETRIEVAL)}, seed=1
        )


def test_held_out_examples_are_drawn_over_all_sets_and_share_no_query_or_positive_with_training():
    examples = [
        Example(
            query=f"{source} question {index}",
            positive=f"{source} answer {index // 3}",
            negatives=(f"{source} answer {(index // 3 + 1) % 100}",),
            kind=Kind.RETRIEVAL,
            source=source,
        )
        for source in "abc"
        for index in range(300)
    ]
    held_out, train = hold_out(examples, 90, seed=1)
    assert len(held_out) == 90
    assert len(train) == 810
    counts = [sum(example.source == source for example in held_out) for source in "abc"]
    assert min(counts) >= 15
    secret = {text for example in held_out for text in (example.query, example.positive)}
    assert not secret & {text for example in train for text in example.texts}
    assert hold_out(examples, 90, seed=2)[0] != held_out == hold_out(examples, 90, seed=1)[0]
    assert hold_out(examples[:3], 2, seed=1) == ([], examples[:3])  # one answer: together or not at all
    assert hold_out(examples, 0, seed=1) == ([], examples)


def test_steps_hold_every_example_once_in_each_epoch_whatever_the_number_of_processes():
    sources = ["big"] * 40 + ["small"] * 10
    one, two = (plan(sources, queries=10, order=BLENDED, epochs=2, processes=processes, seed=1) for processes in (1, 2))
    assert sorted(entry for step in one for entry in step) == [(epoch, i) for epoch in (0, 1) for i in range(50)]
    assert [first + second for first, second in zip(two[::2], two[1::2], strict=True)] == one
    assert any({sources[number] for _, number in step} == {"big", "small"} for step in one)
    for step in plan(sources, queries=8, order=BY_SET, epochs=1, processes=1, seed=1):
        assert len({sources[number] for _, number in step}) == 1
    assert len(plan(sources, queries=8, order=BLENDED, epochs=1, processes=1, seed=1)) == 6
    assert len(plan(sources, queries=64, order=BLENDED, epochs=1, processes=1, seed=1)[0]) == 50
    with pytest.raises(ConfigError, match="--batch-queries 9 cannot be shared by 2 processes"):
        plan(sources, queries=9, order=BLENDED, epochs=1, processes=2, seed=1)
