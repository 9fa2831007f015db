"""The PyTorch model against an independent implementation, and against itself in shapes that break such models."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nvembed_deploy.model.checkpoint import load_checkpoint
from nvembed_deploy.model.fold import FoldedLatentAttention
from nvembed_deploy.model.nvembed import NVEmbed, masked_mean
from tests import numpy_reference

# Maximum difference of a component; a correct FP32 program stays below 3e-7, and the tanh form of GELU costs 1e-5.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> NVEmbed:
    return load_checkpoint(checkpoint)


def embed(model: NVEmbed, rows: list[list[int]], prompt_tokens: int = 0) -> np.ndarray:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), 2)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    pool = mask.clone()
    pool[:, :prompt_tokens] = 0
    return model(ids, mask, pool)[0].numpy()


def some_ids(length: int, seed: int = 0) -> list[int]:
    return [1, *np.random.default_rng(seed).integers(3, 300, length - 2).tolist(), 2]


@pytest.mark.parametrize(("length", "prompt_tokens"), [(2, 0), (3, 0), (17, 0), (17, 9), (300, 0), (300, 40)])
def test_equals_independent_program(model: NVEmbed, checkpoint: Path, length: int, prompt_tokens: int) -> None:
    ids = some_ids(length, seed=length)
    expected = numpy_reference.embed(checkpoint, ids, prompt_tokens)
    assert np.abs(embed(model, [ids], prompt_tokens)[0] - expected).max() <= TOLERANCE


def test_fold_is_exact(model: NVEmbed, checkpoint: Path) -> None:
    folded = load_checkpoint(checkpoint)
    folded.latent_attention_model = FoldedLatentAttention(folded.latent_attention_model)
    rows = [some_ids(length) for length in (5, 40, 12)]
    assert np.abs(embed(model, rows) - embed(folded, rows)).max() <= TOLERANCE


def test_padding_does_not_change_a_row(model: NVEmbed) -> None:
    short = some_ids(6)
    alone, padded = embed(model, [short])[0], embed(model, [short, some_ids(90)])[0]
    assert np.abs(alone - padded).max() <= TOLERANCE


def test_attention_sees_both_ways(model: NVEmbed) -> None:
    ids = torch.tensor([some_ids(9)])
    changed = ids.clone()
    changed[0, -2] = 7
    mask = torch.ones_like(ids)
    difference = (model.embedding_model(ids, mask) - model.embedding_model(changed, mask))[0, 0].abs().max()
    assert difference > 1e-4  # the last token reaches the first


def test_instruction_attends_and_is_not_pooled(model: NVEmbed) -> None:
    text = some_ids(8)
    pooled, masked = embed(model, [text], 0), embed(model, [text], 4)
    assert np.abs(pooled - masked).max() > 1e-3
    changed = [text[0], 11, 12, 13, *text[4:]]  # another instruction of the same length
    assert np.abs(embed(model, [changed], 4) - masked).max() > 1e-3


def test_what_is_not_pooled_cannot_spread_nan() -> None:
    hidden = torch.ones(1, 3, 2)
    hidden[0, 2] = float("nan")
    assert torch.equal(masked_mean(hidden, torch.tensor([[1, 1, 0]])), torch.ones(1, 2))


def test_rows_have_unit_length_and_norms_restore_them(model: NVEmbed) -> None:
    ids = torch.tensor([some_ids(12)])
    mask = torch.ones_like(ids)
    unit, norm = model(ids, mask, mask)
    hidden = model.latent_attention_model(model.embedding_model(ids, mask))
    torch.testing.assert_close(unit * norm[:, None], hidden.mean(1), rtol=1e-5, atol=1e-6)
    assert abs(unit.norm().item() - 1) < 1e-6
