"""Alignment of a teacher's tokens with the student's, and length buckets."""

import random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")

from nvembed_deploy.tokenization import TextContract, TextEncoder  # noqa: E402
from nvembed_deploy.training.length_buckets import (  # noqa: E402
    LENGTH_STEP,
    MIN_BUCKET_ROWS,
    ROW_STEP,
    length_buckets,
)
from recipes.mini.alignment import AFTER, BEFORE, overlaps, student_spans  # noqa: E402
from tests.tiny import make_tokenizer  # noqa: E402

PROMPT = "Instruct: question\nQuery: "


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    contract = TextContract(prefix_ids=(1,), suffix_ids=(2,), pad_id=2, mask_prompt=True, max_tokens=64)
    return TextEncoder(make_tokenizer().to_str().encode(), contract)


def test_weights_are_fractions_of_characters():
    spans = [[BEFORE, (0, 3), (3, 9), (20, 22), AFTER], [(0, 2)]]
    teacher_spans = [[BEFORE, (0, 1), (1, 3), (4, 6), (6, 10), AFTER], [(0, 1), (1, 2)]]
    weights, has_target = overlaps(spans, teacher_spans, tokens=5, teacher_tokens=6)
    assert weights.shape == (2, 5, 6)
    assert has_target.tolist() == [[True, True, True, False, True], [True, False, False, False, False]]
    expected = [[1, 0, 0, 0, 0, 0], [0, 1 / 3, 2 / 3, 0, 0, 0], [0, 0, 0, 0.4, 0.6, 0], [0] * 6, [0, 0, 0, 0, 0, 1]]
    assert torch.allclose(weights[0], torch.tensor(expected, dtype=torch.float32))
    assert weights[1, 0].tolist() == [0.5, 0.5, 0, 0, 0, 0]


def test_spans_cover_the_text_and_not_the_prompt(encoder):
    text = "the water over the question"
    for prompt in ("", PROMPT):
        plain = encoder.tokenize([text], prompt=prompt, max_length=64)[0]
        row = encoder.tokenize([text], prompt=prompt, max_length=64, with_spans=True)[0]
        assert (row.ids, row.prompt_tokens, row.truncated) == (plain.ids, plain.prompt_tokens, plain.truncated)
        assert plain.spans is None
        spans = student_spans(row, encoder.contract)
        assert len(spans) == len(row.ids)
        assert (spans[0], spans[-1]) == (BEFORE, AFTER)
        covered = {index for start, end in spans[1:-1] for index in range(start, end)}
        assert covered >= {index for index, char in enumerate(text) if char != " "}
        assert all(end <= start for start, end in spans[1 : row.prompt_tokens])


def test_a_truncated_row_has_no_end(encoder):
    row = encoder.tokenize(["the water over"], max_length=3, with_spans=True)[0]
    spans = student_spans(row, encoder.contract)
    assert len(spans) == 3
    assert AFTER not in spans


def test_length_buckets_hold_every_row_once_in_round_shapes():
    rng = random.Random(0)
    lengths = [rng.choice([5, 9, 40, 41, 200, 380]) for _ in range(150)]
    buckets = length_buckets(lengths)
    assert sorted(row for bucket in buckets for row in bucket.rows) == list(range(150))
    batch = torch.arange(150)[:, None] * 1000 + torch.arange(380)[None]
    for bucket in buckets:
        assert bucket.length % LENGTH_STEP == 0
        assert bucket.length >= max(lengths[row] for row in bucket.rows)
        bucket_rows = bucket.take(batch)
        assert bucket_rows.shape[0] % ROW_STEP == 0
        assert bucket_rows.shape[1] == bucket.length
        for bucket_row, row in enumerate(bucket.rows):
            assert bucket_rows[bucket_row, : lengths[row]].tolist() == batch[row, : lengths[row]].tolist()
        assert not bucket_rows[:, 380:].any()
    assert len(buckets) > 2
    assert all(len(bucket.rows) >= MIN_BUCKET_ROWS for bucket in buckets[:-1])
    computed_tokens = sum(len(bucket.rows) * bucket.length for bucket in buckets)
    assert computed_tokens < 0.6 * 150 * 380
