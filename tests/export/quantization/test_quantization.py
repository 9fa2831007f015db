"""Quantization: number formats, smoothing, the choice of groups, the graph, and records that do not fit."""

import base64
import copy
import functools
import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from nvembed_deploy import Encoder
from nvembed_deploy.backends.ort import X64_QUANT_PRECISION
from nvembed_deploy.bundle.manifest import QUANTIZATION, QUANTIZATION_PICTURE
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.engines.targets import TARGETS, capable_gpus
from nvembed_deploy.errors import ConfigError, ExportError, ParityError
from nvembed_deploy.export import forecast, pipeline
from nvembed_deploy.export.graph.cpu_graph import write_cpu_graph
from nvembed_deploy.export.graph.trace import trace
from nvembed_deploy.export.graph.write import check, write
from nvembed_deploy.export.layerwise import LayerwiseModel, block_of, folded_form
from nvembed_deploy.export.quantization import search as quantization
from nvembed_deploy.export.quantization.calibration import InputCollector, built_in_texts, tokenize
from nvembed_deploy.export.quantization.formats import FORMATS, QUANTIZED_SUFFIX, SCALE_SUFFIX, rounded_scale
from nvembed_deploy.export.quantization.linear_groups import LinearGroup, linear_groups, smooth, weight_of
from nvembed_deploy.export.quantization.qdq import insert_qdq
from nvembed_deploy.export.quantization.quantized_weights import QuantizedWeights
from nvembed_deploy.export.quantization.record import (
    RECORD_VERSION,
    GroupRecord,
    QuantizationRecord,
    exclude_fp32,
    exclude_next,
    parse_record,
    write_record,
)
from nvembed_deploy.export.quantization.rounding import GptqRounding, Rounding, rounding_of
from nvembed_deploy.export.quantization.search import quantize
from nvembed_deploy.export.quantization.simulation import simulated, simulated_alone, simulation_hook
from nvembed_deploy.export.quantization.smoothing import apply_record
from nvembed_deploy.export.quantization.step import report_excluded
from nvembed_deploy.export.to_onnx import main as export_graph
from nvembed_deploy.export.trt import main
from nvembed_deploy.files.records import to_json
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.model.text_contract import text_contract
from nvembed_deploy.model.weights import StoredWeights
from nvembed_deploy.parity.compare import TOLERANCES
from nvembed_deploy.parity.probes import probe_rows
from nvembed_deploy.spec import Dialect, Precision
from nvembed_deploy.tokenization import TextEncoder, TokenRow
from tests.export.graph.test_graph import BEYOND_TENSORRT_10

QUANTIZED = [precision for precision in Precision if precision.quantized]
LONGEST = 48


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """The tiny model's layers are narrower than a block of 64."""
    original = FORMATS[Precision.INT4]
    FORMATS[Precision.INT4] = replace(original, block_size=16)
    yield
    FORMATS[Precision.INT4] = original


@pytest.fixture(scope="module")
def text(checkpoint: Path) -> TextEncoder:
    contract = text_contract(checkpoint, read_checkpoint_architecture(checkpoint))
    return TextEncoder((checkpoint / "tokenizer.json").read_bytes(), contract)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> NVEmbed:
    return folded_form(load_checkpoint(checkpoint), fold=True)


Quantized = tuple[NVEmbed, QuantizationRecord]
NEAREST_INT8 = Rounding(FORMATS[Precision.INT8])


@pytest.fixture(scope="module")
def roundings(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Rounding]:
    """The rounding of each precision; those by GPTQ have results once `quantized` has made them."""
    return {precision: rounding_of(precision, tmp_path_factory.mktemp(precision.value)) for precision in QUANTIZED}


@pytest.fixture(scope="module")
def quantized(
    plain: NVEmbed, text: TextEncoder, roundings: dict[Precision, Rounding]
) -> Callable[[Precision], Quantized]:
    """Quantizes the model to a precision, once each; returns the smoothed model and the record."""
    rows = tokenize(built_in_texts(), text, tokens=1500)

    @functools.cache
    def make(precision: Precision) -> Quantized:
        model = copy.deepcopy(plain)
        rounding = roundings[precision]
        return model, quantize(LayerwiseModel(model), text, rows, rounding, model_sha256="0" * 64, longest=LONGEST)

    return make


@pytest.mark.parametrize("precision", QUANTIZED)
def test_dequantized_weights_are_close(precision: Precision) -> None:
    fmt = FORMATS[precision]
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    quantized, scale = fmt.quantize_weight(weight)
    dequantized = fmt.dequantize_weight(quantized, scale)
    assert quantized.shape == (256, 24)
    assert torch.equal(scale, scale.half().float())  # the graph stores them in FP16
    assert torch.equal(dequantized[3], weight[3])
    # Half a step; FP8's largest steps are 32, NVFP4's 2, and INT4's values may be clipped.
    steps = {Precision.INT8: 0.5, Precision.FP8: 16.0, Precision.INT4: 2.7, Precision.NVFP4: 1.0}
    limit = steps[precision] * (
        scale[:, None] if fmt.block_size is None else scale.repeat_interleave(fmt.block_size, 0).T
    )
    assert ((dequantized - weight).abs() <= limit * 1.01 + 1e-6).all()
    assert fmt.min_value <= quantized.float().min() < quantized.float().max() <= fmt.max_value


