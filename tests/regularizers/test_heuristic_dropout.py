"""Heuristic dropout against its formulas in plain loops: scores, choice, kernel, gradients, and what it really does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from dropsurgery import apply_recipe, plan_recipe
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers import heuristic_dropout as module
from dropsurgery.regularizers.heuristic_dropout import (
    HeuristicDropout,
    channel_scores,
    filtered,
    heuristic_dropout,
    highest,
)

SHAPES = [(3, 8, 14, 14), (2, 16, 7, 7), (2, 5, 3, 9), (1, 1, 4, 4), (2, 3, 1, 1), (1, 4, 1, 6), (2, 4, 2, 1)]


# ---- the formulas, in float64 and without a tensor ----


def entropy(values: list[float], bins: int = 10, signed: bool = False) -> float:
    quantised = [round(bins * math.tanh(value)) for value in values]
    counted = Counter(q for q in quantised if signed or q >= 0)
    total = sum(counted.values())
    return -sum(n / total * math.log(n / total) for n in counted.values())


def variance(values: list[float]) -> float:
    if len(values) == 1:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def score(values: list[float], k: float = 2.0, bins: int = 10, eps: float = 1e-7, signed: bool = False) -> float:
    return entropy(values, bins, signed) + k / (variance(values) + eps)


def scores_of(x: Tensor, rule: Callable[..., float] = score, **options: Any) -> np.ndarray:
    return np.array([[rule(maps.flatten().tolist(), **options) for maps in sample] for sample in x.double()])


def chosen_by(scores: np.ndarray, p: float) -> np.ndarray:
    """Which are the round(p * C) highest; Python rounds half to even, and sorts stably."""
    chosen = np.zeros(scores.shape, bool)
    for sample, row in zip(chosen, scores, strict=True):
        sample[sorted(range(len(row)), key=lambda c: -row[c])[: round(Fraction(str(p)) * len(row))]] = True
    return chosen


def laplace(maps: np.ndarray) -> np.ndarray:
    height, width = maps.shape
    y = np.zeros_like(maps)
    for i in range(height):
        for j in range(width):
            around = maps[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            y[i, j] = 8 * maps[i, j] - (around.sum() - maps[i, j])
    return y


def expected_of(x: Tensor, p: float, mask: str = "laplace", **options: Any) -> np.ndarray:
    y, chosen = x.double().numpy().copy(), chosen_by(scores_of(x, **options), p)
    for b, c in zip(*chosen.nonzero(), strict=True):
        y[b, c] = laplace(y[b, c]) if mask == "laplace" else 0
    return y


def close(y: Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    return bool(np.allclose(y.double().numpy(), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()))


def maps_like(kind: str, shape: tuple[int, ...] = (3, 10, 8, 9)) -> Tensor:
    """Maps of one kind, with scores far enough apart to be ordered alike in float32."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * torch.linspace(0.5, 2, shape[1])[:, None, None]
    if kind == "relu":
        return x.relu()
    if kind == "below zero":
        return -x.abs() - 0.1
    if kind == "dead channels":
        x[:, 1::3] = 0
    if kind == "ties":
        x[:, 1::2] = x[:, :1]
    if kind == "constant":
        x[:] = 0.7
    if kind == "all zero":
        x[:] = 0
    return x


KINDS = ["random", "relu", "below zero", "dead channels", "ties", "constant", "all zero"]


