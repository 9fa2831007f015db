"""Losses that compare with a teacher, against their definitions, element by element."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")
for library in ("scipy", "tqdm"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[train]")

from recipes.mini.losses import (  # noqa: E402
    centered,
    distillation,
    match_targets,
    near_positives,
    token_distillation,
)
from tests.training.test_losses import TEMPERATURE, unit_rows  # noqa: E402


def test_distillation_is_zero_at_the_teacher_and_two_opposite_it():
    targets = unit_rows(5)
    assert distillation(targets, targets).item() == pytest.approx(0.0, abs=1e-6)
    assert distillation(-targets, targets).item() == pytest.approx(2.0, abs=1e-6)


def test_token_distillation_counts_tokens_with_a_target_only():
    generator = torch.Generator().manual_seed(3)
    states, targets = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    has_target = torch.tensor([[True, True, False], [False, True, False]])
    wrong = sum(float((states[r, t] - targets[r, t]).square().sum()) for r, t in ((0, 0), (0, 1), (1, 1)))
    size = sum(float(targets[r, t].square().sum()) for r, t in ((0, 0), (0, 1), (1, 1)))
    assert token_distillation(states, targets, has_target).item() == pytest.approx(wrong / size, rel=1e-5)
    assert token_distillation(states, states, has_target).item() == 0.0
    assert token_distillation(states, targets, torch.zeros_like(has_target)).item() == 0.0


def test_match_targets_equals_its_definition():
    vectors, targets = unit_rows(4, seed=1), unit_rows(4, seed=2)
    expected = 0.0
    for row in range(4):
        scores = [float(vectors[row] @ targets[column]) / TEMPERATURE for column in range(4)]
        expected += float(torch.logsumexp(torch.tensor(scores, dtype=torch.float64), 0)) - scores[row]
    loss = match_targets(vectors, targets, torch.arange(4), temperature=TEMPERATURE)
    assert loss.item() == pytest.approx(expected / 4, rel=1e-5)


def test_a_duplicate_text_is_not_a_wrong_answer():
    vectors, targets = unit_rows(3, seed=1), unit_rows(3, seed=2)
    vectors, targets = torch.cat((vectors, vectors[:1])), torch.cat((targets, targets[:1]))
    scores = vectors @ targets.T / TEMPERATURE
    open_columns = [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3]]
    expected = sum(
        torch.logsumexp(scores[row, columns], 0) - scores[row, row] for row, columns in enumerate(open_columns)
    )
    loss = match_targets(vectors, targets, torch.tensor([0, 1, 2, 0]), temperature=TEMPERATURE)
    assert loss.item() == pytest.approx(float(expected) / 4, rel=1e-5)
    assert match_targets(vectors, targets, torch.arange(4), temperature=TEMPERATURE).item() > loss.item() + 0.1


def test_false_negatives_follow_the_95_percent_rule():
    # The teacher scores the query's candidates: itself 1, positive 0.8, its own negative 0.79, then 0.78, 0.76 and 0.
    scores = torch.tensor([1.0, 0.8, 0.79, 0.78, 0.7599, 0.0])
    targets = torch.stack((scores, (1 - scores**2).sqrt()), dim=1)
    group_ids, queries = torch.tensor([0, 0, 0, 1, 2, 3]), torch.tensor([0])
    near = near_positives(targets, group_ids, queries=queries, positives=torch.tensor([1]))
    assert near.tolist() == [[False, False, False, True, False, False]]


def test_false_negatives_of_a_positive_with_a_negative_score():
    scores = torch.tensor([1.0, -0.2, -0.19, -0.205, -0.25])
    targets = torch.stack((scores, (1 - scores**2).sqrt()), dim=1)
    group_ids, queries = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([0])
    near = near_positives(targets, group_ids, queries=queries, positives=torch.tensor([1]))
    assert near.tolist() == [[False, False, True, True, False]]


def test_centering_subtracts_the_mean_of_all_texts():
    texts = torch.nn.functional.normalize(unit_rows(50) + torch.tensor([2.0, 0, 0, 0, 0, 0]), dim=-1)
    rows, centre = texts[:10], texts.mean(dim=0)
    assert torch.equal(centered(rows, centre), rows - centre)
    assert centered(texts, centre).mean(dim=0).norm() < 1e-6
    tokens = torch.stack((3.0 * rows, 5.0 * rows), dim=1)  # whose mean is 4 x the row
    moved = centered(tokens, centre, torch.tensor(4.0)).mean(dim=1)
    assert torch.allclose(moved, 4.0 * centered(rows, centre), atol=1e-6)
