"""Each changed field of a config.json: the same vectors as transformers', or a refusal, never a third thing."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as torch_save_file

from nvembed_deploy.errors import DeployError
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.nvembed import NVEmbed
from tests.conftest import ROOT
from tests.model.stock import CONFIGS, TOLERANCE, YARN, batch_of, our_vectors, transformers_vectors

transformers = pytest.importorskip("transformers", reason="transformers is not installed: make test installs it")


DROPPED = object()
CHANGES: dict[str, tuple[object, ...]] = {
    "is_causal": (True, False, None, "false"),
    "use_bidirectional_attention": (True, False),
    "sliding_window": (3, 0, -1, None, 1e9, "7"),
    "use_sliding_window": (True, False, "true"),
    "layer_types": (None, ["full_attention"] * 4, ["sliding_attention"] * 4, ["full_attention"] * 3, ["chunked"] * 4),
    "max_window_layers": (0, 2, 4, 9),
    "rope_theta": (0, 1, 5e4, None, float("nan"), "10000"),
    "rope_scaling": (
        None, {}, [1], {"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        {"rope_type": "linear", "factor": 0.0}, {"rope_type": "linear"},
    ),
    "rope_parameters": (
        None, {}, {"rope_type": "default", "rope_theta": 77.0}, {"rope_theta": 77.0},
        {"rope_type": "linear", "rope_theta": 77.0, "factor": 3.0},
        {**YARN, "llama_4_scaling_beta": None}, {**YARN, "truncate": False}, {**YARN, "mscale": 0.7},
        {**YARN, "attention_factor": 1.3}, {**YARN, "beta_fast": 8, "beta_slow": 2}, {**YARN, "factor": 1.0},
        {**YARN, "partial_rotary_factor": 0.5}, {"full_attention": {"rope_type": "default", "rope_theta": 77.0}},
    ),
    "partial_rotary_factor": (0.5, 1.0, [0.5]),
    "original_max_position_embeddings": (256, 32),
    "head_dim": (16, 8, None, 15, 0),
    "num_key_value_heads": (1, 2, 3, 4, None, 0),
    "num_attention_heads": (2, 4, 0),
    "hidden_size": (32, 64),
    "intermediate_size": (72, 71),
    "num_hidden_layers": (3, 4, 5),
    "vocab_size": (299, 300, 301),
    "rms_norm_eps": (1e-5, 0.5, 0.0, -1.0, float("nan"), None),
    "hidden_act": ("silu", "gelu", "swish", None),
    "attention_bias": (True, False, "false"),
    "mlp_bias": (True, False),
    "architectures": (None, [], "LlamaModel", ["LlamaModel", "MistralModel"], ["LlamaForSequenceClassification"]),
    "model_type": ("llama", "mistral", "ministral3", "qwen2", "qwen3", "bert", None),
    "auto_map": ({"AutoModel": "modeling.Own"}, {}, "x"),
    "quantization_config": ({"quant_method": "awq"}, None),
    "pooling": ("avg", "last", "cls", "weighted_avg", ["avg"]),
    "max_position_embeddings": (8, 4096, 0),
    "tie_word_embeddings": (True,),
    "transformers_weights": ("other.safetensors", None),
    "pretraining_tp": (2,),
    "eos_token_id": (5, 999999, None, [1, 2]),
}  # fmt: skip


def mutants(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields a description and the config for every field dropped and every change of one field."""
    for name in config:
        yield f"without {name}", {key: value for key, value in config.items() if key != name}
    for name, values in CHANGES.items():
        for value in values:
            if name not in config or config[name] != value:
                yield f"{name} = {value!r}", {**copy.deepcopy(config), name: value}


def verdict(folder: Path) -> str:
    """Returns "refused", "equal", or what else happened, which is a defect."""
    try:
        vectors = our_vectors(folder)
    except DeployError:
        return "refused"
    try:
        expected = transformers_vectors(folder)
    except Exception as err:  # whatever transformers raises: it computes nothing
        return f"served, but transformers fails with {type(err).__name__}: {str(err)[:80]}"
    difference = np.abs(vectors - expected).max()
    return "equal" if difference <= TOLERANCE else f"served with a difference of {difference:.1e}"


