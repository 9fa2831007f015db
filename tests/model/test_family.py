"""The model families against golden vectors, if available, and against transformers with tiny random models."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file, save_file

from nvembed_deploy import Encoder
from nvembed_deploy.backends.pytorch import PyTorchBackend
from nvembed_deploy.bundle.module_files import module_files
from nvembed_deploy.engines.portable_operators import unsupported
from nvembed_deploy.errors import CheckpointError, ConfigError, ParityError
from nvembed_deploy.export.graph.trace import trace
from nvembed_deploy.model import text_contract as text_contract_module
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.config import Mask, Pooling, UserStatement
from nvembed_deploy.model.config_json import read_architecture, read_checkpoint_architecture
from nvembed_deploy.model.family import MODEL_FAMILIES, ModelFamily
from nvembed_deploy.model.sentence_transformers_files import StatedPooling, read_pooling, read_prompts
from nvembed_deploy.parity.compare import require_mask
from nvembed_deploy.select_backend import open_parts
from nvembed_deploy.spec import Dialect, Precision
from nvembed_deploy.tokenization import TextEncoder, TokenBatch
from tests.conftest import ROOT
from tests.tiny import make_tokenizer

REFERENCE_TOLERANCE = 3e-6
ONNX_TOLERANCE = 5e-6
TOKEN_LEVEL_TOLERANCE = 2e-5
SPECIALS = ("<s>", "</s>", "<unk>")
GOLDEN = ROOT.parent / "shared" / "golden" / "family"


@pytest.fixture(scope="module", autouse=True)
def tiny_relatives() -> Iterator[None]:
    """The tiny checkpoints have another hidden size than the published ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nvembed_deploy.model.config_json.LLAMA_EMBED_HIDDEN", SMALL["hidden_size"])
        yield


GOLDEN_NAMES = ("e5-mistral-tiny", "llama-bidirectional-tiny", "qwen3-embedding-tiny")


def export(folder: Path, out: Path, *flags: str) -> Path:
    from nvembed_deploy.export.to_onnx import main

    assert main(["--model", str(folder), "--precision", "fp32", "--out", str(out), "--max", "4x256", *flags]) == 0
    return out


def text_of(folder: Path) -> TextEncoder:
    from nvembed_deploy.model.text_contract import text_contract

    contract = text_contract(folder, read_checkpoint_architecture(folder))
    return TextEncoder((folder / "tokenizer.json").read_bytes(), contract)


@dataclass(frozen=True)
class Golden:
    folder: Path
    cases: list[dict]
    vectors: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=GOLDEN_NAMES)
