"""Quantizes the linear layers of an FP32 model: searches scales, ranks groups, and excludes the most sensitive ones.

1. For each group of layers that take the same input, SmoothQuant's alpha and the clip ratio of the input's scale are
   searched for the smallest error of the layers' outputs. Formats that GPTQ rounds have no alpha: the weights are
   rounded here, once, with the inputs that were collected.
2. Each group alone is quantized in the model, with the best of these settings and, in a small model, the next ones. Its
   sensitivity is the loss of cosine on real text: an error of a group's outputs matters more or less to the embeddings.
   The setting with the lowest sensitivity is taken.
3. The groups with the highest sensitivity per weight are excluded until the parity gate's tolerance holds. Excluded
   groups without which it holds too are then quantized after all, the largest first.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from nvembed_deploy.errors import ExportError
from nvembed_deploy.export.layerwise import BlockHook, LayerwiseModel, block_of, no_hook
from nvembed_deploy.export.quantization.calibration import (
    EXTREME_ROWS,
    SAMPLED_ROWS,
    GroupInputs,
    InputCollector,
    pack,
    padded_batches,
    texts_sha256,
)
from nvembed_deploy.export.quantization.formats import NumberFormat
from nvembed_deploy.export.quantization.linear_groups import LinearGroup, linear_groups, weight_of
from nvembed_deploy.export.quantization.record import (
    RECORD_VERSION,
    GroupRecord,
    QuantizationRecord,
    SimulatedParity,
    nothing_to_quantize,
)
from nvembed_deploy.export.quantization.rounding import GptqRounding, Rounding
from nvembed_deploy.export.quantization.simulation import simulated_alone, simulation_hook
from nvembed_deploy.export.quantization.smoothing import smoothing_edit, smoothing_factors
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.parity.compare import TOLERANCES
from nvembed_deploy.parity.probes import probe_rows
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
WEIGHT_MARGIN = 0.01
"""The same for formats that do not quantize inputs: the simulation differs from the engine by what FP16 costs."""


def quantize(
    layerwise: LayerwiseModel,
    text: TextEncoder,
    rows: Sequence[TokenRow],
    rounding: Rounding,
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
        rounding: The rounding of a quantized precision; the results of GPTQ are stored in it.
        model_sha256: Hash of the checkpoint.
        longest: Tokens of the gate's longest text.
        on_forecast: Called with roughly the seconds that the rest takes, once the model has run for the first time.

    Raises:
        ParityError: The gate's tolerance does not hold with any group quantized.
        ExportError: No layer divides into the number format's blocks, or inputs of one overflow FP32.
    """
    fmt, groups = rounding.fmt, linear_groups(layerwise.model)
    if not any(_fits(layerwise.model, group, fmt) for group in groups):
        raise ExportError(
            f"--precision {fmt.precision.value} quantizes blocks of {fmt.block_size} inputs, and no layer of this "
            "model has a multiple of them; pass --precision int8"
        )
    ranking_rows = _ranking_rows(layerwise, text, rows, longest)
    gate_rows = probe_rows(text, longest, everyday=True)[1]
    started = time.monotonic()
    reference = _embed(layerwise, text, gate_rows)
    if on_forecast is not None:
        seconds_per_token = (time.monotonic() - started) / _tokens(gate_rows)
        on_forecast(seconds_per_token * _forecast_tokens(layerwise, groups, rounding, rows, ranking_rows, gate_rows))
    collector = InputCollector(layerwise, text, rows)
    settings = _search_settings(layerwise, groups, collector, rounding)
    records = _rank_settings(layerwise, text, ranking_rows, groups, settings, rounding)
    for group, record in zip(groups, records, strict=True):
        layerwise.edit(block_of(group.name), smoothing_edit(layerwise.model, group, record))
    bounds = _bounds(fmt)

    def simulated(quantized: Sequence[GroupRecord]) -> SimulatedParity:
        hook = simulation_hook(layerwise.model, quantized, rounding)
        return _compare(reference, _embed(layerwise, text, gate_rows, hook=hook), fmt)

    all_quantized = simulated([record for record in records if not record.excluded])
    if not all_quantized.is_within(bounds):
        is_large = layerwise.parameter_count > LARGE_MODEL_PARAMETERS
        records = _exclude_until(lambda quantized: simulated(quantized).is_within(bounds), records, fmt, is_large)
    return QuantizationRecord(
        version=RECORD_VERSION,
        precision=fmt.precision,
        model_sha256=model_sha256,
        texts_sha256=texts_sha256(rows),
        texts=len(rows),
        tokens=sum(map(len, rows)),
        all_quantized=all_quantized,
        bounds=bounds,
        groups=tuple(records),
    )


