"""Losses against their definitions, element by element."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")

from nvembed_deploy.training.losses import (  # noqa: E402
    centered,
    distillation,
    find_positives,
    in_batch_blocked,
    match_targets,
    own_only_blocked,
    token_distillation,
)

TEMPERATURE = 0.05


def unit_rows(rows: int, dim: int = 6, *, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=-1)


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


def test_find_positives_equals_its_definition():
    vectors = unit_rows(5)
    queries, positives = torch.tensor([0, 2]), torch.tensor([1, 3])
    blocked = torch.zeros(2, 5, dtype=torch.bool)
    blocked[0, 0] = blocked[1, 2] = blocked[1, 4] = True
    loss = find_positives(vectors, queries=queries, positives=positives, blocked=blocked, temperature=TEMPERATURE)
    expected = 0.0
    for pair, (query, positive) in enumerate(((0, 1), (2, 3))):
        open_rows = [row for row in range(5) if not blocked[pair, row]]
        scores = torch.stack([vectors[query] @ vectors[row] / TEMPERATURE for row in open_rows])
        expected += float(torch.logsumexp(scores, 0) - vectors[query] @ vectors[positive] / TEMPERATURE)
    assert loss.item() == pytest.approx(expected / 2, rel=1e-5)


def test_find_positives_without_pairs_is_zero_and_has_a_gradient():
    vectors = unit_rows(3).requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    blocked = torch.zeros(0, 3, dtype=torch.bool)
    loss = find_positives(vectors, queries=none, positives=none, blocked=blocked, temperature=TEMPERATURE)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(vectors.grad, torch.zeros_like(vectors))


# Two groups of a batch: query, positive, negative; and a text alone.
GROUP_IDS = torch.tensor([0, 0, 0, 1, 1, 1, 2])
QUERIES, POSITIVES = torch.tensor([0, 3]), torch.tensor([1, 4])


def test_stage_two_lets_a_querys_own_rows_compete():
    blocked = own_only_blocked(GROUP_IDS, queries=QUERIES, positives=POSITIVES)
    assert (~blocked).nonzero().tolist() == [[0, 1], [0, 2], [1, 4], [1, 5]]


def test_stage_one_lets_all_documents_compete_and_queries_if_asked():
    blocked = in_batch_blocked(GROUP_IDS, torch.arange(7), queries=QUERIES, positives=POSITIVES)
    assert (~blocked).nonzero().tolist() == [[pair, row] for pair in (0, 1) for row in (1, 2, 4, 5)]
    wider = {"queries": QUERIES, "positives": POSITIVES, "queries_compete": True}
    assert in_batch_blocked(GROUP_IDS, torch.arange(7), **wider).nonzero().tolist() == [[0, 0], [1, 3]]


def test_no_answer_that_a_query_shares_is_a_negative():
    """Groups of query and positive: q a, q b (its second answer), r b (shares b), s c (shares nothing, negative b)."""
    group_ids, text_ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3]), torch.tensor([0, 1, 0, 2, 5, 2, 6, 7, 2])
    pairs = {"queries": torch.tensor([0, 2, 4, 6]), "positives": torch.tensor([1, 3, 5, 7])}
    blocked = in_batch_blocked(group_ids, text_ids, **pairs)
    assert (~blocked).nonzero().tolist() == [
        [0, 1],
        [0, 7],
        [1, 3],
        [1, 7],
        [2, 5],
        [2, 7],
        *[[3, row] for row in (1, 3, 5, 7, 8)],
    ]


def test_the_same_text_in_another_group_is_ignored():
    text_ids = torch.tensor([0, 1, 2, 3, 4, 1, 0])  # the first query's text and its positive stand elsewhere too
    blocked = in_batch_blocked(GROUP_IDS, text_ids, queries=QUERIES, positives=POSITIVES, queries_compete=True)
    assert blocked.nonzero().tolist() == [[0, 0], [0, 5], [0, 6], [1, 3]]


def test_false_negatives_follow_the_95_percent_rule():
    # The teacher scores the query's candidates: itself 1, positive 0.8, its own negative 0.79, then 0.78, 0.76 and 0.
    scores = torch.tensor([1.0, 0.8, 0.79, 0.78, 0.7599, 0.0])
    targets = torch.stack((scores, (1 - scores**2).sqrt()), dim=1)
    group_ids, queries = torch.tensor([0, 0, 0, 1, 2, 3]), torch.tensor([0])
    blocked = in_batch_blocked(
        group_ids, torch.arange(6), queries=queries, positives=torch.tensor([1]), targets=targets, queries_compete=True
    )
    assert blocked.tolist() == [[True, False, False, True, False, False]]


def test_false_negatives_of_a_positive_with_a_negative_score():
    scores = torch.tensor([1.0, -0.2, -0.19, -0.205, -0.25])
    targets = torch.stack((scores, (1 - scores**2).sqrt()), dim=1)
    group_ids, queries = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([0])
    blocked = in_batch_blocked(
        group_ids, torch.arange(5), queries=queries, positives=torch.tensor([1]), targets=targets, queries_compete=True
    )
    assert blocked.tolist() == [[True, False, True, True, False]]


def test_centering_subtracts_the_mean_of_all_texts():
    texts = torch.nn.functional.normalize(unit_rows(50) + torch.tensor([2.0, 0, 0, 0, 0, 0]), dim=-1)
    rows, centre = texts[:10], texts.mean(dim=0)
    assert torch.equal(centered(rows, centre), rows - centre)
    assert centered(texts, centre).mean(dim=0).norm() < 1e-6
    tokens = torch.stack((3.0 * rows, 5.0 * rows), dim=1)  # whose mean is 4 x the row
    moved = centered(tokens, centre, torch.tensor(4.0)).mean(dim=1)
    assert torch.allclose(moved, 4.0 * centered(rows, centre), atol=1e-6)
