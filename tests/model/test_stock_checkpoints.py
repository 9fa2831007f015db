"""Checkpoints of transformers' own classes: the same vectors as transformers', or a refusal, never a third thing."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as torch_save_file
from tokenizers.processors import TemplateProcessing

from nvembed_deploy import Encoder
from nvembed_deploy.engines import show
from nvembed_deploy.errors import CheckpointError, ConfigError, DeployError
from nvembed_deploy.export.to_onnx import main as to_onnx
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.config import Mask, Pooling, UserStatement
from nvembed_deploy.model.config_json import read_architecture, read_checkpoint_architecture
from nvembed_deploy.model.nvembed import NVEmbed
from nvembed_deploy.model.sentence_transformers_files import StatedPooling, StatedPrompts
from nvembed_deploy.model.text_contract import text_contract
from nvembed_deploy.tokenization import TextEncoder
from tests.conftest import ROOT
from tests.tiny import make_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed: make test installs it")

TOLERANCE = 5e-6
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {
    "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 256,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaModel"], "rope_theta": 500000.0, "is_causal": False},
    "llama linear": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "llama yarn": {
        "model_type": "llama", "architectures": ["LlamaModel"], "is_causal": True,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4, "original_max_position_embeddings": 512,
        },
    },
    "mistral": {
        "model_type": "mistral", "architectures": ["MistralModel"], "is_causal": False, "sliding_window": 7,
        "rope_theta": 10000.0,
    },
    "ministral3": {
        "model_type": "ministral3", "architectures": ["Ministral3Model"], "is_causal": False, "rope_parameters": YARN,
        "sliding_window": None,
    },
    "qwen2": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000000.0,
        "use_sliding_window": False,
    },
    "qwen3": {
        "model_type": "qwen3", "architectures": ["Qwen3Model"], "rope_theta": 1000000.0, "is_causal": False,
        "sliding_window": 5, "use_sliding_window": True, "attention_bias": False,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen3 causal": {
        "model_type": "qwen3", "architectures": ["Qwen3Model"], "rope_theta": 1000000.0, "sliding_window": 5,
        "use_sliding_window": True, "max_window_layers": 2,
    },
}  # fmt: skip
POOLINGS = {"llama": "mean", "mistral": "mean", "ministral3": "mean", "qwen3": "mean"}
TEXTS = ("the water over the passage", "a", "question in the question and on the query over and over " * 3)
STATED_MEAN = StatedPooling(modes=frozenset({"mean"}), include_prompt=True, path="1_Pooling/config.json")
STATED_LAST = StatedPooling(modes=frozenset({"lasttoken"}), include_prompt=True, path="1_Pooling/config.json")


def make_checkpoint(name: str, folder: Path) -> Path:
    """Makes a tiny random checkpoint of one of transformers' classes, with its sentence-transformers files."""
    folder.mkdir(parents=True)
    config = {**SIZES, "vocab_size": make_tokenizer().get_vocab_size(), **CONFIGS[name]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(make_tokenizer().to_str())
    write_pooling(folder, POOLINGS.get(name, "lasttoken"))
    torch.manual_seed(3)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.12)
    save_file({key: value.numpy() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def write_pooling(folder: Path, mode: str, where: str = "1_Pooling", **settings: object) -> None:
    """Writes the sentence-transformers files of a pooling."""
    modules = [("Transformer", ""), ("Pooling", where), ("Normalize", "2_Normalize")]
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": index, "name": str(index), "type": f"sentence_transformers.models.{kind}", "path": path}
                for index, (kind, path) in enumerate(modules)
            ]
        )
    )
    (folder / where).mkdir(exist_ok=True)
    (folder / where / "config.json").write_text(json.dumps({"pooling_mode": mode, **settings}))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Returns the checkpoint of a name, each made once. Read only."""
    root = tmp_path_factory.mktemp("stock")

    def of(name: str) -> Path:
        folder = root / name.replace(" ", "-")
        return folder if folder.exists() else make_checkpoint(name, folder)

    yield of
    shutil.rmtree(root)


def batch_of(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns right-padded ids and their mask, by the tokenizer's own rules."""
    rows = [tokens.ids for tokens in transformers_tokenizer(folder).encode_batch(list(TEXTS))]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


