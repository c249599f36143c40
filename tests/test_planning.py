"""What a recipe comes to on a model: which sites, at which rates, how edits on one edge meet, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dropsurgery import PlanError, RecipeError, SurgeryWarning, apply_recipe, find_sites, plan_recipe
from dropsurgery.models import make_model
from dropsurgery.planning import Plan

ENTRY = {"name": "one", "pattern": "residual_add", "edge": "output", "insert": "dropout", "with": {"p": 0.1}}
# The residual blocks of resnet18, two a stage.
BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return make_model("resnet18")


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return make_model("resnet50")


def recipe(*entries: dict[str, Any], **head: Any) -> dict[str, Any]:
    return {"version": 1, "name": "mine", "entries": [ENTRY | entry for entry in entries], **head}


def blocks(plan: Plan) -> list[str]:
    return [edit.site.id.split(".iadd")[0] for edit in plan.edits]


# -- the bundled placements ----------------------------------------------------------------------------------
def test_dropblock_on_resnet50(resnet50: nn.Module) -> None:
    plan = plan_recipe(resnet50, "dropblock_resnet_g34")
    assert plan.hits == {"conv branch": 18, "last conv of the branch": 9, "shortcut": 9}
    assert Counter(edit.site.stage for edit in plan.edits) == {3: 24, 4: 12}
    sources = [edit.site.at.source for edit in plan.edits if edit.entry == "shortcut" and edit.site.at]
    assert sum("downsample" in source.meta["path"] for source in sources) == 2


def test_rates_of_the_stages_are_exact(resnet50: nn.Module) -> None:  # P10
    scale = {"stage": {3: 0.25, 2: 0.0625, 1: 0.015625}}
    plan = plan_recipe(resnet50, recipe({"insert": "dropblock", "scale": scale}))
    expected = {4: 0.1, 3: 0.025, 2: 0.00625, 1: 0.0015625}
    assert len(plan.edits) == 16
    assert all(abs(edit.p - expected[edit.site.stage or 0]) < 1e-12 for edit in plan.edits)


def test_rates_over_the_training_are_exact(resnet18: nn.Module) -> None:  # P11
    (schedule,) = {edit.schedule for edit in plan_recipe(resnet18, "dropblock_resnet_g4").edits}
    for progress, kept in ((0, 1), (0.5, 0.95), (1, 0.9), (2, 0.9)):
        assert abs(1 - 0.1 * schedule.factor(progress) - kept) < 1e-12


def test_a_shortcut_edit_changes_the_adds_operand_only() -> None:  # P12
    model = timm.create_model("resnet18").train()
    only = {"edge": "shortcut", "insert": "dropblock", "with": {"p": 1 - 1e-6}, "where": {"module": "layer1.0"}}
    gm = apply_recipe(model, recipe(only)).train()
    x = torch.randn(2, 3, 64, 64)

    def seen(net: Any) -> dict[str, torch.Tensor]:
        inputs: dict[str, torch.Tensor] = {}
        for name in ("conv1", "conv2", "act2"):
            module = net.layer1[0].get_submodule(name)
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].clone()}))
        net(x)
        return inputs

    before, after = seen(model), seen(gm)
    assert torch.equal(before["conv1"], after["conv1"])
    assert torch.equal(before["conv2"], after["conv2"])
    assert not torch.equal(before["act2"], after["act2"])


# -- which sites ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ({"stage": [1, 3]}, [0, 1, 4, 5]),
        ({"reduction": 16}, [4, 5]),
        ({"depth": [0.8, 1.0]}, [6, 7]),
        ({"block": "last 50%"}, [4, 5, 6, 7]),
        ({"block": [0, -1]}, [0, 7]),
        ({"role": "backbone", "channels": ">=256"}, [4, 5, 6, 7]),
        ({"module": "layer4.*"}, [6, 7]),
        ({"module": r"re:layer[12]\.1"}, [1, 3]),
        ({"exclude": ["layer1.*", "layer2.*", "layer3.*"]}, [6, 7]),
        ({"index": [0, -2]}, [0, 6]),
        ({"every": 3}, [0, 3, 6]),
        ({"stage": [3, 4], "every": 2}, [4, 6]),
        ({"min_size": 28}, [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_where(where: dict[str, Any], chosen: list[int], resnet18: nn.Module) -> None:
    assert blocks(plan_recipe(resnet18, recipe({"where": where}))) == [BLOCKS[index] for index in chosen]


def test_where_trainable() -> None:
    model = make_model("resnet18")
    for parameter in [*model.layer1.parameters(), *model.layer2.parameters()]:
        parameter.requires_grad = False
    assert blocks(plan_recipe(model, recipe({"where": {"trainable": True}}))) == BLOCKS[4:]


def test_where_not_on_and_path(resnet50: nn.Module) -> None:
    norms = {"pattern": "conv_bn", "where": {"not_on": "residual_add.shortcut"}}
    kept = plan_recipe(resnet50, recipe(norms))
    assert [edit.site.id for edit in kept.edits] == [
        edit.site.id for edit in plan_recipe(resnet50, recipe(norms | {"where": {"path": "branch"}})).edits
    ]
    assert len(kept.edits) == 16
    assert len(plan_recipe(resnet50, recipe(norms | {"where": {"path": "shortcut"}})).edits) == 4


# -- at which rates ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rule", "shares"),
    [
        ("constant", [1.0] * 8),
        ("linear", [place / 8 for place in range(1, 9)]),
        ("linear0", [place / 7 for place in range(8)]),
        ("cells", [place / 8 for place in range(1, 9)]),
    ],
)
def test_depth_rule(rule: str, shares: list[float], resnet18: nn.Module) -> None:
    plan = plan_recipe(resnet18, recipe({"depth_rule": rule}))
    assert [edit.p for edit in plan.edits] == pytest.approx([0.1 * share for share in shares], abs=1e-12)
    last = plan_recipe(resnet18, recipe({"depth_rule": rule, "where": {"stage": 4}}))
    assert [edit.p for edit in last.edits] == [edit.p for edit in plan.edits][-2:]


def test_instants_in_steps_and_epochs(resnet18: nn.Module) -> None:
    entry = {"schedule": {"kind": "linear", "begin": "10 steps", "end": "5 epochs"}}
    plan = plan_recipe(resnet18, recipe(entry), total_steps=100, steps_per_epoch=10)
    assert {(edit.schedule.begin, edit.schedule.end) for edit in plan.edits} == {(0.1, 0.5)}
    with pytest.raises(PlanError, match="'5 epochs' needs steps_per_epoch"):
        plan_recipe(resnet18, recipe(entry), total_steps=100)


@pytest.mark.parametrize("length", [0, -1, 1.5, "10", True])
@pytest.mark.parametrize("name", ["total_steps", "steps_per_epoch"])
def test_a_length_that_is_no_count(name: str, length: Any, resnet18: nn.Module) -> None:
    with pytest.raises(PlanError, match=f"{name}: expected the number of optimizer steps, an int above 0, got"):
        plan_recipe(resnet18, recipe({}), **{name: length})


def test_a_rate_that_scale_lifts_above_1() -> None:
    model = timm.create_model("convnext_atto", drop_path_rate=0.9)
    entry = {"name": "own", "insert": "adopt", "scale": {"stage": {4: 4}}}
    with pytest.raises(PlanError, match=r"drop_prob = 0\.\d+ x 4 is not in \[0, 1\]"):
        plan_recipe(model, {"version": 1, "entries": [entry]})


# -- edits that meet -----------------------------------------------------------------------------------------
def test_equal_edits_on_one_edge_are_one(resnet18: nn.Module) -> None:
    plan = plan_recipe(resnet18, recipe({}, {"name": "two", "expect": "any"}))
    assert plan.hits == {"one": 8, "two": 0}
    assert all(edit.merged for edit in plan.edits)
    assert sum(note.startswith("merged:") for note in plan.notes) == 8
    with pytest.raises(
        PlanError, match=r"'two': expected >=1 sites, hit 0 \(8 merged into earlier entries; `expect: any`"
    ):
        plan_recipe(resnet18, recipe({}, {"name": "two"}))


def test_one_edge_by_two_names_is_one_edge(resnet18: nn.Module) -> None:
    norms = {"name": "norms", "pattern": "conv_bn", "edge": "output", "where": {"path": "branch"}, "expect": "any"}
    plan = plan_recipe(resnet18, recipe({"edge": "branch"}, norms))
    assert plan.hits == {"one": 8, "norms": 0}


def test_other_edits_on_one_edge_collide_or_stack(resnet18: nn.Module) -> None:
    other = {"name": "two", "with": {"p": 0.2}}
    with pytest.raises(PlanError, match=r"'two'.* meets .* of 'one' on one edge; .*stack: true"):
        plan_recipe(resnet18, recipe({}, other))
    plan = plan_recipe(resnet18, recipe({}, other | {"stack": True}))
    assert plan.hits == {"one": 8, "two": 8}
    assert [edit.p for edit in plan.edits[:2]] == [0.1, 0.2]
    assert len({edit.site.id for edit in plan.edits}) == 16


def test_optional_entries(resnet18: nn.Module) -> None:
    nothing = {"name": "two", "where": {"stage": 9}, "optional": True}
    plan = plan_recipe(resnet18, recipe({}, nothing))
    assert plan.hits == {"one": 8, "two": 0}
    assert "'two' hits nothing (optional)" in str(plan)
    with pytest.warns(SurgeryWarning, match="mine changes nothing on ResNet"):
        plan_recipe(resnet18, recipe(nothing))


def test_misses_name_the_edge_that_was_asked_for(resnet18: nn.Module) -> None:
    entry = {"name": "one", "pattern": "residual_add", "insert": "dropout", "where": {"stage": 9}}
    with pytest.raises(PlanError, match=r"8 sites of residual_add\.branch, refused by where: stage is 1 \(2x\)"):
        plan_recipe(resnet18, {"version": 1, "entries": [entry]})


# -- recipes on recipes --------------------------------------------------------------------------------------
def test_include_replaces_by_name(resnet18: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "version: 1\ninclude: dropblock_resnet_g4\nentries:\n  - {name: shortcut, pattern: residual_add, "
        "edge: shortcut, insert: dropout, with: {p: 0.2}, where: {stage: 4}}\n"
    )
    plan = plan_recipe(resnet18, path)
    assert Counter(edit.regularizer for edit in plan.edits) == {"dropblock": 4, "dropout": 2}


def test_overrides(resnet18: nn.Module) -> None:
    plan = plan_recipe(resnet18, recipe({}), overrides={"one.with.p": 0.2})
    assert {edit.p for edit in plan.edits} == {0.2}
    with pytest.raises(RecipeError, match=r"overrides\['one'\]: expected a value of this entry, such as 'one.with.p'"):
        plan_recipe(resnet18, recipe({}), overrides={"one": 0.2})


def test_a_declared_pattern() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())
    own = recipe({"pattern": "cga"}, patterns={"cga": ["conv2d", "group_norm", "activation"]})
    (edit,) = plan_recipe(model, own, example_inputs=torch.empty(2, 3, 8, 8)).edits
    assert edit.site.module == "2"


class Wasteful(nn.Module):
    """Computes what it does not use, as a DLA's inner trees do."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.project, self.conv = nn.MaxPool2d(2), nn.Identity(), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        self.pool(x)
        self.project(self.project(self.pool(x)))
        torch.relu_(x)  # its result is used under another name
        return self.conv(self.pool(x))


def test_what_the_model_throws_away_is_no_site() -> None:
    sites = find_sites(Wasteful(), "pool", example_inputs=torch.zeros(1, 3, 8, 8))
    assert {site.id for site in sites} == {f"pool#2:pool.{edge}" for edge in ("input", "output", "module")}


def test_what_is_done_in_eval_is_told() -> None:
    entry = {"name": "a", "pattern": "residual_add", "edge": "branch", "insert": "stochastic_depth"}
    for rescale, told in (("test", ["in eval: times the survival probability 1 - p at 8 sites"]), ("train", [])):
        mine = {"version": 1, "entries": [entry | {"with": {"rescale": rescale}}]}
        plan = plan_recipe(make_model("resnet18"), mine)
        assert [line for line in str(plan).splitlines() if line.startswith("in eval")] == told
