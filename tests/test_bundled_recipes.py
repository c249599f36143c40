"""Every bundled recipe does on the models that it names what it says: the number of its edits, with nothing missed."""

from __future__ import annotations

import pytest

from dropsurgery import load_recipe, plan_recipe
from dropsurgery.models import make_model
from dropsurgery.recipe import bundled

CASES = [(name, model, count) for name in bundled() for model, count in load_recipe(name).tested_on.items()]


def test_every_recipe_is_tested() -> None:
    assert {name for name, _, count in CASES if count} == set(bundled())


@pytest.mark.parametrize(("name", "model", "count"), CASES)
def test_edits_are_as_many_as_the_recipe_says(name: str, model: str, count: int) -> None:
    plan = plan_recipe(make_model(model), name)
    assert len(plan.edits) == count
    assert not plan.misses
