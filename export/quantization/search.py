"""Quantizes the linear layers of an FP32 model: searches scales, ranks groups, and excludes the most sensitive ones.

1. For each group of layers that take the same input, SmoothQuant's alpha and the clip ratio of the input's scale are
   searched for the smallest error of the layers' outputs.
2. Each group alone is quantized in the model, with the best of these settings and, in a small model, the next ones. Its
   sensitivity is the loss of cosine on real text: an error of a group's outputs matters more or less to the embeddings.
   The setting with the lowest sensitivity is taken.
3. The groups with the highest sensitivity per weight are excluded until the parity gate's tolerance holds. Excluded
   groups without which it holds too are then quantized after all, the largest first.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.export.layerwise import BlockHook, LayerwiseModel, block_of, no_hook
from nvembed_deploy.export.quantization.calibration import (
    EXTREME_ROWS,
    SAMPLED_ROWS,
    GroupInputs,
    InputCollector,
    pack,
    padded_batches,
    texts_sha256,
    unpack,
)
from nvembed_deploy.export.quantization.formats import FORMATS, NumberFormat
from nvembed_deploy.export.quantization.linear_groups import LinearGroup, linear_groups, smooth, weight_of
from nvembed_deploy.export.quantization.qdq import QUANTIZED_SUFFIX, SCALE_SUFFIX
from nvembed_deploy.export.quantization.record import (
    RECORD_VERSION,
    GroupRecord,
    QuantizationRecord,
    nothing_to_quantize,
)
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.parity.compare import TOLERANCES
from nvembed_deploy.parity.probes import probe_rows
from nvembed_deploy.spec import Precision
from nvembed_deploy.tokenization import TextEncoder, TokenRow

ALPHAS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Candidates for SmoothQuant's alpha; 0 means no smoothing."""
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Candidates for the part of an input's largest absolute value that its scale covers."""
RANKING_TOKENS = 1024
"""Tokens of calibration text that rank the groups, in addition to the gate's shorter texts."""
RANKING_MAX_TOKENS = 128
"""Longer texts do not rank the groups."""
MAX_SEARCHED_OUTPUTS = 3072
"""Outputs of a layer that the search of scales computes; a 7 B model's layers have up to 32,768."""
LARGE_MODEL_PARAMETERS = 300_000_000
"""A model with more parameters is ranked on fewer rows, and in one setting of each group."""
RANKED_SETTINGS = 4
"""Settings of each group that are ranked: the best ones by error, each with another alpha."""
MIN_RANKING_ROWS = 8
LARGE_MODEL_TRIES = 16
"""For a large model: sets of excluded groups that are tried, and excluded groups that are tried quantized again."""
MARGIN = 0.1
"""Part of the gate's tolerance that is reserved for the difference between this simulation and the engine (INT8's mean
cosine differs by 5e-5 of the allowed 2e-3). If the difference is larger, `exclude_next` is called."""
MIN_RANGE = 1e-5
"""Lower bound of the ranges that smoothing factors are computed from."""
SCALE_TOLERANCE = 0.005
"""Part by which an input's scale may differ from the one that its ranges give here: a few steps of FP16, because
another machine sums the logarithms of the factors in another order."""


def quantize(
    layerwise: LayerwiseModel,
    text: TextEncoder,
    rows: Sequence[TokenRow],
    precision: Precision,
    *,
    model_sha256: str,
    longest: int,
    on_forecast: Callable[[float], None] | None = None,
) -> QuantizationRecord:
    """Calibrates, smooths the model in place, ranks its groups and chooses which to quantize.

    Args:
        layerwise: The FP32 model, its pooler folded or not.
        text: The model's text encoder.
        rows: The tokenized calibration texts.
        precision: A quantized precision.
        model_sha256: Hash of the checkpoint.
        longest: Tokens of the gate's longest text.
        on_forecast: Called with roughly the seconds that the rest takes, once the model has run for the first time.

    Raises:
        ParityError: The gate's tolerance does not hold with any group quantized, or no group fits the number format.
    """
    fmt = FORMATS[precision]
    groups = linear_groups(layerwise.model)
    ranking_rows, gate_rows = _ranking_rows(layerwise, text, rows, longest), probe_rows(text, longest)[1]
    started = time.monotonic()
    reference = _embed(layerwise, text, gate_rows)
    if on_forecast is not None:
        seconds_per_token = (time.monotonic() - started) / _tokens(gate_rows)
        on_forecast(seconds_per_token * _forecast_tokens(layerwise, len(groups), rows, ranking_rows, gate_rows))
    settings = _search_settings(layerwise, groups, InputCollector(layerwise, text, rows), fmt)
    records = _rank_settings(layerwise, text, ranking_rows, groups, settings, fmt)
    for group, record in zip(groups, records, strict=True):
        layerwise.edit(block_of(group.name), _smoothing_edit(layerwise.model, group, record))
    records = _exclude_until_tolerance_holds(layerwise, text, gate_rows, reference, records, fmt)
    return QuantizationRecord(
        version=RECORD_VERSION,
        precision=precision,
        model_sha256=model_sha256,
        texts_sha256=texts_sha256(rows),
        texts=len(rows),
        tokens=sum(map(len, rows)),
        groups=tuple(records),
    )


