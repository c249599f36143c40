"""What acts on branches and joins: ScheduledDropPath, ShakeDrop, Shake-Shake and FractalNet's drop-path.

Each is compared with its formula, written out in NumPy or in plain tensors, and each criterion (P17 to P21) is also
given a wrong variant, which it has to notice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dropsurgery import PlanError, apply_recipe, plan_recipe
from dropsurgery.context import Context
from dropsurgery.errors import SurgeryError
from dropsurgery.models import make_model
from dropsurgery.regularizers.fractal_drop_path import FractalDropPath, fractal_drop_path
from dropsurgery.regularizers.scheduled_drop_path import ScheduledDropPath, scheduled_drop_path
from dropsurgery.regularizers.shake_shake import ShakeShake, shake_shake
from dropsurgery.regularizers.shakedrop import ShakeDrop, keyed_steps, shakedrop
from tests.zoo import ZOO, Cell, conv_bn

Run = Callable[[Tensor], Tensor]


def share_is(hits: Tensor, p: float) -> bool:
    """Whether independent trials hit with probability p, within 4 standard errors."""
    return bool(abs(hits.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / hits.numel()))


def mean_is(values: Tensor, mean: float) -> bool:
    values = values.double().flatten()
    return bool(abs(values.mean() - mean) <= 4 * values.std() / math.sqrt(len(values)))


def correlation(a: Tensor, b: Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1]))


def is_uniform(values: Tensor, low: float, high: float) -> bool:
    """Kolmogorov and Smirnov: whether independent values are uniform, which a sample is not 1 time in 10,000."""
    values = (values.double().flatten().sort().values - low) / (high - low)
    steps = torch.arange(1, len(values) + 1) / len(values)
    return bool(values.min() >= 0 and values.max() <= 1 and (values - steps).abs().max() <= 2.23 / len(values) ** 0.5)


def plain_recipe(**entry: object) -> dict:
    return {"version": 1, "entries": [{"name": "all", **entry}]}


# ---- depth rules ----


class Residual(nn.Module):
    """Four residual blocks in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(conv_bn(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def survival(rule: str) -> list[float]:
    entry = {"pattern": "residual_add", "edge": "branch", "insert": "stochastic_depth", "with": {"p": 0.5}}
    plan = plan_recipe(Residual(), plain_recipe(**entry, depth_rule=rule), example_inputs=torch.zeros(2, 4, 8, 8))
    return [1 - edit.p for edit in plan.edits]


def test_survival_by_the_papers_rule_and_by_timms() -> None:
    """P17: p_l for L = 4 and p_L = 0.5; each rule fails the other's list."""
    paper, timm = [0.875, 0.75, 0.625, 0.5], [1 - rate for rate in np.linspace(0, 0.5, 4)]
    assert survival("linear") == pytest.approx(paper, abs=1e-6)
    assert survival("linear0") == pytest.approx(timm, abs=1e-6)
    assert survival("linear") != pytest.approx(timm, abs=1e-2) and survival("constant") != pytest.approx(paper, abs=0.1)


class Deep(nn.Module):
    """Twenty cells after a stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12, stride=2)
        self.cells = nn.ModuleList(Cell(12, 12, 4) for _ in range(20))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.head(last.mean((2, 3)))


def keep_by_the_code(step: int, steps: int, cell: int, cells: int, target: float) -> float:
    """As in nasnet_utils.py, version v3: first depth, then time."""
    keep = 1 - (cell + 1) / cells * (1 - target)
    return 1 - min(1.0, step / steps) * (1 - keep)


def cell_of(site_id: str) -> int:
    return int(site_id.split(".")[1])


def scheduled(rule: str, kind: str) -> dict[int, dict[int, set[float]]]:
    """What each cell keeps at the start, in the middle and at the end, as the buffers say."""
    entry = {"pattern": "conv_bn", "edge": "output", "insert": "scheduled_drop_path", "with": {"p": 0.4}}
    recipe = plain_recipe(**entry, where={"module": "cells.*"}, depth_rule=rule, schedule={"kind": kind})
    gm = apply_recipe(Deep(), recipe, example_inputs=torch.zeros(2, 3, 16, 16), total_steps=4)
    keeps: dict[int, dict[int, set[float]]] = {}
    for step in range(5):
        sites: dict[int, set[float]] = {}
        for site, layer in gm.surgery.regularizers.items():
            sites.setdefault(cell_of(site), set()).add(round(1 - float(layer.p), 6))
        keeps[step] = sites
        gm.surgery.step()
    return keeps


def follows_the_code(keeps: dict[int, dict[int, set[float]]]) -> bool:
    return all(
        keeps[step][cell] == {round(keep_by_the_code(step, 4, cell, 20, 0.6), 6)}
        for step in range(5)
        for cell in range(20)
    )


def test_scheduled_drop_path_grows_with_cell_and_step() -> None:
    """P18; depth or time alone, and a rule over sites instead of cells, fail."""
    keeps = scheduled("cells", "linear")
    assert follows_the_code(keeps)
    assert keeps[4][19] == {0.6} and keeps[4][0] == {0.98}
    assert all(keeps[0][cell] == {1.0} for cell in range(20))
    for rule, kind in (("constant", "linear"), ("cells", "constant"), ("linear", "linear")):
        assert not follows_the_code(scheduled(rule, kind))


@pytest.mark.parametrize(("model", "cells"), [("nasnetalarge", 22), ("pnasnet5large", 14)])
def test_all_cells_of_the_papers_nets_count(model: str, cells: int) -> None:
    """P18: stem and reduction cells too, as in nasnet.py (18 + 2 + 2) and pnasnet.py (12 + 2)."""
    plan = plan_recipe(make_model(model), "scheduled_drop_path_nasnet", total_steps=4)
    assert {edit.site.block for edit in plan.edits} == {(cell, cells) for cell in range(cells)}
    for edit in plan.edits:
        index, count = edit.site.block
        assert 1 - edit.p == pytest.approx(keep_by_the_code(4, 4, index, count, 0.7), abs=1e-12)


# ---- ScheduledDropPath ----


def drop_path_by_the_code(x: np.ndarray, keep: float, u: np.ndarray) -> np.ndarray:
    return x / keep * np.floor(keep + u)


@pytest.mark.parametrize("shape", [(64, 3, 5, 4), (64, 7, 6), (64, 2)])
def test_scheduled_drop_path_is_the_authors(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    torch.manual_seed(1)
    y = scheduled_drop_path(x, 0.25)
    torch.manual_seed(1)
    u = torch.rand((64, *[1] * (len(shape) - 1)))
    assert np.allclose(y, drop_path_by_the_code(x.numpy(), 0.75, u.numpy()))
    assert not np.allclose(y, drop_path_by_the_code(x.numpy(), 0.25, u.numpy()))  # where p is what is kept
    assert not np.allclose(y, x.numpy() * np.floor(0.75 + u.numpy()))  # not rescaled


def test_scheduled_drop_path_draws_for_each_sample() -> None:
    torch.manual_seed(0)
    x = torch.ones(40_000, 2, 1, 3, requires_grad=True)
    y = ScheduledDropPath(0.3)(x)
    drop = (y == 0).flatten(1)
    assert (drop == drop[:, :1]).all() and share_is(drop[:, 0], 0.3)
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.7))
    y.sum().backward()
    assert torch.equal(x.grad, y)


def test_scheduled_drop_path_needs_a_batch() -> None:
    with pytest.raises(SurgeryError, match=r"input of scheduled_drop_path: expected a batch \(B, \.\.\.\), got \(\)"):
        scheduled_drop_path(torch.tensor(1.0), 0.5)
    with pytest.raises(SurgeryError, match=r"scheduled_drop_path at a: expected a batch"):
        ScheduledDropPath().build(channel_axis=None, channels=None, shape=(), site_id="a")


# ---- ShakeDrop ----

LEVELS = {"batch": (1, 1, 1, 1), "image": (16, 1, 1, 1), "channel": (16, 6, 1, 1), "pixel": (16, 6, 5, 4)}
SHAPE = LEVELS["pixel"]


def factors(run: Run, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    """What a layer multiplies by, forward and backward."""
    x = torch.ones(shape, requires_grad=True)
    y = run(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones(shape))
    return y.detach(), grad


def one_for_each(values: Tensor, level: str) -> bool:
    """Whether there are as many values as the level says, each for all that it stands for."""
    corner = values[tuple(slice(0, size) for size in LEVELS[level])]
    return torch.equal(corner.expand(SHAPE), values) and len(corner.unique()) > 0.9 * corner.numel()


def closed_is_shaken(run: Run, level: str) -> bool:
    """P21 for a closed gate: the factor in [-1, 1], the gradient's in [0, 1], at their level, each on its own."""
    runs = [factors(run) for _ in range(50)]
    forth, back = (torch.stack(each) for each in zip(*runs, strict=True))
    ranges = bool(forth.min() < -0.5 and forth.max() > 0.5 and back.min() >= 0 and back.max() > 0.5)
    count = 50 * math.prod(LEVELS[level])
    inside = bool((forth.abs() <= 1).all() and (back <= 1).all())
    apart = correlation(forth, back) <= 4 / math.sqrt(count)
    return inside and ranges and apart and all(one_for_each(f, level) and one_for_each(b, level) for f, b in runs)


@pytest.mark.parametrize("level", LEVELS)
def test_shakedrop_behind_a_closed_gate(level: str) -> None:
    torch.manual_seed(0)
    assert closed_is_shaken(ShakeDrop(1.0, level), level)
    assert not any(closed_is_shaken(ShakeDrop(1.0, level), other) for other in LEVELS if other != level)


def test_shakedrop_without_a_factor_of_its_own_for_the_gradient_is_noticed() -> None:
    """P21's negative control: what autograd does by itself."""
    torch.manual_seed(0)
    assert not closed_is_shaken(lambda x: x * (2 * torch.rand(16, 1, 1, 1) - 1), "image")
    assert not closed_is_shaken(lambda x: x * torch.rand(16, 1, 1, 1), "image")


def test_shakedrop_behind_an_open_gate() -> None:
    """P21: nothing happens, forward and backward, also where the gate may not be looked at."""
    torch.manual_seed(0)
    with torch.no_grad():
        assert sum(bool((ShakeDrop(0.5)(torch.ones(1, 2)) == 1).all()) for _ in range(40)) > 5
    layer = ShakeDrop(0.3, "image")
    seen = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for run in (layer, seen):
        torch.manual_seed(0)
        pairs = [factors(run) for _ in range(40)]
        opened = [torch.equal(forth, torch.ones(SHAPE)) for forth, _ in pairs]
        assert 20 < sum(opened) < 40
        for is_open, (_, back) in zip(opened, pairs, strict=True):
            assert torch.equal(back, torch.ones(SHAPE)) == is_open


def test_shakedrop_has_one_gate_for_the_batch() -> None:
    torch.manual_seed(0)
    gates = torch.stack([ShakeDrop(0.3, "image")(torch.ones(4, 1)) == 1 for _ in range(4000)])
    assert (gates == gates[:, :1]).all()
    assert share_is(gates[:, 0], 0.7)


@pytest.mark.parametrize(
    ("bounds", "mean"), [((-1.0, 1.0), 0.0), ((0.0, 1.0), 0.5), ((0.0, 0.0), 0.0), ((0.5, 2.0), 1.25)]
)
def test_shakedrop_in_eval_is_training_on_average(bounds: tuple[float, float], mean: float) -> None:
    """P21: p_l + (1 - p_l) E[a]; identity and inverted scaling, as of other methods, fail."""
    p = 0.3
    layer = ShakeDrop(p, "batch", forward_range=bounds)
    x = torch.tensor([[3.0]])
    torch.manual_seed(0)
    drawn = torch.cat([layer(x) for _ in range(4000)]) / 3
    factor = float(layer.eval()(x)) / 3
    assert abs(factor - ((1 - p) + p * mean)) <= 1e-7 * 3
    assert mean_is(drawn, factor)
    assert not mean_is(drawn, 1.0) and not mean_is(drawn / (1 - p), factor)
    assert layer.eval_rule == (f"times 1 - p + p * {mean:g}" if mean else "times 1 - p")
    layer.set_rate("p", 0.0)
    assert layer(x) is x


def test_shakedrop_draws_uniformly() -> None:
    torch.manual_seed(0)
    shape = (4, 25, 10, 10)
    forth, back = factors(lambda x: shakedrop(x, 1.0, forward_range=(-3.0, 1.0), backward_range=(0.5, 0.7)), shape)
    assert is_uniform(forth, -3, 1) and is_uniform(back, 0.5, 0.7)
    assert mean_is(forth, -1) and mean_is(back, 0.6)
    assert not is_uniform(forth, -3, 1.2) and not is_uniform(forth**3, -27, 1)


def test_shakedrop_steps_are_all_of_sixteen_bits() -> None:
    steps = keyed_steps((1001, 997), torch.tensor(5))
    assert steps.shape == (1001, 997) and steps.dtype == torch.int16
    counts = torch.bincount(steps.flatten().long() + 2**15, minlength=2**16).double()
    assert len(counts) == 2**16 and counts.min() > 0 and counts.max() < 45  # 15 on average
    squares = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert abs(squares - 65535) <= 4 * math.sqrt(2 * 65535)
    assert torch.equal(steps, keyed_steps((1001, 997), torch.tensor(5)))
    assert not torch.equal(steps, keyed_steps((1001, 997), torch.tensor(6)))


def test_shakedrops_key_gives_numbers_apart() -> None:
    """What forward and backward draw from one key, sample by sample, has nothing to do with each other."""
    numbers = []
    for key in torch.arange(0, 9000, 3):
        forth, back = factors(lambda x, key=key: shakedrop(x, 1.0, "image", key=key), (4, 1))
        numbers.append(torch.cat([forth, back]).flatten())
    for a, b in itertools.combinations(torch.stack(numbers).T, 2):
        assert correlation(a, b) <= 4 / math.sqrt(len(a))


def test_shakedrops_backward_meets_the_same_numbers_again() -> None:
    torch.manual_seed(0)
    x = torch.ones(SHAPE, requires_grad=True)
    y = ShakeDrop(1.0)(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.unique().numel() > 100


@pytest.mark.parametrize("producer", [("conv", "conv2d"), ("activation", "relu"), ("mul",), ("linear",)])
def test_shakedrop_refuses_a_branch_without_a_norm_at_its_end(producer: tuple[str, ...]) -> None:
    layer = ShakeDrop()
    layer.producer = producer
    with pytest.raises(
        SurgeryError, match="shakedrop at a: expected a branch that ends in a norm, got one that ends in"
    ):
        layer.build(channel_axis=1, channels=6, shape=SHAPE, site_id="a")
    for known in (("norm", "batch_norm"), ("norm", "group_norm"), ()):
        layer.producer = known
        layer.build(channel_axis=1, channels=6, shape=SHAPE, site_id="a")


def test_shakedrop_refuses_in_a_net() -> None:
    net = ZOO["pre_activation"]  # its branches end in a convolution
    with pytest.raises(PlanError, match="expected a branch that ends in a norm, got one that ends in conv2d"):
        apply_recipe(net.build(), "shakedrop_resnet", example_inputs=net.example())


def test_shakedrop_refuses_bad_options() -> None:
    with pytest.raises(SurgeryError, match=r"level: expected one of .*, got 'row'"):
        ShakeDrop(level="row")
    for bad in ((1.0, 0.0), (0.0,), (0.0, float("nan")), (0.0, float("inf")), "ab", None, (0, True)):
        with pytest.raises(SurgeryError, match="range: expected two numbers in rising order, got"):
            ShakeDrop(forward_range=bad)
        with pytest.raises(SurgeryError, match="range: expected two numbers in rising order, got"):
            shakedrop(torch.ones(2, 2), 0.5, backward_range=bad)
    with pytest.raises(SurgeryError, match="shakedrop at a: expected a known channel axis for level 'channel', got"):
        ShakeDrop(level="channel").build(channel_axis=None, channels=None, shape=(2, 3), site_id="a")
    with pytest.raises(SurgeryError, match=r"shakedrop at a: expected a batch \(B, \.\.\.\), got"):
        ShakeDrop().build(channel_axis=None, channels=None, shape=(), site_id="a")


def test_shakedrop_by_channels_at_the_end() -> None:
    torch.manual_seed(0)
    layer = ShakeDrop(1.0, "channel")
    layer.build(channel_axis=-1, channels=6, shape=(4, 9, 6), site_id="a")
    forth, back = factors(layer, (4, 9, 6))
    for each in (forth, back):
        assert torch.equal(each, each[:, :1].expand_as(each)) and len(each.unique()) == 24


# ---- Shake-Shake ----


def branches(batch: int) -> tuple[Tensor, Tensor]:
    """Two branches that tell their weights: the first is seen in the first column, the second in the second."""
    return torch.tensor([[1.0, 0.0]]).repeat(batch, 1), torch.tensor([[0.0, 1.0]]).repeat(batch, 1)


def weights(run: Callable[[Tensor, Tensor], Tensor], batch: int = 1) -> tuple[Tensor, ...]:
    """The weights of both branches in forward, and those of their gradients."""
    a, b = (each.requires_grad_() for each in branches(batch))
    y = run(a, b)
    grads = torch.autograd.grad(y, (a, b), torch.ones(batch, 2))
    return (*y.detach().unbind(1), *(grad[:, 0] for grad in grads))


def mixes_twice(run: Callable[[Tensor, Tensor], Tensor], batch: int = 100_000) -> bool:
    """P20: the weights sum to 1 (times 2 here, as the sum's are 1 and 1), and the gradient's are others."""
    forth_a, forth_b, back_a, back_b = weights(run, batch)
    ones = torch.full((batch,), 2.0)
    convex = torch.allclose(forth_a + forth_b, ones) and torch.allclose(back_a + back_b, ones)
    return convex and is_uniform(forth_a, 0, 2) and is_uniform(back_a, 0, 2) and correlation(forth_a, back_a) <= 0.01


def plain_mix(a: Tensor, b: Tensor) -> Tensor:
    u = torch.rand(len(a), 1)
    return 2 * (u * a + (1 - u) * b)


def free_mix(a: Tensor, b: Tensor) -> Tensor:
    return 2 * (torch.rand(len(a), 1) * a + torch.rand(len(a), 1) * b)


def test_shake_shake_mixes_forward_and_backward_apart() -> None:
    """P20; the gradient that autograd gives by itself, and weights that do not sum to one, are noticed."""
    torch.manual_seed(0)
    assert mixes_twice(ShakeShake())
    assert not mixes_twice(plain_mix)
    assert not mixes_twice(free_mix)
    assert not mixes_twice(ShakeShake(0.5))
    assert not mixes_twice(ShakeShake(backward="keep")) and not mixes_twice(ShakeShake(backward="even"))
    assert not mixes_twice(ShakeShake(level="batch"))


@pytest.mark.parametrize("weighing", ["sum", "mean"])
def test_shake_shake_in_eval_is_half_and_half(weighing: str) -> None:
    """P20: exactly; twice half is the plain sum."""
    a, b = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    layer = ShakeShake(weights=weighing).eval()
    assert torch.equal(layer(a, b), a + b if weighing == "sum" else 0.5 * a + 0.5 * b)
    assert layer.eval_rule == (
        "identity" if weighing == "sum" else "the mean of the two branches in place of their sum"
    )
    layer.set_rate("p", 0.0)
    assert torch.equal(layer.train()(a, b), a + b)


@pytest.mark.parametrize("level", ["batch", "image"])
@pytest.mark.parametrize("weighing", ["sum", "mean"])
@pytest.mark.parametrize("backward", ["shake", "even", "keep"])
@pytest.mark.parametrize("forward", ["shake", "even"])
def test_shake_shake_is_the_formula(forward: str, backward: str, weighing: str, level: str) -> None:
    """With the numbers that it draws, against u * z forward and v * z backward, written with `detach`."""
    options = {"forward": forward, "backward": backward, "level": level, "weights": weighing}
    a, b = torch.randn(6, 3, 4, 5).requires_grad_(), torch.randn(6, 3, 4, 5).requires_grad_()
    up = torch.randn(6, 3, 4, 5)
    torch.manual_seed(2)
    y = shake_shake(a, b, **options)
    grads = torch.autograd.grad(y, (a, b), up)
    count = 6 if level == "image" else 1
    torch.manual_seed(2)
    u, v = torch.rand(2 * count + 1)[1:].view(2, count, 1, 1, 1)
    u = u if forward == "shake" else torch.full_like(u, 0.5)
    v = {"shake": v, "even": torch.full_like(v, 0.5), "keep": u}[backward]
    total = 2 if weighing == "sum" else 1

    def shaken(z: Tensor, forth: Tensor, back: Tensor) -> Tensor:
        return total * (back * z + ((forth - back) * z).detach())

    expected = shaken(a, u, v) + shaken(b, 1 - u, 1 - v)
    assert torch.allclose(y, expected, atol=1e-5)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, (a, b), up), strict=True):
        assert torch.allclose(grad, wanted, atol=1e-6)


def test_shake_shake_leaves_some_forwards_even() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 2), torch.randn(3, 2)
    layer = ShakeShake(0.3, level="batch")
    shaken = torch.tensor([not torch.equal(layer(a, b), a + b) for _ in range(4000)])
    assert share_is(shaken, 0.3)


