"""Clustering dropout: groups and rates against plain loops, what is collected and when, state, and two processes."""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from dropsurgery import PlanError, apply_recipe, plan_recipe, strip
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._clusters import k_means, offsets_of, rates_of
from dropsurgery.regularizers.clustering_dropout import (
    ClusteringDropout,
    clustering_dropout,
    drop_units,
    keep_factor,
)

SOURCES = ("feature", "weight", "derivative")
CPU = torch.device("cpu")


# ---- the rule, in plain loops ----


def groups_by_loops(values: list[float], k: int, steps: int = 20) -> tuple[list[int], list[float]]:
    """K-means on a line: begun at the quantiles (j + 1/2) / k; of two centres as near, the lower one."""
    centres = [float(np.quantile(np.array(values), (j + 0.5) / k)) for j in range(k)]
    for _ in range(steps):
        labels = [nearest_by_loops(value, centres) for value in values]
        for j in range(k):
            own = [value for value, label in zip(values, labels, strict=True) if label == j]
            centres[j] = math.fsum(own) / len(own) if own else centres[j]
    return [nearest_by_loops(value, centres) for value in values], centres


def nearest_by_loops(value: float, centres: list[float]) -> int:
    best = 0
    for j, centre in enumerate(centres):
        if abs(value - centre) < abs(value - centres[best]):
            best = j
    return best


def rates_by_loops(labels: list[int], centres: list[float], p: float, spread: float) -> list[float]:
    """pi_k = p + spread * (1/2 - t_k), shifted to the mean p over the units; as it is while none leaves [0, 0.95]."""
    low, high = min(centres), max(centres)
    raw = [spread * (0.5 - ((c - low) / (high - low) if high > low else 0.5)) for c in centres]
    shift = math.fsum(raw[label] for label in labels) / len(labels)
    return [p + raw[label] - shift for label in labels]


def responses(units: int, seed: int, kind: str = "smooth") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(units, generator=generator, dtype=torch.float64).square()
    return (values * 5).round() if kind == "ties" else values


def pi_of(response: Tensor, p: float, k: int = 4, spread: float = 0.4) -> Tensor:
    return rates_of(offsets_of(*k_means(response, k), spread), p)


@pytest.mark.parametrize("kind", ["smooth", "ties"])
@pytest.mark.parametrize(("units", "k"), [(4, 4), (7, 2), (64, 3), (64, 5), (512, 4), (512, 12)])
def test_groups_and_rates_are_those_of_plain_loops(units: int, k: int, kind: str) -> None:
    for seed in range(5):
        response = responses(units, seed, kind)
        labels, centres = k_means(response, k)
        expected, middle = groups_by_loops(response.tolist(), k)
        assert centres.tolist() == pytest.approx(middle, abs=1e-12)
        assert labels.tolist() == expected
        rates = rates_by_loops(labels.tolist(), middle, 0.5, 0.4)
        assert pi_of(response, 0.5, k).tolist() == pytest.approx(rates, abs=1e-9)
        assert pi_of(response.float(), 0.5, k).tolist() == pytest.approx(rates, abs=1e-5)
        turned = rates_by_loops(labels.tolist(), middle, 0.5, -0.4)  # the control: rates that rise with the response
        assert len(set(response.tolist())) == 1 or pi_of(response, 0.5, k).tolist() != pytest.approx(turned, abs=1e-3)


def test_a_group_without_a_value_keeps_its_centre() -> None:
    values = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 9], dtype=torch.float64)
    labels, centres = k_means(values, 3)
    expected, middle = groups_by_loops(values.tolist(), 3)
    assert centres.tolist() == middle and labels.tolist() == expected
    assert len(set(labels.tolist())) < 3