def golden_family(request: pytest.FixtureRequest) -> Golden:
    folder = GOLDEN / request.param
    if not (folder / "golden.jsonl").is_file():
        pytest.skip(f"no golden data at {folder}")
    with (folder / "golden.jsonl").open(encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    return Golden(folder / "checkpoint", cases, load_file(folder / "golden.safetensors"))


def expected_batch(case: dict) -> TokenBatch:
    return TokenBatch(
        **{name: np.array(case[name], dtype=np.int64) for name in ("input_ids", "attention_mask", "pool_mask")}
    )


def has_special(case: dict) -> bool:
    return any(token in text for text in case["texts"] for token in SPECIALS)


def test_golden_ids_and_masks(golden_family: Golden) -> None:
    text = text_of(golden_family.folder)
    for case in golden_family.cases:
        if has_special(case):
            continue
        batch = text.pad(text.tokenize(case["texts"], prompt=case["prompt"], max_length=case["max_length"]))
        expected = expected_batch(case)
        for row, expected_mask in enumerate(expected.attention_mask.astype(bool)):
            mask = batch.attention_mask[row].astype(bool)
            assert (batch.input_ids[row][mask] == expected.input_ids[row][expected_mask]).all(), case["name"]
            assert (batch.pool_mask[row][mask] == expected.pool_mask[row][expected_mask]).all(), case["name"]


def test_golden_reference(golden_family: Golden) -> None:
    """Some of the stored batches are padded on the left, as in the own code of some models."""
    model = load_checkpoint(golden_family.folder)
    for case in golden_family.cases:
        ids, attended, pooled = map(torch.from_numpy, expected_batch(case))
        with torch.inference_mode():
            vectors = model(ids, attended, pooled)[0].numpy()
            difference = np.abs(vectors - golden_family.vectors[f"embeddings/{case['name']}"]).max()
            assert difference <= REFERENCE_TOLERANCE, (case["name"], difference)
            if case["token_level"]:
                states = model.embedding_model(ids, attended).numpy()
                expected = golden_family.vectors[f"backbone/{case['name']}"]
                assert np.abs(states - expected)[attended.bool().numpy()].max() <= TOKEN_LEVEL_TOLERANCE, case["name"]


@pytest.mark.parametrize("dialect", ["fused", pytest.param("portable", marks=pytest.mark.slow)])
def test_golden_encoder(golden_family: Golden, dialect: str, tmp_path: Path) -> None:
    """The exported model embeds texts to the vectors of transformers."""
    out = export(golden_family.folder, tmp_path / "bundle", "--dialect", dialect, "--max", "8x4608", "--no-parity")
    encoder = Encoder(out, device="cpu")
    for case in golden_family.cases:
        if has_special(case):
            continue
        vectors = encoder.encode(
            case["texts"], prompt=case["prompt"], max_length=min(case["max_length"], encoder.max_length)
        )
        difference = np.abs(vectors - golden_family.vectors[f"embeddings/{case['name']}"]).max()
        assert difference <= ONNX_TOLERANCE, (case["name"], difference)


# Tiny random checkpoints of the other families, compared with transformers.

SMALL = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 72,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
CONFIGS = {
    "gte-Qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"},
        "rope_theta": 1000000.0,
        "sliding_window": 64,
        "use_sliding_window": False,
    },
    "GritLM": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_gritlm7b.MistralForCausalLM"},
        "sliding_window": 16,
    },
    "e5-mistral": {"model_type": "mistral", "architectures": ["MistralModel"], "sliding_window": 16},
    "llama-embed-nemotron": {
        "model_type": "llama_bidirec",
        "architectures": ["LlamaBidirectionalModel"],
        "pooling": "avg",
        "head_dim": 16,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
    },
    "Qwen3-Embedding": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
}
QWEN3_PROMPTS = {"query": "Instruct: Find the passage\nQuery:", "document": ""}
POOLING_FILES = {"gte-Qwen2": "lasttoken", "e5-mistral": "lasttoken", "Qwen3-Embedding": "lasttoken"}
FAMILIES_WITH_BOS = {"GritLM", "e5-mistral", "llama-embed-nemotron"}


def tokenizer_of(name: str) -> str:
    tokenizer = json.loads(make_tokenizer().to_str())
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    eos = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    single = [bos, sequence] if name in FAMILIES_WITH_BOS else [sequence, eos]
    specials = {token: {"id": token, "ids": [id_], "tokens": [token]} for token, id_ in (("<s>", 1), ("</s>", 2))}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": specials,
    }
    return json.dumps(tokenizer)


