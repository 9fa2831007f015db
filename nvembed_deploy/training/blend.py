"""Selects examples: how many of each set, what is held out, and which texts share an answer.

A blend file is a JSON object with one entry for each set that is trained on; sets that it does not name are left out:
    {"hotpotqa": {"max_examples": 80000, "instruction": "Given a multi-hop question, ..."},
     "msmarco": {"kind": "retrieval"},
     "scifact": {}}
`max_examples` is the number of examples drawn at random, by default all; `instruction` and `kind` replace those of the
examples. Everything is determined by the seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from nvembed_deploy.errors import ConfigError, failure_reason
from nvembed_deploy.training.examples import Example
from nvembed_deploy.training.instructions import Kind


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a blend takes from one set; the module's docstring describes the fields."""

    max_examples: int | None = None
    instruction: str = ""
    kind: Kind | None = None


def read_blend(path: Path) -> dict[str, Source]:
    """Reads a blend file.

    Raises:
        ConfigError: The file cannot be read, or an entry is not valid; the message names file, set and field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(
            f"--blend {path} cannot be read as JSON ({failure_reason(err)}); docs/training.md shows a blend"
        ) from err
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"--blend {path} names no set; docs/training.md shows a blend")
    return {name: _source(entry, f"--blend {path}, set {name!r}") for name, entry in content.items()}


def _source(entry: Any, location: str) -> Source:
    fields = Source.__dataclass_fields__.keys()
    if not isinstance(entry, dict) or entry.keys() - fields:
        raise ConfigError(f"{location}: an entry is an object with the fields {', '.join(fields)}")
    max_examples, instruction = entry.get("max_examples"), entry.get("instruction", "")
    if max_examples is not None and (type(max_examples) is not int or max_examples < 1):
        raise ConfigError(f"{location}: max_examples must be a whole number from 1, got {max_examples!r}")
    if not isinstance(instruction, str):
        raise ConfigError(f"{location}: instruction must be a string, got {instruction!r}")
    try:
        kind = Kind(entry["kind"]) if "kind" in entry else None
    except ValueError as err:
        kinds = ", ".join(kind.value for kind in Kind)
        raise ConfigError(f"{location}: kind is {entry['kind']!r}; use {kinds}") from err
    return Source(max_examples=max_examples, instruction=instruction, kind=kind)


def apply_blend(examples: Iterable[Example], blend: Mapping[str, Source], *, seed: int) -> list[Example]:
    """Returns the examples of the sets that a blend names, up to its number of each, in random order.

    Raises:
        ConfigError: A set cannot be of the kind that the blend gives it.
    """
    selected = select(examples, mix={name: source.max_examples for name, source in blend.items()}, seed=seed)
    return [_blended(example, blend[example.source]) for example in selected]


def _blended(example: Example, source: Source) -> Example:
    kind = source.kind or example.kind
    if source.kind and not example.positive and kind in (Kind.RETRIEVAL, Kind.SIMILARITY):
        raise ConfigError(
            f"--blend, set {example.source!r}: kind {kind.value} needs pairs, but its examples have no positive, such "
            f"as {example.query[:60]!r}"
        )
    return replace(example, instruction=source.instruction or example.instruction, kind=kind)


def select(examples: Iterable[Example], *, mix: Mapping[str, int | None], seed: int) -> list[Example]:
    """Draws up to `mix[source]` examples (None: all) at random from each source that the mix names, and shuffles them.

    Equal examples count once.
    """
    by_source: dict[str, dict[Example, None]] = {}
    for example in examples:
        if example.source in mix:
            by_source.setdefault(example.source, {})[example] = None
    rng = random.Random(seed)
    chosen: list[Example] = []
    for source in sorted(by_source):
        candidates = list(by_source[source])
        rng.shuffle(candidates)
        chosen += candidates[: mix[source]]
    rng.shuffle(chosen)
    return chosen


def answer_clusters(pairs: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Numbers the texts that share an answer: those connected by pairs of a query and its answer, over any distance.

    Args:
        pairs: Query and answer, both counted as texts; a query without an answer is paired with itself.

    Returns:
        The number of each text's cluster.
    """
    table: dict[str, int] = {}
    rows, columns = [], []
    for query, answer in pairs:
        rows.append(table.setdefault(query, len(table)))
        columns.append(table.setdefault(answer, len(table)))
    if not table:
        return {}
    graph = coo_array(([True] * len(rows), (rows, columns)), shape=(len(table), len(table)))
    _, clusters = connected_components(graph, directed=False)
    return dict(zip(table, clusters.tolist(), strict=True))


def hold_out(examples: Sequence[Example], count: int, *, seed: int) -> tuple[list[Example], list[Example]]:
    """Draws examples at random over all sets for evaluation during training.

    Examples that share an answer are held out together or not at all, so that no query and no positive that is held out
    is trained on, as a negative neither. Held-out negatives may be trained on: they are documents of the corpus.

    Args:
        examples: In any order.
        count: Maximum number of held-out examples; fewer where the remaining clusters are larger.
        seed: Seed of the draw.

    Returns:
        The held-out examples and those to train on, in their order.
    """
    if count <= 0:
        return [], list(examples)
    clusters = answer_clusters((example.query, example.positive or example.query) for example in examples)
    by_cluster: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        by_cluster.setdefault(clusters[example.query], []).append(index)
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    seen: set[int] = set()
    for index in order:
        cluster = clusters[examples[index].query]
        if cluster not in seen and len(chosen) + len(by_cluster[cluster]) <= count:
            chosen.update(by_cluster[cluster])
        seen.add(cluster)
    held_out = [examples[index] for index in sorted(chosen)]
    secret = {text for example in held_out for text in (example.query, example.positive) if text}
    return held_out, [_without(example, secret) for index, example in enumerate(examples) if index not in chosen]


def _without(example: Example, texts: set[str]) -> Example:
    if texts.isdisjoint(example.negatives):
        return example
    return replace(example, negatives=tuple(text for text in example.negatives if text not in texts))
