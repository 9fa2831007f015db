"""What quantization looks at: real texts, the ranges that they bring, and a record of both that can be used again.

Tokens count, not texts: a thousand short titles see less of a model than twenty pages.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import itertools
import json
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
from nvembed_deploy.export.layerwise import Parts
from nvembed_deploy.export.quantization.linear_groups import LinearGroup
from nvembed_deploy.files.json_lines import read_rows
from nvembed_deploy.parity.probes import INSTRUCTION, PROBES
from nvembed_deploy.sample_texts import docstring_pairs, in_mixed_order, library_files, topic_pairs
from nvembed_deploy.tokenization import TextEncoder, TokenBatch, TokenRow, check_texts

LONGEST_TOKENS = 256
BATCH_TOKENS = 2048
SAMPLED_ROWS = 384
"""Inputs of each group that are kept for the search of scales, chosen at random..."""
EXTREME_ROWS = 32
"""... beside those with the largest values, which random choice would miss."""
SEED = 0
SHORT_TEXTS = 12
"""Beside one text of each other kind: they have few tokens."""
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
"""Of Python's library: enough text, and read in a second."""
REPEATS = (4, 8, 16, 32)
"""How often a word stands in a text that is nothing else."""
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
    """A text, and the task in words where it is a query."""

    text: str
    instruction: str = ""


@dataclass(frozen=True)
class Inputs:
    """What calibration saw of the tensor that a group reads."""

    largest: Tensor
    """float32 [K], largest absolute value of each channel, over every token."""
    rows: Tensor
    """float32 [n, K], some of its rows."""


def built_in_texts() -> list[CalibrationText]:
    """Instructed queries, passages, code, other languages and texts of a word or two, in turn.

    They are the documentation and the source that every Python carries, and sentences of this module.
    """
    summaries, bodies = zip(*in_mixed_order(docstring_pairs(under=PACKAGES)), strict=True)
    queries = (CalibrationText(text=text, instruction=INSTRUCTION) for text in summaries)
    topics = (CalibrationText(text=body) for _, body in in_mixed_order(topic_pairs()))
    passages = (CalibrationText(text=text) for text in bodies)
    code = (CalibrationText(text=text) for text in _functions())
    other = (
        CalibrationText(text=text, instruction=INSTRUCTION if index % 3 == 1 else "")
        for index, text in enumerate(OTHER_LANGUAGES)
    )
    short = (CalibrationText(text=text) for text in _short_texts(summaries))
    few = itertools.zip_longest(*[short] * SHORT_TEXTS)
    kinds = itertools.zip_longest(queries, topics, passages, code, other)
    rounds = zip(kinds, itertools.chain(few, itertools.repeat(())), strict=False)
    return [item for kind, brief in rounds for item in (*kind, *brief) if item is not None]


def _short_texts(sentences: Iterable[str]) -> Iterator[str]:
    """One character, one word, two words, and one word again and again.

    In such texts attention has little or nothing to take a mean of, so what comes out of it is several times larger.
    """
    words = dict.fromkeys(word for sentence in sentences for word in sentence.split())
    marks = itertools.cycle(string.punctuation + string.digits + string.ascii_letters)
    probes = {text for _, text in PROBES}  # the gate judges by what was not calibrated on
    for number, (first, second, third, fourth) in enumerate(zip(*[iter(words)] * 4, strict=False)):
        again = " ".join([fourth] * REPEATS[number % len(REPEATS)])
        yield from (text for text in (next(marks), first, f"{second} {third}", again) if text not in probes)


def _functions() -> list[str]:
    """Functions of Python's own library, of some lines each."""
    found = []
    for path in library_files(under=PACKAGES[:3]):
        source = path.read_text(encoding="utf-8")
        lines = source.encode().split(b"\n")  # ast counts bytes; its own get_source_segment splits the file each time
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and 4 <= (node.end_lineno or 0) - node.lineno <= 40:
                own = lines[node.lineno - 1 : node.end_lineno]
                own[-1] = own[-1][: node.end_col_offset]
                found.append(b"\n".join((own[0][node.col_offset :], *own[1:])).decode())
    return [text for text, _ in in_mixed_order((text, "") for text in found)]


