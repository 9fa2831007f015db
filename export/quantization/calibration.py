"""Calibration for quantization: the texts, and the ranges of the linear layers' inputs on them.

Calibration is measured in tokens, not in texts: a thousand short titles exercise less of a model than twenty pages.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import itertools
import json
import random
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nvembed_deploy.batching import plan_batches
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.export.layerwise import LayerwiseModel
from nvembed_deploy.export.quantization import everyday_texts
from nvembed_deploy.export.quantization.linear_groups import LinearGroup
from nvembed_deploy.export.quantization.record import decode_ranges
from nvembed_deploy.files.json_lines import read_rows
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.parity.probes import PROBES
from nvembed_deploy.sample_texts import docstring_pairs, in_mixed_order, library_files, topic_pairs
from nvembed_deploy.tokenization import DEFAULT_QUERY_INSTRUCTION, TextEncoder, TokenBatch, TokenRow, check_texts

MAX_TEXT_TOKENS = 256
"""Longer texts are truncated."""
BATCH_TOKENS = 2048
SAMPLED_ROWS = 384
"""Rows of each group's input that the search of scales runs on, chosen at random."""
EXTREME_ROWS = 32
"""Rows with the largest values, which a random choice would miss; the search runs on them too."""
SEED = 0
SHORT_TEXTS = 8
"""Texts of one or two words, and one word repeated, per text of most other kinds; they have few tokens."""
SENTENCES = 10
"""Short declarative sentences per text of most other kinds."""
PACKAGES = (
    "json",
    "argparse",
    "statistics",
    "collections",
    "concurrent",
    "datetime",
    "http",
    "logging",
    "random",
    "zipfile",
)
"""Packages of Python's standard library whose texts are used: enough text, and read in a second."""
REPEATS = (4, 8, 16, 32)
"""Numbers of repetitions in texts that repeat one word."""


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """A text to calibrate on."""

    text: str
    instruction: str = ""
    """The task in words if the text is a query; empty if it is a document."""


@dataclass(frozen=True)
class GroupInputs:
    """The inputs of a group of linear layers during calibration."""

    channel_max: Tensor
    """float32 [K], largest absolute value of each channel, over all tokens."""
    sampled_rows: Tensor
    """float32 [n, K], some of the rows."""


def built_in_texts() -> list[CalibrationText]:
    """Returns texts of many kinds, interleaved so that any number of them from the start is a mixture.

    The everyday texts are this project's; passages, code and some queries come from Python's documentation and source.
    """
    summaries, bodies = zip(*in_mixed_order(docstring_pairs(under=PACKAGES)), strict=True)
    kinds: tuple[tuple[int, Iterator[CalibrationText]], ...] = (
        (1, (_query(text) for text in summaries)),
        (1, (CalibrationText(text=body) for _, body in in_mixed_order(topic_pairs()))),
        (1, (CalibrationText(text=text) for text in bodies)),
        (1, (CalibrationText(text=text) for text in _functions())),
        (SHORT_TEXTS, (CalibrationText(text=text) for text in _short_texts(summaries))),
        (SENTENCES, map(_every_third_as_query, itertools.count(), everyday_texts.short_sentences())),
        (2, _questions()),
        (1, (CalibrationText(text=text) for text in everyday_texts.MESSAGES)),
        (1, (CalibrationText(text=text) for text in everyday_texts.HEADLINES)),
        (1, (CalibrationText(text=text) for text in everyday_texts.PROSE)),
        (1, (CalibrationText(text=text) for text in everyday_texts.ABSTRACTS)),
        (1, map(_every_third_as_query, itertools.count(), everyday_texts.OTHER_LANGUAGES)),
    )
    rounds = []
    while texts := [text for count, kind in kinds for text in itertools.islice(kind, count)]:
        rounds.append(texts)
    return [text for texts in rounds for text in texts]


def _query(text: str) -> CalibrationText:
    return CalibrationText(text=text, instruction=DEFAULT_QUERY_INSTRUCTION)


def _every_third_as_query(index: int, text: str) -> CalibrationText:
    return _query(text) if index % 3 == 1 else CalibrationText(text=text)


def _questions() -> Iterator[CalibrationText]:
    """Yields each question as a query, and another one without an instruction beside it."""
    for question, other in zip(everyday_texts.QUESTIONS, reversed(everyday_texts.QUESTIONS), strict=True):
        yield from (_query(question), CalibrationText(text=other))


