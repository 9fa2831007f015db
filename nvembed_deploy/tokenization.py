"""Tokenization of texts into ids and masks, identical to the models' own code.

Shared by every backend and by the PyTorch reference; needs tokenizers and numpy only. Two deliberate differences from
NVIDIA's code: strings such as `</s>` inside a text stay text instead of becoming control tokens, and a prompt that
leaves no token to pool raises an error instead of returning NaN.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, cast

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
DEFAULT_QUERY_INSTRUCTION = "Given a question, retrieve passages that answer the question"
"""Instruction of queries if none is given, for models that take any instruction: NVIDIA's for NQ and MS MARCO. The
parity probes have it too, so stored reference outputs depend on it."""
DOCUMENT_PROMPT_NAMES = ("document", "passage", "corpus")
"""Names of a checkpoint's prompt for documents, as sentence-transformers looks for them."""
Truncate = bool | Literal["start", "end"]
"""What happens to longer texts: True and `end` drop their end, `start` their beginning, and False raises an error."""
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
class _Prefix:
    """What stands before the text in a row."""

    ids: list[int]
    """Special tokens, and the prompt up to its last special token."""
    text: str
    """Rest of the prompt, which is tokenized together with the text."""
    prompt_tokens: int
    """See `TokenRow.prompt_tokens`."""
    total_tokens: int
    """Number of ids of all of it."""


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

        `query` and `document` are names of every model's prompts. Without arguments it is the model's default prompt,
        which is empty for most models.

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
        if instruction and self.contract.instruction_template:
            return self.contract.instruction_template.replace("{instruction}", instruction)
        if instruction or prompt_name:
            prompts = self.prompts(None)
            names = ", ".join(map(repr, prompts))
            if instruction:
                raise ConfigError(f"this model takes no instructions; pass prompt_name, which can be: {names}")
            if prompt_name not in prompts:
                raise ConfigError(f"prompt_name is {prompt_name!r}; this model's prompts are: {names}")
            return prompts[prompt_name]
        return self.contract.default_prompt if prompt is None else prompt

    def prompts(self, query_instruction: str | None) -> dict[str, str]:
        """Returns the prompts by name: `query` and `document`, and the checkpoint's others.

        Args:
            query_instruction: The task in words, for the prompt for queries; None for the checkpoint's own prompt, or
                `DEFAULT_QUERY_INSTRUCTION` if it has none and takes instructions.

        Raises:
            ConfigError: An instruction is given, and the model takes none.
        """
        own_prompts = self.contract.prompts
        document = next((own_prompts[name] for name in DOCUMENT_PROMPT_NAMES if name in own_prompts), None)
        if query_instruction is None:
            query = own_prompts.get("query", self.query_prompt(DEFAULT_QUERY_INSTRUCTION))
        else:
            query = self.prompt(query_instruction, None)
        return own_prompts | {
            "query": query,
            "document": self.contract.default_prompt if document is None else document,
        }

    def query_prompt(self, instruction: str) -> str:
        """Returns the prompt for queries: the instruction's, or a model's fixed query prompt."""
        if self.contract.instruction_template:
            return self.prompt(instruction, None)
        return self.contract.prompts.get("query", self.contract.default_prompt)

    def tokenize(
        self,
        texts: Sequence[str],
        *,
        prompt: str = "",
        max_length: int,
        drop_start: bool = False,
        with_spans: bool = False,
    ) -> list[TokenRow]:
        """Tokenizes each text after the prompt.

        Args:
            texts: Any strings; `check_texts` defines which of them `Encoder` accepts.
            prompt: The prefix verbatim; special-token strings in it become control tokens, as in NVIDIA's code.
            max_length: Maximum ids per row, special tokens and prompt included; of longer texts the end is dropped.
            drop_start: Drops the beginning of longer texts instead.
            with_spans: Sets `TokenRow.spans`, which takes longer; only without `drop_start`.

        Raises:
            ConfigError: `max_length` is below 1 or above the model's positions.
        """
        if not 1 <= max_length <= self.contract.max_tokens:
            raise ConfigError(
                f"max_length is {max_length}; this model accepts 1 to {self.contract.max_tokens} tokens per text"
            )
        prefix = self._prefix(prompt)
        max_chars = None
        if self._longest_token_chars is not None and not drop_start:
            max_chars = max_length * self._longest_token_chars + CUT_MARGIN_CHARS
        bodies = [prefix.text + text[:max_chars] for text in texts]
        encode = self._literal.encode_batch if with_spans else self._literal.encode_batch_fast
        rows = []
        for encoding in encode(bodies, add_special_tokens=False):
            row = self._row(encoding.ids, prefix, max_length=max_length, drop_start=drop_start)
            rows.append(replace(row, spans=self._row_spans(row, encoding.offsets, prefix)) if with_spans else row)
        return rows

    def rows_from_ids(
        self, texts: Sequence[Sequence[int]], *, prompt: str = "", max_length: int, drop_start: bool = False
    ) -> list[TokenRow]:
        """Makes rows of texts that are tokenized already, without special tokens; see `tokenize` for the arguments.

        Raises:
            InputError: An id is not in the vocabulary.
        """
        prefix = self._prefix(prompt)
        vocab_size = self._literal.get_vocab_size()
        for index, ids in enumerate(texts):
            if invalid := [token for token in ids if not 0 <= token < vocab_size]:
                raise InputError(
                    f"text {index} has token id {invalid[0]}, and this model's tokenizer has ids from 0 to "
                    f"{vocab_size - 1}; send texts, or ids of this model's tokenizer"
                )
        prompt_ids = self._literal.encode(prefix.text, add_special_tokens=False).ids
        return [self._row([*prompt_ids, *ids], prefix, max_length=max_length, drop_start=drop_start) for ids in texts]

    def _prefix(self, prompt: str) -> _Prefix:
        head, tail = self._split_prompt(prompt)
        ids = list(self.contract.prefix_ids)
        head_ids = self._parsing.encode(head, add_special_tokens=False).ids if head else []
        tail_tokens = len(self._literal.encode(tail, add_special_tokens=False).ids) if tail else 0
        prompt_tokens = len(head_ids) + tail_tokens
        if prompt and self.contract.exclude_prefix_from_pooling:
            prompt_tokens += len(ids)
        return _Prefix(
            ids=ids + head_ids,
            text=tail,
            prompt_tokens=prompt_tokens if self.contract.mask_prompt else 0,
            total_tokens=len(ids) + len(head_ids) + tail_tokens,
        )

    def _row(self, body_ids: list[int], prefix: _Prefix, *, max_length: int, drop_start: bool) -> TokenRow:
        suffix_ids = list(self.contract.suffix_ids)
        all_ids = [*prefix.ids, *body_ids, *suffix_ids]
        ids = all_ids
        if len(all_ids) > max_length and drop_start:
            remaining_tokens = max(0, max_length - prefix.total_tokens)
            ids = all_ids[: min(prefix.total_tokens, max_length)] + all_ids[len(all_ids) - remaining_tokens :]
        elif len(all_ids) > max_length:
            kept_suffix = len(suffix_ids) if self.contract.keep_suffix_on_truncation else 0
            ids = all_ids[: max(0, max_length - kept_suffix)] + suffix_ids[: min(kept_suffix, max_length)]
        return TokenRow(ids=ids, prompt_tokens=prefix.prompt_tokens, truncated=len(all_ids) > max_length)

    def _row_spans(self, row: TokenRow, offsets: list[tuple[int, int]], prefix: _Prefix) -> list[tuple[int, int]]:
        """Returns the character span of each id of a row that was not truncated at its start."""
        suffix_ids = self.contract.suffix_ids
        kept_suffix = len(suffix_ids) if self.contract.keep_suffix_on_truncation else 0
        text_spans = [(max(0, start - len(prefix.text)), max(0, end - len(prefix.text))) for start, end in offsets]
        spans = [*[(0, 0)] * len(prefix.ids), *text_spans, *[(0, 0)] * len(suffix_ids)][: len(row)]
        spans[len(row) - kept_suffix :] = [(0, 0)] * kept_suffix
        return spans

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Returns the character span (start, end) of each token of a text of any length."""
        offsets: list[tuple[int, int]] = self._literal.encode(text, add_special_tokens=False).offsets
        return offsets

    def has_special_strings(self, text: str) -> bool:
        """Returns whether a text contains the string of a special token, which other programs may interpret."""
        return any(token in text for token in self._specials)

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


def check_container(texts: object) -> None:
    """Rejects containers that do not iterate over texts, such as a str (characters) or a dict (keys)."""
    kind = type(texts).__name__
    if hasattr(texts, "columns") or hasattr(texts, "column_names"):  # pandas, polars and pyarrow iterate over names
        raise InputTypeError(f"texts is a table ({kind}); pass one of its columns, such as table['text']")
    if getattr(texts, "ndim", 1) == 0:
        raise InputTypeError(f"texts is an array without dimensions ({kind}); pass a list of str")
    if isinstance(texts, (str, bytes, bytearray, Mapping, AbstractSet)) or not isinstance(texts, Iterable):
        raise InputTypeError(f"texts is a {kind}; pass a list of str, or a generator of str")


def as_python_strings(texts: Iterable[str]) -> Iterable[str]:
    """Converts a pyarrow array, whose elements are pyarrow scalars, to a list of str; returns others unchanged."""
    if type(texts).__module__.partition(".")[0] == "pyarrow" and hasattr(texts, "to_pylist"):
        return cast("list[str]", texts.to_pylist())
    return texts


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
