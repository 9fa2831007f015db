"""NV-Embed's relatives: golden vectors where they are at hand, and transformers' own answers for tiny random models."""

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
from nvembed_deploy.encoder import open_parts
from nvembed_deploy.engines.portable_operators import unsupported
from nvembed_deploy.errors import CheckpointError, ConfigError, ParityError
from nvembed_deploy.export.graph.trace import trace
from nvembed_deploy.model import source
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.config import Mask, Pooling
from nvembed_deploy.model.family import FAMILY, read_architecture, read_checkpoint_architecture, recognize
from nvembed_deploy.parity.compare import require_mask
from nvembed_deploy.spec import Dialect, Precision
from nvembed_deploy.tokenization import TextEncoder, TokenBatch
from tests.conftest import ROOT
from tests.tiny import make_tokenizer

REFERENCE_TOLERANCE = 3e-6
ONNX_TOLERANCE = 5e-6
TOKEN_LEVEL_TOLERANCE = 2e-5
SPECIALS = ("<s>", "</s>", "<unk>")
GOLDEN = ROOT.parent / "shared" / "golden" / "family"
GOLDEN_NAMES = ("e5-mistral-tiny", "llama-bidirectional-tiny", "qwen3-embedding-tiny")


def export(folder: Path, out: Path, *flags: str) -> Path:
    from nvembed_deploy.export.to_onnx import main

    assert main(["--model", str(folder), "--precision", "fp32", "--out", str(out), "--max", "4x256", *flags]) == 0
    return out


def text_of(folder: Path) -> TextEncoder:
    from nvembed_deploy.model.source import text_contract

    contract = text_contract(folder, read_checkpoint_architecture(folder))
    return TextEncoder((folder / "tokenizer.json").read_bytes(), contract)


@dataclass(frozen=True)
class Golden:
    folder: Path
    cases: list[dict]
    vectors: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=GOLDEN_NAMES)
