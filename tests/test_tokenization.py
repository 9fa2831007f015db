"""Ids and masks: the peculiarities of NV-Embed's tokenizer, on a small tokenizer of the same type."""

import json
import random
import time
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed_deploy.errors import BundleError, ConfigError, InputError, InputTypeError
from nvembed_deploy.tokenization import WORD_PATTERN, TextContract, TextEncoder, check_pooled, check_texts
from recipes.mini.tokenizer import LETTERS, piece_tokenizer
from tests.tiny import make_tokenizer

CONTRACT = TextContract(prefix_ids=(1,), suffix_ids=(2,), pad_id=2, mask_prompt=True, max_tokens=4096)
TOKENIZER = make_tokenizer()
PROMPT = "Instruct: find the passage\nQuery: "
WORDS = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    return TextEncoder(TOKENIZER.to_str().encode(), CONTRACT)


def reference(body: str, prompt: str = "", max_length: int = 4096) -> tuple[list[int], int]:
    """Tokenizes as NVIDIA's code does: appends `</s>` to the text, lets the tokenizer add `<s>`, then truncates."""
    ids = TOKENIZER.encode(prompt + body + "</s>").ids[:max_length]
    return ids, len(TOKENIZER.encode(prompt, add_special_tokens=False).ids) if prompt else 0


@settings(max_examples=300, deadline=None)
@given(
    body=WORDS, prompt=st.sampled_from(["", PROMPT, "query: ", " ", "Trans", "find this.\n"]), limit=st.integers(1, 90)
)
def test_equals_reference(text: TextEncoder, body: str, prompt: str, limit: int) -> None:
    if any(token in prompt + body for token in ("<s>", "</s>", "<unk>")):
        return
    ids, prompt_tokens = reference(body, prompt, limit)
    row = text.tokenize([body], prompt=prompt, max_length=limit)[0]
    assert (row.ids, row.prompt_tokens) == (ids, prompt_tokens)


@pytest.mark.parametrize("token", ["<s>", "</s>", "<unk>"])
@pytest.mark.parametrize("template", ["{} start", "in the {} middle", "end {}", "{}"])
def test_special_strings_in_a_text_stay_text(text: TextEncoder, token: str, template: str) -> None:
    ids = text.tokenize([template.format(token)], max_length=100)[0].ids
    assert ids[0] == 1
    assert ids[-1] == 2
    assert not {0, 1, 2} & set(ids[1:-1])


def test_special_strings_in_a_prompt_are_control_tokens(text: TextEncoder) -> None:
    ids, prompt_tokens = reference("water", "Query</s>: ")
    row = text.tokenize(["water"], prompt="Query</s>: ", max_length=100)[0]
    assert (row.ids, row.prompt_tokens) == (ids, prompt_tokens)


def test_truncation_cuts_the_end_token(text: TextEncoder) -> None:
    full = text.tokenize(["the water"], max_length=100)[0]
    cut = text.tokenize(["the water"], max_length=len(full) - 1)[0]
    assert full.ids[-1] == 2
    assert not full.truncated
    assert cut.ids == full.ids[:-1]
    assert cut.truncated


def test_padding_is_not_inferred_from_the_ids(text: TextEncoder) -> None:
    batch = text.pad(text.tokenize(["a", "the water over the passage"], max_length=100))
    assert batch.input_ids[0].tolist()[2:] == [2] * (batch.input_ids.shape[1] - 2)  # </s>, then padding: the same id
    assert batch.attention_mask[0].sum() == 3  # <s> a </s>
    assert (batch.pool_mask == batch.attention_mask).all()
    assert all(array.dtype == np.int64 for array in batch)


def test_the_prompt_is_attended_to_and_not_pooled(text: TextEncoder) -> None:
    rows = text.tokenize(["water"], prompt=PROMPT, max_length=100)
    batch = text.pad(rows)
    count = len(TOKENIZER.encode(PROMPT, add_special_tokens=False).ids)
    assert batch.pool_mask[0].tolist() == [0] * count + [1] * (len(rows[0]) - count)
    assert batch.attention_mask.all()


def test_model_that_pools_its_prompt() -> None:
    contract = TextContract(prefix_ids=(1,), suffix_ids=(2,), pad_id=2, mask_prompt=False, max_tokens=99)
    encoder = TextEncoder(TOKENIZER.to_str().encode(), contract)
    assert encoder.pad(encoder.tokenize(["water"], prompt=PROMPT, max_length=99)).pool_mask.all()


@pytest.mark.parametrize("limit", [4, 16, 64])
def test_pretruncation_does_not_change_the_tokens(text: TextEncoder, limit: int) -> None:
    rng = random.Random(7)
    alphabet = "the water 中é🚲\n" + "x" * 5
    for _ in range(30):
        body = "".join(rng.choices(alphabet, k=3000))
        assert text.tokenize([body], max_length=limit)[0].ids == reference(body, "", limit)[0]


