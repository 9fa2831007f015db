"""Quantization: formats, smoothing, what is chosen, what stands in the graph, and that records are not used stale."""

import copy
import functools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from nvembed_deploy import Encoder
from nvembed_deploy.backends.ort import WHOLE_PRODUCTS
from nvembed_deploy.bundle.manifest import QUANTIZATION, QUANTIZATION_PICTURE
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.engines.targets import TARGETS, capable
from nvembed_deploy.errors import ConfigError, ParityError
from nvembed_deploy.export.graph.cpu_graph import write_cpu_graph
from nvembed_deploy.export.graph.trace import trace
from nvembed_deploy.export.graph.write import check, write
from nvembed_deploy.export.layerwise import Parts, folded_form, part_of
from nvembed_deploy.export.quantization import search as quantization
from nvembed_deploy.export.quantization.calibration import Collector, built_in_texts, tokenize
from nvembed_deploy.export.quantization.formats import FORMATS, rounded_scale
from nvembed_deploy.export.quantization.linear_groups import LinearGroup, linear_groups, smooth
from nvembed_deploy.export.quantization.qdq import CODES, insert
from nvembed_deploy.export.quantization.record import (
    GroupRecord,
    QuantizationRecord,
    keep_next,
    keep_wide,
    read_record,
    write_record,
)
from nvembed_deploy.export.quantization.search import QuantizedState, apply_record, quantize, simulated, simulation
from nvembed_deploy.export.to_onnx import main as export_graph
from nvembed_deploy.export.trt import main
from nvembed_deploy.model import source
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.family import read_checkpoint_architecture
from nvembed_deploy.model.nvembed import NVEmbed
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
    as_built = FORMATS[Precision.INT4]
    FORMATS[Precision.INT4] = replace(as_built, block=16)
    yield
    FORMATS[Precision.INT4] = as_built


@pytest.fixture(scope="module")
def text(checkpoint: Path) -> TextEncoder:
    contract = source.text_contract(checkpoint, read_checkpoint_architecture(checkpoint))
    return TextEncoder((checkpoint / "tokenizer.json").read_bytes(), contract)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> NVEmbed:
    return folded_form(load_checkpoint(checkpoint), fold=True)


Made = tuple[NVEmbed, QuantizationRecord]


@pytest.fixture(scope="module")
def made(plain: NVEmbed, text: TextEncoder) -> Callable[[Precision], Made]:
    """The smoothed model and the record of each precision, each made once."""
    rows = tokenize(built_in_texts(), text, tokens=1500)

    @functools.cache
    def make(precision: Precision) -> Made:
        model = copy.deepcopy(plain)
        return model, quantize(Parts(model), text, rows, precision, model_sha256="0" * 64, longest=LONGEST)

    return make


@pytest.mark.parametrize("precision", QUANTIZED)
def test_codes_come_back_close(precision: Precision) -> None:
    number = FORMATS[precision]
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    codes, scale = number.encode_weight(weight)
    back = number.decode_weight(codes, scale)
    assert codes.shape == (256, 24)
    assert torch.equal(scale, scale.half().float())  # as the graph holds them
    assert torch.equal(back[3], weight[3])
    # Half a step; FP8 has steps of 32 at its end, and 4 bits may be clipped.
    steps = {Precision.INT8: 0.5, Precision.FP8: 16.0, Precision.INT4: 2.7}
    limit = steps[precision] * (scale if number.block is None else scale.repeat_interleave(number.block, 0).T)
    assert ((back - weight).abs() <= (limit[:, None] if number.block is None else limit) * 1.01 + 1e-6).all()
    assert number.smallest <= codes.float().min() < codes.float().max() <= number.largest


def test_scales_reach_the_largest_value() -> None:
    largest = torch.tensor([1e-3, 0.3, 7.0, 500.0])
    assert torch.allclose(rounded_scale(largest, 127.0) * 127, largest, rtol=1e-3)
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
    before = Parts(model).embed(text, rows)
    generator = torch.Generator().manual_seed(1)
    for group in linear_groups(model):
        width = model.get_parameter(f"{group.linears[0]}.weight").shape[1]
        weight = model.get_parameter(f"{group.linears[0]}.weight").clone()
        smooth(model, group, group.tie(torch.rand(width, generator=generator) * 3 + 0.3))
        assert not torch.equal(weight, model.get_parameter(f"{group.linears[0]}.weight"))
    assert (Parts(model).embed(text, rows) - before).abs().max() < 2e-6


