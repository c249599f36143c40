from __future__ import annotations

import copy
import io
import json
import re
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dropsurgery import SurgeryError, apply_recipe, diff
from dropsurgery.capture import capture
from dropsurgery.models import make_model
from tests.zoo import ZOO

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


class Tiny(nn.Module):
    """conv ▶ norm ▶ ReLU, and a residual join."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return (x + self.bn2(self.conv2(x))).flatten(1)


class Checkpointed(Tiny):
    """Its first half runs under an activation checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.half, x, use_reentrant=False)
        return F.relu(self.bn2(self.conv2(x)))

    def half(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


def entry(name: str, insert: str = "dropout", **fields: Any) -> dict[str, Any]:
    return {"name": name, "pattern": "conv_bn", "insert": insert, "with": {"p": 0.1}, **fields}


def surgery(model: nn.Module, *entries: dict[str, Any], shape: tuple[int, ...] = (2, 3, 8, 8)) -> nn.Module:
    recipe = {"version": 1, "name": "trial", "entries": list(entries)}
    return apply_recipe(model, recipe, example_inputs=torch.zeros(shape), total_steps=10)


def zoo_surgery(name: str, *entries: dict[str, Any]) -> nn.Module:
    return surgery(ZOO[name].build(), *entries, shape=ZOO[name].shape)


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return apply_recipe(make_model("resnet50"), "dropblock_resnet_g34", total_steps=10)


def inserted(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(r"\+\w+ = \w+\(\w+\) +# ", line)]


# -- text ------------------------------------------------------------------------------------------------------
def test_whole_text() -> None:
    last = entry("last", schedule="linear")
    shortcut = entry("shortcut", pattern="residual_add", edge="shortcut")
    assert (
        diff(surgery(Tiny(), last, shortcut), color=False)
        == """\
Tiny after trial

the model itself (Tiny)
@@ -5,5 +5,7 @@
 conv2 = conv2(relu)
 bn2 = bn2(conv2)
-add = add(relu, bn2)
+s0 = dropout(bn2)   # bn2#0:conv_bn.output  p 0 → 0.1 linear  [last]
+s1 = dropout(relu)  # add#0:residual_add.shortcut  p 0.1 constant  [shortcut]
+add = add(s1, s0)
 flatten = add.flatten(1)
 return flatten

summary
  rewritten modules: 1; their nodes: 9 before, 11 after
  edits: 2 (last 1, shortcut 1)"""
    )


def test_resnet50_lists_every_site(resnet50: nn.Module) -> None:
    lines = inserted(diff(resnet50, color=False))
    sites = [edit.site.id for edit in resnet50.surgery.plan.edits]
    assert [line.split("# ")[1].split()[0] for line in lines] == sites
    assert len(sites) == 36
    assert sum("residual_add.shortcut" in line for line in lines) == 9


def test_before_is_the_model_as_it_was() -> None:
    facts = json.loads(diff(zoo_surgery("resnet", entry("last")), format="json"))
    levels = capture(ZOO["resnet"].build(), ZOO["resnet"].example()).view.levels
    owners = [owner["path"] for owner in facts["owners"]]
    assert facts["nodes"]["before"] == sum(len(levels[path][0].graph.nodes) for path in owners)
    assert facts["nodes"]["after"] == facts["nodes"]["before"] + len(facts["edits"])


def test_a_diff_changes_nothing(resnet50: nn.Module) -> None:
    before = str(resnet50.layer3[0].graph)
    diff(resnet50)
    assert str(resnet50.layer3[0].graph) == before


def test_blocks_with_equal_diffs_are_folded(resnet50: nn.Module) -> None:
    text = diff(resnet50, color=False)
    assert re.findall(r"^(\S+) \(Bottleneck\), as (\S+)$", text, re.M) == [
        *((f"layer3.{index}", "layer3.1") for index in (2, 3, 4, 5)),
        ("layer4.2", "layer4.1"),
    ]
    assert text.count("\n@@ ") == 4


def test_blocks_with_other_rates_are_not_folded() -> None:
    branch = entry("branch", "stochastic_depth", pattern="residual_add", depth_rule="linear")
    text = diff(zoo_surgery("resnet", branch), color=False)
    assert ", as " not in text
    assert "p 0.0125 constant" in text and "p 0.1 constant" in text


def test_two_regularizers_on_one_edge() -> None:
    gm = surgery(Tiny(), entry("first"), entry("second", "spatial_dropout", stack=True))
    lines = inserted(diff(gm, color=False))
    assert sorted(re.findall(r" = (\w+)\(.*\[(\w+)\]$", "\n".join(lines), re.M)) == [
        ("dropout", "first"),
        ("spatial_dropout", "second"),
    ]


def test_a_name_of_the_model_is_not_taken() -> None:
    class Named(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.s0 = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.s0(super().forward(x))

    (line,) = inserted(diff(surgery(Named(), entry("last")), color=False))
    assert line.startswith("+_surgery_s0 = dropout(bn2)")


def test_inside_a_checkpoint() -> None:
    both = entry("both", pattern="conv_bn_act")
    text = diff(surgery(Checkpointed(), both), color=False)
    assert "+dropout inside an activation checkpoint  # relu#0:conv_bn_act.output" in text
    assert "+s1 = dropout(relu_1)  # relu#1:conv_bn_act.output" in text
    assert text.count("dropout") == 2


def test_leaves_that_own_an_edit() -> None:
    layers = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()]
    net = nn.Sequential(*layers, *copy.deepcopy(layers))
    text = diff(surgery(net, entry("all", pattern="conv_bn_act")), color=False)
    assert (
        text.partition("\n\nsummary")[0]
        == """\
Sequential after trial

2 (ReLU)
@@ -1,3 +1,4 @@
 input_1 = input
 own = ReLU(input_1)
-return own
+s0 = dropout(own)  # 2#0:conv_bn_act.output  p 0.1 constant  [all]
+return s0
5 (ReLU), as 2
+s0 = dropout(own)  # 5#0:conv_bn_act.output  p 0.1 constant  [all]"""
    )


# -- summary -----------------------------------------------------------------------------------------------------
def summary(gm: nn.Module) -> list[str]:
    text = diff(gm, color=False)
    return [line.strip() for line in text.partition("\nsummary\n")[2].splitlines()]


def test_summary_says_what_was_merged_and_missed() -> None:
    gm = surgery(
        Tiny(),
        entry("last"),
        entry("again", pattern="residual_add", edge="branch", expect="any"),
        entry("late", where={"stage": 9}, optional=True),
    )
    assert summary(gm) == [
        "rewritten modules: 1; their nodes: 9 before, 10 after",
        "edits: 1 (last 1, again 0, late 0)",
        "merged: again: add#0:residual_add.branch into bn2#0:conv_bn.output of last",
        "no site for late; nearest:",
        *gm.surgery.plan.misses["late"],
    ]
    assert "refused by where" in gm.surgery.plan.misses["late"][0]


@pytest.mark.parametrize(("rescale", "told"), [("train", 0), ("test", 1)])
def test_summary_says_what_happens_in_eval(rescale: str, told: int) -> None:
    depth = entry("branch", "stochastic_depth", pattern="residual_add", **{"with": {"p": 0.1, "rescale": rescale}})
    assert summary(surgery(Tiny(), depth)).count("in eval: times the survival probability 1 - p at 1 sites") == told


def test_summary_says_what_was_taken_over() -> None:
    class Dropping(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.Sequential(nn.ReLU(), nn.Dropout(0.4))

    gm = surgery(Dropping(), {"name": "own", "insert": "adopt", "with": {"p": 0.5}, "schedule": "linear"})
    (line,) = [line for line in summary(gm) if line.startswith("taken over: Dropout  # relu.1#0:")]
    assert line.endswith("linear  [own]")


# -- colours -------------------------------------------------------------------------------------------------------
def test_colours_say_the_same(resnet50: nn.Module) -> None:
    plain, coloured = diff(resnet50, color=False), diff(resnet50, color=True)
    assert "\x1b" not in plain
    assert ESCAPE.sub("", coloured) == plain
    bold_green = re.findall(r"^\x1b\[1;32m(\+.*)\x1b\[0m$", coloured, re.M)
    assert bold_green == inserted(plain)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stdout", "no_color", "coloured"), [
    (io.StringIO(), "", False), (Terminal(), "", True), (Terminal(), "1", False),
])  # fmt: skip
def test_colours_by_default(
    resnet50: nn.Module, monkeypatch: pytest.MonkeyPatch, stdout: io.StringIO, no_color: str, coloured: bool
) -> None:
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("NO_COLOR", no_color)
    assert ("\x1b" in diff(resnet50)) is coloured
    assert stdout.getvalue() == ""


