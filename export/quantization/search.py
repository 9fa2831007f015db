"""From an FP32 model and real text to quantized linear layers: smoothing, scales, ranking, and what stays as it is.

Per group of layers that read one tensor: SmoothQuant's exponent and the share of the range that the input's scale
covers are searched for the smallest error of the layers' outputs. Then every group alone is quantized in the model, in
the best of these settings and, in a small model, the next ones, and what that costs is measured in cosine on real text:
what lies behind a group makes more or less of its outputs' error. The cheapest setting is taken. Groups that cost
most for the weights that they make small stay in the base precision until the gate's bound holds; then those that it
holds without are quantized after all, the largest first.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.export.layerwise import Parts, Watch, part_of, unwatched
from nvembed_deploy.export.quantization.calibration import Collector, Inputs, in_batches, pack, texts_sha256, unpack
from nvembed_deploy.export.quantization.formats import FORMATS, Format
from nvembed_deploy.export.quantization.linear_groups import LinearGroup, linear_groups, smooth, weight_of
from nvembed_deploy.export.quantization.qdq import CODES, SCALE
from nvembed_deploy.export.quantization.record import RECORD_VERSION, GroupRecord, QuantizationRecord, nothing_left
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.parity.compare import TOLERANCES
from nvembed_deploy.parity.probes import probe_rows
from nvembed_deploy.spec import Precision
from nvembed_deploy.tokenization import TextEncoder, TokenRow

EXPONENTS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""SmoothQuant's alpha; 0 stands for no smoothing at all."""
SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
RANKING_TOKENS = 1024
"""Tokens of calibration text that rank the groups, beside the gate's shorter probes."""
RANKING_LONGEST = 128
SEARCHED_OUTPUTS = 3072
"""Most outputs of a layer that the search of scales computes; a 7 B model's have up to 32,768."""
RANKED_PARAMETERS = 300_000_000
"""Most of a model whose groups are ranked on all of these rows and in several settings; a larger one's on fewer."""
SETTINGS = 4
"""Exponents of a group, each with its best share, that are ranked."""
LEAST_RANKING_ROWS = 8
LARGE_TRIES = 16
"""Most sets of kept groups that are tried for a large model, and again as many kept groups without which it may do."""
MARGIN = 0.1
"""Part of the gate's allowance that is kept for what differs between this simulation and the engine (INT8's mean cosine
differs by 5e-5 of the 2e-3 allowed); where that is more, `keep_next` follows."""
FLOOR = 1e-5


def quantize(
    parts: Parts,
    text: TextEncoder,
    rows: Sequence[TokenRow],
    precision: Precision,
    *,
    model_sha256: str,
    longest: int,
) -> QuantizationRecord:
    """Calibrates, smooths the model in place, ranks its groups and chooses what to quantize.

    Args:
        parts: FP32, the pooler folded or not.
        text: The model's text encoder.
        rows: The calibration's texts.
        precision: A quantized one.
        model_sha256: Of the checkpoint.
        longest: Tokens of the gate's longest probe.

    Raises:
        ParityError: The gate's bound does not hold with any group quantized, or none fits the format.
    """
    number = FORMATS[precision]
    groups = linear_groups(parts.model)
    ranking, probes = _ranking_rows(parts, text, rows, longest), probe_rows(text, longest)[1]
    before = _embed(parts, text, probes)
    settings = _search_all(parts, groups, Collector(parts, text, rows), number)
    records = _cheapest(parts, text, ranking, groups, settings, number)
    for group, record in zip(groups, records, strict=True):
        parts.edit(part_of(group.name), _smoothing(parts.model, group, record))
    records = _keep_until_it_holds(parts, text, probes, before, records, number)
    return QuantizationRecord(
        version=RECORD_VERSION,
        precision=precision,
        model_sha256=model_sha256,
        texts_sha256=texts_sha256(rows),
        texts=len(rows),
        tokens=sum(map(len, rows)),
        groups=tuple(records),
    )


def _parameters(parts: Parts) -> int:
    return sum(item.numel() for item in parts.model.parameters())


