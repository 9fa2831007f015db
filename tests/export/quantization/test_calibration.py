"""Calibration: the texts, the number of their tokens, and ranges stored in a file."""

from pathlib import Path

import pytest
import torch

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.export.quantization.calibration import (
    CalibrationText,
    built_in_texts,
    pack,
    read_texts,
    tokenize,
    unpack,
)
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.model.text_contract import text_contract
from nvembed_deploy.parity.probes import PROBES
from nvembed_deploy.tokenization import TextEncoder


@pytest.fixture(scope="module")
def text(checkpoint: Path) -> TextEncoder:
    contract = text_contract(checkpoint, read_checkpoint_architecture(checkpoint))
    return TextEncoder((checkpoint / "tokenizer.json").read_bytes(), contract)


def test_unpack_returns_what_was_packed() -> None:
    ranges = torch.tensor([0.0, 1.5, 3e-8, 65504.0])
    assert torch.equal(unpack(pack(ranges)), ranges)


def test_tokens_are_counted_not_texts(text: TextEncoder) -> None:
    short, long = CalibrationText(text="a"), CalibrationText(text="word " * 200)
    assert len(tokenize([short] * 100, text, tokens=30)) == 10  # <s>, one token, </s>
    assert len(tokenize([long] * 100, text, tokens=30)) == 1
    texts = built_in_texts()[:10]
    assert any(calibration.instruction for calibration in texts)
    assert any(not calibration.text.isascii() for calibration in texts)
    assert any("def " in calibration.text for calibration in texts)


def test_short_texts_are_among_the_calibrations() -> None:
    """One character, one word, one word repeated: attention has nothing to average. None of them is a probe."""
    texts = [calibration.text for calibration in built_in_texts()[:400]]
    assert sum(len(text) == 1 for text in texts) > 60
    assert sum(len(set(text.split())) == 1 and len(text.split()) >= 8 for text in texts) > 20
    assert not {text for _, text in PROBES} & set(texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"text": "a"}\nnonsense', "line 2: not JSON"),
        ('{"text": "a"}\n{"txt": "b"}', "row 2 has no text"),
        ('{"text": "a", "instruction": 3}', "row 1 has no text"),
        ("[1]", "line 1: not a JSON object"),
    ],
)
def test_calibration_files_are_read_strictly(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_texts(path)
