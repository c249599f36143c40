"""Every pattern against the counts in the YAML file of its name; a pattern without cases fails.

A case: `model` (a timm name, with keyword arguments after a bar; `smp:<architecture>:<encoder>`; `zoo:<name>` and
`own:<name>` of tests/zoo.py and tests/patterns/nets.py), `count`, and where they matter the counts per stage, flow or
role of the matches' last nodes, how often each edge can be reached, and a reason that must be among the misses.
`fused: 0` has timm write its attention out.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from ruamel.yaml import YAML
from torch import fx

from dropsurgery import catalogue
from dropsurgery.capture import capture
from dropsurgery.kinds import holds_tensor
from dropsurgery.matching import Found, find
from dropsurgery.models import make_model
from tests.patterns.nets import NETS
from tests.zoo import ZOO

HERE = Path(__file__).parent
CASES = {path.stem: YAML(typ="safe").load(path) for path in sorted(HERE.glob("*.yaml"))}
BY_MODEL = sorted(((name, case) for name in CASES for case in CASES[name]), key=lambda each: str(each[1]["model"]))
SMALL = {"zoo": ZOO, "own": NETS}
FACTS = {"stages": "stage", "flows": "flow", "roles": "role"}


@lru_cache(maxsize=2)
def graph_of(model: str, fused: bool = True) -> fx.Graph:
    library, _, name = model.partition(":")
    if library in SMALL:
        small = SMALL[library][name]
        return capture(small.build(), small.example()).view.graph
    if library == "smp":
        return capture(make_model(model), torch.zeros(1, 3, 64, 64, device="meta")).view.graph
    name, *options = model.split("|")
    keywords = {key: int(value) for key, value in (option.split("=") for option in options)}
    timm.layers.set_fused_attn(fused)
    try:
        with torch.device("meta"):
            net = timm.create_model(name, **keywords)
        return capture(net).view.graph
    finally:
        timm.layers.set_fused_attn(True)


def problems_of(pattern: str, case: dict[str, Any]) -> list[str]:
    """What of a case does not hold; nothing if all is well."""
    found = find(graph_of(case["model"], bool(case.get("fused", True))), catalogue.load("patterns", pattern))
    measured: dict[str, Any] = {"count": len(found.matches)}
    measured["edges"] = {edge: reached(found, edge) for edge in case.get("edges", {})}
    for key, fact in FACTS.items():
        measured[key] = dict(Counter(list(match.nodes.values())[-1].meta[fact] for match in found.matches))
    problems = [f"{key}: {measured[key]}" for key in measured if key in case and case[key] != measured[key]]
    if "miss" in case and not any(case["miss"] in miss.reason for miss in found.misses):
        problems.append(f"misses: {sorted({miss.reason for miss in found.misses})}")
    return problems


def reached(found: Found, edge: str) -> int:
    """How many edges of that name can be reached; each has a value that travels there."""
    edges = [at for match in found.matches for at in match.edges(edge) or ()]
    assert all(holds_tensor(at.source.meta["value"]) for at in edges)
    return len(edges)


@pytest.mark.parametrize("pattern", catalogue.names("patterns"))
def test_pattern_has_cases(pattern: str) -> None:
    assert any(case["count"] for case in CASES.get(pattern, [])), f"tests/patterns/{pattern}.yaml has no case that hits"


@pytest.mark.parametrize(
    ("pattern", "case"),
    [pytest.param(name, case, id=f"{name}-{case['model']}") for name, case in BY_MODEL],
)
def test_case(pattern: str, case: dict[str, Any]) -> None:
    assert problems_of(pattern, case) == []


def test_wrong_cases_are_noticed() -> None:
    case = {
        "model": "zoo:resnet",
        "count": 7,
        "stages": {1: 8},
        "roles": {"decoder": 8},
        "edges": {"shortcut": 7},
        "miss": "no such reason",
    }
    assert len(problems_of("residual_add", case)) == 5