def transformers_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@torch.no_grad()
def transformers_vectors(folder: Path) -> np.ndarray:
    """Embeds the texts with the class that transformers loads from the folder, and the pooling of its files."""
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ids, attended = batch_of(folder)
    states = model(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state
    settings = json.loads((folder / "1_Pooling" / "config.json").read_text())
    if settings.get("pooling_mode") == "lasttoken" or settings.get("pooling_mode_lasttoken"):
        pooled = states[torch.arange(len(ids)), attended.sum(dim=1) - 1]
    else:
        pooled = (states * attended[..., None]).sum(dim=1) / attended.sum(dim=1, keepdim=True)
    return torch.nn.functional.normalize(pooled, dim=-1).numpy()


@torch.no_grad()
def our_vectors(folder: Path) -> np.ndarray:
    """Embeds the same ids with the reference."""
    config = read_checkpoint_architecture(folder)
    text_contract(folder, config)
    ids, attended = batch_of(folder)
    pooled = attended.clone()
    if config.pooling is Pooling.LAST:
        pooled = torch.zeros_like(attended)
        pooled[torch.arange(len(ids)), attended.sum(dim=1) - 1] = 1
    return load_checkpoint(folder)(ids, attended, pooled)[0].numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_equals_transformers(checkpoints: Callable[[str], Path], name: str) -> None:
    assert np.abs(our_vectors(checkpoints(name)) - transformers_vectors(checkpoints(name))).max() <= TOLERANCE


@pytest.mark.parametrize("name", ["ministral3", "qwen3", *[pytest.param(name, marks=pytest.mark.slow) for name in (
    "llama", "llama linear", "llama yarn", "mistral", "qwen2", "qwen3 causal",
)]])  # fmt: skip
def test_the_exported_graph_equals_transformers(checkpoints: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    folder = checkpoints(name)
    flags = ["--model", str(folder), "--precision", "fp32", "--max", "4x256", "--out", str(tmp_path / "bundle")]
    assert to_onnx(flags) == 0
    vectors = Encoder(tmp_path / "bundle", device="cpu", backend="onnxruntime").encode(list(TEXTS))
    assert np.abs(vectors - transformers_vectors(folder)).max() <= TOLERANCE


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


ANY = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 1000, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma2", "architectures": ["Gemma2Model"]}, "is not a supported embedding model"),
        ({"model_type": "gemma3_text", "architectures": ["Gemma3TextModel"]}, "is not a supported embedding model"),
        ({"model_type": "modernbert", "architectures": ["ModernBertModel"]}, "is not a supported embedding model"),
        ({"model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"]}, "is not a supported embedding model"),
        ({"model_type": "nvretriever", "architectures": ["NVRetrieverModel"]}, "is not a supported embedding model"),
        (
            {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "text_config": {}},
            "vision-language layout",
        ),
        ({}, "architectures is None"),
        ({"model_type": "mistral", "architectures": None}, "architectures is None"),
        ({"model_type": "mistral", "architectures": "MistralModel"}, "architectures is 'MistralModel'"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "pooling of this .* is not stated"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "pooling of this .* is not stated"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "pooling of this .* is not stated"),
        ({"model_type": "qwen2", "architectures": ["Qwen2Model"]}, "pooling of this .* is not stated"),
        (
            {"model_type": "qwen2", "architectures": ["Qwen2Model"], "auto_map": {"AutoModel": "modeling_qwen.Q"}},
            "pooling of this .* is not stated",
        ),
        ({"model_type": "mistral", "architectures": ["MistralModel"], "vocab_size": 32003}, "is not stated"),
        (
            {"model_type": "llama", "architectures": ["LlamaBiModel"], "auto_map": {"AutoModel": "m.LlamaEncoder"}},
            "is not a supported embedding model",
        ),
        (
            {"model_type": "qwen3", "architectures": ["Qwen3Model"], "auto_map": {"AutoModel": "m.BidirectionalQ"}},
            "auto_map names 'm.BidirectionalQ'",
        ),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForSequenceClassification"]}, "a classifier gives scores"),
        (
            {"model_type": "llama_bidirec", "architectures": ["LlamaBidirectionalForSequenceClassification"]},
            "a classifier gives scores",
        ),
        (
            {"model_type": "llama_bidirec", "architectures": ["LlamaBidirectionalModel"], "hidden_size": 3072},
            "the prompts of a LlamaBidirectionalModel of hidden size 3072 are not known",
        ),
    ],
)
def test_what_does_not_state_itself_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_architecture({**ANY, **config})


def config_of(model_type: str, architecture: str, **fields: object) -> dict[str, Any]:
    return {**ANY, "model_type": model_type, "architectures": [architecture], **fields}


