"""FP16's limit: a model whose values exceed it matches FP32 or is not built."""

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from nvembed_deploy.export.fp16_ranges import FP16_MAX, HEADROOM, Ranges, find_fp32_modules, measure_ranges
from nvembed_deploy.export.graph.trace import trace
from nvembed_deploy.export.graph.weights import MemoryWeights
from nvembed_deploy.export.graph.write import check, write
from nvembed_deploy.export.layerwise import POOLER, LayerwiseModel, folded_form
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.model.fold import FoldedLatentAttention
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.model.text_contract import text_contract
from nvembed_deploy.parity.probes import probe_rows
from nvembed_deploy.spec import Dialect, Precision
from nvembed_deploy.tokenization import TextEncoder

LAYER = "embedding_model.layers.0."
LONGEST = 48


@pytest.fixture(scope="module")
def text(checkpoint: Path) -> TextEncoder:
    contract = text_contract(checkpoint, read_checkpoint_architecture(checkpoint))
    return TextEncoder((checkpoint / "tokenizer.json").read_bytes(), contract)


def scaled(checkpoint: Path, text: TextEncoder, module: str, tensor: str, size: float) -> NVEmbed:
    """The model with one module's weights scaled until one of its tensors reaches a size."""
    model = load_checkpoint(checkpoint)
    with torch.no_grad():
        model.get_submodule(module).weight.mul_(
            size / measure_ranges(LayerwiseModel(model), text, longest=LONGEST).max_abs[tensor]
        )
    peak = measure_ranges(LayerwiseModel(model), text, longest=LONGEST).max_abs[tensor]
    assert 0.5 * size < peak < 2 * size
    return model