@pytest.fixture(params=["in parts", "at once"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all be done as on the CPU, or as on other devices."""
    if request.param == "at once":
        monkeypatch.setattr(module, "_is_at_once", lambda maps: True)


# ---- the score ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_formula(way: None, shape: tuple[int, ...], kind: str) -> None:
    x = maps_like(kind, shape)
    assert np.allclose(channel_scores(x).numpy(), scores_of(x), rtol=1e-5)
    options = {"k": 0.1, "bins": 4, "eps": 1e-3}
    assert np.allclose(channel_scores(x, **options).numpy(), scores_of(x, **options), rtol=1e-5)
    signed = channel_scores(x, 0.5, signed_bins=True)
    assert np.allclose(signed.numpy(), scores_of(x, k=0.5, signed=True), rtol=1e-5)


def test_scores_of_float64_are_of_float64() -> None:
    x = maps_like("random").double()
    assert channel_scores(x).dtype == torch.float64
    assert np.allclose(channel_scores(x).numpy(), scores_of(x), rtol=1e-13)


WRONG: dict[str, Callable[[list[float]], float]] = {
    "variance of what is quantised": lambda v: entropy(v) + 2 / (variance([math.tanh(x) for x in v]) + 1e-7),
    "biased variance": lambda v: entropy(v) + 2 / (variance(v) * (len(v) - 1) / len(v) + 1e-7),
    "bits": lambda v: entropy(v) / math.log(2) + 2 / (variance(v) + 1e-7),
    "no entropy": lambda v: 2 / (variance(v) + 1e-7),
    "negative values counted": lambda v: score(v, signed=True),
    "ten bins": lambda v: score(v, bins=9),
}


@pytest.mark.parametrize("rule", WRONG.values(), ids=WRONG)
def test_other_scores_fail_the_same_check(rule: Callable[[list[float]], float]) -> None:
    x = maps_like("random")
    assert not np.allclose(channel_scores(x).numpy(), scores_of(x, rule), rtol=1e-5)


def test_entropy_is_between_0_and_that_of_equal_bins() -> None:
    """0 to ln 11: at k = 0 the score is the entropy, and the highest where each bin has as many values."""
    for kind in KINDS:
        found = channel_scores(maps_like(kind), 0.0)
        assert (found >= 0).all() and (found <= math.log(11)).all()
    even = torch.tensor([math.atanh(min(q / 10, 0.999)) for q in range(11)] * 3).view(1, 1, 3, 11)
    assert channel_scores(even, 0.0).item() == pytest.approx(math.log(11), rel=1e-6)
    signed = torch.cat([even, -even], -1)
    assert channel_scores(signed, 0.0, signed_bins=True).item() > math.log(20)


def test_without_a_value_that_counts_the_entropy_is_0() -> None:
    """Where the released code raises."""
    x = maps_like("below zero")
    assert not channel_scores(x, 0.0).any() and channel_scores(x, 0.0, signed_bins=True).all()


def test_a_constant_has_no_variance() -> None:
    """Whatever its size: a mean that is rounded must not make one, which 1 / eps would show."""
    for value, size in ((0.1, (14, 14)), (1234.567, (15, 15)), (6e4 + 0.1, (14, 14)), (6e4 + 0.1, (13, 17))):
        assert channel_scores(torch.full((1, 1, *size), value)).item() == pytest.approx(2e7, rel=1e-5)
    rounded = torch.full((196,), 6e4 + 0.1)
    assert 2 / ((rounded - rounded.sum() / 196).square().sum() / 195 + 1e-7) < 2e6  # what its own mean makes of it


# ---- the choice ----


@pytest.mark.parametrize("p", [0.02, 0.1, 0.125, 0.3, 0.35, 0.5, 0.7, 0.9, 1.0])
def test_as_many_as_the_share_rounds_to(p: float) -> None:
    """Half to even, also where a float has it a little beside the half; rounding down (Algorithm 1) would fail."""
    for channels in (1, 2, 3, 4, 5, 10, 15, 16, 25, 45, 64, 150, 512, 1023):
        expected = round(Fraction(str(p)) * channels)
        assert highest(torch.rand(2, channels), torch.tensor(p)).sum(1).tolist() == [expected] * 2
        assert HeuristicDropout(p).expected_drop((2, channels, 7, 7)) == expected / channels
    assert round(0.1 * 16) != math.floor(0.1 * 16)


def test_of_equal_scores_the_first() -> None:
    scores = torch.tensor([[1.0, 3, 2, 3, 3, 2, 0, 2], [0.0] * 8])
    assert highest(scores, torch.tensor(0.5)).nonzero()[:, 1].tolist() == [1, 2, 3, 4, 0, 1, 2, 3]


# ---- the whole ----


@pytest.mark.parametrize("mask", ["laplace", "zero"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_is_that_of_the_formula(way: None, shape: tuple[int, ...], kind: str, mask: str) -> None:
    x = maps_like(kind, shape)
    for p in (0.3, 1.0):
        y = heuristic_dropout(x, p, mask=mask)
        assert y.isfinite().all() and close(y, expected_of(x, p, mask))


def test_more_than_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """More elements than are worked on at once, in scores and filter; also where one sample is more than that."""
    x = maps_like("relu", (9, 20, 10, 11))
    expected = expected_of(x, 0.7)
    for part in (1, 100, 5000):
        monkeypatch.setattr(module, "_PART", part)
        assert close(heuristic_dropout(x, 0.7), expected)


def test_other_masks_fail_the_same_check() -> None:
    """The negative controls: the lowest scores, four neighbours, and the share rounded down."""
    x = maps_like("relu", (3, 16, 8, 9))
    chosen = torch.from_numpy(chosen_by(scores_of(x), 0.1))
    y = heuristic_dropout(x, 0.1)
    assert torch.equal(y, filtered(x, chosen))
    lowest = torch.from_numpy(chosen_by(-scores_of(x), 0.1))
    floored = torch.from_numpy(chosen_by(scores_of(x), 1 / 16))
    assert not close(y, filtered(x, lowest).numpy()) and not close(y, filtered(x, floored).numpy())
    four = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]])
    other = nn.functional.conv2d(x.flatten(0, 1)[:, None], four[None, None], padding=1).view_as(x)
    assert not close(y, torch.where(chosen[..., None, None], other, x).numpy())


def test_as_many_channels_change_as_the_share_says() -> None:
    for p in (0.1, 0.25, 0.5):
        x = maps_like("relu", (4, 24, 8, 8))
        changed = (heuristic_dropout(x, p) != x).flatten(2).any(2)
        assert changed.sum(1).tolist() == [round(p * 24)] * 4
        zeroed = (heuristic_dropout(x, p, mask="zero") == 0).flatten(2).all(2)
        assert torch.equal(zeroed, changed)


def test_nothing_is_drawn() -> None:
    x = maps_like("relu")
    state = torch.get_rng_state()
    assert torch.equal(heuristic_dropout(x, 0.3), heuristic_dropout(x, 0.3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not HeuristicDropout.random


def test_a_constant_keeps_its_frame() -> None:
    """0 inside, 3c on the edges, 5c in the corners: exactly 0, where a sum of nine would leave its rounding."""
    for value in (0.1, 1.0, -0.7, 123.456):
        x = torch.full((1, 1, 5, 6), value)
        y = heuristic_dropout(x, 1.0)[0, 0]
        assert not y[1:-1, 1:-1].any()
        for edge in (y[0, 1:-1], y[-1, 1:-1], y[1:-1, 0], y[1:-1, -1]):
            assert torch.allclose(edge, torch.tensor(3 * value), rtol=1e-6)
        assert torch.allclose(y[::4, ::5], torch.tensor(5 * value), rtol=1e-6)


def test_dead_channels_use_up_the_budget() -> None:
    """As many dead ones as are chosen: nothing is done at all. `skip_dead` gives their places to the others."""
    x = maps_like("relu", (2, 10, 8, 8)) + 0.1
    x[:, 2:5] = 0
    assert torch.equal(heuristic_dropout(x, 0.3), x)
    y = heuristic_dropout(x, 0.3, skip_dead=True)
    changed = (y != x).flatten(2).any(2)
    assert changed.sum(1).tolist() == [3, 3] and not changed[:, 2:5].any()
    living = [0, 1, 5, 6, 7, 8, 9]
    assert torch.equal(y[:, living], heuristic_dropout(x[:, living], 3 / 7))
    assert channel_scores(x, skip_dead=True)[:, 2:5].isneginf().all()
    # A constant is alive, and more channels than there are living ones are not made up.
    x[:, 5:] = 0.5
    assert (heuristic_dropout(x, 0.3, skip_dead=True) != x).flatten(2).any(2)[:, 5:8].all()
    zero = torch.zeros(2, 4, 3, 3)
    assert torch.equal(heuristic_dropout(zero, 0.5, skip_dead=True), zero)
    assert not highest(channel_scores(zero, skip_dead=True), torch.tensor(0.5)).any()


def test_a_sample_does_not_hang_on_the_others(way: None) -> None:
    x, other = maps_like("relu"), 10 * maps_like("random").flip(1)
    mixed = torch.cat([x[:1], other[1:]])
    assert torch.equal(heuristic_dropout(mixed, 0.3)[0], heuristic_dropout(x, 0.3)[0])


# ---- gradients ----


def test_gradient_is_the_kernel_over_what_comes_from_above(way: None) -> None:
    x = maps_like("relu").requires_grad_()
    above = torch.randn(x.shape)
    heuristic_dropout(x, 0.3).backward(above)
    chosen = torch.from_numpy(chosen_by(scores_of(x.detach()), 0.3))
    expected = above.double().numpy().copy()
    for b, c in chosen.nonzero().tolist():
        expected[b, c] = laplace(expected[b, c])
    assert chosen.any() and close(x.grad, expected)
    x.grad = None
    heuristic_dropout(x, 0.3, mask="zero").backward(above)
    assert torch.equal(x.grad, above * ~chosen[..., None, None])  # the mask times what comes from above


@pytest.mark.parametrize("mask", ["laplace", "zero"])
def test_derivatives_to_the_second(way: None, mask: str) -> None:
    """With the choice fixed, and of the whole: the score passes no gradient on."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.autograd.gradcheck(lambda x: filtered(x, chosen, mask), x)
    assert torch.autograd.gradgradcheck(lambda x: filtered(x, chosen, mask), x)
    assert torch.autograd.gradcheck(lambda x: heuristic_dropout(x, 0.4, mask=mask), x)
    assert not channel_scores(x).requires_grad


# ---- dtypes and layouts ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_chooses_what_float32_chooses(way: None, dtype: torch.dtype, kind: str) -> None:
    x = maps_like(kind).to(dtype)
    expected = heuristic_dropout(x.float(), 0.3).to(dtype)
    assert torch.equal(heuristic_dropout(x, 0.3), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(heuristic_dropout(x, 0.3), expected)
        assert torch.equal(heuristic_dropout(x.float(), 0.3).to(dtype), expected)


def test_scores_beyond_float16() -> None:
    """k / eps is infinite in float16; the scores are taken in float32."""
    x = maps_like("dead channels").half()
    assert torch.tensor(2e7).half().isinf()
    assert channel_scores(x).dtype == torch.float32 and channel_scores(x).isfinite().all()


def test_what_leaves_float16_is_cut(way: None) -> None:
    """8 x 60000 is beyond 65504. A gradient is not cut: who scales the loss has to see that it overflows."""
    x = torch.full((1, 2, 6, 6), -60000.0, dtype=torch.float16)
    x[..., 2, 3] = 60000
    x.requires_grad_()
    y = heuristic_dropout(x, 1.0)
    assert y.isfinite().all() and y[0, 0, 2, 3] == 65504
    y.backward(torch.full_like(y, 50000))
    assert x.grad.isinf().any()


def test_channels_at_the_end_and_other_layouts() -> None:
    x = maps_like("relu")
    expected = heuristic_dropout(x, 0.3)
    layer = HeuristicDropout(0.3)
    layer.build(channel_axis=-1, channels=10, shape=(3, 8, 9, 10), site_id="a")
    assert torch.equal(layer(x.movedim(1, -1)).movedim(-1, 1), expected)
    assert torch.equal(layer(x.movedim(1, -1).contiguous()).movedim(-1, 1), expected)
    last = heuristic_dropout(x.to(memory_format=torch.channels_last), 0.3)
    assert torch.equal(last, expected) and last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(heuristic_dropout(torch.stack([x, x], -1)[..., 0], 0.3), expected)
    assert torch.equal(layer.scores(x.movedim(1, -1)), channel_scores(x))


def test_the_input_is_left_alone() -> None:
    x = maps_like("relu")
    before = x.clone()
    for mask in ("laplace", "zero"):
        heuristic_dropout(x, 1.0, mask=mask)
    assert torch.equal(x, before)


def test_extremes_of_float32_stay_numbers(way: None) -> None:
    for value in (1e-30, 1e-20, 1e18, 1e30, 1e36):
        x = value * maps_like("random")
        assert heuristic_dropout(x, 0.3).isfinite().all()


# ---- what the method really does ----


def ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort()


def test_the_score_is_a_filter_for_low_variance() -> None:
    """In a U-Net's decoder with random weights the scores rank as -v does, and the entropy does not."""
    torch.manual_seed(0)
    net = smp.Unet("resnet18", encoder_weights=None)
    seen: list[Tensor] = []
    for block in net.decoder.blocks:
        block.conv1[2].register_forward_hook(lambda _, __, y: seen.append(y.detach()))
    net(torch.randn(2, 3, 128, 128))

    def correlations(x: Tensor, k: float) -> list[float]:
        pairs = zip(channel_scores(x, k).numpy(), x.double().flatten(2).var(2).numpy(), strict=True)
        return [np.corrcoef(ranks(scores), ranks(-spread))[0, 1] for scores, spread in pairs]

    assert min(min(correlations(x, 2.0)) for x in seen) > 0.95
    assert max(max(correlations(x, 0.0)) for x in seen) < 0.6


def test_the_kernel_amplifies() -> None:
    """The variance of white noise grows 64 + 8 fold; the zero mask would leave none."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, 64, 64)
    inside = heuristic_dropout(x, 1.0)[..., 1:-1, 1:-1]
    assert inside.var().item() == pytest.approx(72, rel=0.03)
    assert not heuristic_dropout(x, 1.0, mask="zero").any()


# ---- as a layer ----


def test_refusals() -> None:
    for options, words in (
        ({"k": -1}, "k: expected a number of 0 or more, got -1"),
        ({"k": math.inf}, "k: expected a number of 0 or more, got inf"),
        ({"eps": 0}, "eps: expected a number above 0, got 0"),
        ({"bins": 0}, "bins: expected an integer of 1 or more, got 0"),
        ({"mask": "sobel"}, "mask: expected 'laplace' or 'zero', got 'sobel'"),
    ):
        for call in (
            lambda o: HeuristicDropout(0.1, **o),
            lambda o: heuristic_dropout(torch.ones(1, 2, 3, 3), 0.1, **o),
        ):
            with pytest.raises(SurgeryError, match=words):
                call(options)
    for name in ("skip_dead", "signed_bins", "allow_noop"):
        with pytest.raises(SurgeryError, match=f"{name}: expected true or false, got 1"):
            HeuristicDropout(**{name: 1})
    with pytest.raises(SurgeryError, match="input of heuristic_dropout: expected 4 dimensions"):
        heuristic_dropout(torch.ones(2, 3, 4), 0.5)
    with pytest.raises(SurgeryError, match=r"heuristic_dropout at a: expected maps .*\(2, 196, 64\).*; use dropout"):
        HeuristicDropout().build(channel_axis=-1, channels=64, shape=(2, 196, 64), site_id="a")


def test_a_share_that_comes_to_no_channel_is_refused() -> None:
    for channels, axis in ((4, 1), (5, -1)):
        shape = (2, channels, 7, 7) if axis == 1 else (2, 7, 7, channels)
        with pytest.raises(
            SurgeryError, match=rf"heuristic_dropout at a: expected one .* p = 0.1 of {channels} channels"
        ):
            HeuristicDropout().build(channel_axis=axis, channels=channels, shape=shape, site_id="a")
        for layer in (HeuristicDropout(allow_noop=True), HeuristicDropout(0.0), HeuristicDropout(0.2)):
            layer.build(channel_axis=axis, channels=channels, shape=shape, site_id="a")
    x = maps_like("relu", (2, 4, 7, 7))
    assert torch.equal(HeuristicDropout(allow_noop=True)(x), x)


def test_repr_and_share() -> None:
    assert repr(HeuristicDropout()) == "HeuristicDropout(p=0.1)"
    assert repr(HeuristicDropout(0.2, 3, "zero")) == "HeuristicDropout(p=0.2, k=3.0, mask='zero')"
    assert HeuristicDropout(0.1).expected_drop((2, 16, 4, 4)) == 2 / 16
    assert HeuristicDropout(0.1).expected_drop((2, 5, 4, 4)) == 0
    layer = HeuristicDropout(0.3, 0.5, "zero", 4, 1e-3, True, True)
    x = maps_like("random")
    options = {"k": 0.5, "bins": 4, "eps": 1e-3, "skip_dead": True, "signed_bins": True}
    assert torch.equal(layer(x), heuristic_dropout(x, 0.3, mask="zero", **options))


# ---- in a net ----


RECIPE = "heuristic_dropout_unet_double_conv"
DECODER = {f"decoder.blocks.{k}.conv1.2" for k in range(5)}


def test_between_the_convolutions_of_a_unet() -> None:
    """Each pair of the decoder, each block of a ResNet's encoder, each level of two of a VGG's, and nothing else."""
    images = torch.zeros(1, 3, 64, 64)
    blocks = {f"encoder.layer{n}.{m}.relu" for n in range(1, 5) for m in range(2)}
    plan = plan_recipe(smp.Unet("resnet18", encoder_weights=None), RECIPE, example_inputs=images)
    assert {edit.site.id.split("#")[0] for edit in plan.edits} == DECODER | blocks and len(plan.edits) == 13
    assert all(edit.p == 0.1 for edit in plan.edits)
    levels = plan_recipe(smp.Unet("vgg13_bn", encoder_weights=None), RECIPE, example_inputs=images)
    assert levels.hits["between the encoder's convolutions"] == 5 and len(levels.edits) == 11
    other = plan_recipe(smp.Unet("efficientnet-b0", encoder_weights=None), RECIPE, example_inputs=images)
    assert {edit.site.id.split("#")[0] for edit in other.edits} == DECODER


def test_a_unet_computes_with_it_what_its_hooks_would() -> None:
    torch.manual_seed(0)
    net = smp.Unet("resnet18", encoder_weights=None, decoder_channels=(64, 48, 32, 24, 16))
    x = torch.randn(2, 3, 64, 64)
    gm = apply_recipe(net, RECIPE, example_inputs=x)
    assert torch.equal(gm.eval()(x), net.eval()(x))
    for row in gm.surgery.audit():
        assert row.expected == round(0.1 * row.shape[1]) / row.shape[1] == pytest.approx(row.measured)

    def behind(layer: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        return heuristic_dropout(y, 0.1)

    def first_of_block(layer: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        calls[layer] = calls.get(layer, 0) + 1  # the block's one ReLU is called twice, the second time behind the sum
        return heuristic_dropout(y, 0.1) if calls[layer] == 1 else y

    calls: dict[nn.Module, int] = {}
    for block in net.decoder.blocks:
        block.conv1[2].register_forward_hook(behind)
    for name, layer in net.encoder.named_modules():
        if name.startswith("layer") and name.endswith("relu"):
            layer.register_forward_hook(first_of_block)
    gm.train()
    net.train()
    assert torch.allclose(gm(x), net(x), atol=1e-5)
