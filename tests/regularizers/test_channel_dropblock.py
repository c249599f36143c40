"""Channel DropBlock against its formulas in plain loops, with the same numbers, and beside the authors' mask."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from scipy.stats import chi2
from test_contract import LAWS, Make
from torch import Tensor

from dropsurgery import PlanError, apply_recipe, plan_recipe
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers import _channels
from dropsurgery.regularizers._uniform import keyed_uniform
from dropsurgery.regularizers.channel_dropblock import (
    ChannelDropBlock,
    channel_dropblock,
    cosines,
    dropped_channels,
    peaks,
)

METRICS = ["max_activation", "bilinear"]
CPU = torch.device("cpu")


@pytest.fixture(params=["on the CPU", "torch's operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let channels be ranked as on the CPU, or as on other devices."""
    if request.param != "on the CPU":
        monkeypatch.setattr(_channels, "is_transformed", lambda: True)


# ---- the formulas in loops ----


def peak(channel: np.ndarray) -> tuple[int, int]:
    """Where the mean of 3x3 pixels, zeros around the map, is largest; of equals the first."""
    height, width = channel.shape
    best, at = -math.inf, (0, 0)
    for i in range(height):
        for j in range(width):
            window = channel[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            if window.sum() / 9 > best:
                best, at = window.sum() / 9, (i, j)
    return at


def likenesses(x: Tensor, metric: str) -> list[np.ndarray]:
    """The matrix of each sample."""
    return [likeness(maps, metric) for maps in x.double().numpy()]


def likeness(maps: np.ndarray, metric: str) -> np.ndarray:
    """The matrix (C, C) of one sample (C, H, W): a larger entry is more alike."""
    channels = len(maps)
    if metric == "max_activation":
        at = [peak(channel) for channel in maps]
        return np.array([[-((a - c) ** 2 + (b - d) ** 2) for c, d in at] for a, b in at], dtype=float)
    matrix = np.zeros((channels, channels))
    for i, a in enumerate(maps):
        for j, b in enumerate(maps):
            lengths = math.sqrt((a**2).sum()) * math.sqrt((b**2).sum())
            matrix[i, j] = (a * b).sum() / lengths if lengths else 0.0
    return matrix


def reference(matrices: list[np.ndarray], p: float, drawn: Tensor) -> np.ndarray:
    """Which channels go, (B, C)."""
    channels = len(matrices[0])
    dropped = np.zeros((len(matrices), channels), dtype=bool)
    for sample, matrix, number in zip(dropped, matrices, drawn.tolist(), strict=True):
        chosen = int(number * channels)
        alike = matrix[chosen]
        others = sorted((j for j in range(channels) if j != chosen), key=lambda j: (-alike[j], j))
        sample[[chosen, *others][: int(p * channels)]] = True
    return dropped


def released(matrices: list[np.ndarray], p: float, drawn: Tensor) -> np.ndarray:
    """What the authors' code drops: all that is as like as the k-th, or more."""
    channels = len(matrices[0])
    dropped = np.zeros((len(matrices), channels), dtype=bool)
    for sample, matrix, number in zip(dropped, matrices, drawn.tolist(), strict=True):
        alike = matrix[int(number * channels)]
        sample[:] = alike >= np.sort(alike)[::-1][int(p * channels) - 1]
    return dropped


def drawn(samples: int, seed: int = 0) -> Tensor:
    return torch.rand(samples, generator=torch.Generator().manual_seed(seed))


def mask(x: Tensor, p: float, metric: str, numbers: Tensor) -> np.ndarray:
    return dropped_channels(x, torch.tensor(p), metric, numbers).numpy()


# ---- maps of all sorts ----


def relu_maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).relu()


def with_dead_channels(*shape: int) -> Tensor:
    x = relu_maps(*shape)
    x[:, ::3] = 0
    return x


