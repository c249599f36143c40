"""Router jitter against its formula in plain loops: bounds, distribution, tokens, gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dropsurgery import SurgeryError
from dropsurgery.records import GateFact
from dropsurgery.regularizers.router_jitter import RouterJitter, factors, router_jitter

EPSILON = 0.05


def factors_by_hand(numbers: np.ndarray, p: float, epsilon: float, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """The elements' numbers come first, in order, then the tokens'."""
    made, tokens = np.ones(shape), [length for i, length in enumerate(shape) if i != axis]
    count = math.prod(shape)
    for flat, place in enumerate(np.ndindex(*shape)):
        token = [index for i, index in enumerate(place) if i != axis]
        coin = numbers[count + (int(np.ravel_multi_index(token, tokens)) if tokens else 0)]
        if coin < p:
            made[place] = (1 - epsilon) + 2 * epsilon * numbers[flat]
    return made


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("shape", "axis"), [((7, 5), 1), ((3, 4, 6), 2), ((3, 6, 4), 1), ((1, 1), 1)])
def test_factors(shape: tuple[int, ...], axis: int, p: float) -> None:
    torch.manual_seed(0)
    numbers = torch.rand(math.prod(shape) + math.prod(shape) // shape[axis])
    made = factors(numbers.clone(), torch.tensor(p), EPSILON, shape, axis).numpy()
    expected = factors_by_hand(numbers.double().numpy(), p, EPSILON, shape, axis)
    assert np.allclose(made, expected, atol=1e-6, rtol=0)
    if p == 1.0 and math.prod(shape) > 1:  # the control: one number a token, and the wrong half
        assert not np.allclose(made, np.broadcast_to(made.max(axis, keepdims=True), shape), atol=1e-4)
        assert not np.allclose(made, 2 - expected, atol=1e-4)


def test_uniform_between_its_bounds() -> None:
    torch.manual_seed(0)
    u = router_jitter(torch.ones(400, 64), 1.0, EPSILON).double().flatten().numpy()
    assert u.min() >= 1 - EPSILON - 1e-6 and u.max() <= 1 + EPSILON + 1e-6
    counts, _ = np.histogram(u, bins=20, range=(1 - EPSILON, 1 + EPSILON))
    expected = len(u) / 20
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert chi < 50  # 19 degrees of freedom: 0.9999 lies at 49.6
    normal = np.clip(1 + EPSILON / 2 * np.random.default_rng(0).standard_normal(len(u)), 1 - EPSILON, 1 + EPSILON)
    counts, _ = np.histogram(normal, bins=20, range=(1 - EPSILON, 1 + EPSILON))
    assert ((counts - expected) ** 2 / expected).sum() > 50  # the control


def test_share_of_tokens() -> None:
    torch.manual_seed(0)
    p, tokens = 0.3, 4000
    changed = router_jitter(torch.ones(tokens, 8), p, 0.5) != 1
    assert torch.equal(changed.all(1), changed.any(1))
    assert abs(changed.any(1).double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / tokens)


def test_gradient_is_the_factor() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6, requires_grad=True)
    key = torch.tensor(3)
    for given in (key, None):
        x.grad = None
        torch.manual_seed(9)
        y = router_jitter(x, 0.7, 0.4, key=given)
        y.backward(torch.ones_like(y))
        assert torch.allclose(x.grad * x, y, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    key, x = torch.tensor(3), torch.rand(50, 16).to(dtype)
    y = router_jitter(x, 1.0, 0.3, key=key)
    wide = router_jitter(x.double(), 1.0, 0.3, key=key)
    assert y.dtype == dtype and torch.equal(y, wide.to(dtype))


@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.full((3, 4), -1e30), torch.zeros(0, 4), torch.ones(1, 1)])
def test_finite(x: Tensor) -> None:
    assert router_jitter(x, 1.0).isfinite().all()


class Gate(nn.Module):
    """A gate whose router alone reads what is jittered."""

    def __init__(self, jitter: nn.Module) -> None:
        super().__init__()
        self.jitter, self.scorer, self.expert = jitter, nn.Linear(6, 4), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scorer(self.jitter(x)), self.expert(x)


def test_experts_do_not_see_it() -> None:
    torch.manual_seed(0)
    gate, x = Gate(RouterJitter(1.0, 0.3)), torch.randn(5, 6)
    before = x.clone()
    logits, expert = gate(x)
    assert torch.equal(x, before) and torch.equal(expert, gate.expert(x))
    assert not torch.allclose(logits, gate.scorer(x), atol=1e-3)
    assert torch.equal(gate.eval()(x)[0], gate.scorer(x))


def test_refusals_and_repr() -> None:
    for bad in (-0.1, 1.0, True, "0.1"):
        with pytest.raises(SurgeryError, match=r"epsilon: expected a number in \[0, 1\), got"):
            RouterJitter(epsilon=bad)
    facts: dict[str, Any] = {"channel_axis": None, "channels": None, "shape": (2, 6), "site_id": "a"}
    with pytest.raises(SurgeryError, match=r"router_jitter at a: expected tokens \(\.\.\., d\)"):
        RouterJitter().build(**facts)
    layer = RouterJitter()
    layer.gate = GateFact("g", 4, -1, 2, "softmax", "softmax_topk", False, None, True)
    layer.build(**facts)
    assert layer.channel_axis == -1
    assert repr(RouterJitter()) == "RouterJitter(p=1, epsilon=0.01)" and RouterJitter(0.2).expected_drop((2, 6)) == 0.2