@pytest.mark.parametrize("p", [0.01, 0.05, 0.2, 0.5, 0.8, 0.94, 0.97, 1.0])
@pytest.mark.parametrize("spread", [0.0, 0.4, 1.0])
def test_rates_fall_with_the_response_and_have_the_mean_p(p: float, spread: float) -> None:
    """P1 and P2; also where the plain formula would leave [0, 0.95] and clipping it would miss p (the control)."""
    for seed in range(5):
        response = responses(100, seed).float()
        labels, centres = k_means(response, 4)
        pi = pi_of(response, p, spread=spread)
        order = response.argsort()
        assert bool((pi[order].diff() <= 0).all())
        assert pi.double().mean().item() == pytest.approx(p, abs=1e-6)
        assert pi.min() >= 0 and pi.max() <= max(p, 0.95) + 1e-6
        if spread == 0:
            assert torch.allclose(pi, torch.full_like(pi, p))
        elif p <= 0.94:
            assert pi.max() > pi.min()
        clipped = torch.tensor(rates_by_loops(labels.tolist(), centres.tolist(), p, spread)).clamp(0, 0.95)
        if p == 0.01 and spread == 1.0:
            assert abs(clipped.mean() - p) > 0.05


def test_equal_responses_have_the_rate_p() -> None:
    """P3, to the last bit."""
    for value in (0.0, 0.1, 7e-42, 3.3e38):
        for units in (4, 7, 1000):
            pi = pi_of(torch.full((units,), value), 0.3)
            assert torch.equal(pi, torch.full((units,), 0.3))


def test_the_mask_is_that_of_the_draws() -> None:
    """Each element by its number and the rate of its unit; in any dtype of the input the same mask."""
    torch.manual_seed(0)
    x, response = torch.randn(6, 5, 9), responses(9, 1)
    pi = pi_of(response, 0.4).float()
    numbers = torch.rand(x.shape)
    factor = keep_factor(numbers, pi)
    for place in np.ndindex(*x.shape):
        rate = float(pi[place[-1]])
        assert float(factor[place]) == pytest.approx(0 if float(numbers[place]) < rate else 1 / (1 - rate), rel=1e-6)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.manual_seed(3)
        wide = clustering_dropout(x.float(), response, 0.4)
        torch.manual_seed(3)
        y = clustering_dropout(x.to(dtype), response, 0.4)
        assert y.dtype == dtype and torch.equal(y == 0, wide == 0)
    torch.manual_seed(3)
    assert torch.equal(
        clustering_dropout(x.movedim(-1, 1), response, 0.4, channel_axis=1) == 0,
        torch.manual_seed(3) and torch.rand(6, 9, 5) < pi[:, None],
    )


def test_the_mean_over_draws_is_the_input() -> None:
    """P4, and the frequency of each unit; divided by the mean rate instead, it is not (the control)."""
    torch.manual_seed(0)
    draws, units = 20_000, 12
    x = torch.linspace(-2, 3, units, dtype=torch.float64)
    pi = pi_of(responses(units, 2), 0.5)
    y = drop_units(x.expand(draws, units), pi)
    error = x.abs() * (pi / (1 - pi) / draws).sqrt()
    assert bool(((y.mean(0) - x).abs() <= 4 * error).all())
    shares = (y == 0).double().mean(0)
    assert bool(((shares - pi).abs() <= 4 * (pi * (1 - pi) / draws).sqrt()).all())
    wrong = (y != 0) * x / 0.5
    assert bool(((wrong.mean(0) - x).abs() > 4 * error).any())


def test_the_gradient_is_that_of_the_mask() -> None:
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    pi = pi_of(responses(8, 0), 0.5)
    torch.manual_seed(1)
    w = torch.randn(5, 8, dtype=torch.float64)
    torch.manual_seed(2)
    y = drop_units(x, pi)
    y.backward(w)
    torch.manual_seed(2)
    assert torch.allclose(x.grad, w * keep_factor(torch.rand(5, 8), pi))


# ---- the layer: what it collects, and when its rates move ----


