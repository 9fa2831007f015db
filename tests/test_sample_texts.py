"""Pairs of texts from docstrings."""

from nvembed_deploy.sample_texts import docstring_pairs, topic_pairs

SOURCE = '''"""Tools for lists of things."""

def join(parts: list[str], sep: str = ",") -> str:
    """Joins all parts into one string.

    The separator stands between any two of them, and neither at the start nor at the end.
    """

def short():
    """Too short."""
'''


def test_summaries_are_paired_with_bodies_and_signatures(tmp_path):
    (tmp_path / "tools.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "more.py").write_text(SOURCE)
    pairs = list(docstring_pairs(tmp_path))
    assert ("Joins all parts into one string.", "def join(parts: list[str], sep: str=',')") in pairs
    assert len(pairs) == 2
    assert pairs[1][0].endswith("Joins all parts into one string.")
    assert pairs[1][1].startswith("The separator stands")


def test_the_language_reference_has_many_pairs():
    assert len(list(topic_pairs())) > 300
