"""How many edits each bundled recipe makes on each of many models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from dropsurgery.analysis.explain import fit
from dropsurgery.analysis.pool import Lost, Pool
from dropsurgery.capture import capture
from dropsurgery.errors import SurgeryError
from dropsurgery.models import example_inputs, family, make_model
from dropsurgery.planning import Sites
from dropsurgery.recipe import bundled, load_recipe

_LIMIT = 600.0  # seconds for one model


@dataclass(frozen=True)
class Row:
    """One model: recipe → number of edits, None where the recipe does not fit; or why there are none."""

    model: str
    family: str
    edits: dict[str, int | None] = field(default_factory=dict)
    reason: str = ""


def cover(name: str, recipes: Sequence[str]) -> Row:
    """Plan recipes on one model; an error of the model is the row's reason."""
    torch.set_num_threads(1)  # there is a worker for each core
    try:
        captured = capture(make_model(name), example_inputs(name))
    except SurgeryError as error:
        return Row(name, family(name), reason=str(error))
    found = Sites(captured)
    return Row(name, family(name), {recipe: fit(captured, load_recipe(recipe), found).edits for recipe in recipes})


def coverage(names: Sequence[str], jobs: int = 1) -> Iterator[Row]:
    """The rows of all bundled recipes on these models, as they are ready."""
    with Pool(partial(cover, recipes=bundled()), jobs, _LIMIT) as pool:
        for name, answer in pool.run(names):
            yield Row(name, family(name), reason=answer.reason) if isinstance(answer, Lost) else answer
