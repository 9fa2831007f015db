"""The PyTorch model, the graph and the encoder compared with ids, masks and vectors made by NVIDIA's own code."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from nvembed_deploy import Encoder, InputError
from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.select_backend import open_parts
from nvembed_deploy.tokenization import TextEncoder, TokenBatch

SPECIALS = ("<s>", "</s>", "<unk>")
REFERENCE_TOLERANCE = 2e-6
ONNX_TOLERANCE = 5e-6
TOKEN_LEVEL_TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def cases(golden: Path) -> list[dict]:
    with (golden / "golden.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def vectors(golden: Path) -> dict[str, np.ndarray]:
    return load_file(golden / "golden.safetensors")


@pytest.fixture(scope="module")
def text(golden: Path) -> TextEncoder:
    from nvembed_deploy.model.text_contract import text_contract

    folder = golden / "checkpoint"
    contract = text_contract(folder, read_checkpoint_architecture(folder))
    return TextEncoder((folder / "tokenizer.json").read_bytes(), contract)


@pytest.fixture(scope="module", params=[("fp32", "fused"), ("fp32", "portable")], ids="-".join)
def bundle(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from nvembed_deploy.export.to_onnx import main

    precision, dialect = request.param
    out = tmp_path_factory.mktemp("golden") / "bundle"
    arguments = ["--model", str(golden / "checkpoint"), "--precision", precision, "--dialect", dialect]
    assert main([*arguments, "--out", str(out)]) == 0
    yield out
    shutil.rmtree(out)


def has_special(case: dict) -> bool:
    return any(token in text for text in case["texts"] for token in SPECIALS)


def stored(case: dict) -> TokenBatch:
    return TokenBatch(
        **{name: np.array(case[name], dtype=np.int64) for name in ("input_ids", "attention_mask", "pool_mask")}
    )


def test_there_are_enough_cases(cases: list[dict]) -> None:
    assert len(cases) >= 60
    assert sum(map(has_special, cases)) >= 3


def test_ids_and_masks(cases: list[dict], text: TextEncoder) -> None:
    for case in cases:
        if has_special(case):
            continue
        rows = text.tokenize(case["texts"], prompt=case["instruction"], max_length=case["max_length"])
        for array, expected in zip(text.pad(rows), stored(case), strict=True):
            np.testing.assert_array_equal(array, expected, err_msg=case["name"])


def test_special_strings_in_a_text_stay_text(cases: list[dict], text: TextEncoder) -> None:
    """The first intended difference from NVIDIA's code: a text never contains control tokens."""
    special = [case for case in cases if has_special(case)]
    for case in special:
        rows = text.tokenize(case["texts"], prompt=case["instruction"], max_length=case["max_length"])
        for row in rows:
            assert row.ids[0] == 1
            assert row.ids[-1] == 2
            assert not {0, 1, 2} & set(row.ids[1:-1]), case["name"]


def test_prompt_that_leaves_nothing_to_pool(cases: list[dict], bundle: Path) -> None:
    """The second intended difference from NVIDIA's code: an error where it returns NaN."""
    encoder = Encoder(bundle, device="cpu")
    traps = [case for case in cases if not case["finite"]]
    assert traps
    for case in traps:
        with pytest.raises(InputError, match=r"no token of text \d+ is left to pool"):
            encoder.encode(case["texts"], prompt=case["instruction"], max_length=case["max_length"])


def test_thousand_token_cases(golden: Path, text: TextEncoder) -> None:
    with (golden / "tokens.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    plain = [row for row in rows if not any(token in row["text"] for token in SPECIALS)]
    assert len(plain) > 970
    token_rows = text.tokenize([row["text"] for row in plain], max_length=32768)
    assert [row.ids for row in token_rows] == [row["input_ids"] for row in plain]


def test_the_pytorch_model_equals_the_golden_vectors(
    golden: Path, cases: list[dict], vectors: dict[str, np.ndarray]
) -> None:
    model = load_checkpoint(golden / "checkpoint")
    for case in cases:
        if not case["finite"]:
            continue
        ids, attended, pooled = (torch.from_numpy(array) for array in stored(case))
        with torch.inference_mode():
            embeddings = model(ids, attended, pooled)[0].numpy()
            assert np.abs(embeddings - vectors[f"embeddings/{case['name']}"]).max() <= REFERENCE_TOLERANCE, case["name"]
            if case["token_level"]:
                states = model.embedding_model(ids, attended)
                latent = model.latent_attention_model(states)
                real = attended.bool().numpy()
                for name, values in (("backbone", states), ("latent", latent)):
                    difference = np.abs(values.numpy() - vectors[f"{name}/{case['name']}"])[real]
                    assert difference.max() <= TOKEN_LEVEL_TOLERANCE, (name, case["name"])


def test_the_graph_equals_the_golden_vectors(bundle: Path, cases: list[dict], vectors: dict[str, np.ndarray]) -> None:
    _, _, backend = open_parts(bundle / "model.onnx", "cpu")
    for case in cases:
        if case["finite"]:
            embeddings = backend.run(stored(case)).embeddings
            assert np.abs(embeddings - vectors[f"embeddings/{case['name']}"]).max() <= ONNX_TOLERANCE, case["name"]


def test_the_encoder_equals_the_golden_vectors(bundle: Path, cases: list[dict], vectors: dict[str, np.ndarray]) -> None:
    """The encoder returns NVIDIA's vectors for the texts."""
    encoder = Encoder(bundle, device="cpu")
    seen = 0
    for case in cases:
        if not case["finite"] or has_special(case) or any(not text.strip() for text in case["texts"]):
            continue
        seen += 1
        embeddings = encoder.encode(case["texts"], prompt=case["instruction"], max_length=case["max_length"])
        assert np.abs(embeddings - vectors[f"embeddings/{case['name']}"]).max() <= ONNX_TOLERANCE, case["name"]
    assert seen > 50