def bound(units: int = 8, outputs: int = 5, **arguments: Any) -> ClusteringDropout:
    """A layer of its own, in training, whose weights are the same each time."""
    layer = ClusteringDropout(**arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        layer.host_kept = [nn.Linear(units, outputs)]  # in a list: no child
    layer.bind(layer.host_kept[0])
    return layer


def batch(seed: int, rows: int = 6, units: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, units, generator=generator) * torch.linspace(0.1, 3, units)


def step(layer: ClusteringDropout, *inputs: Tensor, how: Callable[..., Tensor] | None = None) -> None:
    for x in inputs:
        y = how(layer, x) if how else layer(x)
        if y.requires_grad:
            (y.square().sum() / sum(map(len, inputs))).backward()
    layer.after_step()


def average(means: list[Tensor], ema: float) -> Tensor:
    result = means[0]
    for mean in means[1:]:
        result = ema * result + (1 - ema) * mean
    return result


def test_features_are_averaged_over_batches() -> None:
    layer = bound(ema=0.8, interval=3, p=0.4)
    means = []
    for index in range(7):
        before = layer.pi.clone()
        step(layer, batch(index))
        means.append(batch(index).abs().mean(0))
        assert torch.allclose(layer.response, average(means, 0.8), rtol=1e-5)
        assert torch.equal(layer.pi, before) is bool((index + 1) % 3)  # P5
    expected = average(means[:6], 0.8).double()
    labels, centres = groups_by_loops(expected.tolist(), 4)
    assert layer.labels.tolist() == labels and layer.centres.tolist() == pytest.approx(centres, rel=1e-5)
    assert layer.pi.tolist() == pytest.approx(rates_by_loops(labels, centres, 0.4, 0.4), abs=1e-5)
    assert layer.pi[0] > layer.pi[-1]


@pytest.mark.parametrize("learns_in_front", [True, False])
def test_derivatives_are_those_of_what_the_layer_reads(learns_in_front: bool) -> None:
    """|dL/dx| of the masked input, kept or dropped; also where nothing in front of the layer learns."""
    layer = bound(source="derivative", interval=1, ema=0.5)
    means = []
    for index in range(3):
        torch.manual_seed(index)
        x = drop_units(batch(index), layer.pi).requires_grad_()
        y = nn.functional.linear(x, layer.host.weight, layer.host.bias)
        (gradient,) = torch.autograd.grad(y.square().sum() / 6, x)
        means.append(gradient.abs().mean(0))
        torch.manual_seed(index)
        step(layer, batch(index).requires_grad_(learns_in_front))
        assert torch.allclose(layer.response, average(means, 0.5), rtol=1e-4)
    assert (gradient != 0).all()
    assert layer.pi.max() > layer.pi.min()


def test_the_weight_says_it_by_its_columns() -> None:
    layer = bound(source="weight", interval=2)
    layer(batch(0))
    layer.after_step()
    assert torch.equal(layer.pi, torch.full((8,), 0.5))
    with torch.no_grad():
        layer.host.weight.mul_(torch.linspace(0.1, 2, 8))
    layer.after_step()
    assert torch.allclose(layer.response, layer.host.weight.abs().mean(0))
    labels, centres = groups_by_loops(layer.host.weight.detach().double().abs().mean(0).tolist(), 4)
    assert layer.pi.tolist() == pytest.approx(rates_by_loops(labels, centres, 0.5, 0.4), abs=1e-5)


@pytest.mark.parametrize("source", ["feature", "derivative"])
def test_accumulated_batches_are_one(source: str) -> None:
    """Over the forwards of one optimizer step; with rates near 0, the mask is the same."""
    whole, parts = (bound(source=source, p=1e-9) for _ in range(2))
    x = batch(0)
    step(whole, x)
    step(parts, x[:4], x[4:])
    assert torch.allclose(whole.response, parts.response, rtol=1e-4) and whole.response.all()


@pytest.mark.parametrize("source", ["feature", "derivative"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_repeated_forward_counts_once(source: str, reentrant: bool) -> None:
    """What activation checkpointing runs again is no new batch; with every forward counted, it is (the control)."""
    plain, repeated = (bound(source=source) for _ in range(2))
    x = batch(0).requires_grad_()
    runs = []

    def run(layer: ClusteringDropout, x: Tensor) -> Tensor:
        def forward(x: Tensor) -> Tensor:
            runs.append(1)
            return layer(x)

        return checkpoint(forward, x, use_reentrant=reentrant)

    for layer, how in ((plain, lambda layer, x: layer(x)), (repeated, run)):
        torch.manual_seed(0)
        how(layer, x).square().sum().backward()
    assert len(runs) == 2
    assert float(plain.rows) == float(repeated.rows) == len(x)
    assert torch.equal(plain.total, repeated.total) and plain.total.all()


def test_no_gradient_is_no_error() -> None:
    for source in SOURCES:
        layer = bound(source=source, interval=1)
        with torch.no_grad():
            layer(batch(0))
        with torch.inference_mode():
            layer(batch(0))
        layer.after_step()
        assert layer.pi.isfinite().all()
        assert bool(layer.seen) is (source != "derivative")


def test_what_is_not_finite_is_left_out() -> None:
    """As in a step that a GradScaler skips; of the rest nothing is lost."""
    layer = bound(source="derivative", interval=1, ema=0.0)
    y = layer(batch(0))
    y.backward(torch.full_like(y, math.inf))
    assert float(layer.rows) == 0 and not layer.total.any()
    step(layer, batch(1))
    assert layer.response.isfinite().all() and layer.response.all() and layer.pi.isfinite().all()
    layer = bound(source="weight", interval=1)
    layer.after_step()
    before = layer.pi.clone()
    with torch.no_grad():
        layer.host.weight[0, 0] = math.nan
    layer.after_step()
    assert torch.equal(layer.pi, before)


def test_a_step_without_forward_changes_nothing() -> None:
    layer = bound(interval=1)
    layer.after_step()
    assert not layer.seen and torch.equal(layer.pi, torch.full((8,), 0.5))
    step(layer, batch(0))
    response = layer.response.clone()
    layer.after_step()
    assert torch.equal(layer.response, response)


@pytest.mark.parametrize("source", SOURCES)
def test_no_value_is_read_by_the_host(source: str) -> None:
    """Neither in a step nor when the groups are made: on the meta device there are no values."""
    layer = bound(source=source, interval=1)
    layer.host.to("meta")
    layer.to("meta")
    step(layer, batch(0).to("meta").requires_grad_())
    layer.set_rate("p", 0.3)
    assert layer.pi.is_meta and layer.steps == 1
    with pytest.raises(RuntimeError, match="meta"):  # the control
        layer.pi.max().item()


def test_only_training_is_looked_at() -> None:
    layer = bound()
    layer.eval()(batch(0))
    layer.forced = True
    layer(batch(0))
    assert float(layer.rows) == 0
    layer.forced = False
    layer.train().set_rate("p", 0.0)
    layer(batch(0))
    assert float(layer.rows) == 0


# ---- nothing stays alive ----


def kept_tensors(run: Callable[[Tensor], Tensor], steps: int = 8) -> int:
    """How many more tensors there are after steps than after a few, though nothing is collected but by counts."""

    def count() -> int:
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    counts = []
    gc.collect()
    gc.disable()
    try:
        for index in range(steps):
            run(batch(index).requires_grad_()).square().sum().backward()
            if index in (3, steps - 1):
                counts.append(count())
    finally:
        gc.enable()
    return counts[1] - counts[0]


def test_hooks_keep_no_graph_alive() -> None:
    layer = bound(source="derivative", interval=2)

    def run(x: Tensor) -> Tensor:
        layer.after_step()
        return layer(x)

    assert kept_tensors(run) == 0
    hoard: list[Tensor] = []

    def hoarding(x: Tensor) -> Tensor:  # the control
        y = layer(x)
        y.register_hook(lambda gradient: hoard.append(y))
        return y

    assert kept_tensors(hoarding) > 0


class Mark:
    """Lives as long as the node of the graph that it is put on."""


@pytest.mark.parametrize("learns_in_front", [True, False])
def test_without_backward_nothing_is_kept_either(learns_in_front: bool) -> None:
    layer = bound(source="derivative")
    gc.disable()
    try:
        y = layer(batch(0).requires_grad_(learns_in_front))
        mark = Mark()
        y.grad_fn.metadata["mark"] = mark
        node = weakref.ref(mark)
        del mark
        assert node() is not None
        del y
        assert node() is None
    finally:
        gc.enable()


def test_a_hook_that_outlives_its_layer_is_silent() -> None:
    layer = bound(source="derivative")
    y = layer(batch(0))
    del layer
    y.sum().backward()


# ---- compiled ----


@pytest.mark.parametrize("learns_in_front", [True, False])
@pytest.mark.parametrize("source", SOURCES)
def test_compiled_it_collects_the_same_in_one_graph(source: str, learns_in_front: bool) -> None:
    eager, compiled = (bound(source=source, interval=2, p=0.2) for _ in range(2))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(compiled, fullgraph=True, backend=counter)
    for index in range(6):
        for layer, run in ((eager, eager), (compiled, call)):
            torch.manual_seed(index)
            layer.set_rate("p", 0.2 + 0.05 * index)
            step(layer, batch(index).requires_grad_(learns_in_front), how=lambda _, x, run=run: run(x))
        assert torch.allclose(eager.response, compiled.response, rtol=1e-4) and eager.seen == compiled.seen
        assert torch.allclose(eager.pi, compiled.pi, atol=1e-5)
    assert compiled.pi.max() > compiled.pi.min()
    assert counter.frame_count == 1


# ---- rates ----


def test_silent_at_rate_0_and_in_eval() -> None:
    layer = bound(interval=1)
    for index in range(3):
        step(layer, batch(index))
    x = batch(9)
    plain = nn.functional.linear(x, layer.host.weight, layer.host.bias)
    assert not torch.equal(layer(x), plain)
    assert torch.equal(layer.eval()(x), plain)
    layer.train().set_rate("p", 0.0)
    assert torch.equal(layer(x), plain)
    layer.set_rate("p", 1.0)
    assert torch.equal(layer(x), nn.functional.linear(0 * x, layer.host.weight, layer.host.bias))


def test_a_moving_rate_moves_the_units() -> None:
    layer = bound(interval=1)
    step(layer, batch(0))
    for p in (0.3, 0.02, 0.9, 1.0, 0.3):
        layer.set_rate("p", p)
        assert float(layer.pi.double().mean()) == pytest.approx(p, abs=1e-6)
        assert torch.equal(layer.pi, rates_of(layer.offsets, p))
        assert layer.expected_drop((6, 8)) == p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_odd_features_give_finite_numbers(dtype: torch.dtype) -> None:
    units = 4
    odd = {
        "zero": torch.zeros(6, units),
        "constant": torch.ones(6, units),
        "negative": -batch(0, 6, units).abs() - 0.1,
        "dead unit": batch(0, 6, units) * torch.tensor([1, 0, 1, 1]),
        "ties": torch.ones(6, units) * torch.tensor([1, 1, 2, 2]),
        "large": torch.full((6, units), 1e3),
        "tiny": torch.full((6, units), 1e-40) * torch.tensor([1, 2, 3, 4]),
        "one row": batch(0, 1, units),
        "no row": batch(0, 0, units),
        "tokens": torch.randn(2, 3, units),
        "strided": batch(0, 6, 2 * units)[:, ::2],
        "a row alone": torch.randn(units),
    }
    for source in SOURCES:
        for x in odd.values():
            layer = bound(units, source=source, interval=1)
            layer.host.to(dtype)
            for _ in range(3):
                y = layer(x.to(dtype).requires_grad_())
                assert y.dtype == dtype and y.isfinite().all()
                y.float().sum().backward()
                layer.after_step()
                assert layer.pi.dtype == layer.response.dtype == torch.float32
                assert layer.pi.isfinite().all() and layer.response.isfinite().all()
                assert float(layer.pi.double().mean()) == pytest.approx(0.5, abs=1e-6)


def test_under_autocast() -> None:
    for source in SOURCES:
        layer = bound(source=source, interval=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(batch(0).requires_grad_())
        y.float().square().sum().backward()
        layer.after_step()
        assert y.dtype == torch.bfloat16 and layer.response.dtype == torch.float32 and layer.response.all()


# ---- state ----


def trained(**arguments: Any) -> ClusteringDropout:
    layer = bound(interval=2, **arguments)
    for index in range(3):
        step(layer, batch(index))
    return layer


@pytest.mark.parametrize("source", SOURCES)
def test_the_state_says_all(source: str) -> None:
    layer, twin = trained(source=source), bound(interval=2, source=source)
    state = layer.state()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "response": (8,),
        "seen": (),
        "labels": (8,),
        "centres": (4,),
        "steps": (),
    }
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    twin.load_state(torch.load(file, weights_only=True))
    copied = copy.deepcopy(layer)
    assert all(torch.equal(twin.get_buffer(name), layer.get_buffer(name)) for name in ("pi", "offsets", "response"))
    for index in range(3, 6):
        for each in (layer, twin, copied):
            torch.manual_seed(index)
            step(each, batch(index))
        assert torch.equal(twin.pi, layer.pi) and torch.equal(copied.pi, layer.pi) and twin.steps == layer.steps
    before = state["response"].clone()
    step(layer, batch(9))
    assert torch.equal(state["response"], before)  # a state is no view of the layer
    assert not layer.state_dict()


def test_a_copy_counts_for_itself() -> None:
    layer = bound(source="derivative")
    copied = copy.deepcopy(layer)
    layer(batch(0)).sum().backward()
    assert float(layer.rows) == 6 and float(copied.rows) == 0
    copied(batch(0)).sum().backward()
    assert float(layer.rows) == float(copied.rows) == 6


def test_state_is_moved_and_not_cast() -> None:
    for convert in (nn.Module.half, nn.Module.double, nn.Module.bfloat16):
        layer = trained()
        before = {name: value.clone() for name, value in layer.state().items()}
        convert(layer)
        assert all(value.dtype == before[name].dtype for name, value in layer.state().items())
        assert all(torch.equal(value, before[name]) for name, value in layer.state().items())
        assert layer.pi.dtype == torch.float32
    layer.to("meta")
    assert layer.pi.is_meta
    layer.to_empty(device="cpu")
    assert torch.equal(layer.pi, torch.full((8,), 0.5)) and not layer.seen


def bad_states(good: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "no mapping": [1, 2],
        "missing": {name: value for name, value in good.items() if name != "labels"},
        "unknown": good | {"other": torch.zeros(1)},
        "shape": good | {"response": torch.zeros(9)},
        "dtype": good | {"labels": torch.zeros(8)},
        "type": good | {"centres": [0.0] * 4},
        "group": good | {"labels": torch.full((8,), 4)},
        "nan": good | {"centres": torch.full((4,), math.nan)},
        "steps": good | {"steps": torch.tensor(-1)},
    }


@pytest.mark.parametrize("wrong", bad_states({}))
def test_a_bad_state_is_refused_with_nothing_changed(wrong: str) -> None:
    layer = trained()
    before = layer.state()
    with pytest.raises(SurgeryError, match=r"state.*: expected .*, got "):
        layer.load_state(bad_states(layer.state())[wrong])
    assert all(torch.equal(value, before[name]) for name, value in layer.state().items())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.act, self.head = nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.hidden(x)))


def clustered(net: nn.Module, x: Tensor, seed: int | None = None, clock: str = "optimizer", **arguments: Any) -> Any:
    schedule = {"kind": "linear", "end": 0.5}
    entry = {"name": "a", "pattern": "classifier", "edge": "module", "insert": "clustering_dropout", "with": arguments}
    recipe = {"version": 1, "name": "r", "clock": clock, "entries": [entry | {"schedule": schedule}]}
    return apply_recipe(net, recipe, example_inputs=x, total_steps=12, seed=seed)


class Training:
    """A training that can be written to a file and taken up from it, as after a kill."""

    def __init__(self, source: str, seed: int | None, clock: str) -> None:
        torch.manual_seed(0)
        self.gm = clustered(Net(), torch.randn(4, 6), seed, clock, source=source, interval=3).train()
        self.optimizer = torch.optim.SGD(self.gm.parameters(), 0.1, momentum=0.9)

    def run(self, begin: int, end: int) -> None:
        for index in range(begin, end):
            generator = torch.Generator().manual_seed(index)
            for _ in range(2):
                x = torch.randn(8, 6, generator=generator)
                self.gm(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, file: Path) -> None:
        parts = {"model": self.gm, "optimizer": self.optimizer, "surgery": self.gm.surgery}
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"rng": torch.get_rng_state()}, file)

    def load(self, file: Path) -> None:
        saved = torch.load(file, weights_only=True)
        for name, part in (("model", self.gm), ("optimizer", self.optimizer), ("surgery", self.gm.surgery)):
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])


