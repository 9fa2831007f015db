"""The tokenizer that training makes, and its agreement with what Mistral's does."""

import json

import pytest

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.training.tokenizer import BYTE_TOKENS, LONGEST_TOKEN_CHARS, token_strings, train_tokenizer

TEXTS = [
    f"{word} {other}, said the {third} in {index} words; don't ask why."
    for index, word in enumerate(("question", "answer", "passage", "document", "instruction"))
    for other in ("retrieves", "embedding", "internationalisation", "tokens")
    for third in ("reader", "writer", "teacher")
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=420)


def test_low_ids_are_mistrals(tokenizer):
    assert [tokenizer.id_to_token(number) for number in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [tokenizer.id_to_token(number) for number in range(3, 259)] == list(BYTE_TOKENS)
    assert tokenizer.get_vocab_size() == 420


def test_parts_are_mistrals(tokenizer):
    parts = json.loads(tokenizer.to_str())
    steps = [step["type"] for step in parts["normalizer"]["normalizers"]]
    assert steps == ["Lowercase", "Prepend", "Replace", "Replace"]
    assert parts["model"]["byte_fallback"] is True
    assert parts["model"]["fuse_unk"] is True
    assert parts["post_processor"]["single"][0]["SpecialToken"]["id"] == "<s>"


@pytest.mark.parametrize("text", ["the question", "panic \n\t at", "  two  spaces ", "日本 naïve € 🙂", "x"])
def test_every_text_comes_back(tokenizer, text: str):
    ids = tokenizer.encode(text).ids
    assert ids[0] == 1
    assert ids[-1] != 2
    assert tokenizer.decode(ids) == text.lower()


def test_tokens_stay_inside_words_and_short(tokenizer):
    for token in tokenizer.get_vocab():
        assert len(token) <= LONGEST_TOKEN_CHARS
        assert token in BYTE_TOKENS or not token.strip("▁").count("▁"), token


def test_token_strings_are_plain(tokenizer):
    strings = token_strings(tokenizer)
    assert len(strings) == 420
    assert strings[:259] == [""] * 259
    assert strings[tokenizer.token_to_id("▁r")] == "r"
    assert "embedding" in strings
    assert not any("▁" in string for string in strings)


def test_too_small_a_vocabulary_and_too_little_text_are_refused():
    with pytest.raises(ConfigError, match="--vocab-size is 200"):
        train_tokenizer(TEXTS, vocab_size=200)
    with pytest.raises(ConfigError, match="pass more text"):
        train_tokenizer(["a b"], vocab_size=400)


def test_rare_characters_are_chosen_the_same_way_every_time():
    rare = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 900))
    first, second = (train_tokenizer([*TEXTS, rare], vocab_size=900).to_str() for _ in range(2))
    assert first == second
