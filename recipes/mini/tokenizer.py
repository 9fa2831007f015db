"""Makes a byte-fallback BPE tokenizer in Mistral's manner from plain text.

The finished `tokenizer.json` has Mistral's parts: byte fallback, space marks, decoder, post-processor and low ids. What
is ours serves a small table of embeddings. All text is lower case, and a word behind a hyphen or a bracket gets a space
mark, so that each word is one entry. Text is split into words first; they are spelled by BPE or, where the pieces are
given (`piece_tokenizer`), cut from left to right into the longest of them, as WordPiece does it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.tokenization import INSIDE_PATTERN, WORD_PATTERN
from nvembed_deploy.training.checkpoint_folder import BOS, EOS, UNK

CONTROL_TOKENS = (UNK, BOS, EOS)
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "▁"
LETTERS = tuple(dict.fromkeys(chr(code).lower() for code in range(33, 127)))
"""Single characters that are always entries."""


def piece_tokenizer(pieces: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Makes a tokenizer of given pieces, such as a teacher's: they then stand where the teacher has them.

    Each is taken whole, so BPE has no merges; it is left with what no piece covers, byte by byte.

    Args:
        pieces: In lower case, the most important ones first; those that begin a word have a space mark in front.
        vocab_size: Tokens in all: control tokens, bytes, single characters, and as many pieces as then fit.

    Returns:
        A tokenizer that adds `<s>` and nothing else, as Mistral's does.

    Raises:
        ConfigError: The vocabulary is too small for what it always has, or the pieces are too few for its size.
    """
    always = [*CONTROL_TOKENS, *BYTE_TOKENS, SPACE, *LETTERS, *(SPACE + letter for letter in LETTERS)]
    if vocab_size < len(always):
        raise ConfigError(f"--vocab-size is {vocab_size}; bytes and letters alone take {len(always)}")
    found = dict.fromkeys(always)
    for piece in pieces:
        if len(found) == vocab_size:
            break
        found[piece] = None
    if len(found) != vocab_size:
        raise ConfigError(f"the pieces make {len(found)} tokens, --vocab-size asks for {vocab_size}; ask for fewer")
    tokenizer = assemble({token: number for number, token in enumerate(found)}, [])
    longest = longest_of(token for token in found if token not in (*CONTROL_TOKENS, *BYTE_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in (WORD_PATTERN, longest)]
    )
    return tokenizer


def assemble(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Puts normalizer, splitting, decoder and post-processor around a vocabulary."""
    model = models.BPE(vocab, merges, unk_token=UNK, byte_fallback=True, fuse_unk=True, ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, vocab[BOS])]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Prepend(SPACE),
            normalizers.Replace(" ", SPACE),
            normalizers.Replace(Regex(INSIDE_PATTERN), SPACE),
        ]
    )


def longest_of(words: Iterable[str]) -> str:
    """A regular expression for the longest of some words that stands at a place: their tree of prefixes.

    Reading it takes a step for each character, however many words there are.
    """
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for char in word:
            node = node.setdefault(char, {})
        node[""] = {}
    return _pattern(tree)


def _pattern(node: dict[str, Any]) -> str:
    branches = {char: _pattern(node[char]) for char in sorted(node) if char}
    last = "".join(re.escape(char) for char, rest in branches.items() if not rest)
    found = [re.escape(char) + rest for char, rest in branches.items() if rest] + ([f"[{last}]"] if last else [])
    if not found:
        return ""
    if len(found) == 1 and "" not in node:
        return found[0]
    return f"(?:{'|'.join(found)}){'?' if '' in node else ''}"


def token_strings(tokenizer: Tokenizer) -> list[str]:
    """The plain text of each token by id: no space mark; empty for control tokens, bytes and bare spaces."""
    silent = {*CONTROL_TOKENS, *BYTE_TOKENS}
    by_id = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return ["" if token in silent else token.replace(SPACE, " ").strip() for _, token in by_id]