def test_shake_shake_takes_two_of_one_shape() -> None:
    with pytest.raises(
        SurgeryError, match=r"inputs of shake_shake: expected two of one shape .*, got \(\(2, 3\), \(2, 1\)\)"
    ):
        ShakeShake()(torch.ones(2, 3), torch.ones(2, 1))
    y = ShakeShake()(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3))
    assert y.dtype == torch.float32
    with pytest.raises(SurgeryError, match=r"shake_shake at a: expected a batch"):
        ShakeShake().build(channel_axis=None, channels=None, shape=(), site_id="a")
    for option in ("forward", "backward", "level", "weights"):
        with pytest.raises(SurgeryError, match=f"{option}: expected '.*, got 'no'"):
            ShakeShake(**{option: "no"})


def test_shake_shake_in_a_net() -> None:
    net = ZOO["shake_shake"]
    model, (x,) = net.build(), net.example()
    gm = apply_recipe(model, "shake_shake_cells", example_inputs=x, seed=1)
    assert [edit.kind for edit in gm.surgery.plan.edits] == ["combine"] * 2
    assert torch.equal(gm.eval()(x), model.eval()(x))
    gm.train(), model.train()
    y = gm(x)
    assert not torch.allclose(y, model(x)) and not torch.allclose(y, gm(x))
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in gm.parameters())


