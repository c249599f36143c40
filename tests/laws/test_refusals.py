"""What is wrong is one clear error, and the model given is bit for bit as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dropsurgery import CaptureError, PlanError, RecipeError, SurgeryError, apply_recipe, plan_recipe, strip
from tests.laws import checks
from tests.laws.models import STEPS, fresh, images

ENTRY = {"name": "one", "pattern": "residual_add", "edge": "branch", "insert": "dropout", "with": {"p": 0.1}}


def recipe(**changes: Any) -> dict[str, Any]:
    return {"version": 1, "name": "mine", "entries": [ENTRY | changes]}


WRONG: dict[str, tuple[Any, type[SurgeryError], str]] = {
    "recipe": ("dropblock_resnet_g43", RecipeError, "did you mean 'dropblock_resnet_g4'"),
    "file": ("./nowhere.yaml", RecipeError, "nowhere.yaml"),
    "pattern": (recipe(pattern="residul_add"), RecipeError, "did you mean 'residual_add'"),
    "edge": (recipe(edge="brunch"), RecipeError, "did you mean 'branch'"),
    "regularizer": (recipe(insert="dropblok"), RecipeError, "did you mean 'dropblock'"),
    "key": (recipe(wher={}), RecipeError, "did you mean 'where'"),
    "argument": (recipe(**{"with": {"p": 0.1, "blocksize": 7}}), RecipeError, "blocksize"),
    "rate": (recipe(**{"with": {"p": 1.5}}), RecipeError, r"expected a number in \[0, 1\], got 1.5"),
    "no hit": (recipe(where={"stage": 9}), PlanError, "hit 0"),
    "count": (recipe(expect=3), PlanError, "expected .*3 sites, hit 8"),
    "total steps": (recipe(schedule={"kind": "linear"}), PlanError, "total_steps"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe(case: str) -> None:
    wrong, kind, message = WRONG[case]
    model = fresh("resnet")
    with checks.check_untouched(model), pytest.raises(kind, match=message):
        apply_recipe(model, wrong, example_inputs=images("resnet"))


def test_every_problem_of_a_recipe_is_told_at_once() -> None:
    wrong = recipe(pattern="residul_add", insert="dropblok", wher={})
    with pytest.raises(RecipeError) as caught:
        apply_recipe(fresh("resnet"), wrong, example_inputs=images("resnet"))
    assert len(caught.value.problems) == 3


def test_a_wrong_example() -> None:
    model = fresh("smp_unet")
    for example, message in ((torch.zeros(2, 5, 64, 64), "channels"), ("image", "expected a tensor")):
        with checks.check_untouched(model), pytest.raises(CaptureError, match=message):
            apply_recipe(model, recipe(), example_inputs=example)
    with pytest.raises(CaptureError, match="give example_inputs"):
        apply_recipe(nn.Sequential(nn.Conv2d(3, 3, 3)), recipe())


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled_in_place() -> nn.Module:
    model = fresh("resnet")
    model.layer1.compile(backend="eager")
    return model


UNFIT: dict[str, tuple[Any, str]] = {
    "compiled": (lambda: torch.compile(fresh("resnet"), backend="eager"), "compiled"),
    "a part compiled": (compiled_in_place, "'layer1' is compiled"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 3))), "scripted"),
    "traced": (lambda: torch.jit.trace(nn.Conv2d(3, 3, 3), torch.zeros(1, 3, 8, 8)), "scripted"),
    "data parallel": (lambda: nn.DataParallel(fresh("resnet")), "parallel"),
    "a function": (lambda: torch.relu, "expected a torch.nn.Module"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", UNFIT)
def test_an_unfit_model(case: str) -> None:
    build, message = UNFIT[case]
    model = build()
    before = checks.snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(CaptureError, match=message):
        apply_recipe(model, recipe(), example_inputs=images("resnet"))
    assert before is None or checks.snapshot(model) == before


def test_a_model_wrapped_for_distributed_training(process_group: None) -> None:
    model = DistributedDataParallel(fresh("vit"))
    with checks.check_untouched(model), pytest.raises(CaptureError, match="DistributedDataParallel"):
        apply_recipe(model, recipe(), example_inputs=images("vit"))


def test_a_sharded_model(process_group: None) -> None:
    model = fully_shard(fresh("resnet"), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(CaptureError, match="wrapped for parallel training"):
        apply_recipe(model, recipe(), example_inputs=images("resnet"))


def test_a_rewritten_model_is_not_rewritten_again() -> None:
    gm = apply_recipe(fresh("resnet"), recipe(), example_inputs=images("resnet"))
    for again in (gm, copy.deepcopy(gm)):
        with pytest.raises(CaptureError, match="already rewritten: strip it first"):
            apply_recipe(again, recipe(), example_inputs=images("resnet"))
    for part in (gm, copy.deepcopy(gm.layer1)):
        with pytest.raises(CaptureError, match=r"'0\S*' is already rewritten"):
            apply_recipe(nn.Sequential(part), recipe(), example_inputs=images("resnet"))
    apply_recipe(strip(gm), recipe(), example_inputs=images("resnet"))
    with pytest.raises(SurgeryError, match="expected a model made by apply_recipe"):
        strip(fresh("resnet"))


def test_a_plan_needs_no_total_steps() -> None:
    assert "linear" in str(plan_recipe(fresh("resnet"), "dropblock_resnet_g34", example_inputs=images("resnet")))


# -- layers that the model brings along ------------------------------------------------------------------------------
def test_adopted_layers_follow_the_clock_and_get_their_rates_back() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5, drop_path_rate=0.2, zero_init_last=False)
    entry = {"name": "own", "insert": "adopt", "schedule": {"kind": "linear"}}
    rates = [block.drop_path.drop_prob for block in [*model.layer2, *model.layer3, *model.layer4]]
    with checks.check_untouched(model):
        recipe_ = {"version": 1, "name": "adopting", "entries": [entry]}
        gm = apply_recipe(model, recipe_, example_inputs=images("resnet"), total_steps=STEPS)
    assert list(model.state_dict()) == list(gm.state_dict())

    def now(net: Any) -> list[float]:
        return [block.drop_path.drop_prob for block in [*net.layer2, *net.layer3, *net.layer4]]

    assert now(gm) == [0.0] * len(rates)
    checks.check_outputs(strip(gm).eval(), gm, lambda net: net.eval()(images("resnet")))
    for _ in range(STEPS // 2):
        gm.surgery.step()
    assert now(gm) == pytest.approx([rate / 2 for rate in rates])
    assert now(copy.deepcopy(gm)) == now(checks.saved(gm)) == now(gm)
    assert now(model) == now(strip(gm)) == rates