MAPS: dict[str, Callable[[], Tensor]] = {
    "random": lambda: torch.randn(5, 20, 7, 7, generator=torch.Generator().manual_seed(1)),
    "relu": lambda: relu_maps(5, 20, 14, 14),
    "non-square": lambda: relu_maps(4, 15, 5, 9),
    "dead channels": lambda: with_dead_channels(6, 20, 7, 7),
    "whole numbers, and so ties": lambda: (2 * relu_maps(6, 20, 4, 4)).round(),
    "constant": lambda: torch.full((3, 10, 5, 5), 0.5),
    "all zero": lambda: torch.zeros(3, 10, 5, 5),
    "all negative": lambda: -torch.rand(3, 10, 5, 5, generator=torch.Generator().manual_seed(2)) - 0.1,
    "equal channels": lambda: relu_maps(4, 1, 6, 6).expand(4, 12, 6, 6),
    "one sample": lambda: relu_maps(1, 20, 6, 6),
    "3x3": lambda: relu_maps(4, 10, 3, 3),
}
NEARLY_TIED = ("whole numbers, and so ties", "equal channels")  # cosines that are equal but for rounding


def fits(dropped: np.ndarray, matrices: list[np.ndarray], p: float, numbers: Tensor, room: float) -> bool:
    """Whether the chosen channel goes, and of the others none that is less like it, by `room`, than one that stays."""
    channels = len(matrices[0])
    for sample, matrix, number in zip(dropped, matrices, numbers.tolist(), strict=True):
        chosen = int(number * channels)
        alike = matrix[chosen].copy()
        alike[chosen] = math.inf
        if sample.sum() != int(p * channels) or not sample[chosen] or alike[sample].min() < alike[~sample].max() - room:
            return False
    return True


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", MAPS)
def test_the_mask_is_the_formulas(way: None, kind: str, metric: str) -> None:
    x = MAPS[kind]()
    matrices = likenesses(x, metric)
    for seed, p in enumerate((0.1, 0.25, 0.5, 0.9)):
        numbers = drawn(len(x), seed)
        got = mask(x, p, metric, numbers)
        assert fits(got, matrices, p, numbers, room=1e-6 if metric == "bilinear" else 0)
        if metric == "max_activation" or kind not in NEARLY_TIED:
            assert np.array_equal(got, reference(matrices, p, numbers))
        chosen = (numbers * x.shape[1]).long()[:, None].numpy()
        assert np.take_along_axis(got, chosen, 1).all()  # P2
        assert (got.sum(1) == int(p * x.shape[1])).all()  # P1


def test_a_wrong_variant_fails_the_same_check() -> None:
    """The negative controls: the least alike, a row of the next channel, and the released mask."""
    x, numbers = relu_maps(5, 20, 7, 7), drawn(5)
    for metric in METRICS:
        matrices = likenesses(x, metric)
        right = reference(matrices, 0.25, numbers)
        assert np.array_equal(mask(x, 0.25, metric, numbers), right)
        assert not np.array_equal(mask(x, 0.25, metric, (numbers + 0.05) % 1), right)
        assert not np.array_equal(mask(x, 0.75, metric, numbers), ~right)
        if metric == "max_activation":
            assert not np.array_equal(released(matrices, 0.25, numbers), right)


def test_ties_drop_no_more_than_asked() -> None:
    """0.20 is asked for on 7x7 maps behind a ReLU, and dropped; the authors' code drops 0.25 and scales by 1 / 0.80."""
    x, numbers, p = relu_maps(24, 100, 7, 7), drawn(24), 0.2
    ours, theirs = mask(x, p, "max_activation", numbers), released(likenesses(x, "max_activation"), p, numbers)
    assert (ours.mean(1) == p).all()
    assert (theirs & ours == ours).all() and theirs.mean() > 0.24 and theirs.mean(1).max() > 0.3
    constant = torch.ones(3, 100, 7, 7)
    assert (mask(constant, p, "max_activation", drawn(3)).mean(1) == p).all()
    assert released(likenesses(constant, "max_activation"), p, drawn(3)).all()  # whole samples


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", MAPS)
def test_the_scale_is_of_what_is_kept(kind: str, metric: str) -> None:  # P5
    x, key = MAPS[kind](), torch.tensor(7)
    channels = x.shape[1]
    for p in (0.1, 0.27, 0.5, 1.0):
        y = channel_dropblock(x, p, metric, key=key)
        dropped = dropped_channels(x, torch.tensor(p), metric, keyed_uniform((len(x),), CPU, key))
        count = min(int(p * channels), channels - 1)  # a sample is never wiped out
        assert (dropped.sum(1) == count).all()
        factor = torch.where(dropped, 0.0, channels / (channels - count))
        assert torch.equal(y, x * factor[:, :, None, None]) and y.isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
