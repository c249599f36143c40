"""DropBlock on signals and volumes: one and three axes, against loops, in each of the ways it is computed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers import _blocks, dropblock
from dropsurgery.regularizers._uniform import keyed_uniform
from dropsurgery.regularizers.dropblock import DropBlock, drop_block

SIZES = [((14,), 5), ((20,), 4), ((9,), 12), ((4, 5, 6), 3), ((3, 7, 4), 2), ((2, 6, 6), 4)]


@pytest.fixture(params=["sparse", "dense", "torch's operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make drop_block work by single blocks, by a byte mask, or as it does on other devices."""
    if request.param == "torch's operators":

        def elsewhere(x, p, key, block, share_channels, exact, counted):
            return dropblock._drop_block(x, p, key, block, share_channels, exact)

        monkeypatch.setattr(dropblock, "run", elsewhere)
    else:
        monkeypatch.setattr(_blocks.Draw, "is_sparse", lambda self: request.param == "sparse")
    return request.param


def dropped(p: float, k: int, shape: tuple[int, ...], **options: object) -> Tensor:
    return drop_block(torch.ones(shape), p, k, channel_axis=1, **options) == 0


def blocks_of(size: tuple[int, ...], k: int) -> tuple[int, ...]:
    return tuple(min(k, length) for length in size)


def probability(p: float, size: tuple[int, ...], block: tuple[int, ...]) -> float:
    """Equation 1, an axis at a time."""
    return p * math.prod(f / k / (f - k + 1) for f, k in zip(size, block, strict=True))


def covered(seeds: np.ndarray, block: tuple[int, ...]) -> np.ndarray:
    """How many blocks lie over each cell, by putting down one after the other."""
    counts = np.zeros([s + k - 1 for s, k in zip(seeds.shape, block, strict=True)], dtype=int)
    for start in np.argwhere(seeds):
        counts[tuple(slice(s, s + k) for s, k in zip(start, block, strict=True))] += 1
    return counts


def chances(p: float, size: tuple[int, ...], k: int) -> np.ndarray:
    """How likely each cell is dropped."""
    block = blocks_of(size, k)
    everywhere = np.ones([f - b + 1 for f, b in zip(size, block, strict=True)], dtype=bool)
    return 1 - (1 - probability(p, size, block)) ** covered(everywhere, block)


