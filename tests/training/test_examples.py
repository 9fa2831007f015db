"""The examples file, and what it must not contain."""

import json

import pytest

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.training.examples import Example, Exclusion, read_examples, read_exclusion, write_examples
from nvembed_deploy.training.instructions import Kind


def test_examples_round_trip(tmp_path):
    path = tmp_path / "new" / "examples.jsonl"
    examples = [
        Example(query="q", positive="p", negatives=("n", "m"), kind=Kind.RETRIEVAL, source="s", instruction="Find it"),
        Example(query="ü\u2028", kind=Kind.LABEL, source="s", label="3"),
    ]
    assert write_examples(path, examples) == 2
    assert read_examples(path) == examples
    assert [path.name for path in path.parent.iterdir()] == ["examples.jsonl"]
    assert json.loads(path.read_text(encoding="utf-8").split("\n")[1]) == {
        "query": "ü\u2028",
        "kind": "label",
        "source": "s",
        "label": "3",
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q", "kind": "retrieval"}', "line 1: field 'source'"),
        ('{"query": " ", "kind": "retrieval", "source": "s"}', "line 1: field 'query'"),
        ('{"query": "q", "kind": "search", "source": "s"}', "kind is 'search'; use retrieval, similarity"),
        ('{"query": "q", "kind": "text", "source": "s", "pos": "p"}', "unknown field 'pos'"),
        ('{"query": "q", "kind": "text", "source": "s", "negatives": "n"}', "negatives a list of strings"),
        ('{"query": "q", "kind": "text", "source": "s", "label": 3}', "label and instruction must be strings"),
        ('{"query": "q", "kind": "text", "source": "s", "negatives": ["n"]}', "negatives without a positive"),
        ("[]", "line 1: not a JSON object"),
        ("{", "line 1: not JSON"),
        ("", "contains no examples; create an examples file with: "),
    ],
)
def test_an_invalid_line_is_named(tmp_path, line, message):
    path = tmp_path / "examples.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match=message):
        read_examples(path)


def test_a_missing_file_error_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist; .* train data"):
        read_examples(tmp_path / "none.jsonl")


def test_exclusion_finds_equal_texts_shared_runs_and_near_duplicates():
    excluded = Exclusion(["How do I top up?", "one two three four five six seven eight nine"])
    assert "how do i top up" in excluded
    assert "Well: two, three four five six seven eight NINE!" in excluded
    assert "one two three four five" not in excluded
    assert "how do you top up" in excluded  # four of six words
    assert "how does one spin a top" not in excluded
    assert "top up" not in excluded


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_match_the_definition(seed):
    import random

    rng = random.Random(seed)
    words = [f"w{index}" for index in range(25)]
    excluded_texts = [" ".join(rng.sample(words, rng.randint(4, 9))) for _ in range(60)]
    exclusion = Exclusion(excluded_texts, run_words=100)
    bags = [frozenset(text.split()) for text in excluded_texts]
    near_count = 0
    for _ in range(300):
        text = " ".join(rng.sample(words, rng.randint(4, 9)))
        bag = frozenset(text.split())
        is_near = any(
            len(bag & excluded_bag) / len(bag | excluded_bag) >= Exclusion.SIMILARITY for excluded_bag in bags
        )
        assert (text in exclusion) == is_near
        near_count += is_near
    assert near_count > 5


def test_every_text_of_an_example_counts(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text('{"a": "what is the capital of France", "score": 3}\n')
    excluded = read_exclusion(tmp_path)
    clean = Example(query="q", positive="p", negatives=("n",), kind=Kind.RETRIEVAL, source="s")
    dropped = Example(
        query="q", positive="p", negatives=("What is the capital of France?",), kind=Kind.RETRIEVAL, source="s"
    )
    assert list(excluded.filter([clean, dropped])) == [clean]
    with pytest.raises(ConfigError, match="contains no texts"):
        read_exclusion(tmp_path / "empty")
