"""Regularizers that stand in for a sum or for a layer's own forward keep the laws, as those put on an edge do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dropsurgery import PlanError, apply_recipe, catalogue, diff, plan_recipe, strip
from dropsurgery.regularizers._base import Rate, Regularizer
from dropsurgery.regularizers._uniform import uniform
from tests.laws import checks
from tests.laws.models import STEPS, fresh, images

MODELS = ["resnet", "efficientnet", "convnext", "vit", "smp_unet"]


class Either(Regularizer):
    """Takes one operand of a sum, twice."""

    kind, paper, summary = "combine", "a paper", "a summary"

    def __init__(self, p: Rate = 0.5) -> None:
        super().__init__(p=p)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.active:
            return a + b
        first = (uniform((1,), a.device, self.next_key()) >= self.p).to(a.dtype)
        return 2 * (first * a + (1 - first) * b)

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        return 0.5


class Noisy(Regularizer):
    """Adds noise to what its layer gives."""

    kind, paper, summary = "swap", "a paper", "a summary"

    def __init__(self, p: Rate = 0.5) -> None:
        super().__init__(p=p)

    def forward(self, x: Tensor) -> Tensor:
        y = self.own(x)
        return y * (1 + self.p * uniform(y.shape, y.device, self.next_key())).to(y.dtype) if self.active else y

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        return 0.0


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(catalogue._registered["regularizers"], "either", Either)
    monkeypatch.setitem(catalogue._registered["regularizers"], "noisy", Noisy)
    yield


def entry(name: str, pattern: str, edge: str, insert: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "pattern": pattern, "edge": edge, "insert": insert, "optional": True, **more}


STAND_INS = {
    "version": 1,
    "name": "stand-ins",
    "defaults": {"with": {"p": 0.4}, "schedule": {"kind": "linear"}},
    "entries": [
        entry("sums", "residual_add", "output", "either"),
        entry("behind them", "residual_add", "output", "dropout"),
        entry("linear", "linear", "module", "noisy"),
        entry("conv", "conv_bn", "conv_module", "noisy"),
        entry("conv and activation", "conv_bn_act", "conv_module", "noisy"),
        entry("activation", "conv_bn_act", "act_module", "noisy", where={"exclude": "*.relu"}),
        entry("pooling", "pool", "module", "noisy"),
    ],
}


def convert(name: str, model: nn.Module, recipe: Any = STAND_INS) -> Any:
    return apply_recipe(model, recipe, example_inputs=images(name), total_steps=STEPS)


@pytest.mark.parametrize("name", MODELS)
def test_the_laws(name: str) -> None:
    model = fresh(name)
    with checks.check_untouched(model):
        gm = convert(name, model)
    kinds = {edit.kind for edit in gm.surgery.plan.edits}
    assert kinds == {"insert", "combine", "swap"}

    def call(net: nn.Module) -> Any:
        return net(images(name))

    checks.check_outputs(model, gm, call)
    checks.check_state(model, gm)
    checks.check_identity(model, gm)
    checks.check_hooks(model, gm, call)
    for _ in range(STEPS):
        gm.surgery.step()
    checks.check_noise(gm, call)
    for other in (copy.deepcopy(gm), checks.saved(gm)):
        checks.check_copy(gm, other, call)
    plain = strip(gm)
    assert type(plain) is type(model) and not isinstance(plain, fx.GraphModule)
    checks.check_same(checks.run(model, call, True), checks.run(plain, call, True))
    flat = gm.surgery.flatten()
    checks.check_same(checks.run(gm, call, False), checks.run(flat, call, False))
    checks.check_same(checks.run(gm, call, True), checks.run(flat, call, True))


def test_hosts_are_those_of_the_copy() -> None:
    gm = convert("resnet", fresh("resnet"))
    for net in (gm, copy.deepcopy(gm), checks.saved(gm)):
        swaps = [edit.site for edit in net.surgery.plan.edits if edit.kind == "swap"]
        assert swaps
        for site in swaps:
            assert net.surgery.regularizers[site.id].host is net.get_submodule(site.module)


def test_the_diff_shows_what_stood_there() -> None:
    lines = diff(convert("resnet", fresh("resnet"))).splitlines()
    taken = [line for line in lines if line.startswith("-")]
    assert any("iadd(" in line for line in taken) and any("Conv2d(" in line for line in taken)
    assert not any("write_back" in line for line in taken)
    assert any("either(" in line for line in lines) and any("noisy(" in line for line in lines)


REFUSED = {
    "a swap on an edge": (entry("a", "conv_bn_act", "output", "noisy"), "needs an edge named 'module'"),
    "an insertion at a layer": (entry("a", "linear", "module", "dropout"), "needs an edge that a tensor travels on"),
    "a sum that is none": (entry("a", "conv_bn_act", "output", "either"), "stands in for a sum of two tensors"),
    "an operand": (entry("a", "residual_add", "branch", "either"), "stands in for a sum of two tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_kind_where_it_is_none(case: str) -> None:
    refused, reason = REFUSED[case]
    with pytest.raises(PlanError, match=reason):
        plan_recipe(fresh("resnet"), {"version": 1, "entries": [refused]}, example_inputs=images("resnet"))


def test_a_layer_that_is_called_elsewhere_too() -> None:
    shared = entry("a", "conv_bn_act", "act_module", "noisy", where={"module": "encoder.layer1.0.relu"})
    with pytest.raises(PlanError, match="is called 2 times, of which 1 are sites"):
        plan_recipe(fresh("smp_unet"), {"version": 1, "entries": [shared]}, example_inputs=images("smp_unet"))


def test_two_stand_ins_for_one_sum() -> None:
    twice = [
        entry("a", "residual_add", "output", "either"),
        entry("b", "residual_add", "output", "either", stack=True, **{"with": {"p": 0.1}}),
    ]
    with pytest.raises(PlanError, match="stands there already"):
        plan_recipe(fresh("resnet"), {"version": 1, "entries": twice}, example_inputs=images("resnet"))


def test_each_edit_has_a_site_of_its_own() -> None:
    gm = convert("resnet", fresh("resnet"))
    assert len({edit.site.id for edit in gm.surgery.plan.edits}) == len(gm.surgery.plan.edits)
    assert len(gm.surgery.regularizers) == len(gm.surgery.plan.edits)


class Constrained(Noisy):
    """Counts the steps of the optimizer."""

    steps = 0

    def after_step(self) -> None:
        self.steps += 1


def test_the_clock_tells_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalogue._registered["regularizers"], "noisy", Constrained)
    gm = convert("resnet", fresh("resnet"))
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.01)
    for _ in range(3):
        gm(images("resnet")).sum().backward()
        optimizer.step()
    counts = {r.steps for r in gm.surgery.regularizers.values() if isinstance(r, Constrained)}
    assert counts == {3}
    gm.surgery.load_state_dict(gm.surgery.state_dict())
    assert {r.steps for r in gm.surgery.regularizers.values() if isinstance(r, Constrained)} == {3}
