"""DropBlock against its closed form, brute force and the peers; in each of the ways it is computed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from timm.layers.drop import drop_block_2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dropsurgery.catalogue import load
from dropsurgery.context import Context
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers import _blocks, dropblock
from dropsurgery.regularizers._coverage import expected_share, seed_probability
from dropsurgery.regularizers.dropblock import DropBlock, drop_block

# (H = W, k, p) → expected drop share, from the closed form worked out apart from this code.
TABLE = [
    (7, 7, 0.10, 0.10000),
    (14, 7, 0.10, 0.09294),
    (14, 7, 0.025, 0.02454),
    (28, 7, 0.10, 0.09394),
    (28, 7, 0.025, 0.02461),
    (56, 7, 0.10, 0.09462),
    (14, 3, 0.10, 0.09508),
    (14, 13, 0.10, 0.09616),
    (21, 11, 0.10, 0.09249),
    (14, 7, 0.25, 0.2095),
    (14, 7, 0.5, 0.3582),
    (14, 7, 0.9, 0.5190),
]


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
    return drop_block(torch.ones(shape), p, k, **options) == 0


def shares_and_error(mask: Tensor) -> tuple[float, float]:
    """Mean share over the maps, and its standard error with maps as the independent draws."""
    shares = mask.double().mean((2, 3)).flatten()
    return float(shares.mean()), float(shares.std()) / math.sqrt(len(shares))


def coverage(height: int, width: int, kh: int, kw: int) -> np.ndarray:
    """How many valid seeds cover each cell, by trying them all."""
    counts = np.zeros((height, width))
    for i, j in itertools.product(range(height - kh + 1), range(width - kw + 1)):
        counts[i : i + kh, j : j + kw] += 1
    return counts


def brute_force(p: float, k: int, size: tuple[int, int], maps: int, seed: int) -> np.ndarray:
    """Algorithm 1 in loops: what is dropped in `maps` maps."""
    height, width = size
    kh, kw = min(k, height), min(k, width)
    gamma = p * height * width / (kh * kw) / ((height - kh + 1) * (width - kw + 1))
    random = np.random.default_rng(seed)
    drop = np.zeros((maps, height, width), dtype=bool)
    for each in drop:
        for i, j in np.argwhere(random.random((height - kh + 1, width - kw + 1)) < gamma):
            each[i : i + kh, j : j + kw] = True
    return drop


def test_k_1_drops_single_cells(way: str) -> None:  # P2
    torch.manual_seed(0)
    p, shape = 0.1, (16, 64, 32, 32)
    x = torch.randn(shape).abs() + 0.1
    y = drop_block(x, p, 1)
    drop = y == 0
    n = drop.numel()
    assert abs(drop.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / n)
    scale = n / (n - int(drop.sum()))
    assert abs(scale * (1 - p) - 1) <= 4 * math.sqrt(p / ((1 - p) * n))
    assert torch.allclose(y, torch.where(drop, 0, x * scale), rtol=1e-6)
    centred = drop.double() - p
    for a, b in ((centred[..., 1:], centred[..., :-1]), (centred[:, :, 1:], centred[:, :, :-1])):
        assert abs((a * b).mean() / (p * (1 - p))) <= 4 / math.sqrt(a.numel())


@pytest.mark.parametrize("size", [(7, 7), (5, 9), (6, 3)])
def test_a_block_as_large_as_the_map_drops_whole_channels(way: str, size: tuple[int, int]) -> None:  # P3
    torch.manual_seed(0)
    p, maps = 0.1, (100, 100)
    share = dropped(p, 9, (*maps, *size)).double().mean((2, 3))
    assert ((share == 0) | (share == 1)).all()
    assert abs(share.mean() - p) <= 4 * math.sqrt(p * (1 - p) / math.prod(maps))


@pytest.mark.parametrize(("length", "k", "p", "expected"), TABLE)
def test_realised_drop_is_the_closed_form(length: int, k: int, p: float, expected: float) -> None:  # P4
    torch.manual_seed(0)
    layer = DropBlock(p, k)
    assert layer.expected_drop((1, 1, length, length)) == pytest.approx(expected, abs=6e-6 if expected < 0.2 else 6e-5)
    maps = 102_400 if length <= 14 else 12_800
    mean, error = shares_and_error(dropped(p, k, (256, maps // 256, length, length)))
    assert abs(mean - layer.expected_drop((1, 1, length, length))) <= 4 * error
    assert mean <= p + 4 * error


def test_realised_drop_of_each_way(way: str) -> None:  # P4, for the ways that the size alone does not choose
    torch.manual_seed(0)
    mean, error = shares_and_error(dropped(0.1, 7, (256, 100, 14, 14)))
    assert abs(mean - 0.09294) <= 4 * error


@pytest.mark.parametrize(("length", "wrong"), [(14, 0.199), (7, 0.94)])
def test_timm_fails_the_closed_form(length: int, wrong: float) -> None:  # P4's negative control
    torch.manual_seed(0)
    mean, error = shares_and_error(drop_block_2d(torch.ones(2000, 8, length, length), 0.1, 7) == 0)
    assert abs(mean - wrong) < 0.02
    assert abs(mean - DropBlock(0.1, 7).expected_drop((1, 1, length, length))) > 4 * error


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (12, 20), (5, 9)])
@pytest.mark.parametrize("k", range(2, 8))
def test_what_is_dropped_is_a_union_of_blocks(way: str, k: int, size: tuple[int, int]) -> None:  # P5
    torch.manual_seed(k)
    drop = dropped(0.3, k, (20, 30, *size)).float()
    block = min(k, size[0]), min(k, size[1])
    starts = 1 - nn.functional.max_pool2d(1 - drop, block, 1)  # an all-dropped block begins here
    padded = nn.functional.pad(starts, (block[1] - 1,) * 2 + (block[0] - 1,) * 2)
    assert torch.equal(nn.functional.max_pool2d(padded, block, 1), drop)
    assert drop.any() and not drop.all()


@pytest.mark.parametrize(("k", "size"), [(7, (14, 14)), (4, (5, 9)), (6, (12, 20)), (9, (5, 9))])
def test_each_cell_is_dropped_as_often_as_its_seeds_say(way: str, k: int, size: tuple[int, int]) -> None:  # P5
    torch.manual_seed(0)
    p, maps = 0.1, (400, 50)
    (h, w), (kh, kw) = size, (min(k, size[0]), min(k, size[1]))
    gamma = p * h * w / (kh * kw) / ((h - kh + 1) * (w - kw + 1))
    expected = torch.from_numpy(1 - (1 - gamma) ** coverage(h, w, kh, kw))
    seen = dropped(p, k, (*maps, *size)).double().mean((0, 1))
    assert ((seen - expected).abs() <= 4.5 * (expected * (1 - expected) / math.prod(maps)).sqrt()).all()
    assert DropBlock(p, k).expected_drop((1, 1, *size)) == pytest.approx(float(expected.mean()), abs=1e-12)


@pytest.mark.parametrize(("p", "k", "size"), [(0.1, 7, (14, 14)), (0.4, 2, (5, 9)), (0.3, 6, (5, 9))])
def test_drops_like_brute_force(way: str, p: float, k: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    maps = 20_000
    ours = dropped(p, k, (200, 100, *size)).double().mean((2, 3)).flatten().numpy()
    theirs = brute_force(p, k, size, maps, seed=1).mean((1, 2))
    for moment in (lambda s: s, lambda s: s == 0, lambda s: (s - theirs.mean()) ** 2, lambda s: s > 2 * p):
        a, b = moment(ours).astype(float), moment(theirs).astype(float)
        assert abs(a.mean() - b.mean()) <= 4 * math.sqrt((a.var() + b.var()) / maps)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("shape", [(64, 8, 14, 14), (32, 16, 7, 7), (2, 2, 196, 196)])
def test_mean_is_kept(way: str, dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:  # P6
    torch.manual_seed(0)
    assert math.prod(shape) > 65_504 or shape[2] < 14
    y = drop_block(torch.ones(shape, dtype=dtype), 0.1, 7)
    assert y.dtype == dtype
    assert abs(y.double().mean() - 1) <= tolerance


@pytest.mark.parametrize("k", [1, 3, 9])
def test_zeros_where_everything_is_dropped(k: int) -> None:  # P6
    x = torch.randn(4, 3, 7, 7, requires_grad=True)
    y = drop_block(x, 1.0, k, gamma="exact")
    y.sum().backward()
    assert not y.any() and not x.grad.any()


def test_channels_and_samples_are_independent(way: str) -> None:  # P7
    torch.manual_seed(0)
    drop = dropped(0.1, 7, (20_000, 3, 7, 7))[..., 0, 0].double()
    pairs = [(drop[:, 0], drop[:, 1]), (drop[:, 1], drop[:, 2]), (drop[:-1, 0], drop[1:, 0])]
    for a, b in pairs:
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) <= 4 / math.sqrt(len(a))


def test_shared_channels(way: str) -> None:  # P7
    torch.manual_seed(0)
    drop = dropped(0.1, 3, (2000, 4, 9, 14), share_channels=True)
    assert (drop == drop[:, :1]).all()
    assert not (drop == drop[:1]).all()
    mean, error = shares_and_error(drop[:, :1])
    assert abs(mean - DropBlock(0.1, 3).expected_drop((1, 1, 9, 14))) <= 4 * error


@pytest.mark.parametrize("options", [{}, {"share_channels": True}, {"gamma": "exact"}], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("k", [3, 14])
def test_gradient_is_mask_times_scale(way: str, k: int, channels_last: bool, options: dict) -> None:  # P8
    torch.manual_seed(0)
    x = torch.randn(8, 5, 14, 14).abs() + 0.1
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    y = drop_block(x, 0.2, k, **options)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    mask = (y != 0).float()
    scale = grad.max()
    assert float(scale) == pytest.approx(mask.numel() / int(mask.sum()), rel=3e-7)
    assert torch.equal(grad, mask * scale) and torch.equal(y, x * mask * scale)
    assert grad.stride() == x.stride()


def test_gradient_of_the_gradient() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64).add_(0.1).requires_grad_()
    y = drop_block(x, 0.2, 3)
    (grad,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    scale = (y / x).detach()
    assert torch.allclose(second, 6 * scale**3 * x.detach())


def test_keeps_little_for_backward() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t.detach(), lambda t: t):
        x = torch.randn(8, 16, 14, 14, requires_grad=True)
        drop_block(x, 0.1, 7)
    assert kept and sum(kept) <= 0.05 * x.numel()  # bytes


@pytest.mark.parametrize("size", [(7, 7), (5, 9)])
@pytest.mark.parametrize("k", range(1, 17))
@pytest.mark.parametrize("clamp", ["dimension", "square"])
def test_every_block_size_runs(way: str, k: int, size: tuple[int, int], clamp: str) -> None:  # P9
    torch.manual_seed(k)
    y = drop_block(torch.ones(8, 4, *size), 0.3, k, clamp=clamp)
    assert y.shape == (8, 4, *size)
    assert y.isfinite().all() and (y == 0).any()


def test_square_clamp_is_torchvisions() -> None:
    assert DropBlock(0.1, 9, clamp="square").expected_drop((1, 1, 5, 9)) == pytest.approx(
        DropBlock(0.1, 5).expected_drop((1, 1, 5, 9))
    )
    assert DropBlock(0.1, 9).expected_drop((1, 1, 5, 9)) == pytest.approx(0.1)


@pytest.mark.parametrize(("p", "gamma"), [(0.1, 0.006764), (0.5, 0.05264), (0.9, 0.2783)])
def test_exact_gamma(way: str, p: float, gamma: float) -> None:
    torch.manual_seed(0)
    found = dropblock.exact_probability(torch.tensor(p, dtype=torch.float64), (14, 14), [7, 7])
    assert float(found) == pytest.approx(gamma, rel=1e-3)
    assert DropBlock(p, 7, gamma="exact").expected_drop((1, 1, 14, 14)) == pytest.approx(p, abs=1e-12)
    if p < 0.9:  # where even one block after another would be called for by nobody
        mean, error = shares_and_error(dropped(p, 7, (256, 50, 14, 14), gamma="exact"))
        assert abs(mean - p) <= 4 * error


def test_commutes_with_relu(way: str) -> None:  # P13
    x = torch.randn(8, 16, 14, 14)
    torch.manual_seed(0)
    before = drop_block(x.relu(), 0.1, 7)
    torch.manual_seed(0)
    assert torch.equal(before, drop_block(x, 0.1, 7).relu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_gamma_in_low_precision(way: str, dtype: torch.dtype) -> None:  # P15
    torch.manual_seed(0)
    gamma, n = 0.000826, 4_000_000
    drop = drop_block(torch.ones(40, 100, 10, 100, dtype=dtype), gamma, 1) == 0
    bound = 4 * math.sqrt(gamma * (1 - gamma) / n)
    assert abs(drop.double().mean() - gamma) <= bound


def test_numbers_drawn_in_bfloat16_fail() -> None:  # P15's negative control
    torch.manual_seed(0)
    gamma, n = 0.000826, 4_000_000
    share = (torch.rand(n, dtype=torch.bfloat16) < gamma).double().mean()
    assert abs(share - gamma) > 4 * math.sqrt(gamma * (1 - gamma) / n)


def test_channels_at_the_end() -> None:
    torch.manual_seed(0)
    layer = DropBlock(0.3, 3)
    layer.build(channel_axis=-1, channels=6, shape=(8, 12, 9, 6), site_id="layer3.0:conv.output")
    x = torch.ones(8, 12, 9, 6, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(x.grad, y) and y.is_contiguous()
    torch.manual_seed(0)
    assert torch.equal(y, drop_block(torch.ones(8, 6, 12, 9), 0.3, 3).movedim(1, -1))
    assert layer.expected_drop((8, 12, 9, 6)) == DropBlock(0.3, 3).expected_drop((8, 6, 12, 9))


@pytest.mark.parametrize(("shape", "axis"), [((2, 196, 64), -1), ((2, 64), 1), ((2, 8, 7, 7), None)])
def test_build_refuses_what_is_not_maps(shape: tuple[int, ...], axis: int | None) -> None:
    with pytest.raises(SurgeryError, match=r"dropblock at blocks\.0:x\.output: expected .*, got"):
        DropBlock().build(channel_axis=axis, channels=8, shape=shape, site_id="blocks.0:x.output")


@pytest.mark.parametrize(
    ("option", "value"),
    [("block_size", 0), ("block_size", 2.5), ("gamma", "magic"), ("clamp", "none"), ("share_channels", "no")],
)
def test_refuses_bad_options(option: str, value: object) -> None:
    with pytest.raises(SurgeryError, match=rf"{option}: expected .*, got"):
        DropBlock(**{option: value})


def test_refuses_a_tensor_without_maps() -> None:
    with pytest.raises(SurgeryError, match=r"expected a channel axis .*, got \(2, 196, 64\)"):
        DropBlock()(torch.ones(2, 196, 64))
    with pytest.raises(SurgeryError, match=r"expected maps .*, got \(2, 64\)"):
        DropBlock()(torch.ones(2, 64))


def test_repr_names_what_was_chosen() -> None:
    assert repr(DropBlock(0.1, 7)) == "DropBlock(p=0.1, block_size=7)"
    assert repr(DropBlock(0.025, 7, gamma="exact")) == "DropBlock(p=0.025, block_size=7, gamma='exact')"


def test_works_alone_in_a_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), load("regularizers", "dropblock")(p=0.5, block_size=3))
    x = torch.randn(2, 3, 12, 12)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model[0](x))


def test_same_blocks_by_either_cpu_path_in_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient may come in another layout than the input: the draw must not depend on it."""
    for sparse in (True, False):
        monkeypatch.setattr(_blocks.Draw, "is_sparse", lambda self, sparse=sparse: sparse)
        outcomes = []
        for x in (torch.ones(4, 6, 9, 14), torch.ones(4, 6, 9, 14).to(memory_format=torch.channels_last)):
            torch.manual_seed(0)
            outcomes.append(drop_block(x, 0.2, 3))
        assert torch.equal(*outcomes)


