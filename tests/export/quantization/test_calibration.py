"""Calibration: which texts, how many tokens of them, and ranges in a file."""

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
from nvembed_deploy.model import source
from nvembed_deploy.model.family import read_checkpoint_architecture
from nvembed_deploy.parity.probes import PROBES
from nvembed_deploy.tokenization import TextEncoder


@pytest.fixture(scope="module")
def text(checkpoint: Path) -> TextEncoder:
    contract = source.text_contract(checkpoint, read_checkpoint_architecture(checkpoint))
    return TextEncoder((checkpoint / "tokenizer.json").read_bytes(), contract)


def test_ranges_survive_the_file() -> None:
    values = torch.tensor([0.0, 1.5, 3e-8, 65504.0])
    assert torch.equal(unpack(pack(values)), values)


def test_tokens_are_counted_not_texts(text: TextEncoder) -> None:
    short, long = CalibrationText(text="a"), CalibrationText(text="word " * 200)
    assert len(tokenize([short] * 100, text, tokens=30)) == 10  # <s>, one token, </s>
    assert len(tokenize([long] * 100, text, tokens=30)) == 1
    kinds = built_in_texts()[:10]
    assert any(item.instruction for item in kinds)
    assert any(not item.text.isascii() for item in kinds)
    assert any("def " in item.text for item in kinds)


def test_short_texts_are_among_the_calibrations() -> None:
    """One character, one word, a word again and again: attention has nothing to take a mean of. None is a probe."""
    texts = [item.text for item in built_in_texts()[:400]]
    assert sum(len(item) == 1 for item in texts) > 60
    assert sum(len(set(item.split())) == 1 and len(item.split()) >= 8 for item in texts) > 20
    assert not {item for _, item in PROBES} & set(texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"text": "a"}\nnonsense', "line 2: not JSON"),
        ('{"text": "a"}\n{"txt": "b"}', "text 2 is no text"),
        ('{"text": "a", "instruction": 3}', "text 1 is no text"),
        ("[1]", "line 1: not a JSON object"),
    ],
)
def test_calibration_files_are_read_strictly(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_texts(path)