@pytest.mark.parametrize(
    ("config", "pooling", "family", "mask"),
    [
        (config_of("ministral3", "Ministral3Model", is_causal=False), STATED_MEAN, "Ministral3", "bidirectional"),
        (config_of("qwen2", "Qwen2ForCausalLM"), STATED_LAST, "Qwen2", "causal"),
        (config_of("qwen3", "Qwen3Model", is_causal=False), STATED_MEAN, "Qwen3", "bidirectional"),
        (config_of("qwen3", "Qwen3ForCausalLM"), STATED_LAST, "Qwen3", "causal"),
        (config_of("mistral", "MistralModel", vocab_size=32000), STATED_LAST, "e5-mistral", "causal"),
        (config_of("mistral", "MistralModel", vocab_size=32003), STATED_LAST, "Mistral", "causal"),
        (config_of("llama", "LlamaModel", is_causal=False, pooling="avg"), None, "Llama", "bidirectional"),
    ],
)
def test_what_states_itself_is_served(
    config: dict[str, Any], pooling: StatedPooling | None, family: str, mask: str
) -> None:
    model = read_architecture(config, pooling=pooling)
    assert (model.family, model.mask.value) == (family, mask)


def test_prompts_decide_who_is_a_relative_of_a_published_model() -> None:
    """The template of instructions is known from a family, or read off the prompts, and otherwise there is none."""
    config = {**ANY, "model_type": "qwen3", "architectures": ["Qwen3Model"]}

    def family(*prompts: str) -> tuple[str, str | None]:
        stated = StatedPrompts(prompts=dict(zip("abc", prompts, strict=False)), default_prompt_name=None, path="x")
        return read_architecture(config, pooling=STATED_LAST, prompts=stated).family, stated.template

    assert family() == ("Qwen3", None)  # as sentence-transformers, which then adds no prompt to a query
    assert family("Instruct: find\nQuery:", "") == ("Qwen3-Embedding", "Instruct: {instruction}\nQuery:")
    assert family("Instruct: find\nQuery: ") == ("Qwen3", "Instruct: {instruction}\nQuery: ")
    assert family("query: ", "document: ") == ("Qwen3", "")


def test_a_prompt_that_is_stated_by_hand_changes_no_family() -> None:
    """Or e5-mistral would lose the EOS that its tokenizer.json forgets."""
    config = config_of("mistral", "MistralModel", vocab_size=32000)
    stated = UserStatement(document_prompt="passage: ")
    assert read_architecture(config, pooling=STATED_LAST, stated=stated).family == "e5-mistral"


def damage_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def damage_index(folder: Path) -> None:
    (folder / "old.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    from safetensors import safe_open

    with safe_open(folder / "old.safetensors", framework="np") as shard:
        keys = list(shard.keys())
    weight_map = dict.fromkeys(keys, "old.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def damage_pooling_path(folder: Path) -> None:
    write_pooling(folder, "lasttoken", where="9_Pooling")  # and 1_Pooling still says mean


def damage_missing_pooling(folder: Path) -> None:
    shutil.rmtree(folder / "1_Pooling")


def damage_no_pooling(folder: Path) -> None:
    shutil.rmtree(folder / "1_Pooling")
    (folder / "modules.json").unlink()


def damage_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch_save_file({**weights, "model.head.weight": torch.zeros(2)}, folder / "model.safetensors")


def damage_eos(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"add_eos_token": true}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_adapter, r"has an unmerged adapter .* merge it first: python -c .*merge_and_unload"),
        (damage_index, "has both model.safetensors and model.safetensors.index.json"),
        (damage_pooling_path, "has pooling lasttoken and .*1_Pooling.config.json mean"),
        (damage_missing_pooling, "1_Pooling.config.json"),
        (damage_no_pooling, "the pooling of this LlamaModel is not stated"),
        (damage_head, "has unexpected head.weight; its weights do not match"),
        (damage_eos, "tokenizer_config.json says add_eos_token"),
    ],
)
def test_folders_that_contradict_themselves_are_refused(
    checkpoints: Callable[[str], Path], damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "damaged")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        our_vectors(folder)


def test_the_pooling_is_read_where_modules_json_says(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "moved")
    shutil.rmtree(folder / "1_Pooling")
    write_pooling(folder, "lasttoken", where="2_Pooling")
    assert read_checkpoint_architecture(folder).pooling is Pooling.LAST


