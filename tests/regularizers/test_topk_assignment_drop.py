"""Assignment drop against loops, and against a dispatch that leaves out the assignments that are dropped."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dropsurgery import SurgeryError
from dropsurgery.records import GateFact
from dropsurgery.regularizers._uniform import uniform
from dropsurgery.regularizers.topk_assignment_drop import TopkAssignmentDrop, topk_assignment_drop


def dropped_by_hand(weights: np.ndarray, numbers: np.ndarray, p: float, renormalise: bool) -> np.ndarray:
    made = np.where(numbers >= p, weights, 0.0)
    for token in np.ndindex(*weights.shape[:-1]):
        if renormalise and made[token].sum() > 0:
            made[token] *= weights[token].sum() / made[token].sum()
    return made


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("shape", [(40, 2), (3, 5, 4), (6, 1)])
def test_by_hand(shape: tuple[int, ...], renormalise: bool) -> None:
    torch.manual_seed(0)
    weights, key, p = torch.rand(shape) + 0.1, torch.tensor(3), 0.5
    y = topk_assignment_drop(weights, p, renormalise, key=key)
    numbers = uniform(shape, weights.device, key).numpy()
    expected = dropped_by_hand(weights.double().numpy(), numbers, p, renormalise)
    assert np.allclose(y.numpy(), expected, rtol=1e-5)
    if shape[-1] > 1:
        other = dropped_by_hand(weights.double().numpy(), numbers, p, not renormalise)
        assert not np.allclose(y.numpy(), other, rtol=1e-2)  # the control


def dispatched(x: Tensor, indices: Tensor, weights: Tensor, experts: nn.ModuleList) -> Tensor:
    """Each assignment by itself; those of index -1 go nowhere."""
    y = torch.zeros_like(x)
    for token, slot in np.ndindex(*indices.shape):
        if indices[token, slot] >= 0:
            y[token] = y[token] + weights[token, slot] * experts[indices[token, slot]](x[token])
    return y


def test_a_weight_of_0_is_an_assignment_that_is_dropped() -> None:
    torch.manual_seed(0)
    experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
    x, indices, weights, key = torch.randn(9, 5), torch.randint(4, (9, 2)), torch.rand(9, 2), torch.tensor(2)
    gone = uniform((9, 2), x.device, key) < 0.5
    y = dispatched(x, indices, topk_assignment_drop(weights, 0.5, key=key), experts)
    assert torch.equal(y, dispatched(x, torch.where(gone, -1, indices), weights, experts))
    assert not torch.allclose(y, dispatched(x, indices, weights, experts), atol=1e-3)


def test_share_and_independence() -> None:
    torch.manual_seed(0)
    p, tokens = 0.3, 8000
    dropped = topk_assignment_drop(torch.ones(tokens, 2), p) == 0
    assert abs(dropped.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / (2 * tokens))
    assert abs(dropped.all(1).double().mean() - p**2) <= 4 * math.sqrt(p**2 * (1 - p**2) / tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", [0.0, -1.0, 1e-30, 1.0])
def test_finite(fill: float, dtype: torch.dtype) -> None:
    """Weights that add up to 0 or less stay as they were left; a token with none left gets nothing."""
    weights = torch.full((64, 2), fill).to(dtype).requires_grad_()
    for p in (0.5, 1.0):
        y = topk_assignment_drop(weights, p, True, key=torch.tensor(1))
        assert y.dtype == dtype and y.isfinite().all()
        (grad,) = torch.autograd.grad(y.float().sum(), weights)
        assert grad.isfinite().all()
    assert not y.any()


def test_nothing_in_eval() -> None:
    weights = torch.rand(4, 2)
    assert TopkAssignmentDrop(0.5).eval()(weights) is weights and TopkAssignmentDrop().eval_rule == "identity"


def test_refusals_and_repr() -> None:
    with pytest.raises(SurgeryError, match="renormalise: expected true or false"):
        TopkAssignmentDrop(renormalise="yes")
    facts = {"channel_axis": None, "channels": None, "shape": (8, 2), "site_id": "a"}
    with pytest.raises(SurgeryError, match="topk_assignment_drop at a: expected weights of experts"):
        TopkAssignmentDrop().build(**facts)
    layer = TopkAssignmentDrop()
    layer.gate = GateFact("g", 4, None, 2, "softmax", "softmax_topk", False, None, True)
    layer.build(**facts)
    assert repr(layer) == "TopkAssignmentDrop(p=0.1, renormalise=False)"
