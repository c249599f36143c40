"""CorrDrop against its equations in plain loops: scores, masks for given numbers, shares, and how little is chosen."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dropsurgery import apply_recipe
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers import _correlation as module
from dropsurgery.regularizers._correlation import expected_share, kept_units, protection, scores
from dropsurgery.regularizers.corrdrop_channel import CorrDropChannel, corrdrop_channel
from dropsurgery.regularizers.corrdrop_spatial import CorrDropSpatial, corrdrop_spatial

BLOCK = 3
OPTIONS = list(itertools.product(("softmax", "minmax"), ("batch", "sample"), ("batch", "sample", "none")))
E = math.e


# ---- the equations, in plain loops ----


def score(rows: np.ndarray, diagonal: float = 1.0, over: int = 0) -> np.ndarray:
    """Equations (1) to (3) for A (N, K); `diagonal` and `over` make them wrong."""
    count = len(rows)
    unit = [row / np.sqrt((row**2).sum()) if row.any() else row for row in rows]
    found = np.zeros(count)
    for i, j in itertools.product(range(count), repeat=2):
        found[i] += abs(unit[i] @ unit[j] - diagonal * (i == j)) / (count - over)
    return found


def means(maps: np.ndarray, k: int) -> np.ndarray:
    """The blocks' rows: (C, H, W) → (N, C), from left to right and top to bottom, true counts at the border."""
    _, height, width = maps.shape
    corners = itertools.product(range(0, height, k), range(0, width, k))
    return np.array([maps[:, top : top + k, left : left + k].mean((1, 2)) for top, left in corners])


def chances(found: np.ndarray, gamma: str) -> np.ndarray:
    """With what probability each unit of a sample is protected; one that is alone always is."""
    if gamma == "softmax" or len(found) == 1:
        return np.exp(found) / np.exp(found).sum()
    spread = found.max() - found.min()
    return (found - found.min()) / spread if spread > 1e-6 else np.full_like(found, 0.5)


def draw(found: list[np.ndarray], p: float, drawn: np.ndarray, gamma: str, scope: str) -> np.ndarray:
    """Equations (4) to (8): S (B, N) for uniform numbers (2, B, N)."""
    protected = np.array([u < chances(each, gamma) for u, each in zip(drawn[0], found, strict=True)])
    kept = np.ones_like(protected)
    for sample, unit in np.ndindex(kept.shape):
        group = protected if scope == "batch" else protected[sample]
        left = group.size - group.sum()
        rate = min(1.0, p * group.size / left) if left else 1.0
        kept[sample, unit] = protected[sample, unit] or drawn[1, sample, unit] >= rate
    return kept


def scaled(mask: np.ndarray, rescale: str) -> np.ndarray:
    """S (B, ...) times numel(S) / sum(S), of the batch or of each sample; all ones where the sum is 0."""
    if rescale == "none":
        return mask.astype(float)
    if rescale == "batch":
        return mask * (mask.size / mask.sum()) if mask.any() else np.ones(mask.shape)
    return np.array([scaled(each, "batch") for each in mask])


def expected_channels(x: np.ndarray, p: float, drawn: np.ndarray, gamma: str, scope: str, rescale: str) -> np.ndarray:
    found = [score(maps.reshape(len(maps), -1)) for maps in x]
    return scaled(draw(found, p, drawn, gamma, scope), rescale)[:, :, None, None]