def test_seeds_are_topped_up_when_the_first_lot_falls_short(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = _blocks.Draw((100, 100), (14, 14), (1, 1), 0.05, key=7)
    with monkeypatch.context() as patch:
        patch.setattr(_blocks.math, "sqrt", lambda expected: -0.15 * expected)  # room for a tenth of them
        seeds = draw.seeds()
    n = 100 * 100 * 14 * 14
    assert abs(len(seeds) - 0.05 * n) <= 4 * math.sqrt(n * 0.05 * 0.95)
    assert (seeds.diff() > 0).all() and seeds[-1] < n


class TwoOnOneInput(nn.Module):
    """One layer called twice on the same tensor, and one on channels at the end."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = DropBlock(0.3, 3), DropBlock(0.3, 2)
        self.second.build(channel_axis=-1, channels=8, shape=(1, 9, 9, 8), site_id="second")
        context = Context(seed)
        self.first.context, self.second.context = context, context

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.conv(x)
        return self.first(x), self.first(x), self.second(x.permute(0, 2, 3, 1))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_is_eager_in_every_size_and_layout(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    eager, twin = TwoOnOneInput(seed=3), TwoOnOneInput(seed=3)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 3, 9, 9), (3, 3, 7, 10)):
        x = torch.randn(shape).to(memory_format=torch.channels_last)
        expected, got = eager(x), compiled(x)
        assert not torch.equal(got[0], got[1])
        for a, b in zip(expected, got, strict=True):
            assert torch.allclose(a, b, atol=1e-6) and a.stride() == b.stride()
        for model, outputs in ((eager, expected), (twin, got)):
            model.zero_grad()
            sum(y.square().sum() for y in outputs).backward()
        assert torch.allclose(eager.conv.weight.grad, twin.conv.weight.grad, rtol=1e-4)


def test_compiled_calls_do_not_share_their_blocks() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(TwoOnOneInput(seed=None), fullgraph=True, backend="aot_eager")
    first, second, _ = compiled(torch.randn(2, 3, 9, 9))
    assert not torch.equal(first == 0, second == 0)


@pytest.mark.parametrize("seed", [None, 4])
def test_compiled_checkpointing_meets_the_same_blocks(seed: int | None) -> None:
    torch._dynamo.reset()
    layer = DropBlock(0.3, 3)
    layer.context = Context(seed)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        return checkpoint(lambda x: layer(x).square(), x, use_reentrant=False)

    for _ in range(3):
        x = torch.rand(4, 8, 9, 9).add_(0.1).requires_grad_()
        y = run(x)
        y.sum().backward()
        assert torch.allclose(x.grad, 2 * y.detach() / x.detach())


@pytest.mark.parametrize("exact", [False, True])
def test_the_way_of_other_devices_compiles_with_a_moving_rate(exact: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    p = torch.tensor(0.1)
    run = torch.compile(dropblock._drop_block, fullgraph=True, backend="aot_eager")
    for rate in (0.1, 0.3):
        p.fill_(rate)
        x = torch.ones(200, 50, 9, 12, requires_grad=True)
        y = run(x, p, None, [3, 4], False, exact)
        y.sum().backward()
        assert torch.equal(x.grad, y)
        mean, error = shares_and_error(y == 0)
        expected = rate if exact else expected_share(seed_probability(rate, (9, 12), (3, 4), False), (9, 12), (3, 4))
        assert abs(mean - expected) <= 4 * error


@pytest.mark.parametrize(
    ("size", "block"), [((14, 14), (7, 7)), ((9, 5), (2, 4)), ((30,), (7,)), ((5, 4, 6), (2, 3, 4)), ((6, 6), (1, 3))]
)
def test_a_table_of_blocks_covers_what_each_seed_covers(size: tuple[int, ...], block: tuple[int, ...]) -> None:
    draw = _blocks.Draw((4, 1), size, block, 0.05, key=3)
    assert draw.is_tabled
    seeds = torch.empty(draw.region).bernoulli_(draw.gamma, generator=torch.Generator().manual_seed(draw.key))
    covered = np.zeros((4, 1, *size), dtype=np.uint8)
    for sample, _, *corner in seeds.nonzero().tolist():
        covered[sample, 0][tuple(slice(at, at + k) for at, k in zip(corner, block, strict=True))] = 1
    assert np.array_equal(draw.mask().numpy(), covered) and 0 < covered.sum() < covered.size
    assert np.array_equal(draw.kept(torch.float64).numpy(), 1.0 - covered)


@pytest.mark.parametrize("maps", [(8, 16), (300, 64)])
def test_what_is_kept_of_whole_maps_is_what_is_not_dropped(maps: tuple[int, int]) -> None:
    draw = _blocks.Draw(maps, (7, 5), (7, 5), 0.3, key=3)
    assert draw.whole and torch.equal(draw.kept(torch.float32), 1.0 - draw.mask())
    assert 0 < draw.mask().sum() < draw.mask().numel()


RATES = (0.0, 1e-5, 0.0015, 1 / 256, 0.0756, 0.5, 0.9985, 255.5 / 256, 1.0)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("count", [1000, _blocks._FEW + 3, 3_000_000])
def test_bytes_are_set_with_the_very_probability(p: float, count: int) -> None:
    marks = torch.full((count,), 7, dtype=torch.uint8)
    _blocks._bernoulli_(marks, p, torch.Generator().manual_seed(1))
    assert ((marks == 0) | (marks == 1)).all()
    assert abs(float(marks.double().mean()) - p) <= 4 * math.sqrt(p * (1 - p) / count) + 1e-12
    together = float((marks[1:] & marks[:-1]).double().mean())  # of neighbours: independent of each other
    assert abs(together - p**2) <= 5 * math.sqrt(p**2 * (1 - p**2) / count) * (1 + 2 * p) + 1e-12


def test_without_what_is_left_of_the_probability_the_same_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: 256ths alone."""
    monkeypatch.setattr(_blocks, "_positions", lambda end, p, generator: torch.empty(0, dtype=torch.int64))
    with pytest.raises(AssertionError):
        test_bytes_are_set_with_the_very_probability(0.0756, 3_000_000)