# ---- FractalNet's drop-path ----


def kept_inputs(layer: Callable[..., Tensor], count: int = 2) -> Tensor:
    """What each input is multiplied by."""
    return layer(*torch.eye(count)).detach()


def joins(count: int, seed: int | None, **rates: float) -> list[FractalDropPath]:
    context = Context(seed)
    made = [FractalDropPath(**rates) for _ in range(count)]
    for index, layer in enumerate(made):
        layer.context, layer.site_id = context, f"join{index}"
    return made


def by_the_paper(
    inputs: list[np.ndarray], p: float, p_global: float, own: np.ndarray, shared: np.ndarray
) -> np.ndarray:
    """Loops over what is kept: the mean of the survivors, times the number of inputs."""
    count = len(inputs)
    if shared[0] < p_global:
        survivors = [int(shared[1] * count)]
    else:
        survivors = [index for index in range(count) if own[index] >= p] or [int(own[count] * count)]
    return count * np.mean([inputs[index] for index in survivors], axis=0)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_fractal_drop_path_is_the_formula(count: int) -> None:
    inputs = list(torch.randn(count, 4, 3, dtype=torch.float64).requires_grad_().unbind())
    seen = set()
    for seed in range(500):
        torch.manual_seed(seed)
        y = fractal_drop_path(inputs, 0.5, 0.3)
        torch.manual_seed(seed)
        own, shared = torch.rand(count + 1).numpy(), torch.rand(2).numpy()
        expected = by_the_paper([x.detach().numpy() for x in inputs], 0.5, 0.3, own, shared)
        assert np.allclose(y.detach(), expected)
        seen.add(round(float(y.detach().sum()), 6))
        grads = torch.stack(torch.autograd.grad(y.sum(), inputs))
        shares = grads[:, 0, 0]
        assert (grads == shares[:, None, None]).all() and torch.isclose(
            shares.sum(), torch.tensor(float(count)).double()
        )
    assert len(seen) == 2**count - 1  # any that are not none


