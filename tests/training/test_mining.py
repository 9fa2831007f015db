"""Hard negatives compared with an independent implementation of the rule."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")
pytest.importorskip("tqdm", reason="tqdm is not installed: pip install nvembed-deploy[train]")

from nvembed_deploy.training.blend import text_table  # noqa: E402
from nvembed_deploy.training.examples import Example  # noqa: E402
from nvembed_deploy.training.instructions import Kind  # noqa: E402
from nvembed_deploy.training.mining import hardest, mine, negative_limit  # noqa: E402


def test_hardest_takes_the_highest_below_the_limit():
    scores = torch.tensor([0.9, 0.8, 0.76, 0.5, 0.7, -0.4])
    assert hardest(scores, limit=0.76, excluded=set(), count=2) == [4, 3]
    assert hardest(scores, limit=0.77, excluded={2}, count=9) == [4, 3, 5]
    assert hardest(scores, limit=-1.0, excluded=set(), count=3) == []
    assert hardest(scores, limit=2.0, excluded=set(), count=0) == []
    assert scores[2] == torch.tensor(0.76)


def test_the_limit_is_below_a_negative_score_too():
    assert negative_limit(0.8, 0.95) == pytest.approx(0.76)
    assert negative_limit(-0.2, 0.95) == pytest.approx(-0.21)


@pytest.mark.parametrize("margin", [0.95, 0.6])
def test_mined_negatives_follow_the_rule(margin):
    generator = torch.Generator().manual_seed(1)
    examples = [
        Example(query=f"q{index}", positive=f"p{index // 2}", kind=Kind.RETRIEVAL, source=f"s{index % 2}")
        for index in range(80)
    ]
    table = text_table(examples)
    vectors = torch.nn.functional.normalize(torch.randn(len(table), 5, generator=generator).abs(), dim=-1)
    mined = mine(examples, vectors, table, negatives=3, margin=margin)
    assert [(example.query, example.positive) for example in mined] == [
        (example.query, example.positive) for example in examples
    ]
    for example in mined:
        query = vectors[table[example.query]]
        score = {text: float(query @ vectors[table[text]]) for text in table}
        allowed = {
            candidate.positive
            for candidate in examples
            if candidate.source == example.source and candidate.positive != example.positive
        }
        lower = sorted(
            (text for text in allowed if score[text] < margin * score[example.positive]), key=lambda text: -score[text]
        )
        assert list(example.negatives) == lower[:3]
    assert sum(len(example.negatives) for example in mined) > 60


def test_no_answer_of_the_query_and_not_the_query_itself_becomes_a_negative():
    examples = [
        Example(query="q", positive="a", kind=Kind.RETRIEVAL, source="s"),
        Example(query="q", positive="b", kind=Kind.RETRIEVAL, source="s"),
        Example(query="x", positive="q", kind=Kind.SIMILARITY, source="s"),
        Example(query="y", positive="c", kind=Kind.RETRIEVAL, source="s"),
    ]
    table = text_table(examples)
    vectors = torch.zeros(len(table), 4)
    for text, row in {"q": [1, 0, 0, 0], "a": [0.9, 0.1, 0, 0], "b": [0.5, 0.5, 0, 0], "c": [0.4, 0, 1, 0]}.items():
        vectors[table[text]] = torch.tensor(row, dtype=torch.float32)
    mined = mine(examples, torch.nn.functional.normalize(vectors, dim=-1), table, negatives=5)
    assert mined[0].negatives == ("c",)
    assert mined[1].negatives == ("c",)


def test_labelled_negatives_come_first_and_single_texts_remain():
    examples = [
        Example(query="q", positive="a", negatives=("own",), kind=Kind.SIMILARITY, source="s"),
        Example(query="r", positive="b", kind=Kind.SIMILARITY, source="s"),
        Example(query="alone", kind=Kind.TEXT, source="s"),
    ]
    table = text_table(examples[:2])
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [0.5, 1]]), dim=-1)
    mined = mine(examples, vectors, table, negatives=2)
    assert mined[0].negatives == ("own", "b")
    assert mined[2] == examples[2]
    assert mine(examples, vectors, table, negatives=1)[0].negatives == ("own",)
