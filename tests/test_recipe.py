"""Recipes: what they mean once read, every way of writing them wrong, and that loading is safe."""

from __future__ import annotations

import copy
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropsurgery import catalogue
from dropsurgery.errors import PlanError, RecipeError
from dropsurgery.recipe import Recipe, Where, bundled, load_recipe, recipe_schema, recipes_folder
from dropsurgery.recipe.arguments import describe
from dropsurgery.recipe.reading import MAX_BYTES, Budget, Place, Problems, read_yaml
from dropsurgery.records import Site
from dropsurgery.regularizers._base import Rate
from dropsurgery.schedules import Instant

RECIPE = """\
version: 1
name: dropblock
defaults:
  where: {role: [backbone, encoder], stage: [3, 4]}
  insert: dropblock
  with: {p: 0.1, block_size: 7}
  scale: {stage: {3: 0.25}}
  schedule: {kind: linear}
entries:
  - name: conv branch
    pattern: conv_bn_act
    edge: output
  - name: shortcut
    pattern: residual_add
    edge: shortcut
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe's text to a file of a temporary folder."""

    def write(text: str | bytes, name: str = "dropblock.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def problems(recipe: Any, **keywords: Any) -> tuple[str, ...]:
    """What is wrong with `recipe`; fails if nothing is."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, **keywords)
    return caught.value.problems


def only_problem(recipe: Any, **keywords: Any) -> str:
    (problem,) = problems(recipe, **keywords)
    return problem


@contextmanager
def within_a_second() -> Iterator[None]:
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < 1


def simple(**fields: Any) -> dict[str, Any]:
    """A valid recipe of one entry, as a dict, with `fields` of the entry changed."""
    entry = {"name": "only", "pattern": "residual_add", "insert": "dropblock", "with": {"p": 0.1}, **fields}
    return {"version": 1, "entries": [{key: value for key, value in entry.items() if value is not ...}]}


def site(**facts: Any) -> Site:
    known: dict[str, Any] = {"id": "x", "module": "layer3.0.act1", "pattern": "conv_bn_act", "edge": "output"}
    return Site(**{**known, "owner": "layer3.0", **facts})


# ---- what a recipe means ---------------------------------------------------------------------------------


def test_defaults_are_merged_into_each_entry(write: Callable[..., Path]) -> None:
    recipe = load_recipe(write(RECIPE))
    assert [entry.name for entry in recipe.entries] == ["conv branch", "shortcut"]
    for entry in recipe.entries:
        assert entry.where.stage == (3, 4)
        assert entry.where.role == ("backbone", "encoder")
        assert entry.arguments == {"p": 0.1, "block_size": 7}
        assert (entry.scale.factor(site(stage=3)), entry.scale.factor(site(stage=4))) == (0.25, 1.0)
        assert entry.schedule.resolve(None, None).factor(0.5) == 0.5


def test_an_entry_says_otherwise_key_by_key() -> None:
    recipe = load_recipe(
        {
            "version": 1,
            "defaults": {
                "where": {"stage": 4, "path": "branch"},
                "insert": "dropblock",
                "with": {"p": 0.1, "block_size": 5},
                "schedule": "linear",
            },
            "entries": [
                {"pattern": "conv_bn", "with": {"p": 0.3}, "where": {"path": None}, "schedule": "constant"},
                {"pattern": "conv_bn_act", "insert": "dropout"},
            ],
        }
    )
    first, second = recipe.entries
    assert first.arguments == {"p": 0.3, "block_size": 5}
    assert (first.where.stage, first.where.path) == ((4,), None)
    assert first.schedule.kind == "constant"
    assert second.arguments == {}, "the default arguments are the default regularizer's"
    assert second.where.path == ("branch",)


def test_an_entry_is_named_after_its_pattern_and_edge() -> None:
    assert load_recipe(simple(name=...)).entries[0].name == "residual_add"
    assert load_recipe(simple(name=..., edge="shortcut")).entries[0].name == "residual_add.shortcut"
    assert load_recipe(simple(name=..., pattern=..., insert="adopt")).entries[0].name == "adopt"


def test_the_name_is_the_files(write: Callable[..., Path]) -> None:
    path = write(RECIPE.replace("name: dropblock\n", "", 1), "mine.yaml")
    assert load_recipe(path).name == "mine"
    assert load_recipe(simple()).name == "unnamed"


def test_scalars_are_those_of_yaml_1_2(write: Callable[..., Path]) -> None:
    text = RECIPE.replace("p: 0.1", "p: 1e-3").replace("name: shortcut", "name: no")
    recipe = load_recipe(write(text))
    assert recipe.entries[0].arguments["p"] == 0.001
    assert recipe.entries[1].name == "no"
    values = {"0o17": 15, "0x1F": 31, "017": 17, "1_000": "1_000", "~": None, "TRUE": True, "yes": "yes"}
    values |= {".5": 0.5, "1.": 1.0, "+3": 3, "12:30": "12:30", '"1"': "1", "2001-01-01": "2001-01-01"}
    for text, value in values.items():
        problems = Problems()
        read = read_yaml(f"a: {text}".encode(), Place(), problems, Budget()).plain()
        assert (read, len(problems)) == ({"a": value}, 0)
        assert type(read["a"]) is type(value)


def test_a_recipe_given_back_is_the_same_object() -> None:
    recipe = load_recipe(simple())
    assert load_recipe(recipe) is recipe


@pytest.mark.parametrize("name", bundled())
def test_a_recipe_survives_every_way_of_keeping_it(name: str) -> None:
    recipe = load_recipe(name)
    assert load_recipe(recipe.to_dict()) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert copy.deepcopy(recipe) == recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]


def test_every_notation_survives_to_dict() -> None:
    where = {
        "stage": 3,
        "reduction": [8, 16],
        "depth": [0.5, 1],
        "block": "last 50%",
        "path": ["branch", "trunk"],
        "role": "encoder",
        "module": ["layer4.*", "re:layer[34].*"],
        "exclude": "*.bn1",
        "index": [0, -1],
        "every": 2,
        "min_size": 7,
        "channels": ">=64",
        "trainable": True,
        "not_on": "residual_add.shortcut",
    }
    schedule = {"piecewise": [[0, 0], [0.5, 1], [1, 0.2]], "begin": "5 epochs", "end": "1000 steps"}
    written = simple(where=where, schedule=schedule, scale={"stage": {3: 0.5}, "role": {"head": 2}}, expect="any")
    recipe = load_recipe(written)
    assert load_recipe(recipe.to_dict()) == recipe
    jsonschema.validate(recipe.to_dict(), recipe_schema())


# ---- where -----------------------------------------------------------------------------------------------

SELECTED = [
    ({"stage": [3, 4]}, {"stage": 3}, {"stage": 2}),
    ({"stage": 3}, {"stage": 3}, {"stage": None}),
    ({"reduction": 16}, {"reduction": 16}, {"reduction": 8}),
    ({"depth": [0.5, 1]}, {"depth": 0.5}, {"depth": 0.49}),
    ({"depth": [0.5, 1]}, {"depth": 1.0}, {"depth": None}),
    ({"block": "last 50%"}, {"block": (5, 9)}, {"block": (4, 9)}),
    ({"block": "last 10%"}, {"block": (3, 4)}, {"block": (2, 4)}),
    ({"block": "first 25%"}, {"block": (0, 4)}, {"block": (1, 4)}),
    ({"block": [0, -1]}, {"block": (8, 9)}, {"block": (7, 9)}),
    ({"block": 0}, {"block": (0, 9)}, {"block": None}),
    ({"path": "branch"}, {"path": "branch"}, {"path": "shortcut"}),
    ({"role": ["backbone", "encoder"]}, {"role": "encoder"}, {"role": "decoder"}),
    ({"module": "layer4.*"}, {"owner": "layer4.0"}, {"owner": "layer3.0"}),
    ({"module": "layer3.0.act1"}, {}, {"module": "layer3.0.act2"}),
    ({"module": "re:layer[34]\\.\\d+"}, {"owner": "layer4.11"}, {"owner": "layer4.x"}),
    ({"exclude": "layer3.0"}, {"owner": "layer3.1"}, {}),
    (
        {"min_size": 7},
        {"shape": (1, 4, 7, 9), "channel_axis": 1},
        {"shape": (1, 64, 6, 9), "channel_axis": 1},
    ),
    ({"min_size": 7}, {"shape": (1, 7, 9, 4), "channel_axis": -1}, {"shape": (1, 9), "channel_axis": 1}),
    ({"channels": ">=64"}, {"channels": 64}, {"channels": 63}),
    ({"channels": 64}, {"channels": 64}, {"channels": None}),
    ({"channels": "<64"}, {"channels": 63}, {"channels": 64}),
    ({"trainable": True}, {"trainable": True}, {"trainable": False}),
    ({"trainable": False}, {"trainable": False}, {"trainable": True}),
]


@pytest.mark.parametrize(("where", "right", "wrong"), SELECTED)
def test_a_selector_tells_right_from_wrong(where: dict[str, Any], right: Any, wrong: Any) -> None:
    read = load_recipe(simple(where=where)).entries[0].where
    (selector,) = where
    assert read.matches_facts(site(**right))
    assert not read.matches_facts(site(**wrong))
    assert str(read.why_not(site(**wrong))).startswith(f"{selector} is ")


def test_all_selectors_must_hold() -> None:
    where = load_recipe(simple(where={"stage": 3, "path": "branch"})).entries[0].where
    assert where.matches_facts(site(stage=3, path="branch"))
    assert where.why_not(site(stage=3, path="trunk")) == "path is trunk"
    assert where.why_not(site(stage=4, path="branch")) == "stage is 4"
    assert Where().matches_facts(site())


@pytest.mark.parametrize(
    ("where", "picked"),
    [
        ({}, "abcde"),
        ({"index": [0, -1]}, "ae"),
        ({"index": 9}, ""),
        ({"every": 2}, "ace"),
        ({"every": 2, "index": [1, 2]}, "c"),
    ],
)
def test_index_and_every_pick_from_the_entrys_sites(where: dict[str, Any], picked: str) -> None:
    read = load_recipe(simple(where=where)).entries[0].where
    assert read.pick("abcde") == tuple(picked)
    assert read.pick("") == ()


# ---- schedules and counts --------------------------------------------------------------------------------

SCHEDULES: list[tuple[Any, str, dict[str, Any], Any, Any]] = [
    ("linear", "linear", {}, 0.0, 1.0),
    ({"kind": "linear", "end": 0.5}, "linear", {}, 0.0, 0.5),
    ({"kind": "cosine", "begin": "1000 steps"}, "cosine", {}, "1000 steps", 1.0),
    ({"step": [0.3, 0.6]}, "step", {"at": [0.3, 0.6]}, 0.0, 1.0),
    ({"step": [0.3, 0.6], "begin": "5 epochs"}, "step", {"at": [0.3, 0.6]}, "5 epochs", 1.0),
    ({"kind": "step", "at": [0.3]}, "step", {"at": [0.3]}, 0.0, 1.0),
    ({"piecewise": [[0, 0], [1, 0.2]]}, "piecewise", {"points": [[0, 0], [1, 0.2]]}, 0.0, 1.0),
    ({"early": {"until": 0.2}}, "early", {"until": 0.2}, 0.0, 1.0),
    ({"late": {"from": 0.5}}, "late", {"from": 0.5}, 0.0, 1.0),
    ({"kind": "late", "from": 0.5}, "late", {"from": 0.5}, 0.0, 1.0),
]


@pytest.mark.parametrize(("written", "kind", "options", "begin", "end"), SCHEDULES)
def test_a_schedule_in_each_notation(written: Any, kind: str, options: Any, begin: Any, end: Any) -> None:
    spec = load_recipe(simple(schedule=written)).entries[0].schedule
    assert (spec.kind, spec.options) == (kind, options)
    assert (spec.begin, spec.end) == (Instant.parse(begin), Instant.parse(end))
    jsonschema.validate(simple(schedule=written), recipe_schema())


def test_a_schedule_resolves_when_the_length_is_known() -> None:
    spec = load_recipe(simple(schedule={"kind": "linear", "begin": "100 steps", "end": "5 epochs"})).entries[0].schedule
    resolved = spec.resolve(1000, 100)
    assert (resolved.begin, resolved.end) == (0.1, 0.5)
    with pytest.raises(PlanError, match="steps_per_epoch"):
        spec.resolve(1000, None)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("linaer", "did you mean 'linear'"),
        (3, "expected a schedule such as linear"),
        ({}, "expected one kind of schedule"),
        ({"kind": 3}, "expected the name of a schedule, got 3"),
        ({"linear": 1, "cosine": 1}, "expected one kind of schedule"),
        ({"linear": {}}, "write {kind: linear}"),
        ({"kind": "linear", "ennd": 1}, "no option 'ennd'; did you mean 'end'?"),
        ({"kind": "step"}, "missing"),
        ({"step": [0.6, 0.3]}, "rising order"),
        ({"early": {"until": 2}}, r"\[0, 1\]"),
        ({"early": {"until": None}}, r"\[0, 1\]"),
        ({"kind": "linear", "begin": 0.5, "end": 0.5}, "expected begin before end"),
        ({"kind": "linear", "end": "5 weeks"}, "'N steps' or 'N epochs'"),
        ({"kind": "linear", "end": "0.5"}, "expected a fraction"),
    ],
)
def test_a_wrong_schedule(written: Any, told: str) -> None:
    problem = only_problem(simple(schedule=written))
    assert problem.startswith("entries[0].schedule: ")
    assert re.search(told, problem)


@pytest.mark.parametrize(
    ("written", "hits", "misses"),
    [(36, 36, 35), (">=2", 2, 1), ("any", 0, None), (..., 1, 0), ("== 3", 3, 4)],
)
def test_expect(written: Any, hits: int, misses: int | None) -> None:
    expect = load_recipe(simple(expect=written)).entries[0].expect
    assert expect.holds(hits)
    assert not expect.holds(misses)


# ---- what is wrong, and where ----------------------------------------------------------------------------


def test_all_problems_at_once_with_line_column_and_path(write: Callable[..., Path]) -> None:
    text = RECIPE.replace("p: 0.1", "p: 1.5").replace("residual_add", "residul_add").replace("edge: out", "egde: out")
    path = write(text + "clok: forward\n")
    lines = problems(path)
    assert lines == (
        f"{path}:16:1 clok: no field 'clok'; did you mean 'clock'?",
        f"{path}:6:13 defaults.with.p: expected a number in [0, 1], got 1.5",
        f"{path}:12:5 entries[0].egde: no field 'egde'; did you mean 'edge'?",
        f"{path}:14:14 entries[1].pattern: no pattern 'residul_add'; did you mean 'residual_add'?",
    )


def test_the_message_lists_what_problems_holds(write: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("version: 2\nnam: x\nentries: []\n"))
    assert len(caught.value.problems) == 3
    assert all(problem in str(caught.value) for problem in caught.value.problems)


WRONG_ENTRIES: list[tuple[dict[str, Any], str]] = [
    (
        {"pattern": "residul_add"},
        "entries[0].pattern: no pattern 'residul_add'; did you mean 'residual_add'?",
    ),
    ({"pattern": ...}, "entries[0]: 'pattern' is missing"),
    ({"pattern": 3}, "entries[0].pattern: expected a text, got 3"),
    ({"insert": ...}, "entries[0]: 'insert' is missing"),
    ({"insert": "dropblok"}, "entries[0].insert: no regularizer 'dropblok'; did you mean 'dropblock'?"),
    ({"insert": "os.system"}, "entries[0].insert: no regularizer 'os.system'; "),
    (
        {"insert": "../dropblock"},
        "entries[0].insert: no regularizer '../dropblock'; did you mean 'dropblock'?",
    ),
    ({"insert": "_base"}, "entries[0].insert: no regularizer '_base'; "),
    ({"insert": ["dropblock"]}, "entries[0].insert: expected a text, got ['dropblock']"),
    ({"edge": "shotcut"}, "entries[0].edge: residual_add has no edge 'shotcut'; did you mean 'shortcut'?"),
    ({"edge": 1}, "entries[0].edge: expected a text, got 1"),
    ({"with": {"p": 1.5}}, "entries[0].with.p: expected a number in [0, 1], got 1.5"),
    ({"with": {"p": -0.1}}, "entries[0].with.p: expected a number in [0, 1], got -0.1"),
    ({"with": {"p": True}}, "entries[0].with.p: expected a number in [0, 1], got True"),
    ({"with": {"p": None}}, "entries[0].with.p: expected a number in [0, 1], got None"),
    ({"with": {"p": "1e-3"}}, 'entries[0].with.p: got the text "1e-3"; write 0.001'),
    ({"with": {"p": "much"}}, "entries[0].with.p: expected a number in [0, 1], got 'much'"),
    ({"with": {"block_size": 0}}, "entries[0].with.block_size: expected an integer >= 1, got 0"),
    ({"with": {"block_size": 7.5}}, "entries[0].with.block_size: expected an integer >= 1, got 7.5"),
    ({"with": {"block_size": "7"}}, 'entries[0].with.block_size: got the text "7"; write 7'),
    ({"with": {"gamma": "papr"}}, "entries[0].with.gamma: expected one of 'paper', 'exact', got 'papr'"),
    ({"with": {"share_channels": "no"}}, "entries[0].with.share_channels: expected true or false, got 'no'"),
    (
        {"with": {"blocksize": 7}},
        "entries[0].with.blocksize: dropblock has no argument 'blocksize'; did you mean",
    ),
    ({"with": [0.1]}, "entries[0].with: expected a mapping (key: value), got [0.1]"),
    (
        {"insert": "adopt", "with": {"q": 1}},
        "entries[0].with.q: adopt has no argument 'q'; its arguments are: p",
    ),
    ({"insert": "adopt", "pattern": ..., "edge": "output"}, "entries[0].edge: an edge needs a pattern"),
    ({"scale": {"stage": {3: -1}}}, "entries[0].scale.stage.3: expected a number >= 0, got -1"),
    ({"scale": {"stage": {"layer3": 1}}}, "entries[0].scale.stage.layer3: expected an integer, got 'layer3'"),
    ({"scale": {"deph": {3: 1}}}, "entries[0].scale.deph: no field 'deph'; there are: role, stage"),
    ({"scale": {"role": {"body": 1}}}, "entries[0].scale.role.body: expected 'backbone', 'encoder', "),
    ({"scale": {"stage": {4: 20}}}, "entries[0].scale: p = 0.1 times 20 is above 1; lower one of them"),
    (
        {"depth_rule": "linaer"},
        "entries[0].depth_rule: expected 'constant', 'linear', 'linear0' or 'cells', got",
    ),
    (
        {"expect": "many"},
        "entries[0].expect: expected a count, a comparison such as '>=1', or 'any', got 'many'",
    ),
    ({"expect": -1}, "entries[0].expect: expected a count, "),
    ({"optional": "yes"}, "entries[0].optional: expected true or false, got 'yes'"),
    ({"stack": 1}, "entries[0].stack: expected true or false, got 1"),
    ({"name": ""}, "entries[0].name: expected a name, got ''"),
    ({"name": "x" * 101}, "entries[0].name: expected at most 100 characters, got "),
    ({"name": "a\nb"}, "entries[0].name: expected a name on one line, without blanks around it, got 'a\\nb'"),
    ({"name": "defaults"}, "entries[0].name: 'defaults' is taken; choose another name"),
    ({"name": 3}, "entries[0].name: expected a text, got 3"),
    ({"where": {"stge": 3}}, "entries[0].where.stge: no field 'stge'; did you mean 'stage'?"),
    ({"where": 3}, "entries[0].where: expected a mapping (key: value), got 3"),
    (
        {"where": {"stage": -1}},
        "entries[0].where.stage: expected an integer from 0 on, or a list of them, got -1",
    ),
    ({"where": {"stage": []}}, "entries[0].where.stage: expected an integer from 0 on, "),
    ({"where": {"stage": [3, "4"]}}, "entries[0].where.stage: expected an integer from 0 on, "),
    ({"where": {"stage": True}}, "entries[0].where.stage: expected an integer from 0 on, "),
    (
        {"where": {"depth": [1, 0]}},
        "entries[0].where.depth: expected a range [from, to] within [0, 1], got [1, 0]",
    ),
    ({"where": {"depth": 0.5}}, "entries[0].where.depth: expected a range [from, to] within [0, 1], got 0.5"),
    ({"where": {"depth": [0, "1"]}}, "entries[0].where.depth: expected a range "),
    ({"where": {"block": "last half"}}, "entries[0].where.block: expected 'first N%', 'last N%' or indices "),
    ({"where": {"block": "last 0%"}}, "entries[0].where.block: expected 'first N%', "),
    ({"where": {"block": "last 101%"}}, "entries[0].where.block: expected 'first N%', "),
    (
        {"where": {"path": "brnch"}},
        "entries[0].where.path: expected one of branch, shortcut, trunk, or a list",
    ),
    (
        {"where": {"role": ["encdr"]}},
        "entries[0].where.role: expected one of backbone, encoder, decoder, skip, head",
    ),
    (
        {"where": {"module": 3}},
        "entries[0].where.module: expected a glob such as 'layer4.*' or 're:…', got 3",
    ),
    (
        {"where": {"module": []}},
        "entries[0].where.module: expected a glob such as 'layer4.*', or a list of them",
    ),
    ({"where": {"module": "re:("}}, "entries[0].where.module: 're:(' is not a regular expression: missing )"),
    ({"where": {"exclude": "x" * 201}}, "entries[0].where.exclude: a pattern of 201 characters; at most 200"),
    ({"where": {"every": 0}}, "entries[0].where.every: expected a number >= 1, got 0"),
    ({"where": {"min_size": "7"}}, 'entries[0].where.min_size: got the text "7"; write 7'),
    (
        {"where": {"channels": "64+"}},
        "entries[0].where.channels: expected an integer or a comparison such as '>=64'",
    ),
    ({"where": {"trainable": "true"}}, "entries[0].where.trainable: expected true or false, got 'true'"),
    ({"where": {"not_on": "shortcut"}}, "entries[0].where.not_on: expected 'pattern.edge', such as "),
    (
        {"where": {"not_on": "residual_add.x"}},
        "entries[0].where.not_on: residual_add has no edge 'x'; its edges are",
    ),
    ({"where": {"not_on": ["nothing.x"]}}, "entries[0].where.not_on[0]: no pattern 'nothing'; "),
]


@pytest.mark.parametrize(("fields", "told"), WRONG_ENTRIES)
def test_a_wrong_entry(fields: dict[str, Any], told: str) -> None:
    assert only_problem(simple(**fields)).startswith(told)


WRONG_HEADS: list[tuple[dict[str, Any], str]] = [
    ({"version": ...}, "'version' is missing"),
    ({"version": 2}, "version: expected 1, got 2"),
    ({"version": "1"}, "version: expected 1, got '1'"),
    ({"name": 3}, "name: expected a text, got 3"),
    ({"clock": "wall"}, "clock: expected 'optimizer', 'forward' or 'manual', got 'wall'"),
    ({"tested_on": {"resnet50": "36"}}, 'tested_on.resnet50: got the text "36"; write 36'),
    ({"tested_on": {"resnet50": -1}}, "tested_on.resnet50: expected a number >= 0, got -1"),
    ({"tested_on": []}, "tested_on: expected a mapping (key: value), got []"),
    ({"entries": ...}, "entries: a recipe needs at least one entry"),
    ({"entries": []}, "entries: a recipe needs at least one entry"),
    ({"defaults": {"name": "x"}}, "defaults.name: a name belongs to one entry, not into the defaults"),
    ({"defaults": {"insrt": "x"}}, "defaults.insrt: no field 'insrt'; did you mean 'insert'?"),
    ({"defaults": {"where": {"stage": "x"}}}, "defaults.where.stage: expected an integer from 0 on"),
    ({"patterns": {"mine": ["conv2d"]}}, "patterns.mine: expected at least 2 items, got ['conv2d']"),
    ({"patterns": {"mine": ["conv2d", "rleu"]}}, "patterns.mine[1]: no kind of node 'rleu'; "),
    (
        {"patterns": {"conv_bn": ["conv2d", "activation"]}},
        "patterns.conv_bn: the catalogue has a pattern 'conv_bn'",
    ),
    ({"include": 3}, "include: expected the name of a recipe or a path below this file's folder, got 3"),
    ({"include": "./base.yaml"}, "include: only a recipe in a file includes by path; "),
    ({"include": ["dropblok_resnet_g4"]}, "include[0]: no bundled recipe 'dropblok_resnet_g4'; did you mean"),
]


@pytest.mark.parametrize(("fields", "told"), WRONG_HEADS)
def test_a_wrong_head(fields: dict[str, Any], told: str) -> None:
    recipe = {key: value for key, value in {**simple(), **fields}.items() if value is not ...}
    assert problems(recipe)[0].startswith(told)


@pytest.mark.parametrize("wrong", [3, {}, [{}], [3], "dropblock"])
def test_entries_of_a_wrong_shape(wrong: Any) -> None:
    assert all("entries" in problem for problem in problems({"version": 1, "entries": wrong}))


def test_entry_names_are_used_once() -> None:
    recipe = simple()
    recipe["entries"] *= 2
    assert (
        only_problem(recipe)
        == "entries[1].name: the entry name 'only' is there twice; give each entry a name of its own"
    )


def test_a_required_argument_and_a_regularizers_own_types(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine:
        def __init__(self, p: Rate, size: int | tuple[int, int] = 3, layers: list[str] | None = None) -> None: ...

    monkeypatch.setitem(catalogue._registered["regularizers"], "mine", Mine)
    read = load_recipe(simple(insert="mine", **{"with": {"p": 0, "size": [3, 5], "layers": None}})).entries[0]
    assert read.arguments == {"p": 0.0, "size": (3, 5), "layers": None}
    assert only_problem(simple(insert="mine", **{"with": {}})) == "entries[0].with: mine needs 'p'"
    told = only_problem(simple(insert="mine", **{"with": {"p": 0, "size": [3]}}))
    assert told == "entries[0].with.size: expected an integer or a list of 2: an integer, an integer, got [3]"
    assert "mine" in str(recipe_schema())


def test_annotations_in_words() -> None:
    assert describe(Rate) == "a number in [0, 1]"
    assert describe(dict[str, int]) == "a mapping"
    assert describe(list[float] | None) == "a list, each a number or nothing (null)"


def test_a_declared_chain_is_a_pattern() -> None:
    recipe = simple(pattern="conv_gn_act", edge="output")
    recipe["patterns"] = {"conv_gn_act": ["conv2d", "group_norm", "activation"]}
    assert load_recipe(recipe).patterns == {"conv_gn_act": ("conv2d", "group_norm", "activation")}
    for edge in ("input", "conv2d", "group_norm"):
        recipe["entries"][0]["edge"] = edge
        assert load_recipe(recipe).entries[0].edge == edge
    recipe["entries"][0]["edge"] = "shortcut"
    assert only_problem(recipe).startswith("entries[0].edge: conv_gn_act has no edge 'shortcut'; its edges are")


# ---- where a recipe comes from ---------------------------------------------------------------------------


def test_a_bundled_name_with_or_without_suffix() -> None:
    assert load_recipe("dropblock_resnet_g34") == load_recipe("dropblock_resnet_g34.yaml")
    assert "dropblock_resnet_g34" in bundled()


def test_a_bare_name_is_never_the_users_file(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(RECIPE, "mine.yaml")
    monkeypatch.chdir(path.parent)
    assert only_problem("mine.yaml") == "no bundled recipe 'mine.yaml'; for the file in this folder write './mine.yaml'"
    assert load_recipe("./mine.yaml") == load_recipe(Path("mine.yaml")) == load_recipe(str(path))
    write("not: a recipe", "dropblock_resnet_g34.yaml")
    assert load_recipe("dropblock_resnet_g34.yaml").name == "dropblock_resnet_g34"


@pytest.mark.parametrize(
    "wrong", [3, None, b"x", ["x"], "", "\0", "x" * 5000, "./" + "x" * 5000, "./\0", "/", "./no.yaml"]
)
def test_what_is_no_recipe_at_all(wrong: Any) -> None:
    assert len(only_problem(wrong)) < 6000


def test_an_unknown_name_shows_the_nearest() -> None:
    assert only_problem("dropblok_resnet_g34.yaml").endswith("did you mean 'dropblock_resnet_g34'?")


# Of places that no model has which a recipe can name; `test_bundled_recipes` counts them on others.
UNNAMED = {"expert_dropout_switch", "gate_expert_drop_moe", "hme_dropout"}


@pytest.mark.parametrize("name", bundled())
def test_bundled_recipes_are_documented(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert bool(recipe.tested_on) != (name in UNNAMED)
    assert recipe.summary and recipe.reference
    assert (recipes_folder() / f"{name}.yaml").read_text().startswith("# ")


def test_the_bundled_placements_are_the_papers() -> None:
    expected = {"resnet50": 36, "resnet18": 12, "smp:Unet:resnet34": 27}
    assert expected.items() <= load_recipe("dropblock_resnet_g34").tested_on.items()
    assert load_recipe("dropblock_resnet_g34_conv_only").tested_on["resnet50"] == 27
    assert load_recipe("dropblock_resnet_g4").tested_on["resnet50"] == 12
    assert load_recipe("dropblock_unet_double_conv").tested_on["smp:Unet:resnet34"] == 5
    for entry in load_recipe("dropblock_resnet_g34").entries:
        rates = [entry.arguments["p"] * entry.scale.factor(site(stage=stage)) for stage in (3, 4)]
        assert rates == pytest.approx([0.025, 0.1], abs=1e-12)


# ---- include ---------------------------------------------------------------------------------------------


def test_an_include_is_replaced_by_name_and_appended_to(write: Callable[..., Path]) -> None:
    write(RECIPE + "patterns: {chain: [conv2d, activation]}\n", "parts/base.yaml")
    path = write(
        "version: 1\ninclude: [./parts/base.yaml]\nentries:\n"
        "  - {name: shortcut, pattern: residual_add, edge: branch, insert: dropout}\n"
        "  - {name: more, pattern: chain, insert: dropout}\n"
    )
    recipe = load_recipe(path)
    assert [entry.name for entry in recipe.entries] == ["conv branch", "shortcut", "more"]
    assert [entry.insert for entry in recipe.entries] == ["dropblock", "dropout", "dropout"]
    assert recipe.entries[0].where.stage == (3, 4), "an included entry has the defaults of its own file"
    assert recipe.entries[1].where.stage is None
    assert recipe.name == "dropblock"


def test_an_include_of_a_bundled_recipe() -> None:
    recipe = load_recipe({"version": 1, "include": "dropblock_resnet_g4"})
    assert recipe.entries == load_recipe("dropblock_resnet_g4").entries


def test_a_problem_of_an_included_file_is_told_where_it_is(write: Callable[..., Path]) -> None:
    base = write(RECIPE.replace("p: 0.1", "p: 2"), "parts/base.yaml")
    path = write("version: 1\ninclude: [parts/base.yaml]\n")
    assert only_problem(path).startswith(f"{path.parent}/parts/base.yaml:6:13 defaults.with.p: ")
    base.unlink()
    assert "No such file" in only_problem(path)


@pytest.mark.parametrize(
    "name", ["../outside.yaml", "parts/../../outside.yaml", "./link.yaml", "./folder/outside.yaml"]
)
def test_an_include_does_not_climb_out(write: Callable[..., Path], name: str) -> None:
    outside = write(RECIPE, "outside.yaml")
    path = write(f"version: 1\ninclude: [{name}]\n", "inner/mine.yaml")
    (path.parent / "link.yaml").symlink_to(outside)
    (path.parent / "folder").symlink_to(outside.parent)
    with within_a_second():
        assert "leads out of this recipe's folder" in only_problem(path)


def test_an_absolute_include_is_refused(write: Callable[..., Path]) -> None:
    base = write(RECIPE, "base.yaml")
    assert "leads out" in only_problem(write(f"version: 1\ninclude: [{base}]\n"))


@pytest.mark.parametrize("other", ["./a.yaml", "./b.yaml"])
def test_an_include_in_a_circle(write: Callable[..., Path], other: str) -> None:
    path = write(f"version: 1\ninclude: [{other}]\n", "a.yaml")
    write("version: 1\ninclude: [./a.yaml]\n", "b.yaml")
    with within_a_second():
        assert "includes itself in a circle" in only_problem(path)


def test_includes_cannot_multiply(write: Callable[..., Path]) -> None:
    for number in range(20):
        write(f"version: 1\ninclude: [./{number + 1}.yaml, ./{number + 1}.yaml]\n", f"{number}.yaml")
    path = write(RECIPE, "20.yaml").with_name("0.yaml")
    with within_a_second():
        assert "includes at most" in only_problem(path)


# ---- overrides -------------------------------------------------------------------------------------------


def test_overrides_as_dict_and_as_list() -> None:
    by_dict = load_recipe("dropblock_resnet_g34", overrides={"conv branch.with.p": 0.2, "shortcut.optional": True})
    by_list = load_recipe("dropblock_resnet_g34", overrides=["conv branch.with.p=0.2", "shortcut.optional=true"])
    assert by_dict == by_list
    assert [entry.arguments["p"] for entry in by_dict.entries] == [0.2, 0.1, 0.1]
    assert by_dict.entries[0].arguments["block_size"] == 7
    assert [entry.optional for entry in by_dict.entries] == [False, False, True]


def test_overrides_of_defaults_clock_schedule_and_scale() -> None:
    overrides = [
        "defaults.with.p=2e-1",
        "clock=manual",
        "shortcut.schedule.end=0.5",
        "shortcut.scale.stage.3=1",
    ]
    recipe = load_recipe("dropblock_resnet_g34", overrides=[*overrides, "conv branch.where.role="])
    assert {entry.arguments["p"] for entry in recipe.entries} == {0.2}
    assert recipe.clock == "manual"
    assert [entry.schedule.end.value for entry in recipe.entries] == [1.0, 1.0, 0.5]
    assert recipe.entries[2].scale.stage == {3: 1.0}
    assert recipe.entries[0].where.role is None


def test_default_overrides_reach_included_entries() -> None:
    recipe = load_recipe({"version": 1, "include": "dropblock_resnet_g4"}, overrides={"defaults.with.p": 0.3})
    assert {entry.arguments["p"] for entry in recipe.entries} == {0.3}


def test_overrides_of_a_recipe_read_before() -> None:
    recipe = load_recipe("dropblock_resnet_g34")
    changed = load_recipe(recipe, overrides={"shortcut.with.p": 0.5})
    assert changed.entries[:2] == recipe.entries[:2]
    assert changed.entries[2].arguments["p"] == 0.5
    assert recipe.entries[2].arguments["p"] == 0.1


def test_the_longest_entry_name_is_meant() -> None:
    recipe = {**simple(), "entries": [simple(name=name)["entries"][0] for name in ("a", "a.with", "a b.c")]}
    read = load_recipe(recipe, overrides={"a.with.with.p": 0.2, "a b.c.with.p": 0.3, "a.optional": True})
    assert [entry.arguments["p"] for entry in read.entries] == [0.1, 0.2, 0.3]
    assert [entry.optional for entry in read.entries] == [True, False, False]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "conv brnch.with.p=0.2",
            "overrides['conv brnch.with.p']: no entry 'conv brnch'; did you mean 'conv branch'?",
        ),
        ("default.with.p=0.2", "overrides['default.with.p']: no entry 'default'; did you mean 'defaults'?"),
        ("conv branch.wiht.p=0.2", "overrides['conv branch.wiht.p']: no field 'wiht'; did you mean 'with'?"),
        ("conv branch.with.q=0.2", "overrides['conv branch.with.q']: dropblock has no argument 'q'; "),
        ("conv branch.with.p=2", "overrides['conv branch.with.p']: expected a number in [0, 1], got 2"),
        ("conv branch.with.p=a: b: c", "overrides['conv branch.with.p']: not valid YAML: "),
        (
            "conv branch.with.p=!!python/name:os.system x",
            "overrides['conv branch.with.p']: a recipe holds no YAML tags",
        ),
        (
            "conv branch.pattern.x=2",
            "overrides['conv branch.pattern.x']: 'pattern' is 'conv_bn_act': there is nothing",
        ),
        ("conv branch=2", "overrides['conv branch']: expected a value of this entry, such as 'conv branch.with.p'"),
        ("clock=wall", "overrides['clock']: expected 'optimizer', 'forward' or 'manual', got 'wall'"),
        ("version=2", "overrides['version']: no entry 'version'; there are: "),
    ],
)
def test_a_wrong_override(override: str, told: str) -> None:
    assert only_problem("dropblock_resnet_g34", overrides=[override]).startswith(told)


@pytest.mark.parametrize("wrong", ["conv branch.with.p=1", ["conv branch.with.p"], [3], {3: 4}, 3, {"x" * 301: 1}])
def test_overrides_of_a_wrong_shape(wrong: Any) -> None:
    assert only_problem("dropblock_resnet_g34", overrides=wrong).startswith("expected ")


def test_defaults_of_a_recipe_read_before_are_gone() -> None:
    told = only_problem(load_recipe("dropblock_resnet_g34"), overrides={"defaults.with.p": 0.2})
    assert told == "overrides['defaults.with.p']: no entry takes this from the defaults; override the entries"
    assert only_problem("stochastic_depth_linear", overrides={"defaults.with.p": 0.2}) == told


# ---- safety ----------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
UNSAFE: dict[str, tuple[str | bytes, str]] = {
    "alias bomb": (BOMB, "at most 2000 values"),
    "alias to itself": ("a: &a [*a]\n", "has no anchor before it"),
    "alias without anchor": ("a: *nothing\n", "has no anchor before it"),
    "python tag": ("a: !!python/object/apply:os.system [exit]\n", "no YAML tags"),
    "python tag on a scalar": ("a: !!python/name:os.system\n", "no YAML tags"),
    "python tag on a key": ("!!python/name:os.system x: 1\n", "a key must be a word"),
    "local tag": ("a: !mine 3\n", "no YAML tags"),
    "core tag": ("a: !!str 3\n", "no YAML tags"),
    "non-specific tag": ("a: ! 3\n", "no YAML tags"),
    "duplicate key": ("version: 1\nversion: 1\n", "'version' is there twice (first at line 1)"),
    "nested duplicate key": (RECIPE.replace("p: 0.1", "p: 0.1, p: 0.2"), "'p' is there twice"),
    "not a number": (RECIPE.replace("p: 0.1", "p: .nan"), "expected a finite number, got '.nan'"),
    "infinity": (RECIPE.replace("p: 0.1", "p: -.inf"), "expected a finite number, got '-.inf'"),
    "overflow": (RECIPE.replace("p: 0.1", "p: 1e999"), "expected a finite number, got '1e999'"),
    "long integer": (RECIPE.replace("p: 0.1", "p: " + "9" * 5000), "2000 are allowed"),
    "too long integer": (RECIPE.replace("p: 0.1", "p: " + "9" * 50), "this number is too long"),
    "key that is a list": ("? [a]\n: b\n", "a key must be a word"),
    "key that is null": ("~: b\n", "expected a word or an integer as key, got None"),
    "key that is an anchor": ("&a x: 1\n*a : 2\n", "a key must be a word"),
    "list on top": ("- version: 1\n", "expected a mapping with version: and entries:"),
    "text on top": ("dropblock\n", "expected a mapping with version: and entries:"),
    "empty": ("", "the recipe is empty"),
    "comments only": ("# nothing\n", "the recipe is empty"),
    "two documents": (f"{RECIPE}---\n{RECIPE}", "a recipe is one YAML document"),
    "syntax": (RECIPE + "  - [\n", "not valid YAML"),
    "tab": ("a:\n\t- b\n", "not valid YAML"),
    "binary": (bytes(range(256)) * 100, "expected YAML text in UTF-8"),
    "zeros": (b"\0" * 1000, "not valid YAML"),
    "utf-16": (RECIPE.encode("utf-16"), "expected YAML text in UTF-8"),
    "too large": (b"a: b\n" * 10_000_000, f"a recipe has at most {MAX_BYTES}"),
    "too deep, flow": ("[" * 30_000, "nested more than"),
    "too deep, both": ("[{a: " * 10_000, "nested more than"),
    "keys within keys": ("[{" * 100, "a key must be a word"),
    "too deep, block": ("- " * 30_000, "nested more than"),
    "too many values": ("a: [" + "1," * 30_000 + "]", "at most 2000 values"),
    "too many keys": ("".join(f"k{n}:\n" for n in range(8_000)), "at most 2000 values"),
    "long text": ("a: " + "x" * 60_000, "at most 2000"),
    "escape character": ('a: "\\e[31m"\n', "holds a control character"),
    "right to left": ('name: "\\u202Ex"\n', "holds a control character"),
    "control character in a key": ('"a\\x07": 1\n', "holds a control character"),
    "impossible character": ('a: "\\UFFFFFFFF"\n', "not valid YAML"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_loading_is_safe_and_fast(case: str, write: Callable[..., Path]) -> None:
    text, told = UNSAFE[case]
    path = write(text)
    with within_a_second():
        found = problems(path)
    assert any(told in problem for problem in found), found
    assert all(len(problem) < 600 and (problem.isprintable()) for problem in found)


EXPLODING = [
    "re:(a|aa)+$",
    "re:(a|a)*b?c?$",
    "re:(.|..|...)*(.|..|...)*!?$",
    "re:((a{1,100}){1,100}){1,100}$",
]


@pytest.mark.parametrize("expression", EXPLODING)
def test_an_exploding_expression(expression: str) -> None:
    with within_a_second():
        assert "takes too long" in only_problem(simple(where={"module": expression}))


def test_many_exploding_expressions() -> None:
    expressions = [f"re:(a|aa)+{'b?' * n}$" for n in range(50)]
    with within_a_second():
        found = problems(simple(where={"exclude": expressions}))
    assert all("takes too long" in problem for problem in found)


def test_an_expression_with_huge_counts() -> None:
    with within_a_second():
        assert "at most three digits" in only_problem(simple(where={"module": "re:(?:a{0,10000000}b?){100000}"}))


def test_an_expression_that_explodes_on_a_models_path_only() -> None:
    where = Where(module=("re:(q|qq|qqq)+",))  # type: ignore[arg-type]
    with within_a_second(), pytest.raises(RecipeError, match="takes too long"):
        where.matches_facts(site(owner="q" * 5000 + "!"))


def test_globs_never_explode() -> None:
    where = load_recipe(simple(where={"module": "*a" * 90 + "b"})).entries[0].where
    with within_a_second():
        assert not where.matches_facts(site(owner="a" * 5000))


def test_devices_and_folders_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in ("/dev/zero", tmp_path, tmp_path / "pipe.yaml"):
        with within_a_second():
            assert "expected a file, got a folder or a device" in only_problem(Path(path))


def test_python_data_is_bounded_too() -> None:
    circle: dict[str, Any] = {"version": 1}
    circle["entries"] = circle
    assert "nested more than" in only_problem(circle)
    assert "at most 2000 values" in only_problem({"version": 1, "entries": [{}] * 20_000})
    assert "expected plain data" in problems(simple(where={"stage": object()}))[0]
    assert "expected a finite number" in problems(simple(**{"with": {"p": float("nan")}}))[0]
    assert "as key, got 1.5" in problems({1.5: 2, **simple()})[0]
    assert "too long" in problems(simple(expect=10**5000))[0]
    assert "control character" in only_problem(simple(name="\x1b[31m"))


def test_aliases_within_bounds_are_fine(write: Callable[..., Path]) -> None:
    text = RECIPE.replace("with: {p: 0.1,", "with: {p: &rate 0.1,").replace(
        "edge: output", "edge: output\n    with: {p: *rate}"
    )
    assert load_recipe(write(text)) == load_recipe(write(RECIPE))
    told = problems(path := write(text.replace("&rate 0.1", "&rate 3")))
    assert told == tuple(
        f"{path}:6:13 {where}.with.p: expected a number in [0, 1], got 3" for where in ("entries[0]", "defaults")
    )


# ---- the schema ------------------------------------------------------------------------------------------


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())


@pytest.mark.parametrize("name", bundled())
def test_the_schema_takes_the_bundled_recipes(name: str) -> None:
    content = (recipes_folder() / f"{name}.yaml").read_bytes()
    written = read_yaml(content, Place(), Problems(), Budget()).plain()
    jsonschema.validate(_with_text_keys(written), recipe_schema())


def _with_text_keys(value: Any) -> Any:
    """As JSON has it: every key is a text."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(child) for key, child in value.items()}
    return [_with_text_keys(child) for child in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("fields", "told"), WRONG_ENTRIES)
def test_the_schema_refuses_what_loading_refuses(fields: dict[str, Any], told: str) -> None:
    """But for what needs more than one field, or the names that only the catalogue knows."""
    schema = jsonschema.Draft202012Validator(recipe_schema())
    beyond = (
        "'pattern' is missing",
        "no pattern",
        "'insert' is missing",
        "is taken",
        "is above 1",
        "an edge needs",
    )
    beyond += (
        "not a regular expression",
        "within [0, 1], got [1, 0]",
        "without blanks",
        "last 101%",
        "last 0%",
    )
    beyond += ("residual_add has no edge 'x'", "'first N%', ")
    if not any(word in told for word in beyond):
        assert not schema.is_valid(_with_text_keys(simple(**fields)))


# ---- anything at all -------------------------------------------------------------------------------------

SNIPPETS = [
    "&a ",
    "*a",
    "!!str ",
    "? ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    ": ",
    "'",
    '"',
    "|\n",
    ">\n",
    "\t",
    "\n",
    "%YAML 1.1\n",
]
SNIPPETS += [
    "---\n",
    "...\n",
    "#",
    "<<: *a",
    ".nan",
    "1e999",
    "re:(",
    "\\",
    "\0",
    "\ufeff",
    "é",
    "null",
    "0x",
    "-",
    "=",
    "@",
    "`",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 400), st.integers(0, 30), st.sampled_from(SNIPPETS) | st.text(max_size=5)),
        max_size=4,
    )
)
def test_any_mutated_text_is_a_recipe_or_a_recipe_error(
    edits: list[tuple[int, int, str]], write: Callable[..., Path]
) -> None:
    text = RECIPE
    for at, length, snippet in edits:
        text = text[: at % len(text)] + snippet + text[at % len(text) + length :] if text else snippet
    try:
        recipe = load_recipe(write(text.encode(errors="surrogatepass")))
    except RecipeError as error:
        assert error.problems
    else:
        assert isinstance(recipe, Recipe)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(SNIPPETS)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3))
FIELDS = [
    "name",
    "pattern",
    "edge",
    "where",
    "insert",
    "with",
    "scale",
    "schedule",
    "depth_rule",
    "expect",
    "stack",
]
FACTS = list(Where.model_fields)
HEADS = ["name", "include", "patterns", "defaults", "tested_on", "version", "clock", "entries"]


@settings(max_examples=150, deadline=None)
@given(
    field=st.sampled_from(FIELDS),
    fact=st.sampled_from(FACTS),
    value=VALUES,
    other=VALUES,
    top=st.sampled_from(HEADS),
)
def test_any_value_is_a_recipe_or_a_recipe_error(field: str, fact: str, value: Any, other: Any, top: str) -> None:
    for recipe in (simple(**{field: value}), simple(where={fact: value}), {**simple(), top: other}):
        try:
            assert isinstance(load_recipe(recipe), Recipe)
        except RecipeError as error:
            assert error.problems
