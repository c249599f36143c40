"""Input dropout and grid dropout: what goes together, how often, and the scale."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers.grid_dropout import GridDropout, grid_dropout
from dropsurgery.regularizers.input_dropout import InputDropout, input_dropout


def share_is(drop: Tensor, p: float) -> bool:
    """Whether independent draws were dropped with probability p, within 4 standard errors."""
    return bool(abs(drop.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / drop.numel()))


def independent(a: Tensor, b: Tensor, p: float) -> bool:
    """Whether two sets of draws with probability p are uncorrelated, within 4 standard errors."""
    rho = ((a.double() - p) * (b.double() - p)).mean() / (p * (1 - p))
    return bool(abs(rho) <= 4 / math.sqrt(a.numel()))


# ---- input dropout ----


@pytest.mark.parametrize("shape", [(20, 3, 60, 60), (64, 10, 80), (600, 70), (40_000,)])
def test_input_dropout_by_elements(shape: tuple[int, ...]) -> None:
    """0.3 is what is dropped, not what is kept (the negative control), and what is kept is divided by 0.7."""
    torch.manual_seed(0)
    x = (torch.rand(shape) + 0.1).requires_grad_()
    y = input_dropout(x, 0.3)
    drop = y == 0
    assert share_is(drop, 0.3) and not share_is(drop, 0.7)
    assert torch.allclose(y, torch.where(drop, 0, x / 0.7), rtol=1e-5)
    assert not torch.allclose(y, torch.where(drop, 0, x), rtol=1e-5)
    y.sum().backward()
    assert torch.allclose(x.grad, torch.where(drop, 0, 1 / 0.7), rtol=1e-5)
    if len(shape) == 4:
        assert independent(drop[:, 0], drop[:, 1], 0.3)


@pytest.mark.parametrize("axis", [1, -1])
def test_input_dropout_by_pixels(axis: int) -> None:
    """All channels of a pixel at once, pixels and images apart; by elements the channels differ."""
    torch.manual_seed(0)
    shape = (20, 3, 50, 60) if axis == 1 else (20, 50, 60, 3)
    layer = InputDropout(0.3, "pixel")
    layer.build(channel_axis=axis, channels=3, shape=shape, site_id="a")
    y = layer(torch.ones(shape)).movedim(axis, 1)
    drop = y[:, 0] == 0
    assert torch.equal(y == 0, drop[:, None].expand_as(y)) and share_is(drop, 0.3)
    assert torch.allclose(y, (~drop).float()[:, None].expand_as(y) / 0.7, rtol=1e-5)
    assert independent(drop[:, 1:], drop[:, :-1], 0.3) and independent(drop[1:], drop[:-1], 0.3)
    layer.unit = "element"
    y = layer(torch.ones(shape)).movedim(axis, 1)
    assert not torch.equal(y[:, 0] == 0, y[:, 1] == 0)


def test_input_dropout_drops_all_at_1() -> None:
    for unit in ("element", "pixel"):
        x = torch.randn(2, 3, 4, 5, requires_grad=True)
        y = input_dropout(x, 1.0, unit)
        y.sum().backward()
        assert not y.any() and not x.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", ["element", "pixel"])
def test_input_dropout_in_low_precision(unit: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    y = input_dropout(torch.ones(4, 1, 1000, 1000, dtype=dtype), 0.000826, unit)
    assert y.dtype == dtype and share_is(y == 0, 0.000826)


def test_input_dropout_refuses() -> None:
    with pytest.raises(SurgeryError, match="unit: expected 'element' or 'pixel', got 'row'"):
        InputDropout(unit="row")
    with pytest.raises(SurgeryError, match=r"by pixels: expected 4 dimensions, got \(2, 3, 4\)"):
        input_dropout(torch.ones(2, 3, 4), 0.3, "pixel")
    for shape, axis in (((2, 196, 64), -1), ((2, 3, 8, 8), None)):
        with pytest.raises(SurgeryError, match=r"input_dropout at a: expected images .*; use `unit: element` there"):
            InputDropout(unit="pixel").build(channel_axis=axis, channels=3, shape=shape, site_id="a")
        InputDropout().build(channel_axis=axis, channels=3, shape=shape, site_id="a")


def test_input_dropout_as_for_dental_images() -> None:
    assert repr(InputDropout()) == "InputDropout(p=0.3, unit='element')"
    assert InputDropout().expected_drop((1, 3, 8, 8)) == 0.3


# ---- grid dropout ----


def spread(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each pixel takes its value from the cell that it lies in."""
    cells = grid.shape[1]
    image = np.zeros((len(grid), height, width), dtype=bool)
    for i in range(height):
        for j in range(width):
            image[:, i, j] = grid[:, math.floor(i * cells / height), math.floor(j * cells / width)]
    return image


