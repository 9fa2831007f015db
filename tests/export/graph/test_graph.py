"""The graph: operators of each dialect, shapes that were not traced, and the contents of the file."""

import copy
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch

from nvembed_deploy.bundle.manifest import WEIGHTS
from nvembed_deploy.errors import ExportError
from nvembed_deploy.export.graph.cpu_graph import write_cpu_graph
from nvembed_deploy.export.graph.trace import trace
from nvembed_deploy.export.graph.weights import MemoryWeights
from nvembed_deploy.export.graph.write import PAGE_BYTES, check, describe_graph, write
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.fold import FoldedLatentAttention
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.spec import Dialect, Precision
from nvembed_deploy.version import __version__

FUSED = {"Attention": 2, "RMSNormalization": 5, "RotaryEmbedding": 4}
# TensorRT 10's parser supports none of these.
BEYOND_TENSORRT_10 = {"Attention", "RMSNormalization", "RotaryEmbedding", "SplitToSequence", "SequenceAt", "CastLike"}
PORTABLE_NODES = 166
"""Operators of two layers with shared keys and the folded pooler; PyTorch's decomposition of attention has 36 more."""
SHAPES = [(1, 1), (1, 9), (2, 2), (5, 31), (3, 128), (17, 3)]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> NVEmbed:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def graph_of(model: NVEmbed, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes graphs, each once: tracing takes seconds."""

    @functools.cache
    def make(dialect: Dialect, precision: Precision = Precision.FP32, fold: bool = True) -> Path:
        return make_graph(model, tmp_path_factory.mktemp("graph"), dialect, precision=precision, fold=fold)

    return make


def make_graph(
    model: NVEmbed, folder: Path, dialect: Dialect, *, precision: Precision = Precision.FP32, fold: bool = True
) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = model.state_dict()
    if fold:
        folded = FoldedLatentAttention(model.latent_attention_model).state_dict()
        tensors |= {f"latent_attention_model.{name}": tensor for name, tensor in folded.items()}
    graph = trace(model.config, precision=precision, dialect=dialect, fold=fold)
    write(graph, MemoryWeights(tensors), folder, name="model.onnx")
    check(folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(("dialect", "ir_version"), [(Dialect.FUSED, 11), (Dialect.PORTABLE, 9)])
def test_a_graph_says_what_it_is(model: NVEmbed, dialect: Dialect, ir_version: int) -> None:
    graph = trace(model.config, precision=Precision.FP32, dialect=dialect, fold=True)
    describe_graph(graph, {"model": "tiny"})
    proto = onnx_ir.to_proto(graph)
    assert proto.ir_version == ir_version == onnx.helper.find_min_ir_version_for(proto.opset_import)
    assert (proto.producer_name, proto.producer_version) == ("nvembed-deploy", __version__)
    assert {entry.key: entry.value for entry in proto.metadata_props} == {"model": "tiny"}


def inputs(batch: int, tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch * 1000 + tokens)
    lengths = rng.integers(1, tokens + 1, batch)
    lengths[0] = tokens
    attended = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    pooled = attended.copy()
    pooled[:, : tokens // 4] = 0
    pooled[lengths <= tokens // 4] = attended[lengths <= tokens // 4]
    return {
        "input_ids": rng.integers(0, 300, (batch, tokens)),
        "attention_mask": attended,
        "pool_mask": pooled,
    }


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
def test_equals_torch_at_other_shapes(
    model: NVEmbed, graph_of: Callable[..., Path], dialect: Dialect, fold: bool
) -> None:
    session = onnxruntime.InferenceSession(graph_of(dialect, fold=fold))
    for batch, tokens in SHAPES:
        feed = inputs(batch, tokens)
        with torch.inference_mode():
            expected, expected_norms = (out.numpy() for out in model(*map(torch.from_numpy, feed.values())))
        vectors, norms = session.run(["sentence_embedding", "sentence_norm"], feed)
        assert vectors.shape == (batch, 32)
        assert np.abs(vectors - expected).max() <= 5e-6, (batch, tokens)
        np.testing.assert_allclose(norms, expected_norms, rtol=1e-5)
    assert [output.shape for output in session.get_outputs()] == [["batch", 32], ["batch"]]


@pytest.mark.parametrize("dialect", list(Dialect))
def test_operators_and_opset(graph_of: Callable[..., Path], dialect: Dialect) -> None:
    graph = onnx.load(graph_of(dialect, fold=True), load_external_data=False)
    count = Counter(node.op_type for node in graph.graph.node)
    versions = {opset.version for opset in graph.opset_import if not opset.domain}
    assert versions == {23 if dialect is Dialect.FUSED else 20}
    assert {node.domain for node in graph.graph.node} == {""}
    if dialect is Dialect.FUSED:
        assert {name: count[name] for name in FUSED} == FUSED
    else:
        assert not BEYOND_TENSORRT_10 & count.keys()
        # The mask is computed once, and added once in each of the two layers: nothing else has its size.
        assert not {"IsNaN", "Expand"} & count.keys()
        assert count["Where"] == 2  # the mask, and the one of the pooling
        assert sum(count.values()) <= PORTABLE_NODES
    transposes = [node for node in graph.graph.node if node.op_type == "Transpose"]
    assert not [node for node in transposes if node.input[0].endswith(".weight")]  # stored the way MatMul takes them


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_precision_is_in_the_graph(graph_of: Callable[..., Path], precision: Precision) -> None:
    graph = onnx.load(graph_of(Dialect.FUSED, precision), load_external_data=False)
    expected_type = onnx.TensorProto.FLOAT16 if precision is Precision.FP16 else onnx.TensorProto.BFLOAT16
    weights = [tensor for tensor in graph.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert {tensor.data_type for tensor in weights} == {expected_type}
    types = {value.name: value.type.tensor_type.elem_type for value in graph.graph.value_info}
    pooling = [node for node in graph.graph.node if node.op_type in ("ReduceSum", "ReduceL2", "Where", "Clip")]
    assert pooling
    for node in pooling:  # pooling and L2 in FP32, the mask's count in integers
        assert types.get(node.output[0], onnx.TensorProto.FLOAT) in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64)
    assert {output.type.tensor_type.elem_type for output in graph.graph.output} == {onnx.TensorProto.FLOAT}


def test_file_holds_no_trace_of_this_machine(graph_of: Callable[..., Path]) -> None:
    path = graph_of(Dialect.FUSED, fold=True)
    content = path.read_bytes()
    for fragment in (b".py", str(Path.home()).encode(), str(path.parent).encode()):
        assert fragment not in content


def test_same_input_same_bytes(model: NVEmbed, graph_of: Callable[..., Path], tmp_path: Path) -> None:
    path1, path2 = graph_of(Dialect.FUSED, fold=True), make_graph(model, tmp_path, Dialect.FUSED)
    assert path1.read_bytes() == path2.read_bytes()
    assert (path1.parent / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


def test_weights_start_on_pages_and_lie_in_the_file(graph_of: Callable[..., Path]) -> None:
    path = graph_of(Dialect.FUSED, fold=True)
    graph = onnx.load(path, load_external_data=False)
    size = (path.parent / WEIGHTS).stat().st_size
    for initializer in graph.graph.initializer:
        external = {pair.key: pair.value for pair in initializer.external_data}
        if external:
            assert external["location"] == WEIGHTS
            assert int(external["offset"]) % PAGE_BYTES == 0
            assert int(external["offset"]) + int(external["length"]) <= size


def test_weight_beyond_fp16_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = load_checkpoint(checkpoint)
    model.embedding_model.layers[1].mlp.down_proj.weight[0, 0] = 70_000.0
    with pytest.raises(
        ExportError, match=r"layers\.1\.mlp\.down_proj\.weight reaches 7e\+04, which float16 cannot represent"
    ):
        make_graph(model, tmp_path, Dialect.FUSED, precision=Precision.FP16)


def test_weights_are_not_appended_to(model: NVEmbed, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"older")
    with pytest.raises(FileExistsError):
        make_graph(model, tmp_path, Dialect.FUSED)
    assert (tmp_path / WEIGHTS).read_bytes() == b"older"


def test_bf16_graph_for_cpus_rounds(model: NVEmbed, graph_of: Callable[..., Path]) -> None:
    """Its difference from FP32 is about as large as that of PyTorch's own BF16."""
    path = graph_of(Dialect.FUSED, Precision.BF16)
    cpu_path = path.with_name("model.cpu.onnx")
    write_cpu_graph(path, cpu_path)
    check(cpu_path)
    feed = inputs(5, 31)
    vectors = onnxruntime.InferenceSession(cpu_path).run(["sentence_embedding"], feed)[0]
    with torch.inference_mode():
        tensors = list(map(torch.from_numpy, feed.values()))
        exact = model(*tensors)[0].numpy()
        torch_vectors = copy.deepcopy(model).to(torch.bfloat16)(*tensors)[0].float().numpy()
    difference, torch_difference = np.abs(vectors - exact).max(), np.abs(torch_vectors - exact).max()
    assert 0.2 * torch_difference <= difference <= 3 * torch_difference
    assert difference > 1e-4
