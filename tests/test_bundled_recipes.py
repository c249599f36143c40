"""Every bundled recipe does on the models that it names what it says: so many edits, some by each of its entries."""

from __future__ import annotations

from collections import Counter

import pytest

from dropsurgery import load_recipe, plan_recipe
from dropsurgery.models import example_inputs, make_model
from dropsurgery.recipe import bundled


@pytest.mark.parametrize("name", bundled())
def test_edits_are_as_many_as_the_recipe_says(name: str) -> None:
    recipe = load_recipe(name)
    made, hits = {}, Counter[str]()
    for model in recipe.tested_on:
        plan = plan_recipe(make_model(model), name, example_inputs=example_inputs(model), total_steps=1000)
        made[model] = len(plan.edits)
        hits.update(plan.hits)
    assert made == recipe.tested_on
    assert min(made.values(), default=0) > 0
    assert all(hits[entry.name] for entry in recipe.entries)


@pytest.mark.parametrize("name", bundled())
def test_each_recipe_says_what_it_does_and_after_whom(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.summary
    assert recipe.reference
