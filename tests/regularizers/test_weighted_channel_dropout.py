"""Weighted channel dropout against the paper's algorithm in plain loops, with the same numbers, and its statistics."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from dropsurgery import SurgeryWarning, apply_recipe, plan_recipe
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers import _channels
from dropsurgery.regularizers import weighted_channel_dropout as module
from dropsurgery.regularizers._uniform import keyed_uniform
from dropsurgery.regularizers.weighted_channel_dropout import (
    WeightedChannelDropout,
    channel_scores,
    kept_channels,
    weighted_channel_dropout,
)

CPU = torch.device("cpu")


@pytest.fixture(params=["on the CPU", "torch's operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let channels be ranked as on the CPU, or as on other devices."""
    if request.param != "on the CPU":
        monkeypatch.setattr(_channels, "is_transformed", lambda: True)


# ---- the algorithm in loops ----


def reference(x: Tensor, p: float, q: float, drawn: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Which channels are kept, (B, C), and what the sample is scaled by, (B, 1)."""
    values, numbers = x.double().numpy(), drawn.double().numpy()
    batch, channels = values.shape[:2]
    kept, alpha = np.zeros((batch, channels), dtype=bool), np.ones((batch, 1))
    for b in range(batch):
        scores = [max(0.0, values[b, c].mean()) for c in range(channels)]
        if sum(scores) == 0:
            kept[b] = True
            continue
        # In float64 r^(1 / s) underflows too, where s is below 1e-3: its logarithm does not.
        keys = [math.log(max(r, 1e-38)) / s if s else -math.inf for r, s in zip(numbers[0, b], scores, strict=True)]
        order = sorted(range(channels), key=lambda c: (-keys[c], c))
        selected = order[: max(1, int(channels * (1 - p) + 1e-9))]
        left = [c for c in selected if numbers[1, b, c] < q]
        if sum(scores[c] for c in left) == 0:
            left = order[:1]
        kept[b, left] = True
        alpha[b] = sum(scores) / sum(scores[c] for c in left)
    return kept, alpha


def relu_maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).relu()


def with_dead_channels(*shape: int) -> Tensor:
    x = relu_maps(*shape)
    x[:, ::2] = 0
    return x


def of_many_sizes(*shape: int) -> Tensor:
    """Scores from 1e-6 to 1e6, which no power r^(1 / score) could tell apart."""
    sizes = torch.logspace(-6, 6, shape[1])[torch.randperm(shape[1], generator=torch.Generator().manual_seed(0))]
    return relu_maps(*shape) * sizes[:, None, None]


MAPS: dict[str, Callable[[], Tensor]] = {
    "random, with negative means": lambda: torch.randn(6, 20, 4, 4, generator=torch.Generator().manual_seed(1)),
    "relu": lambda: relu_maps(6, 20, 14, 14),
    "non-square": lambda: relu_maps(6, 15, 5, 9),
    "dead channels": lambda: with_dead_channels(6, 20, 7, 7),
    "many sizes": lambda: of_many_sizes(6, 20, 5, 5),
    "small": lambda: 1e-12 * relu_maps(6, 20, 5, 5),
    "constant": lambda: torch.full((6, 10, 5, 5), 0.5),
    "all zero": lambda: torch.zeros(3, 10, 5, 5),
    "one sample of zeros": lambda: torch.cat([torch.zeros(1, 10, 5, 5), relu_maps(2, 10, 5, 5)]),
    "all negative": lambda: -torch.rand(3, 10, 5, 5, generator=torch.Generator().manual_seed(2)) - 0.1,
    "one channel": lambda: relu_maps(6, 1, 5, 5),
    "one point": lambda: torch.rand(6, 10, 1, 1, generator=torch.Generator().manual_seed(2)),
    "one sample": lambda: relu_maps(1, 20, 6, 6),
    "one live channel": lambda: torch.eye(10)[3].view(1, 10, 1, 1).expand(4, 10, 3, 3),
}
RATES = [(0.2, 0.9), (0.5, 0.5), (1.0, 1.0), (0.9, 0.1), (0.0, 0.5)]


@pytest.mark.parametrize(("p", "q"), RATES)
@pytest.mark.parametrize("kind", MAPS)
def test_the_mask_is_the_algorithms(way: None, kind: str, p: float, q: float) -> None:
    x, key = MAPS[kind](), torch.tensor(int(100 * p + 10 * q))
    drawn = keyed_uniform((2, *x.shape[:2]), CPU, key)
    kept, alpha = reference(x, p, q, drawn)
    assert np.array_equal(kept_channels(channel_scores(x), torch.tensor(p), q, drawn).numpy(), kept)
    y = weighted_channel_dropout(x, p, q, key=key)
    expected = x.double().numpy() * (kept * alpha)[:, :, None, None]
    assert y.isfinite().all() and np.allclose(y.numpy(), expected, rtol=1e-5, atol=0)


def test_a_wrong_variant_fails_the_same_check() -> None:
    """The negative controls: the key r^(-score), a scale over what was selected before the filter, another filter."""
    x, key, p, q = relu_maps(6, 20, 7, 7), torch.tensor(3), 0.4, 0.7
    drawn = keyed_uniform((2, 6, 20), CPU, key)
    kept, alpha = reference(x, p, q, drawn)
    scores = channel_scores(x).double().numpy()
    wrong = np.argsort(-(drawn[0].double().numpy() ** -scores), axis=1)[:, :12]
    by_wrong_key = np.zeros_like(kept)
    np.put_along_axis(by_wrong_key, wrong, True, 1)
    assert not np.array_equal(by_wrong_key & (drawn[1].numpy() < q), kept)
    assert not np.array_equal(reference(x, p, q, drawn[[0, 0]])[0], kept)
    selected, _ = reference(x, p, 1.0, drawn)
    of_selected = scores.sum(1, keepdims=True) / (scores * selected).sum(1, keepdims=True)
    sums = weighted_channel_dropout(x, p, q, key=key).double().mean((2, 3)).sum(1).numpy()
    assert np.allclose(sums, scores.sum(1), rtol=1e-5)
    assert not np.allclose(sums / alpha[:, 0] * of_selected[:, 0], scores.sum(1), rtol=1e-2)


@pytest.mark.parametrize(("p", "q"), RATES)
def test_the_sum_of_means_is_kept(p: float, q: float) -> None:  # P1
    torch.manual_seed(0)
    for x in (relu_maps(8, 64, 7, 7), with_dead_channels(8, 64, 7, 7), relu_maps(8, 64, 7, 7).double()):
        y = weighted_channel_dropout(x, p, q)
        before, after = (each.double().mean((2, 3)).sum(1) for each in (x, y))
        assert torch.allclose(after, before, rtol=1e-5 if x.dtype == torch.float32 else 1e-12)


def test_as_many_are_selected_as_asked() -> None:  # P2
    """Exactly before the filter, and binomially after it; a filter of 0.6 (the control) is told from one of 0.7."""
    torch.manual_seed(0)
    scores = torch.rand(3000, 50) + 0.1
    for p, selected in ((0.2, 40), (0.35, 32), (0.99, 1), (1.0, 1)):
        kept = kept_channels(scores, torch.tensor(p), 1.0, torch.rand(2, 3000, 50))
        assert (kept.sum(1) == selected).all()
    passed = kept_channels(scores, torch.tensor(0.2), 0.7, torch.rand(2, 3000, 50)).sum().item()
    for q in (0.7, 0.6):
        error = math.sqrt(3000 * 40 * q * (1 - q))
        assert (abs(passed - 3000 * 40 * q) <= 3 * error) == (q == 0.7)


def inclusion(scores: list[float], count: int) -> list[float]:
    """The probability with which each is among the first `count` drawn one after the other, by weight."""
    found = [0.0] * len(scores)
    for picked in itertools.permutations(range(len(scores)), count):
        chance, left = 1.0, sum(scores)
        for each in picked:
            chance, left = chance * scores[each] / left, left - scores[each]
        for each in picked:
            found[each] += chance
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
def test_how_often_a_channel_is_selected(count: int) -> None:  # P3
    """By weights one after the other; in proportion to the scores for one alone, and (the control) not for more."""
    torch.manual_seed(0)
    scores, times = [8.0, 4.0, 2.0, 1.0, 1.0], 200_000
    drawn = torch.rand(2, times, 5)
    kept = kept_channels(torch.tensor(scores).expand(times, 5), torch.tensor(1 - count / 5), 1.0, drawn)
    share = kept.double().mean(0)

    def fits(expected: list[float]) -> bool:
        chance = torch.tensor(expected, dtype=torch.float64)
        return bool(((share - chance).abs() <= 3.5 * (chance * (1 - chance) / times).sqrt()).all())

    assert fits(inclusion(scores, count))
    assert fits([count * each / sum(scores) for each in scores]) == (count == 1)


def test_keys_do_not_underflow() -> None:  # P4
    """The order is that of r^(1 / s) in float64, also where that is 0 in float32 (the control)."""
    torch.manual_seed(0)
    scores = 0.02 * torch.rand(40, 64) + 0.005
    drawn = torch.rand(2, 40, 64).clamp(min=0.05)
    keys = drawn[0].double() ** (1 / scores.double())
    assert (keys > 0).all()
    for count in (1, 16, 48):
        kept = kept_channels(scores, torch.tensor(1 - count / 64), 1.0, drawn)

        def best(keys: Tensor, count: int = count) -> Tensor:
            order = keys.argsort(dim=1, descending=True, stable=True)[:, :count]
            return torch.zeros(40, 64, dtype=torch.bool).scatter(1, order, True)

        assert torch.equal(kept, best(keys))
    assert not torch.equal(kept, best(drawn[0] ** (1 / scores)))


def test_the_smallest_and_the_largest_numbers() -> None:
    """A number of 0 is the lowest key, and finite; scores at the ends of float32 do not meet."""

    def kept(scores: list[float], p: float, number: float) -> list[bool]:
        return kept_channels(torch.tensor([scores]), torch.tensor(p), 1.0, torch.full((2, 1, 3), number))[0].tolist()

    assert kept([1.0, 2.0, 0.0], 0.5, 0.0) == [False, True, False]
    assert kept([1e-37, 1e37, 0.0], 0.5, 0.5) == [False, True, False]
    assert kept([1e-37, 1e37, 0.0], 0.3, 0.5) == [True, True, False]
    y = weighted_channel_dropout(torch.full((2, 4, 3, 3), 3e38), 0.0, 1.0)
    assert not y.isnan().any()


def test_at_no_rate_scores_do_not_matter() -> None:  # P5
    drawn = torch.rand(2, 50, 20, generator=torch.Generator().manual_seed(0))
    for scores in (torch.rand(50, 20) + 0.1, torch.rand(50, 20) ** 8 + 1e-9):
        assert torch.equal(kept_channels(scores, torch.tensor(0.0), 0.8, drawn), drawn[1] < 0.8)
    assert not torch.equal(kept_channels(scores, torch.tensor(0.2), 0.8, drawn), drawn[1] < 0.8)


def test_dead_channels_come_last() -> None:  # P6
    """Of 12 live ones 10 are selected, and no dead one; of 8, these and two dead ones. A tiny score is no dead one."""
    torch.manual_seed(0)
    scores, drawn = torch.rand(500, 20) * 1e-30 + 1e-37, torch.rand(2, 500, 20)
    dead = torch.arange(20) % 5 < 2
    kept = kept_channels(scores.masked_fill(dead, 0), torch.tensor(0.5), 1.0, drawn)
    assert not kept[:, dead].any() and (kept.sum(1) == 10).all()
    dead = torch.arange(20) % 5 < 3
    kept = kept_channels(scores.masked_fill(dead, 0), torch.tensor(0.5), 1.0, drawn)
    assert kept[:, ~dead].all() and (kept.sum(1) == 10).all()


def test_nothing_is_wiped_out() -> None:
    """Where the filter leaves nothing of value, the best key stays alone; without any score the sample stays."""
    x = torch.tensor([3.0, 1.0, 0.0]).view(1, 3, 1, 1).expand(400, 3, 2, 2)
    torch.manual_seed(0)
    y = weighted_channel_dropout(x, 0.1, 1e-6)
    assert ((y != 0).flatten(2).any(2).sum(1) == 1).all() and (y.sum((1, 2, 3)) == 16).all()
    share = float((y[:, 0, 0, 0] != 0).double().mean())
    assert abs(share - 0.75) <= 4 * math.sqrt(0.75 * 0.25 / 400)
    for silent in (torch.zeros(2, 3, 4, 4), -torch.ones(2, 3, 4, 4)):
        assert torch.equal(weighted_channel_dropout(silent, 0.5, 0.5), silent)


def test_a_bounded_scale() -> None:
    """`alpha_max` cuts it, and with it the sum."""
    x = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1).expand(200, 2, 2, 2)
    torch.manual_seed(0)
    free = weighted_channel_dropout(x, 0.5, 1.0)
    torch.manual_seed(0)
    bound = weighted_channel_dropout(x, 0.5, 1.0, alpha_max=2.0)
    weak = free[:, 0] != 0
    assert free[:, 0][weak].unique().tolist() == [4.0] and bound[:, 0][weak].unique().tolist() == [2.0]
    assert torch.equal(free[:, 1], bound[:, 1])


def test_float16_holds_what_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of 1e5, and sums beyond 65504 in one channel: unbounded (the control) they are infinite, 0 * inf NaN."""
    few = torch.tensor([1000.0, 0.001]).view(1, 2, 1, 1).expand(64, 2, 2, 2).half()
    much = torch.full((4, 200, 2, 2), 1000.0).half()
    largest = torch.full((4, 3, 2, 2), 65504.0).half()
    weak = torch.stack([torch.tensor([1e-30, 0.9999999]).expand(64, 2), torch.zeros(64, 2)])
    assert kept_channels(channel_scores(few), torch.tensor(0.5), 1.0, weak)[:, 1].all()
    for x, p in ((few, 0.5), (much, 0.99), (largest, 0.2)):
        if x is few:
            monkeypatch.setattr(module, "uniform", lambda *_: weak)
        else:
            monkeypatch.undo()
        x = x.clone().requires_grad_()
        torch.manual_seed(0)
        y = weighted_channel_dropout(x, p, 1.0)
        y.float().sum().backward()
        assert y.dtype == torch.float16 and y.isfinite().all() and x.grad.isfinite().all()
    unbounded = torch.tensor(1e6).half()
    assert (few * unbounded).isinf().all() and (0 * unbounded).isnan() and (much * 200).isinf().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_keeps_what_float32_keeps(dtype: torch.dtype) -> None:  # C-5
    for kind in MAPS:
        x = MAPS[kind]().clamp(-60000, 60000).to(dtype)
        drawn = torch.rand(2, *x.shape[:2], generator=torch.Generator().manual_seed(0))
        wide = kept_channels(channel_scores(x.float()), torch.tensor(0.4), 0.8, drawn)
        assert torch.equal(kept_channels(channel_scores(x), torch.tensor(0.4), 0.8, drawn), wide)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(kept_channels(channel_scores(x), torch.tensor(0.4), 0.8, drawn), wide)
        assert weighted_channel_dropout(x, 0.4).dtype == dtype and weighted_channel_dropout(x, 0.4).isfinite().all()


def test_the_gradient_is_mask_times_scale() -> None:  # C-7, C-8
    x = relu_maps(4, 10, 5, 7).add_(0.1).requires_grad_()
    y = weighted_channel_dropout(x, 0.3, 0.8)
    upstream = torch.randn(y.shape)
    y.backward(upstream)
    assert torch.allclose(x.grad, upstream * (y.detach() / x.detach()), rtol=1e-6)
    assert torch.equal((y == 0).flatten(2).all(2), (x.grad == 0).flatten(2).all(2))


def test_layouts() -> None:
    x, key = relu_maps(4, 20, 6, 9), torch.tensor(3)
    y = weighted_channel_dropout(x, 0.3, key=key)
    last = weighted_channel_dropout(x.to(memory_format=torch.channels_last), 0.3, key=key)
    assert torch.allclose(last, y, rtol=1e-5) and last.is_contiguous(memory_format=torch.channels_last)
    tokens = weighted_channel_dropout(x.flatten(2).mT, 0.3, channel_axis=-1, key=key)
    assert torch.allclose(tokens.mT, y.flatten(2), rtol=1e-5)
    layer = WeightedChannelDropout(0.3)
    layer.build(channel_axis=-1, channels=20, shape=(4, 6, 9, 20), site_id="a")
    torch.manual_seed(0)
    first = layer(x.movedim(1, -1))
    torch.manual_seed(0)
    assert torch.allclose(first.movedim(-1, 1), weighted_channel_dropout(x, 0.3), rtol=1e-5)


def test_a_sample_does_not_hang_on_the_others() -> None:  # C-6
    x, key = relu_maps(6, 20, 7, 7), torch.tensor(1)
    mixed = torch.cat([x[:2], 10 * relu_maps(4, 20, 7, 7, seed=5)])
    y, other = (weighted_channel_dropout(each, 0.3, key=key) for each in (x, mixed))
    assert torch.allclose(other[:2], y[:2], rtol=1e-6) and not torch.allclose(other[2:], y[2:])


@pytest.mark.parametrize(("channels", "p", "q"), [(20, 0.2, 0.9), (3, 0.6, 0.2), (5, 0.5, 0.5), (10, 0.05, 0.8)])
def test_the_share_that_is_dropped(channels: int, p: float, q: float) -> None:
    """As `expected_drop` says, within 4 standard errors; that is more than p, unless hardly any is left anyway."""
    torch.manual_seed(0)
    layer, x = WeightedChannelDropout(p, q), torch.rand(20_000, channels, 1, 2) + 0.1
    shares = (layer(x)[:, :, 0, 0] == 0).double().mean(1)
    expected = layer.expected_drop(tuple(x.shape))
    assert abs(shares.mean() - expected) <= 4 * shares.std() / math.sqrt(len(shares)) + 1e-12
    assert expected > p or channels == 3


def test_refusals_and_the_warning() -> None:
    for bad in (0, 1.5, True, "0.9", -1):
        with pytest.raises(SurgeryError, match="q: expected a number above 0 and up to 1, got"):
            WeightedChannelDropout(q=bad)
    for bad in (0.5, "2", True):
        with pytest.raises(SurgeryError, match="alpha_max: expected a number of 1 or more, or nothing, got"):
            WeightedChannelDropout(alpha_max=bad)
    with pytest.raises(SurgeryError, match=r"weighted_channel_dropout at a: expected maps .* got .*; use dropout"):
        WeightedChannelDropout().build(channel_axis=-1, channels=6, shape=(2, 6), site_id="a")
    for producer, warned in (("norm", "batch_norm"), True), (("activation",), True), (("activation", "relu"), False):
        layer = WeightedChannelDropout()
        layer.producer = producer
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            layer.build(channel_axis=1, channels=6, shape=(2, 6, 5, 5), site_id="a")
        assert [each.category for each in seen] == [SurgeryWarning] * warned
        assert all("channels with a negative mean count as 0" in str(each.message) for each in seen)


def test_repr_and_off() -> None:
    assert repr(WeightedChannelDropout()) == "WeightedChannelDropout(p=0.2, q=0.9)"
    assert repr(WeightedChannelDropout(alpha_max=5)) == "WeightedChannelDropout(p=0.2, q=0.9, alpha_max=5)"
    x = torch.rand(2, 4, 3, 3)
    assert WeightedChannelDropout(0.0)(x) is x and WeightedChannelDropout(0.0).expected_drop((2, 4, 3, 3)) == 0


def test_recipe_on_a_resnet() -> None:
    """Behind the first and the last block of layer4, where sums of means are kept; the audit has 0.2 and 0.28."""
    torch.manual_seed(0)
    model, image = timm.create_model("resnet50", num_classes=3), torch.randn(2, 3, 64, 64)
    gm = apply_recipe(model, "weighted_channel_dropout_resnet", example_inputs=image)
    sites = [edit.site.id for edit in gm.surgery.plan.edits]
    assert sites == ["layer4.0.act3#0:block_end.output", "layer4.2.act3#0:block_end.output"]
    for row in gm.surgery.audit(image):
        assert row.p == 0.2 and row.expected == pytest.approx(1 - int(0.8 * 2048) * 0.9 / 2048)
        assert abs(row.measured - row.expected) <= 4 * math.sqrt(1638 * 0.09 * 2) / (2 * 2048)
    seen = []
    for site in sites:
        layer = gm.surgery.regularizers[site]
        layer.register_forward_hook(lambda _, given, y: seen.append((given[0].detach(), y.detach())))
    gm.train()(image)
    assert len(seen) == 2
    for given, y in seen:
        before, after = (each.double().mean((2, 3)).sum(1) for each in (given, y))
        assert torch.allclose(before, after, rtol=1e-5) and not torch.equal(given, y)
    assert torch.equal(gm.eval()(image), model.eval()(image))


def test_recipe_on_a_vgg() -> None:
    plan = plan_recipe(timm.create_model("vgg16", num_classes=3, mlp_ratio=0.02), "weighted_channel_dropout_vgg")
    assert [(edit.site.id, edit.p, edit.arguments["q"]) for edit in plan.edits] == [
        ("features.23#0:pool.output", 0.2, 0.9),
        ("features.30#0:pool.output", 0.1, 0.5),
    ]
