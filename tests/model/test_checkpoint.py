"""Loading checkpoints: faulty ones are refused, and the error names the fault."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nvembed_deploy.errors import CheckpointError
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.config_json import read_architecture, read_checkpoint_architecture
from tests.tiny import make_checkpoint, shapes

SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit_json(path: Path, change: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def edit_shard(folder: Path, name: str, value: np.ndarray | None, *, index: bool = True) -> None:
    tensors = load_file(folder / SHARD)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, folder / SHARD)
    if index:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        weight_map = {key: file for key, file in weight_map.items() if file != SHARD} | dict.fromkeys(tensors, SHARD)
        edit_json(folder / INDEX, {"weight_map": weight_map})


def test_keys_and_shapes_are_nvidias(checkpoint: Path) -> None:
    state = load_checkpoint(checkpoint).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes(
        json.loads((checkpoint / "config.json").read_text())
    )


def test_one_file_and_shards_are_the_same(checkpoint: Path, tmp_path: Path) -> None:
    single = load_checkpoint(make_checkpoint(tmp_path / "single", shards=1)).state_dict()
    sharded = load_checkpoint(checkpoint).state_dict()
    assert all((single[name] == value).all() for name, value in sharded.items())


def test_missing_tensor_is_named(folder: Path) -> None:
    edit_shard(folder, "embedding_model.norm.weight", None)
    with pytest.raises(CheckpointError, match=r"lacks embedding_model\.norm\.weight"):
        load_checkpoint(folder)


def test_extra_tensor_is_named(folder: Path) -> None:
    edit_shard(folder, "lm_head.weight", np.zeros((2, 2), np.float16))
    with pytest.raises(CheckpointError, match=r"has unexpected lm_head\.weight"):
        load_checkpoint(folder)


def test_misshapen_tensor_is_named(folder: Path) -> None:
    edit_shard(folder, "embedding_model.norm.weight", np.zeros(31, np.float16))
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \[31\], but config\.json requires \[32\]"):
        load_checkpoint(folder)


def test_index_and_shard_must_agree(folder: Path) -> None:
    edit_shard(folder, "surprise", np.zeros(1, np.float16), index=False)
    with pytest.raises(CheckpointError, match="disagree about surprise"):
        load_checkpoint(folder)


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / SHARD).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARD} is missing"):
        load_checkpoint(folder)


def test_damaged_shard_is_named(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{SHARD} is damaged"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "weights.bin"])
def test_index_cannot_point_elsewhere(folder: Path, name: str) -> None:
    edit_json(folder / INDEX, {"weight_map": {"embedding_model.norm.weight": name}})
    with pytest.raises(CheckpointError, match="not a safetensors file of the folder"):
        load_checkpoint(folder)


def test_index_without_a_map(folder: Path) -> None:
    (folder / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="has no 'weight_map'"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (None, {"model_type": "bert"}, "model_type 'bert'"),
        (None, {"hidden_size": 99}, "hidden_size is 99 at the top level but 32"),
        (None, {"padding_side": "left"}, "padding_side is 'left'"),
        (None, {"text_config": 7}, "'text_config' is missing or not an object"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("text_config", {"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ("text_config", {"num_hidden_layers": None}, "'num_hidden_layers' is null"),
        ("text_config", {"num_hidden_layers": "two"}, "'num_hidden_layers' must be an integer, got 'two'"),
        ("text_config", {"num_hidden_layers": 0}, "layers must be at least 1, got 0"),
        ("text_config", {"num_key_value_heads": 3}, "not a multiple of 3"),
        ("text_config", {"head_dim": 15}, "head_dim must be even .* got 15"),
        ("latent_attention_config", {"hidden_dim": 64}, "must equal"),
        ("latent_attention_config", {"output_normalize": False}, "output_normalize is False"),
    ],
)
def test_config_that_would_compute_something_else(
    folder: Path, section: str | None, change: dict, message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config if section is None else config[section]).update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, ValueError), match=message):
        read_checkpoint_architecture(folder)


def test_published_config_leaves_the_sizes_to_defaults() -> None:
    # Source: config.json of nvidia/NV-Embed-v2; v1's has no top-level hidden_size.
    text = {
        "model_type": "bidir_mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-05,
        "sliding_window": 4096,
    }
    config = read_architecture(
        {
            "model_type": "nvembed",
            "architectures": ["NVEmbedModel"],
            "text_config": text,
            "latent_attention_config": {"model_type": "latent_attention"},
        }
    )
    assert (config.latent.latents, config.latent.heads, config.latent.head_dim) == (512, 8, 4096)

    from nvembed_deploy.export.forecast import count_parameters

    # The exact count: index metadata total_size 15,702,032,384 bytes in FP16.
    assert count_parameters(config, fold=False) == 7_851_016_192


def test_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load_checkpoint(folder)


def test_folder_without_anything(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_checkpoint(tmp_path)