def expected_blocks(
    x: np.ndarray, p: float, k: int, drawn: np.ndarray, gamma: str, scope: str, rescale: str
) -> np.ndarray:
    batch, _, height, width = x.shape
    rows, columns = -(-height // k), -(-width // k)
    kept = draw(
        [score(means(maps, k)) for maps in x], p / k**2 * (height * width) / (rows * columns), drawn, gamma, scope
    )
    mask = np.zeros((batch, 1, height, width))
    for b, i, j in itertools.product(range(batch), range(height), range(width)):
        mask[b, 0, i, j] = kept[b, i // k * columns + j // k]
    return scaled(mask, rescale)


# ---- maps ----


def maps(kind: str) -> Tensor:
    """Inputs (B, C, H, W) of every kind that might trip a score."""
    torch.manual_seed(1)
    x = torch.randn(5, 6, 8, 7)
    return {
        "random": lambda: x,
        "relu": lambda: x.relu(),
        "negative": lambda: -x.abs(),
        "a dead channel": lambda: x * (torch.arange(6) != 2).view(6, 1, 1),
        "a dead corner": lambda: x * ((torch.arange(8)[:, None] > 3) | (torch.arange(7) > 2)),
        "ties": lambda: x[:, :1].expand(-1, 6, -1, -1) * torch.tensor([1, 2, 1, -1, 1, 0.5]).view(6, 1, 1),
        "constant": lambda: torch.full_like(x, 3),
        "zeros": lambda: torch.zeros_like(x),
        "one channel": lambda: x[:, :1],
        "one point": lambda: x[..., :1, :1],
        "one row": lambda: x[..., :1, :],
        "one sample": lambda: x[:1],
        "half": lambda: (x * 300).half(),  # 300 squared is more than half holds
        "bfloat16": lambda: x.bfloat16(),
        "double": lambda: x.double(),
        "channels last": lambda: x.to(memory_format=torch.channels_last),
        "every other": lambda: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    }[kind]()


KINDS = (
    *("random", "relu", "negative", "a dead channel", "a dead corner", "ties", "constant", "zeros", "one channel"),
    *("one point", "one row", "one sample", "half", "bfloat16", "double", "channels last", "every other"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_equations(kind: str) -> None:
    """To 1e-5, by the product of all pairs and, where that will do, by the product with their sum."""
    x = maps(kind)
    values = x.double().numpy()
    of_channels = np.array([score(each.reshape(len(each), -1)) for each in values])
    of_blocks = np.array([score(means(each, BLOCK)) for each in values])
    for nonnegative in {False, bool((x >= 0).all())}:
        for block, expected in ((0, of_channels), (BLOCK, of_blocks)):
            found = scores(x, 1, block, nonnegative)
            assert found.dtype == torch.promote_types(x.dtype, torch.float32)
            assert np.abs(found.numpy() - expected).max() <= 1e-5
            assert torch.equal(torch.ops.dropsurgery.correlation_scores(x, 1, block, nonnegative), found)


def test_other_scores_fail_the_same_check() -> None:
    """The negative controls: without I, over N - 1, without the sign taken off, and blocks a pixel aside."""
    x = maps("random")
    rows = x[0].flatten(1).double().numpy()
    found = scores(x, 1, 0, False)[0].numpy()
    for wrong in (score(rows, diagonal=0), score(rows, over=1)):
        assert np.abs(found - wrong).max() > 1e-2
    assert np.abs(scores(x, 1, 0, True)[0].numpy() - score(rows)).max() > 1e-2
    aside = score(means(np.pad(x[0].double().numpy(), ((0, 0), (1, 0), (1, 0))), BLOCK))
    assert np.abs(scores(x, 1, BLOCK, False)[0].numpy() - aside).max() > 1e-2


@pytest.mark.parametrize("shape", [(2, 40, 9, 9), (3, 5, 40, 41), (1, 70, 3, 3)])
def test_parts_add_up(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some samples at a time, some rows of one, and blocks by a table or by pooling."""
    x = torch.randn(shape)
    whole = [scores(x, 1, block, False) for block in (0, 3)]
    monkeypatch.setattr(module, "_PART", 64)
    monkeypatch.setattr(module, "_ROWS", 7)
    monkeypatch.setattr(module, "_TABLE", 0)
    for block, expected in zip((0, 3), whole, strict=True):
        assert torch.allclose(scores(x, 1, block, False), expected, atol=1e-6)


def test_a_score_hangs_on_direction_alone_and_on_no_order() -> None:
    x = maps("random")
    order, factors = torch.randperm(6), torch.tensor([1e-6, 0.1, 1, 3, 1e3, 1e6]).view(6, 1, 1)
    found = scores(x, 1, 0, False)
    assert torch.allclose(scores(x * factors, 1, 0, False), found, atol=1e-5)
    assert torch.allclose(scores(x[:, order], 1, 0, False), found[:, order], atol=1e-6)
    assert torch.allclose(scores(x[:, order], 1, BLOCK, False), scores(x, 1, BLOCK, False), atol=1e-6)


@pytest.mark.parametrize("size", [1e38, 3e38, 1e-30, 1e-45])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_extreme_values_leave_scores_finite(size: float, nonnegative: bool) -> None:
    """Squares and sums that float32 does not hold: such a row counts as one of zeros, and harms no other."""
    x = torch.rand(2, 4, 6, 6) if nonnegative else torch.randn(2, 4, 6, 6).clamp(-1, 1)
    x[:, 0] = size
    for block in (0, 3):
        found = scores(x, 1, block, nonnegative)
        assert found.isfinite().all() and (found >= 0).all() and (found <= 1).all()
    zeroed = x.clone()
    zeroed[:, 0] = 0
    assert torch.allclose(scores(x, 1, 0, nonnegative), scores(zeroed, 1, 0, nonnegative), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_the_equations(kind: str) -> None:
    """For the same uniform numbers, under all options."""
    x = maps(kind)
    channels, blocks = (x.shape[1], -(-x.shape[2] // BLOCK) * -(-x.shape[3] // BLOCK))
    for p, (gamma, scope, rescale) in itertools.product((0.2, 0.6), OPTIONS):
        options: dict[str, Any] = {"gamma": gamma, "scope": scope, "rescale": rescale}
        drawn = torch.rand(2, len(x), channels)
        y = corrdrop_channel(x, p, drawn=drawn, **options)
        agrees(x, y, expected_channels(x.double().numpy(), p, drawn.numpy(), gamma, scope, rescale))
        drawn = torch.rand(2, len(x), blocks)
        y = corrdrop_spatial(x, p, BLOCK, drawn=drawn, **options)
        agrees(x, y, expected_blocks(x.double().numpy(), p, BLOCK, drawn.numpy(), gamma, scope, rescale))


def agrees(x: Tensor, y: Tensor, factor: np.ndarray) -> None:
    assert y.dtype == x.dtype
    expected = torch.from_numpy(x.double().numpy() * factor)
    assert torch.equal(y == 0, expected == 0)
    assert torch.allclose(
        y.double(), expected, rtol={2: 2e-2 if x.dtype == torch.bfloat16 else 2e-3}.get(x.itemsize, 1e-6)
    )


def test_other_masks_fail_the_same_check() -> None:
    """The controls: M and B exchanged, M read the other way round, p' that is p, and each sample for itself."""
    x, p = maps("random"), 0.5
    values, drawn = x.double().numpy(), torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0))
    y = corrdrop_channel(x, p, drawn=drawn).numpy() == 0
    found = [score(maps.reshape(6, -1)) for maps in values]
    protected = np.array([u < chances(each, "softmax") for u, each in zip(drawn[0].numpy(), found, strict=True)])
    wrong = {
        "exchanged": ~draw(found, p, drawn.numpy()[::-1], "softmax", "batch"),
        "turned": protected & (drawn[1].numpy() < p),
        "no p^": ~protected & (drawn[1].numpy() < p),
        "sample": ~draw(found, p, drawn.numpy(), "softmax", "sample"),
    }
    right = ~draw(found, p, drawn.numpy(), "softmax", "batch")
    assert np.array_equal(y.all((2, 3)), right)
    assert [name for name, mask in wrong.items() if np.array_equal(mask, right)] == []


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (16, 16), (9, 13)])
def test_the_grid_begins_at_the_top_left(size: tuple[int, int]) -> None:
    """A cell of the grid is dropped as a whole, in all channels; the released code's mask, a pixel aside, is not so."""
    k = 5
    x = torch.ones(64, 3, *size)
    mask = corrdrop_spatial(x, 0.6, k, rescale="none", gamma="minmax")
    rows, columns = (torch.arange(length) // k for length in size)
    cells = rows[:, None] * (columns[-1] + 1) + columns

    def is_constant(mask: Tensor) -> bool:
        return all(bool((part == part[..., :1]).all()) for part in (mask[..., cells == c] for c in cells.unique()))

    assert torch.equal(mask, mask[:, :1].expand_as(mask)) and is_constant(mask)
    assert 0 < mask.mean() < 1 and not is_constant(mask.roll(1, 2)) and not is_constant(mask.roll(-1, 3))


@pytest.mark.parametrize(("gamma", "scope", "rescale"), OPTIONS)
def test_shares_are_those_asked_for(gamma: str, scope: str, rescale: str) -> None:
    """p of the channels and p' of the cells, over 32 000 and 12 000 draws, within 3 standard errors (3.5 of 24)."""
    torch.manual_seed(3)
    p, options = 0.1, {"gamma": gamma, "scope": scope, "rescale": rescale}
    x = torch.randn(4000, 8, 2, 3)
    share = float((corrdrop_channel(x, p, **options) == 0).double().mean())
    assert abs(share - p) <= 3.5 * math.sqrt(p * (1 - p) / (4000 * 8))
    x = torch.randn(1000, 4, 16, 12)
    layer = CorrDropSpatial(p, 5, **options)
    expected = layer.expected_drop(tuple(x.shape))
    assert expected == pytest.approx(p * (16 * 12) / (25 * 4 * 3), rel=1e-3)
    areas = np.outer([5, 5, 5, 1], [5, 5, 2]).ravel()
    error = math.sqrt(expected * (1 - expected) * (areas**2).sum() / areas.sum() ** 2 / 1000)
    share = float((layer(x) == 0).double().mean())
    assert abs(share - expected) <= 3.5 * error
    assert abs(share - p) > 3.5 * error  # p itself is not what a grid that does not fit drops


@pytest.mark.parametrize(("gamma", "scope", "rescale"), OPTIONS)
@pytest.mark.parametrize(("p", "batch", "units"), [(0.3, 2, 2), (0.8, 1, 4), (0.95, 3, 3), (1.0, 2, 4), (0.5, 1, 2)])
def test_expected_shares_of_few_units(p: float, batch: int, units: int, gamma: Any, scope: Any, rescale: Any) -> None:
    """Where most may be protected, or nothing be left: against 20 000 draws of the rule, for scores that are alike."""
    torch.manual_seed(4)
    times = 20_000
    found = torch.zeros(batch, units)
    drawn = torch.rand(times, 2, batch, units)
    kept = torch.func.vmap(lambda u: kept_units(found, torch.tensor(p), u, gamma, scope))(drawn)
    factors = torch.func.vmap(lambda each: module.rescaled(each, rescale))(kept)
    shares = (factors == 0).double().mean((1, 2))
    expected = expected_share(p, batch, units, gamma, scope, rescale)
    assert abs(shares.mean() - expected) <= 4 * shares.std() / math.sqrt(times) + 1e-9
    assert expected_share(p, batch, 1, gamma, scope, rescale) == 0


def test_expected_shares_of_many_units_are_the_rate() -> None:
    for p, gamma, scope in itertools.product((0.05, 0.2), ("softmax", "minmax"), ("batch", "sample")):
        assert expected_share(p, 32, 512, gamma, scope, "batch") == pytest.approx(p, rel=1e-9)  # type: ignore[arg-type]
    layer = CorrDropSpatial(0.2, 5)
    assert layer.expected_drop((2, 8, 16, 16)) == pytest.approx(0.128, abs=1e-6)
    assert layer.expected_drop((8, 8, 7, 7)) == pytest.approx(0.098, abs=1e-6)
    assert CorrDropChannel(0.2).expected_drop((2, 64, 7, 7)) == pytest.approx(0.2)


def test_the_less_correlated_are_dropped_more_often() -> None:
    """Three units that are one and a fourth at right angles: 1e5 draws tell them apart, and agree with the rule."""
    torch.manual_seed(5)
    samples, p = 100_000, 0.2
    x = torch.tensor([[1.0, 0], [1, 0], [2, 0], [0, 1]]).view(1, 4, 1, 2).expand(samples, -1, -1, -1)
    found = scores(x[:1], 1, 0, False)[0]
    assert torch.allclose(found, torch.tensor([0.5, 0.5, 0.5, 0.0]), atol=1e-6)
    for gamma in ("softmax", "minmax"):
        shares = (corrdrop_channel(x, p, gamma=gamma)[:, :, 0].abs().sum(-1) == 0).double().mean(0)
        gammas = 1 - protection(found[None], gamma)[0].double()  # type: ignore[arg-type]
        assert torch.allclose(shares, p * gammas / gammas.mean(), atol=3.5 * math.sqrt(p * (1 - p) / samples))
        assert shares[3] > shares[:3].max() + 0.02
    assert torch.equal(protection(found[None], "minmax")[0], torch.tensor([1.0, 1, 1, 0]))


@pytest.mark.parametrize("count", [2, 4, 9, 49, 64, 256, 512])
def test_the_published_rule_hardly_chooses(count: int) -> None:
    """One unit is protected on average, and the ratio of two units' chances to be dropped keeps its bound."""
    bound = E * (E + count - 1) / (1 + (count - 1) * E)
    torch.manual_seed(6)
    extremes = torch.stack([torch.rand(count), torch.eye(count)[0], 1 - torch.eye(count)[0], torch.zeros(count)])
    extremes = extremes * (count - 1) / count
    protect = protection(extremes.double(), "softmax")
    assert torch.allclose(protect.sum(-1), torch.ones(4, dtype=torch.float64))
    dropped = 1 - protect
    assert ((dropped > 0) & (dropped < 1)).all()
    assert (dropped.amax(-1) / dropped.amin(-1) <= bound).all()
    assert count < 64 or bound < 1.04
    assert count == 2 or (1 - protection(extremes, "minmax")[0]).min() == 0  # as the other rule does not


def test_what_is_kept_is_scaled_to_the_mean() -> None:
    torch.manual_seed(7)
    x = torch.ones(6, 5, 7, 8)
    for layer in (CorrDropChannel(0.4), CorrDropSpatial(0.6, 3)):
        assert abs(layer(x).double().mean() - 1) <= 1e-6
        layer.rescale = "sample"
        assert torch.allclose(layer(x).double().mean((1, 2, 3)), torch.ones(6, dtype=torch.float64), atol=1e-6)
        layer.rescale = "none"
        assert set(layer(x).unique().tolist()) == {0.0, 1.0}


def test_where_nothing_is_left_everything_is_kept() -> None:
    """All numbers fall so that nothing is protected, and p is 1: in the whole batch, or in one sample."""
    x, drawn = torch.rand(3, 4, 6, 6) + 1, torch.stack([torch.full((3, 4), 0.999), torch.zeros(3, 4)])
    for call in (corrdrop_channel, lambda x, p, **options: corrdrop_spatial(x, p, 3, **options)):
        assert torch.equal(call(x, 1.0, drawn=drawn), x)
        assert not call(x, 1.0, drawn=drawn, rescale="none").any()
        some = drawn.clone()
        some[0, 1] = 0
        assert torch.equal(call(x, 1.0, drawn=some, rescale="sample"), x)
        assert torch.equal(call(x, 1.0, drawn=some)[1], 3 * x[1]) and not call(x, 1.0, drawn=some)[::2].any()


@pytest.mark.parametrize("gamma", ["softmax", "minmax"])
def test_a_unit_that_is_alone_stays(gamma: Any) -> None:
    one, point = torch.randn(4, 1, 5, 5), torch.randn(4, 6, 1, 1)
    for p in (0.5, 1.0):
        assert torch.equal(corrdrop_channel(one, p, gamma=gamma), one)
        assert torch.equal(corrdrop_spatial(point, p, 1, gamma=gamma), point)
        assert torch.equal(corrdrop_spatial(one, p, 5, gamma=gamma), one)
        assert torch.equal(corrdrop_spatial(one, p, 7, gamma=gamma), one)  # on a smaller image than it was built for


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_drops_what_float32_drops(dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    x, drawn = (torch.randn(8, 32, 14, 14) * 200).to(dtype), torch.rand(2, 8, 32)
    for mixed in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            for gamma in ("softmax", "minmax"):
                y = corrdrop_channel(x, 0.3, drawn=drawn, gamma=gamma)
                assert torch.equal(y == 0, corrdrop_channel(x.float(), 0.3, drawn=drawn, gamma=gamma) == 0)
                assert torch.equal(scores(x, 1, 5, False), scores(x.float(), 1, 5, False))


def test_the_gradient_is_the_mask() -> None:
    """Times its scale, exactly, and nothing comes through the score."""
    torch.manual_seed(2)
    x = torch.randn(4, 5, 7, 8, requires_grad=True)
    for y in (corrdrop_channel(x, 0.5), corrdrop_spatial(x, 0.8, 3)):
        (factor,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(factor * x, y) and len(factor.unique()) == 2


@pytest.mark.parametrize("layer", [CorrDropChannel(0.4), CorrDropSpatial(0.6, 3)], ids=["channel", "spatial"])
def test_channels_at_the_end(layer: Any) -> None:
    torch.manual_seed(9)
    x = torch.randn(3, 6, 8, 7)
    expected = drawn_alike(layer, x)
    layer.build(channel_axis=-1, channels=6, shape=(3, 8, 7, 6), site_id="a")
    assert torch.equal(drawn_alike(layer, x.movedim(1, -1)).movedim(-1, 1), expected)


def drawn_alike(layer: Any, x: Tensor, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    y: Tensor = layer(x)
    return y


def test_signals_volumes_and_tokens_have_channels_too() -> None:
    """Their positions are a row of the score, however many axes they have."""
    torch.manual_seed(10)
    x, drawn = torch.randn(4, 6, 12), torch.rand(2, 4, 6)
    flat = corrdrop_channel(x.unsqueeze(-1), 0.5, drawn=drawn).squeeze(-1)
    assert torch.equal(corrdrop_channel(x, 0.5, drawn=drawn, channel_axis=1), flat)
    assert torch.equal(corrdrop_channel(x.mT, 0.5, drawn=drawn, channel_axis=-1), flat.mT)
    assert torch.equal(corrdrop_channel(x.view(4, 6, 2, 3, 2), 0.5, drawn=drawn), flat.view(4, 6, 2, 3, 2))


def test_where_the_input_comes_from_is_seen_when_built() -> None:
    """Behind a ReLU the sum of the products is one with the sum, whatever is dropped for the same numbers."""
    x = torch.randn(3, 6, 9, 8).relu()
    for producer, known in (
        (("activation", "relu"), True),
        (("activation", "sigmoid"), True),
        (("softmax",), True),
        (("activation",), False),
        (("norm", "batch_norm"), False),
        ((), False),
    ):
        for layer in (CorrDropChannel(0.4), CorrDropSpatial(0.6, 3)):
            plain = drawn_alike(layer, x)
            layer.producer = producer
            layer.build(channel_axis=1, channels=6, shape=(3, 6, 9, 8), site_id="a")
            assert layer.nonnegative is known and torch.equal(drawn_alike(layer, x), plain)


def test_refusals() -> None:
    facts: dict[str, Any] = {"channel_axis": 1, "channels": 8, "site_id": "a"}
    for cls in (CorrDropChannel, CorrDropSpatial):
        for option, words in (("gamma", "'softmax' or 'minmax'"), ("rescale", "'batch', 'sample' or 'none'")):
            with pytest.raises(SurgeryError, match=f"{option}: expected {words}, got 'all'"):
                cls(**{option: "all"})
        with pytest.raises(SurgeryError, match="scope: expected 'batch' or 'sample', got 'none'"):
            cls(scope="none")
        for bad in (1, 2.0, True):
            with pytest.raises(SurgeryError, match="max_units: expected an integer of 2 or more"):
                cls(max_units=bad)
    for bad in (0, 2.5, True):
        with pytest.raises(SurgeryError, match="block_size: expected an integer of 1 or more"):
            CorrDropSpatial(block_size=bad)
    with pytest.raises(SurgeryError, match=r"corrdrop_channel at a: expected 2 to 7 channels .* got 8 .*max_units"):
        CorrDropChannel(max_units=7).build(shape=(2, 8, 9, 9), **facts)
    with pytest.raises(
        SurgeryError, match=r"corrdrop_spatial at a: expected 2 to 4096 blocks .* got 6272 .*block_size"
    ):
        CorrDropSpatial(block_size=1).build(shape=(2, 8, 112, 56), **facts)
    CorrDropSpatial(block_size=1, max_units=6272).build(shape=(2, 8, 112, 56), **facts)
    with pytest.raises(
        SurgeryError, match=r"corrdrop_channel at a: expected 2 to 4096 channels .* got 1 .*use dropout"
    ):
        CorrDropChannel().build(channel_axis=1, channels=1, shape=(2, 1, 9, 9), site_id="a")
    with pytest.raises(SurgeryError, match=r"corrdrop_spatial at a: expected 2 to 4096 blocks .* got 1 .*use dropout"):
        CorrDropSpatial(block_size=7).build(shape=(2, 8, 7, 7), **facts)
    with pytest.raises(SurgeryError, match="expected maps of 5x5 or more for block_size 5, got 9x4; lower block_size"):
        CorrDropSpatial().build(shape=(2, 8, 9, 4), **facts)
    with pytest.raises(SurgeryError, match=r"corrdrop_spatial at a: expected maps .*\(2, 196, 64\).*use dropout"):
        CorrDropSpatial().build(channel_axis=-1, channels=64, shape=(2, 196, 64), site_id="a")
    with pytest.raises(SurgeryError, match="input of corrdrop_spatial: expected 4 dimensions"):
        corrdrop_spatial(torch.ones(2, 3, 4), 0.2)
    with pytest.raises(SurgeryError, match="input of corrdrop_channel: expected a channel axis"):
        corrdrop_channel(torch.ones(2, 3, 4), 0.2)


def test_repr() -> None:
    assert repr(CorrDropChannel()) == "CorrDropChannel(p=0.2)"
    assert repr(CorrDropChannel(scope="sample")) == "CorrDropChannel(p=0.2, scope='sample')"
    spatial = CorrDropSpatial(0.1, 3, gamma="minmax", rescale="none")
    assert repr(spatial) == "CorrDropSpatial(p=0.1, block_size=3, gamma='minmax', rescale='none')"


def test_the_operator_is_one() -> None:
    x = torch.randn(3, 5, 8, 7)
    for arguments in ((x, 1, 0, False), (x.bfloat16(), 1, 3, False), (x.movedim(1, -1), -1, 3, True)):
        torch.library.opcheck(torch.ops.dropsurgery.correlation_scores, arguments)


@pytest.mark.parametrize("layer", [CorrDropChannel(0.4), CorrDropSpatial(0.6, 3)], ids=["channel", "spatial"])
def test_samples_are_apart_by_scope_and_rescale_alone(layer: Any) -> None:
    """By "sample" what becomes of one does not hang on the others; by "batch" (the authors') it does."""
    torch.manual_seed(11)
    x = torch.randn(6, 5, 9, 7)
    other = torch.cat([x[:1], x[1:2].expand(5, -1, -1, -1) * torch.linspace(-1, 1, 5).view(-1, 5, 1, 1)])
    apart = []
    for scope, rescale in (("sample", "sample"), ("batch", "sample"), ("sample", "batch")):
        layer.gamma, layer.scope, layer.rescale = "minmax", scope, rescale  # by minmax many are protected
        runs = [[drawn_alike(layer, each, seed)[0] for seed in range(20)] for each in (x, other)]
        apart.append(all(map(torch.equal, *runs)))
    assert apart == [True, False, False]


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("call", [corrdrop_channel, corrdrop_spatial])
@pytest.mark.parametrize("shape", [(32, 512, 7, 7), (2, 2048, 14, 14), (1, 64, 112, 112)])
def test_memory_is_bounded(call: Any, shape: tuple[int, ...], nonnegative: bool) -> None:
    """Input, output and all between them take at most three times the input; all pairs at once would take more."""
    x = torch.rand(shape)
    options: dict[str, Any] = {"block_size": 2} if call is corrdrop_spatial else {}
    options["nonnegative"] = nonnegative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call(x, 0.2, **options)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert 1 + max(itertools.accumulate(sizes)) / (x.numel() * x.itemsize) <= 3


# ---- in a real net ----

SITES = {f"layer{stage}.{block}.bn2#0:conv_bn.output" for stage in (3, 4) for block in (0, 1)}


@pytest.mark.parametrize("name", ["corrdrop_channel", "corrdrop_spatial"])
def test_recipes_in_a_resnet(name: str) -> None:
    """Behind bn2 and before the sum, off at the first step and at p from the 200th on; p' is what is dropped there."""
    torch.manual_seed(0)
    model, x = timm.create_model("resnet18", zero_init_last=False), torch.randn(2, 3, 224, 224)
    gm: Any = apply_recipe(model, f"{name}_resnet_g34", total_steps=1000, seed=0)
    layers = gm.surgery.regularizers
    assert set(layers) == SITES
    if name == "corrdrop_spatial":
        assert {site[:6]: layer.block_size for site, layer in layers.items()} == {"layer3": 5, "layer4": 3}
    with torch.no_grad():
        assert torch.equal(gm.train()(x), model.train()(x))
    for step in range(1000):
        assert all(float(each.p) == pytest.approx(0.2 * min(1.0, step / 199)) for each in layers.values())
        gm.surgery.step()
    seen: dict[str, Tensor] = {}
    for site, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, inputs, site=site: seen.update({site: inputs[0]}))
    with torch.no_grad():
        assert not torch.equal(gm(x), model(x))
    for site, layer in layers.items():
        units = layer.units(tuple(seen[site].shape))
        found = scores(seen[site], 1, getattr(layer, "block_size", 0), False)
        dropped = 1 - protection(found.double(), "softmax")
        ratio = dropped.amax(-1) / dropped.amin(-1)
        assert (ratio > 1).all() and (ratio <= E * (E + units - 1) / (1 + (units - 1) * E)).all()
        assert (ratio < MEASURED[name]).all()
    rows = {row.site: row for row in gm.surgery.audit(x)}
    for site, row in rows.items():
        expected = {"layer3": 0.2 * 196 / 225, "layer4": 0.2 * 49 / 81}[site[:6]] if name == "corrdrop_spatial" else 0.2
        assert row.p == pytest.approx(0.2) and row.expected == pytest.approx(expected, abs=1e-5)


# The largest ratios of two units' chances to be dropped that a ResNet-18 showed, as the files say.
MEASURED = {"corrdrop_channel": 1.0006, "corrdrop_spatial": 1.035}
