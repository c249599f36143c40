"""The handle `gm.surgery`: forcing regularizers on, auditing them, seeds; what goes wrong leaves no trace."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from dropsurgery import SurgeryError, SurgeryWarning, apply_recipe, get_regularizer
from dropsurgery.auditing import arriving
from tests.laws.models import fresh, images

ENTRY = {"name": "one", "pattern": "residual_add", "edge": "output", "insert": "dropout", "with": {"p": 0.25}}
RECIPE = {"version": 1, "name": "mine", "entries": [ENTRY]}


@pytest.fixture
def gm() -> Any:
    return apply_recipe(fresh("resnet"), RECIPE, example_inputs=images("resnet")).eval()


def rates(gm: Any) -> set[float]:
    return {regularizer.p.item() for regularizer in gm.surgery.regularizers.values()}


@torch.no_grad()
def outputs(gm: Any) -> Tensor:
    return gm(images("resnet"))


def test_active_runs_in_eval_at_any_rate(gm: Any) -> None:
    usual = outputs(gm)
    with gm.surgery.active():
        assert rates(gm) == {0.25}
        assert not torch.equal(outputs(gm), usual)
    with gm.surgery.active(p=0.5):
        assert rates(gm) == {0.5}
    gm.train()
    with gm.surgery.active(p=0.0):
        assert rates(gm) == {0.0}
    assert rates(gm) == {0.25}
    assert torch.equal(outputs(gm.eval()), usual)


def test_active_within_active_and_an_audit_within(gm: Any) -> None:
    with gm.surgery.active(p=0.5):
        with gm.surgery.active(p=0.75):
            assert rates(gm) == {0.75}
        assert rates(gm) == {0.5}
        gm.surgery.audit()
        assert rates(gm) == {0.5}
    assert rates(gm) == {0.25}


def test_active_holds_while_the_clock_goes_on_and_a_state_is_loaded() -> None:
    recipe = {"version": 1, "entries": [ENTRY | {"schedule": {"kind": "linear"}}]}
    gm: Any = apply_recipe(fresh("resnet"), recipe, example_inputs=images("resnet"), total_steps=4)
    with gm.surgery.active(p=0.5):
        gm.surgery.step()
        assert rates(gm) == {0.5}
        gm.load_state_dict(gm.state_dict())
        assert rates(gm) == {0.5}
    assert rates(gm) == {0.0625}


def test_a_copy_made_within_active_is_not_active(gm: Any) -> None:
    usual = outputs(gm)
    with gm.surgery.active(p=0.5):
        copied = copy.deepcopy(gm)
    assert rates(copied) == {0.25}
    assert torch.equal(outputs(copied), usual)


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan, True, "0.1"])
def test_a_wrong_rate_changes_nothing(gm: Any, p: Any) -> None:
    usual = outputs(gm)
    with pytest.raises(SurgeryError, match=r"active: p: expected a number in \[0, 1\]"), gm.surgery.active(p=p):
        pass
    assert rates(gm) == {0.25}
    assert torch.equal(outputs(gm), usual)


def test_audit_measures_what_is_dropped(gm: Any) -> None:
    rows = gm.surgery.audit()
    assert [row.site for row in rows] == list(gm.surgery.regularizers)
    for row in rows:
        entries = math.prod(row.shape)
        assert row.p == row.expected == 0.25
        assert abs(row.measured - 0.25) < 5 * math.sqrt(0.25 * 0.75 / entries)
    assert all(row.site in str(rows) for row in rows)


@pytest.mark.parametrize("batch", [None, "given"])
def test_audit_leaves_mode_rates_and_random_state(gm: Any, batch: str | None) -> None:
    gm.layer1.train()
    modes = [module.training for module in gm.modules()]
    state = torch.get_rng_state()
    gm.surgery.audit(None if batch is None else images("resnet"))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in gm.modules()] == modes
    assert rates(gm) == {0.25}


def test_audit_leaves_the_mode_of_regularizers_that_are_no_children() -> None:
    """As those of a Sequential, whose children are its layers; here its layers are called twice."""
    act = torch.nn.ReLU()
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), act, torch.nn.Softmax(1), act)
    entry = {"name": "a", "pattern": "pair", "insert": "dropout", "with": {"p": 0.5}}
    recipe = {"version": 1, "patterns": {"pair": ["linear", "activation"]}, "entries": [entry]}
    gm: Any = apply_recipe(net, recipe, example_inputs=torch.rand(2, 4)).train()
    assert set(gm.surgery.regularizers.values()).isdisjoint(gm.modules())
    gm.surgery.audit()
    assert all(regularizer.training for regularizer in gm.surgery.regularizers.values())


def test_audit_of_the_rates_at_the_end_of_the_schedule() -> None:
    recipe = {"version": 1, "entries": [ENTRY | {"schedule": {"kind": "linear"}}]}
    gm = apply_recipe(fresh("resnet"), recipe, example_inputs=images("resnet"), total_steps=10)
    assert rates(gm) == {0.0}
    assert {row.expected for row in gm.surgery.audit()} == {0.25}
    assert rates(gm) == {0.0}


def test_audit_tells_of_adopted_layers() -> None:
    model = timm.create_model("resnet18", drop_path_rate=0.2)
    gm = apply_recipe(model, {"version": 1, "entries": [{"name": "own", "insert": "adopt"}]})
    rows = gm.surgery.audit(torch.zeros(1, 3, 64, 64))
    assert [row.p for row in rows] == [edit.p for edit in gm.surgery.plan.edits]
    assert all(math.isnan(row.measured) for row in rows)
    with gm.surgery.active(p=0.0):
        assert not any(gm.get_submodule(edit.site.module).drop_prob for edit in gm.surgery.plan.edits)
    assert [gm.get_submodule(edit.site.module).drop_prob for edit in gm.surgery.plan.edits] == [row.p for row in rows]


def test_adopted_layers_tell_their_rate_and_are_saved() -> None:
    recipe = {"version": 1, "entries": [{"name": "own", "insert": "adopt", "schedule": {"kind": "linear"}}]}
    models = [timm.create_model("resnet18", drop_path_rate=0.2) for _ in range(2)]
    gm, other = (apply_recipe(model, recipe, total_steps=4) for model in models)
    assert rates(gm) == {0.0}
    for _ in range(2):
        gm.surgery.step()
    targets = [edit.p / 2 for edit in gm.surgery.plan.edits]
    assert [adopted.p.item() for adopted in gm.surgery.regularizers.values()] == pytest.approx(targets)
    other.surgery.load_state_dict(gm.surgery.state_dict())
    assert rates(other) == rates(gm)
    site = gm.surgery.plan.edits[0].site
    assert gm.surgery.regularizers[site.id].module is gm.get_submodule(site.module)
    bad = gm.surgery.state_dict() | {"regularizers": {site.id: {"seed": torch.zeros(1)}}}
    with pytest.raises(SurgeryError, match="state: expected no entries"):
        gm.surgery.load_state_dict(bad)


def test_a_failing_audit_changes_nothing(gm: Any) -> None:
    gm.train()
    with pytest.raises(RuntimeError, match="channels"):
        gm.surgery.audit(torch.zeros(1, 5, 64, 64))
    assert all(module.training for module in gm.modules())
    assert rates(gm) == {0.25}
    assert not any(regularizer.forced for regularizer in gm.surgery.regularizers.values())


def test_with_a_seed_a_training_repeats_whatever_else_draws_numbers() -> None:
    def train(draws: int) -> list[Tensor]:
        torch.manual_seed(0)
        net: Any = apply_recipe(fresh("resnet"), RECIPE, example_inputs=images("resnet"), seed=3).train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        losses = []
        for _ in range(3):
            torch.rand(draws)
            losses.append(net(images("resnet")).square().mean())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        return losses

    assert torch.equal(torch.stack(train(0)), torch.stack(train(7)))


@pytest.mark.parametrize("seed", ["a", 1.5, True])
def test_a_seed_is_an_int(seed: Any) -> None:
    with pytest.raises(SurgeryError, match="seed: expected an int or None, got"):
        apply_recipe(fresh("resnet"), RECIPE, example_inputs=images("resnet"), seed=seed)


@pytest.mark.parametrize("name", [5, None])
def test_a_name_is_a_text(name: Any) -> None:
    with pytest.raises(SurgeryError, match="no regularizer"):
        get_regularizer(name)


def test_a_model_without_memory_gets_its_rates_with_its_memory() -> None:
    with torch.device("meta"):
        model = fresh("resnet")
    gm = apply_recipe(model, RECIPE, example_inputs=torch.empty(2, 3, 64, 64, device="meta"))
    assert rates(gm.to_empty(device="cpu")) == {0.25}


def test_print_diff(gm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gm.surgery.print_diff()
    assert "edits: 8" in capsys.readouterr().out


def test_the_state_of_another_recipe_warns() -> None:
    model = timm.create_model("resnet18", num_classes=2)
    state = apply_recipe(model, "dropblock_resnet_g4", total_steps=4).surgery.state_dict()
    other = apply_recipe(model, "dropblock_resnet_g34", total_steps=4)
    with pytest.warns(SurgeryWarning, match="dropblock_resnet_g4"):
        other.surgery.load_state_dict(state)


def test_what_arrives_by_name_is_seen() -> None:
    """A layer that a regularizer stands in for may be called by keyword."""
    layer = get_regularizer("dropout")(p=0.5)
    found = arriving({"site": layer}, lambda: layer(x=torch.zeros(2, 3)))
    assert found["site"].shape == (2, 3) and not layer._forward_pre_hooks
