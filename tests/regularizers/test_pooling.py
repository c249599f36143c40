"""Stochastic pooling against plain loops over windows: how often what is picked, the mean, edges, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers import stochastic_pooling
from dropsurgery.regularizers.stochastic_pooling import StochasticPooling, stochastic_pool, weighted_pool

HOSTS: list[nn.Module] = [
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, stride=2, padding=1),
    nn.MaxPool2d((2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1)),
    nn.MaxPool2d(3, stride=2, ceil_mode=True),
    nn.MaxPool2d(2, stride=3, padding=1, ceil_mode=True),
    nn.AvgPool2d(2, stride=1),
    nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    nn.AvgPool2d((7, 9)),
    nn.MaxPool1d(3, stride=2, padding=1, dilation=1),
    nn.AvgPool1d(2, padding=1),
    nn.MaxPool3d(2, stride=(1, 2, 2)),
    nn.AvgPool3d((1, 2, 2)),
]
SIZE = (7, 9, 6)


def axes_of(host: nn.Module) -> int:
    return int(type(host).__name__[-2])


def each(size: Any, axes: int) -> tuple[int, ...]:
    return tuple(size) if isinstance(size, tuple) else (size,) * axes


def windows_of(host: nn.Module, size: tuple[int, ...]) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
    """Window → the elements of the map that it covers, by looking at every position of every window."""
    axes = len(size)
    kernel, stride, padding, dilation = (
        each(getattr(host, name, 1), axes) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    windows = {}
    ways = [range(length + 2 * pad) for length, pad in zip(size, padding, strict=True)]
    for window in itertools.product(*ways):
        starts = [at * step - pad for at, step, pad in zip(window, stride, padding, strict=True)]
        ends = [start + gap * (k - 1) for start, gap, k in zip(starts, dilation, kernel, strict=True)]
        if host.ceil_mode:
            inside = all(start < length for start, length in zip(starts, size, strict=True))
            # The last window of an axis is the first that reaches its end.
            before = zip(ends, stride, size, padding, strict=True)
            inside = inside and all(end - step < length + pad - 1 for end, step, length, pad in before)
        else:
            inside = all(end < length + pad for end, length, pad in zip(ends, size, padding, strict=True))
        if inside:
            offsets = itertools.product(*(range(0, gap * k, gap) for gap, k in zip(dilation, kernel, strict=True)))
            cells = [tuple(np.add(starts, offset)) for offset in offsets]
            known = [cell for cell in cells if all(0 <= at < length for at, length in zip(cell, size, strict=True))]
            windows[window] = known
    return windows


def bound(host: nn.Module, p: float = 1.0) -> StochasticPooling:
    layer = StochasticPooling(p)
    layer.bind(host)
    return layer


def half_zeros(*shape: int) -> Tensor:
    return torch.randn(shape).relu()


@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_what_is_picked_is_in_the_window_and_the_mean_is_the_formula(host: nn.Module) -> None:
    """P22."""
    torch.manual_seed(0)
    size = SIZE[: axes_of(host)]
    x = half_zeros(2, 3, *size)
    x[0, 0] = 0
    layer = bound(host)
    picked, mean = layer(x), layer.eval()(x)
    assert picked.shape == mean.shape == host(x).shape
    windows = windows_of(host, size)
    assert len(windows) == math.prod(host(x).shape[2:])
    for sample, channel in itertools.product(range(2), range(3)):
        for window, cells in windows.items():
            values = np.array([float(x[(sample, channel, *cell)]) for cell in cells])
            place = (sample, channel, *window)
            total = values.sum()
            assert float(picked[place]) in (values[values > 0] if total else [0.0])
            assert math.isclose(mean[place], (values**2).sum() / total if total else 0, rel_tol=1e-5)
    assert torch.equal(layer(x[:, 0]), mean[:, 0]) and torch.equal(layer(x[:0]), mean[:0])


def test_the_mean_of_draws_is_what_eval_gives() -> None:
    """P22: within 2 % after 20,000 draws; other ways to pool are not."""
    torch.manual_seed(0)
    x = half_zeros(1, 4, 6, 6) + 0.05
    host = nn.MaxPool2d(3, stride=2, padding=1)
    layer = bound(host)
    draws = layer(x.expand(20_000, -1, -1, -1)).mean(0, keepdim=True)

    def within(mean: Tensor) -> bool:
        return bool(((draws - mean).abs() <= 0.02 * mean).all())

    assert within(layer.eval()(x))
    assert not within(host(x)) and not within(F.avg_pool2d(x, 3, 2, 1))
    assert torch.equal(weighted_pool(torch.zeros(2, 3, 6, 6), 2), torch.zeros(2, 3, 3, 3))
    assert torch.equal(stochastic_pool(torch.zeros(2, 3, 6, 6), 2), torch.zeros(2, 3, 3, 3))


def test_each_element_is_picked_by_its_share() -> None:
    def holds(draws: Tensor) -> bool:
        shares = [((draws == value).double().mean().item(), value / 10) for value in (1, 2, 3, 4)]
        return all(abs(seen - p) <= 4 * math.sqrt(p * (1 - p) / draws.numel()) for seen, p in shares)

    torch.manual_seed(0)
    x = torch.tensor([[3.0, 1.0], [4.0, 2.0]]).expand(200, 50, 2, 2)
    assert holds(stochastic_pool(x, 2))
    assert holds(stochastic_pool(x.to(memory_format=torch.channels_last), 2))
    uniformly = x.flatten(2).gather(2, torch.randint(4, (200, 50, 1)))
    by_softmax = x.flatten(2).gather(2, torch.multinomial(x[0, 0].flatten().softmax(0), 10_000, True).view(200, 50, 1))
    assert not holds(uniformly) and not holds(by_softmax)


def test_draws_at_the_ends_pick_no_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([0.0, 3.0, 0.0, 0.1, 2.0, 0.0]).view(1, 1, 6)
    for draw, expected in ((0.0, 3.0), (1 - 2**-24, 2.0)):
        monkeypatch.setattr(stochastic_pooling, "uniform", lambda shape, *_, draw=draw: torch.full(shape, draw))
        assert stochastic_pool(x, 6) == expected


def test_windows_draw_by_themselves_where_they_overlap() -> None:
    def correlation(picked: Tensor) -> float:
        pairs = torch.stack([picked[..., 0].flatten(), picked[..., 1].flatten()]).double()
        return float(torch.corrcoef(pairs)[0, 1])

    torch.manual_seed(0)
    x = (1 + 1e-6 * torch.arange(3.0, dtype=torch.float64)).expand(100, 200, 1, 3)
    # Two windows over (0, 1) and (1, 2): which of its elements each one picked.
    position = (stochastic_pool(x, (1, 2), 1) - 1) * 1e6 - torch.arange(2.0)
    assert abs(correlation(position)) <= 4 / math.sqrt(20_000)
    # One draw an element and not a window: the largest of a_i / e_i, e_i exponential.
    noisy = x / torch.empty(100, 200, 1, 3).exponential_()
    shared = (noisy[..., 1:] > noisy[..., :-1]).double()
    assert abs(correlation(shared)) > 4 / math.sqrt(20_000)


def test_p_is_the_share_of_the_windows_that_are_pooled_so() -> None:
    torch.manual_seed(0)
    p, host = 0.3, nn.AvgPool2d(2)
    x = torch.tensor([[1.0, 2.0], [4.0, 8.0]]).repeat(40, 1, 50, 10)
    layer = bound(host)
    layer.set_rate("p", p)
    y, own = layer(x), host(x)
    changed = y != own
    assert abs(changed.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / y.numel())
    assert set(y[changed].tolist()) == {1, 2, 4, 8}
    assert torch.allclose(layer.eval()(x), 0.7 * own + 0.3 * weighted_pool(x, 2))
    layer.set_rate("p", 0.0)
    assert torch.equal(layer(x), own) and torch.equal(layer.train()(x), own)
    layer.set_rate("p", 1.0)
    assert (layer(x) != own).all() and torch.equal(layer.eval()(x), weighted_pool(x, 2))


@pytest.mark.parametrize("host", HOSTS[:5], ids=str)
def test_gradient_goes_to_what_was_picked(host: nn.Module) -> None:
    torch.manual_seed(0)
    size = SIZE[:2]
    x = (torch.rand(1, 1, *size) + 0.5).requires_grad_()
    y = bound(host)(x)
    y.sum().backward()
    values, picked = x.detach()[0, 0], y.detach()[0, 0]
    expected = np.zeros(size)
    for window, cells in windows_of(host, size).items():
        (cell,) = (cell for cell in cells if values[cell] == picked[window])
        expected[cell] += 1
    assert np.array_equal(x.grad[0, 0].numpy(), expected)


def test_gradients_of_the_mean() -> None:
    torch.manual_seed(0)
    x = (torch.rand(2, 2, 5, 5, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: weighted_pool(x, 3, 2, 1), (x,))
    assert torch.autograd.gradgradcheck(lambda x: weighted_pool(x, 2), (x[:1, :1],))
    lonely = torch.zeros(1, 1, 2, 2)
    lonely[0, 0, 1, 1] = 0.3
    for values in (lonely, lonely * 0):  # none where an element is 0, as none passes the ReLU before
        for pool in (stochastic_pool, weighted_pool):
            start = values.clone().requires_grad_()
            pool(start, 2).sum().backward()
            assert torch.equal(start.grad, (values > 0).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_large_and_small_numbers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    info = torch.finfo(dtype)
    for top in (info.max, 1.0, info.tiny * 2.0**30):
        x = (torch.rand(20, 8, 8, 8) * 0.9 + 0.1).to(dtype) * top
        scaled = (x.double() / top).view(20, 8, 4, 2, 4, 2).transpose(3, 4).flatten(4)
        expected = scaled.square().sum(-1) / scaled.sum(-1)
        mean, picked = weighted_pool(x, 2).double() / top, stochastic_pool(x, 2).double() / top
        assert torch.allclose(mean, expected, rtol=2 * max(info.eps, 1e-6))
        assert (picked > 0).all() and abs(picked.mean() - expected.mean()) < 0.05
    assert stochastic_pool(x, 2).dtype == weighted_pool(x, 2).dtype == dtype


def test_negative_input_is_refused() -> None:
    host, x = nn.MaxPool2d(2), torch.randn(2, 3, 6, 6)
    for training in (True, False):
        layer = bound(host).train(training)
        layer.site_id = "a"
        with pytest.raises(SurgeryError, match="stochastic_pooling at a: expected an input that is never negative"):
            layer(x)
    assert torch.equal(bound(host, 0.0)(x), host(x))  # off
    # Where no look at the values is free, what is negative counts as zero.
    for pool in (stochastic_pool, weighted_pool):
        y = pool(-x.abs(), 2)
        assert not y.any()
        torch.manual_seed(0)
        first = pool(x, 2)
        torch.manual_seed(0)
        assert torch.equal(first, pool(x.relu(), 2))
    meta = bound(host).to("meta")
    assert meta(x.to("meta")).shape == (2, 3, 3, 3)


@pytest.mark.parametrize(
    ("producer", "fits"),
    [
        ((), True),
        (("activation", "relu"), True),
        (("activation", "sigmoid"), True),
        (("pool", "max_pool"), True),  # not known: forward looks
        (("activation",), False),
        (("norm", "batch_norm"), False),
        (("conv", "conv2d"), False),
    ],
)
def test_what_is_known_to_be_negative_is_refused_when_built(producer: tuple[str, ...], fits: bool) -> None:
    layer = StochasticPooling()
    layer.producer = producer
    facts = {"channel_axis": 1, "channels": 3, "shape": (2, 3, 8, 8), "site_id": "a"}
    if fits:
        layer.build(**facts)
        assert layer.site_id == "a"
    else:
        with pytest.raises(SurgeryError, match=f"stochastic_pooling at a: expected .* got that of {producer[0]}"):
            layer.build(**facts)


class Same(nn.MaxPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def test_layers_without_windows_of_their_own_are_refused() -> None:
    for host in (nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(2, return_indices=True), Same(2), nn.LPPool2d(2, 2), nn.ReLU()):
        with pytest.raises(SurgeryError, match=r"stochastic_pooling at a layer: expected a max or average .*, got"):
            bound(host)
