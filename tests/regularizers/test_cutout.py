"""Cutout against the authors' loop: where a hole may lie, what it covers, and that nothing else changes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dropsurgery import apply_recipe
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers import cutout as module
from dropsurgery.regularizers.cutout import Cutout, cutout

SIZES = [(32, 32, 16), (32, 32, 7), (5, 9, 4), (12, 20, 30), (1, 1, 2), (3, 2, 2)]


def hole(height: int, width: int, y: int, x: int, half: int) -> np.ndarray:
    """The authors' loop: rows and columns from centre - half to centre + half, cut off at the border; 0 in the hole."""
    mask = np.ones((height, width))
    for i, j in itertools.product(range(y - half, y + half), range(x - half, x + half)):
        if 0 <= i < height and 0 <= j < width:
            mask[i, j] = 0
    return mask


def all_holes(height: int, width: int, half: int) -> np.ndarray:
    """The masks of all centres, each as likely as the others."""
    return np.stack([hole(height, width, y, x, half) for y, x in itertools.product(range(height), range(width))])


def at_each_centre(monkeypatch: pytest.MonkeyPatch, height: int, width: int, length: int) -> Tensor:
    """What cutout does to ones when its random numbers name each centre once."""
    centres = torch.tensor(list(itertools.product(range(height), range(width))))
    numbers = (centres + 0.5) / torch.tensor([height, width])
    with_coin = torch.cat([torch.zeros(len(centres), 1), numbers], 1)
    monkeypatch.setattr(module, "uniform", lambda shape, device, key: with_coin)
    return cutout(torch.ones(len(centres), 2, height, width), 1.0, length)


