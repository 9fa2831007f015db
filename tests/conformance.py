"""Checks that every encoder must pass, whatever its backend."""

import numpy as np
import pytest

from nvembed_deploy import Encoder, InputError, InputTypeError

TEXTS = [
    "the water ran over the passage",
    "a",
    "Question: in which language is 水 written, and why?",
    "over and over and over " * 12,
    "🚲 naïve café",
    "query",
]


def check_encoder(encoder: Encoder, *, tolerance: float) -> None:
    """Runs all checks.

    Args:
        encoder: Encoder with any backend.
        tolerance: Largest difference of a component between two runs of the same text in different batches.
    """
    vectors = encoder.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), encoder.dimension)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)

    empty = encoder.encode([])
    assert (empty.shape, empty.dtype) == ((0, encoder.dimension), np.float32)

    for index, text in enumerate(TEXTS):
        alone = encoder.encode(text)
        assert alone.shape == (encoder.dimension,)
        assert np.abs(alone - vectors[index]).max() <= tolerance, text

    order = np.random.default_rng(0).permutation(len(TEXTS))
    shuffled = encoder.encode([TEXTS[index] for index in order])
    assert np.abs(shuffled - vectors[order]).max() <= tolerance

    for options in ({"batch_size": 1}, {"batch_size": 2}, {"batch_tokens": 40}, {"batch_tokens": 1}):
        assert np.abs(encoder.encode(TEXTS, **options) - vectors).max() <= tolerance, options

    for form in (tuple(TEXTS), np.array(TEXTS), (text for text in TEXTS), iter(TEXTS)):
        assert np.abs(encoder.encode(form) - vectors).max() <= tolerance

    check_instruction(encoder, tolerance)
    check_options(encoder, vectors, tolerance)
    check_blank_texts(encoder, vectors, tolerance)
    check_bad_input(encoder, vectors, tolerance)


def check_instruction(encoder: Encoder, tolerance: float) -> None:
    """Checks that an instruction changes the vector, is not pooled, and equals the template's prompt."""
    plain = encoder.encode("the water")
    instructed = encoder.encode("the water", instruction="find the passage")
    assert np.abs(plain - instructed).max() > 1e-3
    prompted = encoder.encode("the water", prompt="Instruct: find the passage\nQuery: ")
    assert np.abs(prompted - instructed).max() <= tolerance
    assert np.abs(encoder.encode("the water", instruction="") - plain).max() <= tolerance


def check_options(encoder: Encoder, vectors: np.ndarray, tolerance: float) -> None:
    """Checks truncation, normalization and the progress bar."""
    cut = encoder.encode(TEXTS[3], max_length=9)
    assert np.abs(cut - vectors[3]).max() > 1e-4
    with pytest.raises(InputError, match="text 1 is longer than max_length=9 tokens"):
        encoder.encode(["a", TEXTS[3]], max_length=9, truncate=False)
    raw = encoder.encode(TEXTS, normalize=False)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.abs(lengths - 1).max() > 1e-3
    assert np.abs(raw / lengths - vectors).max() <= max(tolerance, 1e-6)
    assert np.abs(encoder.encode(TEXTS, show_progress=True) - vectors).max() <= tolerance


def check_blank_texts(encoder: Encoder, vectors: np.ndarray, tolerance: float) -> None:
    """Checks that blank texts are embedded and do not change other vectors."""
    blank = encoder.encode(["", TEXTS[3], " \n\t"])
    assert np.abs(np.linalg.norm(blank, axis=1) - 1).max() < 1e-3
    assert np.abs(blank[1] - vectors[3]).max() <= tolerance
    assert np.abs(blank[0] - encoder.encode("")).max() <= tolerance
    assert np.isfinite(encoder.encode("", instruction="Find it")).all()


def check_bad_input(encoder: Encoder, vectors: np.ndarray, tolerance: float) -> None:
    """Checks that each bad input is refused with its index, and that the next valid call is unaffected."""
    for bad, error, message in (
        (["a", None], InputTypeError, "text 1 is a NoneType"),
        (["a", "b", 3], InputTypeError, "text 2 is a int"),
        (["a", b"b"], InputTypeError, "text 1 is a bytes"),
        (["a", "\ud800"], InputError, "text 1 contains half a surrogate pair"),
        (b"bytes", InputTypeError, "texts is a bytes"),
        (None, InputTypeError, "texts is a NoneType"),
        (7, InputTypeError, "texts is a int"),
        ({"a": "b"}, InputTypeError, "texts is a dict"),
        ({"a"}, InputTypeError, "texts is a set"),
    ):
        with pytest.raises(error, match=message):
            encoder.encode(bad)
    assert np.abs(encoder.encode(TEXTS) - vectors).max() <= tolerance
