"""Makes a byte-fallback BPE tokenizer in Mistral's manner from plain text.

The finished `tokenizer.json` has Mistral's own parts: normalizer, no pre-tokenizer, decoder and post-processor, and the
same low ids. What is ours is the splitting while merges are counted: it keeps merges inside words, so the finished
tokenizer needs none. And all text is lower case: a small table of embeddings holds more words so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from nvembed_deploy.errors import ConfigError

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
CONTROL_TOKENS = (UNK, BOS, EOS)
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "▁"
LONGEST_TOKEN_CHARS = 16
ALPHABET_CHARS = 400
"""Most distinct characters with a token of their own; all others are spelled in bytes."""

_PIECES = r"▁?[\p{L}\p{M}]+|\p{N}|▁?[^\p{L}\p{M}\p{N}▁]+|▁+"
"""Words, single digits (as in Mistral), runs of punctuation, runs of spaces."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Learns merges from texts.

    Args:
        texts: Lines or paragraphs; their order does not matter.
        vocab_size: Tokens in all, the 3 control tokens and the 256 bytes included.

    Returns:
        A tokenizer that adds `<s>` and nothing else, as Mistral's does.

    Raises:
        ConfigError: The vocabulary is too small for the bytes, or the texts are too few for its size.
    """
    floor = len(CONTROL_TOKENS) + len(BYTE_TOKENS)
    if vocab_size <= floor:
        raise ConfigError(f"--vocab-size is {vocab_size}; the bytes and control tokens alone take {floor}")
    learner = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True))
    learner.normalizer = _normalizer()
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    texts = list(texts)
    alphabet = _alphabet(texts)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*CONTROL_TOKENS, *BYTE_TOKENS],
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        max_token_length=LONGEST_TOKEN_CHARS,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer=trainer)
    learned: dict[str, Any] = json.loads(learner.to_str())["model"]
    if len(learned["vocab"]) != vocab_size:
        raise ConfigError(
            f"the texts gave {len(learned['vocab'])} tokens, --vocab-size asks for {vocab_size}; pass more text"
        )
    return assemble(learned["vocab"], [tuple(merge) for merge in learned["merges"]])


def _alphabet(texts: Iterable[str]) -> list[str]:
    """The characters with a token of their own. The library's own choice among equally rare ones differs by run."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.lower())
    always = [SPACE, *dict.fromkeys(chr(code).lower() for code in range(33, 127))]
    others = sorted(counts.keys() - {*always, " "}, key=lambda char: (-counts[char], char))
    return [*always, *others[: max(0, ALPHABET_CHARS - len(always))]]


def assemble(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Puts Mistral's normalizer, decoder and post-processor around a vocabulary."""
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=UNK, byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.normalizer = _normalizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, vocab[BOS])]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])


def token_strings(tokenizer: Tokenizer) -> list[str]:
    """The plain text of each token by id: no space mark; empty for control tokens, bytes and bare spaces."""
    silent = {*CONTROL_TOKENS, *BYTE_TOKENS}
    by_id = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return ["" if token in silent else token.replace(SPACE, " ").strip() for _, token in by_id]
