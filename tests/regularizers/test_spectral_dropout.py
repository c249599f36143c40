"""Spectral dropout against SciPy's cosine transform: which coefficients go, and what becomes of the rest."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers import spectral_dropout as module
from dropsurgery.regularizers.spectral_dropout import SpectralDropout, spectral_dropout

SIZES = [(14, 14), (7, 7), (5, 9), (1, 6), (1, 1)]


@pytest.fixture(params=["on the CPU", "torch's operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the threshold be found as on the CPU, or as on other devices."""
    if request.param == "torch's operators":

        def elsewhere(values: Tensor, n: Tensor) -> Tensor:
            return values.sort(dim=2).values.gather(2, n.expand(*values.shape[:2], 1))

        monkeypatch.setattr(module, "nth_smallest", elsewhere)


def transform(x: Tensor) -> np.ndarray:
    return dctn(x.detach().double().numpy(), type=2, norm="ortho", axes=(2, 3))


def without_weakest(spectrum: np.ndarray, share: float) -> np.ndarray:
    """Each map's coefficients, floor(share * n) of the smallest magnitudes set to 0."""
    left = spectrum.copy()
    for maps in left:
        for each in maps:
            order = np.argsort(np.abs(each), axis=None, kind="stable")
            each.flat[order[: math.floor(share * each.size + 1e-9)]] = 0
    return left