def _short_texts(sentences: Iterable[str]) -> Iterator[str]:
    """Yields texts of one character, one word, two words, and one word repeated.

    In such texts attention averages over little or nothing, so that its outputs are several times larger.
    """
    words = dict.fromkeys(word for sentence in sentences for word in sentence.split())
    characters = itertools.cycle(string.punctuation + string.digits + string.ascii_letters)
    probes = {text for _, text in PROBES}  # the gate must judge by texts that were not calibrated on
    for index, (word1, word2, word3, word4) in enumerate(zip(*[iter(words)] * 4, strict=False)):
        repeated = " ".join([word4] * REPEATS[index % len(REPEATS)])
        yield from (text for text in (next(characters), word1, f"{word2} {word3}", repeated) if text not in probes)


def _functions() -> list[str]:
    """Returns the source of functions of 5 to 41 lines from Python's standard library."""
    functions = []
    for path in library_files(under=PACKAGES[:3]):
        source = path.read_text(encoding="utf-8")
        # ast's offsets count bytes; ast.get_source_segment would split the file again for each function.
        lines = source.encode().split(b"\n")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and 4 <= (node.end_lineno or 0) - node.lineno <= 40:
                function_lines = lines[node.lineno - 1 : node.end_lineno]
                function_lines[-1] = function_lines[-1][: node.end_col_offset]
                function_lines[0] = function_lines[0][node.col_offset :]
                functions.append(b"\n".join(function_lines).decode())
    return [text for text, _ in in_mixed_order((text, "") for text in functions)]


def read_texts(path: Path) -> list[CalibrationText]:
    """Reads texts from a JSONL file with {"text": ...} and, for queries, {"instruction": ...}; mixes their order.

    Raises:
        ConfigError: The file is empty or cannot be read, or a line is no such object; the message has its number.
    """
    texts = []
    for number, record in enumerate(read_rows(path), 1):
        text, instruction = record.get("text"), record.get("instruction") or ""
        if not isinstance(text, str) or not text.strip() or not isinstance(instruction, str):
            raise ConfigError(
                f"--calibration {path}: row {number} has no text. Each line must be an object with a string "
                '"text" and, for queries, a string "instruction"'
            )
        texts.append(CalibrationText(text=text, instruction=instruction))
    if not texts:
        raise ConfigError(
            f"--calibration {path} is empty; provide a few hundred texts of the kind that will be embedded"
        )
    random.Random(0).shuffle(texts)  # of a long file the first texts are taken: they must not be all of its head
    return texts


def tokenize(texts: Sequence[CalibrationText], text: TextEncoder, *, tokens: int) -> list[TokenRow]:
    """Tokenizes texts in order, until there are enough tokens or no more texts.

    Raises:
        ConfigError: Every text is truncated within its instruction.
    """
    rows: list[TokenRow] = []
    total = 0
    max_length = min(MAX_TEXT_TOKENS, text.contract.max_tokens)
    for index, calibration_text in enumerate(texts):
        instruction = calibration_text.instruction
        prompt = text.query_prompt(instruction) if instruction else text.prompt(None, None)
        checked = check_texts([calibration_text.text], first_index=index)
        row = text.tokenize(checked, prompt=prompt, max_length=max_length)[0]
        if len(row) > row.prompt_tokens:
            rows.append(row)
            total += len(row)
        if total >= tokens:
            break
    if not rows:
        raise ConfigError(
            f"no calibration text has a token after its instruction within {max_length} tokens; shorten the "
            "instructions"
        )
    return rows


