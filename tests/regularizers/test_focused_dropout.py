"""FocusedDropout against its formula in plain loops: the mask, the coin of a batch, its step's weight decay."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dropsurgery import SurgeryError, SurgeryWarning, apply_recipe, plan_recipe, strip
from dropsurgery.context import Context
from dropsurgery.regularizers._uniform import uniform
from dropsurgery.regularizers.focused_dropout import FocusedDropout, focus, focused_dropout
from dropsurgery.scheduler import SILENT_FORWARDS

Mask = Callable[[np.ndarray, np.ndarray], np.ndarray]
OWN, ACTIVE = 1e-4, 1e-3


# ---- the mask ----


def reference(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """Equations 1 to 5 for maps (B, C, H, W) and thresholds (B, 1, H, W), pixel by pixel; what peaks at 0 passes."""
    mask = np.zeros((len(x), 1, *x.shape[2:]), dtype=bool)
    for b, maps in enumerate(x):
        means = [channel.astype(np.float64).mean() for channel in maps]
        best = maps[int(np.argmax(means))]
        peak = best.max()
        for i, j in np.ndindex(best.shape):
            mask[b, 0, i, j] = peak <= 0 or best[i, j] > gamma[b, 0, i, j] * peak
    return mask


def at_least(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """A wrong one: not strict."""
    best = np.stack([maps[np.argmax(maps.mean((1, 2)))] for maps in x])[:, None]
    return best >= gamma * best.max((2, 3), keepdims=True)


def of_the_batch(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """A wrong one: the largest number of the whole batch."""
    best = np.stack([maps[np.argmax(maps.mean((1, 2)))] for maps in x])[:, None]
    return best > gamma * best.max()


def by_the_peak(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """A wrong one: the channel of the largest peak."""
    best = np.stack([maps[np.argmax(maps.max((1, 2)))] for maps in x])[:, None]
    return best > gamma * best.max((2, 3), keepdims=True)


def each_its_own(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """A wrong one: each channel by its own peak."""
    return x > gamma * x.max((2, 3), keepdims=True)


def inverse(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    return ~reference(x, gamma)


def maps(kind: str) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 7, 9)
    if kind == "relu":
        return x.relu()
    if kind == "dead channels":
        return x.relu() * torch.tensor([0.0, 1, 0, 1, 0, 0])[:, None, None]
    if kind == "ties":  # of positions, and of the means of channels: the second half is the first once more
        few = x[:, :3].mul(2).round().relu()
        return torch.cat([few, few.flip(2)], 1)
    if kind == "constant":
        return torch.full_like(x, 2.5)
    if kind == "zero":
        return torch.zeros_like(x)
    if kind == "negative":
        return -x.abs() - 0.1
    return {"one channel": x[:, :1], "one point": x[..., :1, :1], "one sample": x[:1].relu()}.get(kind, x)


KINDS = (
    *("signed", "relu", "dead channels", "ties", "constant", "zero", "negative"),
    *("one channel", "one point", "one sample"),
)


@pytest.mark.parametrize("scope", ["image", "pixel"])
@pytest.mark.parametrize("bounds", [(0.3, 0.6), (0.6, 0.9), (0.0, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_that_of_the_formula(kind: str, bounds: tuple[float, float], scope: Any) -> None:
    x, key = maps(kind), torch.tensor(5)
    b, _, h, w = x.shape
    drawn = uniform((b, 1, h, w) if scope == "pixel" else (b, 1, 1, 1), x.device, key).numpy()
    gamma = np.float32(bounds[0]) + np.float32(bounds[1] - bounds[0]) * drawn
    expected = reference(x.numpy(), np.broadcast_to(gamma, (b, 1, h, w)))
    assert np.array_equal(focus(x, torch.from_numpy(gamma)).numpy(), expected)
    y = focused_dropout(x, 1.0, bounds, scope, key=key).numpy()
    assert np.array_equal(y, x.numpy() * expected)
    assert np.array_equal(y == 0, (x.numpy() == 0) | ~expected)


@pytest.mark.parametrize("wrong", [at_least, of_the_batch, by_the_peak, each_its_own, inverse])
def test_other_masks_fail_the_same_check(wrong: Mask) -> None:
    """The negative controls; that of equality shows where values lie on the threshold."""
    x = maps("ties" if wrong is at_least else "relu")
    gamma = np.full((4, 1, 7, 9), 0.5, dtype=np.float32)
    right = focus(x, torch.from_numpy(gamma)).numpy()
    assert np.array_equal(right, reference(x.numpy(), gamma))
    assert not np.array_equal(np.broadcast_to(right, x.shape), np.broadcast_to(wrong(x.numpy(), gamma), x.shape))


def test_a_strict_comparison_alone_would_wipe_samples_out() -> None:
    """What is nowhere above 0 passes; by the formula as it stands all of it would go."""
    for kind in ("zero", "negative"):
        x = maps(kind)
        best = torch.stack([each[each.mean((1, 2)).argmax()] for each in x])[:, None]
        assert not (best > 0.5 * best.amax((2, 3), keepdim=True)).any()
        assert torch.equal(focused_dropout(x, 1.0), x)
    mixed = maps("signed")
    mixed[0] = -1
    y = focused_dropout(mixed, 1.0)
    assert torch.equal(y[0], mixed[0]) and (y[1:] == 0).any()


@pytest.mark.parametrize("tiny", [1.4e-45, 1e-40, 1e-37])
def test_what_is_hardly_above_zero_is_not_wiped_out(tiny: float) -> None:
    x = torch.full((2, 3, 4, 4), tiny)
    assert torch.equal(focused_dropout(x, 1.0, (0.9, 0.9)), x)


def test_the_peak_is_kept_and_more_the_smaller_gamma_is() -> None:
    x = maps("relu")
    best = torch.stack([each[each.mean((1, 2)).argmax()] for each in x])[:, None]
    kept = [focus(x, torch.full((4, 1, 1, 1), gamma)) for gamma in (0.0, 0.2, 0.4, 0.6, 0.8, 1 - 2**-24)]
    for mask, fewer in itertools.pairwise(kept):
        assert mask[best == best.amax((2, 3), keepdim=True)].all()
        assert not (fewer & ~mask).any() and fewer.sum() < mask.sum()
    assert torch.equal(kept[-1], best == best.amax((2, 3), keepdim=True))


def test_positive_factors_leave_the_mask() -> None:
    x, gamma = maps("signed"), torch.full((4, 1, 1, 1), 0.45)
    for factor in (2.0**-20, 0.25, 8.0, 3.7):
        assert torch.equal(focus(x * factor, gamma), focus(x, gamma))
    assert not torch.equal(focus(x + 1, gamma), focus(x, gamma))  # the control


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mixed", [False, True])
def test_other_dtypes_keep_what_float32_keeps(dtype: torch.dtype, mixed: bool) -> None:
    x, key = maps("relu").to(dtype), torch.tensor(5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        y = focused_dropout(x, 1.0, key=key)
    assert y.dtype == dtype and torch.equal(y, focused_dropout(x.float(), 1.0, key=key).to(dtype))


def test_means_that_float16_cannot_tell_apart() -> None:
    """The second channel's is larger by less than float16 can say: there the first one would be taken."""
    x = torch.zeros(1, 2, 64, 64, dtype=torch.float16)
    x[0, 0, :32], x[0, 1, 32:] = 2, 2
    x[0, 1, 63, 63] = 2.01
    assert x.mean((2, 3))[0, 0] == x.mean((2, 3))[0, 1]
    kept = focus(x, torch.full((1, 1, 1, 1), 0.5))[0, 0]
    assert kept[32:].all() and not kept[:32].any()