def _search_all(
    parts: Parts, groups: Sequence[LinearGroup], collector: Collector, number: Format
) -> list[tuple[GroupRecord, ...]]:
    """Every group's settings, the one with the smallest error first."""
    found: dict[str, tuple[GroupRecord, ...]] = {}
    bar = tqdm(total=len(groups), desc="searching scales", unit="group", disable=None, leave=False)

    @contextmanager
    def watch(part: str) -> Iterator[None]:
        here = [group for group in groups if part_of(group.name) == part]
        with collector.watching(here) as seen:
            yield
        for group in here:
            found[group.name] = _search(parts.model, group, seen.pop(group.name), number)
            bar.update()

    parts.forward(collector.batches, watch=watch, what="calibrating, layer by layer")
    bar.close()
    return [found[group.name] for group in groups]


def _smoothing(model: NVEmbed, group: LinearGroup, record: GroupRecord) -> Callable[[], None]:
    largest = unpack(record.channel_ranges)
    return lambda: smooth(model, group, _factors(model, group, largest, record.exponent))


def apply_record(parts: Parts, record: QuantizationRecord) -> None:
    """Smooths a model in place as a record says.

    Raises:
        ConfigError: The record is of a model with other layers.
    """
    groups = {group.name: group for group in linear_groups(parts.model)}
    if groups.keys() != {item.name for item in record.groups}:
        raise ConfigError("the quantization record is of a model with other layers; quantize again without --reuse")
    for item in record.groups:
        parts.edit(part_of(item.name), _smoothing(parts.model, groups[item.name], item))


class QuantizedState:
    """The weights of a smoothed model as a quantized graph takes them; see `state.State`.

    Args:
        parts: The model.
        record: Which layers are quantized.
    """

    def __init__(self, parts: Parts, record: QuantizationRecord) -> None:
        self._parts = parts
        self._number = FORMATS[record.precision]
        self._open = ExitStack()
        self._part = ""
        self._last: tuple[str, tuple[Tensor, Tensor]] | None = None
        self.input_scales = {name: item.input_scale for item in record.groups if not item.kept for name in item.linears}

    def _linear(self, name: str) -> tuple[str, str]:
        """The quantized layer that a tensor is the codes or the scale of, and which; empty for all others."""
        for ending in (CODES, SCALE):
            if name.endswith(f".weight{ending}") and (linear := name.removesuffix(f".weight{ending}")):
                return (linear, ending) if linear in self.input_scales else ("", "")
        return "", ""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `State`."""
        linear, which = self._linear(name)
        if linear:
            outputs, inputs = weight_of(self._parts.model, linear).shape
            return (inputs, outputs) if which == CODES else self._number.scale_shape(outputs, inputs)
        found = dict(self._parts.model.named_parameters()).get(name)
        return None if found is None else tuple(found.shape)

    def place(self, name: str) -> None:
        """See `State`: nothing is as it lies in a file."""

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """See `State`."""
        linear, which = self._linear(name)
        if (part := part_of(linear or name)) != self._part:
            self._open.close()
            self._open.enter_context(self._parts.part(part))
            self._part = part
        if not linear:
            found: Tensor = self._parts.model.get_parameter(name)
        else:
            if self._last is None or self._last[0] != linear:
                self._last = linear, self._number.encode_weight(weight_of(self._parts.model, linear))
            found = self._last[1][(CODES, SCALE).index(which)]
        return found if rows is None else found[rows[0] : rows[1]]

    def close(self) -> None:
        """Lets go of the part that is in memory."""
        self._open.close()
        self._part, self._last = "", None


def _search(model: NVEmbed, group: LinearGroup, seen: Inputs, number: Format) -> tuple[GroupRecord, ...]:
    """For each exponent the share with the smallest error, the best first; a group that does not fit is kept."""
    weights = [_some_outputs(weight_of(model, name)) for name in group.linears]
    unsmoothed = GroupRecord(
        name=group.name,
        linears=group.linears,
        exponent=0.0,
        share=1.0,
        input_scale=0.0,
        error=0.0,
        cost=0.0,
        weights=sum(weight_of(model, name).numel() for name in group.linears),
        kept=True,
        reason="does not divide into blocks",
        channel_ranges=pack(seen.largest),
    )
    if not all(number.fits(weight) for weight in weights):
        return (unsmoothed,)
    truth = [F.linear(seen.rows, weight) for weight in weights]
    found = []
    for exponent in EXPONENTS:
        factors = _factors(model, group, seen.largest, exponent)
        rows, largest = seen.rows / factors, float((seen.largest / factors).max())
        stored = [number.decode_weight(*number.encode_weight(weight * factors)) for weight in weights]
        best = replace(unsmoothed, exponent=exponent, error=torch.inf, kept=False, reason="")
        for share in SHARES if number.inputs else (1.0,):
            scale = number.input_scale(largest * share) if number.inputs else 0.0
            given = number.round_trip(rows, scale) if number.inputs else rows
            errors = [
                _relative_error(F.linear(given, part), wanted) for part, wanted in zip(stored, truth, strict=True)
            ]
            error = float(torch.stack(errors).mean())
            if error < best.error:
                best = replace(best, share=share, input_scale=scale, error=error)
        found.append(best)
    return tuple(sorted(found, key=lambda item: item.error))


def _some_outputs(weight: Tensor) -> Tensor:
    """Rows of a weight [N, K] from its whole length: an error's mean needs no more, and each has scales of its own."""
    if len(weight) <= SEARCHED_OUTPUTS:
        return weight
    return weight[torch.linspace(0, len(weight) - 1, SEARCHED_OUTPUTS).long()]


