"""Tokenization of texts into ids and masks, identical to the models' own code.

Shared by every backend and by the PyTorch reference; needs tokenizers and numpy only. Two deliberate differences from
NVIDIA's code: strings such as `</s>` inside a text stay text instead of becoming control tokens, and a prompt that
leaves no token to pool raises an error instead of returning NaN.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from nvembed_deploy.errors import BundleError, ConfigError, InputError, InputTypeError

CUT_MARGIN_CHARS = 64
WORD_PATTERN = r"▁?[\p{L}\p{M}]+|▁?\p{N}+|▁?[^\p{L}\p{M}\p{N}▁]+|▁+"
"""Pattern by which the embedded model's tokenizer splits text: words, numbers, punctuation, spaces."""
INSIDE_PATTERN = r"(?<=[^\p{L}\p{M}\p{N}▁])(?=[\p{L}\p{N}])"
"""Position where that tokenizer inserts a space mark: between punctuation and the word or number after it."""
_FIXED_WORDS = re.compile(r"(?:\\[^\w]|\(\?:|[^\\*+{.^$(])*")
"""Matches regular expressions that consist of fixed words, so that they look no further than the longest word."""
Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TextContract:
    """Rules by which a model's ids and masks are made from a text; stored in the bundle's manifest."""

    prefix_ids: tuple[int, ...]
    """Ids before every text, such as `<s>`."""
    suffix_ids: tuple[int, ...]
    """Ids after every text, such as `</s>`."""
    pad_id: int
    """Id that pads rows on the right. For NV-Embed it is the id of `</s>`, so masks are never derived from ids."""
    mask_prompt: bool
    """Whether the prompt's tokens take part in attention but are not pooled."""
    max_tokens: int
    """Maximum number of positions of the model."""
    keep_suffix_on_truncation: bool = False
    """Whether truncation keeps the suffix; False drops it with the end of the text, as in NVIDIA's code."""
    exclude_prefix_from_pooling: bool = False
    """Whether the prefix of a row with a prompt is excluded from pooling too (GritLM)."""
    pool_last: bool = False
    """Whether only the last token is pooled."""
    instruction_template: str = "Instruct: {instruction}\nQuery: "
    """Template of the prompt for an instruction; empty if the model takes no instructions."""
    default_prompt: str = ""
    """Prompt used when no instruction is given."""
    prompts: dict[str, str] = field(default_factory=dict)
    """Named prompts of the checkpoint."""

    def __post_init__(self) -> None:
        if self.instruction_template and "{instruction}" not in self.instruction_template:
            raise ConfigError(f"instruction_template {self.instruction_template!r} does not contain {{instruction}}")


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """The token ids of one text, prompt and special tokens included."""

    ids: list[int]
    prompt_tokens: int
    """Number of leading positions that are not pooled."""
    truncated: bool
    spans: list[tuple[int, int]] | None = None
    """Character span (start, end) of each id, or None if spans were not requested. Empty for special tokens and the
    prompt."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """The three inputs of the graph, right-padded."""

    input_ids: Ids
    """int64 [B, T]."""
    attention_mask: Ids
    """int64 [B, T], 1 at real tokens, 0 at padding."""
    pool_mask: Ids
    """int64 [B, T], 1 at tokens that are pooled."""

    def __iter__(self) -> Any:
        return iter((self.input_ids, self.attention_mask, self.pool_mask))


class TextEncoder:
    """Converts texts to padded ids and masks.

    Args:
        tokenizer_json: Content of `tokenizer.json`. It is used unchanged: transformers 5 rebuilds it and returns other
            ids for 3 % of unusual texts.
        contract: The model's rules for ids and masks.

    Raises:
        BundleError: The content is not a tokenizer.
    """

    def __init__(self, tokenizer_json: bytes, contract: TextContract) -> None:
        self.contract = contract
        self._json = tokenizer_json
        self._literal = parse_tokenizer(tokenizer_json)
        self._literal.encode_special_tokens = True

    @cached_property
    def _parsing(self) -> Tokenizer:
        """Tokenizer for prompts, in which special-token strings become control tokens."""
        return parse_tokenizer(self._json)

    @cached_property
    def _specials(self) -> tuple[str, ...]:
        return tuple(token.content for token in self._literal.get_added_tokens_decoder().values() if token.special)

    @cached_property
    def _longest_token_chars(self) -> int | None:
        """Characters of the longest token, or None if truncating a text could change the ids before the cut."""
        if not _is_safe_to_pretruncate(json.loads(self._json)):
            return None
        return max(map(len, self._literal.get_vocab()))

    def prompt(self, instruction: str | None, prompt: str | None, prompt_name: str | None = None) -> str:
        """Returns the prefix of every text: the filled template, the prompt verbatim, or a named prompt.

        Without arguments it is the model's default prompt, which is empty for most models.

        Raises:
            ConfigError: More than one argument is given, one is not a str, or the model has no such prompt.
        """
        options = {"instruction": instruction, "prompt": prompt, "prompt_name": prompt_name}
        for name, value in options.items():
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} is a {type(value).__name__}; pass a str")
            if value is not None and (position := lone_surrogate(value)) is not None:
                raise ConfigError(f"{name} contains half a surrogate pair at character {position}; remove it")
        if len(option_names := [name for name, value in options.items() if value]) > 1:
            raise ConfigError(
                f"{' and '.join(option_names)} are mutually exclusive; pass instruction (the task in words, for the "
                "model's template), prompt (the prefix verbatim) or prompt_name (one of the model's named prompts)"
            )
        names = ", ".join(map(repr, self.contract.prompts)) or "none"
        if instruction:
            if not self.contract.instruction_template:
                raise ConfigError(f"this model takes no instructions; pass prompt_name, which can be: {names}")
            return self.contract.instruction_template.replace("{instruction}", instruction)
        if prompt_name:
            if prompt_name not in self.contract.prompts:
                raise ConfigError(f"prompt_name is {prompt_name!r}; this model's prompts are: {names}")
            return self.contract.prompts[prompt_name]
        return self.contract.default_prompt if prompt is None else prompt

    def query_prompt(self, instruction: str) -> str:
        """Returns the prompt for queries: the instruction's, or a model's fixed query prompt."""
        if self.contract.instruction_template:
            return self.prompt(instruction, None)
        return self.contract.prompts.get("query", self.contract.default_prompt)

    def tokenize(
        self, texts: Sequence[str], *, prompt: str = "", max_length: int, with_spans: bool = False
    ) -> list[TokenRow]:
        """Tokenizes each text after the prompt.

        Args:
            texts: Any strings; `check_texts` defines which of them `Encoder` accepts.
            prompt: The prefix verbatim; special-token strings in it become control tokens, as in NVIDIA's code.
            max_length: Maximum ids per row, special tokens and prompt included; longer rows are truncated on the right.
            with_spans: Sets `TokenRow.spans`, which takes longer.

        Raises:
            ConfigError: `max_length` is below 1 or above the model's positions.
        """
        if not 1 <= max_length <= self.contract.max_tokens:
            raise ConfigError(
                f"max_length is {max_length}; this model accepts 1 to {self.contract.max_tokens} tokens per text"
            )
        head, tail = self._split_prompt(prompt)
        start_ids = list(self.contract.prefix_ids)
        prompt_tokens = 0
        if head:
            head_ids = self._parsing.encode(head, add_special_tokens=False).ids
            start_ids, prompt_tokens = start_ids + head_ids, len(head_ids)
        if tail:
            prompt_tokens += len(self._literal.encode(tail, add_special_tokens=False).ids)
        if prompt and self.contract.exclude_prefix_from_pooling:
            prompt_tokens += len(self.contract.prefix_ids)
        max_chars = None
        if self._longest_token_chars is not None:
            max_chars = max_length * self._longest_token_chars + CUT_MARGIN_CHARS
        bodies = [tail + text[:max_chars] for text in texts]
        rows = []
        encode = self._literal.encode_batch if with_spans else self._literal.encode_batch_fast
        suffix_ids = list(self.contract.suffix_ids)
        kept_suffix = len(suffix_ids) if self.contract.keep_suffix_on_truncation else 0
        for encoding in encode(bodies, add_special_tokens=False):
            all_ids = [*start_ids, *encoding.ids, *suffix_ids]
            ids = all_ids
            if len(all_ids) > max_length:
                ids = all_ids[: max(0, max_length - kept_suffix)] + suffix_ids[: min(kept_suffix, max_length)]
            spans = None
            if with_spans:
                text_spans = [(max(0, start - len(tail)), max(0, end - len(tail))) for start, end in encoding.offsets]
                spans = [*[(0, 0)] * len(start_ids), *text_spans, *[(0, 0)] * len(suffix_ids)][: len(ids)]
                spans[len(ids) - kept_suffix :] = [(0, 0)] * kept_suffix
            rows.append(
                TokenRow(
                    ids=ids,
                    prompt_tokens=prompt_tokens if self.contract.mask_prompt else 0,
                    truncated=len(all_ids) > max_length,
                    spans=spans,
                )
            )
        return rows

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Returns the character span (start, end) of each token of a text of any length."""
        offsets: list[tuple[int, int]] = self._literal.encode(text, add_special_tokens=False).offsets
        return offsets

    def pad(self, rows: Sequence[TokenRow]) -> TokenBatch:
        """Right-pads rows to the longest one. Masks are made from lengths and counts, never from ids."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        max_tokens = int(lengths.max())
        input_ids = np.full((len(rows), max_tokens), self.contract.pad_id, dtype=np.int64)
        for target, row in zip(input_ids, rows, strict=True):
            target[: len(row)] = row.ids
        columns = np.arange(max_tokens)
        attended = columns < lengths[:, None]
        pooled = attended & (columns >= np.array([row.prompt_tokens for row in rows])[:, None])
        if self.contract.pool_last:
            pooled = columns == lengths[:, None] - 1
        return TokenBatch(
            input_ids=input_ids, attention_mask=attended.astype(np.int64), pool_mask=pooled.astype(np.int64)
        )

    def _split_prompt(self, prompt: str) -> tuple[str, str]:
        """Splits after the last special token: only the part after it can merge with the text."""
        end = max((prompt.rfind(token) + len(token) for token in self._specials if token in prompt), default=0)
        return prompt[:end], prompt[end:]


def parse_tokenizer(tokenizer_json: bytes) -> Tokenizer:
    """Parses `tokenizer.json` and disables its own padding and truncation.

    Raises:
        BundleError: The content is not a tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as err:  # tokenizers raises plain Exception, and Rust panics as BaseException
        raise BundleError(f"tokenizer.json is damaged or has a newer format ({err}); export the bundle again") from err
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def check_texts(texts: Sequence[object], *, first_index: int = 0) -> list[str]:
    """Checks texts before any work is done.

    Args:
        texts: The texts; numpy strings count as str.
        first_index: Index of the first text in the user's input, for messages.

    Returns:
        The same texts as plain str.

    Raises:
        InputTypeError: A text is not a str.
        InputError: A text contains half a surrogate pair.
    """
    for index, text in enumerate(texts, first_index):
        if not isinstance(text, str):
            raise InputTypeError(f"text {index} is a {type(text).__name__}, not a str; pass texts as str")
        if (position := lone_surrogate(text)) is not None:
            raise InputError(
                f"text {index} contains half a surrogate pair (U+{ord(text[position]):04X}) at character {position}, "
                "which UTF-8 cannot encode; replace it, for example text.encode('utf-16', 'surrogatepass')"
                ".decode('utf-16', 'replace')"
            )
    return [str.__str__(text) for text in texts]  # a subclass may convert itself to another str