@pytest.mark.parametrize("count", [2, 3])
def test_fractal_drop_path_keeps_one_at_least(count: int) -> None:
    torch.manual_seed(0)
    p = 0.4
    runs = torch.stack([kept_inputs(FractalDropPath(p, 0.0), count) for _ in range(6000)])
    assert (runs.sum(1) - count).abs().max() < 1e-5  # the mean of what is kept, times the number of inputs
    alone = p**count / count
    for index in range(count):
        assert share_is(runs[:, index] > 0, 1 - p + alone)
        assert mean_is(runs[:, index], 1)
    only = (runs > 0).sum(1) == 1
    assert share_is(only, count * (p ** (count - 1) * (1 - p)) + p**count)
    assert set(kept_inputs(FractalDropPath(1.0, 0.0), count).tolist()) == {0.0, float(count)}


def test_fractal_drop_path_drops_what_it_expects() -> None:
    torch.manual_seed(0)
    for rates in ({"p": 0.15, "p_global": 0.5}, {"p": 0.6, "p_global": 0.0}, {"p": 0.0, "p_global": 1.0}):
        layer = FractalDropPath(**rates)
        dropped = torch.stack([(kept_inputs(layer) == 0).double().mean() for _ in range(3000)])
        assert mean_is(dropped, layer.expected_drop((2, 3)))
        assert not mean_is(dropped, layer.expected_drop((2, 3)) + 0.05)


