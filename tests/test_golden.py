"""A bundled recipe's diff is the one that was read and kept: `python tests/test_golden.py` writes it anew.

Kept are those that can be read: of recipes with at most `MOST` edits on the smallest model that they name.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dropsurgery import apply_recipe, diff, load_recipe
from dropsurgery.models import example_inputs, make_model
from dropsurgery.recipe import bundled

GOLDEN = Path(__file__).parent / "golden"
MOST = 60


def kept() -> list[str]:
    """The names of the recipes whose diffs are kept."""
    return [name for name in bundled() if min(load_recipe(name).tested_on.values(), default=MOST + 1) <= MOST]


def text(recipe: str) -> str:
    """The recipe's diff on the model with the fewest edits among those that the recipe names."""
    counts = load_recipe(recipe).tested_on
    model = min(counts, key=counts.__getitem__)
    gm = apply_recipe(make_model(model), recipe, example_inputs=example_inputs(model), total_steps=1000)
    return f"{model}\n{diff(gm, color=False)}\n"


@pytest.mark.parametrize("recipe", kept())
def test_the_diff_is_the_one_kept(recipe: str) -> None:
    golden = GOLDEN / f"{recipe}.txt"
    assert golden.exists(), "write it by `python tests/test_golden.py`, and read it"
    assert text(recipe) == golden.read_text(encoding="utf-8")


def test_every_kept_diff_has_its_recipe() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(kept())


if __name__ == "__main__":
    for name in kept():
        (GOLDEN / f"{name}.txt").write_text(text(name), encoding="utf-8")
