"""Every bundled recipe does on the models that it names what it says: so many edits, some by each of its entries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dropsurgery import load_recipe, plan_recipe
from dropsurgery.models import example_inputs, make_model
from dropsurgery.recipe import bundled
from tests.patterns.nets import NETS
from tests.regularizers import mixtures

Own = tuple[Callable[[], nn.Module], Callable[[], Any], int]


def mixture(name: str, count: int) -> Own:
    """A transformers model with random weights, what it takes, and how many edits are made."""
    return lambda: mixtures.made(name), lambda: mixtures.words(name), count


TREE: Own = (NETS["soft_tree"].build, lambda: torch.zeros(NETS["soft_tree"].shape), 3)
# What no model has that a recipe can name: none of their libraries has a mixture of experts, or a tree.
OWN: dict[str, list[Own]] = {
    "expert_dropout_switch": [mixture("mixtral", 2), mixture("switch", 2 * mixtures.EXPERTS)],
    "gate_expert_drop_moe": [mixture("mixtral", 2), mixture("gpt_oss", 2), mixture("switch", 2)],
    "gating_dropout_moe": [mixture("mixtral", 2), mixture("deepseek", 2), mixture("switch", 2)],
    "hme_dropout": [TREE],
    "router_jitter_switch": [mixture("mixtral", 2), mixture("switch", 2)],
}


@pytest.mark.parametrize("name", bundled())
def test_edits_are_as_many_as_the_recipe_says(name: str) -> None:
    recipe = load_recipe(name)
    made, hits = {}, Counter[str]()
    for model in recipe.tested_on:
        plan = plan_recipe(make_model(model), name, example_inputs=example_inputs(model), total_steps=1000)
        made[model] = len(plan.edits)
        hits.update(plan.hits)
    assert made == recipe.tested_on
    for make, inputs, count in OWN.get(name, []):
        plan = plan_recipe(make(), name, example_inputs=inputs(), total_steps=1000)
        assert len(plan.edits) == count
        hits.update(plan.hits)
    assert (made or name in OWN) and 0 not in made.values()
    assert all(hits[entry.name] for entry in recipe.entries)


@pytest.mark.parametrize("name", bundled())
def test_each_recipe_says_what_it_does_and_after_whom(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.summary
    assert recipe.reference
