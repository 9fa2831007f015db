"""Reads the rotary position embedding of a `config.json`: base, and the scaling of its frequencies.

Checkpoints state it in `rope_theta` with `rope_scaling`, or in `rope_parameters` as transformers 5 writes it. Where
both are present and differ, transformers and other readers disagree, so such a file is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nvembed_deploy.errors import CheckpointError
from nvembed_deploy.model.config import RopeKind, RopeScaling
from nvembed_deploy.model.fields import Fields

IGNORED = frozenset({"max_position_embeddings"})
"""Fields that transformers stores with the scaling and does not use."""
FIELDS = {
    RopeKind.LINEAR: {"factor"},
    RopeKind.LLAMA3: {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    RopeKind.YARN: {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate", "llama_4_scaling_beta",
    },
}  # fmt: skip


def read_rope(text: Fields, default: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Returns the base of the wavelengths, and the scaling or None.

    Args:
        text: The fields of the decoder.
        default: `rope_parameters` of a file without any.

    Raises:
        CheckpointError: It is stated twice with different values, the scaling is not supported, or a value is
            impossible.
    """
    rope = _section(text)
    theta = text.values.get("rope_theta")
    if rope is None and (theta is None or "rope_type" in default):
        rope = dict(default)
        text.note("rope", "the class's default, as the file has none")
    if (not rope and theta is None) or (theta is None and "rope_theta" in text.values):
        raise CheckpointError(f"{text.path}: the RoPE is empty; state rope_theta")
    rope = rope or {}
    stated_thetas = {float(value) for value in (theta, rope.get("rope_theta")) if _is_number(value)}
    if len(stated_thetas) > 1:
        raise CheckpointError(
            f"{text.path}: rope_theta is {theta!r} at the top level and {rope['rope_theta']!r} in its section; readers "
            "take one or the other, so the vectors would be a guess. Remove the wrong one"
        )
    base = Fields({"rope_theta": rope.get("rope_theta") if theta is None else theta}, text.path).number(
        "rope_theta", default=10000.0
    )
    if base <= 1:
        raise CheckpointError(f"{text.path}: rope_theta is {base!r}; it must be greater than 1")
    for factor in (text.values.get("partial_rotary_factor"), rope.get("partial_rotary_factor")):
        if factor not in (None, 1):
            raise CheckpointError(f"{text.path}: partial_rotary_factor is {factor!r}, which is not supported")
    original = text.values.get("original_max_position_embeddings")
    if original not in (None, rope.get("original_max_position_embeddings")):
        raise CheckpointError(
            f"{text.path}: original_max_position_embeddings is {original!r} at the top level and "
            f"{rope.get('original_max_position_embeddings')!r} in the RoPE; remove the wrong one"
        )
    if "llama_4_scaling_beta" in default and "llama_4_scaling_beta" not in rope:
        raise CheckpointError(f"{text.path}: the RoPE lacks llama_4_scaling_beta, which this class needs")
    return base, _scaling(Fields(rope, text.path))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _section(text: Fields) -> dict[str, Any] | None:
    sections = {}
    for name in ("rope_scaling", "rope_parameters"):
        section = text.values.get(name)
        if section is None:
            continue
        if not isinstance(section, dict):
            raise CheckpointError(f"{text.path}: {name} must be an object, got {section!r}")
        if any(isinstance(value, dict) for value in section.values()):
            raise CheckpointError(f"{text.path}: {name} has a section for each type of layer, which is not supported")
        sections[name] = section
    if len(sections) == 2 and sections["rope_scaling"] != sections["rope_parameters"]:
        raise CheckpointError(
            f"{text.path} has both rope_scaling and rope_parameters, and they differ; readers take one or the other, "
            "so the vectors would be a guess. Remove the wrong one"
        )
    for name, section in sections.items():
        text.note("rope", f"{name} in {text.path}")
        return dict(section)
    return None


def _scaling(rope: Fields) -> RopeScaling | None:
    kinds = {str(rope.values[name]) for name in ("rope_type", "type") if rope.values.get(name) is not None}
    if len(kinds) > 1:
        raise CheckpointError(f"{rope.path}: type and rope_type of the RoPE differ: {', '.join(sorted(kinds))}")
    kind = kinds.pop() if kinds else "default"
    names = {"rope_type", "type", "rope_theta", "partial_rotary_factor"} | IGNORED
    if kind == "default":
        if unused := rope.values.keys() - names - {name for name, value in rope.values.items() if value is None}:
            raise CheckpointError(
                f"{rope.path}: the RoPE has type 'default' and {', '.join(sorted(unused))}, which only a scaling has; "
                "state its rope_type, or remove them"
            )
        return None
    supported = [rope_kind.value for rope_kind in RopeKind]
    if kind not in supported:
        raise CheckpointError(
            f"{rope.path}: rope_scaling has type {kind!r}, which is not supported and would lead to wrong vectors. "
            f"Supported: {', '.join(map(repr, supported))}, or no scaling"
        )
    rope_kind = RopeKind(kind)
    if unknown := rope.values.keys() - names - FIELDS[rope_kind]:
        raise CheckpointError(f"{rope.path}: {', '.join(sorted(unknown))} is not a field of the RoPE type {kind!r}")
    factor = rope.number("factor", is_float=True)
    original = 0 if rope_kind is RopeKind.LINEAR else rope.number("original_max_position_embeddings")
    if rope_kind is RopeKind.LLAMA3:
        return RopeScaling(
            kind=rope_kind,
            factor=factor,
            low_freq_factor=rope.number("low_freq_factor", is_float=True),
            high_freq_factor=rope.number("high_freq_factor", is_float=True),
            original_max_positions=original,
        )
    if rope_kind is RopeKind.LINEAR:
        return RopeScaling(kind=rope_kind, factor=factor)
    return RopeScaling(
        kind=rope_kind,
        factor=factor,
        original_max_positions=original,
        beta_fast=rope.number("beta_fast", 32.0, null=32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0, null=1.0) or 1.0,
        truncate=rope.boolean("truncate", default=True),
        attention_factor=_attention_factor(rope, factor),
        query_scale_beta=rope.number("llama_4_scaling_beta", default=0.0),
    )


def _attention_factor(rope: Fields, factor: float) -> float:
    """Returns YaRN's factor on the cosines and sines. Source: arXiv 2309.00071, section 3.4, and transformers."""
    if rope.values.get("attention_factor") is not None:
        return rope.number("attention_factor", is_float=True)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all_dim = rope.number("mscale", 0.0, null=0.0), rope.number("mscale_all_dim", 0.0, null=0.0)
    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)