def golden_relative(request: pytest.FixtureRequest) -> Golden:
    folder = GOLDEN / request.param
    if not (folder / "golden.jsonl").is_file():
        pytest.skip(f"no golden data at {folder}")
    with (folder / "golden.jsonl").open(encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    return Golden(folder / "checkpoint", cases, load_file(folder / "golden.safetensors"))


def stored(case: dict) -> TokenBatch:
    return TokenBatch(
        **{name: np.array(case[name], dtype=np.int64) for name in ("input_ids", "attention_mask", "pool_mask")}
    )


def has_special(case: dict) -> bool:
    return any(token in item for item in case["texts"] for token in SPECIALS)


def test_golden_ids_and_masks(golden_relative: Golden) -> None:
    text = text_of(golden_relative.folder)
    for case in golden_relative.cases:
        if has_special(case):
            continue
        batch = text.pad(text.tokenize(case["texts"], prompt=case["prompt"], max_length=case["max_length"]))
        for row, wanted in enumerate(stored(case).attention_mask.astype(bool)):
            real = batch.attention_mask[row].astype(bool)
            assert (batch.input_ids[row][real] == stored(case).input_ids[row][wanted]).all(), case["name"]
            assert (batch.pool_mask[row][real] == stored(case).pool_mask[row][wanted]).all(), case["name"]


def test_golden_reference(golden_relative: Golden) -> None:
    """Also with the rows padded on the left, as some of the models' own code does."""
    model = load_checkpoint(golden_relative.folder)
    for case in golden_relative.cases:
        ids, attended, pooled = (torch.from_numpy(part) for part in stored(case))
        with torch.inference_mode():
            found = model(ids, attended, pooled)[0].numpy()
            difference = np.abs(found - golden_relative.vectors[f"embeddings/{case['name']}"]).max()
            assert difference <= REFERENCE_TOLERANCE, (case["name"], difference)
            if case["token_level"]:
                states = model.embedding_model(ids, attended).numpy()
                wanted = golden_relative.vectors[f"backbone/{case['name']}"]
                assert np.abs(states - wanted)[attended.bool().numpy()].max() <= TOKEN_LEVEL_TOLERANCE, case["name"]


@pytest.mark.parametrize("dialect", ["fused", "portable"])
def test_golden_encoder(golden_relative: Golden, dialect: str, tmp_path: Path) -> None:
    """Text in, transformers' vectors out."""
    out = export(golden_relative.folder, tmp_path / "bundle", "--dialect", dialect, "--max", "8x4608", "--no-parity")
    encoder = Encoder(out, device="cpu")
    for case in golden_relative.cases:
        if has_special(case):
            continue
        found = encoder.encode(
            case["texts"], prompt=case["prompt"], max_length=min(case["max_length"], encoder.max_length)
        )
        difference = np.abs(found - golden_relative.vectors[f"embeddings/{case['name']}"]).max()
        assert difference <= ONNX_TOLERANCE, (case["name"], difference)


# Tiny random checkpoints of the others, judged by transformers.

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
BEGINS = {"GritLM", "e5-mistral", "llama-embed-nemotron"}


def tokenizer_of(name: str) -> str:
    parts = json.loads(make_tokenizer().to_str())
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    eos = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    single = [bos, piece] if name in BEGINS else [piece, eos]
    specials = {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in (("<s>", 1), ("</s>", 2))}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    parts["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": specials,
    }
    return json.dumps(parts)


def make_relative(name: str, folder: Path, *, prefix: str = "", head: bool = False) -> Path:
    """A tiny random checkpoint whose keys begin with `prefix`, made by transformers."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(parents=True)
    config = {**SMALL, "vocab_size": make_tokenizer().get_vocab_size(), **CONFIGS[name]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer_of(name))
    torch.manual_seed(7)
    model = theirs(transformers, config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.12)
    tensors = {prefix + key: value.numpy() for key, value in model.state_dict().items()}
    if head:
        tensors["lm_head.weight"] = np.zeros((4, 32), np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


def theirs(transformers, config: dict) -> torch.nn.Module:
    kinds = {"qwen2": "Qwen2", "mistral": "Mistral", "llama_bidirec": "Llama", "qwen3": "Qwen3"}
    kind = kinds[config["model_type"]]
    own = {key: value for key, value in config.items() if key not in ("model_type", "auto_map", "architectures")}
    settings = getattr(transformers, f"{kind}Config")(**own, attn_implementation="eager", use_cache=False)
    return getattr(transformers, f"{kind}Model")(settings).eval().requires_grad_(False)


def their_states(folder: Path, ids: torch.Tensor, attended: torch.Tensor, mask: Mask, window: int | None):
    """Token states by transformers, with the mask written out."""
    transformers = pytest.importorskip("transformers")
    model = theirs(transformers, json.loads((folder / "config.json").read_text()))
    tensors = {key.removeprefix("model."): value for key, value in load_file(folder / "model.safetensors").items()}
    tensors.pop("lm_head.weight", None)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()}, strict=True)
    places = torch.arange(ids.shape[1])
    seen = attended.bool()[:, None, None, :].expand(-1, 1, len(places), -1)
    if mask is Mask.CAUSAL:
        back = places[:, None] - places[None, :]
        seen = seen & (back >= 0) & (back < (window or len(places)))
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = places[None].expand(len(ids), -1)
    return model(input_ids=ids, attention_mask=additive, position_ids=positions).last_hidden_state


@pytest.fixture(scope="module", params=CONFIGS)
def relative(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("relative") / request.param
    yield make_relative(request.param, folder, prefix="model." if request.param == "GritLM" else "", head=True)
    shutil.rmtree(folder)


TEXTS = ("the water over the passage", "a", "question in the question and on the query over and over " * 4)


def test_transformers_agrees(relative: Path, tmp_path: Path) -> None:
    config = read_checkpoint_architecture(relative)
    assert config.relative == relative.name
    text = text_of(relative)
    model = load_checkpoint(relative)
    encoder = Encoder(export(relative, tmp_path / "bundle"), device="cpu")
    for prompt in (text.query_prompt("find it"), text.prompt(None, None)):
        batch = text.pad(text.tokenize(TEXTS, prompt=prompt, max_length=256))
        ids, attended, pooled = (torch.from_numpy(part) for part in batch)
        states = their_states(relative, ids, attended, config.mask, config.sliding_window)
        if config.pooling is Pooling.LAST:
            wanted = states[torch.arange(len(ids)), attended.sum(dim=1) - 1]
            assert (ids[torch.arange(len(ids)), attended.sum(dim=1) - 1] == 2).all()
        else:
            wanted = (states * pooled[..., None]).sum(dim=1) / pooled.sum(dim=1, keepdim=True)
        wanted = torch.nn.functional.normalize(wanted, dim=-1).numpy()
        with torch.inference_mode():
            ours = model.embedding_model(ids, attended)
            found = model(ids, attended, pooled)[0].numpy()
        assert (ours - states)[attended.bool()].abs().max() <= TOKEN_LEVEL_TOLERANCE
        assert np.abs(found - wanted).max() <= REFERENCE_TOLERANCE
        assert np.abs(encoder.encode(list(TEXTS), prompt=prompt) - wanted).max() <= ONNX_TOLERANCE


def test_gritlm_pools_neither_the_instruction_nor_the_bos_before_it(tmp_path: Path) -> None:
    text = text_of(make_relative("GritLM", tmp_path / "grit"))
    prompt = text.prompt("find it", None)
    assert prompt == "<|user|>\nfind it\n<|embed|>\n"
    assert text.prompt(None, None) == "<|embed|>\n"
    row = text.tokenize(["water"], prompt=prompt, max_length=99)[0]
    alone = make_tokenizer().encode(prompt).ids  # gritlm.py counts these, the BOS among them
    assert row.prompt_tokens == len(alone)
    assert text.tokenize(["water"], prompt="", max_length=99)[0].prompt_tokens == 0


def test_the_last_token_survives_truncation(tmp_path: Path) -> None:
    text = text_of(make_relative("Qwen3-Embedding", tmp_path / "qwen"))
    for length in (1, 2, 7):
        row = text.tokenize(["the water over the passage"], max_length=length)[0]
        assert (len(row), row.ids[-1], row.truncated) == (length, 2, True)
    batch = text.pad(text.tokenize(list(TEXTS), max_length=99))
    assert batch.pool_mask.sum(axis=1).tolist() == [1, 1, 1]


def test_vectors_can_be_cut_where_the_model_was_trained_for_it(tmp_path: Path) -> None:
    folder = make_relative("Qwen3-Embedding", tmp_path / "qwen")
    config = json.loads((folder / "config.json").read_text())
    assert read_architecture({**config, "hidden_size": 1024}).matryoshka.allows(256, 1024)
    bundle = export(folder, tmp_path / "bundle")
    encoder = Encoder(bundle, device="cpu")
    whole = encoder.encode(list(TEXTS))
    with pytest.raises(ConfigError, match="dimensions is 31"):
        encoder.encode(list(TEXTS), dimensions=31)
    assert (encoder.encode(list(TEXTS), dimensions=32) == whole).all()
    from dataclasses import replace

    from nvembed_deploy.model.config import Matryoshka

    architecture = replace(encoder.manifest.source.architecture, matryoshka=Matryoshka(smallest=8, listed=(8, 16)))
    manifest = replace(encoder.manifest, source=replace(encoder.manifest.source, architecture=architecture))
    encoder._bundle = replace(encoder._bundle, manifest=manifest)
    cut = encoder.encode(list(TEXTS), dimensions=16)
    assert cut.shape == (3, 16)
    np.testing.assert_allclose(cut, whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True), atol=1e-6)
    raw = encoder.encode(list(TEXTS), dimensions=16, normalize=False)
    np.testing.assert_allclose(raw, encoder.encode(list(TEXTS), normalize=False)[:, :16], rtol=1e-6)
    with pytest.raises(ConfigError, match="one of them: 8, 16"):
        encoder.encode(list(TEXTS), dimensions=12)


def test_named_prompts(tmp_path: Path) -> None:
    folder = make_relative("llama-embed-nemotron", tmp_path / "llama")
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "query: "}}))
    encoder = Encoder(export(folder, tmp_path / "bundle"), device="cpu")
    named = encoder.encode(list(TEXTS), prompt_name="query")
    assert (named == encoder.encode(list(TEXTS), prompt="query: ")).all()
    with pytest.raises(ConfigError, match="this model's prompts are: 'query'"):
        encoder.encode(list(TEXTS), prompt_name="document")
    with pytest.raises(ConfigError, match="prompt and prompt_name are both given"):
        encoder.encode(list(TEXTS), prompt_name="query", prompt="x")


def test_the_small_nvidia_llama_takes_prefixes_and_no_instruction() -> None:
    config = {**SMALL, **CONFIGS["llama-embed-nemotron"], "vocab_size": 300, "hidden_size": 2048}
    relative = recognize(config)
    assert (relative.default_prompt, relative.prompts["query"], relative.template) == ("passage: ", "query: ", "")
    assert read_architecture(config).matryoshka.listed == (384, 512, 768, 1024, 2048)


def test_a_model_without_instructions_has_its_own_query_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvembed_deploy.model.family.EMBEDQA_HIDDEN", SMALL["hidden_size"])
    encoder = Encoder(export(make_relative("llama-embed-nemotron", tmp_path / "qa"), tmp_path / "b"), device="cpu")
    assert encoder.query_prompt("find it") == "query: "
    assert (encoder.encode("water") == encoder.encode("water", prompt="passage: ")).all()
    assert (encoder.encode("water", prompt_name="query") == encoder.encode("water", prompt="query: ")).all()
    with pytest.raises(ConfigError, match="takes no instruction; pass prompt_name, which may be 'query', 'document'"):
        encoder.encode("water", instruction="find it")


def test_a_lost_mask_is_named(tmp_path: Path, checkpoint: Path) -> None:
    causal = make_relative("Qwen3-Embedding", tmp_path / "qwen")
    for folder, mask, message in (
        (causal, Mask.BIDIRECTIONAL, "first token is blind to those behind it"),
        (checkpoint, Mask.CAUSAL, "the causal mask is lost"),
    ):
        text, backend = text_of(folder), PyTorchBackend(folder)
        own = read_checkpoint_architecture(folder).mask
        require_mask(backend, text, own)
        assert own is not mask
        with pytest.raises(ParityError, match=message):
            require_mask(backend, text, mask)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "no embedder that this toolkit knows.*gte-Qwen2"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "its mask and pooling would be guesses"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "its mask and pooling would be guesses"),
        ({**CONFIGS["llama-embed-nemotron"], "is_causal": True}, "is_causal is True.*bidirectional"),
        ({**CONFIGS["Qwen3-Embedding"], "is_causal": False}, "is_causal is False.*causal"),
        ({**CONFIGS["Qwen3-Embedding"], "use_sliding_window": True}, "use_sliding_window is True"),
        ({**CONFIGS["llama-embed-nemotron"], "pooling": "cls"}, "pooling is 'cls'"),
        ({**CONFIGS["llama-embed-nemotron"], "attention_bias": True}, "attention_bias is True"),
        ({**CONFIGS["llama-embed-nemotron"], "rope_scaling": {"rope_type": "yarn"}}, "of type 'yarn'"),
        ({**CONFIGS["llama-embed-nemotron"], "rope_scaling": {**LLAMA3, "factor": 0.5}}, "rope_scaling has factor"),
    ],
)
def test_what_would_compute_something_else_is_refused(config: dict, message: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=message):
        read_architecture({**SMALL, "vocab_size": 300, **config})


def test_lost_eos_missing_bos_and_another_pooling_are_named(tmp_path: Path) -> None:
    qwen = make_relative("Qwen3-Embedding", tmp_path / "qwen")
    (qwen / "tokenizer.json").write_text(json.dumps({**json.loads(tokenizer_of("x")), "post_processor": None}))
    with pytest.raises(CheckpointError, match="has lost the EOS that Qwen3-Embedding pools"):
        text_of(qwen)
    llama = make_relative("llama-embed-nemotron", tmp_path / "llama")
    (llama / "tokenizer.json").write_text(tokenizer_of("Qwen3-Embedding"))
    with pytest.raises(CheckpointError, match=r"needs \[1\] in front"):
        text_of(llama)
    e5 = make_relative("e5-mistral", tmp_path / "e5")
    assert text_of(e5).contract.suffix_ids == (2,)  # its own tokenizer.json forgets it
    (e5 / "1_Pooling").mkdir()
    (e5 / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    with pytest.raises(CheckpointError, match="pools mean, and e5-mistral pools lasttoken"):
        text_of(e5)


@pytest.mark.parametrize(
    ("name", "stated", "message"),
    [
        ("e5-mistral", {"pooling_mode": "lasttoken", "include_prompt": True}, ""),
        ("e5-mistral", {"pooling_mode": ["lasttoken"]}, ""),
        ("e5-mistral", {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, ""),
        ("e5-mistral", {"pooling_mode": "mean"}, "pools mean, and e5-mistral pools lasttoken"),
        ("llama-embed-nemotron", {"pooling_mode_mean_tokens": True}, ""),
        ("llama-embed-nemotron", {"pooling_mode": ["mean", "max"]}, "pools max, mean"),
        ("llama-embed-nemotron", {"pooling_mode": "mean", "include_prompt": False}, "leaves the prompt out"),
        ("GritLM", {"pooling_mode": "mean", "include_prompt": False}, ""),
    ],
)
def test_the_pooling_that_sentence_transformers_states(tmp_path: Path, name: str, stated: dict, message: str) -> None:
    folder = make_relative(name, tmp_path / "model")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(stated))
    if message:
        with pytest.raises(CheckpointError, match=message):
            text_of(folder)
    else:
        text_of(folder)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["Transformer", "Pooling", "Normalize"], ""),
        (["Transformer", "Pooling", "Dense", "Normalize"], "puts Dense behind the model"),
        (None, "is damaged"),
    ],
)
def test_modules_behind_the_pooling_are_refused(tmp_path: Path, kinds: list[str] | None, message: str) -> None:
    folder = make_relative("e5-mistral", tmp_path / "model")
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds] if kinds else {"a": 1}
    (folder / "modules.json").write_text(json.dumps(modules))
    if message:
        with pytest.raises(CheckpointError, match=message):
            text_of(folder)
    else:
        text_of(folder)


def test_empty_prompts_of_sentence_transformers_take_nothing_away(tmp_path: Path) -> None:
    own = FAMILY["llama-nv-embedqa"]
    path = tmp_path / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": {"query": "", "document": ""}, "default_prompt_name": None}))
    assert source._prompts(tmp_path, own) == (own.prompts, "passage: ")
    path.write_text(json.dumps({"prompts": {"query": "ask: ", "new": "x: "}, "default_prompt_name": "new"}))
    assert source._prompts(tmp_path, own) == ({**own.prompts, "query": "ask: ", "new": "x: "}, "x: ")


@pytest.mark.parametrize("name", ["e5-mistral", "GritLM", "Qwen3-Embedding"])
def test_portable_graphs_hold_what_tensorrt_10_parses(tmp_path: Path, name: str) -> None:
    config = read_architecture({**SMALL, **CONFIGS[name], "vocab_size": 300})
    graph = trace(replace(config, layers=1), precision=Precision.FP16, dialect=Dialect.PORTABLE, fold=True)
    ir.save(graph, tmp_path / "model.onnx")
    assert set(unsupported(tmp_path / "model.onnx")) == set()


def test_rope_written_as_transformers_5_does() -> None:
    old = {**SMALL, **CONFIGS["llama-embed-nemotron"], "vocab_size": 300}
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**LLAMA3, "rope_theta": 500000.0}
    assert read_architecture(new) == read_architecture(old)


def test_every_row_is_named_once() -> None:
    assert list(FAMILY) == [item.name for item in FAMILY.values()]
    assert len(FAMILY) == 7


def test_left_padding_of_a_tokenizer_changes_nothing(tmp_path: Path) -> None:
    """The runtime pads on the right and pools by counts: the tokenizer's own side has no say."""
    folder = make_relative("Qwen3-Embedding", tmp_path / "qwen")
    (folder / "tokenizer_config.json").write_text(json.dumps({"padding_side": "left", "pad_token": "</s>"}))
    bundle = export(folder, tmp_path / "bundle")
    _, text, backend = open_parts(bundle, "cpu")
    together = backend.run(text.pad(text.tokenize(list(TEXTS), max_length=99))).embeddings
    alone = [backend.run(text.pad(text.tokenize([item], max_length=99))).embeddings[0] for item in TEXTS]
    np.testing.assert_allclose(together, np.stack(alone), atol=ONNX_TOLERANCE)