def seeded_anywhere(p: float, size: tuple[int, ...], k: int, maps: int) -> np.ndarray:
    """The wrong variant: a seed in any cell, and blocks that the border cuts off."""
    block = blocks_of(size, k)
    seeds = np.random.default_rng(0).random((maps, *size)) < probability(p, size, block)
    inside = tuple(slice(b // 2, b // 2 + f) for f, b in zip(size, block, strict=True))
    return np.stack([covered(each, block)[inside] > 0 for each in seeds])


def are_unions_of_blocks(drop: np.ndarray, block: tuple[int, ...]) -> bool:
    """Whether blocks that lie inside of the map and are dropped as a whole make up what is dropped, map by map."""
    for each in drop:
        windows = np.lib.stride_tricks.sliding_window_view(each, block)
        starts = windows.all(axis=tuple(range(each.ndim, windows.ndim)))
        if not np.array_equal(covered(starts, block) > 0, each):
            return False
    return True


def is_dropped_by_chances(drop: np.ndarray, expected: np.ndarray) -> bool:
    """Whether each cell is dropped as often as expected, within 4.5 standard errors."""
    return bool((abs(drop.mean(0) - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / len(drop))).all())


@pytest.mark.parametrize(("size", "k"), SIZES)
def test_the_reference_with_the_same_numbers(size: tuple[int, ...], k: int) -> None:
    block, key = blocks_of(size, k), torch.tensor(5)
    x = torch.randn(3, 2, *size)
    y = dropblock._drop_block(x, torch.tensor(0.3), key, list(block), False, False)
    region = [3, 2, *(f - b + 1 for f, b in zip(size, block, strict=True))]
    seeds = keyed_uniform(region, x.device, key).numpy() < np.float32(probability(0.3, size, block))
    kept = np.stack([[covered(each, block) == 0 for each in sample] for sample in seeds])
    assert not kept.all()
    np.testing.assert_allclose(y.numpy(), x.numpy() * kept * (kept.size / max(1, kept.sum())), rtol=1e-6)


@pytest.mark.parametrize(("size", "k"), SIZES)
def test_each_cell_is_dropped_as_often_as_its_seeds_say(way: str, size: tuple[int, ...], k: int) -> None:  # P4, P5
    torch.manual_seed(0)
    drop = dropped(0.2, k, (200, 50, *size)).flatten(0, 1).numpy()
    expected = chances(0.2, size, k)
    assert is_dropped_by_chances(drop, expected)
    assert DropBlock(0.2, k).expected_drop((1, 1, *size)) == pytest.approx(float(expected.mean()), abs=1e-12)
    assert float(expected.mean()) <= 0.2 + 1e-12


@pytest.mark.parametrize(("size", "k"), SIZES)
def test_what_is_dropped_is_a_union_of_blocks(way: str, size: tuple[int, ...], k: int) -> None:  # P5
    torch.manual_seed(k)
    drop = dropped(0.3, k, (30, 10, *size)).flatten(0, 1).numpy()
    assert are_unions_of_blocks(drop, blocks_of(size, k)) and drop.any() and not drop.all()


@pytest.mark.parametrize(("size", "k"), [((14,), 5), ((4, 5, 6), 3)])
def test_seeds_all_over_the_map_fail(size: tuple[int, ...], k: int) -> None:  # P4's and P5's negative control
    drop = seeded_anywhere(0.2, size, k, 2000)
    assert not is_dropped_by_chances(drop, chances(0.2, size, k))
    assert not are_unions_of_blocks(drop, blocks_of(size, k))


@pytest.mark.parametrize("size", [(7,), (3, 4, 5)])
def test_a_block_as_large_as_the_map_drops_channels(way: str, size: tuple[int, ...]) -> None:  # P3
    torch.manual_seed(0)
    drop = dropped(0.2, 9, (200, 50, *size)).flatten(2)
    assert (drop == drop[..., :1]).all()
    assert abs(drop.double().mean() - 0.2) <= 4 * math.sqrt(0.2 * 0.8 / 10_000)


@pytest.mark.parametrize("size", [(50,), (3, 4, 5)])
def test_k_1_drops_single_cells(way: str, size: tuple[int, ...]) -> None:  # P2
    torch.manual_seed(0)
    drop = dropped(0.2, 1, (100, 20, *size))
    assert abs(drop.double().mean() - 0.2) <= 4 * math.sqrt(0.2 * 0.8 / drop.numel())
    a, b = drop[..., 1:].double() - 0.2, drop[..., :-1].double() - 0.2
    assert abs((a * b).mean() / (0.2 * 0.8)) <= 4 / math.sqrt(a.numel())


def test_one_axis_is_two_of_which_one_has_a_single_cell() -> None:
    x, key = torch.randn(4, 6, 30), torch.tensor(2)
    flat = drop_block(x, 0.2, 5, channel_axis=1, key=key)
    assert torch.equal(flat, drop_block(x[:, :, None], 0.2, 5, key=key)[:, :, 0])
    assert torch.equal(flat, drop_block(x[:, :, None, None], 0.2, 5, key=key)[:, :, 0, 0])


@pytest.mark.parametrize("size", [(14,), (4, 5, 6)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_exact_gamma(p: float, size: tuple[int, ...]) -> None:
    layer = DropBlock(p, 3, gamma="exact")
    assert layer.expected_drop((1, 1, *size)) == pytest.approx(p, abs=1e-12)
    assert DropBlock(p, 3).expected_drop((1, 1, *size)) < p - 1e-3


@pytest.mark.parametrize(("size", "k"), SIZES)
def test_gradient_is_mask_times_scale(way: str, size: tuple[int, ...], k: int) -> None:  # P6, P8
    torch.manual_seed(0)
    x = (torch.rand(16, 5, *size) + 0.1).requires_grad_()
    y = drop_block(x, 0.3, k, channel_axis=1)
    (grad,) = torch.autograd.grad(y.sum(), x)
    scale = grad.max()
    assert float(scale) == pytest.approx(y.numel() / int((y != 0).sum()), rel=3e-7)
    assert torch.equal(grad, (y != 0) * scale) and torch.equal(y, x * grad)


def test_volumes_keep_their_layout_and_dtype(way: str) -> None:
    plain = torch.randn(2, 6, 3, 4, 5)
    for x in (plain, plain.to(memory_format=torch.channels_last_3d), plain.bfloat16(), plain.double()):
        y = drop_block(x, 0.3, 2, share_channels=True, key=torch.tensor(1))
        assert y.stride() == x.stride() and y.dtype == x.dtype
        assert torch.equal(y == 0, drop_block(plain, 0.3, 2, share_channels=True, key=torch.tensor(1)) == 0)
        assert (y == 0).any() and ((y == 0) == (y == 0)[:, :1]).all()


@pytest.mark.parametrize("shape", [(2, 14, 6), (2, 3, 4, 5, 6)])
def test_channels_at_the_end(shape: tuple[int, ...]) -> None:
    x, key = torch.randn(shape), torch.tensor(1)
    y = drop_block(x, 0.3, 2, channel_axis=-1, key=key)
    assert torch.equal(y, drop_block(x.movedim(-1, 1), 0.3, 2, channel_axis=1, key=key).movedim(1, -1))
    assert (y == 0).any() and y.stride() == x.stride()


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 6, 14), 1), ((2, 6, 4, 5, 6), 1), ((2, 4, 5, 6, 6), -1), ((2, 9, 14, 6), -1)]
)
def test_build_takes_maps_of_each_rank(shape: tuple[int, ...], axis: int) -> None:
    layer = DropBlock(0.3, 3)
    layer.build(channel_axis=axis, channels=6, shape=shape, site_id="a")
    assert layer(torch.ones(shape)).shape == shape
    size = shape[2:] if axis == 1 else shape[1:-1]
    assert layer.expected_drop(shape) == pytest.approx(float(chances(0.3, size, 3).mean()), abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 196, 6), -1), ((2, 6, 14), None), ((2, 6, 4, 5, 6), None), ((2, 6, 3, 4, 5, 6), 1)]
)
def test_build_refuses_what_has_no_neighbours(shape: tuple[int, ...], axis: int | None) -> None:  # P23
    with pytest.raises(SurgeryError, match=r"dropblock at a: expected maps .* no tokens, .* got .*; use dropout there"):
        DropBlock().build(channel_axis=axis, channels=6, shape=shape, site_id="a")