def test_layouts() -> None:
    x, key = maps("relu"), torch.tensor(5)
    expected = focused_dropout(x, 1.0, key=key)
    layer = FocusedDropout(1.0)
    layer.build(channel_axis=-1, channels=6, shape=(4, 7, 9, 6), site_id="a")
    torch.manual_seed(3)
    last = layer(x.movedim(1, -1).contiguous())
    torch.manual_seed(3)
    assert torch.equal(last.movedim(-1, 1), FocusedDropout(1.0)(x))
    channels_last = focused_dropout(x.to(memory_format=torch.channels_last), 1.0, key=key)
    assert torch.equal(channels_last, expected) and channels_last.is_contiguous(memory_format=torch.channels_last)
    sliced = torch.stack([x, -x], -1)[..., 0]
    assert not sliced.is_contiguous() and torch.equal(focused_dropout(sliced, 1.0, key=key), expected)


def test_a_sample_does_not_hang_on_the_others() -> None:
    x, key = maps("relu"), torch.tensor(5)
    other = torch.cat([x[:1], 10 * maps("signed")[1:]])
    assert torch.equal(focused_dropout(other, 1.0, key=key)[0], focused_dropout(x, 1.0, key=key)[0])


def test_gradient_is_the_mask() -> None:
    x, key = maps("signed").requires_grad_(), torch.tensor(5)
    y = focused_dropout(x, 1.0, key=key)
    grad = torch.randn(y.shape)
    y.backward(grad)
    kept = focused_dropout(torch.ones_like(x), 1.0, (0.0, 0.0))  # all: a constant map is above 0 of its peak
    assert torch.equal(kept, torch.ones_like(x))
    drawn = 0.3 + (0.6 - 0.3) * uniform((4, 1, 1, 1), x.device, key)
    assert torch.equal(x.grad, grad * focus(x, drawn))
    double = maps("signed").double()[:2, :2, :3, :3].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: focused_dropout(x, 1.0, key=key), double)
    assert torch.autograd.gradgradcheck(lambda x: focused_dropout(x, 1.0, key=key), double)


