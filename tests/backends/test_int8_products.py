"""8-bit matrix products on CPUs: their sums must not saturate on any CPU."""

import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install nvembed-deploy[export]")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install nvembed-deploy[cpu]")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from nvembed_deploy import system as machine  # noqa: E402
from nvembed_deploy.backends.base import Backend  # noqa: E402
from nvembed_deploy.backends.ort import INPUTS, OrtBackend  # noqa: E402
from nvembed_deploy.backends.ov import OvBackend  # noqa: E402
from nvembed_deploy.tokenization import TokenBatch  # noqa: E402

TOKENS, WIDTH, SCALE = 64, 32, np.float32(1.0)
WEIGHTS = np.full((TOKENS, WIDTH), 127, dtype=np.int8)
WEIGHTS[:, ::2] = -127


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A graph with one quantized product as in `model.cpu.onnx`, with the largest possible inputs and weights."""
    constants = {
        "scale": np.array(SCALE),
        "zero_unsigned": np.array(0, dtype=np.uint8),
        "scales": np.full(WIDTH, SCALE),
        "zeros": np.zeros(WIDTH, dtype=np.int8),
        "codes": WEIGHTS,
        "last": np.array([1], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["attended"]),  # an input without a use is dropped
        helper.make_node("Mul", ["attended", "pool_mask"], ["ids"]),
        helper.make_node("Cast", ["ids"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_unsigned"], ["x_codes"]),
        helper.make_node("DequantizeLinear", ["x_codes", "scale", "zero_unsigned"], ["x_again"]),
        helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["weights"], axis=1),
        helper.make_node("MatMul", ["x_again", "weights"], ["sentence_embedding"]),
        helper.make_node("ReduceSum", ["sentence_embedding", "last"], ["sentence_norm"], keepdims=0),
    ]
    built = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", TOKENS]) for name in INPUTS],
        [
            helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", WIDTH]),
            helper.make_tensor_value_info("sentence_norm", TensorProto.FLOAT, ["batch"]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(built, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def openvino(path: Path) -> Backend:
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install nvembed-deploy[openvino]")
    return OvBackend(path, dimension=WIDTH, exact=True)


@pytest.mark.parametrize("opened", [OrtBackend, openvino])
def test_sums_of_the_largest_quantized_values_are_exact(graph: Path, opened: Callable[[Path], Backend]) -> None:
    ids = np.full((16, TOKENS), 255, dtype=np.int64)
    ones = np.ones_like(ids)
    sums = opened(graph).run(TokenBatch(input_ids=ids, attention_mask=ones, pool_mask=ones)).embeddings
    expected = (ids @ WEIGHTS.astype(np.int64)).astype(np.float32)
    assert np.allclose(sums, expected, rtol=1e-5), (
        f"sums of 8-bit products are cut off: {sums[0, :2]}, {expected[0, :2]}"
    )


@pytest.mark.parametrize(
    ("architecture", "flags", "overflows"),
    [
        ("x86_64", "fpu avx2 fma", True),
        ("x86_64", "fpu avx2 avx512f avx512_vnni", False),
        ("AMD64", "fpu avx2 avx_vnni", False),
        ("aarch64", "", False),
        ("x86_64", None, True),
    ],
)
def test_cpus_whose_sums_saturate_are_recognized(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: str, flags: str | None, overflows: bool
) -> None:
    information = tmp_path / "cpuinfo"
    if flags is not None:
        information.write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n", encoding="utf-8")
    monkeypatch.setattr(machine, "CPU_INFORMATION", information)
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    assert machine.eight_bit_products_overflow() is overflows
    assert (machine.processor() == "Some CPU") is (flags is not None)