def test_the_gradient_is_mask_times_scale(metric: str) -> None:  # C-7, C-8
    x = relu_maps(4, 10, 5, 7).add_(0.1).requires_grad_()
    y = channel_dropblock(x, 0.3, metric)
    upstream = torch.randn(y.shape)
    y.backward(upstream)
    factor = y.detach() / x.detach()
    assert torch.allclose(x.grad, upstream * factor, rtol=1e-6)
    assert torch.equal((y == 0).flatten(2).all(2), (x.grad == 0).flatten(2).all(2))


@pytest.mark.parametrize("metric", METRICS)
def test_each_channel_is_the_chosen_one_as_often(metric: str) -> None:  # P4
    """Where one channel goes, it is the chosen one. A draw that prefers the middle (the control) is found."""
    torch.manual_seed(0)
    times, channels = 10_000, 8
    y = channel_dropblock(torch.ones(times, channels, 3, 3), 1 / channels, metric)
    limit = chi2.ppf(1 - 1e-3, channels - 1)

    def statistic(chosen: Tensor) -> float:
        counts = chosen.bincount(minlength=channels).double()
        return float(((counts - times / channels) ** 2 / (times / channels)).sum())

    assert statistic((y[:, :, 0, 0] == 0).nonzero()[:, 1]) < limit
    assert statistic((torch.rand(times, 2).mean(1) * channels).long()) > limit


def test_cosines() -> None:  # P3
    """Those of NumPy to 1e-5; the matrix of all rows is symmetric, with 1 on its diagonal where channels live."""
    x = with_dead_channels(3, 12, 7, 5)
    matrix = torch.stack([cosines(x, torch.full((3, 1), i)) for i in range(12)], 1)
    alive = (x.flatten(2) != 0).any(2)
    assert torch.allclose(matrix, matrix.mT, atol=1e-6)
    assert torch.allclose(matrix.diagonal(dim1=1, dim2=2), alive.float(), atol=1e-6)
    for got, maps in zip(matrix.numpy(), x.double().numpy(), strict=True):
        assert np.allclose(got, likeness(maps, "bilinear"), rtol=0, atol=1e-5)


def test_peaks_move_with_the_maps() -> None:  # P3
    """Away from borders, maps that are all shifted alike have the same group; one that stays (the control) has not."""
    x = torch.zeros(6, 20, 16, 16)
    x[:, :, 5:10, 5:10] = torch.rand(6, 20, 5, 5, generator=torch.Generator().manual_seed(0))
    numbers, moved = drawn(6), x.roll((3, -2), (2, 3))
    assert torch.equal(peaks(moved), peaks(x) + 3 * 16 - 2)
    assert np.array_equal(mask(x, 0.3, "max_activation", numbers), mask(moved, 0.3, "max_activation", numbers))
    half = torch.cat([x[:, :10], moved[:, 10:]], 1)
    assert not np.array_equal(mask(x, 0.3, "max_activation", numbers), mask(half, 0.3, "max_activation", numbers))


def test_a_dead_channel_takes_the_first_ones_along() -> None:  # P6
    x = relu_maps(2, 10, 5, 5) + 0.1
    x[:, 6] = 0
    dropped = mask(x, 0.4, "bilinear", torch.tensor([0.65, 0.65]))
    assert dropped.nonzero()[1].tolist() == 2 * [0, 1, 2, 6]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_drops_what_float32_drops(dtype: torch.dtype, metric: str) -> None:  # C-5
    for kind in MAPS:
        x, numbers = MAPS[kind]().to(dtype), drawn(len(MAPS[kind]()))
        wide = mask(x.float(), 0.5, metric, numbers)
        assert np.array_equal(mask(x, 0.5, metric, numbers), wide)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert np.array_equal(mask(x.float(), 0.5, metric, numbers), wide)
        assert channel_dropblock(x, 0.5, metric).dtype == dtype


