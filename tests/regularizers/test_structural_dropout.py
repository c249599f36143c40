"""Structural dropout against its formula in NumPy, against nets that were really cut, and where it must not go."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dropsurgery import PlanError, SurgeryWarning, apply_recipe
from dropsurgery.context import Context
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._uniform import uniform
from dropsurgery.regularizers.structural_dropout import (
    StructuralDropout,
    drawn_width,
    keep_first,
    structural_dropout,
)


def grid(units: int, lower_bound: int | None, step: int) -> list[int]:
    first = max(1, units // 8) if lower_bound is None else lower_bound
    return list(range(first, units, step))


def reference_width(u: np.ndarray, p: float, units: int, lower_bound: int | None, step: int) -> int:
    widths = grid(units, lower_bound, step)
    return widths[int(u[1] * len(widths))] if u[0] < p else units


def reference(x: np.ndarray, width: int, axis: int, normalize: bool = True) -> np.ndarray:
    """Unit by unit."""
    y = np.zeros_like(x)
    units = x.shape[axis]
    for unit in range(width):
        at = [slice(None)] * x.ndim
        at[axis] = unit
        y[tuple(at)] = x[tuple(at)] * (units / width if normalize else 1)
    return y


GRIDS = [(64, None, 1), (64, 1, 1), (10, 3, 4), (7, 6, 1), (2, 1, 1), (33, 2, 5), (8, 1, 7), (8, 1, 100)]


# -- what is drawn ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("units", "lower_bound", "step"), GRIDS)
def test_widths_are_those_of_the_formula(units: int, lower_bound: int | None, step: int) -> None:
    numbers = np.random.default_rng(0).random((500, 2), dtype=np.float32)
    numbers[:4] = [[0, 0], [0, np.float32(1) - 2**-24], [1 - 2**-24, 0], [0.5, 0.5]]
    got = drawn_width(torch.from_numpy(numbers.T.copy()), torch.tensor(0.5), units, lower_bound, step)
    assert got.tolist() == [reference_width(u, 0.5, units, lower_bound, step) for u in numbers]


@pytest.mark.parametrize(("shape", "axis"), [((3, 10), 1), ((2, 4, 10), -1), ((2, 10, 3, 5), 1), ((2, 3, 5, 10), -1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_first_units_are_kept_and_scaled(shape: tuple[int, ...], axis: int, normalize: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    for width in range(1, 11):
        y = keep_first(x, torch.tensor(width), normalize, axis)
        assert np.allclose(y.numpy(), reference(x.numpy(), width, axis, normalize), rtol=1e-15, atol=0)
        assert int((y != 0).any(dim=tuple(i for i in range(x.dim()) if i != axis % x.dim())).sum()) == width


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_the_function_is_the_reference_with_its_draws(p: float) -> None:
    """One draw for the whole batch, and the numbers of a key: a first that cuts, a second that says where."""
    torch.manual_seed(0)
    x = torch.randn(4, 10, 3, 3, dtype=torch.float64)
    for number in range(60):
        key = torch.tensor(number)
        width = reference_width(uniform((2,), x.device, key).numpy(), p, 10, 2, 3)
        y = structural_dropout(x, p, 2, 3, key=key)
        assert np.allclose(y.numpy(), reference(x.numpy(), width, 1), rtol=1e-15, atol=0)


def widths_drawn(p: float, units: int, lower_bound: int | None, step: int, times: int) -> Counter[int]:
    """By the layer itself, from what is left of ones."""
    layer, x = StructuralDropout(p, lower_bound, step), torch.ones(1, units)
    return Counter(int((layer(x) != 0).sum()) for _ in range(times))


def cut_as_often(counts: Counter[int], p: float, units: int) -> bool:
    times = counts.total()
    return abs((times - counts[units]) / times - p) <= 3 * math.sqrt(p * (1 - p) / times)


def alike(counts: Counter[int], widths: list[int]) -> bool:
    """Chi-square of a uniform choice among the widths, at 0.001 by Wilson and Hilferty."""
    cuts = sum(counts[width] for width in widths)
    expected, freedom = cuts / len(widths), len(widths) - 1
    statistic = sum((counts[width] - expected) ** 2 / expected for width in widths)
    critical = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    return statistic < critical


@pytest.mark.parametrize(("p", "lower_bound", "step"), [(0.5, None, 1), (0.8, 4, 4), (0.05, 1, 1)])
def test_cuts_are_as_frequent_as_p_and_uniform(p: float, lower_bound: int | None, step: int) -> None:
    torch.manual_seed(0)
    units, widths = 24, grid(24, lower_bound, step)
    counts = widths_drawn(p, units, lower_bound, step, 6000)
    assert set(counts) <= {*widths, units}
    assert cut_as_often(counts, p, units)
    assert alike(counts, widths) or p < 0.1
    assert not alike(counts, [*widths, units])  # with the full width among them


def test_the_full_width_is_no_cut() -> None:
    assert 24 not in widths_drawn(1.0, 24, 1, 1, 3000)


@pytest.mark.parametrize("p", [0.01, 0.5])
def test_the_released_codes_last_commit_fails_the_same_check(p: float) -> None:
    """The negative control: it compares acos(1 - 2p), 0.2 and 1.57, to a number in [0, 1)."""
    torch.manual_seed(0)
    of_the_code = torch.tensor(math.acos(1 - 2 * p))
    numbers = torch.rand(2, 6000)
    for rate, holds in ((torch.tensor(p), True), (of_the_code, False)):
        counts = Counter(drawn_width(numbers, rate, 24).tolist())
        assert cut_as_often(counts, p, 24) == holds
    cut = 1 - counts[24] / counts.total()
    assert cut == 1 if p == 0.5 else 0.18 < cut < 0.22


def test_a_choice_that_is_not_uniform_fails_the_same_check() -> None:
    """The negative control: squares of uniform numbers."""
    torch.manual_seed(0)
    numbers = torch.rand(2, 6000)
    half = torch.tensor(1.0)
    assert alike(Counter(drawn_width(numbers, half, 24, 1).tolist()), grid(24, 1, 1))
    assert not alike(Counter(drawn_width(numbers.square(), half, 24, 1).tolist()), grid(24, 1, 1))


def test_expected_share() -> None:
    layer = StructuralDropout(0.5, 1)
    assert layer.expected_drop((2, 4)) == pytest.approx(0.5 * (1 - 2 / 4))
    assert StructuralDropout(1.0, 2, 3).expected_drop((2, 10)) == pytest.approx(1 - 5 / 10)  # 2, 5, 8
    layer.set_width(3)
    assert layer.expected_drop((2, 4)) == 0.25


# -- values ----------------------------------------------------------------------------------------------------------
def test_the_sum_of_constant_features_stays() -> None:
    x = torch.full((3, 12, 4, 4), 0.7, dtype=torch.float64)
    for width in range(1, 13):
        y = keep_first(x, torch.tensor(width))
        assert torch.allclose(y.sum(1), x.sum(1), rtol=1e-14)
        plain = keep_first(x, torch.tensor(width), normalize=False)
        assert width == 12 or not torch.allclose(plain.sum(1), x.sum(1), rtol=1e-3)


def test_what_is_kept_at_one_width_is_kept_at_larger_ones() -> None:
    x = torch.rand(2, 9) + 0.1
    kept = [keep_first(x, torch.tensor(width)) != 0 for width in range(1, 10)]
    assert all(bool((wide | ~narrow).all()) for narrow, wide in pairwise(kept))


def test_gradient_is_the_factor() -> None:
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    keep_first(x, torch.tensor(2)).sum().backward()
    assert torch.equal(x.grad, torch.from_numpy(reference(np.ones(x.shape), 2, 1)))
    assert torch.autograd.gradcheck(lambda x: keep_first(x, torch.tensor(4)), x)


MAPS = {
    "zeros": torch.zeros(2, 6, 5, 3),
    "constant": torch.full((2, 6, 5, 3), 2.0),
    "negative": -torch.rand(2, 6, 5, 3),
    "one channel": torch.rand(2, 1, 5, 3),
    "one point": torch.rand(2, 6, 1, 1),
    "one sample": torch.rand(1, 6, 5, 3),
    "dead channel": torch.rand(2, 6, 5, 3) * (torch.arange(6) != 2).view(1, 6, 1, 1),
    "strided": torch.rand(2, 6, 5, 6)[..., ::2],
    "channels_last": torch.rand(2, 6, 5, 3).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("what", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_in_finite_out(what: str, dtype: torch.dtype) -> None:
    x = MAPS[what].to(dtype).requires_grad_()
    before = x.detach().clone()
    for number in range(12):
        y = structural_dropout(x, 1.0, 1 if x.shape[1] > 1 else None, key=torch.tensor(number))
        (grad,) = torch.autograd.grad(y.float().sum(), x)
        assert y.dtype == dtype and y.shape == x.shape and y.isfinite().all() and grad.isfinite().all()
        full = structural_dropout(x.detach().float(), 1.0, 1 if x.shape[1] > 1 else None, key=torch.tensor(number))
        assert torch.equal(y == 0, full.to(dtype) == 0)
    assert torch.equal(x, before)


def test_float16_stays_in_its_range() -> None:
    """2048 times what is kept: a product in float16 is infinite."""
    x = torch.full((1, 2048), 100.0, dtype=torch.float16, requires_grad=True)
    y = keep_first(x, torch.tensor(1))
    y.float().sum().backward()
    assert y[0, 0] == 65504 and not y[0, 1:].any() and x.grad.isfinite().all()
    assert (x.detach() * 2048).isinf().any()


def test_one_unit_has_nothing_to_cut() -> None:
    x = torch.randn(3, 1, 4, 4)
    assert torch.equal(structural_dropout(x, 1.0), x)
    assert StructuralDropout(1.0).expected_drop((3, 1, 4, 4)) == 0


# -- a set width -----------------------------------------------------------------------------------------------------
def built(units: int = 8, **options: Any) -> StructuralDropout:
    layer = StructuralDropout(**options)
    layer.build(channel_axis=-1, channels=units, shape=(4, units), site_id="a")
    return layer


@pytest.mark.parametrize("training", [True, False])
def test_a_set_width_holds_in_training_and_eval(training: bool) -> None:
    layer, x = built(p=0.5).train(training), torch.randn(4, 8)
    state = torch.get_rng_state()
    for width in (3, 8, 1):
        layer.set_width(width)
        assert torch.equal(layer(x), keep_first(x, torch.tensor(width)))
        layer.set_rate("p", 0.0)
        assert torch.equal(layer(x), keep_first(x, torch.tensor(width)))
    assert torch.equal(layer(x), keep_first(x, torch.tensor(1)))
    layer.set_width(8)
    assert torch.equal(layer(x), x)
    layer.set_width(None)
    assert layer(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_a_width_moves_with_the_layer() -> None:
    layer = built()
    layer.set_width(3)
    for moved in (layer.to("meta"), layer.to_empty(device="cpu"), layer.half()):
        assert moved.budget.dtype == torch.int64
    assert int(layer.budget) == 3 and layer.width == 3 and layer.state_dict() == {}


def test_eval_width_is_for_eval_alone() -> None:
    layer, x = built(p=0.0, eval_width=3), torch.randn(4, 8)
    assert layer(x) is x
    assert torch.equal(layer.eval()(x), keep_first(x, torch.tensor(3)))
    layer.set_width(5)
    assert torch.equal(layer(x), keep_first(x, torch.tensor(5)))
    assert layer.eval_rule == "keeps the first 3 units"
    with pytest.raises(SurgeryError, match=r"structural_dropout at a: expected .*eval_width of 9 at least, got 8"):
        built(eval_width=9)


def test_nothing_is_compiled_anew_when_width_or_rate_moves() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer, x = built(p=0.5).eval(), torch.randn(4, 8)
    run = torch.compile(layer, fullgraph=True, backend=counter)
    for width in (3, 5, 1, 8, 2):
        layer.set_width(width)
        assert torch.equal(run(x), keep_first(x, torch.tensor(width)))
    assert counter.frame_count == 1
    layer.set_width(None)
    assert torch.equal(run(x), x)
    layer.train()
    seen = set()
    for step in range(40):
        layer.set_rate("p", 0.4 + step / 100)
        seen.add(int((run(x) != 0).any(0).sum()))
    assert counter.frame_count == 3 and len(seen) > 3


# -- one width for several sites -------------------------------------------------------------------------------------
class Wide(nn.Module):
    """Two hidden layers of different width."""

    def __init__(self, first: int = 16, second: int = 32) -> None:
        super().__init__()
        self.fc1, self.act1 = nn.Linear(5, first), nn.ReLU()
        self.fc2, self.act2 = nn.Linear(first, second), nn.ReLU()
        self.fc3 = nn.Linear(second, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.act2(self.fc2(self.act1(self.fc1(x)))))


def recipe(pattern: str = "hidden", edge: str = "output", where: dict | None = None, **options: Any) -> dict:
    entry: dict[str, Any] = {"name": "e", "pattern": pattern, "edge": edge, "insert": "structural_dropout"}
    entry |= {"with": options} | ({"where": where} if where else {})
    return {"version": 1, "name": "r", "patterns": {"hidden": ["linear", "activation"]}, "entries": [entry]}


def widths_of(gm: Any, x: Tensor, times: int) -> Iterator[list[int]]:
    """What each site keeps, forward by forward."""
    seen: list[int] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        kept = (y != 0).any(0) | (args[0] == 0).all(0)
        left_out = (~kept).nonzero()
        seen.append(int(left_out[0]) if len(left_out) else kept.numel())

    handles = [site.register_forward_hook(note) for site in gm.surgery.regularizers.values()]
    for _ in range(times):
        seen.clear()
        gm(x)
        yield list(seen)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("seed", [None, 3])
def test_sites_of_one_share_have_one_relative_width(seed: int | None) -> None:
    torch.manual_seed(0)
    net = Wide()
    for parameter in net.parameters():  # so that what is 0 was cut
        nn.init.uniform_(parameter, 0.1, 0.2)
    x = torch.rand(6, 5)
    for share, together in (("all", True), (None, False)):
        gm = apply_recipe(net, recipe(p=0.5, lower_bound=1, share=share), example_inputs=x, seed=seed).train()
        drawn = []
        for narrow, wide in widths_of(gm, x, 80):
            drawn.append((narrow, wide))
            gm.surgery.step()
        both = [(narrow == 16) == (wide == 32) for narrow, wide in drawn]
        # The n-th of 15 widths is for numbers in [(n - 1) / 15, n / 15), and one number is in both places.
        cuts = [(narrow, wide) for narrow, wide in drawn if narrow < 16]
        near = [(narrow - 1) / 15 < wide / 31 and (wide - 1) / 31 < narrow / 15 for narrow, wide in cuts]
        assert (all(both) and all(near)) == together
        assert len({narrow for narrow, _ in drawn}) > 5


def test_shares_of_other_names_are_drawn_apart() -> None:
    context = Context(seed=1)
    x, drawn = torch.ones(1, 64), {}
    for site, share in (("a", "one"), ("b", "one"), ("c", "two")):
        layer = StructuralDropout(1.0, 1, share=share)
        layer.context, layer.site_id = context, site
        drawn[site] = [int((layer(x) != 0).sum()) for _ in range(10)]
    assert drawn["a"] == drawn["b"] != drawn["c"]


# -- against nets that were cut --------------------------------------------------------------------------------------
class Maps(nn.Module):
    """Conv, norm, activation; conv; flattened: as in the released nets, with the cut behind the norm."""

    def __init__(self, units: int = 12) -> None:
        super().__init__()
        self.conv1, self.bn, self.act = nn.Conv2d(3, units, 3), nn.BatchNorm2d(units), nn.ReLU()
        self.conv2, self.fc = nn.Conv2d(units, 4, 3), nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.act(self.bn(self.conv1(x)))).flatten(1))


def sliced(net: Maps, width: int) -> Maps:
    """The same net with the first units only, and the factor in the weights that read them."""
    units = net.conv1.out_channels
    cut = Maps(width).double()
    for name, own in net.state_dict().items():
        if name.startswith(("conv1", "bn")) and own.dim():
            own = own[:width]
        elif name == "conv2.weight":
            own = own[:, :width] * units / width
        cut.state_dict()[name].copy_(own)
    return cut.train(net.training)


def trained(net: nn.Module) -> nn.Module:
    """With norms that have seen something."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for values in (layer.running_mean, layer.weight, layer.bias):
                    values.copy_(torch.randn_like(values))
                layer.running_var.uniform_(0.5, 2)
    return net


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_mask_is_the_net_cut(dtype: torch.dtype, within: float) -> None:
    torch.manual_seed(0)
    net, x = trained(Maps().double()).eval(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    gm = apply_recipe(net, recipe("conv_bn_act"), example_inputs=x)
    gm.to(dtype)
    for width in range(1, 13):
        with gm.surgery.width(width):
            masked = gm.eval()(x.to(dtype))
        expected = sliced(net.double(), width)(x)
        net.to(dtype)
        assert (masked.double() - expected).norm() <= within * expected.norm()
        assert width == 12 or (sliced_plainly(net.double(), width)(x) - expected).norm() > 0.01 * expected.norm()
        net.to(dtype)


def sliced_plainly(net: Maps, width: int) -> Maps:
    """The negative control: without the factor."""
    cut = sliced(net, width)
    with torch.no_grad():
        cut.conv2.weight.mul_(width / net.conv1.out_channels)
    return cut


def heads_dropped(net: nn.Module, x: Tensor, width: int) -> Tensor:
    """A ViT whose projections read the first heads only, side by side in their columns, times heads / width."""
    net = copy.deepcopy(net)
    for block in net.blocks:
        heads = block.attn.num_heads
        with torch.no_grad():
            columns = block.attn.proj.weight.view(len(block.attn.proj.weight), heads, -1)
            columns[:, :width] *= heads / width
            columns[:, width:] = 0
    return net(x)


def test_whole_heads_of_a_vit_are_cut() -> None:
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    gm = apply_recipe(net, "structural_dropout_vit", example_inputs=x).eval()
    sites = gm.surgery.regularizers
    assert [site.full_width for name, site in sites.items() if "attention" in name] == [3, 3]
    assert [site.full_width for name, site in sites.items() if "mlp" in name] == [768, 768]
    assert torch.equal(gm(x), net(x))
    for width in (1, 2, 3):
        with gm.surgery.width({"*:attention.output": width}):
            assert torch.allclose(gm(x), heads_dropped(net, x, width), atol=1e-5)
    assert not torch.allclose(net(x), heads_dropped(net, x, 2), atol=1e-3)
    assert torch.equal(gm(x), net(x))


def test_inner_widths_of_a_bottleneck_are_cut() -> None:
    torch.manual_seed(0)
    net = trained(timm.create_model("resnet26", num_classes=5)).eval()
    x = torch.randn(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = apply_recipe(net, "structural_dropout_resnet", example_inputs=x).eval()
    assert len(gm.surgery.regularizers) == 16
    cut = copy.deepcopy(net)
    with torch.no_grad():
        for stage in (cut.layer1, cut.layer2, cut.layer3, cut.layer4):
            for block in stage:
                for conv in (block.conv2, block.conv3):
                    half = conv.in_channels // 2
                    conv.weight[:, half:] = 0
                    conv.weight[:, :half] *= 2
    with gm.surgery.width(0.5):
        expected = cut(x)
        assert (gm(x) - expected).norm() <= 1e-5 * expected.norm()


def test_a_step_of_training() -> None:
    torch.manual_seed(0)
    x = torch.rand(16, 5)
    gm = apply_recipe(Wide(), recipe(p=0.5), example_inputs=x).train()
    optimizer = torch.optim.SGD(gm.parameters(), 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        gm(x).square().mean().backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in gm.parameters())
    assert all("budget" not in name and name != "p" for name in gm.state_dict())


# -- where it must not go --------------------------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self, norm_last: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(x + self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 3), Block(), Block()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.two(self.one(self.stem(x)))).flatten(1))


IMAGE = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("edge", "refused"), [("shortcut", True), ("output", True), ("branch", False)], ids=lambda each: str(each)
)
def test_a_residual_stream_is_refused(edge: str, refused: bool) -> None:
    asked = recipe("residual_add", edge, {"index": 0})
    if refused:
        with pytest.raises(PlanError, match=r"structural_dropout at .*one.*: expected units that one block alone uses"):
            apply_recipe(Residual(), asked, example_inputs=IMAGE)
    else:
        apply_recipe(Residual(), asked, example_inputs=IMAGE)


def test_the_stem_before_a_residual_block_is_refused_and_inner_units_are_not() -> None:
    stem = recipe("stem", "output")
    with pytest.raises(PlanError, match=r"a residual stream, which go on to 'one"):
        apply_recipe(Residual(), stem, example_inputs=IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inner = apply_recipe(Residual(), recipe("conv_bn_act", where={"path": "branch"}), example_inputs=IMAGE)
        pooled = apply_recipe(Residual(), recipe("classifier", "input"), example_inputs=IMAGE)
    assert (len(inner.surgery.regularizers), len(pooled.surgery.regularizers)) == (2, 1)


def test_a_batch_norm_that_sees_the_cut_is_named() -> None:
    with pytest.warns(SurgeryWarning, match=r"the batch norm one\.bn2 behind it sees channels that are cut"):
        apply_recipe(Residual(), recipe("conv_bn", "conv", {"index": 0}), example_inputs=IMAGE)


def test_a_batch_norm_behind_a_depthwise_convolution_sees_the_cut_too() -> None:
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expand, self.bn1, self.act1 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
            self.each, self.bn2, self.act2 = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU()
            self.project = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.project(self.act2(self.bn2(self.each(self.act1(self.bn1(self.expand(x)))))))

    with pytest.warns(SurgeryWarning, match="the batch norm bn2"):
        apply_recipe(Depthwise(), recipe("conv_bn_act", where={"index": 0}), example_inputs=IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_recipe(Depthwise(), recipe("conv_bn_act", where={"index": 1}), example_inputs=IMAGE)


def test_refusals() -> None:
    for options, message in (
        ({"lower_bound": 0}, "lower_bound: expected an integer of 1 or more, got 0"),
        ({"lower_bound": True}, "lower_bound: expected an integer of 1 or more"),
        ({"step": 0}, "step: expected an integer of 1 or more"),
        ({"normalize": 1}, "normalize: expected true or false"),
        ({"granularity": "heads"}, "granularity: expected 'channel' or 'head'"),
        ({"share": ""}, "share: expected a name"),
        ({"eval_width": 0}, "eval_width: expected an integer of 1 or more"),
    ):
        with pytest.raises(SurgeryError, match=message):
            StructuralDropout(**options)
    with pytest.raises(SurgeryError, match="lower_bound: expected less than the 8 units there are, got 8"):
        structural_dropout(torch.ones(2, 8), 0.5, 8)
    with pytest.raises(SurgeryError, match="structural_dropout at a: expected more units than its lower_bound of 1"):
        built(1)
    for width in (0, -1, True, 1.0, "3"):
        with pytest.raises(SurgeryError, match="width: expected an integer of 1 or more"):
            built().set_width(width)
    with pytest.raises(SurgeryError, match="width: expected 8 units at most, as a has, got 9"):
        built().set_width(9)
    with pytest.raises(SurgeryError, match="to be told its units by `build`"):
        _ = StructuralDropout().full_width


def test_heads_are_refused_where_there_are_none() -> None:
    layer = StructuralDropout(granularity="head")
    with pytest.raises(SurgeryError, match=r"expected heads \(B, heads, N, d\).*got shape \(2, 5, 6\)"):
        layer.build(channel_axis=-1, channels=6, shape=(2, 5, 6), site_id="a")
    layer.producer = ("activation", "relu")
    with pytest.raises(SurgeryError, match=r"got shape \(2, 6, 5, 5\) behind activation relu"):
        layer.build(channel_axis=1, channels=6, shape=(2, 6, 5, 5), site_id="a")


def test_repr() -> None:
    assert repr(StructuralDropout()) == "StructuralDropout(p=0.5, lower_bound=None, step=1)"
    layer = StructuralDropout(1.0, 2, 3, False, "head", "all", 5)
    layer.set_width(4)
    assert repr(layer) == (
        "StructuralDropout(p=1, lower_bound=2, step=3, normalize=False, granularity='head', share='all', eval_width=5, "
        "width=4)"
    )