@pytest.mark.parametrize(("seed", "clock"), [(None, "optimizer"), (5, "optimizer"), (5, "forward")])
@pytest.mark.parametrize("source", SOURCES)
def test_a_training_goes_on_bit_for_bit(source: str, seed: int | None, clock: str, tmp_path: Path) -> None:
    """And does not without the regularizers' state (the control)."""
    whole, first, second, control = (Training(source, seed, clock) for _ in range(4))
    torch.manual_seed(1)
    whole.run(0, 10)
    torch.manual_seed(1)
    first.run(0, 5)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    second.run(5, 10)
    (layer,), (other,) = (each.gm.surgery.regularizers.values() for each in (whole, second))
    assert layer.pi.max() > layer.pi.min() and torch.equal(layer.pi, other.pi)
    pairs = zip(whole.gm.state_dict().values(), second.gm.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    fresh = control.gm.surgery.state_dict()["regularizers"]
    control.load(tmp_path / "state")
    for site, state in fresh.items():
        control.gm.surgery.regularizers[site].load_state(state)
    control.run(5, 10)
    assert not torch.equal(whole.gm.head.weight, control.gm.head.weight)


# ---- two processes ----

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from dropsurgery import apply_recipe

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)


def train(source):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    arguments = {"source": source, "interval": 2, "p": 0.4}
    entry = {"name": "a", "pattern": "classifier", "edge": "module", "insert": "clustering_dropout", "with": arguments}
    gm = apply_recipe(net, {"version": 1, "name": "r", "entries": [entry]}, example_inputs=torch.randn(4, 6), seed=rank)
    gm.train()
    optimizer = torch.optim.SGD(gm.parameters(), 0.1)
    model = DistributedDataParallel(gm)
    features = []
    gm[1].register_forward_hook(lambda module, args, output: features.append(output.detach()))
    for index in range(4):
        x = torch.randn(3 + 5 * rank, 6, generator=torch.Generator().manual_seed(10 * index + rank))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    (layer,) = gm.surgery.regularizers.values()
    return {"state": layer.state(), "pi": layer.pi, "features": features}