def worst_cosine(
    model: NVEmbed, text: TextEncoder, folder: Path, dialect: Dialect, fp32_modules: frozenset[str]
) -> float:
    """Returns the lowest cosine between the FP16 graph and the FP32 model on the gate's texts."""
    folded = FoldedLatentAttention(model.latent_attention_model).state_dict()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(POOLER)}
    tensors |= {f"{POOLER}.{name}": tensor for name, tensor in folded.items()}
    graph = trace(model.config, precision=Precision.FP16, dialect=dialect, fold=True, fp32_modules=fp32_modules)
    write(graph, MemoryWeights(tensors), folder, name="model.onnx")
    check(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    cosines = []
    for row in probe_rows(text, LONGEST)[1]:
        batch = text.pad([row])
        with torch.inference_mode():
            expected = model(*map(torch.from_numpy, batch))[0].numpy()[0]
        names = ("input_ids", "attention_mask", "pool_mask")
        vector = session.run(["sentence_embedding"], dict(zip(names, batch, strict=True)))[0][0]
        cosines.append(float(vector @ expected) if np.isfinite(vector).all() else 0.0)
    return min(cosines)


def test_an_ordinary_model_has_no_fp32_modules(checkpoint: Path, text: TextEncoder) -> None:
    model = load_checkpoint(checkpoint)
    ranges = measure_ranges(LayerwiseModel(model), text, longest=LONGEST)
    assert find_fp32_modules(model, ranges) == frozenset()
    assert {
        f"{LAYER}input_layernorm.residual",
        f"{LAYER}mlp.product",
        f"{LAYER}self_attn.scores",
    } <= ranges.max_abs.keys()
    assert not model.get_submodule(f"{LAYER}mlp.down_proj")._forward_pre_hooks  # all hooks were removed


@pytest.mark.parametrize(
    ("dialect", "module", "tensor", "size", "expected"),
    [
        # 300 squared exceeds FP16, but norms compute in FP32, so no module needs to.
        (Dialect.PORTABLE, "embedding_model.embed_tokens", f"{LAYER}input_layernorm.residual", 300.0, set()),
        (Dialect.FUSED, "embedding_model.embed_tokens", f"{LAYER}input_layernorm.residual", 300.0, set()),
        (
            Dialect.FUSED,
            f"{LAYER}mlp.down_proj",
            "embedding_model.layers.1.input_layernorm.residual",
            70_000.0,
            {f"{LAYER}mlp.down_proj"},
        ),
        (
            Dialect.PORTABLE,
            "embedding_model.embed_tokens",
            f"{LAYER}input_layernorm.residual",
            70_000.0,
            {"embedding_model.embed_tokens"},
        ),
        (
            Dialect.PORTABLE,
            f"{LAYER}self_attn.v_proj",
            f"{LAYER}self_attn.v_proj",
            70_000.0,
            {f"{LAYER}self_attn.{projection}_proj" for projection in "qkvo"},
        ),
        (
            Dialect.FUSED,
            f"{LAYER}mlp.up_proj",
            f"{LAYER}mlp.product",
            70_000.0,
            {f"{LAYER}mlp.{projection}_proj" for projection in ("gate", "up", "down")},
        ),
        (Dialect.FUSED, "embedding_model.norm", "embedding_model.norm", 70_000.0, {POOLER, "embedding_model.norm"}),
    ],
)
def test_values_near_the_limit_are_computed_in_fp32(
    checkpoint: Path,
    text: TextEncoder,
    tmp_path: Path,
    dialect: Dialect,
    module: str,
    tensor: str,
    size: float,
    expected: set[str],
) -> None:
    model = scaled(checkpoint, text, module, tensor, size)
    fp32_modules = find_fp32_modules(model, measure_ranges(LayerwiseModel(model), text, longest=LONGEST))
    assert expected <= fp32_modules
    assert bool(expected) == bool(fp32_modules)
    assert worst_cosine(model, text, tmp_path, dialect, fp32_modules) >= 0.9999


@pytest.mark.parametrize("overflow", ["product", "scores", "residual", "unfolded scores"])
def test_overflows_inside_the_pooler_are_found(
    checkpoint: Path, text: TextEncoder, tmp_path: Path, overflow: str
) -> None:
    """None of these is the output of a layer, and in FP16 all of them end in NaN or in zeros."""
    model = load_checkpoint(checkpoint)
    cross, feed_forward = model.latent_attention_model.cross_attend_blocks
    weight, tensor = {
        "product": (feed_forward.fn.net[0].weight, f"{POOLER}.feed_forward.fn.net.1"),
        "scores": (cross.norm.weight, f"{POOLER}.scores"),
        "residual": (cross.fn.to_out.weight, f"{POOLER}.feed_forward.residual"),
        "unfolded scores": (cross.norm.weight, f"{POOLER}.cross_attend_blocks.0.fn.scores"),
    }[overflow]
    for _ in range(2):  # the second time exactly: folding follows the change of a weight
        form = folded_form(copy.deepcopy(model), fold=overflow != "unfolded scores")
        peak = measure_ranges(LayerwiseModel(form), text, longest=LONGEST).max_abs[tensor]
        with torch.no_grad():
            weight.mul_(100_000.0 / peak if overflow != "product" else (100_000.0 / peak) ** 0.5)
    form = folded_form(copy.deepcopy(model), fold=overflow != "unfolded scores")
    ranges = measure_ranges(LayerwiseModel(form), text, longest=LONGEST)
    assert ranges.max_abs[tensor] > FP16_MAX / HEADROOM
    fp32_modules = find_fp32_modules(form, ranges)
    assert POOLER in fp32_modules
    if "scores" not in overflow:  # the last bit of such scores decides which latent the softmax takes
        assert worst_cosine(model, text, tmp_path, Dialect.FUSED, fp32_modules) >= 0.9999


def test_without_fp32_modules_the_same_model_fails(checkpoint: Path, text: TextEncoder, tmp_path: Path) -> None:
    tensor = "embedding_model.layers.1.input_layernorm.residual"
    model = scaled(checkpoint, text, f"{LAYER}mlp.down_proj", tensor, 70_000.0)
    assert worst_cosine(model, text, tmp_path, Dialect.FUSED, frozenset()) < 0.99


def test_non_finite_values_count_as_near_the_limit() -> None:
    max_abs = {"a": float("nan"), "b": float("inf"), "c": FP16_MAX / HEADROOM, "d": FP16_MAX / HEADROOM * 1.01}
    assert Ranges(max_abs=max_abs).near_limit.keys() == {"a", "b", "d"}