def _tokens(rows: Sequence[TokenRow]) -> int:
    return sum(map(len, rows))


def _forecast_tokens(
    layerwise: LayerwiseModel,
    groups: int,
    rows: Sequence[TokenRow],
    ranking_rows: Sequence[TokenRow],
    gate_rows: Sequence[TokenRow],
) -> float:
    """Returns roughly how many tokens pass through the model in a search, each step counted as such tokens."""
    is_large = layerwise.parameter_count > LARGE_MODEL_PARAMETERS
    searching = len(ALPHAS) * len(CLIP_RATIOS) * (SAMPLED_ROWS + EXTREME_ROWS)
    # Half of the model on average, because the blocks before a group are shared; then half of the groups once more.
    ranking = _tokens(ranking_rows) * groups / 2 * (1 if is_large else 1 + (RANKED_SETTINGS - 1) / 2)
    excluding = _tokens(gate_rows) * min(groups, LARGE_MODEL_TRIES)
    return _tokens(rows) + searching + ranking + excluding


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
        raise ConfigError(
            "the quantization record belongs to a model with other layers; quantize again without --reuse"
        )
    fmt = FORMATS[record.precision]
    for group in groups:  # in the order of the search: smoothing a group changes the weights of the one before
        _require_fit(layerwise.model, group, records[group.name], fmt)
        edit = _smoothing_edit(layerwise.model, group, records[group.name], check_scale_of=fmt)
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
    if not (record.excluded or all(map(fmt.fits, weights))):
        raise _does_not_fit(record, "is quantized, and does not divide into blocks")


def _does_not_fit(record: GroupRecord, reason: str) -> ConfigError:
    return ConfigError(
        f"the quantization record does not fit the model: {record.name} {reason}; quantize again without --reuse"
    )