@pytest.mark.parametrize("exact", [False, True])
def test_compiles_with_sizes_and_rate_that_move(exact: bool) -> None:
    torch._dynamo.reset()
    gamma = "exact" if exact else "paper"

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(x: Tensor, p: Tensor, key: Tensor) -> Tensor:
        return drop_block(x, p, 2, gamma=gamma, key=key)

    for rate, size in ((0.1, (3, 4, 5)), (0.3, (4, 6, 5))):
        x = torch.randn(4, 3, *size, requires_grad=True)
        p, key = torch.tensor(rate), torch.tensor(3)
        y = run(x, p, key)
        assert torch.allclose(y, drop_block(x, p, 2, gamma=gamma, key=key))
        y.sum().backward()
        assert torch.equal(x.grad == 0, y == 0)


def test_the_way_of_other_devices_waits_for_none() -> None:
    for shape in ((2, 3, 14), (2, 3, 4, 5, 6), (0, 3, 4, 5, 6)):
        x = torch.empty(shape, device="meta", requires_grad=True)
        drop_block(x, torch.tensor(0.1, device="meta"), 3, gamma="exact", channel_axis=1).sum().backward()
        assert x.grad.shape == shape


def test_a_single_block_is_a_cube() -> None:
    torch.manual_seed(0)
    alone = [drop for drop in dropped(0.002, 3, (400, 10, 9, 8, 7)).flatten(0, 1) if int(drop.sum()) == 27]
    assert len(alone) > 50
    for drop in alone:
        cells = np.argwhere(drop.numpy())
        assert (cells.max(0) - cells.min(0) == 2).all()
