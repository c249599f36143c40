"""Outputs that differ by mode, structured inputs, and models that already hold stochastic layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dropsurgery import plan_recipe
from tests.laws import checks
from tests.laws.models import STEPS, everywhere
from tests.uses.cases import calling, check_use, converted, images, made

SWIN: dict[str, Any] = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 1, 1)}

RATES: dict[str, Any] = {"drop_path_rate": 0.1, "proj_drop_rate": 0.1, "pos_drop_rate": 0.1}


def model_of(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options)


DISTILLED: dict[str, Callable[[], nn.Module]] = {
    "deit": model_of("deit_tiny_distilled_patch16_224", img_size=64, depth=2),
    "levit": model_of("levit_128s"),
    "efficientformer": model_of("efficientformer_l1"),
}


@pytest.mark.parametrize("name", DISTILLED)
def test_two_heads_that_are_averaged_in_eval(name: str) -> None:
    model = made(DISTILLED[name])
    x = images(64 if name == "deit" else 224)
    model.train()
    model.set_distilled_training(True)  # type: ignore[operator]
    gm = converted(model, x)
    with torch.no_grad():  # LeViT keeps biases with their history, and then cannot be copied
        checks.check_outputs(model, gm, calling(x))
    checks.check_same(checks.run(model, calling(x), True), checks.run(gm, calling(x), True))
    assert len(checks.tensors(gm.train()(x))) == 2
    assert len(checks.tensors(gm.eval()(x))) == 1
    gm.set_distilled_training(False)
    assert len(checks.tensors(gm.train()(x))) == 1
    for _ in range(STEPS):
        gm.surgery.step()
    assert not checks.equal(*(checks.run(gm, calling(x), True, seed).outputs for seed in (1, 2)))


def patches(rows: int, columns: int) -> dict[str, Tensor]:
    """A NaFlexVit's input: flattened patches, where each lies, and which are there."""
    count = rows * columns
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    valid = torch.ones(2, count, dtype=torch.bool)
    valid[1, count // 2 :] = False
    return {
        "patches": torch.randn(2, count, 768, generator=torch.Generator().manual_seed(0)),
        "patch_coord": grid.reshape(1, count, 2).repeat(2, 1, 1),
        "patch_valid": valid,
    }


@pytest.mark.parametrize("like", ["images", "patches"])
def test_a_dict_of_patches(like: str) -> None:
    model = made(model_of("naflexvit_base_patch16_gap", depth=2, embed_dim=32, num_heads=2))
    calls = [lambda net: net(patches(4, 4)), lambda net: net(patches(3, 6)), lambda net: net(images())]
    gm = converted(model, (patches(4, 4),) if like == "patches" else images())
    assert len(gm.surgery.regularizers) >= 6
    for call in calls:
        checks.check_outputs(model, gm, call)
    for _ in range(STEPS):
        gm.surgery.step()
    for call in calls:
        checks.check_noise(gm, call)


# -- stochastic layers that are there already -------------------------------------------------------------------------
STOCHASTIC: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (model_of("resnet18", drop_path_rate=0.1), 7),
    "dropblock": (model_of("resnet18", drop_block_rate=0.1), 4),
    "convnext": (model_of("convnext_atto", drop_path_rate=0.1), 11),
    "regnet": (model_of("regnety_002", drop_path_rate=0.1), 12),
    "swin": (model_of("swin_tiny_patch4_window7_224", drop_path_rate=0.1, **SWIN), 6),
    "vit": (model_of("vit_tiny_patch16_224", img_size=64, depth=3, **RATES), 14),
}
"""What holds how many layers with a rate above 0."""


def adopt(**options: Any) -> dict[str, Any]:
    entry = {"name": "its own", "insert": "adopt", "schedule": {"kind": "linear"}, **options}
    return {"version": 1, "name": "adopted", "entries": [entry]}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_surgery_beside_stochastic_layers(name: str) -> None:
    """They draw what they drew before: equal in training under one seed."""
    check_use(made(STOCHASTIC[name][0]), images(), calling(images()), copies=False)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_layers_come_under_the_clock(name: str) -> None:
    build, count = STOCHASTIC[name]
    model = made(build)
    with checks.check_untouched(model):
        gm = converted(model, images(), adopt())
    assert len(gm.surgery.plan.edits) == count
    call = calling(images())
    checks.check_same(checks.run(model, call, False), checks.run(gm, call, False))
    assert checks.equal(*(checks.run(gm, call, True, seed).outputs for seed in (1, 2))), "a rate of 0 drops nothing"
    for _ in range(STEPS):
        gm.surgery.step()
    checks.check_same(checks.run(model, call, True), checks.run(gm, call, True))
    with gm.surgery.active(p=0.0):
        checks.check_same(checks.run(model, call, False), checks.run(gm, call, False))
    for other in (copy.deepcopy(gm), checks.saved(gm)):
        assert other.surgery.current_step == STEPS
        checks.check_same(checks.run(gm, call, True), checks.run(other, call, True))


@pytest.mark.parametrize("name", ["resnet", "convnext", "swin"])
def test_adopted_beside_inserted(name: str) -> None:
    build, count = STOCHASTIC[name]
    model = made(build)
    recipe = everywhere()
    recipe["entries"] = [*adopt()["entries"], *recipe["entries"]]
    for entry in recipe["entries"][1:]:
        entry["stack"] = True
    plan = plan_recipe(model, recipe, example_inputs=images(), total_steps=STEPS)
    assert plan.hits["its own"] == count
    gm = converted(model, images(), recipe, steps=STEPS)
    checks.check_same(*(checks.run(net, calling(images()), False) for net in (model, gm)))
    checks.check_noise(gm, calling(images()))