class QuantizedWeights:
    """The weights of a smoothed model as a quantized graph takes them; a `WeightSource`.

    Args:
        layerwise: The smoothed model.
        record: Which layers are quantized.
    """

    def __init__(self, layerwise: LayerwiseModel, record: QuantizationRecord) -> None:
        self._layerwise = layerwise
        self._fmt = FORMATS[record.precision]
        self._stack = ExitStack()
        self._block_name = ""
        self._last: tuple[str, tuple[Tensor, Tensor]] | None = None
        """Name of the last layer that was quantized, its quantized values and scales."""
        self.input_scales = {
            linear: group.input_scale for group in record.groups if not group.excluded for linear in group.linears
        }

    def _split_name(self, name: str) -> tuple[str, str]:
        """Splits the name of a quantized layer's tensor into layer and suffix; ("", "") for others."""
        for suffix in (QUANTIZED_SUFFIX, SCALE_SUFFIX):
            if name.endswith(f".weight{suffix}") and (linear := name.removesuffix(f".weight{suffix}")):
                return (linear, suffix) if linear in self.input_scales else ("", "")
        return "", ""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `WeightSource`."""
        linear, suffix = self._split_name(name)
        if linear:
            outputs, inputs = weight_of(self._layerwise.model, linear).shape
            return (inputs, outputs) if suffix == QUANTIZED_SUFFIX else self._fmt.scale_shape(outputs, inputs)
        parameter = dict(self._layerwise.model.named_parameters()).get(name)
        return None if parameter is None else tuple(parameter.shape)

    def location(self, name: str) -> None:
        """See `WeightSource`; no tensor is stored in a file as it is."""

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """See `WeightSource`."""
        linear, suffix = self._split_name(name)
        if (block_name := block_of(linear or name)) != self._block_name:
            self._stack.close()
            self._stack.enter_context(self._layerwise.block(block_name))
            self._block_name = block_name
        if not linear:
            tensor: Tensor = self._layerwise.model.get_parameter(name)
        else:
            if self._last is None or self._last[0] != linear:
                self._last = linear, self._fmt.quantize_weight(weight_of(self._layerwise.model, linear))
            tensor = self._last[1][(QUANTIZED_SUFFIX, SCALE_SUFFIX).index(suffix)]
        return tensor if rows is None else tensor[rows[0] : rows[1]]

    def close(self) -> None:
        """Releases the block that is in memory."""
        self._stack.close()
        self._block_name, self._last = "", None


def _search_settings(
    layerwise: LayerwiseModel, groups: Sequence[LinearGroup], collector: InputCollector, fmt: NumberFormat
) -> list[tuple[GroupRecord, ...]]:
    """Returns the settings of every group, the one with the smallest error first."""
    settings: dict[str, tuple[GroupRecord, ...]] = {}
    bar = tqdm(total=len(groups), desc="searching scales", unit="group", disable=None, leave=False)

    @contextmanager
    def search_block(block_name: str) -> Iterator[None]:
        block_groups = [group for group in groups if block_of(group.name) == block_name]
        with collector.collecting(block_groups) as collected:
            yield
        for group in block_groups:
            settings[group.name] = _search_group(layerwise.model, group, collected.pop(group.name), fmt)
            bar.update()

    layerwise.forward(collector.batches, hook=search_block, description="calibrating, layer by layer")
    bar.close()
    return [settings[group.name] for group in groups]


def _search_group(
    model: NVEmbed, group: LinearGroup, inputs: GroupInputs, fmt: NumberFormat
) -> tuple[GroupRecord, ...]:
    """Returns a setting for each alpha, with its best clip ratio, the smallest error first.

    A group that does not fit the number format has one setting, which excludes it.
    """
    weights = [_sampled_outputs(weight_of(model, name)) for name in group.linears]
    unsmoothed = GroupRecord(
        name=group.name,
        linears=group.linears,
        alpha=0.0,
        clip_ratio=1.0,
        input_scale=0.0,
        error=0.0,
        sensitivity=0.0,
        weight_count=sum(weight_of(model, name).numel() for name in group.linears),
        excluded=True,
        reason="does not divide into blocks",
        channel_ranges=pack(inputs.channel_max),
    )
    if not all(fmt.fits(weight) for weight in weights):
        return (unsmoothed,)
    exact_outputs = [F.linear(inputs.sampled_rows, weight) for weight in weights]
    settings = []
    for alpha in ALPHAS:
        factors = _factors(model, group, inputs.channel_max, alpha)
        rows, max_abs = inputs.sampled_rows / factors, float((inputs.channel_max / factors).max())
        quantized_weights = [fmt.fake_quantize_weight(weight * factors) for weight in weights]
        best = replace(unsmoothed, alpha=alpha, error=torch.inf, excluded=False, reason="")
        for clip_ratio in CLIP_RATIOS if fmt.quantizes_inputs else (1.0,):
            scale = fmt.input_scale(max_abs * clip_ratio) if fmt.quantizes_inputs else 0.0
            quantized_rows = fmt.fake_quantize(rows, scale) if fmt.quantizes_inputs else rows
            errors = [
                _relative_error(F.linear(quantized_rows, weight), exact)
                for weight, exact in zip(quantized_weights, exact_outputs, strict=True)
            ]
            error = float(torch.stack(errors).mean())
            if error < best.error:
                best = replace(best, clip_ratio=clip_ratio, input_scale=scale, error=error)
        settings.append(best)
    return tuple(sorted(settings, key=lambda setting: setting.error))


def _sampled_outputs(weight: Tensor) -> Tensor:
    """Returns evenly spaced rows of a weight [N, K]: enough for a mean error, and each row has its own scales."""
    if len(weight) <= MAX_SEARCHED_OUTPUTS:
        return weight
    return weight[torch.linspace(0, len(weight) - 1, MAX_SEARCHED_OUTPUTS).long()]


def _relative_error(outputs: Tensor, exact: Tensor) -> Tensor:
    """Returns the mean over rows of the squared error relative to the row's own square."""
    return ((outputs - exact).square().sum(dim=1) / exact.square().sum(dim=1).clamp_min(1e-20)).mean()


