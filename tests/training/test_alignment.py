"""A teacher's tokens laid over the student's, and parts of like length."""

import random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")

from nvembed_deploy.tokenization import TextContract, TextEncoder  # noqa: E402
from nvembed_deploy.training.alignment import AFTER, BEFORE, overlaps, student_spans  # noqa: E402
from nvembed_deploy.training.length_parts import PART_ROWS, ROW_STEP, WIDTH_STEP, length_parts  # noqa: E402
from tests.tiny import make_tokenizer  # noqa: E402

PROMPT = "Instruct: question\nQuery: "


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    contract = TextContract(prefix_ids=(1,), suffix_ids=(2,), pad_id=2, mask_prompt=True, max_tokens=64)
    return TextEncoder(make_tokenizer().to_str().encode(), contract)


def test_weights_are_shares_of_characters():
    spans = [[BEFORE, (0, 3), (3, 9), (20, 22), AFTER], [(0, 2)]]
    teacher = [[BEFORE, (0, 1), (1, 3), (4, 6), (6, 10), AFTER], [(0, 1), (1, 2)]]
    weights, known = overlaps(spans, teacher, tokens=5, teacher_tokens=6)
    assert weights.shape == (2, 5, 6)
    assert known.tolist() == [[True, True, True, False, True], [True, False, False, False, False]]
    expected = [[1, 0, 0, 0, 0, 0], [0, 1 / 3, 2 / 3, 0, 0, 0], [0, 0, 0, 0.4, 0.6, 0], [0] * 6, [0, 0, 0, 0, 0, 1]]
    assert torch.allclose(weights[0], torch.tensor(expected, dtype=torch.float32))
    assert weights[1, 0].tolist() == [0.5, 0.5, 0, 0, 0, 0]


def test_spans_cover_the_text_and_nothing_of_the_prompt(encoder):
    text = "the water over the question"
    for prompt in ("", PROMPT):
        plain = encoder.tokenize([text], prompt=prompt, max_length=64)[0]
        row = encoder.tokenize([text], prompt=prompt, max_length=64, with_spans=True)[0]
        assert (row.ids, row.prompt_tokens, row.truncated) == (plain.ids, plain.prompt_tokens, plain.truncated)
        assert plain.spans is None
        spans = student_spans(row, encoder.contract)
        assert len(spans) == len(row.ids)
        assert (spans[0], spans[-1]) == (BEFORE, AFTER)
        covered = {place for start, end in spans[1:-1] for place in range(start, end)}
        assert covered >= {place for place, char in enumerate(text) if char != " "}
        assert all(end <= start for start, end in spans[1 : row.prompt_tokens])


def test_a_row_that_was_cut_has_no_end(encoder):
    row = encoder.tokenize(["the water over"], max_length=3, with_spans=True)[0]
    spans = student_spans(row, encoder.contract)
    assert len(spans) == 3
    assert AFTER not in spans


def test_parts_hold_every_row_once_in_round_shapes():
    rng = random.Random(0)
    lengths = [rng.choice([5, 9, 40, 41, 200, 380]) for _ in range(150)]
    parts = length_parts(lengths)
    assert sorted(row for part in parts for row in part.rows) == list(range(150))
    batch = torch.arange(150)[:, None] * 1000 + torch.arange(380)[None]
    for part in parts:
        assert part.width % WIDTH_STEP == 0
        assert part.width >= max(lengths[row] for row in part.rows)
        taken = part.take(batch)
        assert taken.shape[0] % ROW_STEP == 0
        assert taken.shape[1] == part.width
        for place, row in enumerate(part.rows):
            assert taken[place, : lengths[row]].tolist() == batch[row, : lengths[row]].tolist()
        assert not taken[:, 380:].any()
    assert len(parts) > 2
    assert all(len(part.rows) >= PART_ROWS for part in parts[:-1])
    computed = sum(len(part.rows) * part.width for part in parts)
    assert computed < 0.6 * 150 * 380
