"""Router noise against its formulas in NumPy and SciPy: distributions, the learned deviations, tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dropsurgery import SurgeryError
from dropsurgery.records import GateFact
from dropsurgery.regularizers.router_noise import RouterNoise, deviations, gumbel, normal, router_noise

GATE = GateFact("g", 4, -1, 2, "softmax", "softmax_topk", False, None, True, features=6)


def noise_of(kind: str, scale: float | Tensor = 1.0, shape: tuple[int, ...] = (5000, 4), p: float = 1.0) -> np.ndarray:
    torch.manual_seed(0)
    return router_noise(torch.zeros(shape), p, kind, scale=scale).double().numpy()


def fits(values: np.ndarray, distribution: object) -> bool:
    """By Kolmogorov and Smirnov; of 20000 numbers."""
    return stats.kstest(values.flatten(), distribution.cdf).pvalue > 1e-3


def test_gumbel() -> None:
    assert fits(noise_of("gumbel"), stats.gumbel_r)
    assert fits(noise_of("gumbel", 2.0) / 2, stats.gumbel_r)
    assert not fits(-noise_of("gumbel"), stats.gumbel_r)  # the control: the sign
    u = np.array([0.0, 1e-6, 0.3, 0.5, 1 - 2.0**-24], dtype=np.float32)
    made = gumbel(torch.from_numpy(u)).numpy()
    assert np.isfinite(made).all()
    assert np.allclose(made[1:], -np.log(-np.log(u[1:].astype(np.float64))), rtol=1e-4, atol=1e-5)


def test_normal_by_the_number_of_experts() -> None:
    assert fits(noise_of("normal") * 4, stats.norm) and fits(noise_of("normal", 3.0) * 4 / 3, stats.norm)
    assert not fits(noise_of("normal"), stats.norm)  # the control: not divided
    first, second = np.array([0.0, 0.2, 1 - 2.0**-24]), np.array([0.5, 0.9, 0.0])
    made = normal(torch.from_numpy(first), torch.from_numpy(second)).numpy()
    expected = [math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * v) for u, v in zip(first, second, strict=True)]
    assert np.isfinite(made).all() and np.allclose(made, expected)


def test_scores_of_a_token_get_numbers_of_their_own() -> None:
    """The largest correlation of four columns of 5000; noise shared by a token would be 1."""
    for kind in ("gumbel", "normal"):
        together = np.corrcoef(noise_of(kind).T)
        assert np.abs(together - np.eye(4)).max() < 4 / math.sqrt(5000)


def test_share_of_tokens() -> None:
    p = 0.3
    changed = noise_of("gumbel", p=p) != 0
    assert np.array_equal(changed.all(1), changed.any(1))
    assert abs(changed[:, 0].mean() - p) <= 4 * math.sqrt(p * (1 - p) / 5000)


def test_gumbel_chooses_as_the_softmax_says() -> None:
    """The largest of scores with Gumbel noise is drawn from their softmax."""
    torch.manual_seed(0)
    scores, times = torch.tensor([1.0, 0.0, -1.0, 0.5]), 8000
    chosen = router_noise(scores.expand(times, 4), 1.0, "gumbel").argmax(-1)
    shares = np.bincount(chosen.numpy(), minlength=4) / times
    expected = scores.double().softmax(0).numpy()
    assert (np.abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / times)).all()


def test_deviations_of_noisy_top_k() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(7, 6)), rng.normal(size=(6, 4))
    expected = np.log1p(np.exp(x @ w)) + 1e-2
    assert np.allclose(deviations(torch.from_numpy(x), torch.from_numpy(w)).numpy(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = deviations(torch.from_numpy(x).float(), torch.from_numpy(w).float())
    assert made.dtype == torch.float32 and np.allclose(made.numpy(), expected, rtol=1e-4, atol=1e-5)


def noisy(p: float = 1.0) -> RouterNoise:
    layer = RouterNoise(p, noise="noisy_top_k")
    layer.gate = GATE
    layer.build(channel_axis=-1, channels=4, shape=(2, 4), site_id="g")
    return layer


def test_noisy_top_k_learns_how_much_noise() -> None:
    layer = noisy()
    assert layer.learned == ("noise_weight",) and list(layer.state_dict()) == ["noise_weight"]
    assert layer.noise_weight.shape == (6, 4) and not layer.noise_weight.any()
    torch.manual_seed(0)
    x, scores = torch.randn(5000, 6), torch.zeros(5000, 4)
    start = layer(scores, x).detach().numpy()
    assert fits(start / (math.log(2) + 1e-2), stats.norm)
    with torch.no_grad():
        layer.noise_weight.normal_()
    scaled = layer(scores, x)
    by_hand = np.log1p(np.exp(x.double().numpy() @ layer.noise_weight.detach().double().numpy())) + 1e-2
    assert fits(scaled.detach().numpy() / by_hand, stats.norm)
    assert not fits(scaled.detach().numpy() / (math.log(2) + 1e-2), stats.norm)  # the control
    scaled.square().mean().backward()
    assert layer.noise_weight.grad.abs().max() > 0
    assert layer.eval()(scores, x) is scores


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    key, scores = torch.tensor(5), torch.randn(6, 4).to(dtype)
    y = router_noise(scores, 1.0, key=key)
    assert y.dtype == dtype and torch.equal(y, router_noise(scores.double(), 1.0, key=key).to(dtype))
    x = torch.randn(6, 6).to(dtype)
    made = noisy()(scores, x)
    assert made.dtype == dtype and made.isfinite().all()


def test_experts_on_another_axis() -> None:
    key, scores = torch.tensor(5), torch.randn(50, 4)
    turned = router_noise(scores.T, 0.5, key=key, axis=0) != scores.T
    assert torch.equal(turned.all(0), turned.any(0)) and 5 < turned[0].sum() < 45


def test_refusals_and_repr() -> None:
    for wrong in ({"noise": "pink"}, {"scale": 0}, {"scale": True}):
        with pytest.raises(SurgeryError, match=f"{next(iter(wrong))}: expected"):
            RouterNoise(**wrong)
    with pytest.raises(SurgeryError, match="router_noise at a: expected a gate whose input is known"):
        RouterNoise(noise="noisy_top_k").build(channel_axis=-1, channels=4, shape=(2, 4), site_id="a")
    with pytest.raises(SurgeryError, match="expected `features` and `experts` where it is used alone"):
        RouterNoise(noise="noisy_top_k")(torch.zeros(2, 4))
    alone = RouterNoise(noise="noisy_top_k", features=6, experts=4)
    assert alone(torch.zeros(2, 4), torch.randn(2, 6)).any()
    assert repr(RouterNoise()) == "RouterNoise(p=1, noise='gumbel', scale=1)"