@pytest.mark.parametrize(
    "name", ["qwen3", *[pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "qwen3"]]
)
def test_every_changed_config_is_computed_as_transformers_does_or_refused(
    checkpoints: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    check_mutants(shutil.copytree(checkpoints(name), tmp_path / "mutant"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["e5-mistral-tiny", "qwen3-embedding-tiny"])
def test_every_changed_config_of_a_published_family_too(name: str, tmp_path: Path) -> None:
    golden = ROOT.parent / "shared" / "golden" / "family" / name / "checkpoint"
    if not golden.is_dir():
        pytest.skip(f"no golden data at {golden}")
    check_mutants(shutil.copytree(golden, tmp_path / "mutant"))


def as_stock(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of transformers' own class that computes the decoder of one of NVIDIA's."""
    if config["model_type"] == "llama_bidirec":
        return {**config, "model_type": "llama", "architectures": ["LlamaModel"], "is_causal": False}
    own = {"model_type": "mistral", "architectures": ["MistralModel"], "is_causal": False, "sliding_window": None}
    return {**config["text_config"], **own}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["public", "family/llama-bidirectional-tiny"])
def test_every_changed_config_of_nvidias_families_too(name: str, tmp_path: Path) -> None:
    """The token states, beside transformers' class without the causal mask."""
    golden = ROOT.parent / "shared" / "golden" / name / "checkpoint"
    if not golden.is_dir():
        pytest.skip(f"no golden data at {golden}")
    folder, stock = shutil.copytree(golden, tmp_path / "mutant"), tmp_path / "stock"
    stock.mkdir()
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    prefix = "embedding_model."
    backbone = {key.removeprefix(prefix): value for key, value in tensors.items() if "latent" not in key}
    torch_save_file(backbone, stock / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    section = config.get("text_config", config)
    verdicts = {}
    for description, mutant in mutants(section):
        whole = {**config, "text_config": mutant} if "text_config" in config else mutant
        (folder / "config.json").write_text(json.dumps(whole))
        try:
            model = load_checkpoint(folder)
        except DeployError:
            verdicts[description] = "refused"
            continue
        (stock / "config.json").write_text(json.dumps(as_stock(whole)))
        verdicts[description] = compare_states(model, folder, stock)
    assert {text: outcome for text, outcome in verdicts.items() if outcome not in ("equal", "refused")} == {}
    assert sum(outcome == "equal" for outcome in verdicts.values()) >= 15


@torch.no_grad()
def compare_states(model: NVEmbed, folder: Path, stock: Path) -> str:
    """Compares the token states of the reference with those of transformers' class."""
    ids, attended = batch_of(folder)
    try:
        theirs = transformers.AutoModel.from_pretrained(stock, attn_implementation="eager", dtype=torch.float32)
        expected = theirs(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state
    except Exception as err:  # whatever transformers raises: it computes nothing
        return f"served, but transformers fails with {type(err).__name__}: {str(err)[:80]}"
    states = model.embedding_model(ids, attended)
    difference = float((states - expected)[attended.bool()].abs().max())
    return "equal" if difference <= 2e-5 else f"served with a difference of {difference:.1e}"


def check_mutants(folder: Path) -> None:
    """Changes every field of the folder's config.json, and looks at what becomes of the vectors."""
    config = json.loads((folder / "config.json").read_text())
    verdicts = {}
    for description, mutant in mutants(config):
        (folder / "config.json").write_text(json.dumps(mutant))
        verdicts[description] = verdict(folder)
    assert {text: outcome for text, outcome in verdicts.items() if outcome not in ("equal", "refused")} == {}
    assert sum(outcome == "equal" for outcome in verdicts.values()) >= 20, "the reader refuses nearly everything"
    assert sum(outcome == "refused" for outcome in verdicts.values()) >= 40