def columns(layers: list[FractalDropPath], forwards: int) -> Tensor:
    """The weights of the first input: one row a forward, one column a join."""
    return torch.stack([torch.stack([kept_inputs(layer)[0] for layer in layers]) for _ in range(forwards)])


def agree(weights: Tensor) -> bool:
    """Whether a forward keeps one column in all joins, and not always the same."""
    return bool((weights == weights[:, :1]).all() and set(weights.unique().tolist()) == {0.0, 2.0})


@pytest.mark.parametrize("seed", [None, 3])
def test_fractal_drop_path_keeps_one_column_of_the_net(seed: int | None) -> None:
    torch.manual_seed(0)
    weights = columns(joins(4, seed, p=0.0, p_global=1.0), 400)
    assert agree(weights) and share_is(weights[:, 0] > 0, 0.5)
    apart = torch.cat([columns(joins(1, seed and seed + index, p=0.0, p_global=1.0), 400) for index in range(4)], 1)
    assert not agree(apart)  # each join with a draw of its own


@pytest.mark.parametrize("seed", [None, 3])
def test_fractal_drop_path_is_local_or_global_in_the_whole_net(seed: int | None) -> None:
    torch.manual_seed(0)
    weights = columns(joins(6, seed, p=0.0, p_global=0.5), 600)
    is_global = weights[:, :1] != 1  # with p = 0, what is local is whole
    assert ((weights != 1) == is_global).all() and share_is(is_global, 0.5)
    mixed = columns(joins(6, seed, p=0.5, p_global=0.5), 600)
    whole = (mixed == mixed[:, :1]).all(1)  # all joins of a local forward alike by chance: 2 * 0.375^6 + 0.25^6
    assert share_is(whole, 0.5 + 0.5 * (2 * 0.375**6 + 0.25**6))