def _fits(model: NVEmbed, group: LinearGroup, fmt: NumberFormat) -> bool:
    """Returns True if the layers of a group divide into blocks; all of them have the same inputs."""
    return fmt.fits(weight_of(model, group.linears[0]))


def _tokens(rows: Sequence[TokenRow]) -> int:
    return sum(map(len, rows))


def _forecast_tokens(
    layerwise: LayerwiseModel,
    groups: Sequence[LinearGroup],
    rounding: Rounding,
    rows: Sequence[TokenRow],
    ranking_rows: Sequence[TokenRow],
    gate_rows: Sequence[TokenRow],
) -> float:
    """Returns roughly how many tokens pass through the model in a search, each step counted as such tokens."""
    is_large = layerwise.parameter_count > LARGE_MODEL_PARAMETERS
    settings = (len(ALPHAS) if rounding.fmt.smoothed else 1) * (
        len(CLIP_RATIOS) if rounding.fmt.quantizes_inputs else 1
    )
    searching = settings * (SAMPLED_ROWS + EXTREME_ROWS)
    # Half of the model on average, because the blocks before a group are shared; then half of the groups once more.
    ranking = (
        _tokens(ranking_rows)
        * len(groups)
        / 2
        * (1 if is_large or not rounding.fmt.smoothed else 1 + (RANKED_SETTINGS - 1) / 2)
    )
    excluding = _tokens(gate_rows) * min(len(groups), LARGE_MODEL_TRIES)
    fitting = 0.0
    if rounding.fmt.gptq:
        shapes = [weight_of(layerwise.model, group.linears[0]).shape[1] for group in groups]
        weights = [sum(weight_of(layerwise.model, name).numel() for name in group.linears) for group in groups]
        # The Hessians; then two Cholesky factors and an inverse of each, and the errors' products.
        fitting = _tokens(rows) * sum(K * K for K in shapes) / sum(weights)
        fitting += sum(1.4 * K**3 + count * K for K, count in zip(shapes, weights, strict=True)) / (2 * sum(weights))
    return _tokens(rows) + searching + ranking + fitting + excluding


def _search_settings(
    layerwise: LayerwiseModel, groups: Sequence[LinearGroup], collector: InputCollector, rounding: Rounding
) -> list[tuple[GroupRecord, ...]]:
    """Returns the settings of every group, the one with the smallest error first; GPTQ's results are stored."""
    model = layerwise.model
    settings: dict[str, tuple[GroupRecord, ...]] = {}
    bar = tqdm(total=len(groups), desc="searching scales", unit="group", disable=None, leave=False)

    @contextmanager
    def search_block(block_name: str) -> Iterator[None]:
        block_groups = [group for group in groups if block_of(group.name) == block_name]
        rounded: AbstractContextManager[None] = nullcontext()
        if isinstance(rounding, GptqRounding):
            rounded = _rounded_after(model, block_groups, collector, rounding)
        with collector.collecting(block_groups) as collected, rounded:
            yield
        for group in block_groups:
            inputs = collected.pop(group.name)
            settings[group.name] = _search_group(model, group, inputs, rounding)
            bar.update()

    layerwise.forward(collector.batches, hook=search_block, description="calibrating, layer by layer")
    bar.close()
    return [settings[group.name] for group in groups]


@contextmanager
def _rounded_after(
    model: NVEmbed, groups: Sequence[LinearGroup], collector: InputCollector, rounding: GptqRounding
) -> Iterator[None]:
    """Collects the Hessians of some groups in the context, and rounds their weights by GPTQ when it ends."""
    groups = [group for group in groups if _fits(model, group, rounding.fmt)]
    with collector.summing_products(groups) as hessians:
        yield
    for group in groups:
        hessian = hessians.pop(group.name)
        for name in group.linears:
            rounding.fit(name, weight_of(model, name), hessian)


def _search_group(
    model: NVEmbed, group: LinearGroup, inputs: GroupInputs, rounding: Rounding
) -> tuple[GroupRecord, ...]:
    """Returns a setting for each alpha, with its best clip ratio, the smallest error first.

    A group that does not fit the number format has one setting, which excludes it.
    """
    fmt, weights = rounding.fmt, [weight_of(model, name) for name in group.linears]
    unsmoothed = GroupRecord(
        name=group.name,
        linears=group.linears,
        alpha=0.0,
        clip_ratio=1.0,
        input_scale=0.0,
        error=0.0,
        sensitivity=0.0,
        weight_count=sum(weight.numel() for weight in weights),
        excluded=True,
        reason="does not divide into blocks",
        channel_ranges=pack(inputs.channel_max),
    )
    if not _fits(model, group, fmt):
        return (unsmoothed,)
    exact_outputs = [F.linear(inputs.sampled_rows, _sampled_outputs(weight)) for weight in weights]
    settings = []
    for alpha in ALPHAS if fmt.smoothed else (0.0,):
        factors = smoothing_factors(model, group, inputs.channel_max, alpha)
        rows, max_abs = inputs.sampled_rows / factors, float((inputs.channel_max / factors).max())
        quantized_weights = [
            _sampled_quantized(name, weight * factors, rounding)
            for name, weight in zip(group.linears, weights, strict=True)
        ]
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


