"""Steps in units of what they change."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")

from nvembed_deploy.training.optimizer import LEAST_SCALE, RelativeAdamW, step_scale  # noqa: E402

ROWS = torch.tensor([[1.0, -2.0], [100.0, 300.0], [0.0, 0.0], [0.01, 0.01]])


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Linear(2, 4, bias=False)
        self.pooler = torch.nn.Linear(2, 4, bias=False)
        for layer in (self.decoder, self.pooler):
            layer.weight.data = ROWS.clone()


def stepped(model, optimizer, numbers):
    for number in numbers:
        optimizer.zero_grad()
        x = torch.tensor([[1.0, 0.5 + number]])
        (model.decoder(x).sum() + model.pooler(x).sum()).backward()
        optimizer.step()


def optimizer_of(model):
    return RelativeAdamW(model, learning_rate=1e-3, weight_decay=0.0, absolute="pooler")


def test_scales_are_powers_of_two_near_the_rows_size():
    found = step_scale(ROWS)[:, 0]
    assert torch.equal(found.log2(), found.log2().round())
    size = ROWS.square().mean(dim=1).sqrt()
    assert ((found / size)[:2].log2().abs() <= 0.5).all()
    least = LEAST_SCALE * size[size > 0].median()
    assert ((found[2:] / least).log2().abs() <= 0.5).all()
    assert torch.equal(step_scale(torch.zeros(3)), torch.ones(3))
    assert step_scale(torch.tensor([0.5, -4.0])).tolist() == [0.5, 4.0]


def test_a_step_moves_each_row_by_a_share_of_itself_and_the_pooler_absolutely():
    model = Model()
    stepped(model, optimizer_of(model), range(1))
    moved = (ROWS - model.decoder.weight).abs()
    assert torch.allclose(moved, (1e-3 * step_scale(ROWS)).expand_as(moved), rtol=2e-2)
    assert torch.allclose((ROWS - model.pooler.weight).abs(), torch.full((4, 2), 1e-3), rtol=2e-2)


def test_a_resumed_run_keeps_the_scales_of_the_start():
    whole = Model()
    stepped(whole, optimizer_of(whole), range(6))
    first = Model()
    optimizer = optimizer_of(first)
    stepped(first, optimizer, range(3))
    again = Model()
    again.load_state_dict(first.state_dict())
    with torch.no_grad():
        again.decoder.weight.mul_(64)  # scales taken from these weights would be others
    resumed = optimizer_of(again)
    with torch.no_grad():
        again.decoder.weight.div_(64)
    resumed.load_state_dict(optimizer.state_dict())
    stepped(again, resumed, range(3, 6))
    assert torch.equal(again.decoder.weight, whole.decoder.weight)
    assert torch.equal(again.pooler.weight, whole.pooler.weight)