@pytest.mark.parametrize("metric", METRICS)
def test_layouts(metric: str) -> None:
    x, key = relu_maps(4, 20, 6, 9), torch.tensor(3)
    y = channel_dropblock(x, 0.3, metric, key=key)
    last = channel_dropblock(x.to(memory_format=torch.channels_last), 0.3, metric, key=key)
    assert torch.equal(last, y) and last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(channel_dropblock(torch.stack([x, x], -1)[..., 0], 0.3, metric, key=key), y)
    nhwc = channel_dropblock(x.movedim(1, -1).contiguous(), 0.3, metric, channel_axis=-1, key=key)
    assert torch.equal(nhwc.movedim(-1, 1), y)
    layer = ChannelDropBlock(0.3, metric)
    layer.build(channel_axis=-1, channels=20, shape=(4, 6, 9, 20), site_id="a")
    torch.manual_seed(0)
    first = layer(x.movedim(1, -1))
    torch.manual_seed(0)
    assert torch.equal(first.movedim(-1, 1), channel_dropblock(x, 0.3, metric))


def test_tokens_and_volumes() -> None:
    """By cosines any positions will do; peaks are of two axes."""
    x, key = relu_maps(3, 10, 4, 6), torch.tensor(3)
    y = channel_dropblock(x, 0.3, "bilinear", key=key)
    tokens = channel_dropblock(x.flatten(2).mT, 0.3, "bilinear", channel_axis=-1, key=key)
    volumes = channel_dropblock(x.view(3, 10, 2, 2, 6), 0.3, "bilinear", key=key)
    assert torch.equal(tokens.mT, y.flatten(2)) and torch.equal(volumes.flatten(2), y.flatten(2))
    with pytest.raises(SurgeryError, match="max_activation"):
        channel_dropblock(x.view(3, 10, 2, 2, 6), 0.3)


@pytest.mark.parametrize("metric", METRICS)
def test_a_sample_does_not_hang_on_the_others(metric: str) -> None:  # C-6
    x, other, key = relu_maps(6, 20, 7, 7), relu_maps(6, 20, 7, 7, seed=5), torch.tensor(1)
    mixed = torch.cat([x[:2], 10 * other[2:]])
    y = channel_dropblock(x, 0.3, metric, key=key)
    assert torch.equal(channel_dropblock(mixed, 0.3, metric, key=key)[:2], y[:2])
    assert not torch.equal(y[2:], channel_dropblock(mixed, 0.3, metric, key=key)[2:])


def test_one_point_and_one_channel() -> None:
    """By cosines, maps of one point and a single channel neither fail nor vanish."""
    for shape in ((4, 10, 1, 1), (1, 1, 5, 5), (2, 1, 1, 1)):
        y = channel_dropblock(torch.ones(shape), 0.5, "bilinear", allow_noop=True)
        assert (y.sum((1, 2, 3)) == torch.ones(shape).sum((1, 2, 3))).all()
    assert channel_dropblock(torch.zeros(0, 4, 5, 5), 0.5).shape == (0, 4, 5, 5)


class Peaked(ChannelDropBlock):
    """Of maps large enough for peaks: those of 1x1, at which other laws are tried, are refused."""

    @staticmethod
    def example_inputs(batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 6, 9, 14),)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("p", [0.5, 0.6])
def test_laws_by_peaks(law: Callable[[Make], None], p: float) -> None:
    torch.manual_seed(0)
    law(Make(Peaked, p=p, metric="max_activation"))


def test_refusals() -> None:
    x = torch.ones(2, 10, 4, 4)
    with pytest.raises(SurgeryError, match="metric: expected 'max_activation' or 'bilinear', got 'cosine'"):
        ChannelDropBlock(metric="cosine")
    with pytest.raises(SurgeryError, match="allow_noop: expected true or false, got 1"):
        ChannelDropBlock(allow_noop=1)
    with pytest.raises(SurgeryError, match=r"p: expected a number in \[0, 1\], got 2"):
        channel_dropblock(x, 2)
    for shape in ((2, 10, 2, 2), (2, 10, 2, 9), (2, 10, 9, 1)):
        small = torch.ones(shape)
        for call in (lambda s=small: channel_dropblock(s, 0.2), lambda s=small: ChannelDropBlock(0.2)(s)):
            with pytest.raises(SurgeryError, match=r"expected maps of 3x3 or more .*, got .*; use `metric: bilinear`"):
                call()
        with pytest.raises(SurgeryError, match="channel_dropblock at a: expected maps of 3x3 or more"):
            ChannelDropBlock().build(channel_axis=1, channels=10, shape=shape, site_id="a")
        ChannelDropBlock(metric="bilinear").build(channel_axis=1, channels=10, shape=shape, site_id="a")
    with pytest.raises(SurgeryError, match=r"channel_dropblock at a: expected maps .*\(2, 196, 64\)"):
        ChannelDropBlock().build(channel_axis=-1, channels=64, shape=(2, 196, 64), site_id="a")