def _relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Each row counts the same, however large it is."""
    return ((found - wanted).square().sum(dim=1) / wanted.square().sum(dim=1).clamp_min(1e-20)).mean()


def _factors(model: NVEmbed, group: LinearGroup, largest: Tensor, exponent: float) -> Tensor:
    """SmoothQuant's factors [K]: the input's range to the exponent over the weights' to what is left, about 1."""
    if exponent == 0:
        return torch.ones_like(largest)
    columns = torch.stack([weight_of(model, name).abs().amax(dim=0) for name in group.linears]).amax(dim=0)
    factors = largest.clamp_min(FLOOR) ** exponent / columns.clamp_min(FLOOR) ** (1 - exponent)
    factors = group.tie(factors)
    return factors / factors.log().mean().exp()


@contextmanager
def simulated(model: NVEmbed, records: Sequence[GroupRecord], number: Format) -> Iterator[None]:
    """The model, smoothed already, with the layers of some groups computing on what their codes stand for."""
    with ExitStack() as undo:
        for record in records:
            undo.enter_context(_computing_on_codes(model, record, number))
        yield


@contextmanager
def _computing_on_codes(
    model: NVEmbed, record: GroupRecord, number: Format, factors: Tensor | float = 1.0
) -> Iterator[None]:
    with torch.no_grad(), ExitStack() as undo:
        for name in record.linears:
            linear = model.get_submodule(name)
            undo.callback(setattr, linear, "weight", linear.weight)
            stored = number.decode_weight(*number.encode_weight(weight_of(model, name) * factors))
            linear.weight = nn.Parameter(stored, requires_grad=False)
            hook = _smoothing_and_rounding(record.input_scale, number, factors)
            undo.callback(linear.register_forward_pre_hook(hook).remove)
        yield