def test_in_place_nothing_is_written() -> None:
    x = maps("relu")
    before = x.clone()
    focused_dropout(x, 1.0)
    assert torch.equal(x, before)


# ---- rates ----


def test_expected_is_what_gaussian_maps_lose() -> None:
    """And not p, nor what they lose at the other range of the paper: the controls."""
    torch.manual_seed(0)
    for bounds in ((0.3, 0.6), (0.6, 0.9), (0.0, 0.0)):
        for size in ((2, 2), (7, 7), (14, 9)):
            layer = FocusedDropout(0.5, bounds)
            lost = (focused_dropout(torch.randn(4000, 1, *size), 1.0, bounds) == 0).double().mean((1, 2, 3))
            error = 4 * lost.std() / math.sqrt(len(lost))
            assert abs(layer.expected_drop((2, 1, *size)) / 0.5 - lost.mean()) <= error
            other = FocusedDropout(0.5, (0.1, 0.2)).expected_drop((2, 1, *size))
            assert abs(other / 0.5 - lost.mean()) > error and lost.mean() < 1 - error


def test_a_layer_alone_draws_one_coin_for_its_batch() -> None:
    torch.manual_seed(0)
    x, layer, times = maps("relu"), FocusedDropout(0.1), 4000
    used = torch.stack([(layer(x) != x).flatten(1).any(1) for _ in range(times)])
    assert torch.equal(used, used[:, :1].expand_as(used))
    assert abs(used[:, 0].double().mean() - 0.1) <= 4 * math.sqrt(0.1 * 0.9 / times)


# ---- a model ----


