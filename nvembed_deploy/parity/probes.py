"""The probes: texts and shapes that break embedding engines, and the reference model's vectors for them.

They cover instructions, padding, one token, the longest input, other scripts, and special-token strings.
`ReferenceOutputs` is stored in a bundle as `reference.npz`, so that a machine without the checkpoint, or without the
memory for it, can check the engine that it has built.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.bundle.parity_report import TOP_K
from nvembed_deploy.errors import BundleError, ConfigError, ParityError
from nvembed_deploy.parity.everyday_probes import EVERYDAY_PROBES
from nvembed_deploy.sample_texts import docstring_pairs, in_mixed_order
from nvembed_deploy.spec import Shape
from nvembed_deploy.tokenization import DEFAULT_QUERY_INSTRUCTION, TextEncoder, TokenRow

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
MAX_PROBE_TOKENS = 4096
"""Maximum length of a probe, since the cost of attention is quadratic. A report gives the length of its longest."""
MIN_PROBES = 10
"""Fewer different texts are no comparison: a plan of 12 tokens would pass on two of them."""
QUERIES, PASSAGES = 40, 200
MIN_DISTINCT_PASSAGES = 180
"""Truncated to a few tokens, passages become alike, and rounding decides which of them is the best."""
RETRIEVAL_TOKENS = 96
"""Passages are truncated to this length: enough to rank them, and affordable for a large model on a CPU."""
RETRIEVAL_PACKAGES = ("asyncio", "email", "multiprocessing", "pathlib", "shutil", "socket", "unittest", "urllib", "xml")
"""Packages of Python's standard library whose docstrings are the retrieval texts; calibration uses other packages."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The ten best passages of each query, ranked by the reference."""

    rows: list[TokenRow]
    """The first `QUERIES` rows are queries, the others passages."""
    top_passages: NDArray[np.int32]
    """Indices of passages, int32 [Q, `TOP_K`], the best first."""