def test_scales_reach_the_largest_value() -> None:
    max_abs = torch.tensor([1e-3, 0.3, 7.0, 500.0])
    assert torch.allclose(rounded_scale(max_abs, 127.0) * 127, max_abs, rtol=1e-3)
    assert rounded_scale(torch.zeros(1), 127.0) > 0


def test_every_linear_layer_is_in_one_group(plain: NVEmbed) -> None:
    names = [name for group in linear_groups(plain) for name in group.linears]
    linears = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(names) == len(set(names))
    assert set(names) == linears


@pytest.mark.parametrize("fold", [True, False])
def test_smoothing_changes_nothing(checkpoint: Path, text: TextEncoder, fold: bool) -> None:
    model = folded_form(load_checkpoint(checkpoint), fold=fold)
    rows = probe_rows(text, LONGEST)[1]
    before = LayerwiseModel(model).embed(text, rows)
    generator = torch.Generator().manual_seed(1)
    for group in linear_groups(model):
        weight = model.get_parameter(f"{group.linears[0]}.weight").clone()
        smooth(model, group, group.tie(torch.rand(weight.shape[1], generator=generator) * 3 + 0.3))
        assert not torch.equal(weight, model.get_parameter(f"{group.linears[0]}.weight"))
    assert (LayerwiseModel(model).embed(text, rows) - before).abs().max() < 2e-6


def test_rows_in_batches_equal_rows_alone(plain: NVEmbed, text: TextEncoder) -> None:
    rows = probe_rows(text, LONGEST)[1]
    alone, together = LayerwiseModel(plain).embed(text, rows), quantization._embed(LayerwiseModel(plain), text, rows)
    assert (alone - together).abs().max() < 2e-6


def test_the_search_samples_the_outputs_of_large_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.arange(10.0)[:, None].expand(10, 4)
    assert quantization._sampled_outputs(weight) is weight
    monkeypatch.setattr(quantization, "MAX_SEARCHED_OUTPUTS", 4)
    assert quantization._sampled_outputs(weight)[:, 0].tolist() == [0, 3, 6, 9]


@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])
def test_sensitivity_is_the_loss_with_one_group_quantized(
    checkpoint: Path, plain: NVEmbed, text: TextEncoder, streamed: bool, quantized: Callable[[Precision], Quantized]
) -> None:
    """Hidden states before a group are shared between the groups' runs; the result is that of separate runs."""
    weights = StoredWeights(checkpoint, read_checkpoint_architecture(checkpoint))
    layerwise = LayerwiseModel.from_checkpoint(weights, fold=True) if streamed else LayerwiseModel(plain)
    smoothed, quantization_record = quantized(Precision.INT8)
    rows = probe_rows(text, LONGEST)[1][:20]
    records, groups = [replace(record, excluded=False) for record in quantization_record.groups], linear_groups(plain)
    layerwise_groups = linear_groups(layerwise.model)
    ranking = quantization._rank_settings(
        layerwise, text, rows, layerwise_groups, [(record,) for record in records], NEAREST_INT8
    )
    reference = quantization._embed(LayerwiseModel(plain), text, rows)
    for group, record, ranked in zip(groups, records, ranking, strict=True):

        def hook(block: str, group: LinearGroup = group, record: GroupRecord = record) -> AbstractContextManager[None]:
            is_changed = block == block_of(record.name)
            return simulated_alone(plain, group, record, NEAREST_INT8) if is_changed else nullcontext()

        alone = quantization._embed(LayerwiseModel(plain), text, rows, hook=hook)
        assert ranked.sensitivity == pytest.approx(1 - float((reference * alone).sum(dim=1).mean()), abs=2e-6)
        smoothed_hook = simulation_hook(smoothed, [record], NEAREST_INT8)
        alone_in_smoothed = quantization._embed(LayerwiseModel(smoothed), text, rows, hook=smoothed_hook)
        loss = 1 - float((reference * alone_in_smoothed).sum(dim=1).mean())
        assert ranked.sensitivity == pytest.approx(loss, rel=0.3, abs=1e-5)
    assert max(ranked.sensitivity for ranked in ranking) > 1e-4
    if streamed:
        assert all(parameter.is_meta for parameter in layerwise.model.parameters())


