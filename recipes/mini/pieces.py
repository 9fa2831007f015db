"""Which pieces of a teacher's WordPiece vocabulary a smaller one should have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tokenizers import Tokenizer
from tqdm import tqdm

from nvembed_deploy.training.teacher import Teacher
from recipes.mini.tokenizer import SPACE

TEXTS_AT_A_TIME = 1000
INSIDE = "##"
"""What a WordPiece vocabulary puts in front of a piece inside a word."""
ZIPF_SHARE = 0.3
"""How far a piece's rank in the teacher's vocabulary counts beside its number in the text, which is no fair picture of
all that users embed."""


def teacher_pieces(teacher: Teacher, texts: Sequence[str]) -> list[str]:
    """The teacher's pieces of words, the most important ones first, a space mark in front of those that begin a word.

    Important is what is frequent in the texts; and, for what they are not about, what stands early in the teacher's
    vocabulary, which is ordered by frequency: by Zipf's law, a piece's number is one over its rank.
    """
    own = Tokenizer.from_str(teacher.tokenizer.backend_tokenizer.to_str())
    own.no_truncation()
    own.no_padding()
    ids: Counter[int] = Counter()
    for start in tqdm(range(0, len(texts), TEXTS_AT_A_TIME), desc="counting pieces", unit="batch", disable=None):
        for encoding in own.encode_batch_fast(texts[start : start + TEXTS_AT_A_TIME], add_special_tokens=False):
            ids.update(encoding.ids)
    counts = Counter({own.id_to_token(number): count for number, count in ids.items()})
    known = _vocabulary(teacher)
    ranked = [piece for piece in known if len(piece.removeprefix(INSIDE)) > 1]
    first = sum(counts.values()) / sum(1 / rank for rank in range(1, len(ranked) + 1))
    numbers = {piece: (1 - ZIPF_SHARE) * counts[piece] for piece in known}
    for rank, piece in enumerate(ranked, 1):
        numbers[piece] += ZIPF_SHARE * first / rank
    ordered = sorted(numbers, key=lambda piece: (-numbers[piece], piece))
    return [form for piece in ordered for form in _forms(piece)]


def _forms(piece: str) -> tuple[str, ...]:
    """A piece as our tokenizer's text has it: marks of punctuation stand behind a space or not."""
    if piece.startswith(INSIDE):
        return (piece.removeprefix(INSIDE),)
    return (SPACE + piece,) if piece.isalnum() else (SPACE + piece, piece)


def _vocabulary(teacher: Teacher) -> list[str]:
    """The teacher's pieces by their ids, from frequent to rare; no control tokens, no place holders."""
    vocabulary = teacher.tokenizer.get_vocab()
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    return [piece for piece in ordered if len(piece) == 1 or not (piece.startswith("[") and piece.endswith("]"))]
