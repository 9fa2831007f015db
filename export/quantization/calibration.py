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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nvembed_deploy.batching import plan_batches
from nvembed_deploy.errors import ConfigError
from nvembed_deploy.export.layerwise import LayerwiseModel
from nvembed_deploy.export.quantization.linear_groups import LinearGroup
from nvembed_deploy.export.quantization.record import decode_ranges
from nvembed_deploy.files.json_lines import read_rows
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
SHORT_TEXTS = 12
"""Short texts per text of each other kind; they have few tokens."""
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
OTHER_LANGUAGES = (
    "Der Zug nach München fährt heute von Gleis 7 ab und hat etwa zehn Minuten Verspätung.",
    "Pourquoi le pain rassis devient-il dur alors que les biscuits deviennent mous ?",
    "El contrato se renueva automáticamente salvo que una de las partes avise con treinta días de antelación.",
    "La temperatura dell'acqua deve restare sotto gli ottanta gradi, altrimenti il tè verde diventa amaro.",
    "Para instalar o programa, descarregue o ficheiro e siga as instruções do assistente.",
    "De gemeente plant volgend voorjaar tweehonderd bomen langs de nieuwe fietsroute.",
    "Rozkład jazdy autobusów zmienia się od pierwszego września; proszę sprawdzić godziny odjazdów.",
    "После дождя дорога стала скользкой, поэтому водителям советуют снизить скорость.",
    "Чому вода в морі солона, а в річці ні?",
    "Η βιβλιοθήκη είναι ανοιχτή κάθε μέρα εκτός Κυριακής από τις εννέα το πρωί.",
    "Toplantı saat üçte başlıyor; sunum dosyasını önceden paylaşır mısınız?",
    "يجب حفظ الدواء في مكان بارد وجاف بعيدا عن متناول الأطفال.",
    "המתכון דורש שתי כוסות קמח, ביצה אחת וחצי כפית מלח.",
    "कृपया आवेदन पत्र के साथ पहचान पत्र की प्रति संलग्न करें।",
    "この製品を使用する前に、取扱説明書をよくお読みください。",
    "这本书介绍了如何在没有图形处理器的机器上部署语言模型。",
    "겨울철에는 수도관이 얼지 않도록 미리 보온 조치를 해야 합니다.",
    "กรุณาตรวจสอบที่อยู่จัดส่งก่อนยืนยันคำสั่งซื้อ",
    "Hợp đồng bảo hiểm có hiệu lực kể từ ngày ký và được gia hạn hàng năm.",
    "Silakan hubungi layanan pelanggan jika paket belum tiba dalam lima hari kerja.",
)


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
    """Returns queries with instructions, passages, code, other languages and very short texts, interleaved.

    They are taken from the documentation and the source code that come with Python, and from `OTHER_LANGUAGES`.
    """
    summaries, bodies = zip(*in_mixed_order(docstring_pairs(under=PACKAGES)), strict=True)
    queries = (CalibrationText(text=text, instruction=DEFAULT_QUERY_INSTRUCTION) for text in summaries)
    topics = (CalibrationText(text=body) for _, body in in_mixed_order(topic_pairs()))
    passages = (CalibrationText(text=text) for text in bodies)
    code = (CalibrationText(text=text) for text in _functions())
    foreign = (
        CalibrationText(text=text, instruction=DEFAULT_QUERY_INSTRUCTION if index % 3 == 1 else "")
        for index, text in enumerate(OTHER_LANGUAGES)
    )
    short = (CalibrationText(text=text) for text in _short_texts(summaries))
    short_rounds = itertools.zip_longest(*[short] * SHORT_TEXTS)
    long_rounds = itertools.zip_longest(queries, topics, passages, code, foreign)
    rounds = zip(long_rounds, itertools.chain(short_rounds, itertools.repeat(())), strict=False)
    return [text for long_texts, short_texts in rounds for text in (*long_texts, *short_texts) if text is not None]


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
                attention_mask = torch.from_numpy(self.batches[index].attention_mask).bool()
                collector.add(args[0][attention_mask], self._is_sampled[index])

            return hook

        model = self.layerwise.model
        handles = [
            model.get_submodule(group.linears[0]).register_forward_pre_hook(collect_into(collectors[group.name]))
            for group in groups
        ]
        collected: dict[str, GroupInputs] = {}
        try:
            yield collected
            collected |= {name: collector.finish() for name, collector in collectors.items()}
        finally:
            for handle in handles:
                handle.remove()


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
    return base64.b64encode(array.numpy().astype("<f4").tobytes()).decode()


def unpack(text: str) -> Tensor:
    """Decodes the text that `pack` returned."""
    return torch.from_numpy(decode_ranges(text))