def texts_sha256(rows: Sequence[TokenRow]) -> str:
    """Returns the hash of the model's inputs: token ids and lengths of prompts."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.ids, row.prompt_tokens]).encode())
    return digest.hexdigest()


def padded_batches(text: TextEncoder, rows: Sequence[TokenRow]) -> tuple[list[int], list[TokenBatch]]:
    """Pads rows to batches of similar length.

    Returns:
        The indices of the rows in the order of the batches, and the batches.
    """
    batch_indices = list(plan_batches([len(row) for row in rows], max_rows=64, max_tokens=BATCH_TOKENS))
    batches = [text.pad([rows[index] for index in indices]) for indices in batch_indices]
    return [index for indices in batch_indices for index in indices], batches


class InputCollector:
    """Collects ranges and some rows of the inputs of groups of layers, while a model runs over batches.

    Args:
        layerwise: The FP32 model.
        text: The model's text encoder.
        rows: The tokenized calibration texts.
    """

    def __init__(self, layerwise: LayerwiseModel, text: TextEncoder, rows: Sequence[TokenRow]) -> None:
        self.layerwise = layerwise
        _, self.batches = padded_batches(text, rows)
        total = sum(map(len, rows))
        is_sampled = torch.zeros(total, dtype=torch.bool)
        generator = np.random.default_rng(SEED)
        is_sampled[torch.from_numpy(generator.choice(total, size=min(SAMPLED_ROWS, total), replace=False))] = True
        tokens_per_batch = [int(batch.attention_mask.sum()) for batch in self.batches]
        self._is_sampled = torch.split(is_sampled, tokens_per_batch)

    @contextmanager
    def collecting(self, groups: Sequence[LinearGroup]) -> Iterator[dict[str, GroupInputs]]:
        """Collects inputs until the context ends, and then adds them to the yielded dictionary, by group name."""
        collectors = {group.name: _GroupCollector() for group in groups}

        def collect_into(collector: _GroupCollector) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                index = self.layerwise.batch_index
                rows = _unpadded(args[0], self.batches[index])
                collector.add(rows, self._is_sampled[index].to(rows.device))

            return hook

        collected: dict[str, GroupInputs] = {}
        with _pre_hooks(self.layerwise.model, groups, lambda name: collect_into(collectors[name])):
            yield collected
            collected |= {name: collector.finish() for name, collector in collectors.items()}

    @contextmanager
    def summing_products(self, groups: Sequence[LinearGroup]) -> Iterator[dict[str, Tensor]]:
        """Yields x^T x of each group's inputs x, float32 [K, K], by the group's name; to be read in the end."""
        products: dict[str, Tensor] = {}

        def collect_into(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                rows = _unpadded(args[0], self.batches[self.layerwise.batch_index])
                products.setdefault(name, rows.new_zeros(rows.shape[1], rows.shape[1])).addmm_(rows.T, rows)

            return hook

        with _pre_hooks(self.layerwise.model, groups, collect_into):
            yield products


def _unpadded(x: Tensor, batch: TokenBatch) -> Tensor:
    """Returns the rows [n, K] of a layer's input [B, T, K] that are tokens of a text."""
    return x[torch.from_numpy(batch.attention_mask).bool().to(x.device)]


@contextmanager
def _pre_hooks(
    model: NVEmbed,
    groups: Sequence[LinearGroup],
    make_hook: Callable[[str], Callable[[nn.Module, tuple[Tensor, ...]], None]],
) -> Iterator[None]:
    """Calls the hook that `make_hook` returns for a group's name with each input of the group, in the context."""
    with ExitStack() as stack:
        for group in groups:
            layer = model.get_submodule(group.linears[0])
            stack.callback(layer.register_forward_pre_hook(make_hook(group.name)).remove)
        yield


class _GroupCollector:
    def __init__(self) -> None:
        self.channel_max: Tensor | None = None
        self.sampled_rows: list[Tensor] = []
        self.extreme_rows: Tensor | None = None

    def add(self, rows: Tensor, is_sampled: Tensor) -> None:
        channel_max = rows.abs().amax(dim=0)
        self.channel_max = channel_max if self.channel_max is None else torch.maximum(self.channel_max, channel_max)
        self.sampled_rows.append(rows[is_sampled])
        candidates = rows if self.extreme_rows is None else torch.cat((self.extreme_rows, rows))
        most_extreme = candidates.abs().amax(dim=1).topk(min(EXTREME_ROWS, len(candidates))).indices
        self.extreme_rows = candidates[most_extreme]

    def finish(self) -> GroupInputs:
        assert self.channel_max is not None
        assert self.extreme_rows is not None
        return GroupInputs(
            channel_max=self.channel_max, sampled_rows=torch.cat((*self.sampled_rows, self.extreme_rows))
        )


def pack(array: Tensor) -> str:
    """Encodes float32 [K] as text: base64 of its little-endian bytes."""
    return base64.b64encode(array.cpu().numpy().astype("<f4").tobytes()).decode()


def unpack(text: str) -> Tensor:
    """Decodes the text that `pack` returned."""
    return torch.from_numpy(decode_ranges(text))