def _smoothing_and_rounding(
    scale: float, number: Format, factors: Tensor | float
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def given(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        smoothed = args[0] / factors
        return (number.round_trip(smoothed, scale) if number.inputs else smoothed,)

    return given


@contextmanager
def _alone(model: NVEmbed, group: LinearGroup, record: GroupRecord, number: Format) -> Iterator[None]:
    """One group smoothed and quantized in a model that is neither."""
    factors = _factors(model, group, unpack(record.channel_ranges), record.exponent)
    with _computing_on_codes(model, record, number, factors):
        yield


def _ranking_rows(parts: Parts, text: TextEncoder, rows: Sequence[TokenRow], longest: int) -> list[TokenRow]:
    chosen = [row for row in probe_rows(text, longest)[1] if len(row) <= RANKING_LONGEST]
    tokens = 0
    for row in rows:
        if len(row) <= RANKING_LONGEST and tokens < RANKING_TOKENS:
            chosen.append(row)
            tokens += len(row)
    wanted = max(LEAST_RANKING_ROWS, len(chosen) * RANKED_PARAMETERS // max(RANKED_PARAMETERS, _parameters(parts)))
    return chosen[:: max(1, len(chosen) // wanted)]


def simulation(model: NVEmbed, records: Sequence[GroupRecord], number: Format) -> Watch:
    """`simulated` for each part while it is in memory."""
    return lambda part: simulated(model, [item for item in records if part_of(item.name) == part], number)


def _embed(parts: Parts, text: TextEncoder, rows: Sequence[TokenRow], *, watch: Watch = unwatched) -> Tensor:
    """float32 [N, D] of rows, many at a time: reading a wide model's weights takes longer than computing a row."""
    order, batches = in_batches(text, rows)
    found = parts.forward(batches, watch=watch, what="embedding, layer by layer")
    return found[torch.tensor(order).argsort()]


def _cheapest(
    parts: Parts,
    text: TextEncoder,
    rows: Sequence[TokenRow],
    groups: Sequence[LinearGroup],
    settings: Sequence[tuple[GroupRecord, ...]],
    number: Format,
) -> list[GroupRecord]:
    """Each group in the setting that costs least, when it alone is quantized. The model is not smoothed yet.

    Further settings are tried for the dearer half of the groups: the others cost little in any of the first ones.
    """
    best = [found[0] for found in settings]
    batches = in_batches(text, rows)[1]
    for place in range(1 if _parameters(parts) > RANKED_PARAMETERS else SETTINGS):
        middle = statistics.median(item.price for item in best)
        tried = {
            found[place].name: found[place]
            for found, item in zip(settings, best, strict=True)
            if place < len(found) and not item.kept and (place == 0 or item.price >= middle)
        }
        changes = {
            group.name: functools.partial(_alone, parts.model, group, tried[group.name], number)
            for group in groups
            if group.name in tried
        }
        truth, vectors = parts.variants(batches, changes, f"ranking groups, setting {place + 1}")
        costs = {name: 1 - float((truth * found).sum(dim=1).mean()) for name, found in vectors.items()}
        best = [
            replace(tried[item.name], cost=costs[item.name])
            if item.name in costs and (place == 0 or costs[item.name] < item.cost)
            else item
            for item in best
        ]
    return best


def _keep_until_it_holds(
    parts: Parts,
    text: TextEncoder,
    probes: Sequence[TokenRow],
    truth: Tensor,
    records: list[GroupRecord],
    number: Format,
) -> list[GroupRecord]:
    tolerance = TOLERANCES[number.precision]
    large = _parameters(parts) > RANKED_PARAMETERS

    def holds(kept: Set[str]) -> bool:
        taken = [item for item in records if not item.kept and item.name not in kept]
        found = _embed(parts, text, probes, watch=simulation(parts.model, taken, number))
        cosines = (truth * found).sum(dim=1)
        difference = float((truth - found).abs().max()) * (truth.shape[1] ** 0.5 if tolerance.scaled else 1.0)
        return all(
            float(part) <= allowed * (1 - MARGIN)
            for part, allowed in (
                (1 - cosines.min(), 1 - tolerance.min_cosine),
                (1 - cosines.mean(), 1 - tolerance.min_mean_cosine),
                (difference, tolerance.max_difference),
            )
        )

    worst_first = sorted((item for item in records if not item.kept), key=lambda item: -item.price)
    step = -(-len(worst_first) // LARGE_TRIES) if large else 1
    kept: set[str] = set()
    while not worst_first or not holds(kept):
        dearest = worst_first[len(kept) : len(kept) + step]
        if len(kept) + len(dearest) >= len(worst_first):
            raise nothing_left(number.precision)
        kept |= {item.name for item in dearest}
    largest_first = sorted((item for item in worst_first if item.name in kept), key=lambda item: -item.weights)
    for item in largest_first[: LARGE_TRIES if large else None]:
        if holds(kept - {item.name}):
            kept.remove(item.name)
    return [
        replace(item, kept=True, reason="among the dearest for their size") if item.name in kept else item
        for item in records
    ]
