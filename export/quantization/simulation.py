"""Simulates quantized layers in an FP32 model: dequantized weights, and inputs that are quantized and dequantized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from nvembed_deploy.export.layerwise import BlockHook, block_of
from nvembed_deploy.export.quantization.calibration import unpack
from nvembed_deploy.export.quantization.linear_groups import LinearGroup, weight_of
from nvembed_deploy.export.quantization.record import GroupRecord
from nvembed_deploy.export.quantization.rounding import Rounding
from nvembed_deploy.export.quantization.smoothing import smoothing_factors
from nvembed_deploy.model.nvembed import NVEmbed


@contextmanager
def simulated(model: NVEmbed, records: Sequence[GroupRecord], rounding: Rounding) -> Iterator[None]:
    """Simulates quantized layers of some groups in a smoothed model, until the context ends."""
    with ExitStack() as stack:
        for record in records:
            stack.enter_context(_fake_quantized(model, record, rounding))
        yield


def simulation_hook(model: NVEmbed, records: Sequence[GroupRecord], rounding: Rounding) -> BlockHook:
    """Returns a hook that applies `simulated` to each block."""
    return lambda block_name: simulated(
        model, [record for record in records if block_of(record.name) == block_name], rounding
    )


def simulated_alone(
    model: NVEmbed, group: LinearGroup, record: GroupRecord, rounding: Rounding
) -> AbstractContextManager[None]:
    """Simulates a group smoothed and quantized in a model that is neither, until the context ends."""
    factors = smoothing_factors(model, group, unpack(record.channel_ranges), record.alpha)
    return _fake_quantized(model, record, rounding, factors)


@contextmanager
def _fake_quantized(
    model: NVEmbed, record: GroupRecord, rounding: Rounding, factors: Tensor | float = 1.0
) -> Iterator[None]:
    """Replaces the weights of a group's layers by dequantized ones, and fake-quantizes the layers' inputs."""
    fmt = rounding.fmt

    def quantize_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        smoothed = args[0] / factors
        return (fmt.fake_quantize(smoothed, record.input_scale) if fmt.quantizes_inputs else smoothed,)

    with torch.no_grad(), ExitStack() as stack:
        for name in record.linears:
            linear = model.get_submodule(name)
            stack.callback(setattr, linear, "weight", linear.weight)
            weight = rounding.fake_quantize(name, weight_of(model, name) * factors)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            stack.callback(linear.register_forward_pre_hook(quantize_input).remove)
        yield
