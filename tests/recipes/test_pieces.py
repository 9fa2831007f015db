"""Tokenizers with a fixed set of pieces: Mistral's components, words split as WordPiece splits them."""

import json
import random
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from nvembed_deploy.errors import ConfigError
from recipes.mini.tokenizer import BYTE_TOKENS, LETTERS, SPACE, longest_of, piece_tokenizer, token_strings

BEGINNINGS = ("question", "quest", "embed", "un", "mitochondrial", "1984", "19", "re", "retrieve")
CONTINUATIONS = ("ion", "ing", "ding", "s", "able", "break", "84", "tri", "ve", "trieve")
ALWAYS = 3 + 256 + 1 + 2 * len(LETTERS)
SIZE = ALWAYS + len(BEGINNINGS) + len(set(CONTINUATIONS) - set(LETTERS))


@pytest.fixture(scope="module")
def tokenizer():
    return piece_tokenizer([*(SPACE + word for word in BEGINNINGS), *CONTINUATIONS], vocab_size=SIZE)


def test_low_ids_equal_mistrals(tokenizer):
    assert [tokenizer.id_to_token(token_id) for token_id in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [tokenizer.id_to_token(token_id) for token_id in range(3, 259)] == list(BYTE_TOKENS)
    assert tokenizer.get_vocab_size() == SIZE


def test_components_equal_mistrals(tokenizer):
    components = json.loads(tokenizer.to_str())
    steps = [step["type"] for step in components["normalizer"]["normalizers"]]
    assert steps == ["Lowercase", "Prepend", "Replace", "Replace"]
    assert components["model"]["type"] == "BPE"
    assert components["model"]["byte_fallback"] is True
    assert components["model"]["fuse_unk"] is True
    assert components["post_processor"]["single"][0]["SpecialToken"]["id"] == "<s>"


def test_words_are_split_into_their_longest_pieces(tokenizer):
    tokens = tokenizer.encode("Embedding un-retrieves (unbreakable), 1984! quests").tokens
    assert tokens == "<s> ▁embed ding ▁un - ▁retrieve s ▁( ▁un break able ) , ▁1984 ! ▁quest s".split()


def test_pieces_are_those_of_wordpiece(tokenizer):
    letters = "".join(letter for letter in LETTERS if letter.isalnum())
    vocab = dict.fromkeys([*letters, *BEGINNINGS, *(f"##{piece}" for piece in (*letters, *CONTINUATIONS)), "[UNK]"])
    pieces = Tokenizer(models.WordPiece({piece: token_id for token_id, piece in enumerate(vocab)}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rng = random.Random(1)
    for _ in range(300):
        word = "".join(rng.choices([*BEGINNINGS, *CONTINUATIONS, *"abrtuv"], k=rng.randint(1, 6)))
        word = re.sub(r"\d", "", word) or "un"  # digits and letters are two words for Mistral, one for BERT
        theirs = [piece.removeprefix("##") for piece in pieces.encode(word).tokens]
        ours = [token.removeprefix(SPACE) for token in tokenizer.encode(word).tokens[1:]]
        assert ours == theirs, word


@pytest.mark.parametrize(
    "text", ["the question", "panic \n\t at", "  two  spaces ", "日本 naïve € 🙂", "x", "^.^ [a-z] \\ d"]
)
def test_every_text_round_trips(tokenizer, text: str):
    ids = tokenizer.encode(text).ids
    assert ids[0] == 1
    assert ids[-1] != 2
    assert tokenizer.decode(ids) == re.sub(r"(?<=[-\[])(?=\w)", " ", text.lower())


def test_token_strings_are_plain(tokenizer):
    strings = token_strings(tokenizer)
    assert len(strings) == SIZE
    assert strings[:260] == [""] * 260
    assert strings[tokenizer.token_to_id("▁r")] == "r"
    assert "mitochondrial" in strings
    assert not any("▁" in string for string in strings)


def test_the_pattern_matches_the_longest_word():
    rng = random.Random(2)
    words = {"".join(rng.choices("ab.|]^-(", k=rng.randint(1, 5))) for _ in range(200)}
    pattern = re.compile(longest_of(words))
    for _ in range(500):
        text = "".join(rng.choices("ab.|]^-(", k=8))
        longest = max((word for word in words if text.startswith(word)), key=len, default=None)
        match = pattern.match(text)
        assert (match and match[0]) == longest, text


def test_too_small_a_vocabulary_and_too_few_pieces_are_refused():
    with pytest.raises(ConfigError, match="for bytes and letters, got 200"):
        piece_tokenizer([], vocab_size=200)
    with pytest.raises(ConfigError, match="the number of available pieces; got"):
        piece_tokenizer(["▁ab"], vocab_size=ALWAYS + 2)
