"""Makes a byte-fallback tokenizer in the format of Mistral's from given pieces.

The finished `tokenizer.json` has Mistral's components: byte fallback, space marks, decoder, post-processor and low ids.
The differences keep the table of embeddings small: all text is lower case, and a word after a hyphen or a bracket gets
a space mark, so that each word has one entry. Text is first split into words, and words from left to right into their
longest pieces, as in WordPiece.
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
"""Single characters that are always in the vocabulary."""


def piece_tokenizer(pieces: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Makes a tokenizer of given pieces, such as a teacher's; it then splits text where the teacher does.

    Pieces are never merged, so BPE has no merges; text that no piece covers is encoded byte by byte.

    Args:
        pieces: Pieces in lower case, the most important ones first; those that begin a word start with a space mark.
        vocab_size: Total number of tokens: control tokens, bytes, single characters, and as many pieces as then fit.

    Returns:
        A tokenizer that adds only `<s>`, as Mistral's does.

    Raises:
        ConfigError: The vocabulary is too small for bytes and characters, or the pieces are too few for its size.
    """
    base_tokens = [*CONTROL_TOKENS, *BYTE_TOKENS, SPACE, *LETTERS, *(SPACE + letter for letter in LETTERS)]
    if vocab_size < len(base_tokens):
        raise ConfigError(f"--vocab-size must be at least {len(base_tokens)} for bytes and letters, got {vocab_size}")
    tokens = dict.fromkeys(base_tokens)
    for piece in pieces:
        if len(tokens) == vocab_size:
            break
        tokens[piece] = None
    if len(tokens) != vocab_size:
        raise ConfigError(
            f"--vocab-size must be at most {len(tokens)}, the number of available pieces; got {vocab_size}"
        )
    tokenizer = assemble({token: token_id for token_id, token in enumerate(tokens)}, [])
    longest = longest_of(token for token in tokens if token not in (*CONTROL_TOKENS, *BYTE_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in (WORD_PATTERN, longest)]
    )
    return tokenizer


def assemble(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Makes a tokenizer of a vocabulary, with normalizer, word splitting, decoder and post-processor."""
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
    """Returns a regular expression that matches the longest of several words: their prefix tree.

    A match takes one step per character, however many words there are.
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
    leaves = "".join(re.escape(char) for char, suffix in branches.items() if not suffix)
    alternatives = [re.escape(char) + suffix for char, suffix in branches.items() if suffix]
    if leaves:
        alternatives.append(f"[{leaves}]")
    if not alternatives:
        return ""
    if len(alternatives) == 1 and "" not in node:
        return alternatives[0]
    return f"(?:{'|'.join(alternatives)}){'?' if '' in node else ''}"


def token_strings(tokenizer: Tokenizer) -> list[str]:
    """Returns the plain text of each token by id, without space marks; empty for control tokens, bytes and spaces."""
    silent = {*CONTROL_TOKENS, *BYTE_TOKENS}
    by_id = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())
    return ["" if token in silent else token.replace(SPACE, " ").strip() for _, token in by_id]