def _sampled_quantized(name: str, weight: Tensor, rounding: Rounding) -> Tensor:
    """Returns evenly spaced rows of a smoothed weight, quantized and dequantized."""
    if isinstance(rounding, GptqRounding):
        return _sampled_outputs(rounding.fake_quantize(name, weight))
    return rounding.fake_quantize(name, _sampled_outputs(weight))


def _relative_error(outputs: Tensor, exact: Tensor) -> Tensor:
    """Returns the mean over rows of the squared error relative to the row's own square."""
    return ((outputs - exact).square().sum(dim=1) / exact.square().sum(dim=1).clamp_min(1e-20)).mean()


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
    rounding: Rounding,
) -> list[GroupRecord]:
    """Returns the setting of each group with the lowest sensitivity. The model is not smoothed yet.

    After the first setting, others are tried only for the half of the groups with the higher sensitivity per weight:
    the rest loses little with any of the first settings.
    """
    best = [group_settings[0] for group_settings in settings]
    max_settings = max(map(len, settings))
    batches = padded_batches(text, rows)[1]
    for rank in range(1 if layerwise.parameter_count > LARGE_MODEL_PARAMETERS else min(RANKED_SETTINGS, max_settings)):
        median = statistics.median(record.sensitivity_per_weight for record in best)
        candidates = {
            record.name: group_settings[rank]
            for group_settings, record in zip(settings, best, strict=True)
            if rank < len(group_settings)
            and not record.excluded
            and (rank == 0 or record.sensitivity_per_weight >= median)
        }
        changes = {
            group.name: functools.partial(simulated_alone, layerwise.model, group, candidates[group.name], rounding)
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


def _exclude_until(
    holds: Callable[[Sequence[GroupRecord]], bool], records: list[GroupRecord], fmt: NumberFormat, is_large: bool
) -> list[GroupRecord]:
    """Excludes groups, the highest sensitivity per weight first, and then quantizes those that need not be excluded.

    Args:
        holds: Returns True if the bounds hold with some groups quantized; they do not with all of them.
        records: The settings of all groups.
        fmt: The number format.
        is_large: Whether the model is large, so that only `LARGE_MODEL_TRIES` sets of groups are tried.
    """

    def holds_without(excluded: Set[str]) -> bool:
        return holds([record for record in records if not record.excluded and record.name not in excluded])

    worst_first = sorted(
        (record for record in records if not record.excluded), key=lambda record: -record.sensitivity_per_weight
    )
    groups_per_try = -(-len(worst_first) // LARGE_MODEL_TRIES) if is_large else 1
    excluded: set[str] = set()
    while not excluded or not holds_without(excluded):
        next_groups = worst_first[len(excluded) : len(excluded) + groups_per_try]
        if len(excluded) + len(next_groups) >= len(worst_first):
            raise nothing_to_quantize(fmt.precision)
        excluded |= {record.name for record in next_groups}
    largest_first = sorted(
        (record for record in worst_first if record.name in excluded), key=lambda record: -record.weight_count
    )
    for record in largest_first[: LARGE_MODEL_TRIES if is_large else None]:
        if holds_without(excluded - {record.name}):
            excluded.remove(record.name)
    return [
        replace(record, excluded=True, reason="among the most sensitive for their size")
        if record.name in excluded
        else record
        for record in records
    ]


def _compare(reference: Tensor, embeddings: Tensor, fmt: NumberFormat) -> SimulatedParity:
    cosines = (reference * embeddings).sum(dim=1)
    scale = reference.shape[1] ** 0.5 if TOLERANCES[fmt.precision].scaled else 1.0
    return SimulatedParity(
        min_cosine=float(cosines.min()),
        mean_cosine=float(cosines.mean()),
        max_difference=float((reference - embeddings).abs().max()) * scale,
    )


def _bounds(fmt: NumberFormat) -> SimulatedParity:
    """Returns the gate's tolerance of a number format with a margin to spare."""
    tolerance, part = TOLERANCES[fmt.precision], 1 - (MARGIN if fmt.quantizes_inputs else WEIGHT_MARGIN)
    return SimulatedParity(
        min_cosine=1 - (1 - tolerance.min_cosine) * part,
        mean_cosine=1 - (1 - tolerance.min_mean_cosine) * part,
        max_difference=tolerance.max_difference * part,
    )