class Net(nn.Module):
    """Three stages, behind each of which there is a site; of one convolution each."""

    def __init__(self, how: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(2, 1)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


class Checkpointed(Net):
    """The first two stages are run once more in backward."""

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages[:2]:
            x = checkpoint(stage, x, use_reentrant=False)
        return self.head(self.stages[2](x).mean((2, 3)))


X = torch.rand(2, 2, 5, 5) + 0.1
SEEDS = [None, 3]
WITH = {"p": 0.5, "gamma_range": [0.9, 0.95]}  # at which something is dropped at each site of a batch that is used


def operated(net: nn.Module | None = None, seed: int | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    entry = {"name": "all", "pattern": "conv_act", "insert": "focused_dropout", "with": WITH | options}
    net = Net() if net is None else net
    for parameter in net.parameters():  # so that no map is 0
        nn.init.uniform_(parameter, 0.1, 0.2)
    return apply_recipe(net, {"version": 1, "entries": [entry]}, example_inputs=X, seed=seed).train()


def watched(gm: Any) -> dict[str, list[bool]]:
    """For each site, forward by forward, whether it dropped something."""
    seen: dict[str, list[bool]] = {}
    for site, layer in gm.surgery.regularizers.items():
        seen[site] = []
        layer.register_forward_hook(lambda _, args, y, site=site: seen[site].append(not torch.equal(args[0], y)))
    assert len(seen) == 3
    return seen


def agreed(seen: dict[str, list[bool]]) -> list[bool]:
    """What all sites did."""
    first, *others = seen.values()
    assert all(each == first for each in others)
    return first


def sgd(gm: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(gm.parameters(), **{"lr": 1e-6, "weight_decay": OWN} | options)


def quietly(gm: Any, optimizer: torch.optim.Optimizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SurgeryWarning)
        gm.surgery.attach(optimizer)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_batch_in_ten_and_all_sites_alike(seed: int | None) -> None:
    """1000 batches; within 0.1 +- 0.03, and with coins of their own (the control) sites do not agree."""
    gm = operated(seed=seed, p=0.1)
    seen = watched(gm)
    with torch.no_grad():
        for _ in range(1000):
            gm(X)
            gm.surgery.step()
    assert abs(np.mean(agreed(seen)) - 0.1) <= 0.03
    torch.manual_seed(1)
    for each in seen.values():
        each.clear()
    for layer in gm.surgery.regularizers.values():
        layer.context = None
    for _ in range(100):
        gm(X)
    with pytest.raises(AssertionError):
        agreed(seen)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("grad", [True, False])
def test_forwards_that_no_step_follows_are_batches_of_their_own(seed: int | None, grad: bool) -> None:
    gm = operated(seed=seed)
    seen = watched(gm)
    with torch.set_grad_enabled(grad):
        for _ in range(200):
            gm(X)
    assert abs(np.mean(agreed(seen)) - 0.5) <= 4 * math.sqrt(0.25 / 200)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("net", [Net, Checkpointed])
def test_what_is_accumulated_for_one_step_is_one_batch(net: type[Net], seed: int | None, attached: bool) -> None:
    gm = operated(net(), seed, wd_active=None)
    optimizer, seen = sgd(gm), watched(gm)
    if attached:
        gm.surgery.attach(optimizer)
    for _ in range(30):
        for _ in range(4):
            with set_checkpoint_early_stop(False):  # run again to the end, where it is watched
                gm(X).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    forwards = {site: len(each) for site, each in seen.items()}
    assert set(forwards.values()) == ({120} if net is Net else {120, 240})
    steps = []
    for each in seen.values():
        shares = np.reshape(each, (30, -1)).mean(1)
        assert set(shares) == {0.0, 1.0}
        steps.append(shares)
    assert np.array_equal(steps[0], steps[1]) and np.array_equal(steps[0], steps[2])


def test_in_eval_each_forward_flips_a_coin() -> None:
    """As for Monte-Carlo dropout, also in the midst of a training."""
    gm = operated()
    optimizer = sgd(gm)
    gm.surgery.attach(optimizer)
    gm(X).sum().backward()
    optimizer.step()
    seen = watched(gm)
    gm.eval()(X)
    assert agreed(seen) == [False]
    with gm.surgery.active(p=0.5), torch.no_grad():
        for _ in range(100):
            gm(X)
    assert 0.2 < np.mean(agreed(seen)) < 0.8
    for each in seen.values():
        each.clear()
    with gm.surgery.active(p=1.0), torch.no_grad():
        gm(X)
    assert agreed(seen) == [True]


def test_a_training_repeats_by_its_seed() -> None:
    def run(seed: int, noise: int) -> list[Tensor]:
        gm = operated(seed=seed)
        torch.manual_seed(noise)
        optimizer = sgd(gm, lr=1e-3)
        gm.surgery.attach(optimizer)
        for _ in range(8):
            optimizer.zero_grad()
            gm(X).sum().backward()
            optimizer.step()
        return [parameter.detach() for parameter in gm.parameters()]

    first = run(3, 1)
    assert all(map(torch.equal, first, run(3, 2)))
    assert not all(map(torch.equal, first, run(4, 1)))


def test_a_clock_that_stands_is_told_of() -> None:
    """Once steps are known to be made, what is drawn for one must not stay for all."""
    gm = operated(wd_active=None)
    optimizer = sgd(gm)
    gm(X).sum().backward()
    optimizer.step()
    with pytest.warns(
        SurgeryWarning, match=r"still stands at step 1: what is drawn once a batch stays as it was drawn"
    ):
        for _ in range(SILENT_FORWARDS):
            gm(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SurgeryWarning)
        fresh = operated(wd_active=None)
        for _ in range(2 * SILENT_FORWARDS):
            fresh(X)


# ---- the weight decay ----


class Spy(torch.optim.SGD):
    """SGD that notes which weight decay its groups have while it makes a step, and can fail."""

    def __init__(self, gm: nn.Module, **options: Any) -> None:
        self.seen: list[tuple[float, ...]] = []
        self.fails = False
        biases = [parameter for name, parameter in gm.named_parameters() if name.endswith("bias")]
        weights = [parameter for name, parameter in gm.named_parameters() if not name.endswith("bias")]
        spared = {"params": biases, "weight_decay": 0.0}
        super().__init__([{"params": weights}, spared], **{"lr": 1e-6, "weight_decay": OWN} | options)

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise RuntimeError("out of memory")
        loss = closure() if closure is not None else None
        self.seen.append(tuple(self.decays))
        super().step()
        return loss

    @property
    def decays(self) -> list[float]:
        return [group["weight_decay"] for group in self.param_groups]


REST = [OWN, 0.0]


def expected_decays(used: list[bool]) -> list[tuple[float, float]]:
    return [(ACTIVE if each else OWN, 0.0) for each in used]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("net", [Net, Checkpointed])
def test_weight_decay_is_larger_in_the_steps_of_batches_that_are_used(net: type[Net], seed: int | None) -> None:
    gm = operated(net(), seed)
    optimizer = Spy(gm)
    quietly(gm, optimizer)
    last = watched(gm)["stages.2.1#0:conv_act.output"]
    for _ in range(40):
        optimizer.zero_grad()
        gm(X).sum().backward()
        assert optimizer.decays == REST
        optimizer.step()
        assert optimizer.decays == REST
    assert optimizer.seen == expected_decays(last) and len(set(optimizer.seen)) == 2
    assert optimizer.seen != expected_decays([not each for each in last])  # the control


def test_weights_are_those_of_the_larger_weight_decay() -> None:
    """Without gradients a weight shrinks by 1 - lr * wd, in the steps of batches that are used by the larger one."""
    gm = operated(wd_active=0.5)
    optimizer = sgd(gm, lr=0.1, weight_decay=0.01)
    quietly(gm, optimizer)
    seen, expected = watched(gm), gm.head.weight.detach().clone()
    for _ in range(20):
        (gm(X).sum() * 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected *= 1 - 0.1 * (0.5 if agreed(seen)[-1] else 0.01)
    assert torch.allclose(gm.head.weight.detach(), expected, rtol=1e-5) and len(set(agreed(seen))) == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_a_closure_s_batch_counts_too(seed: int | None) -> None:
    gm = operated(seed=seed)
    optimizer, seen = Spy(gm), watched(gm)
    quietly(gm, optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = gm(X).sum()
        loss.backward()
        return loss

    for _ in range(30):
        optimizer.step(closure)
    assert optimizer.seen == expected_decays(agreed(seen)) and len(set(optimizer.seen)) == 2


def test_after_an_exception_it_is_restored() -> None:
    """Before the next step, and before the state of optimizer, model or surgery is taken."""
    gm = operated(p=1.0)
    optimizer = Spy(gm)
    quietly(gm, optimizer)

    def failed() -> None:
        gm(X).sum().backward()
        optimizer.fails = True
        with pytest.raises(RuntimeError):
            optimizer.step()
        optimizer.fails = False
        assert optimizer.decays == [ACTIVE, 0.0]

    takes: tuple[Callable[[], Any], ...] = (optimizer.state_dict, gm.state_dict, gm.surgery.state_dict)
    for take in takes:
        failed()
        take()
        assert optimizer.decays == REST
    failed()
    assert optimizer.state_dict()["param_groups"][0]["weight_decay"] == OWN
    failed()
    gm.surgery.attach(optimizer)
    assert optimizer.decays == REST
    failed()
    optimizer.step()
    assert optimizer.seen == [(ACTIVE, 0.0)] and optimizer.decays == REST


def test_it_is_for_the_attached_optimizer_alone() -> None:
    gm = operated(p=1.0)
    first, last, other = Spy(gm), Spy(gm), Spy(nn.Linear(1, 1))
    for attached in (first, last, last):
        quietly(gm, attached)
        for optimizer in (first, last, other):
            gm(X).sum().backward()
            optimizer.step()
    assert {seen[0] for seen in other.seen} == {OWN}
    assert [seen[0] for seen in first.seen] == [ACTIVE, OWN, OWN]
    assert [seen[0] for seen in last.seen] == [OWN, ACTIVE, ACTIVE]


def test_one_that_is_not_attached_is_told_of_and_left_alone() -> None:
    gm = operated(p=1.0)
    optimizer = Spy(gm)
    gm(X).sum().backward()
    with pytest.warns(SurgeryWarning, match=r"want weight_decay=0\.001 .* call surgery\.attach\(optimizer\)"):
        optimizer.step()
    assert optimizer.seen == [tuple(REST)]


def test_null_leaves_the_optimizer_alone() -> None:
    gm = operated(p=1.0, wd_active=None)
    optimizer = Spy(gm)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SurgeryWarning)
        gm.surgery.attach(optimizer)
        gm(X).sum().backward()
        optimizer.step()
    assert optimizer.seen == [tuple(REST)] and not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("decay", "message"),
    [(0.0, "this SGD has none, which stays so"), (0.05, r"has more in some group \(weight_decay=0\.05\)")],
)
def test_a_wish_that_comes_to_nothing_is_told_of(decay: float, message: str) -> None:
    gm = operated()
    with pytest.warns(SurgeryWarning, match=message):
        gm.surgery.attach(sgd(gm, weight_decay=decay))


def test_processes_have_to_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would draw its own coin, and its weights would have another weight decay."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    gm = operated()
    with pytest.raises(SurgeryError, match=r"expected a seed, as each of the 4 processes .* apply_recipe"):
        gm.surgery.attach(sgd(gm))
    assert not gm.surgery.scheduler._is_one_batch()
    for other in (operated(seed=1), operated(wd_active=None)):
        other.surgery.attach(sgd(other))


def test_a_step_without_a_batch_of_the_model_has_its_own() -> None:
    """In eval, or where the stripped model is trained on: nothing was dropped."""
    gm = operated(p=1.0)
    optimizer = Spy(gm)
    quietly(gm, optimizer)
    for net in (gm.eval(), strip(gm).train()):
        net(X).sum().backward()
        optimizer.step()
    assert optimizer.seen == [tuple(REST)] * 2
    gm.train()(X).sum().backward()
    optimizer.step()
    assert optimizer.seen[-1] == (ACTIVE, 0.0)


def test_a_look_between_forward_and_step_changes_nothing() -> None:
    gm = operated(p=1.0)
    optimizer = Spy(gm)
    quietly(gm, optimizer)
    gm(X).sum().backward()
    with gm.surgery.active(p=0.0), torch.no_grad():
        gm.eval()(X)
    gm.surgery.audit()
    gm.train()
    optimizer.step()
    assert optimizer.seen == [(ACTIVE, 0.0)]


def test_copies_go_by_themselves() -> None:
    gm = operated(p=1.0)
    optimizer = Spy(gm)
    quietly(gm, optimizer)
    gm(X).sum().backward()
    ema = copy.deepcopy(gm)
    optimizer.step()
    ema(X).sum().backward()  # a forward of the copy is no batch of the model
    own = Spy(ema)
    quietly(ema, own)
    own.step()
    optimizer.step()
    assert own.seen == [(ACTIVE, 0.0)] and optimizer.seen == [(ACTIVE, 0.0), tuple(REST)]
    assert ema.surgery.current_step == 1 and gm.surgery.current_step == 2


def test_a_training_resumes() -> None:
    """Weights, clock and weight decay as if it had not been interrupted, after a state taken from a failed step."""

    def start() -> tuple[Any, Spy]:
        gm = operated(seed=5)
        optimizer = Spy(gm, lr=1e-3, momentum=0.9)
        gm.surgery.attach(optimizer)
        return gm, optimizer

    def train(gm: Any, optimizer: Spy, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            gm(X).sum().backward()
            optimizer.step()

    whole, optimizer = start()
    train(whole, optimizer, 9)
    gm, first = start()
    train(gm, first, 4)
    gm(X).sum().backward()
    first.fails = True
    with pytest.raises(RuntimeError):
        first.step()
    states = copy.deepcopy((gm.state_dict(), first.state_dict(), gm.surgery.state_dict()))
    resumed, second = start()
    for one, state in zip((resumed, second, resumed.surgery), states, strict=True):
        one.load_state_dict(state)
    train(resumed, second, 5)
    assert optimizer.seen == first.seen + second.seen and len(set(optimizer.seen)) == 2
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_that_the_scaler_skips_keeps_its_batch() -> None:
    gm = operated()
    optimizer, scaler = Spy(gm), torch.amp.GradScaler("cpu", init_scale=4.0)
    quietly(gm, optimizer)
    seen, expected = watched(gm), []
    for turn in range(12):
        optimizer.zero_grad()
        scaler.scale(gm(X).sum() * (float("inf") if turn % 3 == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if turn % 3 != 1:
            expected.append(agreed(seen)[-1])
        if turn % 3 == 2:
            assert agreed(seen)[-1] == agreed(seen)[-2]
    assert optimizer.seen == expected_decays(expected) and gm.surgery.current_step == 8


def test_compiled() -> None:
    torch._dynamo.reset()
    gm, eager = operated(seed=3), operated(seed=3)
    optimizers = [Spy(net, lr=0.05) for net in (gm, eager)]
    run = torch.compile(gm, backend="aot_eager")
    for net, optimizer in zip((gm, eager), optimizers, strict=True):
        quietly(net, optimizer)
    for _ in range(8):
        for call, optimizer in zip((run, eager), optimizers, strict=True):
            optimizer.zero_grad()
            call(X).sum().backward()
            optimizer.step()
    assert optimizers[0].seen == optimizers[1].seen and len(set(optimizers[0].seen)) == 2
    assert all(map(torch.allclose, gm.parameters(), eager.parameters()))


# ---- recipe and words ----


def test_behind_the_last_stage_but_one_of_a_resnet() -> None:
    """On timm's ResNet-18: what layer4 reads is masked by the formula, and eval is as before."""
    torch.manual_seed(0)
    net, images = timm.create_model("resnet18", num_classes=3), torch.randn(2, 3, 64, 64)
    gm: Any = apply_recipe(net, "focused_dropout_resnet", seed=2, overrides={"last stage but one.with.p": 1.0})
    (site,) = gm.surgery.regularizers
    assert site == "layer3.1.act2#0:block_end.output"
    maps: dict[str, Tensor] = {}
    gm.surgery.regularizers[site].register_forward_hook(lambda _, args, y: maps.update(before=args[0], after=y))
    gm.layer4.register_forward_pre_hook(lambda _, args: maps.update(read=args[0]))
    gm.train()(images)
    assert torch.equal(maps["read"], maps["after"])
    key = Context(2).key(site)
    gamma = (np.float32(0.3) + np.float32(0.6 - 0.3) * uniform((2, 1, 1, 1), images.device, key).numpy()) * np.ones(
        (1, 1, 4, 4), dtype=np.float32
    )
    mask = reference(maps["before"].detach().numpy(), gamma)
    assert 0 < mask.mean() < 0.9
    assert np.array_equal(maps["after"].detach().numpy(), maps["before"].detach().numpy() * mask)
    assert torch.equal(gm.eval()(images), net.eval()(images))


def test_audit_counts_on_the_maps_that_arrive() -> None:
    """The share of a batch in use, counted here on the map itself, times p; that of noise is what is expected."""
    torch.manual_seed(2)
    net, images, maps = timm.create_model("resnet18").eval(), torch.randn(4, 3, 64, 64), []
    gm: Any = apply_recipe(net, "focused_dropout_resnet", overrides={"last stage but one.with.gamma_range": [0.5, 0.5]})
    net.layer3[1].register_forward_hook(lambda module, given, y: maps.append(y.detach()))
    net(images)
    (row,) = gm.surgery.audit(images)
    assert row.p == 0.1 and row.expected == gm.surgery.regularizers[row.site].expected_drop((4, 256, 4, 4))
    lost = 1 - reference(maps[0].numpy(), np.full((4, 1, 4, 4), 0.5)).mean()
    assert 0 < lost < 1 and abs(row.measured - 0.1 * lost) < 1e-6 and not row.note


@pytest.mark.parametrize(
    ("act", "warned"), [(nn.ReLU(), False), (nn.Sigmoid(), False), (nn.GELU(), True), (nn.SiLU(), True)]
)
def test_a_site_behind_a_signed_activation_is_told_of(act: nn.Module, warned: bool) -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 3), act, nn.Flatten(), nn.Linear(18, 2))
    recipe = {"version": 1, "entries": [{"name": "a", "pattern": "conv_act", "insert": "focused_dropout"}]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apply_recipe(net, recipe, example_inputs=X)
    told = [str(each.message) for each in caught if each.category is SurgeryWarning]
    assert len(told) == warned and all("expected maps that are never negative" in each for each in told)


def test_refusals() -> None:
    for bad in ((0.6, 0.3), (0.3,), (0.3, 1.0), (-0.1, 0.5), ("a", "b"), 0.5, (True, True), (0.5, 1 - 2**-30)):
        with pytest.raises(SurgeryError, match=r"gamma_range: expected two numbers in \[0, 1\) in rising order, got"):
            FocusedDropout(gamma_range=bad)  # type: ignore[arg-type]
    for bad in (0, -1e-3, "1e-3", True, math.inf):
        with pytest.raises(SurgeryError, match="wd_active: expected a number above 0, or None, got"):
            FocusedDropout(wd_active=bad)  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="gamma_scope: expected 'image' or 'pixel', got 'batch'"):
        FocusedDropout(gamma_scope="batch")  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="input of focused_dropout: expected 4 dimensions"):
        focused_dropout(torch.ones(2, 3, 4), 0.5)
    with pytest.raises(
        SurgeryError, match=r"focused_dropout at a: expected maps .*\(2, 196, 64\).*; use dropout there"
    ):
        FocusedDropout().build(channel_axis=-1, channels=64, shape=(2, 196, 64), site_id="a")
    for shape, axis in (((2, 64, 1, 1), 1), ((2, 1, 1, 64), -1)):
        with pytest.raises(SurgeryError, match="focused_dropout at a: expected maps of more than one point"):
            FocusedDropout().build(channel_axis=axis, channels=64, shape=shape, site_id="a")


def test_words() -> None:
    expected = "FocusedDropout(p=0.1, gamma_range=(0.3, 0.6), gamma_scope='image', wd_active=0.001)"
    assert repr(FocusedDropout()) == expected
    (edit,) = plan_recipe(timm.create_model("resnet18"), "focused_dropout_resnet").edits
    assert edit.arguments == {"p": 0.1, "gamma_range": (0.3, 0.6), "wd_active": 1e-3}