def test_a_prompt_that_is_not_pooled(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """sentence-transformers leaves out the tokens of the prompt and the BOS before them."""
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "masked")
    write_pooling(folder, "mean", include_prompt=False)
    contract = text_contract(folder, read_checkpoint_architecture(folder))
    assert (contract.mask_prompt, contract.exclude_prefix_from_pooling) == (True, True)


@pytest.mark.parametrize(
    ("prompts", "default", "query", "document"),
    [
        ({"retrieval": "find: ", "sts": "compare: "}, "sts", "", ""),
        ({"query": "query: ", "passage": "text: "}, "query", "query: ", "text: "),
        ({"retrieval": "find: "}, None, "", ""),
    ],
)
def test_a_default_prompt_is_none_for_queries_and_documents(
    checkpoints: Callable[[str], Path],
    prompts: dict[str, str],
    default: str | None,
    query: str,
    document: str,
    tmp_path: Path,
) -> None:
    """sentence-transformers takes `default_prompt_name` in `encode` only, not in `encode_query`."""
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "prompts")
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": prompts, "default_prompt_name": default})
    )
    contract = text_contract(folder, read_checkpoint_architecture(folder))
    encoder = TextEncoder((folder / "tokenizer.json").read_bytes(), contract)
    assert encoder.prompt(None, None) == prompts.get(str(default), "")
    assert [encoder.prompts(None)[name] for name in ("query", "document")] == [query, document]


SETTINGS = "sentence_bert_config.json"
PROMPTS = "config_sentence_transformers.json"
TOKENS = "tokenizer_config.json"
CHAT = {"method": "forward", "method_output_name": "last_hidden_state", "format": "flat"}


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (SETTINGS, {"do_lower_case": True}, "do_lower_case is True"),
        (
            "sentence_roberta_config.json",
            {"do_lower_case": True},
            "sentence_roberta_config.json: do_lower_case is True",
        ),
        (SETTINGS, {"max_seq_length": "64"}, "'max_seq_length' must be an integer"),
        (SETTINGS, {"max_seq_length": 0}, "max_seq_length in .* is 0"),
        (SETTINGS, {"config_args": {"sliding_window": 3}}, "config_args has sliding_window"),
        (SETTINGS, {"tokenizer_args": {"truncation_side": "left"}}, "tokenizer_args has truncation_side"),
        (SETTINGS, {"model_kwargs": []}, r"model_kwargs has \[\]"),
        (SETTINGS, {"processing_kwargs": {"text": {"add_special_tokens": False}}}, "processing_kwargs is"),
        (SETTINGS, {"transformer_task": "text-generation"}, "transformer_task is 'text-generation'"),
        (SETTINGS, {"modality_config": {"message": CHAT}}, "modality_config is"),
        (SETTINGS, {"new": 1}, "'new' is not a known setting"),
        (PROMPTS, {"model_type": "SparseEncoder"}, "model_type is 'SparseEncoder'"),
        (PROMPTS, {"truncate_dim": 16}, "truncate_dim is 16"),
        (PROMPTS, {"prompts": {}, "default_prompt_name": []}, r"default_prompt_name is \[\]"),
        (
            "1_Pooling/config.json",
            {"pooling_mode": "mean", "include_prompt": 0},
            "'include_prompt' must be true or fal",
        ),
        ("1_Pooling/config.json", {"pooling_mode": None}, "has pooling None"),
    ],
)
def test_what_sentence_transformers_would_compute_otherwise_is_refused(
    checkpoints: Callable[[str], Path], file: str, fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "other")
    (folder / file).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=message):
        text_contract(folder, read_checkpoint_architecture(folder))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("my_code.Pooling", "names 'my_code.Pooling', which is no class of sentence-transformers"),
        ("sentence_transformers.models.CLIPModel", "begins with CLIPModel"),
    ],
)
def test_modules_of_other_code_are_refused(
    checkpoints: Callable[[str], Path], kind: str, message: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "other")
    (folder / "modules.json").write_text(json.dumps([{"type": kind, "path": ""}]))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint_architecture(folder)


def test_settings_that_change_no_vector_are_accepted(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """What sentence-transformers 6 writes, and the arguments that older checkpoints pass on."""
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "st6")
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "module_output_name": "token_embeddings",
        "unpad_inputs": None,
        "model_args": {"torch_dtype": "bfloat16", "attn_implementation": "sdpa"},
        "tokenizer_args": {"padding_side": "left"},
    }
    (folder / SETTINGS).write_text(json.dumps(settings))
    (folder / PROMPTS).write_text(json.dumps({"model_type": "SentenceTransformer", "prompts": {}}))
    assert text_contract(folder, read_checkpoint_architecture(folder)).max_tokens == SIZES["max_position_embeddings"]