@pytest.mark.parametrize(("grid", "size"), [(8, (32, 32)), (3, (14, 20)), (8, (9, 9)), (1, (4, 5)), (5, (5, 23))])
@pytest.mark.parametrize("axis", [1, -1])
def test_cells_are_blacked_out_whole(grid: int, size: tuple[int, int], axis: int) -> None:
    """Each pixel of all channels follows its cell, and `last_grid` says which; shifted cells fail (the control)."""
    torch.manual_seed(0)
    layer = GridDropout(0.3, grid)
    shape = (30, 3, *size) if axis == 1 else (30, *size, 3)
    layer.build(channel_axis=axis, channels=3, shape=shape, site_id="a")
    x = torch.rand(shape) + 0.1
    y = layer(x)
    black = torch.from_numpy(spread(layer.last_grid.numpy(), *size)).unsqueeze(axis).expand_as(x)
    assert torch.equal(y, torch.where(black, 0, x))
    assert grid == 1 or not torch.equal(y, torch.where(black.roll(1, -2 if axis == 1 else 1), 0, x))


def test_cells_go_with_probability_p_each_by_itself() -> None:
    torch.manual_seed(0)
    y, black = grid_dropout(torch.ones(2000, 2, 16, 16), 0.1)
    assert black.shape == (2000, 8, 8) and black.dtype == torch.bool
    assert share_is(black, 0.1) and not share_is(black, 0.12)
    assert independent(black[:, 1:], black[:, :-1], 0.1) and independent(black[1:], black[:-1], 0.1)
    assert independent(black[..., 1:], black[..., :-1], 0.1)
    assert (y == 0).double().mean() == black.double().mean()
    assert set(y.unique().tolist()) == {0.0, 1.0}  # not rescaled


def test_gradient_is_the_mask() -> None:
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    y, _ = grid_dropout(x, 0.4)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0).float()) and 0 < x.grad.mean() < 1


def test_no_old_grid_is_left() -> None:
    """A head that learns to predict the cells must not be shown those of an earlier forward."""
    layer, x = GridDropout(0.3), torch.ones(2, 3, 16, 16)
    assert layer.last_grid is None
    layer(x)
    first = layer.last_grid
    layer(x)
    assert not torch.equal(first, layer.last_grid)
    layer.eval()(x)
    assert layer.last_grid is None
    layer.train()(x)
    layer.set_rate("p", 0.0)
    layer(x)
    assert layer.last_grid is None


def test_compiled_layer_shows_its_grid() -> None:
    layer = GridDropout(0.4, 3)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        y = run(torch.ones(4, 1, 9, 9))
        assert torch.equal((y == 0)[:, 0, ::3, ::3], layer.last_grid)


def test_grid_dropout_refuses() -> None:
    for bad in (0, True, 2.5):
        with pytest.raises(SurgeryError, match=rf"grid: expected an integer of 1 or more, got {bad}"):
            GridDropout(grid=bad)
    with pytest.raises(SurgeryError, match="expected 4 dimensions"):
        grid_dropout(torch.ones(2, 3, 4), 0.3)
    with pytest.raises(SurgeryError, match=r"grid_dropout at a: expected images .*\(2, 196, 64\).*; use input_dropout"):
        GridDropout().build(channel_axis=-1, channels=64, shape=(2, 196, 64), site_id="a")
    with pytest.raises(SurgeryError, match=r"grid_dropout at a: expected a grid of 7 or less .*, got 8"):
        GridDropout().build(channel_axis=1, channels=3, shape=(2, 3, 7, 20), site_id="a")


def test_grid_dropout_repr() -> None:
    assert repr(GridDropout()) == "GridDropout(p=0.1, grid=8)"
