"""Layouts of data sets, their corpora and judgements."""

import pytest

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.training.corpora import read_data, read_documents
from nvembed_deploy.training.examples import Document, Example
from nvembed_deploy.training.instructions import Kind


def write_sets(folder, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def test_data_layouts_are_read(tmp_path):
    write_sets(
        tmp_path,
        {
            "pairs/pairs.jsonl": '{"a": "Rome", "b": "Rome is a city."}\n{"a": "x", "b": "y"}\n',
            "labels/train.jsonl": '{"text": "play a song", "label": "music"}\n',
            "triplets/triplets.jsonl": '{"query": "qqq", "positive": "ppp", "negative": "nnn"}\n',
            "sts/train.jsonl": '{"a": "one", "b": "uno", "score": 4.5}\n{"a": "two", "b": "due", "score": 3.9}\n',
            "nli/test.jsonl": '{"premise": "premise", "hypothesis": "follows", "label": "entailment"}\n'
            '{"premise": "premise", "hypothesis": "opposite", "label": "contradiction"}\n'
            '{"premise": "premise", "hypothesis": "unclear", "label": "neutral"}\n'
            '{"premise": "premise", "hypothesis": "open", "label": "not_entailment"}\n',
            "own/examples.jsonl": '{"query": "own", "kind": "text", "source": "mine"}\n',
            "articles/a.txt": "Title\nA sentence.\n",
        },
    )
    by_source = {}
    for example in read_data(tmp_path):
        by_source.setdefault(example.source, []).append(example)
    similar = {"kind": Kind.SIMILARITY, "source": "sts"}
    assert by_source == {
        "pairs": [Example(query="Rome", positive="Rome is a city.", kind=Kind.RETRIEVAL, source="pairs")],
        "labels": [Example(query="play a song", kind=Kind.LABEL, source="labels", label="music")],
        "triplets": [Example(query="qqq", positive="ppp", negatives=("nnn",), kind=Kind.SIMILARITY, source="triplets")],
        "sts": [Example(query="one", positive="uno", **similar), Example(query="uno", positive="one", **similar)],
        "nli": [
            Example(query="premise", positive="follows", negatives=("opposite",), kind=Kind.SIMILARITY, source="nli")
        ],
        "mine": [Example(query="own", kind=Kind.TEXT, source="mine")],
    }


FAQ = {
    "corpus.jsonl": '{"ID": "d", "title": "Title", "text": "Answer"}\n{"ID": "e", "title": null, "text": "Unjudged"}\n',
    "queries.jsonl": '{"ID": "q", "text": "Question?"}\n{"ID": "r", "text": "Ask?"}\n{"ID": "t", "text": "Test?"}\n',
}
TABLE = "query-id\tcorpus-id\tscore\nq\td\t1\nr\td\t1\nt\te\t0\n"
LINES = "".join(f'{{"query-id": "{query}", "corpus-id": "d", "score": 1}}\n' for query in "qr")


@pytest.mark.parametrize(
    ("id_name", "qrels"),
    [
        ("id", {"qrels.tsv": TABLE}),
        ("_id", {"qrels/train.tsv": TABLE, "qrels/test.tsv": "query\tdocument\tscore\nt\te\t1\n"}),
        ("_id", {"qrels/train.jsonl": LINES}),
    ],
    ids=["plain", "BEIR", "MTEB"],
)
def test_a_corpus_gives_pairs_of_its_training_judgements_and_no_pairs_of_queries(tmp_path, id_name, qrels):
    files = {name: content.replace('"ID"', f'"{id_name}"') for name, content in FAQ.items()} | qrels
    write_sets(tmp_path, {f"faq/{name}": content for name, content in files.items()})
    kind = {"positive": "Title Answer", "kind": Kind.RETRIEVAL, "source": "faq"}
    assert list(read_data(tmp_path)) == [Example(query="Question?", **kind), Example(query="Ask?", **kind)]
    assert list(read_documents(tmp_path)) == [
        Document(text="Title Answer", source="faq", queries=("Question?", "Ask?")),
        Document(text="Unjudged", source="faq"),
    ]


def test_evaluation_splits_are_not_trained_on_unasked(tmp_path):
    files = {name: content.replace('"ID"', '"_id"') for name, content in FAQ.items()} | {"qrels/test.tsv": TABLE}
    write_sets(tmp_path, {f"faq/{name}": content for name, content in files.items()})
    with pytest.raises(ConfigError, match=r"no judgements of the split 'train'.*the splits there are test"):
        list(read_data(tmp_path))
    assert len(list(read_data(tmp_path, split="test"))) == 2


def test_a_missing_folder_and_a_damaged_line_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--data .* is not a folder"):
        list(read_data(tmp_path / "none"))
    (tmp_path / "set").mkdir()
    with pytest.raises(ConfigError, match="no folder with a data set in a supported layout"):
        list(read_data(tmp_path))
    (tmp_path / "set" / "pairs.jsonl").write_text('{"a": "x"\n')
    with pytest.raises(ConfigError, match="line 1: not JSON"):
        list(read_data(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"s/a.jsonl": '{"a": "x", "b": 3}'}, "a.jsonl, row 1: field 'b' must be a string, got 3"),
        ({"s/a.jsonl": '{"a": "x", "b": "y", "score": "high"}'}, "field 'score' must be a number, got 'high'"),
        ({"s/a.jsonl": '{"qery": "x", "positive": "y"}'}, "field 'query' must be a string, got None"),
        ({"s/a.jsonl": '{"premise": "x", "hypothesis": "y", "label": 0}'}, "label is 0; use entailment, neutral"),
        ({"pairs.jsonl": '{"a": "x", "b": "y"}'}, "is itself a data set; pass .*, the folder that contains it"),
        ({"s/a.jsonl": '{"question": "x", "answer": "y"}'}, "no folder with a data set in a supported layout"),
        ({"s/corpus.jsonl": '{"text": "x"}'}, "neither '_id' nor 'id'"),
        ({"s/corpus.jsonl": '{"_id": "e", "text": "x"}'}, "none of 2 judgements names a query"),
        ({"s/qrels.tsv": "q\t0\td\t1"}, "line 1: not a query, a document and a number, .* 'q.t0.td.t1'"),
        ({"s/qrels.tsv": "q d 1\nr d 1"}, "line 2: not a query"),
    ],
)
def test_usual_mistakes_are_named(tmp_path, files, message):
    faq = {name: content.replace('"ID"', '"_id"') for name, content in FAQ.items()} | {"qrels.tsv": TABLE}
    if any("corpus" in name or "qrels" in name for name in files):
        files = {f"s/{name}": content for name, content in faq.items()} | files
    write_sets(tmp_path, files)
    with pytest.raises(ConfigError, match=message):
        list(read_data(tmp_path))


def test_judgements_need_no_header_and_the_fields_of_an_unknown_file_are_named(tmp_path, caplog):
    faq = {name: content.replace('"ID"', '"_id"') for name, content in FAQ.items()} | {"qrels.tsv": "q\td\t1\n"}
    write_sets(tmp_path, {f"faq/{name}": content for name, content in faq.items()})
    write_sets(tmp_path, {"other/a.jsonl": '{"question": "x", "answer": "y"}'})
    assert [example.query for example in read_data(tmp_path)] == ["Question?"]
    assert "fields answer, question are no supported layout" in caplog.text
