"""Expert output masking against loops, and its mean against eval; the variants that it must not be fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dropsurgery import SurgeryError
from dropsurgery.records import GateFact
from dropsurgery.regularizers._uniform import uniform
from dropsurgery.regularizers.expert_output_masking import ExpertOutputMasking, expert_output_masking


def masked_by_hand(weights: np.ndarray, numbers: np.ndarray, p: float, rescale: str) -> np.ndarray:
    made = np.zeros_like(weights)
    for place in np.ndindex(*weights.shape):
        number = numbers[(*place[:-1], 0)] if numbers.shape != weights.shape else numbers[place]
        if number >= p:
            made[place] = weights[place] / (1 - p) if rescale == "train" else weights[place]
    return made


@pytest.mark.parametrize("rescale", ["test", "train"])
@pytest.mark.parametrize("unit", ["slot", "token"])
@pytest.mark.parametrize("shape", [(9, 2), (3, 5, 4), (6, 1)])
def test_by_hand(shape: tuple[int, ...], unit: str, rescale: str) -> None:
    torch.manual_seed(0)
    weights, key, p = torch.rand(shape), torch.tensor(3), 0.4
    y = expert_output_masking(weights, p, rescale, unit, key=key)
    drawn = shape if unit == "slot" else (*shape[:-1], 1)
    numbers = uniform(drawn, weights.device, key).numpy()
    assert np.allclose(y.numpy(), masked_by_hand(weights.numpy(), numbers, p, rescale), rtol=1e-6)


def mixed(weights: Tensor, outputs: Tensor) -> Tensor:
    """The sum over the chosen experts."""
    return (weights[..., None] * outputs).sum(-2)


def test_a_weight_of_0_is_an_output_of_0() -> None:
    torch.manual_seed(0)
    weights, outputs, key = torch.rand(20, 2), torch.randn(20, 2, 6), torch.tensor(1)
    masked = expert_output_masking(weights, 0.5, key=key)
    vectors = torch.where((uniform((20, 2), weights.device, key) >= 0.5)[..., None], outputs, 0)
    assert torch.equal(mixed(masked, outputs), mixed(weights, vectors))


@pytest.mark.parametrize("rescale", ["test", "train"])
def test_mean_of_training_is_eval(rescale: str) -> None:
    torch.manual_seed(0)
    weights, outputs, p, times = torch.rand(1, 2), torch.randn(1, 2, 6), 0.3, 20_000
    layer = ExpertOutputMasking(p, rescale=rescale)
    mean = mixed(layer(weights.expand(times, 2)), outputs).double().mean(0)
    resting = mixed(layer.eval()(weights), outputs)[0]
    spread = float((weights[..., None] * outputs).abs().sum()) * (1 if rescale == "test" else 1 / (1 - p))
    assert (mean - resting).abs().max() <= 4 * spread * math.sqrt(p * (1 - p) / times)
    # The control, a model that rescales in training and multiplies in eval too: the means are 1 - p apart.
    inverted = mixed(expert_output_masking(weights.expand(times, 2), p, "train"), outputs).double().mean(0)
    assert not torch.allclose(inverted, mixed(weights * (1 - p), outputs)[0].double(), atol=0.05)


def test_slots_are_dropped_apart_and_tokens_whole() -> None:
    torch.manual_seed(0)
    p, tokens = 0.3, 8000
    dropped = expert_output_masking(torch.ones(tokens, 2), p) == 0
    assert abs(dropped.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / (2 * tokens))
    both = dropped.all(1).double().mean()
    assert abs(both - p**2) <= 4 * math.sqrt(p**2 * (1 - p**2) / tokens)
    whole = expert_output_masking(torch.ones(tokens, 2), p, unit="token") == 0
    assert torch.equal(whole[:, 0], whole[:, 1])
    assert not abs(whole.all(1).double().mean() - p**2) <= 4 * math.sqrt(p**2 * (1 - p**2) / tokens)


def test_eval_says_what_it_does() -> None:
    weights = torch.rand(4, 2)
    assert torch.equal(ExpertOutputMasking(0.2).eval()(weights), weights * 0.8)
    assert ExpertOutputMasking(0.2, rescale="train").eval()(weights) is weights
    assert ExpertOutputMasking(0.0).eval()(weights) is weights
    assert "1 - p" in ExpertOutputMasking().eval_rule and ExpertOutputMasking(rescale="train").eval_rule == "identity"


def test_refusals_and_repr() -> None:
    for wrong in ({"rescale": "both"}, {"unit": "expert"}):
        with pytest.raises(SurgeryError, match=f"{next(iter(wrong))}: expected"):
            ExpertOutputMasking(**wrong)
    facts = {"channel_axis": None, "channels": None, "shape": (8, 2), "site_id": "a"}
    with pytest.raises(SurgeryError, match="expert_output_masking at a: expected weights of experts"):
        ExpertOutputMasking().build(**facts)
    layer = ExpertOutputMasking()
    layer.gate = GateFact("g", 4, None, 2, "softmax", "softmax_topk", False, None, True)
    layer.build(**facts)
    assert repr(layer) == "ExpertOutputMasking(p=0.2, rescale='test', unit='slot')"