# -- JSON and HTML -------------------------------------------------------------------------------------------------
def test_json() -> None:
    last = entry("last", schedule={"step": [0.5]})
    facts = json.loads(diff(surgery(Tiny(), last), format="json"))
    assert facts["model"] == "Tiny" and facts["recipe"] == "trial" and facts["total_steps"] == 10
    assert facts["hits"] == {"last": 1} and facts["misses"] == {} and facts["nodes"] == {"before": 9, "after": 10}
    (edit,) = facts["edits"]
    assert edit["site"]["id"] == "bn2#0:conv_bn.output" and edit["site"]["shape"] == [2, 8, 8, 8]
    assert edit["p"] == 0.1 and edit["regularizer"] == "dropout" and edit["arguments"] == {"p": 0.1}
    assert edit["schedule"] == {"kind": "step", "at": [0.5], "begin": 0.0, "end": 1.0, "start": 0.0, "final": 1.0}
    (owner,) = facts["owners"]
    assert owner["path"] == "" and owner["class"] == "Tiny" and owner["sites"] == ["bn2#0:conv_bn.output"]
    assert owner["diff"][0].startswith("@@ ")


class Page(HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [name for name, _ in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_one_page_with_all_of_the_text(resnet50: nn.Module) -> None:
    page = Page(diff(resnet50, format="html"))
    assert set(page.tags) == {"html", "meta", "title", "style", "pre", "span"}
    assert page.links == []
    assert diff(resnet50, color=False) in page.text


HOSTILE = "<script>alert(1)</script> & [bold]x[/bold]"


def test_names_are_no_markup() -> None:
    gm = surgery(Tiny(), entry(HOSTILE), entry(f"{HOSTILE}2", where={"stage": 9}, optional=True))
    page = diff(gm, format="html")
    assert "script" not in Page(page).tags and "<script>" not in page
    text = diff(gm, color=False)
    assert text.count(HOSTILE) == 4
    assert ESCAPE.sub("", diff(gm, color=True)) == text


# -- which models ----------------------------------------------------------------------------------------------------
def test_copies_and_saved_models_tell_the_same() -> None:
    gm = zoo_surgery("resnet", entry("last"))
    stored = io.BytesIO()
    torch.save(gm, stored)
    stored.seek(0)
    for other in (copy.deepcopy(gm), torch.load(stored, weights_only=False)):
        assert diff(other, color=False) == diff(gm, color=False)


@pytest.mark.filterwarnings("ignore:trial changes nothing")
@pytest.mark.parametrize("name", ZOO)
def test_any_topology(name: str) -> None:
    gm = zoo_surgery(name, *(
        entry(pattern, pattern=pattern, optional=True) for pattern in ("conv_bn_act", "conv_bn")
    ))  # fmt: skip
    lines = diff(gm, color=False).splitlines()
    for edit in gm.surgery.plan.edits:
        assert sum(edit.site.id in line for line in lines) == 1


def test_refusals() -> None:
    with pytest.raises(SurgeryError, match="made by apply_recipe, got Tiny"):
        diff(Tiny())
    with pytest.raises(SurgeryError, match="'text', 'json' or 'html', got 'yaml'"):
        diff(surgery(Tiny(), entry("last")), format="yaml")  # type: ignore[arg-type]
