"""FP16's limit: a model whose values pass it either matches FP32 or is not built."""

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from nvembed_deploy.export.fp16_ranges import FP16_MAX, HEADROOM, Ranges, probe, wide_modules
from nvembed_deploy.export.graph.trace import trace
from nvembed_deploy.export.graph.weights import MemoryState
from nvembed_deploy.export.graph.write import check, write
from nvembed_deploy.export.layerwise import POOLER, Parts, folded_form
from nvembed_deploy.model import source
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.family import read_checkpoint_architecture
from nvembed_deploy.model.fold import FoldedLatentAttention
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.parity.probes import probe_rows
from nvembed_deploy.spec import Dialect, Precision
from nvembed_deploy.tokenization import TextEncoder

LAYER = "embedding_model.layers.0."
LONGEST = 48


@pytest.fixture(scope="module")
def text(checkpoint: Path) -> TextEncoder:
    contract = source.text_contract(checkpoint, read_checkpoint_architecture(checkpoint))
    return TextEncoder((checkpoint / "tokenizer.json").read_bytes(), contract)


def scaled(checkpoint: Path, text: TextEncoder, module: str, tensor: str, size: float) -> NVEmbed:
    """The model with one module's weights scaled until one of its tensors reaches a size."""
    model = load_checkpoint(checkpoint)
    with torch.no_grad():
        model.get_submodule(module).weight.mul_(size / probe(Parts(model), text, longest=LONGEST).largest[tensor])
    found = probe(Parts(model), text, longest=LONGEST).largest[tensor]
    assert 0.5 * size < found < 2 * size
    return model


def worst_cosine(model: NVEmbed, text: TextEncoder, folder: Path, dialect: Dialect, wide: frozenset[str]) -> float:
    """Of the FP16 graph to the FP32 model over the gate's texts."""
    folded = FoldedLatentAttention(model.latent_attention_model).state_dict()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(POOLER)}
    state |= {f"{POOLER}.{name}": value for name, value in folded.items()}
    graph = trace(model.config, precision=Precision.FP16, dialect=dialect, fold=True, wide=wide)
    write(graph, MemoryState(state), folder, name="model.onnx")
    check(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    cosines = []
    for row in probe_rows(text, LONGEST)[1]:
        batch = text.pad([row])
        with torch.inference_mode():
            expected = model(*map(torch.from_numpy, batch))[0].numpy()[0]
        names = ("input_ids", "attention_mask", "pool_mask")
        found = session.run(["sentence_embedding"], dict(zip(names, batch, strict=True)))[0][0]
        cosines.append(float(found @ expected) if np.isfinite(found).all() else 0.0)
    return min(cosines)


def test_an_ordinary_model_keeps_nothing(checkpoint: Path, text: TextEncoder) -> None:
    model = load_checkpoint(checkpoint)
    ranges = probe(Parts(model), text, longest=LONGEST)
    assert wide_modules(model, ranges) == frozenset()
    assert {
        f"{LAYER}input_layernorm.residual",
        f"{LAYER}mlp.product",
        f"{LAYER}self_attn.scores",
    } <= ranges.largest.keys()
    assert not model.get_submodule(f"{LAYER}mlp.down_proj")._forward_pre_hooks  # nothing stays behind


@pytest.mark.parametrize(
    ("dialect", "module", "tensor", "size", "kept"),
    [
        # 300 squared is no FP16 number: norms compute in FP32, so nothing needs to be kept.
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
            {f"{LAYER}self_attn.{part}_proj" for part in "qkvo"},
        ),
        (
            Dialect.FUSED,
            f"{LAYER}mlp.up_proj",
            f"{LAYER}mlp.product",
            70_000.0,
            {f"{LAYER}mlp.{part}_proj" for part in ("gate", "up", "down")},
        ),
        (Dialect.FUSED, "embedding_model.norm", "embedding_model.norm", 70_000.0, {POOLER, "embedding_model.norm"}),
    ],
)
def test_values_near_the_limit_are_kept_in_fp32(
    checkpoint: Path,
    text: TextEncoder,
    tmp_path: Path,
    dialect: Dialect,
    module: str,
    tensor: str,
    size: float,
    kept: set[str],
) -> None:
    model = scaled(checkpoint, text, module, tensor, size)
    wide = wide_modules(model, probe(Parts(model), text, longest=LONGEST))
    assert kept <= wide
    assert bool(kept) == bool(wide)
    assert worst_cosine(model, text, tmp_path, dialect, wide) >= 0.9999


@pytest.mark.parametrize("what", ["product", "scores", "residual", "unfolded scores"])
def test_what_overflows_inside_the_pooler_is_seen(
    checkpoint: Path, text: TextEncoder, tmp_path: Path, what: str
) -> None:
    """None of these is the output of a layer, and in FP16 all of them end in NaN or in zeros."""
    model = load_checkpoint(checkpoint)
    cross, feed_forward = model.latent_attention_model.cross_attend_blocks
    weight, tensor = {
        "product": (feed_forward.fn.net[0].weight, f"{POOLER}.feed_forward.fn.net.1"),
        "scores": (cross.norm.weight, f"{POOLER}.scores"),
        "residual": (cross.fn.to_out.weight, f"{POOLER}.feed_forward.residual"),
        "unfolded scores": (cross.norm.weight, f"{POOLER}.cross_attend_blocks.0.fn.scores"),
    }[what]
    found = 0.0
    for _ in range(2):  # folding comes behind the change of a weight
        form = folded_form(copy.deepcopy(model), fold=what != "unfolded scores")
        found = probe(Parts(form), text, longest=LONGEST).largest[tensor]
        with torch.no_grad():
            weight.mul_(100_000.0 / found if what != "product" else (100_000.0 / found) ** 0.5)
    form = folded_form(copy.deepcopy(model), fold=what != "unfolded scores")
    ranges = probe(Parts(form), text, longest=LONGEST)
    assert ranges.largest[tensor] > FP16_MAX / HEADROOM
    wide = wide_modules(form, ranges)
    assert POOLER in wide
    if "scores" not in what:  # a softmax of such scores takes one latent or another by the last bit of the tokens
        assert worst_cosine(model, text, tmp_path, Dialect.FUSED, wide) >= 0.9999


def test_without_the_care_the_same_model_breaks(checkpoint: Path, text: TextEncoder, tmp_path: Path) -> None:
    tensor = "embedding_model.layers.1.input_layernorm.residual"
    model = scaled(checkpoint, text, f"{LAYER}mlp.down_proj", tensor, 70_000.0)
    assert worst_cosine(model, text, tmp_path, Dialect.FUSED, frozenset()) < 0.99


def test_what_is_not_finite_counts_as_near() -> None:
    values = {"a": float("nan"), "b": float("inf"), "c": FP16_MAX / HEADROOM, "d": FP16_MAX / HEADROOM * 1.01}
    assert Ranges(largest=values).near.keys() == {"a", "b", "d"}