@pytest.mark.parametrize("size", [1, 2, 7, 14, 56, 224])
def test_the_transform_is_orthogonal(size: int) -> None:
    """To 1e-12 in float64; its rows are SciPy's DCT-II."""
    matrix = module._cosines(size, torch.empty(0, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.mT, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert np.allclose(matrix.numpy(), dctn(np.eye(size), type=2, norm="ortho", axes=(0,)), rtol=0, atol=1e-12)
    rounded = module._cosines(size, torch.empty(0))
    assert torch.allclose(rounded.double(), matrix, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_with_nothing_dropped_the_map_comes_back(way: None, size: tuple[int, int]) -> None:
    """To 1e-5, also of what low precision holds; a transform in autocast's precision would not do."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, *size)
    assert torch.allclose(spectral_dropout(x, 0.0, 0.0), x, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(spectral_dropout(x, 0.0, 0.0), x, atol=1e-5)
        rows = module._cosines(14, x)
        assert not torch.allclose((rows.mT @ (rows @ torch.ones(14, 14))).float(), torch.ones(14, 14), atol=1e-5)
    assert torch.allclose(spectral_dropout(x.half(), 0.0, 0.0), x.half(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.25, 0.3, 0.5, 0.9])
def test_the_weakest_coefficients_are_removed(way: None, size: tuple[int, int], share: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, *size, dtype=torch.float64)
    y = spectral_dropout(x, 0.0, share)
    expected = without_weakest(transform(x), share)
    assert np.allclose(transform(y), expected, rtol=0, atol=1e-12)
    assert np.allclose(y.numpy(), idctn(expected, type=2, norm="ortho", axes=(2, 3)), rtol=0, atol=1e-12)
    assert (y.square().sum((2, 3)) <= x.square().sum((2, 3)) + 1e-9).all()  # p = 0: no energy is added


def test_other_rules_fail_the_same_check() -> None:
    """The negative controls: a threshold on the signed coefficient, and on the whole batch."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 14, 14, dtype=torch.float64)
    spectrum, left = transform(x), transform(spectral_dropout(x, 0.0, 0.5))
    signed = np.where(spectrum >= np.median(spectrum, (2, 3), keepdims=True), spectrum, 0)
    over_all = np.where(np.abs(spectrum) >= np.median(np.abs(spectrum)), spectrum, 0)
    assert not np.allclose(left, signed, atol=1e-3) and not np.allclose(left, over_all, atol=1e-3)


def test_strong_coefficients_are_dropped_at_random(way: None) -> None:
    """With probability p, each by itself, those kept divided by 1 - p; the weak are gone all the same."""
    torch.manual_seed(0)
    p = 0.3
    x = torch.randn(64, 20, 14, 14, dtype=torch.float64)
    strong = without_weakest(transform(x), 0.5)
    left = transform(spectral_dropout(x, p, 0.5))
    kept = np.abs(left) > 1e-9
    assert not kept[strong == 0].any()
    drop = ~kept[strong != 0]
    assert abs(drop.mean() - p) <= 4 * math.sqrt(p * (1 - p) / drop.size)
    assert abs(kept[strong == 0].mean() - (1 - p)) > 0.1  # not the other way round
    assert np.allclose(left[kept], strong[kept] / (1 - p), atol=1e-9)
    share = 1 - kept.mean()
    assert abs(share - SpectralDropout(p, 0.5).expected_drop(tuple(x.shape))) <= 4 * math.sqrt(0.25 / kept.size)


@pytest.mark.parametrize(("p", "p_weak"), [(1.0, 0.5), (0.3, 1.0), (1.0, 1.0)])
def test_all_dropped_is_zeros(way: None, p: float, p_weak: float) -> None:
    x = torch.randn(2, 3, 5, 6, requires_grad=True)
    y = spectral_dropout(x, p, p_weak)
    y.sum().backward()
    assert not y.any() and not x.grad.any()


def test_maps_of_equal_or_no_coefficients() -> None:
    """Where all are equally weak all are left: a share of them cannot be told from the others."""
    assert not spectral_dropout(torch.zeros(2, 3, 4, 4), 0.2, 0.5).any()
    one = torch.zeros(1, 1, 4, 4)
    one[0, 0, 1, 2] = 1
    x = torch.from_numpy(idctn(one.numpy(), type=2, norm="ortho", axes=(2, 3)))
    assert torch.allclose(spectral_dropout(x, 0.0, 0.9), x, atol=1e-6)


def test_gradient_is_the_same_map_of_the_gradient() -> None:
    """The map is its own adjoint for the mask that was drawn: <w, T x> = <T w, x>."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    torch.manual_seed(1)
    y = spectral_dropout(x, 0.3, 0.5)
    kept = np.abs(transform(y)) > 1e-9
    (y * w).sum().backward()
    expected = idctn(transform(w) * kept / 0.7, type=2, norm="ortho", axes=(2, 3))
    assert np.allclose(x.grad.numpy(), expected, atol=1e-6)  # 0.7 in float32
    key = torch.tensor(3)
    assert torch.autograd.gradgradcheck(lambda x: spectral_dropout(x, 0.3, 0.0, key=key).square(), x)


def test_a_map_does_not_hang_on_the_others() -> None:
    torch.manual_seed(0)
    x, key = torch.randn(2, 3, 6, 6), torch.tensor(3)
    other = torch.cat([x[:1], 100 * torch.randn(1, 3, 6, 6)])
    other[0, 2] = 0
    y, z = spectral_dropout(x, 0.3, 0.5, key=key), spectral_dropout(other, 0.3, 0.5, key=key)
    assert torch.allclose(y[0, :2], z[0, :2], atol=1e-6)


def test_channels_at_the_end() -> None:
    x = torch.randn(3, 4, 6, 7)
    layer = SpectralDropout(0.3, 0.5)
    layer.build(channel_axis=-1, channels=4, shape=(3, 6, 7, 4), site_id="a")
    torch.manual_seed(0)
    expected = spectral_dropout(x, 0.3, 0.5)
    torch.manual_seed(0)
    assert torch.equal(layer(x.movedim(1, -1)).movedim(-1, 1), expected)


def test_refusals_and_repr() -> None:
    with pytest.raises(SurgeryError, match="input of spectral_dropout: expected 4 dimensions"):
        spectral_dropout(torch.ones(2, 3, 4), 0.2, 0.5)
    with pytest.raises(SurgeryError, match=r"spectral_dropout at a: expected maps .*\(2, 196, 64\).*; use dropout"):
        SpectralDropout().build(channel_axis=-1, channels=64, shape=(2, 196, 64), site_id="a")
    assert repr(SpectralDropout()) == "SpectralDropout(p=0.2, p_weak=0.5)"


def test_either_rate_alone_is_enough() -> None:
    x = torch.randn(2, 3, 8, 8)
    for p, p_weak in ((0.3, 0.0), (0.0, 0.5)):
        assert not torch.allclose(SpectralDropout(p, p_weak)(x), x, atol=1e-3)
    assert SpectralDropout(0.0, 0.0)(x) is x
