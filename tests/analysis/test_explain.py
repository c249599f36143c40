"""What is told of a model is what surgery finds in it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dropsurgery import catalogue, cli, find_sites, plan_recipe
from dropsurgery.analysis import coverage as covering
from dropsurgery.analysis.coverage import Row, cover
from dropsurgery.analysis.explain import explain, fit
from dropsurgery.analysis.families import REPRESENTATIVES, SMALLEST
from dropsurgery.analysis.pool import Lost
from dropsurgery.capture import capture
from dropsurgery.errors import PlanError
from dropsurgery.models import family, make_model
from dropsurgery.recipe import bundled, load_recipe


class Odd(nn.Module):
    """A net with a part that sets an attribute, and with stochastic layers of which one has a rate of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.25), nn.Dropout(0.0))
        self.part = Part()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.part(self.body(x))
        return out


class Part(nn.Module):
    """It sets an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x + 1
        return self.seen


IMAGES = torch.empty(2, 3, 16, 16)


# -- explain -----------------------------------------------------------------------------------------------------
def test_sites_are_those_that_are_found() -> None:
    model = make_model("resnet18")
    told = explain(model)
    expected = Counter((site.pattern, site.edge, site.stage) for site in find_sites(model))
    stated = {(p, e, s): n for p, edges in told.sites.items() for e, at in edges.items() for s, n in at.items()}
    assert stated == expected and list(told.sites) == catalogue.names("patterns")
    assert (told.model, told.parameters) == ("ResNet", 11689512)
    assert told.opaque == [] and told.stochastic == []


def test_stochastic_layers_and_opaque_parts() -> None:
    told = explain(Odd(), IMAGES)
    assert told.stochastic == [{"path": "body.3", "class": "Dropout2d", "rate": 0.25}]
    ((part),) = told.opaque
    assert (part["path"], part["class"]) == ("part", "Part") and "seen" in part["reason"]


def test_fits_are_what_plans_come_to() -> None:
    model = make_model("resnet18")
    told = {each.recipe: each for each in explain(model).fits}
    assert list(told) == bundled()
    plan = plan_recipe(model, "dropblock_resnet_g34")
    assert (told["dropblock_resnet_g34"].edits, told["dropblock_resnet_g34"].entries) == (len(plan.edits), plan.hits)
    unfit = told["dropblock_unet_double_conv"]
    assert unfit.edits is None and "expected >=1 sites, hit 0; nearest:" in unfit.reason
    with pytest.raises(PlanError):
        plan_recipe(model, "dropblock_unet_double_conv")


@pytest.mark.parametrize(
    ("entry", "edits", "reason"),
    [
        ({"insert": "dropout"}, 1, ""),
        ({"insert": "dropout", "where": {"stage": 9}}, None, "refused by where"),
        ({"insert": "dropout", "where": {"stage": 9}, "optional": True}, None, "refused by where"),
        ({"insert": "dropblock", "with": {"block_size": 3}, "pattern": "classifier"}, None, "classifier.output"),
    ],
)
def test_one_recipe(entry: dict[str, Any], edits: int | None, reason: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
    made = load_recipe({"version": 1, "entries": [{"pattern": "conv_bn_act", "expect": ">=1", **entry}]})
    found = fit(capture(net, IMAGES), made)
    assert found.edits == edits and reason in found.reason and bool(found.reason) == (edits is None)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = cli.main(argv)
    return code, capsys.readouterr().out


def test_the_command_explain(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "explain", "resnet18")
    assert code == 0 and out.startswith("resnet18: ResNet, 11.7 million parameters\n")
    lines = [line.split() for line in out.splitlines()]
    assert ["residual_add", "branch", "-", "2", "2", "2", "2", "-", "8"] in lines
    assert ["dropblock_resnet_g34", "12"] in [line[:2] for line in lines]
    code, out = run(capsys, "explain", "resnet18", "--json", "--image-size", "64")
    facts = json.loads(out)
    assert facts["sites"]["residual_add"]["branch"] == {"1": 2, "2": 2, "3": 2, "4": 2}


# -- coverage ----------------------------------------------------------------------------------------------------
def test_a_row_is_what_the_plans_come_to() -> None:
    row = cover("resnet18", bundled())
    model = make_model("resnet18")
    assert (row.model, row.family, row.reason) == ("resnet18", "resnet", "")
    assert row.edits["stochastic_depth_linear"] == len(plan_recipe(model, "stochastic_depth_linear").edits)
    assert row.edits["dropblock_unet_double_conv"] is None


def test_a_model_that_cannot_be_captured_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covering, "make_model", lambda name: nn.DataParallel(nn.Linear(2, 2)))
    row = cover("resnet18", bundled())
    assert not row.edits and "wrapped for parallel training" in row.reason


class Pool:
    """In the place of the processes."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function = function

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def run(self, names: list[str]) -> Any:
        for name in reversed(names):
            yield name, Lost("it hangs") if name == "resnet34" else self.function(name)


def test_the_command_coverage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covering, "Pool", Pool)
    code, out = run(capsys, "coverage", "resnet18", "smp:Unet:resnet18")
    lines = [line.split() for line in out.splitlines()]
    numbers = {line[1]: int(line[0]) for line in lines if len(line) == 2 and line[1] in bundled()}
    (resnet,) = [line for line in lines if line[:2] == ["resnet", "resnet18"]]
    (unet,) = [line for line in lines if line[:2] == ["smp.Unet", "smp:Unet:resnet18"]]
    assert code == 0 and list(numbers) == bundled() and lines.index(resnet) < lines.index(unet)
    assert resnet[1 + numbers["stochastic_depth_linear"]] == "8"
    assert resnet[1 + numbers["dropblock_unet_double_conv"]] == "-"
    assert unet[1 + numbers["dropblock_unet_double_conv"]] == "5"
    code, out = run(capsys, "coverage", "resnet34", "resnet18", "--json")
    refused, row = json.loads(out)
    assert code == 1 and refused["reason"] == "it hangs" and row["edits"]["stochastic_depth_linear"] == 8


def test_coverage_is_of_each_family(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covering, "coverage", lambda names, jobs: (Row(name, family(name)) for name in names))
    _, out = run(capsys, "coverage", "--json")
    families = {row["family"] for row in json.loads(out)}
    assert set(timm.list_modules()) | {f"smp.{name}" for name in ("Unet", "FPN", "DPT", "Segformer")} <= families


def test_the_smallest_models_are_of_their_families() -> None:
    assert sorted(SMALLEST) == sorted({family(name) for name in timm.list_models()})
    assert all(family(name) == home for home, name in SMALLEST.items())
    assert set(SMALLEST.values()) < set(REPRESENTATIVES)
