"""Alpha, Gaussian, biased and crossmap dropout, against NumPy with the same numbers, and by their statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._uniform import keyed_uniform
from dropsurgery.regularizers.alpha_dropout import LOW, AlphaDropout, alpha_dropout
from dropsurgery.regularizers.biased_dropout import BiasedDropout, biased_dropout
from dropsurgery.regularizers.crossmap_dropout import CrossmapDropout, crossmap_dropout
from dropsurgery.regularizers.gaussian_dropout import GaussianDropout, gaussian_dropout, keyed_normal

CPU = torch.device("cpu")


def share_is(drop: Tensor, p: float) -> bool:
    """Whether independent draws were dropped with probability p, within 4 standard errors."""
    return bool(abs(drop.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / drop.numel()))


def mean_is(values: Tensor, expected: float) -> bool:
    """Whether independent draws have this mean, within 4 standard errors."""
    values = values.double().flatten()
    return bool(abs(values.mean() - expected) <= 4 * values.std() / math.sqrt(len(values)))


# ---- alpha dropout ----


def keeps_mean_and_variance(x: Tensor, y: Tensor) -> bool:
    return mean_is(y - x, 0) and mean_is(y.square() - x.square(), 0)


def affine(p: float) -> tuple[float, float]:
    """The paper's a and b."""
    q, low = 1 - p, -1.7580993408473766
    a = (q + low**2 * q * (1 - q)) ** -0.5
    return a, -a * (1 - q) * low


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_alpha_dropout_is_the_papers(p: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 500, requires_grad=True)
    y = alpha_dropout(x, p)
    a, b = affine(p)
    low = a * -1.7580993408473766 + b
    drop = (y - low).abs() < 1e-5
    assert share_is(drop, p)
    assert torch.allclose(y, torch.where(drop, low, a * x + b), atol=2e-6)
    assert keeps_mean_and_variance(x.detach(), y.detach())
    y.sum().backward()
    assert torch.allclose(x.grad, torch.where(drop, 0.0, a), rtol=1e-5)


@pytest.mark.parametrize("wrong", [F.dropout, lambda x, p: torch.where(torch.rand_like(x) < p, LOW, x)])
def test_without_lowest_value_or_affine_step_mean_and_variance_move(wrong) -> None:  # the negative control
    torch.manual_seed(0)
    x = torch.randn(200, 500)
    assert not keeps_mean_and_variance(x, wrong(x, 0.3))
    assert keeps_mean_and_variance(x, alpha_dropout(x, 0.3))


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_alpha_dropout_gives_what_torchs_gives(p: float) -> None:
    torch.manual_seed(0)
    x = torch.full((2, 4000), 0.7)
    ours, theirs = alpha_dropout(x, p).unique(), F.alpha_dropout(x, p, training=True).unique()
    assert len(ours) == 2 and torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("shape", "axis"), [((40, 30, 4, 5), 1), ((40, 4, 5, 30), -1), ((40, 7, 30), -1)])
def test_alpha_dropout_of_channels(shape: tuple[int, ...], axis: int) -> None:
    p, key, x = 0.3, torch.tensor(3), torch.randn(shape)
    layer = AlphaDropout(p, channels=True)
    layer.build(channel_axis=axis, channels=30, shape=shape, site_id="a")
    layer.context = Same(key)
    kept = keyed_uniform([n if i in (0, axis % len(shape)) else 1 for i, n in enumerate(shape)], CPU, key) >= p
    a, b = affine(p)
    expected = a * np.where(kept.numpy(), x.numpy(), -1.7580993408473766) + b
    np.testing.assert_allclose(layer(x).numpy(), expected, atol=2e-6)
    assert share_is(~kept, p)


def test_alpha_dropout_of_channels_gives_what_torchs_gives() -> None:
    torch.manual_seed(0)
    x = torch.full((20, 50, 3, 3), 0.7)
    ours, theirs = alpha_dropout(x, 0.2, channels=True), F.feature_alpha_dropout(x, 0.2, training=True)
    assert torch.allclose(ours.unique(), theirs.unique(), atol=1e-5)
    for y in (ours, theirs):
        assert (y == y[:, :, :1, :1]).all()
    assert not (alpha_dropout(x, 0.2) == alpha_dropout(x, 0.2)[:, :, :1, :1]).all()