def make_family_checkpoint(name: str, folder: Path, *, prefix: str = "", head: bool = False) -> Path:
    """Makes a tiny random checkpoint with transformers; its keys begin with `prefix`."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(parents=True)
    config = {**SMALL, "vocab_size": make_tokenizer().get_vocab_size(), **CONFIGS[name]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer_of(name))
    if name in POOLING_FILES:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": POOLING_FILES[name]}))
    if name == "Qwen3-Embedding":  # is known by its prompts
        settings = {"prompts": QWEN3_PROMPTS, "default_prompt_name": None}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    torch.manual_seed(7)
    model = make_transformers_model(transformers, config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.12)
    tensors = {prefix + key: value.numpy() for key, value in model.state_dict().items()}
    if head:
        tensors["lm_head.weight"] = np.zeros((4, 32), np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_transformers_model(transformers, config: dict) -> torch.nn.Module:
    class_names = {"qwen2": "Qwen2", "mistral": "Mistral", "llama_bidirec": "Llama", "qwen3": "Qwen3"}
    class_name = class_names[config["model_type"]]
    options = {key: value for key, value in config.items() if key not in ("model_type", "auto_map", "architectures")}
    settings = getattr(transformers, f"{class_name}Config")(**options, attn_implementation="eager", use_cache=False)
    return getattr(transformers, f"{class_name}Model")(settings).eval().requires_grad_(False)


def transformers_states(folder: Path, ids: torch.Tensor, attended: torch.Tensor, mask: Mask, window: int | None):
    """Computes token states with transformers and an explicit attention mask."""
    transformers = pytest.importorskip("transformers")
    model = make_transformers_model(transformers, json.loads((folder / "config.json").read_text()))
    tensors = {key.removeprefix("model."): value for key, value in load_file(folder / "model.safetensors").items()}
    tensors.pop("lm_head.weight", None)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()}, strict=True)
    positions = torch.arange(ids.shape[1])
    visible = attended.bool()[:, None, None, :].expand(-1, 1, len(positions), -1)
    if mask is Mask.CAUSAL:
        distance = positions[:, None] - positions[None, :]
        visible = visible & (distance >= 0) & (distance < (window or len(positions)))
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    position_ids = positions[None].expand(len(ids), -1)
    return model(input_ids=ids, attention_mask=additive, position_ids=position_ids).last_hidden_state


@pytest.fixture(scope="module", params=CONFIGS)
def family_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("family") / request.param
    yield make_family_checkpoint(request.param, folder, prefix="model." if request.param == "GritLM" else "", head=True)
    shutil.rmtree(folder)


TEXTS = ("the water over the passage", "a", "question in the question and on the query over and over " * 4)


def test_transformers_agrees(family_checkpoint: Path, tmp_path: Path) -> None:
    config = read_checkpoint_architecture(family_checkpoint)
    assert config.family == family_checkpoint.name
    text = text_of(family_checkpoint)
    model = load_checkpoint(family_checkpoint)
    encoder = Encoder(export(family_checkpoint, tmp_path / "bundle"), device="cpu")
    for prompt in (text.query_prompt("find it"), text.prompt(None, None)):
        batch = text.pad(text.tokenize(TEXTS, prompt=prompt, max_length=256))
        ids, attended, pooled = map(torch.from_numpy, batch)
        states = transformers_states(family_checkpoint, ids, attended, config.mask, config.sliding_window)
        if config.pooling is Pooling.LAST:
            expected = states[torch.arange(len(ids)), attended.sum(dim=1) - 1]
            assert (ids[torch.arange(len(ids)), attended.sum(dim=1) - 1] == 2).all()
        else:
            expected = (states * pooled[..., None]).sum(dim=1) / pooled.sum(dim=1, keepdim=True)
        expected = torch.nn.functional.normalize(expected, dim=-1).numpy()
        with torch.inference_mode():
            our_states = model.embedding_model(ids, attended)
            vectors = model(ids, attended, pooled)[0].numpy()
        assert (our_states - states)[attended.bool()].abs().max() <= TOKEN_LEVEL_TOLERANCE
        assert np.abs(vectors - expected).max() <= REFERENCE_TOLERANCE
        assert np.abs(encoder.encode(list(TEXTS), prompt=prompt) - expected).max() <= ONNX_TOLERANCE


def test_gritlm_pools_neither_the_instruction_nor_the_bos_before_it(tmp_path: Path) -> None:
    text = text_of(make_family_checkpoint("GritLM", tmp_path / "grit"))
    prompt = text.prompt("find it", None)
    assert prompt == "<|user|>\nfind it\n<|embed|>\n"
    assert text.prompt(None, None) == "<|embed|>\n"
    row = text.tokenize(["water"], prompt=prompt, max_length=99)[0]
    alone = make_tokenizer().encode(prompt).ids  # gritlm.py counts these tokens, including the BOS
    assert row.prompt_tokens == len(alone)
    assert text.tokenize(["water"], prompt="", max_length=99)[0].prompt_tokens == 0


def test_truncation_keeps_the_last_token(tmp_path: Path) -> None:
    text = text_of(make_family_checkpoint("Qwen3-Embedding", tmp_path / "qwen"))
    for length in (1, 2, 7):
        row = text.tokenize(["the water over the passage"], max_length=length)[0]
        assert (len(row), row.ids[-1], row.truncated) == (length, 2, True)
    batch = text.pad(text.tokenize(list(TEXTS), max_length=99))
    assert batch.pool_mask.sum(axis=1).tolist() == [1, 1, 1]


def test_vectors_of_a_matryoshka_model_can_be_truncated(tmp_path: Path) -> None:
    folder = make_family_checkpoint("Qwen3-Embedding", tmp_path / "qwen")
    config = json.loads((folder / "config.json").read_text())
    large = read_architecture(
        {**config, "hidden_size": 1024}, pooling=read_pooling(folder), prompts=read_prompts(folder)
    )
    assert large.matryoshka is not None
    assert large.matryoshka.allows(256, 1024)
    bundle = export(folder, tmp_path / "bundle")
    encoder = Encoder(bundle, device="cpu")
    full = encoder.encode(list(TEXTS))
    with pytest.raises(ConfigError, match="dimensions is 31"):
        encoder.encode(list(TEXTS), dimensions=31)
    assert (encoder.encode(list(TEXTS), dimensions=32) == full).all()
    from dataclasses import replace

    from nvembed_deploy.model.config import Matryoshka

    architecture = replace(encoder.manifest.source.architecture, matryoshka=Matryoshka(min_dim=8, dims=(8, 16)))
    manifest = replace(encoder.manifest, source=replace(encoder.manifest.source, architecture=architecture))
    encoder._bundle = replace(encoder._bundle, manifest=manifest)
    truncated = encoder.encode(list(TEXTS), dimensions=16)
    assert truncated.shape == (3, 16)
    np.testing.assert_allclose(truncated, full[:, :16] / np.linalg.norm(full[:, :16], axis=1, keepdims=True), atol=1e-6)
    raw = encoder.encode(list(TEXTS), dimensions=16, normalize=False)
    np.testing.assert_allclose(raw, encoder.encode(list(TEXTS), normalize=False)[:, :16], rtol=1e-6)
    with pytest.raises(ConfigError, match="pass a supported dimension: 8, 16"):
        encoder.encode(list(TEXTS), dimensions=12)


def test_named_prompts(tmp_path: Path) -> None:
    folder = make_family_checkpoint("llama-embed-nemotron", tmp_path / "llama")
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "query: "}}))
    encoder = Encoder(export(folder, tmp_path / "bundle"), device="cpu")
    named = encoder.encode(list(TEXTS), prompt_name="query")
    assert (named == encoder.encode(list(TEXTS), prompt="query: ")).all()
    assert (encoder.encode(list(TEXTS), prompt_name="document") == encoder.encode_document(list(TEXTS))).all()
    with pytest.raises(ConfigError, match="this model's prompts are: 'query', 'document'"):
        encoder.encode(list(TEXTS), prompt_name="qurey")
    with pytest.raises(ConfigError, match="prompt and prompt_name are mutually exclusive"):
        encoder.encode(list(TEXTS), prompt_name="query", prompt="x")


def test_the_small_nvidia_llama_takes_prefixes_and_no_instruction() -> None:
    config = {**SMALL, **CONFIGS["llama-embed-nemotron"], "vocab_size": 300, "hidden_size": 2048}
    family = MODEL_FAMILIES[read_architecture(config).family]
    assert (family.default_prompt, family.prompts["query"], family.template) == ("passage: ", "query: ", "")
    assert read_architecture(config).matryoshka.dims == (384, 512, 768, 1024, 2048)


def test_a_model_without_instructions_has_its_own_query_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvembed_deploy.model.config_json.LLAMA_EMBED_HIDDEN", 4096)
    monkeypatch.setattr("nvembed_deploy.model.config_json.EMBEDQA_HIDDEN", SMALL["hidden_size"])
    encoder = Encoder(
        export(make_family_checkpoint("llama-embed-nemotron", tmp_path / "qa"), tmp_path / "b"), device="cpu"
    )
    assert encoder.query_prompt("find it") == "query: "
    assert (encoder.encode("water") == encoder.encode("water", prompt="passage: ")).all()
    assert (encoder.encode("water", prompt_name="query") == encoder.encode("water", prompt="query: ")).all()
    with pytest.raises(ConfigError, match="takes no instructions; pass prompt_name, which can be: 'query', 'document'"):
        encoder.encode("water", instruction="find it")


def test_a_wrong_mask_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    causal = make_family_checkpoint("Qwen3-Embedding", tmp_path / "qwen")
    for folder, mask, message in (
        (causal, Mask.BIDIRECTIONAL, "first token of a text does not attend to the tokens after it"),
        (checkpoint, Mask.CAUSAL, "first token of a text attends to the tokens after it"),
    ):
        text, backend = text_of(folder), PyTorchBackend(folder)
        model_mask = read_checkpoint_architecture(folder).mask
        require_mask(backend, text, model_mask)
        assert model_mask is not mask
        with pytest.raises(ParityError, match=message):
            require_mask(backend, text, mask)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "is not a supported embedding model.*gte-Qwen2"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "the pooling of this .* is not stated"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "the pooling of this .* is not stated"),
        ({**CONFIGS["llama-embed-nemotron"], "is_causal": True}, "is_causal is True.*bidirectional"),
        ({**CONFIGS["gte-Qwen2"], "use_sliding_window": True}, "use_sliding_window is True"),
        ({**CONFIGS["llama-embed-nemotron"], "pooling": "cls"}, "pooling is 'cls'"),
        ({**CONFIGS["llama-embed-nemotron"], "attention_bias": True}, "attention_bias is True"),
        ({**CONFIGS["llama-embed-nemotron"], "rope_scaling": {"rope_type": "su"}}, "has type 'su'"),
        ({**CONFIGS["llama-embed-nemotron"], "rope_scaling": {**LLAMA3, "factor": 0.5}}, "rope_scaling has factor 0.5"),
    ],
)
def test_unsupported_variants_are_refused(config: dict, message: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=message):
        read_architecture({**SMALL, "vocab_size": 300, **config})


def test_lost_eos_missing_bos_and_another_pooling_are_named(tmp_path: Path) -> None:
    qwen = make_family_checkpoint("Qwen3-Embedding", tmp_path / "qwen")
    (qwen / "tokenizer.json").write_text(json.dumps({**json.loads(tokenizer_of("x")), "post_processor": None}))
    with pytest.raises(CheckpointError, match="does not add the EOS that Qwen3-Embedding pools"):
        text_of(qwen)
    llama = make_family_checkpoint("llama-embed-nemotron", tmp_path / "llama")
    (llama / "tokenizer.json").write_text(tokenizer_of("Qwen3-Embedding"))
    with pytest.raises(CheckpointError, match=r"needs \[1\] before"):
        text_of(llama)
    e5 = make_family_checkpoint("e5-mistral", tmp_path / "e5")
    assert text_of(e5).contract.suffix_ids == (2,)  # its own tokenizer.json forgets it
    (e5 / "tokenizer_config.json").write_text(json.dumps({"add_eos_token": True}))
    (e5 / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    with pytest.raises(CheckpointError, match=r"adds no such token, but tokenizer_config\.json says add_eos_token"):
        text_of(e5)  # with another pooling it is no relative of e5-mistral's


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("e5-mistral", {"pooling_mode": "lasttoken", "include_prompt": True}, ""),
        ("e5-mistral", {"pooling_mode": ["lasttoken"]}, ""),
        ("e5-mistral", {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, ""),
        ("gte-Qwen2", {"pooling_mode": "mean"}, "the pooling is last according to family gte-Qwen2 and mean according"),
        ("e5-mistral", {"pooling_mode_cls_token": True}, "has pooling cls, which is not supported"),
        ("e5-mistral", {"pooling_mode_cls_token": False}, "enables no pooling"),
        ("llama-embed-nemotron", {"pooling_mode_mean_tokens": True}, ""),
        ("llama-embed-nemotron", {"pooling_mode": "lasttoken"}, "the pooling is mean according to family"),
        ("llama-embed-nemotron", {"pooling_mode": ["mean", "max"]}, "has pooling max, mean"),
        ("llama-embed-nemotron", {"pooling_mode": "mean", "include_prompt": False}, "excludes the prompt from pooling"),
        ("GritLM", {"pooling_mode": "mean", "include_prompt": False}, ""),
    ],
)
def test_the_pooling_in_sentence_transformers_files(tmp_path: Path, name: str, settings: dict, message: str) -> None:
    folder = make_family_checkpoint(name, tmp_path / "model")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    if message:
        with pytest.raises(CheckpointError, match=message):
            text_of(folder)
    else:
        text_of(folder)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["Transformer", "Pooling", "Normalize"], ""),
        (["Transformer", "Pooling", "Dense", "Normalize"], "has Dense after the model"),
        (None, "is damaged"),
    ],
)
def test_modules_after_the_pooling_are_refused(tmp_path: Path, kinds: list[str] | None, message: str) -> None:
    folder = make_family_checkpoint("e5-mistral", tmp_path / "model")
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    modules: object = {"a": 1}
    if kinds:
        modules = [
            {"type": f"sentence_transformers.models.{kind}", "path": paths.get(kind, f"9_{kind}")} for kind in kinds
        ]
    (folder / "modules.json").write_text(json.dumps(modules))
    if message:
        with pytest.raises(CheckpointError, match=message):
            text_of(folder)
    else:
        text_of(folder)


def test_a_bundles_files_in_a_checkpoints_folder_state_nothing(tmp_path: Path) -> None:
    folder = make_family_checkpoint("e5-mistral", tmp_path / "model")
    pooling, contract = read_pooling(folder), text_of(folder).contract
    assert pooling is not None
    for name, content in module_files({"query": "ask: ", "document": "text: "}).items():
        (folder / name).write_bytes(content)
    assert (read_pooling(folder), text_of(folder).contract) == (pooling, contract)


def prompts_of(folder: Path, family: ModelFamily) -> tuple[dict[str, str], str]:
    prompts = text_contract_module._prompts(folder, family, UserStatement())
    return prompts.named, prompts.default


def test_empty_prompts_of_sentence_transformers_are_ignored(tmp_path: Path) -> None:
    family = MODEL_FAMILIES["llama-nv-embedqa"]
    path = tmp_path / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": {"query": "", "document": ""}, "default_prompt_name": None}))
    assert prompts_of(tmp_path, family) == (family.prompts, "passage: ")
    path.write_text(json.dumps({"prompts": {"query": "ask: ", "new": "x: "}, "default_prompt_name": "new"}))
    assert prompts_of(tmp_path, family) == ({**family.prompts, "query": "ask: ", "new": "x: "}, "x: ")


@pytest.mark.parametrize("name", ["e5-mistral", "GritLM", "Qwen3-Embedding"])
def test_portable_graphs_hold_what_tensorrt_10_parses(tmp_path: Path, name: str) -> None:
    stated = StatedPooling(modes=frozenset({POOLING_FILES.get(name, "mean")}), include_prompt=True, path="")
    config = read_architecture({**SMALL, **CONFIGS[name], "vocab_size": 300}, pooling=stated)
    graph = trace(replace(config, layers=1), precision=Precision.FP16, dialect=Dialect.PORTABLE, fold=True)
    ir.save(graph, tmp_path / "model.onnx")
    assert set(unsupported(tmp_path / "model.onnx")) == set()


def test_rope_written_as_transformers_5_does() -> None:
    old = {**SMALL, **CONFIGS["llama-embed-nemotron"], "vocab_size": 300}
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**LLAMA3, "rope_theta": 500000.0}
    assert read_architecture(new) == read_architecture(old)


def test_families_are_listed_by_name() -> None:
    assert list(MODEL_FAMILIES) == [family.name for family in MODEL_FAMILIES.values()]
    assert len(MODEL_FAMILIES) == 13


def test_left_padding_of_a_tokenizer_changes_nothing(tmp_path: Path) -> None:
    """The runtime pads on the right and pools by token counts, whatever the padding side of the tokenizer."""
    folder = make_family_checkpoint("Qwen3-Embedding", tmp_path / "qwen")
    (folder / "tokenizer_config.json").write_text(json.dumps({"padding_side": "left", "pad_token": "</s>"}))
    bundle = export(folder, tmp_path / "bundle")
    _, text, backend = open_parts(bundle, "cpu")
    together = backend.run(text.pad(text.tokenize(list(TEXTS), max_length=99))).embeddings
    alone = [backend.run(text.pad(text.tokenize([body], max_length=99))).embeddings[0] for body in TEXTS]
    np.testing.assert_allclose(together, np.stack(alone), atol=ONNX_TOLERANCE)
