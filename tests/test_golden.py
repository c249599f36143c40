"""Every bundled recipe's diff is the one that was read and kept: `python tests/test_golden.py` writes it anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from dropsurgery import apply_recipe, diff, load_recipe
from dropsurgery.models import make_model
from dropsurgery.recipe import bundled

GOLDEN = Path(__file__).parent / "golden"


def text(recipe: str) -> str:
    """The recipe's diff on the model with the fewest edits among those that the recipe names."""
    counts = {count: model for model, count in load_recipe(recipe).tested_on.items() if count}
    model = counts[min(counts)]
    gm = apply_recipe(make_model(model), recipe, total_steps=1000)
    return f"{model}\n{diff(gm, color=False)}\n"


@pytest.mark.parametrize("recipe", bundled())
def test_the_diff_is_the_one_kept(recipe: str) -> None:
    kept = GOLDEN / f"{recipe}.txt"
    assert kept.exists(), "write it by `python tests/test_golden.py`, and read it"
    assert text(recipe) == kept.read_text(encoding="utf-8")


def test_every_kept_diff_has_its_recipe() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(bundled())


if __name__ == "__main__":
    for name in bundled():
        (GOLDEN / f"{name}.txt").write_text(text(name), encoding="utf-8")