def _factors(model: NVEmbed, group: LinearGroup, channel_max: Tensor, alpha: float) -> Tensor:
    """Returns SmoothQuant's factors [K]: input range^alpha / weight range^(1 - alpha), with geometric mean 1."""
    if alpha == 0:
        return torch.ones_like(channel_max)
    column_max = torch.stack([weight_of(model, name).abs().amax(dim=0) for name in group.linears]).amax(dim=0)
    factors = channel_max.clamp_min(MIN_RANGE) ** alpha / column_max.clamp_min(MIN_RANGE) ** (1 - alpha)
    factors = group.tie(factors)
    return factors / factors.log().mean().exp()


def _smoothing_edit(
    model: NVEmbed, group: LinearGroup, record: GroupRecord, *, check_scale_of: NumberFormat | None = None
) -> Callable[[], None]:
    """Returns what smooths a group; with a number format it first checks the scale of the group's input."""
    channel_max = unpack(record.channel_ranges)

    def edit() -> None:
        factors = _factors(model, group, channel_max, record.alpha)
        if check_scale_of is not None and check_scale_of.quantizes_inputs and not record.excluded:
            scale = check_scale_of.input_scale(float((channel_max / factors).max()) * record.clip_ratio)
            if not math.isclose(record.input_scale, scale, rel_tol=SCALE_TOLERANCE):
                raise _does_not_fit(
                    record, f"has input_scale {record.input_scale:.6g}, and its ranges give {scale:.6g}"
                )
        smooth(model, group, factors)

    return edit


@contextmanager
def simulated(model: NVEmbed, records: Sequence[GroupRecord], fmt: NumberFormat) -> Iterator[None]:
    """Simulates quantized layers of some groups in a smoothed model, until the context ends."""
    with ExitStack() as stack:
        for record in records:
            stack.enter_context(_fake_quantized(model, record, fmt))
        yield


def simulation_hook(model: NVEmbed, records: Sequence[GroupRecord], fmt: NumberFormat) -> BlockHook:
    """Returns a hook that applies `simulated` to each block."""
    return lambda block_name: simulated(
        model, [record for record in records if block_of(record.name) == block_name], fmt
    )


def simulated_alone(
    model: NVEmbed, group: LinearGroup, record: GroupRecord, fmt: NumberFormat
) -> AbstractContextManager[None]:
    """Simulates a group smoothed and quantized in a model that is neither, until the context ends."""
    factors = _factors(model, group, unpack(record.channel_ranges), record.alpha)
    return _fake_quantized(model, record, fmt, factors)


@contextmanager
def _fake_quantized(
    model: NVEmbed, record: GroupRecord, fmt: NumberFormat, factors: Tensor | float = 1.0
) -> Iterator[None]:
    """Replaces the weights of a group's layers by dequantized ones, and fake-quantizes the layers' inputs."""

    def quantize_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        smoothed = args[0] / factors
        return (fmt.fake_quantize(smoothed, record.input_scale) if fmt.quantizes_inputs else smoothed,)

    with torch.no_grad(), ExitStack() as stack:
        for name in record.linears:
            linear = model.get_submodule(name)
            stack.callback(setattr, linear, "weight", linear.weight)
            weight = fmt.fake_quantize_weight(weight_of(model, name) * factors)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            stack.callback(linear.register_forward_pre_hook(quantize_input).remove)
        yield


