"""Windows of texts: each is checked and tokenized as one, while the previous one runs; see `batches` for what runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

from nvembed_deploy.console import program
from nvembed_deploy.errors import InputError
from nvembed_deploy.tokenization import TextEncoder, TokenRow, Truncate, check_pooled, check_texts

WINDOW_TEXTS = 4096
"""Texts that are tokenized and sorted by length together; a generator is read one window ahead."""


@dataclass(frozen=True, kw_only=True)
class TokenRules:
    """Tokenization options of one call."""

    prompt: str
    max_tokens: int
    """Maximum tokens per row; longer texts are truncated or refused."""
    plan_tokens: int | None
    """Maximum tokens per row that the plan accepts; None if there is no plan."""
    truncate: Truncate


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokenized texts that are sorted by length together."""

    rows: list[TokenRow]
    truncated_texts: int
    blank_texts: int


def check_list(texts: Iterable[str]) -> None:
    """Checks a list of several windows, so that an error in the last one is raised before the first one runs.

    Raises:
        InputTypeError: See `Encoder.encode`; likewise for the other errors.
    """
    if not isinstance(texts, Sized) or cast("object", iter(texts)) is texts or len(texts) <= WINDOW_TEXTS:
        return
    remaining = iter(texts)
    first_index = 0
    while window := list(itertools.islice(remaining, WINDOW_TEXTS)):
        check_texts(window, first_index=first_index)
        first_index += len(window)


def tokenized_windows(texts: Iterable[object], text_encoder: TextEncoder, rules: TokenRules) -> Iterator[Window]:
    """Yields tokenized windows: read in the caller's thread, tokenized in another thread while batches run.

    If reading the texts of the next window fails, the window before it is yielded first.
    """
    iterator = iter(texts)
    window_texts = list(itertools.islice(iterator, WINDOW_TEXTS))
    start, has_more = 0, len(window_texts) == WINDOW_TEXTS  # a short call starts no thread
    with ThreadPoolExecutor(max_workers=1) if has_more else nullcontext() as pool:
        window = tokenize(window_texts, text_encoder, rules=rules) if window_texts else None
        error: Exception | None = None
        while window is not None:
            start += len(window.rows)
            try:
                window_texts = list(itertools.islice(iterator, WINDOW_TEXTS)) if has_more else []
            except Exception as err:
                window_texts, error = [], err
            future = None
            if pool is not None and window_texts:
                future = pool.submit(tokenize, window_texts, text_encoder, rules=rules, first_index=start)
            yield window
            if error is not None:
                raise error
            window = future.result() if future is not None else None


def tokenize(
    texts: Sequence[object],
    text_encoder: TextEncoder,
    *,
    rules: TokenRules,
    first_index: int = 0,
    with_spans: bool = False,
) -> Window:
    """Checks and tokenizes the texts of one window.

    Args:
        first_index: Index of the first text in the call, for error messages.
        with_spans: Sets `TokenRow.spans`.

    Raises:
        InputTypeError: See `Encoder.encode`; likewise for the other errors.
    """
    checked = check_texts(texts, first_index=first_index)
    rows = text_encoder.tokenize(
        checked,
        prompt=rules.prompt,
        max_length=rules.max_tokens,
        drop_start=rules.truncate == "start",
        with_spans=with_spans,
    )
    check_rows(rows, rules, first_index=first_index)
    return Window(
        rows=rows,
        truncated_texts=sum(row.truncated for row in rows),
        blank_texts=sum(not text or text.isspace() for text in checked),
    )


def check_rows(rows: list[TokenRow], rules: TokenRules, *, first_index: int = 0) -> None:
    """Checks that the rows have tokens to pool and are not longer than the caller and the plan accept.

    Raises:
        InputError: A row is not; the message gives its index.
    """
    check_pooled(rows, first_index, max_length=rules.max_tokens)
    max_tokens = rules.max_tokens if rules.plan_tokens is None else rules.plan_tokens
    for index, row in enumerate(rows, first_index):
        if row.truncated and not rules.truncate:
            raise InputError(
                f"text {index} is longer than max_length={rules.max_tokens} tokens; shorten it, raise "
                "max_length, or pass truncate=True"
            )
        if len(row) > max_tokens:
            raise InputError(
                f"text {index} has {len(row)} tokens and the plan accepts {max_tokens}; pass "
                f"max_length={max_tokens}, or rebuild the plan: {program('build')} BUNDLE --max BATCHxTOKENS"
            )