@dataclass(frozen=True, kw_only=True)
class ReferenceOutputs:
    """The tokenized probes and the reference's vectors for them."""

    reference: str
    """Name of the backend that computed the vectors."""
    names: tuple[str, ...]
    """Description of each probe, for reports."""
    rows: list[TokenRow]
    """The probes; the two longest come first."""
    vectors: NDArray[np.float32]
    """float32 [P, D], each text embedded in a batch of its own."""
    ranking: Ranking | None
    """None for precisions whose rounding is too fine to change it."""

    def up_to(self, tokens: int) -> ReferenceOutputs:
        """Returns the outputs without probes of more than `tokens` tokens, and without a ranking that has such rows.

        Raises:
            ParityError: Fewer than `MIN_PROBES` probes remain.
        """
        fitting = [index for index, row in enumerate(self.rows) if len(row) <= tokens]
        if len(fitting) < MIN_PROBES:
            raise ParityError(
                f"only {len(fitting)} of the {len(self.rows)} reference texts have at most {tokens} tokens, the "
                f"longest input of this engine, and a comparison needs {MIN_PROBES}; build it for longer texts with "
                f"--max, or export the bundle again with --max BATCHx{tokens}"
            )
        ranking = self.ranking
        if ranking is not None and max(map(len, ranking.rows)) > tokens:
            ranking = None
        return replace(self.selected(fitting), ranking=ranking)

    def selected(self, indices: Sequence[int]) -> ReferenceOutputs:
        """Returns the outputs of some of the probes, without the ranking."""
        return replace(
            self,
            names=tuple(self.names[index] for index in indices),
            rows=[self.rows[index] for index in indices],
            vectors=self.vectors[list(indices)],
            ranking=None,
        )

    def to_bytes(self) -> bytes:
        """Serializes the outputs to the content of `reference.npz`, in NumPy's format and without pickled objects."""
        metadata = json.dumps({"reference": self.reference, "names": self.names}).encode()
        arrays = {
            "metadata": np.frombuffer(metadata, dtype=np.uint8),
            "vectors": self.vectors,
            **_pack_rows("probe", self.rows),
        }
        if self.ranking is not None:
            arrays |= {"top_passages": self.ranking.top_passages, **_pack_rows("ranked", self.ranking.rows)}
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> ReferenceOutputs:
        """Parses content written by `to_bytes`; nothing is unpickled.

        Raises:
            BundleError: The content is damaged.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                metadata = json.loads(arrays["metadata"].tobytes())
                ranking = None
                if "top_passages" in arrays:
                    top_passages = arrays["top_passages"].astype(np.int32)
                    ranking = Ranking(rows=_unpack_rows("ranked", arrays), top_passages=top_passages)
                outputs = cls(
                    reference=str(metadata["reference"]),
                    names=tuple(map(str, metadata["names"])),
                    rows=_unpack_rows("probe", arrays),
                    vectors=arrays["vectors"].astype(np.float32),
                    ranking=ranking,
                )
            same_length = len(outputs.names) == len(outputs.rows) == len(outputs.vectors) > 0
            has_ranking_shape = ranking is None or ranking.top_passages.shape == (QUERIES, TOP_K)
            if not (same_length and outputs.vectors.ndim == 2 and has_ranking_shape):
                raise ValueError("its arrays have different lengths")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as err:
            raise BundleError(f"reference.npz is damaged ({err}); export the bundle again, or copy it again") from err
        return outputs


def _pack_rows(name: str, rows: list[TokenRow]) -> dict[str, NDArray[np.int32]]:
    """Stores rows as two arrays: all ids in a row, and the length and prompt length of each row."""
    return {
        f"{name}_ids": np.concatenate([np.asarray(row.ids, dtype=np.int32) for row in rows]),
        f"{name}_lengths": np.array([[len(row), row.prompt_tokens] for row in rows], dtype=np.int32),
    }


def _unpack_rows(name: str, arrays: np.lib.npyio.NpzFile) -> list[TokenRow]:
    ids, lengths = arrays[f"{name}_ids"], arrays[f"{name}_lengths"]
    if lengths[:, 0].min() < 1 or lengths[:, 0].sum() != len(ids):
        raise ValueError("its lengths do not match its tokens")
    ids_per_row = np.split(ids, np.cumsum(lengths[:-1, 0]))
    return [
        TokenRow(ids=row_ids.tolist(), prompt_tokens=int(prompt_tokens), truncated=False)
        for row_ids, (_, prompt_tokens) in zip(ids_per_row, lengths, strict=True)
    ]


def probe_rows(text: TextEncoder, max_tokens: int, *, everyday: bool = False) -> tuple[list[str], list[TokenRow]]:
    """Tokenizes the probes; the two longest inputs come first.

    Args:
        text: The model's text encoder.
        max_tokens: Length of the longest probe, to which the others are truncated.
        everyday: Whether to add `EVERYDAY_PROBES`, for quantized precisions.

    Returns:
        A description of each row, and the rows. Probes that are equal after truncation occur once.

    Raises:
        ConfigError: Fewer than `MIN_PROBES` probes remain.
    """
    query_prompt, default_prompt = text.query_prompt(DEFAULT_QUERY_INSTRUCTION), text.prompt(None, None)
    long_text = LONG_TEXT * (1 + max_tokens // 40)
    probes: dict[tuple[int, ...], tuple[str, TokenRow]] = {}
    all_probes = (*PROBES, *EVERYDAY_PROBES) if everyday else PROBES
    for instructed, body in ((False, long_text), (True, long_text), *all_probes):
        prompt = query_prompt if instructed else default_prompt
        row = text.tokenize([body], prompt=prompt, max_length=max_tokens)[0]
        if len(row) > row.prompt_tokens:  # a very small --max leaves no room after the instruction
            name = f"{'instructed ' if instructed else ''}{body[:40]!r} ({len(row)} tokens)"
            probes.setdefault((row.prompt_tokens, *row.ids), (name, row))
    if len(probes) < MIN_PROBES:
        raise ConfigError(
            f"--max BATCHx{max_tokens} truncates the {len(all_probes) + 2} texts that engines are compared on to "
            f"{len(probes)} different ones, and a comparison needs {MIN_PROBES}; pass more tokens with --max, or "
            "--no-parity"
        )
    names, rows = zip(*probes.values(), strict=True)
    return list(names), list(rows)


def longest_probe(text: TextEncoder, max_shape: Shape) -> int:
    """Returns the length in tokens of the longest probe for an engine that takes batches up to `max_shape`."""
    return min(max_shape.tokens, text.contract.max_tokens, MAX_PROBE_TOKENS)


def retrieval_rows(text: TextEncoder, max_shape: Shape) -> list[TokenRow]:
    """Tokenizes the retrieval texts: first docstring summaries as queries, then docstring bodies as passages."""
    summaries, bodies = zip(*in_mixed_order(docstring_pairs(under=RETRIEVAL_PACKAGES))[:PASSAGES], strict=True)
    max_tokens = min(RETRIEVAL_TOKENS, longest_probe(text, max_shape))
    query_prompt = default_prompt = ""
    if max_tokens == RETRIEVAL_TOKENS:  # in shorter rows a prompt could leave no token to pool
        query_prompt, default_prompt = text.query_prompt(DEFAULT_QUERY_INSTRUCTION), text.prompt(None, None)
    rows = text.tokenize(summaries[:QUERIES], prompt=query_prompt, max_length=max_tokens)
    return rows + text.tokenize(bodies, prompt=default_prompt, max_length=max_tokens)


def can_rank(rows: list[TokenRow]) -> bool:
    """Returns True if the passages among rows from `retrieval_rows` differ enough to be ranked."""
    return len({tuple(row.ids) for row in rows[QUERIES:]}) >= MIN_DISTINCT_PASSAGES
