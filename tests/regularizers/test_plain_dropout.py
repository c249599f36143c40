"""Dropout, SpatialDropout and StochasticDepth: where one draw holds, how often, and the scale."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._uniform import keyed_uniform
from dropsurgery.regularizers.dropout import Dropout, dropout
from dropsurgery.regularizers.spatial_dropout import SpatialDropout, spatial_dropout
from dropsurgery.regularizers.stochastic_depth import StochasticDepth, stochastic_depth


def share_is(drop: Tensor, p: float) -> bool:
    """Whether independent draws were dropped with probability p, within 4 standard errors."""
    return bool(abs(drop.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / drop.numel()))


@pytest.mark.parametrize("shape", [(64, 16, 14, 14), (100, 197, 12), (40_000, 5), (100_000,)])
@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_dropout(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.ones(shape, requires_grad=True)
    y = dropout(x, p)
    drop = y == 0
    assert share_is(drop, p)
    assert torch.allclose(y, (~drop).float() / (1 - p), rtol=1e-5)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    a, b = drop.flatten()[1:].double() - p, drop.flatten()[:-1].double() - p
    assert abs((a * b).mean() / (p * (1 - p))) <= 4 / math.sqrt(a.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dropout_in_low_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert share_is(dropout(torch.ones(4_000_000, dtype=dtype), 0.000826) == 0, 0.000826)


@pytest.mark.parametrize("drop", [dropout, spatial_dropout, stochastic_depth])
def test_all_dropped_is_zeros(drop) -> None:
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    drop(x, 1.0).sum().backward()
    assert not drop(x, 1.0).any() and not x.grad.any()


@pytest.mark.parametrize("drop", [dropout, spatial_dropout, stochastic_depth])
@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_refuses_rates_out_of_range(drop, p: float) -> None:
    with pytest.raises(SurgeryError, match=r"p: expected a number in \[0, 1\], got"):
        drop(torch.ones(2, 3, 4, 4), p)


MAPS = [  # shapes, each with the axis of its channels
    *(((200, 50, 24), 1), ((200, 24, 50), -1), ((200, 50, 4, 6), 1), ((200, 4, 6, 50), -1)),
    *(((200, 50, 2, 3, 4), 1), ((200, 2, 3, 4, 50), -1)),
]


def drops_whole_channels(y: Tensor, axis: int, p: float) -> bool:
    """Whether `y`, made of ones, is zero or 1 / (1 - p) by channels, as often as `p` says."""
    y = y.movedim(axis, 1).flatten(2)
    drop = y[:, :, 0] == 0
    return torch.allclose(y, ((~drop).float() / (1 - p))[:, :, None].expand_as(y)) and share_is(drop, p)


@pytest.mark.parametrize(("shape", "axis"), MAPS)
def test_spatial_dropout_drops_whole_channels(shape: tuple[int, ...], axis: int) -> None:
    torch.manual_seed(0)
    layer = SpatialDropout(0.2)
    layer.build(channel_axis=axis, channels=50, shape=shape, site_id="a")
    x = torch.ones(shape, requires_grad=True)
    y = layer(x)
    assert drops_whole_channels(y, axis, 0.2) and layer.expected_drop(shape) == 0.2
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_dropout1d_drops_tokens_instead_of_channels() -> None:  # P23's negative control
    torch.manual_seed(0)
    x = torch.ones(200, 24, 50)
    assert not drops_whole_channels(nn.functional.dropout1d(x, 0.2), -1, 0.2)
    assert not drops_whole_channels(nn.functional.dropout(x, 0.2), -1, 0.2)
    assert drops_whole_channels(nn.functional.dropout1d(x.mT, 0.2), 1, 0.2)


def test_spatial_dropout_is_the_reference_with_the_same_numbers() -> None:
    key = torch.tensor(3)
    x = torch.randn(5, 4, 3, 2, 6)
    kept = keyed_uniform([5, 4, 1, 1, 1], x.device, key).numpy() >= np.float32(0.3)
    expected = x.numpy() * np.where(kept, 1 / 0.7, 0)
    np.testing.assert_allclose(spatial_dropout(x, 0.3, key=key).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 64), 1), ((64,), -1), ((2, 3, 4, 5, 6, 7), 1), ((2, 8, 7, 7), None), ((2, 8, 7), None)]
)
def test_spatial_dropout_refuses_what_is_not_maps(shape: tuple[int, ...], axis: int | None) -> None:  # P23
    with pytest.raises(SurgeryError, match=r"spatial_dropout at a: expected maps .*, got .*; use dropout there"):
        SpatialDropout().build(channel_axis=axis, channels=8, shape=shape, site_id="a")
    if len(shape) not in (3, 4, 5):
        with pytest.raises(SurgeryError, match="expected maps"):
            spatial_dropout(torch.ones(shape), 0.1)


def test_three_dimensions_need_to_be_told_apart() -> None:  # P23: (B, C, L) and (B, N, C) look alike
    with pytest.raises(SurgeryError, match=r"spatial_dropout: expected a channel axis .*, got \(2, 196, 64\)"):
        SpatialDropout(0.5)(torch.ones(2, 196, 64))
    assert spatial_dropout(torch.ones(2, 196, 64), 0.5, channel_axis=-1).shape == (2, 196, 64)


def test_dropout_as_in_the_papers() -> None:
    """Raw in training, times the share kept in eval: dropout with 1 / (1 - p) folded into what follows."""
    torch.manual_seed(0)
    layer = Dropout(0.3, rescale="test")
    x = torch.full((100_000,), 2.0)
    y = layer(x)
    assert set(y.unique().tolist()) == {0.0, 2.0} and share_is(y == 0, 0.3)
    in_eval = layer.eval()(x)
    assert torch.allclose(in_eval, 0.7 * x)
    assert abs(y.mean() / in_eval.mean() - 1) < 0.01
    assert abs(y.mean() / x.mean() - 1) > 0.25  # to leave eval as it is would be wrong
    assert layer.eval_rule == "times the share kept, 1 - p" and Dropout(0.3).eval_rule == "identity"
    layer.set_rate("p", 0.0)
    assert layer(x) is x
    assert repr(Dropout(0.2, rescale="test")) == "Dropout(p=0.2, rescale='test')"


@pytest.mark.parametrize("p", [0.02, 0.5, 1.0])
def test_both_forms_of_dropout_drop_the_same(p: float) -> None:
    x = torch.randn(50, 7, 40)
    raw, scaled = (dropout(x, p, rescale=rescale, key=torch.tensor(1)) for rescale in ("test", "train"))
    assert torch.equal(raw, torch.where(raw == 0, 0, x))
    assert torch.allclose(raw, scaled * (1 - p), atol=1e-6) and share_is(raw == 0, p)


@pytest.mark.parametrize("shape", [(6, 5, 4, 3, 7), (6, 5, 4, 3, 2, 2), (6, 5, 9)])
def test_dropout_keeps_the_layout_of_any_rank(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).transpose(1, -1)
    y = dropout(x, 0.5, key=torch.tensor(1))
    assert y.stride() == x.stride() and torch.equal(y, dropout(x.contiguous(), 0.5, key=torch.tensor(1)))


def test_stochastic_depth_by_rows() -> None:  # P17
    torch.manual_seed(0)
    y = stochastic_depth(torch.ones(20_000, 3, 2), 0.3, "row")
    drop = (y == 0).all((1, 2))
    assert torch.allclose(y, ((~drop).float() / 0.7)[:, None, None].expand_as(y))
    assert share_is(drop, 0.3)


def test_stochastic_depth_by_batch() -> None:  # P17
    torch.manual_seed(0)
    gates = torch.stack([stochastic_depth(torch.ones(8, 3), 0.3, "batch") for _ in range(4000)])
    assert (gates == gates[:, :1, :1]).all()
    assert share_is(gates[:, 0, 0] == 0, 0.3)


def test_stochastic_depth_as_in_the_paper() -> None:  # P17
    """Raw in training, times the survival probability in eval: the same on average."""
    torch.manual_seed(0)
    layer = StochasticDepth(0.3, mode="row", rescale="test")
    x = torch.full((100_000, 1), 2.0)
    y = layer(x)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    in_eval = layer.eval()(x)
    assert torch.allclose(in_eval, 0.7 * x)
    assert abs(y.mean() / in_eval.mean() - 1) < 0.01
    assert layer.eval_rule == "times the survival probability 1 - p"
    assert StochasticDepth(0.3).eval_rule == "identity"
    layer.forced = True
    assert set(layer(x).unique().tolist()) == {0.0, 2.0}
    layer.set_rate("p", 0.0)
    assert layer(x) is x


def test_dropout_refuses_bad_options() -> None:
    with pytest.raises(SurgeryError, match=r"rescale: expected 'train' or 'test', got 'never'"):
        Dropout(rescale="never")


@pytest.mark.parametrize(("option", "value"), [("mode", "column"), ("rescale", "never")])
def test_stochastic_depth_refuses_bad_options(option: str, value: str) -> None:
    with pytest.raises(SurgeryError, match=rf"{option}: expected .*, got '{value}'"):
        StochasticDepth(**{option: value})


def test_reprs() -> None:
    assert repr(Dropout(0.2)) == "Dropout(p=0.2)"
    assert repr(StochasticDepth(0.2)) == "StochasticDepth(p=0.2, mode='row', rescale='train')"