class Same:
    """A context that always has the same key."""

    seed = 0

    def __init__(self, key: Tensor) -> None:
        self._key = key

    def key(self, site_id: str) -> Tensor:
        return self._key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_alpha_dropout_rounds_once(dtype: torch.dtype) -> None:
    x, key = torch.randn(50, 400).to(dtype) * 0.01, torch.tensor(1)
    y = alpha_dropout(x, 0.3, key=key)
    exact = alpha_dropout(x.double(), 0.3, key=key)
    assert y.dtype == dtype and torch.allclose(y, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_alpha_dropout_at_its_ends() -> None:
    x = torch.randn(20, 30, requires_grad=True)
    y = alpha_dropout(x, 1.0)
    y.sum().backward()
    assert not y.any() and not x.grad.any()
    assert torch.allclose(alpha_dropout(x, 0.0), x, atol=1e-6)
    assert alpha_dropout(torch.full((1000,), 65504.0).half(), 0.5).isfinite().all()


def test_alpha_dropout_of_channels_refuses_what_has_none() -> None:
    for shape, axis in (((4, 6), -1), ((4, 6, 9, 9), None)):
        with pytest.raises(SurgeryError, match=r"alpha_dropout at a: expected maps .*, got .*; use dropout there"):
            AlphaDropout(channels=True).build(channel_axis=axis, channels=6, shape=shape, site_id="a")
        AlphaDropout().build(channel_axis=axis, channels=6, shape=shape, site_id="a")
    with pytest.raises(SurgeryError, match="channels: expected true or false, got 'yes'"):
        AlphaDropout(channels="yes")
    assert repr(AlphaDropout(0.2, True)) == "AlphaDropout(p=0.2, channels=True)"
    assert repr(AlphaDropout(0.2)) == "AlphaDropout(p=0.2)"


# ---- Gaussian dropout ----


def is_normal(noise: Tensor, mean: float, variance: float) -> bool:
    """Whether draws have these moments, and the shares of a Gaussian within 1 and beyond 2 deviations."""
    z = (noise - mean) / math.sqrt(variance)
    moments = mean_is(z, 0) and mean_is(z.square(), 1) and mean_is(z**4, 3)
    return moments and share_is(z.abs() < 1, 0.682689) and share_is(z.abs() > 2, 0.0455)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_gaussian_dropout_has_the_variance_of_dropout(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(500, 400, requires_grad=True)
    y = gaussian_dropout(x, p)
    assert is_normal(y.detach(), 1, p / (1 - p))
    dropped = F.dropout(torch.ones(200_000), p)
    assert mean_is((dropped - 1).square(), p / (1 - p))  # which has the same two moments, and another shape
    assert not is_normal(dropped, 1, p / (1 - p))
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_other_noise_fails() -> None:  # the negative control
    torch.manual_seed(0)
    p, z = 0.2, torch.randn(200_000)
    assert is_normal(1 + z * math.sqrt(p / (1 - p)), 1, p / (1 - p))
    assert not is_normal(1 + z * math.sqrt((1 - p) / p), 1, p / (1 - p))  # p taken for the share kept
    assert not is_normal(1 + z * p / (1 - p), 1, p / (1 - p))  # the variance taken for the deviation
    assert not is_normal(1 + (torch.rand(200_000) - 0.5) * math.sqrt(12 * p / (1 - p)), 1, p / (1 - p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gaussian_dropout_is_the_reference_with_the_same_numbers(dtype: torch.dtype) -> None:
    x, key = torch.randn(6, 5, 7, 7).to(dtype), torch.tensor(3)
    z = keyed_normal(x.shape, CPU, key).double().numpy()
    expected = x.double().numpy() * (1 + z * math.sqrt(0.3 / 0.7))
    eps = max(torch.finfo(dtype).eps, 1e-6)
    np.testing.assert_allclose(gaussian_dropout(x, 0.3, key=key).double().numpy(), expected, rtol=eps, atol=eps)


def test_gaussian_dropout_keeps_nothing_for_backward_and_meets_the_same_noise() -> None:
    kept: list[int] = []
    x = torch.rand(8, 16, 14, 14).add_(0.1).requires_grad_()
    rate = torch.tensor(0.3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        y = gaussian_dropout(x, rate)
    rate.fill_(0.5)  # as by a clock that moves before backward
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert sum(kept) <= 64 and torch.allclose(grad, y / x, rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (2, 3, 4, 5, 6)])
def test_gaussian_dropout_takes_any_shape_and_rate(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, requires_grad=True)
    for p in (0.0, 0.5, 1.0):
        y = gaussian_dropout(x, p)
        assert y.shape == shape and y.isfinite().all()
        assert torch.equal(y, x) or p > 0
        assert not y.any() or p < 1
    layer = GaussianDropout(0.3).eval()
    assert layer(x) is x and layer.expected_drop(shape) == 0.3


def test_gaussian_dropout_goes_another_way_on_other_devices() -> None:
    x = torch.empty(4, 5, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = gaussian_dropout(x, torch.tensor(0.5, device="meta"))
    y.sum().backward()
    assert y.dtype == x.dtype and x.grad.shape == x.shape


# ---- biased dropout ----


def biased_scales(x: np.ndarray, u: np.ndarray, p: float, delta: float) -> np.ndarray:
    """What each element is multiplied by: rank, group, rate, mask and scale, one element after the other."""
    scales = np.zeros(x.shape)
    for values, drawn, out in zip(x, u, scales, strict=True):
        order = np.argsort(-np.abs(values.ravel()), kind="stable")
        for place, i in enumerate(order):
            sign = -1 if place < len(order) // 2 else 1
            rate = np.float32(p) + sign * np.float32(delta)
            out.ravel()[i] = 0 if drawn.ravel()[i] < rate else 1 / (1 - rate)
    return scales


def make_input(what: str) -> Tensor:
    torch.manual_seed(0)
    shape = {"odd": (3, 5, 7, 7), "flat": (4, 9), "single": (3, 1, 1, 1)}.get(what, (3, 4, 5, 6))
    x = torch.randn(shape)
    if what == "ties":
        x = x.mul(2).round()
    if what in ("ones", "zeros", "negative"):
        x = {"ones": torch.ones(shape), "zeros": torch.zeros(shape), "negative": -x.abs()}[what]
    return x.relu() if what == "relu" else x


@pytest.mark.parametrize("what", ["usual", "odd", "flat", "single", "ties", "ones", "zeros", "negative", "relu"])
@pytest.mark.parametrize(("p", "delta"), [(0.5, 0.2), (0.3, 0.3), (0.4, 0.0)])
def test_biased_dropout_is_the_reference_with_the_same_numbers(what: str, p: float, delta: float) -> None:
    x, key = make_input(what).requires_grad_(), torch.tensor(7)
    y = biased_dropout(x, p, delta, key=key)
    scales = biased_scales(x.detach().numpy(), keyed_uniform(x.shape, CPU, key).numpy(), p, delta)
    np.testing.assert_allclose(y.detach().numpy(), x.detach().numpy() * scales, rtol=1e-6)
    y.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), scales, rtol=1e-6)


def groups_have_their_rates(x: Tensor, y: Tensor, low: float, high: float) -> bool:
    """Whether the larger half of each sample was dropped at `low`, the other at `high`."""
    place = x.abs().flatten(1).argsort(1, descending=True).argsort(1)
    larger, drop = place < place.shape[1] // 2, (y == 0).flatten(1)
    return share_is(drop[larger], low) and share_is(drop[~larger], high)


def test_biased_dropout_drops_the_smaller_half_more() -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 10, 10, 10)
    y = biased_dropout(x, 0.5, 0.2)
    assert groups_have_their_rates(x, y, 0.3, 0.7) and share_is(y == 0, 0.5)
    scales = (y / x)[y != 0].unique()
    assert (scales - 1 / 0.7).abs().minimum((scales - 1 / 0.3).abs()).max() < 1e-5
    assert mean_is(y - x, 0)


def test_other_groups_fail() -> None:  # the negative control
    torch.manual_seed(0)
    x = torch.randn(100, 1000)
    assert not groups_have_their_rates(x, F.dropout(x, 0.5), 0.3, 0.7)
    swapped = biased_dropout(1 / x, 0.5, 0.2) * x.square()
    assert not groups_have_their_rates(x, swapped, 0.3, 0.7)
    signed = biased_dropout(x + 10, 0.5, 0.2)  # ranked by the value, not by its magnitude
    assert not groups_have_their_rates(x, signed, 0.3, 0.7)


def test_biased_dropout_ranks_each_sample_by_itself() -> None:
    x, key = torch.randn(4, 50), torch.tensor(1)
    other = x.clone()
    other[1:] *= 100
    assert torch.equal(biased_dropout(x, 0.4, key=key)[0], biased_dropout(other, 0.4, key=key)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_biased_dropout_drops_the_same_in_each_dtype(dtype: torch.dtype) -> None:
    x, key = torch.randn(4, 300).to(dtype), torch.tensor(1)
    y = biased_dropout(x, 0.5, key=key)
    assert y.dtype == dtype and torch.equal(y == 0, biased_dropout(x.float(), 0.5, key=key) == 0)


def test_other_devices_find_the_same_half(monkeypatch: pytest.MonkeyPatch) -> None:
    key = torch.tensor(1)
    for what in ("usual", "odd", "ties", "ones", "relu"):
        x = make_input(what)
        here = biased_dropout(x, 0.5, key=key)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "is_cpu", False)
            assert torch.equal(biased_dropout(x, 0.5, key=key), here)


def test_biased_dropout_near_the_ends_of_p() -> None:
    """Both rates stay in [0, 1] and at equal distance from p, while a schedule moves p."""
    torch.manual_seed(0)
    x = torch.randn(100, 1000)
    for p, delta in ((0.1, 0.1), (0.95, 0.05)):
        y = biased_dropout(x, torch.tensor(p), 0.2)
        assert groups_have_their_rates(x, y, p - delta, min(1.0, p + delta)) and y.isfinite().all()
        assert BiasedDropout(p, 0.2).expected_drop((1, 1000)) == pytest.approx(p)
    assert not biased_dropout(x, 1.0).any() and torch.equal(biased_dropout(x, 0.0), x)
    assert BiasedDropout(0.5, 0.2).expected_drop((8, 5)) == pytest.approx((2 * 0.3 + 3 * 0.7) / 5)


@pytest.mark.parametrize("delta", [-0.1, 0.6, "0.1", True, float("nan")])
def test_biased_dropout_refuses(delta: object) -> None:
    with pytest.raises(SurgeryError, match=r"delta: expected a number in \[0, 0.5\], got"):
        BiasedDropout(0.5, delta)
    with pytest.raises(SurgeryError, match=r"biased_dropout at a: expected \(B, ...\), got \(8,\); use dropout there"):
        BiasedDropout().build(channel_axis=None, channels=None, shape=(8,), site_id="a")
    with pytest.raises(SurgeryError, match="expected 2 dimensions"):
        biased_dropout(torch.ones(8), 0.5)


# ---- crossmap dropout ----


def drops_whole_positions(y: Tensor, axis: int, p: float) -> bool:
    """Whether `y`, made of ones, is zero or 1 / (1 - p) by positions, as often as `p` says."""
    y = y.movedim(axis, 1)
    drop = y[:, 0] == 0
    return torch.allclose(y, ((~drop).float() / (1 - p))[:, None].expand_as(y)) and share_is(drop, p)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((200, 6, 40), 1), ((200, 40, 6), -1), ((100, 6, 9, 11), 1), ((100, 9, 11, 6), -1), ((50, 6, 3, 5, 7), 1)],
)
def test_crossmap_dropout_drops_the_same_positions_in_all_maps(shape: tuple[int, ...], axis: int) -> None:
    torch.manual_seed(0)
    layer = CrossmapDropout(0.3)
    layer.build(channel_axis=axis, channels=6, shape=shape, site_id="a")
    x = torch.ones(shape, requires_grad=True)
    y = layer(x)
    assert drops_whole_positions(y, axis, 0.3) and layer.expected_drop(shape) == 0.3
    y.sum().backward()
    assert torch.equal(x.grad, y)
    drop = (y.movedim(axis, 1)[:, 0] == 0).flatten(1).double() - 0.3
    for a, b in ((drop[:, 1:], drop[:, :-1]), (drop[1:], drop[:-1])):  # neighbours, samples
        assert abs((a * b).mean() / (0.3 * 0.7)) <= 4 / math.sqrt(a.numel())


