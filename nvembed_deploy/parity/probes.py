"""The probes: texts and shapes that break embedding engines, and what the reference makes of them.

Instructed, padded, one token, the longest input, other scripts, special-token strings. `Truth` travels in a bundle as
`truth.npz`, so that a machine without the checkpoint, or without room for it, can judge the engine it has built.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.bundle.parity_report import DEPTH
from nvembed_deploy.errors import BundleError
from nvembed_deploy.sample_texts import docstring_pairs, in_mixed_order
from nvembed_deploy.spec import Shape
from nvembed_deploy.tokenization import TextEncoder, TokenRow

INSTRUCTION = "Given a question, retrieve passages that answer the question"
PROBES: tuple[tuple[bool, str], ...] = (
    (True, "are judo throws allowed in wrestling?"),
    (True, "how do I undo the last commit without losing my changes?"),
    (True, "3 ways to sharpen a plane iron"),
    (True, "昨夜の雨で川の水位はどのくらい上がりましたか?"),
    (True, "yes"),
    (True, 'What does "idempotent" mean, and why do HTTP PUT requests have to be idempotent?'),
    (True, "</s> is the end-of-sequence token; what is <s>, and what is <unk>?"),
    (True, "🚲 repair shop near me, open on Sunday"),
    (False, "a"),
    (False, "."),
    (False, "The committee postponed the vote until the audit was finished."),
    (False, "Salt lowers the freezing point of water, which is why it is spread on icy roads in winter."),
    (False, "Übermäßige Feuchtigkeit führte zu Schäden an den Dielen; die Versicherung zahlte nicht."),
    (False, "Le chercheur a corrigé l'équation après avoir relu ses notes — trois fois."),
    (False, "बारिश के बाद सड़क पर कीचड़ फैल गया।"),
    (False, "مرحبا بالعالم, שלום עולם: two scripts that run from right to left."),
    (False, "family 👨‍👩‍👧‍👦 flag 🏳️‍🌈 tone 👍🏽 keycap 1️⃣"),
    (False, "def fib(n: int) -> int:\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n"),
    (False, "| part | qty | price |\n|---|---:|---:|\n| bolt M6 | 40 | 0.12 |"),
    (False, "0.000123, -17.5e+08, 2026-11-23T08:00:00Z, 192.168.0.1, 1,234,567.89"),
    (False, "...!!!???;;;\n\n\n\t\t\t,,,"),
    (False, "text with </s> and <s> and <unk> inside, which stays text"),
    (False, "a\x00b\x07c e\u0301 vs \u00e9"),
    (False, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
)
LONG_TEXT = (
    "In wrestling, a slam is lifting and returning an opponent to the mat with unnecessary force. The valve was "
    "replaced before the pressure test began; the reading, 4.2 bar, stayed within the limits. Migrating geese follow "
    "the coastline for nearly nine hundred miles, resting on estuaries. def parse(line): return line.split(',') "
)
"""Repeated until it fills the longest input."""
LONGEST_TOKENS = 4096
"""Most tokens of a probe: attention's cost grows with the square. A report says how long its longest was."""
QUERIES, PASSAGES = 40, 200
RETRIEVAL_TOKENS = 96
"""Passages are cut to this: enough to rank them, and little enough for a large model on a CPU."""
RETRIEVAL_PACKAGES = ("asyncio", "email", "multiprocessing", "pathlib", "shutil", "socket", "unittest", "urllib", "xml")
"""Of Python's own library, whose documentation is the retrieval gate's text; calibration reads others."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Ten best passages of each query, by the reference."""

    rows: list[TokenRow]
    """`QUERIES` queries, then the passages."""
    best: NDArray[np.int32]
    """int32 [Q, `DEPTH`], indices of passages."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The probes as tokens, and the reference's vectors of them."""

    reference: str
    """What made the vectors."""
    names: tuple[str, ...]
    rows: list[TokenRow]
    """The longest first."""
    vectors: NDArray[np.float32]
    """float32 [P, D], each text alone in its batch."""
    ranking: Ranking | None
    """None where rounding is too fine to move it."""

    def up_to(self, tokens: int) -> Truth:
        """The same without probes longer than an engine's longest input; the ranking goes if one of its rows does."""
        fit = [index for index, row in enumerate(self.rows) if len(row) <= tokens]
        ranking = self.ranking
        if ranking is not None and max(map(len, ranking.rows)) > tokens:
            ranking = None
        return Truth(
            reference=self.reference,
            names=tuple(self.names[index] for index in fit),
            rows=[self.rows[index] for index in fit],
            vectors=self.vectors[fit],
            ranking=ranking,
        )

    def to_bytes(self) -> bytes:
        """The content of `truth.npz`: NumPy's format, arrays of numbers only."""
        words = json.dumps({"reference": self.reference, "names": self.names}).encode()
        arrays = {"words": np.frombuffer(words, dtype=np.uint8), "vectors": self.vectors, **_packed("probe", self.rows)}
        if self.ranking is not None:
            arrays |= {"best": self.ranking.best, **_packed("ranked", self.ranking.rows)}
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Truth:
        """Reads what `to_bytes` wrote; nothing is unpickled.

        Raises:
            BundleError: It is damaged.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                words = json.loads(arrays["words"].tobytes())
                ranking = None
                if "best" in arrays:
                    ranking = Ranking(rows=_unpacked("ranked", arrays), best=arrays["best"].astype(np.int32))
                truth = cls(
                    reference=str(words["reference"]),
                    names=tuple(map(str, words["names"])),
                    rows=_unpacked("probe", arrays),
                    vectors=arrays["vectors"].astype(np.float32),
                    ranking=ranking,
                )
            fits = len(truth.names) == len(truth.rows) == len(truth.vectors) > 0 and truth.vectors.ndim == 2
            if not fits or (ranking is not None and ranking.best.shape != (QUERIES, DEPTH)):
                raise ValueError("its parts are of different lengths")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as err:
            raise BundleError(f"truth.npz is damaged ({err}); make the bundle again, or copy it again") from err
        return truth


def _packed(name: str, rows: list[TokenRow]) -> dict[str, NDArray[np.int32]]:
    return {
        f"{name}_ids": np.concatenate([np.asarray(row.ids, dtype=np.int32) for row in rows]),
        f"{name}_lengths": np.array([[len(row), row.prompt_tokens] for row in rows], dtype=np.int32),
    }


def _unpacked(name: str, arrays: np.lib.npyio.NpzFile) -> list[TokenRow]:
    ids, lengths = arrays[f"{name}_ids"], arrays[f"{name}_lengths"]
    if lengths[:, 0].min() < 1 or lengths[:, 0].sum() != len(ids):
        raise ValueError("its lengths do not fit its tokens")
    parts = np.split(ids, np.cumsum(lengths[:-1, 0]))
    return [
        TokenRow(ids=part.tolist(), prompt_tokens=int(prompt), truncated=False)
        for part, (_, prompt) in zip(parts, lengths, strict=True)
    ]


def probe_rows(text: TextEncoder, longest: int) -> tuple[list[str], list[TokenRow]]:
    """The probes as tokens, the longest inputs first.

    Args:
        text: The model's text encoder.
        longest: Tokens of the longest probe; the others are cut to it.

    Returns:
        A name for each row, and the rows.
    """
    prompt, bare = text.query_prompt(INSTRUCTION), text.prompt(None, None)
    long_text = LONG_TEXT * (1 + longest // 40)
    names, rows = [], []
    for instructed, body in ((False, long_text), (True, long_text), *PROBES):
        row = text.tokenize([body], prompt=prompt if instructed else bare, max_length=longest)[0]
        if len(row) > row.prompt_tokens:  # a tiny --max leaves no room behind the instruction
            rows.append(row)
            names.append(f"{'instructed ' if instructed else ''}{body[:40]!r} ({len(row)} tokens)")
    return names, rows


def longest_probe(text: TextEncoder, largest: Shape) -> int:
    """Tokens of the longest probe for an engine that takes batches up to `largest`."""
    return min(largest.tokens, text.contract.max_tokens, LONGEST_TOKENS)


def retrieval_rows(text: TextEncoder, largest: Shape) -> list[TokenRow]:
    """Queries and then passages: summaries of Python's own documentation, and what stands below them."""
    summaries, bodies = zip(*in_mixed_order(docstring_pairs(under=RETRIEVAL_PACKAGES))[:PASSAGES], strict=True)
    longest = min(RETRIEVAL_TOKENS, longest_probe(text, largest))
    whole = longest == RETRIEVAL_TOKENS  # else a prompt may leave nothing to pool
    prompt, bare = (text.query_prompt(INSTRUCTION), text.prompt(None, None)) if whole else ("", "")
    rows = text.tokenize(summaries[:QUERIES], prompt=prompt, max_length=longest)
    return rows + text.tokenize(bodies, prompt=bare, max_length=longest)