torch.save({source: train(source) for source in ("feature", "derivative")}, f"{folder}/{rank}")
dist.destroy_process_group()
"""


def test_two_processes_have_the_same_rates(tmp_path: Path) -> None:
    """On batches of other numbers and sizes; what one process saw alone would give others (the control)."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    errors = [run.communicate(timeout=300)[1].decode() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    ranks = [torch.load(tmp_path / f"{rank}", weights_only=True) for rank in range(2)]
    for source in ("feature", "derivative"):
        first, second = (rank[source] for rank in ranks)
        assert all(torch.equal(first["state"][name], value) for name, value in second["state"].items())
        assert torch.equal(first["pi"], second["pi"]) and first["pi"].max() > first["pi"].min()
    first, second = (rank["feature"] for rank in ranks)
    pairs = zip(first["features"], second["features"], strict=True)
    together = average([torch.cat(pair).abs().mean(0) for pair in pairs], 0.9)
    assert torch.allclose(first["state"]["response"], together, rtol=1e-4)
    alone = average([each.abs().mean(0) for each in first["features"]], 0.9)
    assert not torch.allclose(first["state"]["response"], alone, rtol=1e-2)


# ---- in a model ----


def test_on_the_classifier_of_a_resnet() -> None:
    model = timm.create_model("resnet18", num_classes=4)
    plan = plan_recipe(model, "clustering_dropout_classifier")
    assert [(edit.site.id, edit.kind, edit.p) for edit in plan.edits] == [("fc#0:classifier.module", "swap", 0.5)]
    gm: Any = apply_recipe(model, "clustering_dropout_classifier", overrides={"classifier.with.interval": 1})
    x = torch.randn(2, 3, 64, 64)
    assert list(gm.state_dict()) == list(model.state_dict())
    assert torch.equal(gm.eval()(x), model.eval()(x))
    (layer,) = gm.train().surgery.regularizers.values()
    assert layer.pi.shape == (512,) and layer.host is gm.fc
    optimizer = torch.optim.SGD(gm.parameters(), 1e-3)
    gm(x).square().mean().backward()
    optimizer.step()
    assert layer.steps == 1 and layer.pi.max() > 0.5 > layer.pi.min()
    assert float(layer.pi.double().mean()) == pytest.approx(0.5, abs=1e-6)
    assert type(strip(gm).fc) is nn.Linear


