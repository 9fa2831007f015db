"""NVFP4: values and scales against ml_dtypes, stored weights against onnx, and the size of a plan."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from nvembed_deploy import Encoder, select_backend
from nvembed_deploy.backends.bindings import TENSORRT_RTX, load_bindings
from nvembed_deploy.backends.ort import INPUTS, OrtBackend
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.engines import pack
from nvembed_deploy.engines.build import build
from nvembed_deploy.engines.plan_builder import build_plan, require_quantized_plan
from nvembed_deploy.engines.portable_operators import unsupported
from nvembed_deploy.engines.targets import TARGETS, capable_gpus
from nvembed_deploy.errors import EngineError
from nvembed_deploy.export.graph.cpu_graph import write_cpu_graph
from nvembed_deploy.export.graph.weights import MemoryWeights
from nvembed_deploy.export.graph.write import check, describe_graph, write
from nvembed_deploy.export.quantization.formats import (
    FORMATS,
    SCALE_SUFFIX,
    TENSOR_SCALE_SUFFIX,
    pack_fp4,
    unpack_fp4,
)
from nvembed_deploy.export.quantization.qdq import insert_qdq
from nvembed_deploy.export.to_onnx import main as export_graph
from nvembed_deploy.spec import Precision, Shape, ShapeProfile
from tests.conftest import needs_rtx

NVFP4 = FORMATS[Precision.NVFP4]


def random_weight(outputs: int, inputs: int, *, size: float = 0.02) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * size


def write_linear(folder: Path, weight: Tensor, rows: Tensor, precision: Precision) -> Path:
    """Writes a graph with one linear layer, whose input is the row [K] of a table with the number of each token."""
    tokens = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "tokens"]))
        for name in INPUTS
    ]
    table, layer = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(tensor.shape))
        for name, tensor in (("table", rows), ("linear.weight", weight))
    )
    counted = ir.node("Mul", [ir.node("Mul", tokens[:2]).outputs[0], tokens[2]])
    gather = ir.node("Gather", [table, counted.outputs[0]])
    transpose = ir.node("Transpose", [layer], {"perm": [1, 0]})
    product = ir.node("MatMul", [gather.outputs[0], transpose.outputs[0]])
    for node in (gather, transpose, product):
        node.outputs[0].dtype = ir.DataType.FLOAT16
    output = product.outputs[0]
    output.name, output.shape = "sentence_embedding", ir.Shape(["batch", "tokens", len(weight)])
    nodes = (counted.inputs[0].producer(), counted, gather, transpose, product)
    graph = ir.Graph(tokens, [output], nodes=nodes, initializers=[table, layer], opset_imports={"": 20}, name="linear")
    model = ir.Model(graph, ir_version=10)
    stored = {"table": rows, "linear.weight": weight}
    if precision.quantized:
        fmt = FORMATS[precision]
        insert_qdq(model, {"linear": 0.0}, fmt)
        quantized = fmt.to_stored(*fmt.quantize_weight(weight))
        stored |= {f"linear.weight{suffix}": tensor for suffix, tensor in quantized.items()}
    describe_graph(model, {})
    folder.mkdir()
    write(model, MemoryWeights(stored), folder, name="model.onnx")
    return folder / "model.onnx"


def test_values_are_those_of_ml_dtypes() -> None:
    numbers = torch.linspace(-7, 7, 28 * 16 + 1)  # with every tie
    assert all(tie in numbers for tie in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
    numbers[1::16] = numbers[::16].nextafter(torch.tensor(0.0))[: len(numbers[1::16])]
    quantized = NVFP4.quantize(numbers, 1.0)
    expected = numbers.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn)
    values = quantized.float().numpy()
    assert np.array_equal(values, expected.astype(np.float32))
    assert np.array_equal(np.signbit(values), np.signbit(expected))
    packed = pack_fp4(quantized[1:])
    codes = np.stack((packed.numpy() & 0xF, packed.numpy() >> 4), axis=1).reshape(-1)
    assert np.array_equal(codes, expected[1:].view(np.uint8))
    assert torch.equal(unpack_fp4(packed).view(torch.uint8), quantized[1:].view(torch.uint8))


@pytest.mark.parametrize("size", [1e-7, 1e-3, 0.02, 300.0])
def test_scales_are_those_of_the_definition(size: float) -> None:
    """The largest weight of a block becomes 6, rounded to E4M3 with one power of two for the whole weight."""
    weight = random_weight(8, 64, size=size)
    weight[0], weight[1, :16] = 0, weight[1, :16] * 1e-6
    fmt = replace(NVFP4, range_ratios=(1.0,))
    quantized, scale = fmt.quantize_weight(weight)
    stored = fmt.to_stored(quantized, scale)
    tensor_scale = stored[TENSOR_SCALE_SUFFIX]
    assert float(tensor_scale) == 2.0 ** float(tensor_scale.log2().round()) >= 2.0**-24
    max_abs = weight.reshape(8, 4, 16).abs().amax(dim=2).clamp_min(6 * 2.0**-20)
    in_fp8 = (max_abs / 6 / tensor_scale).clamp_min(2.0**-9).numpy().astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(stored[SCALE_SUFFIX].float().numpy(), in_fp8.astype(np.float32))
    assert 224 < in_fp8.astype(np.float32).max() <= 448 or float(tensor_scale) == 2.0**-24
    restored = fmt.from_stored({suffix: tensor.float() for suffix, tensor in stored.items()})
    assert torch.equal(restored[1], scale)
    assert torch.equal(restored[0].float(), quantized.float())


def test_both_graphs_have_exactly_the_simulated_weights(tmp_path: Path) -> None:
    """The engine's graph as onnx computes it in FP16, and the CPU's as ONNX Runtime does in FP32."""
    weight = random_weight(24, 64)
    weight[3], weight[5, 16:32] = 0, weight[5, 16:32] * 1e-5
    graph = write_linear(tmp_path / "graph", weight, torch.eye(64), Precision.NVFP4)
    write_cpu_graph(graph, tmp_path / "graph" / "model.cpu.onnx")
    for name in ("model.onnx", "model.cpu.onnx"):
        check(graph.with_name(name))
    assert not list(unsupported(graph))
    feed = dict(zip(INPUTS, (np.arange(64)[None], *np.ones((2, 1, 64), np.int64)), strict=True))
    expected = NVFP4.fake_quantize_weight(weight).T.numpy()
    in_fp16 = ReferenceEvaluator(onnx.load(graph)).run(None, feed)[0]
    assert in_fp16.dtype == np.float16
    assert np.array_equal(in_fp16[0].astype(np.float32), expected)
    session = onnxruntime.InferenceSession(graph.with_name("model.cpu.onnx"))
    assert np.array_equal(session.run(None, feed)[0][0], expected)


@needs_rtx
def test_a_plan_has_four_bits_per_weight(tmp_path: Path) -> None:
    """TensorRT-RTX keeps them; a plan that does not is refused."""
    weight, shape = random_weight(2048, 2560), Shape(batch=1, tokens=1)
    target = replace(TARGETS["rtx"], compute_capabilities=capable_gpus(TARGETS["rtx"], Precision.NVFP4))
    assert target.compute_capabilities == ("12.0",)
    graphs, plans = {}, {}
    for precision in (Precision.FP16, Precision.NVFP4):
        graphs[precision] = write_linear(tmp_path / precision.value, weight, torch.ones(2, 2560), precision)
        plans[precision], plan_info = build_plan(
            graphs[precision],
            target,
            profile=ShapeProfile(min=shape, opt=shape, max=shape),
            bindings=load_bindings(TENSORRT_RTX),
            capability=None,
        )
    saved_bits = 8 * (len(plans[Precision.FP16]) - len(plans[Precision.NVFP4])) / weight.numel()
    assert saved_bits == pytest.approx(16 - Precision.NVFP4.bits_per_weight, abs=0.5)

    def require(plan: memoryview, parameters: int) -> None:
        graph = graphs[Precision.NVFP4]
        require_quantized_plan(plan, plan_info, graph, precision=Precision.NVFP4, parameters=parameters)

    require(plans[Precision.NVFP4], weight.numel())
    with pytest.raises(
        EngineError, match=r"did not keep the weights in 4 bits: the plan has 30 MB, model\.onnx's .*int8"
    ):
        require(memoryview(bytes(30_000_000)), weight.numel())


@pytest.mark.slow
@needs_rtx
def test_the_way_to_a_jetson_thor(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported and packed for it; TensorRT-RTX stands in for its TensorRT."""
    out = tmp_path / "edge"
    flags = ["--precision", "nvfp4", "--target", "jetson-thor", "--max", "4x48", "--calibration-tokens", "1024"]
    assert export_graph(["--model", str(checkpoint), "--out", str(out), *flags]) == 0
    exported = Bundle.open(out).manifest
    assert (exported.opset, exported.dialect.value, len(exported.parity)) == (23, "portable", 1)
    assert "CPU graph: integers for FP4" in exported.parity[0].candidate
    assert pack.main([str(out)]) == 0
    assert "TensorRT 10 supports every operator of the graph" in capsys.readouterr().err
    assert pack.main([str(out), "--target", "jetson-orin"]) == 1
    assert "use --precision int4, which is as small" in capsys.readouterr().err
    build(out, TARGETS["rtx"])
    built = Bundle.open(out)
    assert built.manifest.plan is not None
    assert built.manifest.plan.compute_capabilities == ("12.0",)
    vector = Encoder(out, device="cpu").encode("a text")
    # ONNX Runtime's CUDA provider has no kernels for FP4 either.
    monkeypatch.setattr(select_backend, "available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(select_backend.CudaRuntime, "load", lambda: SimpleNamespace(device=lambda index: None))
    monkeypatch.setattr(
        select_backend, "OrtBackend", lambda graph, *, providers, **options: OrtBackend(graph, **options)
    )
    on_cuda = Encoder(out, device="cuda", backend="onnxruntime")
    assert np.abs(on_cuda.encode("a text") - vector).max() < 1e-5
