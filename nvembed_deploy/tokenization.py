"""Text to ids and masks, exactly as the models' own code makes them: the one place that knows about tokens.

Shared by every backend and by the PyTorch reference; needs tokenizers and numpy only. Two wanted differences from
NVIDIA's code: strings such as `</s>` inside a text stay text instead of becoming control tokens, and a prompt that
leaves no token to pool is an error instead of NaN.
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
"""How the embedded model's tokenizer splits text: words, numbers, runs of punctuation, runs of spaces."""
INSIDE_PATTERN = r"(?<=[^\p{L}\p{M}\p{N}▁])(?=[\p{L}\p{N}])"
"""Where it puts a space mark: between punctuation and the word or number behind it."""
_FIXED_WORDS = re.compile(r"(?:\\[^\w]|\(\?:|[^\\*+{.^$(])*")
"""A regular expression of given words alone: it looks no further than the longest of them."""
Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TextContract:
    """What a model expects of its ids and masks; travels in the bundle's manifest."""

    prefix_ids: tuple[int, ...]
    """Put before every text: `<s>`."""
    suffix_ids: tuple[int, ...]
    """Put after every text: `</s>`."""
    pad_id: int
    """Fills rows on the right; NV-Embed's is the id of `</s>`, so no mask is ever derived from ids."""
    mask_prompt: bool
    """True where the prompt's tokens attend but are not pooled."""
    max_tokens: int
    """Positions that the model knows."""
    keep_suffix_on_truncation: bool = False
    """False where the suffix counts as text, so that truncation cuts it off, as in NVIDIA's code."""
    exclude_prefix_from_pooling: bool = False
    """True where the prefix of a row with a prompt is not pooled either (GritLM)."""
    pool_last: bool = False
    """True where the last token alone is pooled."""
    instruction_template: str = "Instruct: {instruction}\nQuery: "
    """Empty where the model takes no instructions."""
    default_prompt: str = ""
    """Of a text without an instruction."""
    prompts: dict[str, str] = field(default_factory=dict)
    """Prompts that the checkpoint gives a name."""

    def __post_init__(self) -> None:
        if self.instruction_template and "{instruction}" not in self.instruction_template:
            raise ConfigError(f"instruction_template {self.instruction_template!r} has no place {{instruction}}")


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One text's ids, prompt and special tokens included."""

    ids: list[int]
    prompt_tokens: int
    """Leading positions that are not pooled."""
    truncated: bool
    spans: list[tuple[int, int]] | None = None
    """First character of the text that each id covers, and the one behind its last: only where asked for. Empty at
    special tokens and the prompt."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """The graph's three inputs, right-padded."""

    input_ids: Ids
    """int64 [B, T]."""
    attention_mask: Ids
    """int64 [B, T], 1 at real tokens, 0 at padding."""
    pool_mask: Ids
    """int64 [B, T], 1 at tokens that are pooled."""

    def __iter__(self) -> Any:
        return iter((self.input_ids, self.attention_mask, self.pool_mask))