def test_a_copy_of_the_model_has_a_layer_of_its_own() -> None:
    gm = clustered(Net(), torch.randn(4, 6), source="derivative", interval=1)
    copied = copy.deepcopy(gm)
    (layer,), (other,) = (each.surgery.regularizers.values() for each in (gm, copied))
    assert layer.host is gm.head and other.host is copied.head and layer._handle != other._handle


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("source", "features", "'feature', 'weight' or 'derivative'"),
        ("k", 1, "an integer of 2 or more"),
        ("k", 2.0, "an integer of 2 or more"),
        ("interval", 0, "an integer of 1 or more"),
        ("interval", True, "an integer of 1 or more"),
        ("spread", 1.5, r"a number in \[0, 1\]"),
        ("spread", -0.1, r"a number in \[0, 1\]"),
        ("spread", math.nan, r"a number in \[0, 1\]"),
        ("ema", 1.0, r"a number in \[0, 1\)"),
        ("ema", -0.5, r"a number in \[0, 1\)"),
        ("ema", "0.9", r"a number in \[0, 1\)"),
    ],
)
def test_arguments_out_of_range(name: str, value: Any, expected: str) -> None:
    with pytest.raises(SurgeryError, match=f"{name}: expected {expected}, got"):
        ClusteringDropout(**{name: value})