LEFT = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
WATER = {"content": "water", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (TOKENS, {"truncation_side": "left"}, "tokenizer_config.json says that longer texts are cut on the left"),
        ("tokenizer.json", {"truncation": LEFT}, "tokenizer.json says that longer texts are cut on the left"),
        (TOKENS, {"split_special_tokens": True}, "split_special_tokens is True"),
        (TOKENS, {"auto_map": {"AutoTokenizer": ["tokens.Own", None]}}, "auto_map names"),
        (TOKENS, {"added_tokens_decoder": {"290": WATER}}, "adds the token 'water'"),
        (TOKENS, {"additional_special_tokens": ["the"]}, "adds the token 'the'"),
        ("added_tokens.json", {"over": 290}, "adds the token 'over'"),
        (TOKENS, {"model_max_length": "512"}, "'model_max_length' must be a number"),
    ],
)
def test_files_that_change_what_the_tokenizer_states_are_refused(
    checkpoints: Callable[[str], Path], file: str, fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "other")
    path = folder / file
    stated = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**stated, **fields}))
    with pytest.raises(CheckpointError, match=message):
        text_contract(folder, read_checkpoint_architecture(folder))


@pytest.mark.parametrize(
    ("flags", "prompt", "is_served"),
    [
        ({}, "the </s> ask: ", True),
        ({"lstrip": True}, "the </s> ask: ", True),
        ({"rstrip": True}, "ask: ", True),
        ({"rstrip": True}, "the </s> ask: ", False),
        ({"single_word": True}, "</s>", False),
    ],
)
def test_special_tokens_of_a_prompt_that_change_the_text_are_refused(
    checkpoints: Callable[[str], Path], flags: dict[str, bool], prompt: str, is_served: bool, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "prompted")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token.update(flags if token["content"] == "</s>" else {})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / PROMPTS).write_text(json.dumps({"prompts": {"query": prompt}}))
    config = read_checkpoint_architecture(folder)
    if is_served:
        assert text_contract(folder, config).prompts == {"query": prompt}
    else:
        with pytest.raises(CheckpointError, match=r"a special token in the prompt .* changes the tokens"):
            text_contract(folder, config)


def test_two_tokens_after_a_text_whose_prompt_is_not_pooled_are_refused(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "two")
    tokenizer = make_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s> </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert text_contract(folder, read_checkpoint_architecture(folder)).suffix_ids == (2, 2)
    write_pooling(folder, "mean", include_prompt=False)
    with pytest.raises(CheckpointError, match="adds 2 tokens after a text"):
        text_contract(folder, read_checkpoint_architecture(folder))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({SETTINGS: {"max_seq_length": 9}, TOKENS: {"model_max_length": 5}}, 9),
        ({SETTINGS: {"max_seq_length": None}, TOKENS: {"model_max_length": 11}}, 11),
        ({TOKENS: {"model_max_length": 10**30}}, SIZES["max_position_embeddings"]),
    ],
)
def test_longer_texts_are_cut_where_sentence_transformers_cuts_them(
    checkpoints: Callable[[str], Path], limits: dict[str, dict[str, object]], expected: int, tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "short")
    write_pooling(folder, "mean", embedding_dimension=32)
    (folder / "2_Normalize").mkdir()
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<unk>"}
    for name, fields in {TOKENS: {}, **limits}.items():
        (folder / name).write_text(json.dumps({**(tokenizer if name == TOKENS else {}), **fields}))
    contract = text_contract(folder, read_checkpoint_architecture(folder))
    assert contract.max_tokens == expected
    text = TextEncoder((folder / "tokenizer.json").read_bytes(), contract)
    rows = text.tokenize([*TEXTS, TEXTS[0] * 400], max_length=contract.max_tokens)
    assert max(map(len, rows)) == expected
    model = library.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
    ids = model.preprocess([*TEXTS, TEXTS[0] * 400])["input_ids"]
    assert ids.tolist() == text.pad(rows).input_ids.tolist()


