"""Optimizer steps that are proportional to the weights they change."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")

from recipes.mini.optimizer import MIN_SCALE, RelativeAdamW, step_scale  # noqa: E402

ROWS = torch.tensor([[1.0, -2.0], [100.0, 300.0], [0.0, 0.0], [0.01, 0.01]])


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Linear(2, 4, bias=False)
        self.pooler = torch.nn.Linear(2, 4, bias=False)
        for layer in (self.decoder, self.pooler):
            layer.weight.data = ROWS.clone()


def stepped(model, optimizer, step_indices):
    for step_index in step_indices:
        optimizer.zero_grad()
        x = torch.tensor([[1.0, 0.5 + step_index]])
        (model.decoder(x).sum() + model.pooler(x).sum()).backward()
        optimizer.step()


def optimizer_of(model):
    return RelativeAdamW(model, learning_rate=1e-3, weight_decay=0.0, absolute="pooler")


def test_scales_are_powers_of_two_near_the_rows_norm():
    scales = step_scale(ROWS)[:, 0]
    assert torch.equal(scales.log2(), scales.log2().round())
    size = ROWS.square().mean(dim=1).sqrt()
    assert ((scales / size)[:2].log2().abs() <= 0.5).all()
    min_scale = MIN_SCALE * size[size > 0].median()
    assert ((scales[2:] / min_scale).log2().abs() <= 0.5).all()
    assert torch.equal(step_scale(torch.zeros(3)), torch.ones(3))
    assert step_scale(torch.tensor([0.5, -4.0])).tolist() == [0.5, 4.0]


def test_a_step_moves_each_row_by_a_share_of_itself_and_the_pooler_absolutely():
    model = Model()
    stepped(model, optimizer_of(model), range(1))
    moved = (ROWS - model.decoder.weight).abs()
    assert torch.allclose(moved, (1e-3 * step_scale(ROWS)).expand_as(moved), rtol=2e-2)
    assert torch.allclose((ROWS - model.pooler.weight).abs(), torch.full((4, 2), 1e-3), rtol=2e-2)


def test_a_resumed_run_keeps_the_scales_of_the_start():
    uninterrupted = Model()
    stepped(uninterrupted, optimizer_of(uninterrupted), range(6))
    interrupted = Model()
    first_optimizer = optimizer_of(interrupted)
    stepped(interrupted, first_optimizer, range(3))
    resumed_model = Model()
    resumed_model.load_state_dict(interrupted.state_dict())
    with torch.no_grad():
        resumed_model.decoder.weight.mul_(64)  # scales taken from these weights would be others
    resumed_optimizer = optimizer_of(resumed_model)
    with torch.no_grad():
        resumed_model.decoder.weight.div_(64)
    resumed_optimizer.load_state_dict(first_optimizer.state_dict())
    stepped(resumed_model, resumed_optimizer, range(3, 6))
    assert torch.equal(resumed_model.decoder.weight, uninterrupted.decoder.weight)
    assert torch.equal(resumed_model.pooler.weight, uninterrupted.pooler.weight)