def test_a_rate_that_drops_nothing() -> None:
    """Is refused by function, layer and site, and let pass where that is asked for; 0 is off."""
    x = torch.ones(2, 10, 4, 4)
    for call in (
        lambda: channel_dropblock(x, 0.09),
        lambda: ChannelDropBlock(0.09)(x),
        lambda: ChannelDropBlock(0.09).build(channel_axis=1, channels=10, shape=(2, 10, 4, 4), site_id="a"),
        lambda: ChannelDropBlock(0.9).build(channel_axis=1, channels=1, shape=(2, 1, 4, 4), site_id="a"),
    ):
        with pytest.raises(SurgeryError, match=r"expected (a p of 0.1|2 channels) or more.* got .*by which none"):
            call()
    assert torch.equal(channel_dropblock(x, 0.09, allow_noop=True), x)
    assert torch.equal(ChannelDropBlock(0.09, allow_noop=True)(x), x)
    assert torch.equal(channel_dropblock(x, 0.0), x) and ChannelDropBlock(0.0)(x) is x
    layer = ChannelDropBlock(0.3)  # on its way there by a schedule
    layer.set_rate("p", 0.05)
    assert torch.equal(layer(x), x) and layer.expected_drop((2, 10, 4, 4)) == 0


def test_repr_and_share() -> None:
    assert repr(ChannelDropBlock()) == "ChannelDropBlock(p=0.2, metric='max_activation')"
    assert "allow_noop=True" in repr(ChannelDropBlock(0.05, "bilinear", True))
    assert ChannelDropBlock(0.2).expected_drop((2, 512, 7, 7)) == 102 / 512
    assert ChannelDropBlock(1.0).expected_drop((2, 8, 7, 7)) == 7 / 8


@pytest.mark.parametrize(("metric", "p"), [("max_activation", 0.2), ("bilinear", 0.05)])
def test_recipe_on_a_resnet(metric: str, p: float) -> None:
    """One site, the end of layer2, of whose 512 channels a whole number goes in each sample, as the audit says."""
    torch.manual_seed(0)
    entry = "after layer2.with"
    overrides = {f"{entry}.metric": metric, f"{entry}.p": p}
    model, image = timm.create_model("resnet50", num_classes=3), torch.randn(2, 3, 64, 64)
    gm = apply_recipe(model, "channel_dropblock_resnet", example_inputs=image, overrides=overrides)
    (edit,) = gm.surgery.plan.edits
    assert edit.site.id == "layer2.3.act3#0:block_end.output" and edit.p == p
    (row,) = gm.surgery.audit(image)
    assert row.p == p and row.expected == int(512 * p) / 512 == pytest.approx(row.measured, abs=1e-6)
    seen = []
    gm.surgery.regularizers[edit.site.id].register_forward_hook(lambda _, given, y: seen.append((given[0], y)))
    gm.train()(image)
    ((given, y),) = seen
    gone = ((y == 0) & (given != 0)).flatten(2).any(2).sum(1)
    assert (gone > 0).all() and (gone <= int(512 * p)).all()
    assert torch.equal(gm.eval()(image), model.eval()(image))


def test_recipe_refuses_where_it_cannot_work() -> None:
    """Images so small that layer2 gives 2x2 maps; and a share of none of the channels."""
    model = timm.create_model("resnet18")
    with pytest.raises(PlanError, match=r"layer2.1.act2.*expected maps of 3x3 or more.*use `metric: bilinear`"):
        apply_recipe(model, "channel_dropblock_resnet", example_inputs=torch.randn(2, 3, 16, 16))
    with pytest.raises(PlanError, match=r"expected a p of 0\.00781 or more"):
        apply_recipe(
            model,
            "channel_dropblock_resnet",
            example_inputs=torch.randn(2, 3, 64, 64),
            overrides={"after layer2.with.p": 0.005},
        )


def test_recipe_on_a_vgg() -> None:
    plan = plan_recipe(timm.create_model("vgg19_bn", num_classes=3, mlp_ratio=0.02), "channel_dropblock_vgg")
    (edit,) = plan.edits
    assert edit.site.id == "features.26#0:pool.output" and edit.site.channels == 256