def test_more_groups_than_features_are_refused_with_nothing_changed() -> None:
    net, x = Net(), torch.randn(4, 6)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(PlanError, match="at least 17 features to make k = 17 groups of, got a layer that reads 16"):
        clustered(net, x, k=17)
    assert type(net) is Net and type(net.head) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    clustered(net, x, k=16)
    with pytest.raises(SurgeryError, match="k: expected no more groups than the 3 units, got 4"):
        clustering_dropout(torch.ones(2, 3), torch.ones(3), 0.5)


def test_where_there_is_no_linear_layer_it_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.Flatten())
    with pytest.raises(PlanError, match=r"clustering_dropout at .*: expected a linear layer .*, got Conv2d"):
        clustered(net, torch.randn(2, 3, 8, 8))
    with pytest.raises(SurgeryError, match="expected to be bound to a layer"):
        ClusteringDropout()(torch.ones(2, 8))
    with pytest.raises(SurgeryError, match=r"response: expected one number for each of 5 units, got \(6,\)"):
        clustering_dropout(torch.ones(2, 5), torch.ones(6), 0.5)


def test_repr_and_words() -> None:
    assert repr(ClusteringDropout()) == (
        "ClusteringDropout(p=0.5, source='feature', k=4, spread=0.4, interval=100, ema=0.9)"
    )
    for said in (ClusteringDropout.summary, ClusteringDropout.paper, sys.modules[ClusteringDropout.__module__].__doc__):
        assert "inspired by" in said.lower()
