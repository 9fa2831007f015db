"""Smooths the groups of a model with the settings of a search, or of an earlier export's record."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.export.layerwise import LayerwiseModel, block_of
from nvembed_deploy.export.quantization.calibration import unpack
from nvembed_deploy.export.quantization.formats import FORMATS, NumberFormat
from nvembed_deploy.export.quantization.linear_groups import LinearGroup, linear_groups, smooth, weight_of
from nvembed_deploy.export.quantization.record import GroupRecord, QuantizationRecord
from nvembed_deploy.model.nvembed import NVEmbed

MIN_RANGE = 1e-5
"""Lower bound of the ranges that smoothing factors are computed from."""
SCALE_TOLERANCE = 0.005
"""Part by which an input's scale may differ from the one that its ranges give here: a few steps of FP16, because
another machine sums the logarithms of the factors in another order."""


def smoothing_factors(model: NVEmbed, group: LinearGroup, channel_max: Tensor, alpha: float) -> Tensor:
    """Returns SmoothQuant's factors [K]: input range^alpha / weight range^(1 - alpha), with geometric mean 1."""
    if alpha == 0:
        return torch.ones_like(channel_max, device=weight_of(model, group.linears[0]).device)
    column_max = torch.stack([weight_of(model, name).abs().amax(dim=0) for name in group.linears]).amax(dim=0)
    channel_max = channel_max.to(column_max.device)
    factors = channel_max.clamp_min(MIN_RANGE) ** alpha / column_max.clamp_min(MIN_RANGE) ** (1 - alpha)
    factors = group.tie(factors)
    return factors / factors.log().mean().exp()


def smoothing_edit(
    model: NVEmbed, group: LinearGroup, record: GroupRecord, *, check_scale_of: NumberFormat | None = None
) -> Callable[[], None]:
    """Returns what smooths a group; with a number format it first checks the scale of the group's input."""
    channel_max = unpack(record.channel_ranges)

    def edit() -> None:
        factors = smoothing_factors(model, group, channel_max, record.alpha)
        if check_scale_of is not None and check_scale_of.quantizes_inputs and not record.excluded:
            scale = check_scale_of.input_scale(float((channel_max / factors.cpu()).max()) * record.clip_ratio)
            if not math.isclose(record.input_scale, scale, rel_tol=SCALE_TOLERANCE):
                raise _does_not_fit(
                    record, f"has input_scale {record.input_scale:.6g}, and its ranges give {scale:.6g}"
                )
        smooth(model, group, factors)

    return edit


def apply_record(layerwise: LayerwiseModel, record: QuantizationRecord) -> None:
    """Smooths a model in place with the settings of a record.

    The settings of a streamed model are checked against its weights when a block is loaded.

    Raises:
        ConfigError: The record belongs to a model with other layers, or a setting does not follow from the weights and
            the ranges.
    """
    groups = linear_groups(layerwise.model)
    records = {group_record.name: group_record for group_record in record.groups}
    if {group.name for group in groups} != records.keys():
        raise ConfigError("the quantization record belongs to a model with other layers; quantize without --reuse")
    fmt = FORMATS[record.precision]
    for group in groups:  # in the order of the search: smoothing a group changes the weights of the one before
        _require_fit(layerwise.model, group, records[group.name], fmt)
        edit = smoothing_edit(layerwise.model, group, records[group.name], check_scale_of=fmt)
        layerwise.edit(block_of(group.name), edit)


def _require_fit(model: NVEmbed, group: LinearGroup, record: GroupRecord, fmt: NumberFormat) -> None:
    """Refuses the record of a group whose layers, sizes or number format do not fit the model.

    Raises:
        ConfigError: One of them does not fit.
    """
    if record.linears != group.linears:
        raise _does_not_fit(record, f"has the layers {', '.join(record.linears)[:200]}")
    weights = [weight_of(model, name) for name in group.linears]
    if record.weight_count != (count := sum(weight.numel() for weight in weights)):
        raise _does_not_fit(record, f"has {record.weight_count} weights, and the model's {count}")
    if (channels := len(unpack(record.channel_ranges))) != weights[0].shape[1]:
        raise _does_not_fit(record, f"has the ranges of {channels} channels, and the model {weights[0].shape[1]}")
    if not (record.excluded or fmt.fits(weights[0])):
        raise _does_not_fit(record, "is quantized, and does not divide into blocks")


def _does_not_fit(record: GroupRecord, reason: str) -> ConfigError:
    return ConfigError(
        f"the quantization record does not fit the model: {record.name} {reason}; quantize without --reuse"
    )
