"""Ranks the pieces of a teacher's WordPiece vocabulary for a smaller vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tokenizers import Tokenizer
from tqdm import tqdm

from recipes.mini.teacher import Teacher
from recipes.mini.tokenizer import SPACE

BATCH_TEXTS = 1000
INSIDE = "##"
"""Prefix of a piece inside a word in a WordPiece vocabulary."""
ZIPF_WEIGHT = 0.3
"""Weight of a piece's rank in the teacher's vocabulary against its count in the text, which does not represent
everything that users embed."""


def teacher_pieces(teacher: Teacher, texts: Sequence[str]) -> list[str]:
    """Returns the teacher's pieces, the most important ones first, with a space mark before those that begin a word.

    A piece is important if it is frequent in the texts or, for topics outside the texts, early in the teacher's
    vocabulary, which is ordered by frequency: by Zipf's law, a piece's count is proportional to one over its rank.
    """
    tokenizer = Tokenizer.from_str(teacher.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: Counter[int] = Counter()
    for start in tqdm(range(0, len(texts), BATCH_TEXTS), desc="counting pieces", unit="batch", disable=None):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + BATCH_TEXTS], add_special_tokens=False):
            ids.update(encoding.ids)
    counts = Counter({tokenizer.id_to_token(token_id): count for token_id, count in ids.items()})
    vocabulary = _vocabulary(teacher)
    ranked = [piece for piece in vocabulary if len(piece.removeprefix(INSIDE)) > 1]
    top_count = sum(counts.values()) / sum(1 / rank for rank in range(1, len(ranked) + 1))
    importance = {piece: (1 - ZIPF_WEIGHT) * counts[piece] for piece in vocabulary}
    for rank, piece in enumerate(ranked, 1):
        importance[piece] += ZIPF_WEIGHT * top_count / rank
    ordered = sorted(importance, key=lambda piece: (-importance[piece], piece))
    return [form for piece in ordered for form in _forms(piece)]


def _forms(piece: str) -> tuple[str, ...]:
    """Returns the forms of a piece in the new tokenizer; punctuation occurs with and without a space before it."""
    if piece.startswith(INSIDE):
        return (piece.removeprefix(INSIDE),)
    return (SPACE + piece,) if piece.isalnum() else (SPACE + piece, piece)


def _vocabulary(teacher: Teacher) -> list[str]:
    """Returns the teacher's pieces by id, from frequent to rare, without control tokens and placeholders."""
    vocabulary = teacher.tokenizer.get_vocab()
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    return [piece for piece in ordered if len(piece) == 1 or not (piece.startswith("[") and piece.endswith("]"))]
