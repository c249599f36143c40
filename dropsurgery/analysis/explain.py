"""What can be done with one model: its sites, the stochastic layers it has, what stays opaque, which recipes fit."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from dropsurgery import api
from dropsurgery.analysis.certify import sites_by_edge
from dropsurgery.capture import Captured, capture
from dropsurgery.errors import SurgeryError, SurgeryWarning
from dropsurgery.planning import ADOPT, Sites, plan, rate_name
from dropsurgery.recipe import Recipe, bundled, load_recipe

# Any length will do: only places are counted.
_STEPS, _STEPS_PER_EPOCH = 1000, 100


@dataclass(frozen=True)
class Fit:
    """What a recipe comes to on a model: `edits` in all and by entry, or None for no edits, and the nearest reason."""

    recipe: str
    edits: int | None
    entries: dict[str, int]
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """What is known of a model.

    Attributes:
        sites: pattern → edge → stage → number of sites; stage None is where there are no stages.
        stochastic: the stochastic layers at work: path, class and rate.
        opaque: the parts that no graph shows: path, class and reason.
        fits: what each bundled recipe comes to.
    """

    model: str
    parameters: int
    sites: dict[str, dict[str, dict[int | None, int]]]
    stochastic: list[dict[str, Any]]
    opaque: list[dict[str, str]]
    fits: list[Fit]


def explain(model: nn.Module, example_inputs: Any = None) -> Explanation:
    """Capture a model and look at it.

    Raises:
        CaptureError: the model cannot be captured.
    """
    captured = capture(model, example_inputs)
    found = Sites(captured)
    sites = {
        pattern: {edge: dict(Counter(site.stage for site in sites)) for edge, sites in edges.items()}
        for pattern, edges in sites_by_edge(found).items()
    }
    parts = {part.path: part for part in captured.view.opaque}
    return Explanation(
        model=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sites=sites,
        stochastic=_stochastic(captured),
        opaque=[{"path": p, "class": type(o.module).__name__, "reason": o.reason} for p, o in parts.items()],
        fits=[fit(captured, load_recipe(name), found) for name in bundled()],
    )


def fit(captured: Captured, recipe: Recipe, found: Sites | None = None) -> Fit:
    """What a recipe comes to on a captured model, whose sites may have been found before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)  # a recipe that changes nothing has its reason here
        try:
            made = plan(captured, recipe, total_steps=_STEPS, steps_per_epoch=_STEPS_PER_EPOCH, sites=found)
            for edit in made.edits:
                if edit.kind != ADOPT:
                    api.build(edit)  # which asks the regularizer whether it can work there
        except SurgeryError as error:
            return Fit(recipe.name, None, {}, _nearest(str(error)))
    reasons = [line for lines in made.misses.values() for line in lines]
    return Fit(recipe.name, len(made.edits) or None, dict(made.hits), "" if made.edits else "; ".join(reasons[:1]))


def _nearest(message: str) -> str:
    """The first problem of a PlanError, with the first near miss below it: `head:`, then a line for each."""
    lines = [line.strip() for line in message.splitlines()[1:]] or [message]
    return " ".join(lines[:2])


def _stochastic(captured: Captured) -> list[dict[str, Any]]:
    layers = []
    for site in Sites(captured).stochastic:
        module = captured.model.get_submodule(site.module)
        name = str(rate_name(module))
        layers.append({"path": site.module, "class": type(module).__name__, "rate": getattr(module, name)})
    return layers