def test_ten_megabytes_are_truncated_quickly(text: TextEncoder) -> None:
    body = "the water é " * 900_000
    started = time.perf_counter()
    row = text.tokenize([body], max_length=512)[0]
    assert time.perf_counter() - started < 0.5
    assert (len(row), row.truncated) == (512, True)


def test_texts_are_not_pretruncated_where_it_is_unsafe() -> None:
    config = json.loads(TOKENIZER.to_str())
    config["normalizer"] = {"type": "NFC"}
    encoder = TextEncoder(json.dumps(config).encode(), CONTRACT)
    assert encoder._longest_token_chars is None


def test_pretruncation_with_a_tokenizer_of_fixed_pieces() -> None:
    pieces = ["▁the", "▁water", "wat", "er", "xxxxx", "xx", "▁中"]
    tokenizer = piece_tokenizer(pieces, vocab_size=3 + 256 + 1 + 2 * len(LETTERS) + len(pieces))
    encoder = TextEncoder(tokenizer.to_str().encode(), CONTRACT)
    assert encoder._longest_token_chars == max(map(len, tokenizer.get_vocab()))
    rng = random.Random(8)
    for _ in range(50):
        body = "".join(rng.choices("the water (中é) 19\n" + "x" * 15, k=3000))
        ids = [1, *tokenizer.encode(body, add_special_tokens=False).ids, 2]
        assert encoder.tokenize([body], max_length=40)[0].ids == ids[:40]


@pytest.mark.parametrize("pattern", ["ab(?=c)", "a+b", "a.b", "(ab)", "\\p{L}", "a{2}", "^a", "a$"])
def test_texts_are_not_pretruncated_if_a_pattern_is_not_of_fixed_words(pattern: str) -> None:
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in (WORD_PATTERN, pattern)
    ]
    config = json.loads(TOKENIZER.to_str()) | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": splits}}
    assert TextEncoder(json.dumps(config).encode(), CONTRACT)._longest_token_chars is None


def test_a_prompt_is_verbatim_or_the_filled_template_but_not_both(text: TextEncoder) -> None:
    assert text.prompt("find it", None) == "Instruct: find it\nQuery: "
    assert text.prompt(None, "query: ") == "query: "
    assert text.prompt(None, None) == text.prompt("", "") == ""
    assert text.prompt("a {b} c", None) == "Instruct: a {b} c\nQuery: "
    with pytest.raises(ConfigError, match="mutually exclusive"):
        text.prompt("find it", "query: ")
    with pytest.raises(ConfigError, match="instruction is a int; pass a str"):
        text.prompt(7, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="prompt contains half a surrogate pair at character 2"):
        text.prompt(None, "ab\ud800")


@pytest.mark.parametrize("limit", [0, -1, 4097])
def test_limits_of_max_length(text: TextEncoder, limit: int) -> None:
    with pytest.raises(ConfigError, match=f"max_length is {limit}; this model accepts 1 to 4096"):
        text.tokenize(["a"], max_length=limit)


def test_prompt_that_fills_the_row(text: TextEncoder) -> None:
    rows = text.tokenize(["water"], prompt=PROMPT, max_length=10)
    with pytest.raises(InputError, match="no token of text 0 is left to pool"):
        check_pooled(rows, max_length=10)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, InputTypeError, "text 7 is a NoneType"),
        (3, InputTypeError, "text 7 is a int"),
        (b"bytes", InputTypeError, "text 7 is a bytes"),
        (["nested"], InputTypeError, "text 7 is a list"),
        ("ab\ud83d", InputError, r"text 7 contains half a surrogate pair \(U\+D83D\) at character 2"),
    ],
)
def test_bad_texts_are_named(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_texts(["good", value], first_index=6)


def test_a_text_that_has_no_tokens_is_named() -> None:
    """Applies to a model without a suffix whose control tokens are not pooled, such as GritLM."""
    contract = TextContract(
        prefix_ids=(1,), suffix_ids=(), pad_id=2, mask_prompt=True, exclude_prefix_from_pooling=True, max_tokens=99
    )
    rows = TextEncoder(TOKENIZER.to_str().encode(), contract).tokenize(["water", ""], prompt=PROMPT, max_length=99)
    with pytest.raises(InputError, match="text 8 has no tokens"):
        check_pooled(rows, 7, max_length=99)


def test_subclasses_of_str_are_accepted() -> None:
    """Their content is embedded, not what `str` returns."""

    class Label(str, Enum):
        GOOD = "good"

    texts = check_texts([*np.array(["a", "b"]), Label.GOOD])
    assert texts == ["a", "b", "good"]
    assert {type(text) for text in texts} == {str}


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[1, 2"])
def test_broken_tokenizer(content: bytes) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json is damaged"):
        TextEncoder(content, CONTRACT)


def test_a_saved_tokenizer_reads_back_unchanged(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    again = TextEncoder((tmp_path / "tokenizer.json").read_bytes(), CONTRACT)
    assert again.tokenize(["the water"], max_length=50)[0].ids == reference("the water")[0]