def test_the_least_sensitive_setting_is_chosen(
    plain: NVEmbed, text: TextEncoder, quantized: Callable[[Precision], Quantized], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error may be larger: for the more sensitive half of the groups, and in a large model for none."""
    fine = [replace(record, excluded=False) for record in quantized(Precision.INT8)[1].groups]
    coarse = [replace(record, input_scale=record.input_scale * 50, error=record.error / 2) for record in fine]
    rows, groups = probe_rows(text, LONGEST)[1][:8], linear_groups(plain)

    def rank(settings: Sequence[tuple[GroupRecord, ...]]) -> list[GroupRecord]:
        return quantization._rank_settings(LayerwiseModel(plain), text, rows, groups, settings, NEAREST_INT8)

    both = list(zip(coarse, fine, strict=True))
    ranked_fine, ranked_coarse = (rank([(record,) for record in records]) for records in (fine, coarse))
    median = statistics.median(record.sensitivity_per_weight for record in ranked_coarse)
    assert rank(both) == [
        better if worse.sensitivity_per_weight >= median else worse
        for better, worse in zip(ranked_fine, ranked_coarse, strict=True)
    ]
    monkeypatch.setattr(quantization, "LARGE_MODEL_PARAMETERS", 1)
    assert [record.input_scale for record in rank(both)] == [record.input_scale for record in coarse]


def test_a_large_model_is_ranked_on_fewer_rows(
    plain: NVEmbed, text: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tokenize(built_in_texts(), text, tokens=500)
    layerwise = LayerwiseModel(plain)
    all_rows = quantization._ranking_rows(layerwise, text, rows, LONGEST)
    monkeypatch.setattr(quantization, "LARGE_MODEL_PARAMETERS", layerwise.parameter_count // 4)
    monkeypatch.setattr(quantization, "MIN_RANKING_ROWS", 1)
    assert quantization._ranking_rows(layerwise, text, rows, LONGEST) == all_rows[::4]
    monkeypatch.setattr(quantization, "MIN_RANKING_ROWS", 8)
    monkeypatch.setattr(quantization, "LARGE_MODEL_PARAMETERS", 1)
    assert 8 <= len(quantization._ranking_rows(layerwise, text, rows, LONGEST)) < 16


def test_a_model_without_a_quantizable_group_is_refused(
    plain: NVEmbed, text: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "MARGIN", 1.0)  # only a cosine of 1 is enough
    rows = tokenize(built_in_texts(), text, tokens=300)
    with pytest.raises(
        ParityError,
        match=r"no group of this model's layers can be quantized to int8 .* or export with --precision fp16",
    ):
        quantize(LayerwiseModel(copy.deepcopy(plain)), text, rows, NEAREST_INT8, model_sha256="", longest=LONGEST)
    rounding = GptqRounding(replace(FORMATS[Precision.INT4], block_size=37), tmp_path / "rounded")
    with pytest.raises(ExportError, match="int4 quantizes blocks of 37 inputs, and no layer"):
        quantize(LayerwiseModel(plain), text, rows, rounding, model_sha256="", longest=LONGEST)


def test_a_gate_that_never_passes_ends_with_the_remedy(
    quantized: Callable[[Precision], Quantized], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise ParityError("it differs")

    monkeypatch.setattr(pipeline, "_write_graphs", lambda _: None)
    state: Any = SimpleNamespace(
        gate=SimpleNamespace(graphs=refuse), record=quantized(Precision.INT8)[1], staging=tmp_path
    )
    with pytest.raises(ParityError, match=r"no group of this model's layers can be quantized .*; calibrate on more"):
        pipeline._write_passing_graphs(state)
    assert sum(not group.excluded for group in state.record.groups) == 1


@pytest.mark.parametrize("precision", QUANTIZED)
def test_the_forecast_counts_the_rounded_weights(tmp_path: Path, precision: Precision) -> None:
    rounding = GptqRounding(FORMATS[precision], tmp_path)
    rounding.fit("q_proj", torch.randn(256, 256, generator=torch.Generator().manual_seed(0)), torch.eye(256))
    stored = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert stored == pytest.approx(forecast._rounded_bytes(256 * 256, precision), rel=0.05)


def test_inputs_that_overflow_are_reported(tmp_path: Path) -> None:
    """The layer is named; scales are among their candidates even then."""
    for precision in QUANTIZED:
        rounding = GptqRounding(FORMATS[precision], tmp_path)
        with pytest.raises(ExportError, match="inputs of q_proj overflow FP32 on the calibration texts"):
            rounding.fit("q_proj", torch.ones(4, 64), torch.full((64, 64), torch.inf))
        scale = rounding.fmt.weight_scale(torch.ones(4, 64), importance=torch.full((64,), torch.nan))
        first_candidate = replace(rounding.fmt, range_ratios=rounding.fmt.range_ratios[:1])
        assert torch.equal(scale, first_candidate.weight_scale(torch.ones(4, 64)))


def collect(model: NVEmbed, groups: Sequence[LinearGroup], text: TextEncoder, rows: list[TokenRow]) -> dict:
    collector = InputCollector(LayerwiseModel(model), text, rows)
    with collector.collecting(groups) as collected:
        collector.layerwise.forward(collector.batches)
    return collected


def test_ranges_are_over_every_token(plain: NVEmbed, text: TextEncoder) -> None:
    """Padding is ignored, whatever it contains."""
    rows = tokenize(built_in_texts(), text, tokens=400)
    groups = linear_groups(plain)
    batched = collect(plain, groups, text, rows)
    single = [collect(plain, groups, text, [row]) for row in rows]
    for group in groups:
        channel_max = torch.stack([inputs[group.name].channel_max for inputs in single]).amax(dim=0)
        assert torch.allclose(batched[group.name].channel_max, channel_max, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "dialect"),
    [
        *[(precision, Dialect.FUSED) for precision in QUANTIZED],
        *[pytest.param(precision, Dialect.PORTABLE, marks=pytest.mark.slow) for precision in QUANTIZED],
    ],
)
def test_the_graph_computes_what_was_simulated(
    quantized: Callable[[Precision], Quantized],
    roundings: dict[Precision, Rounding],
    text: TextEncoder,
    tmp_path: Path,
    precision: Precision,
    dialect: Dialect,
) -> None:
    model, record = quantized(precision)
    fmt = FORMATS[precision]
    graph = trace(model.config, precision=precision, dialect=dialect, fold=True)
    weight_source = QuantizedWeights(LayerwiseModel(model), record, roundings[precision])
    insert_qdq(graph, weight_source.input_scales, fmt)
    write(graph, weight_source, tmp_path, name="model.onnx")
    write_cpu_graph(tmp_path / "model.onnx", tmp_path / "model.cpu.onnx")
    rows = probe_rows(text, LONGEST)[1]
    quantized_groups = [group for group in record.groups if not group.excluded]
    with simulated(model, quantized_groups, roundings[precision]):
        simulated_vectors = LayerwiseModel(model).embed(text, rows).numpy()
    assert weight_source.input_scales
    for name, level in (("model.onnx", "ORT_ENABLE_BASIC"), ("model.cpu.onnx", "ORT_ENABLE_ALL")):
        check(tmp_path / name)
        if name == "model.onnx" and not precision.runs_as_written:
            continue
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.add_session_config_entry(*X64_QUANT_PRECISION)
        session = onnxruntime.InferenceSession(tmp_path / name, options)
        for row, simulated_vector in zip(rows, simulated_vectors, strict=True):
            feed = dict(zip(("input_ids", "attention_mask", "pool_mask"), text.pad([row]), strict=True))
            vector = session.run(["sentence_embedding"], feed)[0][0]
            # FP16 rounds values near a tie the other way, and FP8's largest steps are 16 times INT8's.
            assert vector @ simulated_vector > (0.998 if precision is Precision.FP8 else 0.9995), name
    written = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    types = {tensor.name: tensor.data_type for tensor in written.graph.initializer}
    linears = weight_source.input_scales.keys()
    assert not {f"{name}.weight" for name in linears} & types.keys()
    stored_types = {"int8": "INT8", "fp8": "FLOAT8E4M3FN", "int4": "INT4", "nvfp4": "FLOAT4E2M1"}
    stored_type = getattr(onnx.TensorProto, stored_types[precision.value])
    assert all(types[f"{name}.weight{QUANTIZED_SUFFIX}"] == stored_type for name in linears)
    quantize_nodes = sum(node.op_type == "QuantizeLinear" for node in written.graph.node)
    assert quantize_nodes == (0 if precision.weight_only else len(quantized_groups))
    reused = GptqRounding(fmt, tmp_path / "reused")
    reused.copy_from(tmp_path / "model.onnx", model, linears)
    for name in linears:
        weight = weight_of(model, name)
        (values, scale), (copied, copied_scale) = (r.quantize(name, weight) for r in (roundings[precision], reused))
        assert torch.equal(values.float(), copied.float())
        assert torch.equal(scale, copied_scale)
    with pytest.raises(ValueError, match="is missing instead of"):
        reused.copy_from(tmp_path / "model.onnx", model, ["embedding_model.embed_tokens"])
    if dialect is Dialect.PORTABLE:
        assert not {node.op_type for node in written.graph.node} & BEYOND_TENSORRT_10
        assert written.opset_import[0].version == {"int4": 21, "nvfp4": 23}.get(precision.value, 20)


def test_zero_points_are_zero(quantized: Callable[[Precision], Quantized]) -> None:
    """TensorRT takes no others."""
    model, record = quantized(Precision.INT8)
    graph = trace(model.config, precision=Precision.INT8, dialect=Dialect.PORTABLE, fold=True)
    linears = QuantizedWeights(LayerwiseModel(model), record, NEAREST_INT8).input_scales
    insert_qdq(graph, dict.fromkeys(linears, 0.5), FORMATS[Precision.INT8])
    zeros = [node.inputs[2] for node in graph.graph if node.op_type == "QuantizeLinear"]
    assert zeros
    assert all(zero.const_value.numpy() == 0 and zero.const_value.dtype.name == "INT8" for zero in zeros)


@pytest.mark.parametrize("bound", ["min_cosine", "min_mean_cosine", "max_difference"])
def test_no_group_is_excluded_without_need(
    plain: NVEmbed, text: TextEncoder, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """In a model with a damaged layer, quantizing any of the excluded groups fails the gate."""
    original = TOLERANCES[Precision.INT8]
    loose = replace(original, min_cosine=0.0, min_mean_cosine=0.0, max_difference=100.0)
    tolerance = replace(loose, **{bound: 0.3 if bound == "max_difference" else getattr(original, bound)})
    monkeypatch.setitem(TOLERANCES, Precision.INT8, tolerance)
    model = copy.deepcopy(plain)
    damaged = "embedding_model.layers.1.mlp.down_proj"
    with torch.no_grad():
        weight = model.get_parameter(f"{damaged}.weight")
        weight[:, 0] = weight[:, 0] + 300 * weight.abs().max()  # one column determines the scale of every row
        model.get_parameter("embedding_model.layers.1.mlp.up_proj.weight")[0] /= 300
    rows = tokenize(built_in_texts(), text, tokens=800)
    record = quantize(LayerwiseModel(model), text, rows, NEAREST_INT8, model_sha256="", longest=LONGEST)
    gate_rows = probe_rows(text, LONGEST, everyday=True)[1]
    reference = LayerwiseModel(model).embed(text, gate_rows)

    def holds(groups: Sequence[GroupRecord]) -> bool:
        with simulated(model, groups, NEAREST_INT8):
            vectors = LayerwiseModel(model).embed(text, gate_rows)
        cosines = (reference * vectors).sum(dim=1)
        scaled_difference = float((reference - vectors).abs().max()) * reference.shape[1] ** 0.5
        usable = 1 - quantization.MARGIN
        return (
            float(1 - cosines.min()) <= (1 - tolerance.min_cosine) * usable
            and float(1 - cosines.mean()) <= (1 - tolerance.min_mean_cosine) * usable
            and scaled_difference <= tolerance.max_difference * usable
        )

    excluded = [group for group in record.groups if group.excluded]
    quantized_groups = [group for group in record.groups if not group.excluded]
    assert excluded
    assert holds(quantized_groups)
    assert not any(holds([*quantized_groups, group]) for group in excluded)
    words = {"min_cosine": "lowest cosine", "min_mean_cosine": "mean cosine", "max_difference": "largest difference"}
    exceeded = list(record.all_quantized.exceeded(record.bounds))
    assert len(exceeded) == 1
    assert exceeded[0].startswith(words[bound])
    assert torch.is_grad_enabled()


def test_groups_that_are_not_quantized_are_reported_with_the_bound_that_asks_for_it(
    quantized: Callable[[Precision], Quantized], capsys: pytest.CaptureFixture[str]
) -> None:
    record = quantized(Precision.INT8)[1]
    groups = tuple(replace(group, excluded=False, reason="") for group in record.groups)
    record = replace(record, groups=groups, all_quantized=record.bounds)
    report_excluded(record)
    assert not capsys.readouterr().err
    with_one_excluded = exclude_next(record, "because")
    assert with_one_excluded is not None
    report_excluded(with_one_excluded)
    share = r"  1 of \d+ groups of layers, \d+% of their weights, are not quantized"
    assert re.fullmatch(rf"{share}\n", capsys.readouterr().err)
    report_excluded(replace(with_one_excluded, all_quantized=replace(record.bounds, min_cosine=0.9321)))
    assert capsys.readouterr().err.endswith(
        "are not quantized; with all of them in int8: lowest cosine 0.9321, at least 0.9910 needed\n"
    )
    half_excluded = tuple(
        replace(group, weight_count=1, excluded=index % 2 == 0, reason="because" if index % 2 == 0 else "")
        for index, group in enumerate(groups)
    )
    report_excluded(replace(record, precision=Precision.INT4, groups=half_excluded))
    hint = (
        "50% of their weights, are not quantized (10.1 bits per weight; --precision int8 has 8 if it excludes none)\n"
    )
    assert hint in capsys.readouterr().err


def test_excluding_more_groups(quantized: Callable[[Precision], Quantized]) -> None:
    record: QuantizationRecord | None = quantized(Precision.INT8)[1]
    assert record is not None
    quantized_groups = [group for group in record.groups if not group.excluded]
    worst = max(quantized_groups, key=lambda group: group.sensitivity / group.weight_count)
    record = exclude_next(record, "because")
    assert record is not None
    worst_after = next(group for group in record.groups if group.name == worst.name)
    assert (worst_after.excluded, worst_after.reason) == (True, "because")
    for _ in range(len(quantized_groups) - 2):
        assert record is not None
        record = exclude_next(record, "because")
    assert record is not None
    assert sum(not group.excluded for group in record.groups) == 1
    assert exclude_next(record, "because") is None
    with pytest.raises(ParityError, match="no group"):
        exclude_fp32(record, {linear for group in record.groups for linear in group.linears})
    without_fp32 = exclude_fp32(quantized(Precision.INT8)[1], {"embedding_model.layers.0.mlp.up_proj"})
    reasons = {group.name: group.reason for group in without_fp32.groups}
    assert reasons["embedding_model.layers.0.mlp.gate_up"] == "near FP16's limit"


def test_a_record_reproduces_the_model(
    plain: NVEmbed, quantized: Callable[[Precision], Quantized], tmp_path: Path
) -> None:
    model, record = quantized(Precision.INT8)
    write_record(record, tmp_path / QUANTIZATION)
    reread = parse_record((tmp_path / QUANTIZATION).read_bytes())
    assert reread == record
    smoothed = copy.deepcopy(plain)
    apply_record(LayerwiseModel(smoothed), reread)
    tensors, expected = smoothed.state_dict(), model.state_dict()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_record_of_an_older_version_is_refused(quantized: Callable[[Precision], Quantized]) -> None:
    fields = to_json(quantized(Precision.INT8)[1]) | {"version": RECORD_VERSION - 1}
    message = f"it has format version {RECORD_VERSION - 1}, and this release reads version {RECORD_VERSION}"
    with pytest.raises(ValueError, match=message):
        parse_record(json.dumps(fields).encode())


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": 1}', b'{"version": "x"}'])
def test_a_broken_record_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        parse_record(content)


def test_a_record_of_other_layers_is_refused(plain: NVEmbed, quantized: Callable[[Precision], Quantized]) -> None:
    record = quantized(Precision.INT8)[1]
    with pytest.raises(ConfigError, match="belongs to a model with other layers"):
        apply_record(LayerwiseModel(copy.deepcopy(plain)), replace(record, groups=record.groups[1:]))


def packed(*ranges: float) -> str:
    return base64.b64encode(np.array(ranges, dtype="<f4").tobytes()).decode()


DAMAGED_GROUPS = {
    "no base64": ({"channel_ranges": "???"}, "channel_ranges is not base64 of 32-bit numbers"),
    "not ASCII": ({"channel_ranges": "é"}, "channel_ranges is not base64 of 32-bit numbers"),
    "half a number": ({"channel_ranges": "AAAA"}, "channel_ranges is not base64 of 32-bit numbers"),
    "no ranges": ({"channel_ranges": ""}, "channel_ranges is empty, or"),
    "a negative range": ({"channel_ranges": packed(*[-1.0] * 32)}, "channel_ranges is .* negative or not finite"),
    "a NaN range": ({"channel_ranges": packed(*[np.nan] * 32)}, "channel_ranges is .* negative or not finite"),
    "an infinite range": ({"channel_ranges": packed(*[np.inf] * 32)}, "channel_ranges is .* negative or not finite"),
    "one range": ({"channel_ranges": packed(1.0)}, "qkv has the ranges of 1 channels, and the model 32"),
    "too many ranges": ({"channel_ranges": packed(*[1.0] * 33)}, "qkv has the ranges of 33 channels, and the model 32"),
    "scale 0": ({"input_scale": 0.0}, "input_scale is 0.0, which is not a valid scale of int8 inputs"),
    "scale -1": ({"input_scale": -1.0}, "input_scale is -1.0, which is not a valid scale"),
    "a subnormal scale": ({"input_scale": 1e-9}, "input_scale is 1e-09, which is not a valid scale"),
    "a scale beyond FP16": ({"input_scale": 1e5}, "input_scale is 100000.0, which is not a valid scale"),
    "scale NaN": ({"input_scale": float("nan")}, "input_scale: expected a finite number"),
    "another scale": ({"input_scale": 0.5}, "qkv has input_scale 0.5, and its ranges give 0.0"),
    "alpha 50": ({"alpha": 50.0}, "alpha is 50.0, and must be from 0 to 1"),
    "alpha -1": ({"alpha": -1.0}, "alpha is -1.0, and must be"),
    "another alpha": ({"alpha": 0.123}, "qkv has input_scale .*, and its ranges give"),
    "clip ratio 0": ({"clip_ratio": 0.0}, "clip_ratio is 0.0, and must be above 0"),
    "clip ratio 2": ({"clip_ratio": 2.0}, "clip_ratio is 2.0, and must be above 0"),
    "another clip ratio": ({"clip_ratio": 0.11}, "qkv has input_scale .*, and its ranges give"),
    "error -1": ({"error": -1.0}, "its error is -1.0"),
    "no weights": ({"weight_count": 0}, "its weight_count 0"),
    "other weights": ({"weight_count": 5}, "qkv has 5 weights, and the model's"),
    "no layers": ({"linears": []}, "it has no layers"),
    "foreign layers": ({"linears": ["nowhere"]}, "qkv has the layers nowhere"),
    "a layer twice": ({"linears": ["x", "x"]}, "layer 'x' is duplicated"),
    "fewer layers": ({"linears": ["embedding_model.layers.0.self_attn.q_proj"]}, "qkv has the layers embedding_model"),
    "excluded without a reason": ({"excluded": True}, "an excluded group needs a reason"),
    "a reason without exclusion": ({"reason": "because"}, "an excluded group needs a reason"),
}


def reuse(fields: dict, model: NVEmbed) -> None:
    """Reads and applies a record as an export with --reuse does."""
    apply_record(LayerwiseModel(copy.deepcopy(model)), parse_record(json.dumps(fields).encode()))


@pytest.mark.parametrize("damage", DAMAGED_GROUPS)
def test_a_record_of_impossible_settings_is_refused(
    plain: NVEmbed, quantized: Callable[[Precision], Quantized], damage: str
) -> None:
    change, message = DAMAGED_GROUPS[damage]
    record = to_json(replace(quantized(Precision.INT8)[1]))
    record["groups"][0] |= {"excluded": False, "reason": ""}
    reuse(record, plain)
    record["groups"][0] |= change
    with pytest.raises(ValueError, match=message):
        reuse(record, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda groups: groups.append(groups[0]), r"group '.*layers\.0\.self_attn\.qkv' is duplicated"),
        (lambda groups: groups.clear(), "it quantizes no group of layers"),
        (
            lambda groups: [group.update(excluded=True, reason="because") for group in groups],
            "it quantizes no group of layers",
        ),
        (lambda groups: groups.pop(), "belongs to a model with other layers"),
        (lambda groups: groups[0].update(name="x"), "belongs to a model with other layers"),
    ],
    ids=["a group twice", "no groups", "all excluded", "a group less", "a foreign group"],
)
def test_a_record_of_impossible_groups_is_refused(
    plain: NVEmbed,
    quantized: Callable[[Precision], Quantized],
    change: Callable[[list], object],
    message: str,
) -> None:
    record = to_json(quantized(Precision.INT8)[1])
    change(record["groups"])
    with pytest.raises(ValueError, match=message):
        reuse(record, plain)


def test_the_order_of_a_records_groups_changes_nothing(
    plain: NVEmbed, quantized: Callable[[Precision], Quantized]
) -> None:
    model, record = quantized(Precision.INT8)
    smoothed = copy.deepcopy(plain)
    apply_record(LayerwiseModel(smoothed), replace(record, groups=record.groups[::-1]))
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in smoothed.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp8", "--target", "jetson-orin"], "needs a GPU of compute capability 8.9 or newer"),
        (
            ["--precision", "nvfp4", "--target", "jetson-orin"],
            "needs a GPU of compute capability 10.0 or newer, and --target jetson-orin is 8.7; use --precision int4, "
            "which is as small, or int8",
        ),
        (["--precision", "fp16", "--calibration", "x.jsonl"], "--calibration is for quantized precisions"),
        (["--precision", "int8", "--calibration", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--precision", "int8", "--reuse", "nowhere"], "--reuse nowhere cannot be used (it does not exist)"),
    ],
)
def test_wrong_flags(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert main(["--model", str(checkpoint), "--out", str(out), *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1  # before any step
    assert not out.exists()


def test_plans_leave_out_older_gpus() -> None:
    assert capable_gpus(TARGETS["rtx"], Precision.FP8) == ("8.9", "12.0")
    assert capable_gpus(TARGETS["rtx"], Precision.NVFP4) == ("12.0",)
    assert capable_gpus(TARGETS["jetson-thor"], Precision.NVFP4) == ("11.0",)
    assert capable_gpus(TARGETS["rtx"], Precision.INT8) == TARGETS["rtx"].compute_capabilities


def test_an_int8_bundle_has_its_record(bundles: dict[str, Path]) -> None:
    bundle = Bundle.open(bundles["int8"])
    assert {QUANTIZATION, QUANTIZATION_PICTURE, "model.cpu.onnx"} <= bundle.manifest.files.keys()
    record = json.loads(bundle.read(QUANTIZATION))
    assert record["tokens"] > 1000
    assert len(record["model_sha256"]) == len(record["texts_sha256"]) == 64
    assert {report.candidate.partition("(")[2][:7] for report in bundle.manifest.parity} == {"", "CPU gra"}
    for report in bundle.manifest.parity:
        assert report.overlap is not None
        assert report.overlap >= 0.95
        assert report.mean_cosine >= 0.998
    encoder = Encoder(bundles["int8"], device="cpu")
    assert "unsigned quantized values" in encoder.backend


def test_the_command_and_its_record_reused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    varied = [calibration.text for calibration in built_in_texts()[:40]]  # nine similar ones would not be enough
    texts.write_text("\n".join(json.dumps({"text": query, "instruction": "Find it"}) for query in varied))
    searched, reused = tmp_path / "searched", tmp_path / "reused"
    common = ["--model", str(checkpoint), "--precision", "int8", "--max", "4x48"]
    assert export_graph([*common, "--calibration", str(texts), "--out", str(searched)]) == 0
    assert Bundle.open(searched).manifest.plan is None
    progress = capsys.readouterr().err
    assert "quantizing to int8 on 40 texts" in progress
    assert "this takes roughly 1 min, and starts over if it is interrupted: its result is stored with " in progress
    assert f"--reuse {searched} reuses it for another target or dialect" in progress
    reusing = [*common, "--dialect", "portable", "--reuse", str(searched), "--out", str(reused)]
    assert export_graph(reusing) == 0
    assert "reusing the quantization of" in capsys.readouterr().err
    records = [json.loads((folder / QUANTIZATION).read_text()) for folder in (searched, reused)]
    assert records[0] == records[1]
    excluded = sum(group["excluded"] for group in records[0]["groups"])
    assert f"  {excluded} of {len(records[0]['groups'])} groups of layers, " in progress
    assert export_graph([*reusing, "--calibration-tokens", "10", "--calibration", str(texts)]) == 1
    assert "does not match this export: its calibration texts' hash is" in capsys.readouterr().err


def test_a_vector_does_not_depend_on_its_neighbours(bundles: dict[str, Path]) -> None:
    """Scales are fixed, so unlike in dynamic quantization the other texts of a batch do not change a vector."""
    encoder = Encoder(bundles["int8"], device="cpu")
    alone = encoder.encode("rain on the roof")
    in_batch = encoder.encode(["rain on the roof", "!!!! ???? " * 20, "def f(x): return x"])[0]
    assert np.abs(alone - in_batch).max() < 1e-5


def test_excluded_groups_are_explained(quantized: Callable[[Precision], Quantized]) -> None:
    for group in quantized(Precision.INT8)[1].groups:
        assert bool(group.reason) == group.excluded
        assert group.error >= 0
        assert group.input_scale > 0


def test_weights_of_eight_bits_are_rounded_by_gptq_too(
    quantized: Callable[[Precision], Quantized], roundings: dict[Precision, Rounding], plain: NVEmbed, text: TextEncoder
) -> None:
    """FP8's: by weights alone, less is lost than with the nearest values."""
    model, record = quantized(Precision.FP8)
    rows = probe_rows(text, LONGEST)[1]
    expected = LayerwiseModel(plain).embed(text, rows)
    weight_only = replace(FORMATS[Precision.FP8], quantizes_inputs=False)

    def loss(rounding: Rounding) -> float:
        hook = simulation_hook(model, [group for group in record.groups if not group.excluded], rounding)
        return 1 - float((expected * LayerwiseModel(model).embed(text, rows, hook=hook)).sum(dim=1).mean())

    by_gptq = roundings[Precision.FP8]
    assert isinstance(by_gptq, GptqRounding)
    assert loss(GptqRounding(weight_only, by_gptq.folder)) < 0.7 * loss(Rounding(weight_only))


def test_a_streamed_model_is_quantized_the_same(checkpoint: Path, plain: NVEmbed, text: TextEncoder) -> None:
    """One block in memory at a time: the same ranges, smoothing, quantized values and embeddings."""
    rows = tokenize(built_in_texts(), text, tokens=600)
    weights = StoredWeights(checkpoint, read_checkpoint_architecture(checkpoint))
    streamed, in_memory = LayerwiseModel.from_checkpoint(weights, fold=True), LayerwiseModel(copy.deepcopy(plain))
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    probes = probe_rows(text, LONGEST)[1]
    assert torch.allclose(streamed.embed(text, probes), in_memory.embed(text, probes), atol=1e-6)
    records = [
        quantize(layerwise, text, rows, NEAREST_INT8, model_sha256="0" * 64, longest=LONGEST)
        for layerwise in (streamed, in_memory)
    ]
    for streamed_group, group in zip(records[0].groups, records[1].groups, strict=True):
        assert streamed_group.name == group.name
        assert (streamed_group.alpha, streamed_group.clip_ratio) == (group.alpha, group.clip_ratio)
        assert streamed_group.input_scale == pytest.approx(group.input_scale, rel=2e-3)
    record = replace(records[1], groups=tuple(replace(group, excluded=False) for group in records[1].groups))
    streamed_weights, memory_weights = (
        QuantizedWeights(layerwise, record, NEAREST_INT8) for layerwise in (streamed, in_memory)
    )
    for linear in record.groups[3].linears + record.groups[-1].linears + record.groups[0].linears:
        for name in (f"{linear}.weight{QUANTIZED_SUFFIX}", f"{linear}.weight{SCALE_SUFFIX}"):
            streamed_tensor, tensor = streamed_weights.read(name), memory_weights.read(name)
            assert streamed_weights.shape(name) == memory_weights.shape(name) == tuple(streamed_tensor.shape)
            assert (streamed_tensor.float() - tensor.float()).abs().max() <= 1.0
    norm = "embedding_model.norm.weight"
    assert torch.allclose(streamed_weights.read(norm), memory_weights.read(norm), rtol=1e-4)
    streamed_weights.close()
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


def test_a_streamed_model_is_rounded_the_same(
    checkpoint: Path, plain: NVEmbed, text: TextEncoder, tmp_path: Path
) -> None:
    """GPTQ with one block in memory: the same values, and the errors of each group's setting."""
    rows = tokenize(built_in_texts(), text, tokens=300)
    weights = StoredWeights(checkpoint, read_checkpoint_architecture(checkpoint))
    roundings, errors = [], []
    for name, layerwise in (
        ("streamed", LayerwiseModel.from_checkpoint(weights, fold=True)),
        ("in memory", LayerwiseModel(plain)),
    ):
        rounding = GptqRounding(FORMATS[Precision.INT4], tmp_path / name)
        collector = InputCollector(layerwise, text, rows)
        settings = quantization._search_settings(layerwise, linear_groups(layerwise.model), collector, rounding)
        assert {len(group_settings) for group_settings in settings} == {1}
        errors.append([group_settings[0].error for group_settings in settings])
        roundings.append(rounding)
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    for group in linear_groups(plain):
        for linear in group.linears:
            weight = weight_of(plain, linear)
            if not FORMATS[Precision.INT4].fits(weight):
                continue
            (values, scale), (expected, expected_scale) = (rounding.quantize(linear, weight) for rounding in roundings)
            assert torch.allclose(scale, expected_scale, rtol=2e-3)
            assert (values != expected).float().mean() < 0.05


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_an_export_that_never_loads_the_model(
    checkpoint: Path, bundles: dict[str, Path], tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvembed_deploy.export import pipeline, to_onnx

    monkeypatch.setattr(pipeline, "PyTorchBackend", None)
    flags = ["--model", str(checkpoint), "--out", str(tmp_path / "b"), "--max", "32x128", "--no-parity"]
    assert to_onnx.main([*flags, "--precision", precision, "--probe-ranges"]) == 0
    vectors, expected = (
        Encoder(bundle, device="cpu").encode(["the water over the passage", "a"])
        for bundle in (tmp_path / "b", bundles[precision])
    )
    assert (vectors * expected).sum(axis=1).min() > 0.99