def check_pooled(rows: Sequence[TokenRow], first_index: int = 0, *, max_length: int) -> None:
    """Rejects rows in which the prompt leaves no token to pool; NVIDIA's code returns NaN for them.

    Raises:
        InputError: A row has no token to pool; the message gives the text's index, the prompt's length and the limit.
    """
    for index, row in enumerate(rows, first_index):
        if len(row) > row.prompt_tokens:
            continue
        if not row.truncated:
            raise InputError(f"text {index} has no tokens, and this model pools only the text's tokens; omit the text")
        raise InputError(
            f"the instruction takes {row.prompt_tokens} tokens and max_length is {max_length}, so no token of text "
            f"{index} is left to pool; shorten the instruction or raise max_length"
        )


def lone_surrogate(text: str) -> int | None:
    """Returns the index of the first character that UTF-8 cannot encode, or None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        return err.start
    return None


def _is_safe_to_pretruncate(tokenizer: dict[str, Any]) -> bool:
    """Returns True if no token spans more characters than its own string, so that long texts can be truncated first.

    This holds for BPE with byte fallback (no fused unknowns) after replacements of one character by one character,
    after lower-casing, which never shortens a text, and after the embedded model's own splitting, which looks no
    further than one character for words and no further than a token's length inside them.
    """
    splitter = tokenizer.get("pre_tokenizer") or {"pretokenizers": []}
    patterns = [
        step.get("pattern", {}).get("Regex") if step.get("type") == "Split" else None
        for step in splitter.get("pretokenizers", [splitter])
    ]
    if not tokenizer.get("model", {}).get("byte_fallback") or patterns[:1] not in ([], [WORD_PATTERN]):
        return False
    if not all(pattern and _FIXED_WORDS.fullmatch(pattern) for pattern in patterns[1:]):
        return False
    normalizer = tokenizer.get("normalizer") or {}
    for step in normalizer.get("normalizers", [normalizer] if normalizer else []):
        pattern = step.get("pattern", {})
        same_length = step.get("type") == "Replace" and len(pattern.get("String", "")) == len(step["content"]) == 1
        grows = step.get("type") in ("Prepend", "Lowercase") or pattern.get("Regex") == INSIDE_PATTERN
        if not same_length and not grows:
            return False
    return True