@pytest.mark.parametrize(("height", "width", "length"), SIZES)
def test_each_centre_cuts_what_the_authors_cut(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int, length: int
) -> None:
    """P19: border rule, all channels alike, an odd length as the even one below it."""
    y = at_each_centre(monkeypatch, height, width, length)
    expected = torch.from_numpy(all_holes(height, width, length // 2)).float()
    assert torch.equal(y, expected[:, None].expand_as(y))


@pytest.mark.parametrize("half", [16, 7])
def test_other_holes_fail_the_same_check(monkeypatch: pytest.MonkeyPatch, half: int) -> None:
    """P19's negative control: 16, as in the authors' first commit, whose length was half a side; or one too few."""
    y = at_each_centre(monkeypatch, 32, 32, 16)[:, 0]
    assert not torch.equal(y, torch.from_numpy(all_holes(32, 32, half)).float())


@pytest.mark.parametrize("length", [2, 7, 16])
def test_a_hole_in_the_middle_is_whole(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """P19: (2 * (length // 2))^2 pixels."""
    y = at_each_centre(monkeypatch, 32, 32, length)[:, 0].view(32, 32, 32, 32)
    assert (y[16, 16] == 0).sum() == (2 * (length // 2)) ** 2
    assert (y[0, 0] == 0).sum() == (length // 2) ** 2


@pytest.mark.parametrize(("height", "width", "length"), SIZES)
@pytest.mark.parametrize("n_holes", [1, 3])
def test_expected_share_is_the_enumerated_one(height: int, width: int, length: int, n_holes: int) -> None:
    """P19: by brute force over all centres; holes are drawn apart, and overlap."""
    spared = all_holes(height, width, length // 2).mean(0) ** n_holes
    layer = Cutout(0.4, length, n_holes)
    assert layer.expected_drop((2, 3, height, width)) == pytest.approx(0.4 * (1 - spared.mean()), abs=1e-12)
    layer.channel_axis = -1
    assert layer.expected_drop((2, height, width, 3)) == pytest.approx(0.4 * (1 - spared.mean()), abs=1e-12)


def shares(y: Tensor) -> tuple[float, float]:
    """Mean share of zeros over the images, and its standard error with images as the independent draws."""
    each = (y == 0).double().mean((1, 2, 3))
    return float(each.mean()), float(each.std()) / math.sqrt(len(each))


@pytest.mark.parametrize(("p", "n_holes"), [(1.0, 1), (0.3, 1), (1.0, 2)])
def test_realised_share_is_the_enumerated_one(p: float, n_holes: int) -> None:
    """P19: 32x32, length 16, within 4 standard errors, and 1 % where no coin adds to them."""
    torch.manual_seed(0)
    mean, error = shares(cutout(torch.ones(40_000, 1, 32, 32), p, 16, n_holes))
    expected = Cutout(p, 16, n_holes).expected_drop((1, 1, 32, 32))
    assert abs(mean - expected) <= 4 * error
    assert p < 1 or abs(mean / expected - 1) <= 0.01


def test_holes_kept_inside_the_image_fail_the_share() -> None:
    """P19's negative control: a hole that is never cut off blanks a quarter of each image."""
    inside = (16 / 32) ** 2
    assert abs(inside / Cutout(1.0, 16).expected_drop((1, 1, 32, 32)) - 1) > 0.01


def test_each_pixel_is_cut_as_often_as_its_centres_say() -> None:
    torch.manual_seed(0)
    images = 40_000
    often = 1 - all_holes(9, 14, 3).mean(0)
    seen = (cutout(torch.ones(images, 1, 9, 14), 1.0, 6) == 0).double().mean((0, 1)).numpy()
    z = (seen - often) / np.sqrt(often * (1 - often) / images)
    assert np.abs(z).max() <= 5
    assert np.abs((seen - often.mean()) / np.sqrt(often * (1 - often) / images)).max() > 5  # were all alike


def test_p_is_the_share_of_images() -> None:
    torch.manual_seed(0)
    p, images = 0.3, 20_000
    cut = (cutout(torch.ones(images, 2, 8, 8), p, 4) == 0).any(3).any(2)
    assert torch.equal(cut[:, 0], cut[:, 1])
    assert abs(cut[:, 0].double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_kept_is_not_rescaled(dtype: torch.dtype) -> None:
    """P19: kept pixels are the very pixels, the gradient is the mask; rescaled ones fail."""
    torch.manual_seed(0)
    x = torch.randn(50, 3, 20, 30).to(dtype).requires_grad_()
    y = cutout(x, 1.0, 10)
    y.sum().backward()
    mask = y != 0
    assert torch.equal(y, torch.where(mask, x, 0)) and torch.equal(x.grad, mask.to(dtype))
    assert not torch.equal(y * mask.numel() / mask.sum(), torch.where(mask, x, 0))
    assert not torch.equal(mask[0], mask[1])


def test_channels_last_axis() -> None:
    x = torch.randn(6, 3, 8, 10)
    layer = Cutout(1.0, 4, 2)
    layer.build(channel_axis=-1, channels=3, shape=(6, 8, 10, 3), site_id="a")
    torch.manual_seed(0)
    expected = cutout(x, 1.0, 4, 2)
    torch.manual_seed(0)
    assert torch.equal(layer(x.movedim(1, -1)).movedim(-1, 1), expected)


def test_refusals() -> None:
    for name, value in (("length", 1), ("length", True), ("length", 2.5), ("n_holes", 0)):
        with pytest.raises(SurgeryError, match=rf"{name}: expected an integer of \d or more, got {value}"):
            Cutout(**{name: value})
        with pytest.raises(SurgeryError, match=rf"{name}: expected an integer"):
            cutout(torch.ones(1, 1, 4, 4), **{name: value})
    with pytest.raises(SurgeryError, match="expected 4 dimensions"):
        cutout(torch.ones(2, 3, 4))
    with pytest.raises(
        SurgeryError, match=r"cutout at a: expected images .*, got .*\(2, 196, 64\).*; use input_dropout"
    ):
        Cutout().build(channel_axis=-1, channels=64, shape=(2, 196, 64), site_id="a")
    with pytest.raises(SurgeryError, match=r"cutout at a: expected a length below 64, .* 20x32 .*, got 64"):
        Cutout(length=64).build(channel_axis=1, channels=3, shape=(2, 3, 20, 32), site_id="a")
    Cutout(length=63).build(channel_axis=1, channels=3, shape=(2, 3, 20, 32), site_id="a")


def test_repr() -> None:
    assert repr(Cutout()) == "Cutout(p=1, length=16, n_holes=1)"


def test_recipe_cuts_the_input_of_the_net_in_training_alone() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    x = torch.ones(8, 3, 32, 32)
    gm = apply_recipe(net, "cutout", example_inputs=x, seed=1)
    (layer,) = gm.surgery.regularizers.values()
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, y: seen.append(y))
    gm.train()(x)
    mean = float((seen[0] == 0).double().mean())
    assert 0.05 < mean < 0.25 and torch.equal(gm.eval()(x), net(x))
