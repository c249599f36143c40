"""Every pattern against the counts in the YAML file of its name; a pattern without cases fails.

A case: `model` (a timm name, with keyword arguments after a bar; `smp:<architecture>:<encoder>`; `zoo:<name>`),
`count`, and where they matter the counts per stage, flow or role of the matches' last nodes, and a reason that must be
among the misses.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from ruamel.yaml import YAML
from torch import fx

from dropsurgery import catalogue
from dropsurgery.capture import capture
from dropsurgery.matching import find
from tests.zoo import ZOO

HERE = Path(__file__).parent
CASES = {path.stem: YAML(typ="safe").load(path) for path in sorted(HERE.glob("*.yaml"))}
FACTS = {"stages": "stage", "flows": "flow", "roles": "role"}


@lru_cache(maxsize=4)
def graph_of(model: str) -> fx.Graph:
    home, _, name = model.rpartition("zoo:")
    if home or name != model:
        return capture(ZOO[name].build(), ZOO[name].example()).view.graph
    if model.startswith("smp:"):
        _, architecture, encoder = model.split(":")
        net = getattr(smp, architecture)(encoder, encoder_weights=None)
        return capture(net, torch.zeros(1, 3, 64, 64)).view.graph
    name, *options = model.split("|")
    keywords = {key: int(value) for key, value in (option.split("=") for option in options)}
    return capture(timm.create_model(name, **keywords)).view.graph


def problems_of(pattern: str, case: dict[str, Any]) -> list[str]:
    """What of a case does not hold; nothing if all is well."""
    found = find(graph_of(case["model"]), catalogue.load("patterns", pattern))
    measured: dict[str, Any] = {"count": len(found.matches)}
    for key, fact in FACTS.items():
        measured[key] = dict(Counter(list(match.nodes.values())[-1].meta[fact] for match in found.matches))
    problems = [f"{key}: {measured[key]}" for key in measured if key in case and case[key] != measured[key]]
    if "miss" in case and not any(case["miss"] in miss.reason for miss in found.misses):
        problems.append(f"misses: {sorted({miss.reason for miss in found.misses})}")
    return problems


@pytest.mark.parametrize("pattern", catalogue.names("patterns"))
def test_pattern_has_cases(pattern: str) -> None:
    assert any(case["count"] for case in CASES.get(pattern, [])), f"tests/patterns/{pattern}.yaml has no case that hits"


@pytest.mark.parametrize(
    ("pattern", "case"),
    [pytest.param(name, case, id=f"{name}-{case['model']}") for name, cases in CASES.items() for case in cases],
)
def test_case(pattern: str, case: dict[str, Any]) -> None:
    assert problems_of(pattern, case) == []


def test_wrong_cases_are_noticed() -> None:
    case = {
        "model": "zoo:resnet",
        "count": 7,
        "stages": {1: 8},
        "roles": {"decoder": 8},
        "miss": "no such reason",
    }
    assert len(problems_of("residual_add", case)) == 4
