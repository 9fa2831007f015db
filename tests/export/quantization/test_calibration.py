"""Calibration: the texts, the number of their tokens, and ranges stored in a file."""

from pathlib import Path

import pytest
import torch

from nvembed_deploy.errors import ConfigError
from nvembed_deploy.export.quantization import everyday_texts
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
from nvembed_deploy.parity.everyday_probes import EVERYDAY_PROBES
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


def test_any_number_of_the_built_in_texts_is_a_mixture() -> None:
    """Sentences, questions with and without an instruction, prose, code, other languages and very short texts.

    None of them is a probe, by which the gate judges.
    """
    texts = built_in_texts()
    for some in (texts[:40], texts[200:240]):
        assert any(calibration.instruction for calibration in some)
        assert any(not calibration.text.isascii() for calibration in some)
        assert any("def " in calibration.text for calibration in some)
        questions = [calibration for calibration in some if calibration.text in everyday_texts.QUESTIONS]
        assert {bool(calibration.instruction) for calibration in questions} == {True, False}
        assert any(len(calibration.text) > 100 and calibration.text.count(". ") for calibration in some)
        assert sum(len(calibration.text) == 1 for calibration in some) >= 2
        assert sum(3 <= len(calibration.text.split()) <= 12 for calibration in some) >= 12
        repeated = [calibration.text for calibration in some if len(set(calibration.text.split())) == 1]
        assert any(len(text.split()) >= 8 for text in repeated)
    assert not {text for _, text in (*PROBES, *EVERYDAY_PROBES)} & {calibration.text for calibration in texts}


def test_every_subject_meets_every_action_in_the_right_number() -> None:
    sentences = list(everyday_texts.short_sentences())
    assert len(set(sentences)) == len(everyday_texts.SUBJECTS) * len(everyday_texts.ACTIONS)
    assert set(everyday_texts.PLURALS) < set(everyday_texts.SUBJECTS)
    assert not [sentence for sentence in sentences if sentence.startswith(("People is", "He are", "A cat have"))]


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