@pytest.mark.parametrize("seed", [None, 3])
def test_fractal_drop_path_agrees_when_it_is_run_again(seed: int | None) -> None:
    """Under checkpointing, with several forwards before all backwards, and when compiled."""
    layers = joins(3, seed, p=0.0, p_global=1.0)

    def net(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x, 3 * x)
        return x

    torch.manual_seed(0)
    for how in (net, lambda x: checkpoint(net, x, use_reentrant=False), torch.compile(net, backend="aot_eager")):
        inputs = [torch.ones(1, requires_grad=True) for _ in range(12)]
        outputs = [how(x) for x in inputs]
        for y in reversed(outputs):
            y.backward()
        results = torch.cat(outputs).tolist()
        assert set(results) == {8.0, 216.0}  # 2 * 2 * 2, and 6 * 6 * 6
        assert [x.grad.item() for x in inputs] == results


def test_fractal_drop_path_in_eval_is_the_sum() -> None:
    a, b, c = torch.randn(3, 4, 5)
    layer = FractalDropPath().eval()
    assert torch.equal(layer(a, b), a + b) and torch.equal(layer(a, b, c), a + b + c)
    layer = FractalDropPath(0.0, 0.0)
    assert torch.equal(layer(a, b), a + b)


def test_fractal_drop_path_refuses() -> None:
    for inputs in ([], [torch.ones(2)], [torch.ones(2), torch.ones(3)]):
        with pytest.raises(SurgeryError, match="inputs of fractal_drop_path: expected two or more of one shape, got"):
            fractal_drop_path(inputs)
    with pytest.raises(SurgeryError, match=r"p: expected a number in \[0, 1\], got 2"):
        fractal_drop_path([torch.ones(2), torch.ones(2)], 0.1, 2)