@pytest.mark.parametrize("wrong", [F.dropout, F.dropout2d])
def test_elements_and_channels_are_no_positions(wrong) -> None:  # the negative control
    torch.manual_seed(0)
    assert not drops_whole_positions(wrong(torch.ones(100, 6, 9, 11), 0.3), 1, 0.3)


def test_crossmap_dropout_is_the_reference_with_the_same_numbers() -> None:
    x, key = torch.randn(5, 4, 3, 6), torch.tensor(3)
    kept = keyed_uniform([5, 1, 3, 6], CPU, key).numpy() >= np.float32(0.4)
    expected = x.numpy() * np.where(kept, 1 / 0.6, 0)
    np.testing.assert_allclose(crossmap_dropout(x, 0.4, key=key).numpy(), expected, rtol=1e-6)
    assert not crossmap_dropout(x, 1.0).any()


def test_crossmap_dropout_refuses_what_has_no_positions() -> None:  # P23
    for shape, axis in (((4, 6), -1), ((4, 6, 9, 9), None), ((4, 6, 9), None)):
        with pytest.raises(SurgeryError, match=r"crossmap_dropout at a: expected maps .*, got .*; use dropout there"):
            CrossmapDropout().build(channel_axis=axis, channels=6, shape=shape, site_id="a")
    with pytest.raises(SurgeryError, match=r"crossmap_dropout: expected a channel axis .*, got \(2, 9, 6\)"):
        CrossmapDropout()(torch.ones(2, 9, 6))