def test_rows_in_batches_are_rows_alone(plain: NVEmbed, text: TextEncoder) -> None:
    rows = probe_rows(text, LONGEST)[1]
    alone, together = Parts(plain).embed(text, rows), quantization._embed(Parts(plain), text, rows)
    assert (alone - together).abs().max() < 2e-6


def test_the_search_computes_some_of_many_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.arange(10.0)[:, None].expand(10, 4)
    assert quantization._some_outputs(weight) is weight
    monkeypatch.setattr(quantization, "SEARCHED_OUTPUTS", 4)
    assert quantization._some_outputs(weight)[:, 0].tolist() == [0, 3, 6, 9]


@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])
def test_the_ranking_is_what_each_group_alone_costs(
    checkpoint: Path, plain: NVEmbed, text: TextEncoder, streamed: bool, made: Callable[[Precision], Made]
) -> None:
    """States before a group are shared with the other groups' runs; the costs are those of a run for each."""
    weights = StoredWeights(checkpoint, read_checkpoint_architecture(checkpoint))
    parts = Parts.of_checkpoint(weights, fold=True) if streamed else Parts(plain)
    found, number, rows = made(Precision.INT8)[1].groups, FORMATS[Precision.INT8], probe_rows(text, LONGEST)[1][:20]
    records, groups = [replace(item, kept=False) for item in found], linear_groups(parts.model)
    ranked = quantization._cheapest(parts, text, rows, groups, [(item,) for item in records], number)
    truth = quantization._embed(Parts(plain), text, rows)
    smoothed = made(Precision.INT8)[0]
    for group, record, item in zip(linear_groups(plain), records, ranked, strict=True):

        def watch(part: str, group: LinearGroup = group, record: GroupRecord = record) -> AbstractContextManager[None]:
            changed = part == part_of(record.name)
            return quantization._alone(plain, group, record, number) if changed else nullcontext()

        alone = quantization._embed(Parts(plain), text, rows, watch=watch)
        assert item.cost == pytest.approx(1 - float((truth * alone).sum(dim=1).mean()), abs=2e-6)
        folded = quantization._embed(Parts(smoothed), text, rows, watch=simulation(smoothed, [record], number))
        assert item.cost == pytest.approx(1 - float((truth * folded).sum(dim=1).mean()), rel=0.3, abs=1e-5)
    assert max(item.cost for item in ranked) > 1e-4
    if streamed:
        assert all(parameter.is_meta for parameter in parts.model.parameters())