def test_fractal_drop_path_in_a_net() -> None:
    """All joins of a global forward keep one side; in eval the net is what it was."""
    entry = {"pattern": "residual_add", "edge": "output", "insert": "fractal_drop_path"}
    recipe = plain_recipe(**entry, **{"with": {"p": 0.0, "p_global": 1.0}})
    net = ZOO["cells"]
    model, (x,) = net.build(), net.example()
    gm = apply_recipe(model, recipe, example_inputs=x)
    assert torch.equal(gm.eval()(x), model.eval()(x))
    sides: list[int] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        sides.append([torch.equal(y, 2 * each) for each in inputs].index(True))

    for layer in gm.surgery.regularizers.values():
        layer.register_forward_hook(note)
    gm.train()
    forwards = []
    for _ in range(12):
        gm(x)
        forwards.append(set(sides))
        assert len(sides) == len(gm.surgery.regularizers) > 5
        sides.clear()
    assert {0} in forwards and {1} in forwards and {0, 1} not in forwards


def test_reprs() -> None:
    assert repr(ScheduledDropPath(0.2)) == "ScheduledDropPath(p=0.2)"
    ranges = "forward_range=(-1.0, 1.0), backward_range=(0.0, 1.0)"
    assert repr(ShakeDrop(0.2)) == f"ShakeDrop(p=0.2, level='pixel', {ranges})"
    told = "forward='shake', backward='keep', level='image', weights='sum'"
    assert repr(ShakeShake(backward="keep")) == f"ShakeShake(p=1, {told})"
    assert repr(FractalDropPath()) == "FractalDropPath(p=0.15, p_global=0.5)"
