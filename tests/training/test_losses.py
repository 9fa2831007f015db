"""Losses against their definitions, element by element."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")

from nvembed_deploy.training.losses import find_positives, in_batch_blocked, own_only_blocked  # noqa: E402

TEMPERATURE = 0.05


def unit_rows(rows: int, dim: int = 6, *, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=-1)


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