def test_what_no_file_states_can_be_stated_by_hand(
    checkpoints: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(checkpoints("qwen2"), tmp_path / "silent")
    expected = transformers_vectors(folder)
    damage_no_pooling(folder)
    assert to_onnx(["--model", str(folder), "--out", str(tmp_path / "b")]) == 1
    assert "pass --pooling mean or --pooling last" in capsys.readouterr().err
    stated = ["--pooling", "last", "--query-prompt", "ask {instruction}: ", "--document-prompt", "text: "]
    flags = ["--model", str(folder), "--precision", "fp32", "--max", "4x256", "--out", str(tmp_path / "b"), *stated]
    assert to_onnx(flags) == 0
    encoder = Encoder(tmp_path / "b", device="cpu", backend="onnxruntime")
    assert np.abs(encoder.encode(list(TEXTS), prompt="") - expected).max() <= TOLERANCE
    assert encoder.query_prompt("what") == "ask what: "
    assert (encoder.encode("water") == encoder.encode("water", prompt="text: ")).all()
    reference = Encoder.from_checkpoint(folder, like=encoder)  # which the files alone would refuse
    assert np.abs(reference.encode(list(TEXTS), prompt="") - expected).max() <= TOLERANCE
    assert show.main([str(tmp_path / "b")]) == 0
    assert "stated by hand, not by the checkpoint: pooling, query prompt, document prompt" in capsys.readouterr().out


def test_statements_that_contradict_the_files_are_refused(checkpoints: Callable[[str], Path]) -> None:
    folder = checkpoints("llama")
    with pytest.raises(ConfigError, match=r"--mask is causal, but the mask is bidirectional according to is_causal"):
        read_checkpoint_architecture(folder, UserStatement(mask=Mask.CAUSAL))
    with pytest.raises(CheckpointError, match=r"the pooling is mean according to .* and last according to --pooling"):
        read_checkpoint_architecture(folder, UserStatement(pooling=Pooling.LAST))
    assert read_checkpoint_architecture(folder, UserStatement(mask=Mask.BIDIRECTIONAL)).stated_by_user == ("mask",)


def test_longer_texts_than_the_query_scale_allows_are_cut(checkpoints: Callable[[str], Path]) -> None:
    config = read_checkpoint_architecture(checkpoints("ministral3"))
    assert config.max_positions == YARN["original_max_position_embeddings"]


def test_show_says_where_each_property_was_read(
    checkpoints: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints("ministral3")
    assert show.main([str(folder)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["mask"] == "bidirectional: is_causal in config.json"
    assert lines["pooling"] == "mean: 1_Pooling/config.json"
    assert lines["rope"] == "base 1e+06, yarn x 16: rope_parameters in config.json"
    assert lines["window"] == "none: config.json"
    assert lines["tokens"] == "[1] text []: tokenizer.json"
    assert lines["prompts"] == "none: no file states any"
    assert lines["length"].startswith("256 tokens, beyond which queries grow")


@pytest.mark.parametrize(
    ("name", "prompts", "settings"),
    [
        ("ministral3", {"query": "query: ", "document": "passage: "}, {}),
        ("llama yarn", {"query": "Instruct: find it\nQuery: "}, {}),
        ("llama", {"query": "the question: "}, {"include_prompt": False}),
    ],
)
def test_sentence_transformers_agrees(
    checkpoints: Callable[[str], Path], name: str, prompts: dict[str, str], settings: dict[str, object], tmp_path: Path
) -> None:
    """The whole way from texts to vectors, with and without a prompt.

    For qwen2 and qwen3 transformers 5 replaces a `tokenizer.json` that is not Qwen's, as the tests' is not.
    """
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    folder = shutil.copytree(checkpoints(name), tmp_path / "model")
    write_pooling(folder, POOLINGS.get(name, "lasttoken"), **{"embedding_dimension": 32, **settings})
    (folder / "2_Normalize").mkdir()
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256, "do_lower_case": False}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<unk>", "model_max_length": 256})
    )
    model = library.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
    flags = ["--model", str(folder), "--precision", "fp32", "--max", "4x256", "--out", str(tmp_path / "bundle")]
    assert to_onnx(flags) == 0
    encoder = Encoder(tmp_path / "bundle", device="cpu", backend="onnxruntime")
    texts = [text for text in TEXTS if len(text) > 1 or not settings]  # a prompt's last space and "a" are one token
    for prompt_name in (None, *prompts):
        expected = model.encode(texts, prompt_name=prompt_name)
        vectors = encoder.encode(texts, prompt_name=prompt_name)
        assert np.abs(vectors - expected).max() <= TOLERANCE, prompt_name
