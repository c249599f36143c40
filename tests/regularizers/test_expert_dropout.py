"""Expert dropout is inverted dropout, on the hidden units inside experts: mask, mean, share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dropsurgery.regularizers._uniform import uniform
from dropsurgery.regularizers.expert_dropout import ExpertDropout, expert_dropout


def test_by_hand() -> None:
    """On a transform, where the numbers drawn are one an element, and can be drawn again."""
    torch.manual_seed(0)
    x, key, p = torch.randn(3, 5), torch.tensor(7), 0.4
    numbers = uniform(x.shape, x.device, key)
    y = torch.func.vmap(lambda row: expert_dropout(row, p, key=key), randomness="same")(x[None])[0]
    for place in torch.cartesian_prod(torch.arange(3), torch.arange(5)).tolist():
        expected = x[*place] / (1 - p) if numbers[*place] >= p else 0.0
        assert torch.isclose(y[*place], torch.as_tensor(expected), rtol=1e-6)


def test_share_and_mean() -> None:
    torch.manual_seed(0)
    p, count = 0.3, 40_000
    y = expert_dropout(torch.ones(200, 200), p)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    assert abs((y == 0).double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / count)
    assert abs(y.double().mean() - 1) <= 4 * math.sqrt(p / (1 - p) / count)
    assert abs((y * (1 - p)).double().mean() - 1) > 0.2  # the control: not rescaled


class Expert(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.drop, self.wi, self.wo = drop, nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.drop(self.wi(x).relu()))


def test_inside_an_expert_and_off_in_eval() -> None:
    torch.manual_seed(0)
    expert, x = Expert(ExpertDropout(0.5)), torch.randn(200, 4)
    silent = expert.wo(expert.wi(x).relu())
    y = expert(x)
    assert not torch.allclose(y, silent) and (y - expert.wo.bias).ne(0).any(1).double().mean() > 0.9
    assert torch.equal(expert.eval()(x), silent)


def test_hidden_units_of_all_experts_at_once() -> None:
    torch.manual_seed(0)
    y = ExpertDropout(0.5)(torch.ones(4, 30, 16))
    assert y.shape == (4, 30, 16) and ((y == 0).any(-1) & (y > 0).any(-1)).all()
    assert repr(ExpertDropout()) == "ExpertDropout(p=0.3)"