def _ranking_rows(
    layerwise: LayerwiseModel, text: TextEncoder, rows: Sequence[TokenRow], longest: int
) -> list[TokenRow]:
    """Returns the gate's shorter texts and some calibration texts; fewer of them for a large model."""
    ranking_rows = [row for row in probe_rows(text, longest)[1] if len(row) <= RANKING_MAX_TOKENS]
    tokens = 0
    for row in rows:
        if len(row) <= RANKING_MAX_TOKENS and tokens < RANKING_TOKENS:
            ranking_rows.append(row)
            tokens += len(row)
    affordable = len(ranking_rows) * LARGE_MODEL_PARAMETERS // max(LARGE_MODEL_PARAMETERS, layerwise.parameter_count)
    row_count = max(MIN_RANKING_ROWS, affordable)
    return ranking_rows[:: max(1, len(ranking_rows) // row_count)]


def _embed(
    layerwise: LayerwiseModel, text: TextEncoder, rows: Sequence[TokenRow], *, hook: BlockHook = no_hook
) -> Tensor:
    """Returns float32 [N, D], many rows in a batch: reading a large model's weights takes longer than computing."""
    order, batches = padded_batches(text, rows)
    embeddings = layerwise.forward(batches, hook=hook, description="embedding, layer by layer")
    return embeddings[torch.tensor(order).argsort()]


def _rank_settings(
    layerwise: LayerwiseModel,
    text: TextEncoder,
    rows: Sequence[TokenRow],
    groups: Sequence[LinearGroup],
    settings: Sequence[tuple[GroupRecord, ...]],
    fmt: NumberFormat,
) -> list[GroupRecord]:
    """Returns the setting of each group with the lowest sensitivity. The model is not smoothed yet.

    After the first setting, others are tried only for the half of the groups with the higher sensitivity per weight:
    the rest loses little with any of the first settings.
    """
    best = [group_settings[0] for group_settings in settings]
    batches = padded_batches(text, rows)[1]
    for rank in range(1 if layerwise.parameter_count > LARGE_MODEL_PARAMETERS else RANKED_SETTINGS):
        median = statistics.median(record.sensitivity_per_weight for record in best)
        candidates = {
            record.name: group_settings[rank]
            for group_settings, record in zip(settings, best, strict=True)
            if rank < len(group_settings)
            and not record.excluded
            and (rank == 0 or record.sensitivity_per_weight >= median)
        }
        changes = {
            group.name: functools.partial(simulated_alone, layerwise.model, group, candidates[group.name], fmt)
            for group in groups
            if group.name in candidates
        }
        reference, embeddings = layerwise.variants(batches, changes, f"ranking groups, setting {rank + 1}")
        sensitivities = {
            name: 1 - float((reference * changed).sum(dim=1).mean()) for name, changed in embeddings.items()
        }
        best = [
            replace(candidates[record.name], sensitivity=sensitivities[record.name])
            if record.name in sensitivities and (rank == 0 or sensitivities[record.name] < record.sensitivity)
            else record
            for record in best
        ]
    return best


def _exclude_until_tolerance_holds(
    layerwise: LayerwiseModel,
    text: TextEncoder,
    gate_rows: Sequence[TokenRow],
    reference: Tensor,
    records: list[GroupRecord],
    fmt: NumberFormat,
) -> list[GroupRecord]:
    """Excludes groups, the highest sensitivity per weight first, and then quantizes those that need not be excluded."""
    is_large = layerwise.parameter_count > LARGE_MODEL_PARAMETERS

    def holds(excluded: Set[str]) -> bool:
        quantized = [record for record in records if not record.excluded and record.name not in excluded]
        hook = simulation_hook(layerwise.model, quantized, fmt)
        return _within_tolerance(reference, _embed(layerwise, text, gate_rows, hook=hook), fmt.precision)

    worst_first = sorted(
        (record for record in records if not record.excluded), key=lambda record: -record.sensitivity_per_weight
    )
    groups_per_try = -(-len(worst_first) // LARGE_MODEL_TRIES) if is_large else 1
    excluded: set[str] = set()
    while not worst_first or not holds(excluded):
        next_groups = worst_first[len(excluded) : len(excluded) + groups_per_try]
        if len(excluded) + len(next_groups) >= len(worst_first):
            raise nothing_to_quantize(fmt.precision)
        excluded |= {record.name for record in next_groups}
    largest_first = sorted(
        (record for record in worst_first if record.name in excluded), key=lambda record: -record.weight_count
    )
    for record in largest_first[: LARGE_MODEL_TRIES if is_large else None]:
        if holds(excluded - {record.name}):
            excluded.remove(record.name)
    return [
        replace(record, excluded=True, reason="among the most sensitive for their size")
        if record.name in excluded
        else record
        for record in records
    ]


def _within_tolerance(reference: Tensor, embeddings: Tensor, precision: Precision) -> bool:
    """Returns True if embeddings meet the gate's tolerance of a precision with `MARGIN` to spare."""
    tolerance = TOLERANCES[precision]
    cosines = (reference * embeddings).sum(dim=1)
    max_difference = float((reference - embeddings).abs().max()) * (
        reference.shape[1] ** 0.5 if tolerance.scaled else 1.0
    )
    return all(
        float(measured) <= allowed * (1 - MARGIN)
        for measured, allowed in (
            (1 - cosines.min(), 1 - tolerance.min_cosine),
            (1 - cosines.mean(), 1 - tolerance.min_mean_cosine),
            (max_difference, tolerance.max_difference),
        )
    )