def test_the_setting_is_taken_that_costs_least(
    plain: NVEmbed, text: TextEncoder, made: Callable[[Precision], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the error of a group's own outputs is: for the dearer half, and in a large model for none."""
    good = [replace(item, kept=False) for item in made(Precision.INT8)[1].groups]
    coarse = [replace(item, input_scale=item.input_scale * 50, error=item.error / 2) for item in good]
    rows, groups = probe_rows(text, LONGEST)[1][:8], linear_groups(plain)
    settings, number = list(zip(coarse, good, strict=True)), FORMATS[Precision.INT8]
    found = quantization._cheapest(Parts(plain), text, rows, groups, settings, number)
    alone, bad = (
        quantization._cheapest(Parts(plain), text, rows, groups, [(item,) for item in items], number)
        for items in (good, coarse)
    )
    middle = statistics.median(item.price for item in bad)
    assert found == [better if worse.price >= middle else worse for better, worse in zip(alone, bad, strict=True)]
    monkeypatch.setattr(quantization, "RANKED_PARAMETERS", 1)
    found = quantization._cheapest(Parts(plain), text, rows, groups, settings, number)
    assert [item.input_scale for item in found] == [item.input_scale for item in coarse]


def test_a_large_model_is_ranked_on_fewer_rows(
    plain: NVEmbed, text: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tokenize(built_in_texts(), text, tokens=500)
    parts = Parts(plain)
    every = quantization._ranking_rows(parts, text, rows, LONGEST)
    parameters = sum(item.numel() for item in plain.parameters())
    monkeypatch.setattr(quantization, "RANKED_PARAMETERS", parameters // 4)
    monkeypatch.setattr(quantization, "LEAST_RANKING_ROWS", 1)
    assert quantization._ranking_rows(parts, text, rows, LONGEST) == every[::4]
    monkeypatch.setattr(quantization, "LEAST_RANKING_ROWS", 8)
    monkeypatch.setattr(quantization, "RANKED_PARAMETERS", 1)
    assert 8 <= len(quantization._ranking_rows(parts, text, rows, LONGEST)) < 16


def test_a_model_of_which_nothing_can_be_quantized_is_refused(
    plain: NVEmbed, text: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "MARGIN", 1.0)  # no cosine but 1 is enough
    rows = tokenize(built_in_texts(), text, tokens=300)
    with pytest.raises(
        ParityError, match=r"no group of this model's layers can be int8 .* or export with --precision fp16"
    ):
        quantize(Parts(copy.deepcopy(plain)), text, rows, Precision.INT8, model_sha256="", longest=LONGEST)


def collected(model: NVEmbed, groups: Sequence[LinearGroup], text: TextEncoder, rows: list[TokenRow]) -> dict:
    collector = Collector(Parts(model), text, rows)
    with collector.watching(groups) as seen:
        collector.parts.forward(collector.batches)
    return seen


def test_ranges_are_over_every_token(plain: NVEmbed, text: TextEncoder) -> None:
    """Padding is not looked at, whatever stands in it."""
    rows = tokenize(built_in_texts(), text, tokens=400)
    groups = linear_groups(plain)
    together = collected(plain, groups, text, rows)
    alone = [collected(plain, groups, text, [row]) for row in rows]
    for group in groups:
        largest = torch.stack([found[group.name].largest for found in alone]).amax(dim=0)
        assert torch.allclose(together[group.name].largest, largest, atol=1e-5)


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("dialect", list(Dialect))
def test_the_graph_computes_what_was_simulated(
    made: Callable[[Precision], Made], text: TextEncoder, tmp_path: Path, precision: Precision, dialect: Dialect
) -> None:
    model, record = made(precision)
    number = FORMATS[precision]
    graph = trace(model.config, precision=precision, dialect=dialect, fold=True)
    state = QuantizedState(Parts(model), record)
    layers = state.input_scales
    insert(graph, layers, number)
    write(graph, state, tmp_path, name="model.onnx")
    write_cpu_graph(tmp_path / "model.onnx", tmp_path / "model.cpu.onnx")
    rows = probe_rows(text, LONGEST)[1]
    with simulated(model, [item for item in record.groups if not item.kept], number):
        wanted = Parts(model).embed(text, rows).numpy()
    assert layers
    for name, level in (("model.onnx", "ORT_ENABLE_BASIC"), ("model.cpu.onnx", "ORT_ENABLE_ALL")):
        check(tmp_path / name)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.add_session_config_entry(*WHOLE_PRODUCTS)
        session = onnxruntime.InferenceSession(tmp_path / name, options)
        for row, vector in zip(rows, wanted, strict=True):
            feed = dict(zip(("input_ids", "attention_mask", "pool_mask"), text.pad([row]), strict=True))
            found = session.run(["sentence_embedding"], feed)[0][0]
            # FP16 turns codes over that are near a tie, and FP8's last steps are 16 times those of INT8.
            assert found @ vector > (0.998 if precision is Precision.FP8 else 0.9995), name
    written = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    kinds = {tensor.name: tensor.data_type for tensor in written.graph.initializer}
    assert not {f"{name}.weight" for name in layers} & kinds.keys()
    wanted_type = {"int8": "INT8", "fp8": "FLOAT8E4M3FN", "int4": "INT4"}[precision.value]
    assert all(kinds[f"{name}.weight{CODES}"] == getattr(onnx.TensorProto, wanted_type) for name in layers)
    pairs = sum(node.op_type == "QuantizeLinear" for node in written.graph.node)
    assert pairs == (0 if precision is Precision.INT4 else len({item.name for item in record.groups if not item.kept}))
    if dialect is Dialect.PORTABLE:
        assert not {node.op_type for node in written.graph.node} & BEYOND_TENSORRT_10
        assert written.opset_import[0].version == (21 if precision is Precision.INT4 else 20)


def test_zero_points_are_zero(made: Callable[[Precision], Made]) -> None:
    """TensorRT takes no others."""
    model, record = made(Precision.INT8)
    graph = trace(model.config, precision=Precision.INT8, dialect=Dialect.PORTABLE, fold=True)
    insert(graph, dict.fromkeys(QuantizedState(Parts(model), record).input_scales, 0.5), FORMATS[Precision.INT8])
    zeros = [node.inputs[2] for node in graph.graph if node.op_type == "QuantizeLinear"]
    assert zeros
    assert all(zero.const_value.numpy() == 0 and zero.const_value.dtype.name == "INT8" for zero in zeros)


@pytest.mark.parametrize("bound", ["min_cosine", "min_mean_cosine", "max_difference"])
def test_none_is_kept_that_the_bound_holds_without(
    plain: NVEmbed, text: TextEncoder, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """A spoilt layer, which smoothing saves or not; whatever is kept, each of it alone is too much for the gate."""
    asked = TOLERANCES[Precision.INT8]
    loose = replace(asked, min_cosine=0.0, min_mean_cosine=0.0, max_difference=100.0)
    tolerance = replace(loose, **{bound: 0.3 if bound == "max_difference" else getattr(asked, bound)})
    monkeypatch.setitem(TOLERANCES, Precision.INT8, tolerance)
    model = copy.deepcopy(plain)
    spoilt = "embedding_model.layers.1.mlp.down_proj"
    with torch.no_grad():
        weight = model.get_parameter(f"{spoilt}.weight")
        weight[:, 0] = weight[:, 0] + 300 * weight.abs().max()  # one column eats up every row's scale
        model.get_parameter("embedding_model.layers.1.mlp.up_proj.weight")[0] /= 300
    rows = tokenize(built_in_texts(), text, tokens=800)
    number = FORMATS[Precision.INT8]
    found = quantize(Parts(model), text, rows, Precision.INT8, model_sha256="", longest=LONGEST)
    probes = probe_rows(text, LONGEST)[1]
    truth = Parts(model).embed(text, probes)

    def holds(quantized: Sequence[GroupRecord]) -> bool:
        with simulated(model, quantized, number):
            vectors = Parts(model).embed(text, probes)
        cosines = (truth * vectors).sum(dim=1)
        part = 1 - quantization.MARGIN
        return (
            float(1 - cosines.min()) <= (1 - tolerance.min_cosine) * part
            and float(1 - cosines.mean()) <= (1 - tolerance.min_mean_cosine) * part
            and float((truth - vectors).abs().max()) * truth.shape[1] ** 0.5 <= tolerance.max_difference * part
        )

    quantized, kept = ([item for item in found.groups if item.kept is wanted] for wanted in (False, True))
    assert kept
    assert holds(quantized)
    assert not any(holds([*quantized, item]) for item in kept)
    assert torch.is_grad_enabled()


def test_keeping_more(made: Callable[[Precision], Made]) -> None:
    record: QuantizationRecord | None = made(Precision.INT8)[1]
    assert record is not None
    left = sum(not item.kept for item in record.groups)
    dearest = max((item for item in record.groups if not item.kept), key=lambda item: item.cost / item.weights)
    record = keep_next(record, "because")
    assert record is not None
    now = next(item for item in record.groups if item.name == dearest.name)
    assert (now.kept, now.reason) == (True, "because")
    for _ in range(left - 2):
        assert record is not None
        record = keep_next(record, "because")
    assert record is not None
    assert sum(not item.kept for item in record.groups) == 1
    assert keep_next(record, "because") is None
    with pytest.raises(ParityError, match="no group"):
        keep_wide(record, {name for item in record.groups for name in item.linears})
    wide = keep_wide(made(Precision.INT8)[1], {"embedding_model.layers.0.mlp.up_proj"})
    reasons = {item.name: item.reason for item in wide.groups}
    assert reasons["embedding_model.layers.0.mlp.gate_up"] == "near FP16's limit"


def test_a_record_makes_the_same_again(plain: NVEmbed, made: Callable[[Precision], Made], tmp_path: Path) -> None:
    model, record = made(Precision.INT8)
    write_record(record, tmp_path / QUANTIZATION)
    read = read_record(tmp_path, precision=Precision.INT8, model_sha256="0" * 64, texts=record.texts_sha256)
    assert read == record
    again = copy.deepcopy(plain)
    apply_record(Parts(again), read)
    state, wanted = again.state_dict(), model.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"precision": Precision.FP8}, "precision is int8, not fp8"),
        ({"model_sha256": "1" * 64}, "model is 0000"),
        ({"texts": "f" * 64}, "calibration texts is"),
    ],
)
def test_a_stale_record_is_refused(
    made: Callable[[Precision], Made], tmp_path: Path, given: dict[str, object], what: str
) -> None:
    write_record(made(Precision.INT8)[1], tmp_path / QUANTIZATION)
    wanted = {"precision": Precision.INT8, "model_sha256": "0" * 64, "texts": None} | given
    with pytest.raises(ConfigError, match=f"stale: its {what}"):
        read_record(tmp_path, **wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1}', '{"version": "x"}'])
def test_a_broken_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / QUANTIZATION).write_text(content)
    with pytest.raises(ConfigError, match="cannot be used"):
        read_record(tmp_path, precision=Precision.INT8, model_sha256="", texts=None)


