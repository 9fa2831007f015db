"""The HTML of results: every text is escaped, marked and cut where it should be."""

from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed_deploy.app import cards
from nvembed_deploy.app.jobs import FileOutcome, Job
from nvembed_deploy.app.passages import Passage
from nvembed_deploy.app.store import Hit, StoredFile

HOSTILE = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from(
            [
                "<",
                ">",
                '"',
                "'",
                "&",
                "&lt;",
                "</li>",
                "<script>",
                "-->",
                "<!--",
                "javascript:",
                " onload=",
                "`",
                "{{",
                "${",
            ]
        ),
        max_size=8,
    ).map("".join),
)


class Reader(HTMLParser):
    """Collects the tags, attributes and text of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)


def normal(text: str) -> str:
    return " ".join(cards.CONTROL.sub(" ", text).split())


@given(title=HOSTILE, text=HOSTILE, source=HOSTILE, link=HOSTILE, record_id=HOSTILE)
@settings(max_examples=150, deadline=None)
def test_no_text_becomes_markup(title: str, text: str, source: str, link: str, record_id: str) -> None:
    passage = Passage(
        source=source,
        title=title,
        text=text,
        prefix=title,
        place=record_id,
        record_id=record_id,
        link=f"https://{link}",
    )
    plain = Passage(source="s", title="t", text="x", prefix="p", place="r", record_id="i", link="https://l")
    read, expected = (
        Reader(cards.results([Hit(hit, 0.5, 3)], threshold=None) + cards.whole(hit.prefix, [(hit.text, True)]))
        for hit in (passage, plain)
    )
    assert set(read.tags) <= {*expected.tags, "code", "mark"}
    assert read.names <= expected.names
    assert all(address.startswith("https://") for address in read.links)
    if normal(title):
        assert normal(title) in normal(read.text)
    file = StoredFile(name=source, bytes=1, sha256="", passages=2, rows=1, note=text)
    job = Job(number=1, collection=title, owner="me", state="failed", message=text)
    job.outcomes = [FileOutcome(name=source, is_added=False, reason=text)]
    read = Reader(cards.files([file], unnamed=1, can_delete=True) + cards.jobs([job], "me"))
    assert set(read.tags) <= {*"table thead tbody tr th td span button div p ul li b".split()}
    assert read.names <= {"scope", "dir", "class", "type", "data-delete-file"}


def test_snippets_show_the_marked_sentence_in_its_context() -> None:
    marked = [("Filler words here. " * 30, False), ("The answer. ", True), ("More of it. " * 30, False)]
    text = Reader(cards.snippet(marked)).text
    assert "<mark>The answer.</mark>" in cards.snippet(marked)
    assert text.startswith("… ")
    assert text.endswith(" …")
    assert "Filler words here. The answer. More of it." in text
    assert len(text) < 350
    assert cards.snippet([("Short.", False)]) == "Short."
    assert Reader(cards.whole("", marked)).text == "".join(sentence for sentence, _ in marked).strip("\n")


def test_code_is_set_apart_and_other_directions_are_left_to_the_browser() -> None:
    text = "Use it so:\n\n    a = 1\n>>> f(a)\nThat is all."
    html = cards.snippet([(text, False)])
    assert "<code>    a = 1</code><code>&gt;&gt;&gt; f(a)</code>" in html
    hit = Hit(Passage(source="א.txt", title="", text="שלום"), 0.5, 0)
    card = cards.results([hit], threshold=0.6)
    assert card.count('dir="auto"') == 4
    assert 'class="hit far"' in card


def test_links_of_documents_are_those_of_the_web() -> None:
    assert cards.safe_link("https://example.com/a") == "https://example.com/a"
    assert [cards.safe_link(link) for link in ("javascript:alert(1)", "https://a\nb", "//x", "data:x", "")] == [""] * 5


def test_progress_tells_speed_and_time_left() -> None:
    job = Job(number=1, collection="c", state="embedding", total=1000)
    job._progress = [(0.0, 0), (10.0, 500)]
    job.done = 500
    assert cards.progress_line(job) == "500 of 1,000 passages, 50 per second, about 10 s left"
    assert [cards.duration(seconds) for seconds in (0.2, 100, 7200)] == ["1 s", "2 min", "2.0 h"]