class TextEncoder:
    """Turns texts into padded ids and masks.

    Args:
        tokenizer_json: Content of `tokenizer.json`. It is read as it stands: transformers 5 rebuilds it and gives other
            ids for 3 % of odd texts.
        contract: The model's rules.

    Raises:
        BundleError: The content is no tokenizer.
    """

    def __init__(self, tokenizer_json: bytes, contract: TextContract) -> None:
        self.contract = contract
        self._json = tokenizer_json
        self._literal = parse_tokenizer(tokenizer_json)
        self._literal.encode_special_tokens = True

    @cached_property
    def _parsing(self) -> Tokenizer:
        """Reads special-token strings as control tokens: for prompts only."""
        return parse_tokenizer(self._json)

    @cached_property
    def _specials(self) -> tuple[str, ...]:
        return tuple(token.content for token in self._literal.get_added_tokens_decoder().values() if token.special)

    @cached_property
    def _longest_token_chars(self) -> int | None:
        """Characters of the longest token, or None where cutting a text could change the ids that remain."""
        if not _cut_is_safe(json.loads(self._json)):
            return None
        return max(map(len, self._literal.get_vocab()))

    def prompt(self, instruction: str | None, prompt: str | None, prompt_name: str | None = None) -> str:
        """The prefix of every text: the template filled with the instruction, or the prompt verbatim or by its name.

        Without any of them it is the model's default, which for most is none.

        Raises:
            ConfigError: More than one is given, one is not a str, or the model has no such thing.
        """
        given = {"instruction": instruction, "prompt": prompt, "prompt_name": prompt_name}
        for name, value in given.items():
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} is a {type(value).__name__}; pass a str")
            if value is not None and (place := lone_surrogate(value)) is not None:
                raise ConfigError(f"{name} holds half a surrogate pair at character {place}; remove it")
        if len(found := [name for name, value in given.items() if value]) > 1:
            raise ConfigError(
                f"{' and '.join(found)} are both given; pass instruction (the task in words, put into the model's "
                "template), prompt (the prefix verbatim) or prompt_name (one of the model's own)"
            )
        names = ", ".join(map(repr, self.contract.prompts)) or "none"
        if instruction:
            if not self.contract.instruction_template:
                raise ConfigError(f"this model takes no instruction; pass prompt_name, which may be {names}")
            return self.contract.instruction_template.replace("{instruction}", instruction)
        if prompt_name:
            if prompt_name not in self.contract.prompts:
                raise ConfigError(f"prompt_name is {prompt_name!r}; this model's prompts are: {names}")
            return self.contract.prompts[prompt_name]
        return self.contract.default_prompt if prompt is None else prompt

    def query_prompt(self, instruction: str) -> str:
        """The prompt of a query: the instruction's, or the model's own where it takes no instructions."""
        if self.contract.instruction_template:
            return self.prompt(instruction, None)
        return self.contract.prompts.get("query", self.contract.default_prompt)

    def tokenize(
        self, texts: Sequence[str], *, prompt: str = "", max_length: int, with_spans: bool = False
    ) -> list[TokenRow]:
        """Ids of each text behind the prompt.

        Args:
            texts: Any strings; `check_texts` says which of them `Encoder` takes.
            prompt: Prefix verbatim; special-token strings in it are control tokens, as in NVIDIA's code.
            max_length: Most ids a row may have, special tokens and prompt included; the rest is cut off on the right.
            with_spans: Fill in `TokenRow.spans`, which takes longer.

        Raises:
            ConfigError: `max_length` is below 1 or above the model's positions.
        """
        if not 1 <= max_length <= self.contract.max_tokens:
            raise ConfigError(
                f"max_length is {max_length}; this model takes 1 to {self.contract.max_tokens} tokens a text"
            )
        head, tail = self._split_prompt(prompt)
        start = list(self.contract.prefix_ids)
        prompt_tokens = 0
        if head:
            head_ids = self._parsing.encode(head, add_special_tokens=False).ids
            start, prompt_tokens = start + head_ids, len(head_ids)
        if tail:
            prompt_tokens += len(self._literal.encode(tail, add_special_tokens=False).ids)
        if prompt and self.contract.exclude_prefix_from_pooling:
            prompt_tokens += len(self.contract.prefix_ids)
        limit = None
        if self._longest_token_chars is not None:
            limit = max_length * self._longest_token_chars + CUT_MARGIN_CHARS
        bodies = [tail + text[:limit] for text in texts]
        rows = []
        encode = self._literal.encode_batch if with_spans else self._literal.encode_batch_fast
        suffix = list(self.contract.suffix_ids)
        kept = len(suffix) if self.contract.keep_suffix_on_truncation else 0
        for encoding in encode(bodies, add_special_tokens=False):
            ids = [*start, *encoding.ids, *suffix]
            cut = ids if len(ids) <= max_length else ids[: max(0, max_length - kept)] + suffix[: min(kept, max_length)]
            spans = None
            if with_spans:
                behind = [(max(0, first - len(tail)), max(0, end - len(tail))) for first, end in encoding.offsets]
                spans = [*[(0, 0)] * len(start), *behind, *[(0, 0)] * len(suffix)][: len(cut)]
                spans[len(cut) - kept :] = [(0, 0)] * kept
            rows.append(
                TokenRow(
                    ids=cut,
                    prompt_tokens=prompt_tokens if self.contract.mask_prompt else 0,
                    truncated=len(ids) > max_length,
                    spans=spans,
                )
            )
        return rows

    def spans(self, text: str) -> list[tuple[int, int]]:
        """For each token of a text of any length, its first character and the one behind its last."""
        found: list[tuple[int, int]] = self._literal.encode(text, add_special_tokens=False).offsets
        return found

    def pad(self, rows: Sequence[TokenRow]) -> TokenBatch:
        """Right-pads rows to the longest of them. Masks come from lengths and counts, never from ids."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        width = int(lengths.max())
        input_ids = np.full((len(rows), width), self.contract.pad_id, dtype=np.int64)
        for target, row in zip(input_ids, rows, strict=True):
            target[: len(row)] = row.ids
        columns = np.arange(width)
        attended = columns < lengths[:, None]
        pooled = attended & (columns >= np.array([row.prompt_tokens for row in rows])[:, None])
        if self.contract.pool_last:
            pooled = columns == lengths[:, None] - 1
        return TokenBatch(
            input_ids=input_ids, attention_mask=attended.astype(np.int64), pool_mask=pooled.astype(np.int64)
        )

    def _split_prompt(self, prompt: str) -> tuple[str, str]:
        """Splits behind the last special token; what follows it merges with the text, what precedes it cannot."""
        end = max((prompt.rfind(token) + len(token) for token in self._specials if token in prompt), default=0)
        return prompt[:end], prompt[end:]


def parse_tokenizer(tokenizer_json: bytes) -> Tokenizer:
    """Reads `tokenizer.json`, with its own padding and truncation switched off.

    Raises:
        BundleError: The content is no tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as err:  # tokenizers raises bare Exception, and its Rust panics are not even that
        raise BundleError(f"tokenizer.json is damaged or of a newer kind ({err}); make the bundle again") from err
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def check_texts(texts: Sequence[object], *, first_index: int = 0) -> list[str]:
    """Checks what users pass before any work is done.

    Args:
        texts: The texts; numpy strings count as str.
        first_index: Index of the first one in the user's input, for the messages.

    Returns:
        The same texts as plain str.

    Raises:
        InputTypeError: A text is not a str.
        InputError: A text holds half a surrogate pair.
    """
    for index, text in enumerate(texts, first_index):
        if not isinstance(text, str):
            raise InputTypeError(f"text {index} is a {type(text).__name__}, not a str; pass texts as str")
        if (place := lone_surrogate(text)) is not None:
            raise InputError(
                f"text {index} holds half a surrogate pair (U+{ord(text[place]):04X}) at character {place}, which no "
                "UTF-8 can hold; replace it, for example text.encode('utf-16', 'surrogatepass').decode('utf-16', "
                "'replace')"
            )
    return [str.__str__(text) for text in texts]  # a subclass may print itself as something else


def check_pooled(rows: Sequence[TokenRow], first_index: int = 0, *, max_length: int) -> None:
    """Refuses rows in which the prompt leaves no token to pool; NVIDIA's code gives NaN for them.

    Raises:
        InputError: With the text's index, the prompt's length and the limit.
    """
    for index, row in enumerate(rows, first_index):
        if len(row) > row.prompt_tokens:
            continue
        if not row.truncated:
            raise InputError(f"text {index} has no tokens, and this model pools nothing else; leave the text out")
        raise InputError(
            f"the instruction takes {row.prompt_tokens} tokens and max_length is {max_length}, so no token of text "
            f"{index} is left to pool; shorten the instruction or raise max_length"
        )


def lone_surrogate(text: str) -> int | None:
    """Index of the first character that UTF-8 cannot hold, or None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        return err.start
    return None


def _cut_is_safe(tokenizer: dict[str, Any]) -> bool:
    """True if no token spans more characters than its own string, so that a long text may be cut before tokenizing.

    That holds for BPE with byte fallback (no fused unknowns) behind replacements of a character by one character,
    behind lower case, which never makes fewer characters of more, and behind the embedded model's own splitting, which
    looks no further than one character for words and no further than a token's length inside them.
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