def test_a_record_of_other_layers_is_refused(plain: NVEmbed, made: Callable[[Precision], Made]) -> None:
    record = made(Precision.INT8)[1]
    with pytest.raises(ConfigError, match="of a model with other layers"):
        apply_record(Parts(copy.deepcopy(plain)), replace(record, groups=record.groups[1:]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp8", "--target", "jetson-orin"], "needs a GPU of compute capability 8.9 or newer"),
        (["--precision", "fp16", "--calibration", "x.jsonl"], "--calibration is for quantized precisions"),
        (["--precision", "int8", "--calibration", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--precision", "int8", "--reuse", "nowhere"], "--reuse nowhere cannot be used"),
    ],
)
def test_wrong_flags(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert main(["--model", str(checkpoint), "--out", str(out), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_fp8_plans_leave_out_older_gpus() -> None:
    assert capable(TARGETS["rtx"], Precision.FP8) == ("8.9", "12.0")
    assert capable(TARGETS["rtx"], Precision.INT8) == TARGETS["rtx"].compute_capabilities


def test_an_int8_bundle_tells_how_it_was_made(bundles: dict[str, Path]) -> None:
    bundle = Bundle.open(bundles["int8"])
    assert {QUANTIZATION, QUANTIZATION_PICTURE, "model.cpu.onnx"} <= bundle.manifest.files.keys()
    record = json.loads(bundle.read(QUANTIZATION))
    assert record["tokens"] > 1000
    assert len(record["model_sha256"]) == len(record["texts_sha256"]) == 64
    assert {report.candidate.partition("(")[2][:7] for report in bundle.manifest.parity} == {"", "the CPU"}
    for report in bundle.manifest.parity:
        assert report.overlap is not None
        assert report.overlap >= 0.95
        assert report.mean_cosine >= 0.998
    encoder = Encoder(bundles["int8"], device="cpu")
    assert "unsigned codes" in encoder.backend


def test_the_command_alone_and_its_record_used_again(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    varied = [item.text for item in built_in_texts()[:40]]  # on nine of a kind nothing could be quantized
    texts.write_text("\n".join(json.dumps({"text": item, "instruction": "Find it"}) for item in varied))
    first, second = tmp_path / "first", tmp_path / "second"
    common = ["--model", str(checkpoint), "--precision", "int8", "--max", "4x48"]
    assert export_graph([*common, "--calibration", str(texts), "--out", str(first)]) == 0
    assert Bundle.open(first).manifest.plan is None
    assert "quantizing to int8 on 40 texts" in capsys.readouterr().err
    again = [*common, "--dialect", "portable", "--reuse", str(first), "--out", str(second)]
    assert export_graph(again) == 0
    assert "smoothing as" in capsys.readouterr().err
    records = [json.loads((folder / QUANTIZATION).read_text()) for folder in (first, second)]
    assert records[0] == records[1]
    assert export_graph([*again, "--calibration-tokens", "10", "--calibration", str(texts)]) == 1
    assert "stale: its calibration texts" in capsys.readouterr().err


def test_a_vector_does_not_depend_on_its_neighbours(bundles: dict[str, Path]) -> None:
    """Scales are fixed: unlike dynamic quantization, a batch of other texts does not move a vector."""
    encoder = Encoder(bundles["int8"], device="cpu")
    alone = encoder.encode("rain on the roof")
    beside = encoder.encode(["rain on the roof", "!!!! ???? " * 20, "def f(x): return x"])[0]
    assert np.abs(alone - beside).max() < 1e-5


def test_kept_groups_say_why(made: Callable[[Precision], Made]) -> None:
    def check_group(item: GroupRecord) -> bool:
        return bool(item.reason) == item.kept and item.error >= 0 and (item.input_scale > 0)

    assert all(check_group(item) for item in made(Precision.INT8)[1].groups)


def test_a_streamed_model_is_quantized_the_same(checkpoint: Path, plain: NVEmbed, text: TextEncoder) -> None:
    """One part in memory at a time: the same ranges, smoothing, codes and vectors."""
    rows = tokenize(built_in_texts(), text, tokens=600)
    weights = StoredWeights(checkpoint, read_checkpoint_architecture(checkpoint))
    streamed, whole = Parts.of_checkpoint(weights, fold=True), Parts(copy.deepcopy(plain))
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    probes = probe_rows(text, LONGEST)[1]
    assert torch.allclose(streamed.embed(text, probes), whole.embed(text, probes), atol=1e-6)
    records = [
        quantize(parts, text, rows, Precision.INT8, model_sha256="0" * 64, longest=LONGEST)
        for parts in (streamed, whole)
    ]
    for first, second in zip(records[0].groups, records[1].groups, strict=True):
        assert (first.name, first.exponent, first.share) == (second.name, second.exponent, second.share)
        assert first.input_scale == pytest.approx(second.input_scale, rel=2e-3)
    record = replace(records[1], groups=tuple(replace(item, kept=False) for item in records[1].groups))
    one, other = QuantizedState(streamed, record), QuantizedState(whole, record)
    for linear in record.groups[3].linears + record.groups[-1].linears + record.groups[0].linears:
        for name in (f"{linear}.weight_codes", f"{linear}.weight_scale"):
            assert one.shape(name) == other.shape(name) == tuple(one.read(name).shape)
            assert (one.read(name).float() - other.read(name).float()).abs().max() <= 1.0
    assert torch.allclose(one.read("embedding_model.norm.weight"), other.read("embedding_model.norm.weight"), rtol=1e-4)
    one.close()
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_an_export_that_never_loads_the_model(
    checkpoint: Path, bundles: dict[str, Path], tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvembed_deploy.export import pipeline, to_onnx

    monkeypatch.setattr(pipeline, "PyTorchBackend", None)
    flags = ["--model", str(checkpoint), "--out", str(tmp_path / "b"), "--max", "32x128", "--no-parity"]
    assert to_onnx.main([*flags, "--precision", precision, "--probe-ranges"]) == 0
    found, wanted = (
        Encoder(bundle, device="cpu").encode(["the water over the passage", "a"])
        for bundle in (tmp_path / "b", bundles[precision])
    )
    assert (found * wanted).sum(axis=1).min() > 0.99