def read_texts(path: Path) -> list[CalibrationText]:
    """Texts of a JSONL file with {"text": ...} and, for queries, {"instruction": ...}.

    Raises:
        ConfigError: The file cannot be read, or a line is something else; its number is in the message.
    """
    found = []
    for number, record in enumerate(read_rows(path), 1):
        text, instruction = record.get("text"), record.get("instruction", "")
        if not isinstance(text, str) or not text.strip() or not isinstance(instruction, str):
            raise ConfigError(
                f'--calibration {path}, text {number} is no text; each line is {{"text": "..."}}, queries with '
                '"instruction": "..." beside it'
            )
        found.append(CalibrationText(text=text, instruction=instruction))
    if not found:
        raise ConfigError(
            f"--calibration {path} is empty; give it a few hundred texts of the kind that will be embedded"
        )
    return found


def tokenize(texts: Sequence[CalibrationText], text: TextEncoder, *, tokens: int) -> list[TokenRow]:
    """Rows of the texts in order, until there are enough tokens or no more texts."""
    rows: list[TokenRow] = []
    total = 0
    longest = min(LONGEST_TOKENS, text.contract.max_tokens)
    for number, item in enumerate(texts):
        prompt = text.query_prompt(item.instruction) if item.instruction else text.prompt(None, None)
        row = text.tokenize(check_texts([item.text], first_index=number), prompt=prompt, max_length=longest)[0]
        if len(row) > row.prompt_tokens:
            rows.append(row)
            total += len(row)
        if total >= tokens:
            break
    if not rows:
        raise ConfigError(
            f"no calibration text has a token behind its instruction within {longest} tokens; shorten the instructions"
        )
    return rows


def texts_sha256(rows: Sequence[TokenRow]) -> str:
    """Hash of what the model was given: ids and prompts."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.ids, row.prompt_tokens]).encode())
    return digest.hexdigest()


def in_batches(text: TextEncoder, rows: Sequence[TokenRow]) -> tuple[list[int], list[TokenBatch]]:
    """Padded batches of like length, and the rows' numbers in their order."""
    order = list(plan_batches([len(row) for row in rows], max_rows=64, max_tokens=BATCH_TOKENS))
    return [index for batch in order for index in batch], [
        text.pad([rows[index] for index in batch]) for batch in order
    ]


class Collector:
    """Keeps the ranges and some rows of what groups of layers read, while a model runs over batches of rows.

    Args:
        parts: The FP32 model.
        rows: The calibration's texts.
        text: The model's text encoder.
    """

    def __init__(self, parts: Parts, text: TextEncoder, rows: Sequence[TokenRow]) -> None:
        self.parts = parts
        _, self.batches = in_batches(text, rows)
        total = sum(map(len, rows))
        chosen = torch.zeros(total, dtype=torch.bool)
        generator = np.random.default_rng(SEED)
        chosen[torch.from_numpy(generator.choice(total, size=min(SAMPLED_ROWS, total), replace=False))] = True
        counts = [int(batch.attention_mask.sum()) for batch in self.batches]
        self._chosen = torch.split(chosen, counts)

    @contextmanager
    def watching(self, groups: Sequence[LinearGroup]) -> Iterator[dict[str, Inputs]]:
        """What the groups read goes into the dictionary, by their names, when the context ends."""
        keepers = {group.name: _Keeper() for group in groups}

        def watch(keeper: _Keeper) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                number = self.parts.batch
                real = torch.from_numpy(self.batches[number].attention_mask).bool()
                keeper.see(args[0][real], self._chosen[number])

            return hook

        model = self.parts.model
        hooks = [
            model.get_submodule(group.linears[0]).register_forward_pre_hook(watch(keepers[group.name]))
            for group in groups
        ]
        seen: dict[str, Inputs] = {}
        try:
            yield seen
            seen |= {name: keeper.result() for name, keeper in keepers.items()}
        finally:
            for hook in hooks:
                hook.remove()


class _Keeper:
    def __init__(self) -> None:
        self.largest: Tensor | None = None
        self.sampled: list[Tensor] = []
        self.extreme: Tensor | None = None

    def see(self, rows: Tensor, chosen: Tensor) -> None:
        reach = rows.abs()
        largest = reach.amax(dim=0)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        self.sampled.append(rows[chosen])
        pool = rows if self.extreme is None else torch.cat((self.extreme, rows))
        self.extreme = pool[pool.abs().amax(dim=1).topk(min(EXTREME_ROWS, len(pool))).indices]

    def result(self) -> Inputs:
        assert self.largest is not None
        assert self.extreme is not None
        return Inputs(largest=self.largest, rows=torch.cat((*self.sampled, self.extreme)))


def pack(values: Tensor) -> str:
    """float32 [K] as text: base64 of its little-endian bytes."""
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def unpack(text: str) -> Tensor:
    """The opposite of `pack`."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32))
