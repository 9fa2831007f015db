"""What only the mini is trained on: articles, texts of inference sets, similar queries, WordNet, Debian's packages."""

import pytest

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.training.instructions import Kind
from recipes.mini.corpora import read_data
from recipes.mini.debian import package_descriptions
from recipes.mini.wordnet import definitions

NOUNS = """  1 This software and database is being provided to you
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived to have its own distinct existence
00002684 03 n 02 object 0 physical_object 0 039 @ 00001930 n 0000 | a tangible and visible entity; "it was full"
"""


@pytest.fixture
def wordnet(tmp_path):
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for part_of_speech in ("noun", "verb", "adj", "adv"):
        (folder / f"data.{part_of_speech}").write_text(NOUNS if part_of_speech == "noun" else "  1 licence\n")
    return folder


def test_definitions_are_read_from_the_database(wordnet):
    assert list(definitions(wordnet)) == [
        ("entity", "that which is perceived to have its own distinct existence"),
        ("object, physical object", 'a tangible and visible entity; "it was full"'),
    ]
    (wordnet / "data.adv").unlink()
    with pytest.raises(ConfigError, match=r"has no data.adv; install Debian's wordnet-base"):
        list(definitions(wordnet))


def test_the_minis_data_are_read(tmp_path, monkeypatch, wordnet):
    monkeypatch.setattr("nvembed_deploy.training.corpora.docstring_pairs", lambda: [("summary", "body")])
    data_folder = tmp_path / "data"
    for name in ("faq", "labels", "articles", "nli"):
        (data_folder / name).mkdir(parents=True)
    (data_folder / "faq" / "corpus.jsonl").write_text('{"id": "d", "title": "Title", "text": "Answer"}\n')
    (data_folder / "faq" / "queries.jsonl").write_text(
        '{"id": "q", "text": "Question?"}\n{"id": "r", "text": "Ask?"}\n'
    )
    (data_folder / "faq" / "qrels.tsv").write_text("query\tdocument\tscore\nq\td\t1\nr\td\t1\n")
    (data_folder / "labels" / "train.jsonl").write_text('{"text": "play a song", "label": "music"}\n')
    (data_folder / "nli" / "test.jsonl").write_text(
        '{"premise": "premise", "hypothesis": "follows", "label": "entailment"}\n'
        '{"premise": "premise", "hypothesis": "does not", "label": "neutral"}\n'
    )
    (data_folder / "articles" / "a.txt").write_text("Title\n" + "A sentence that is here. " * 20 + "\n\n")
    by_source = {}
    for example in read_data(data_folder, wordnet=wordnet):
        by_source.setdefault(example.source, []).append(example)
    assert [(example.query, example.positive, example.kind) for example in by_source["faq"]] == [
        ("Question?", "Title Answer", Kind.RETRIEVAL),
        ("Ask?", "Title Answer", Kind.RETRIEVAL),
        ("Question?", "Ask?", Kind.SIMILARITY),
    ]
    assert (by_source["labels"][0].kind, by_source["labels"][0].label) == (Kind.LABEL, "music")
    assert [(example.query, example.positive, example.kind) for example in by_source["nli"]] == [
        ("follows", "premise", Kind.SIMILARITY),
        ("does not", "", Kind.TEXT),
        ("premise", "", Kind.TEXT),
    ]
    assert len(by_source["articles_halves"]) == 1
    assert by_source["python_docstrings"][0].texts == ("summary", "body")
    assert by_source["wordnet"][1].query == "object, physical object"
    assert by_source["wordnet_entries"][0].query.startswith("entity: that which")


def test_package_descriptions(tmp_path):
    control = tmp_path / "packages"
    control.write_text(
        "Package: hello\nDescription: example package\n long text\n\n"
        "Package: hello-doc\nDescription: example package\n\n"
        "Package: bash\nDescription-en: GNU shell\n"
    )
    assert list(package_descriptions(control)) == [("hello", "example package"), ("bash", "GNU shell")]


def test_a_file_without_packages_is_named(tmp_path):
    (tmp_path / "none").write_text("nothing")
    for name, message in (("none", "describes no package"), ("missing", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            list(package_descriptions(tmp_path / name))
