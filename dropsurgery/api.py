"""What users call: apply a recipe, plan it, find sites, show the diff, strip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from dropsurgery import catalogue
from dropsurgery import planning as _planning
from dropsurgery.capture import Captured, capture
from dropsurgery.context import Context
from dropsurgery.errors import PlanError, SurgeryError
from dropsurgery.planning import Plan, Sites
from dropsurgery.recipe import Recipe, load_recipe
from dropsurgery.records import Edit, Site, TensorFact
from dropsurgery.rewriting import rewrite
from dropsurgery.schedules import needs_total_steps
from dropsurgery.surgery import Surgery
from dropsurgery.surroundings import behind

RecipeLike = str | Path | Mapping[str, Any] | Recipe
Overrides = Mapping[str, Any] | Sequence[str] | None


def apply_recipe(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    example_inputs: Any = None,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    overrides: Overrides = None,
    seed: int | None = None,
) -> fx.GraphModule:
    """Insert the regularizers that a recipe names; the model given is left as it was.

    Args:
        model: a plain module tree: any timm or segmentation-models-pytorch model, or your own.
        recipe: a bundled name with or without `.yaml`, a path (with a slash), a dict or a `Recipe`.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, of which only shapes and dtypes
            count; inferred for timm and SMP models.
        total_steps: length of the training in optimizer steps; schedules need it.
        steps_per_epoch: needed where the recipe counts in epochs.
        overrides: changes by entry, `{"conv branch.with.p": 0.2}` or `["conv branch.with.p=0.2"]`.
        seed: draw all masks from numbers keyed by (seed, site, step, forward), whatever else draws numbers.

    Returns:
        A module that is a `torch.fx.GraphModule` and an instance of the model's own class. It shares parameters and
        buffers with the model given; `gm.surgery` is the handle to clock, plan, diff and audit.

    Raises:
        RecipeError: the recipe is not valid; every problem is listed.
        CaptureError: the model cannot be captured.
        PlanError: the recipe does not fit the model, or `total_steps` is missing.
    """
    plan, captured = _planned(model, recipe, example_inputs, total_steps, steps_per_epoch, overrides)
    return operate(captured, plan, seed=seed)


def operate(captured: Captured, plan: Plan, *, seed: int | None = None) -> fx.GraphModule:
    """Carry out a plan on the model that it was made for: the last step of `apply_recipe`.

    Raises:
        PlanError: a regularizer cannot work at its site, or `total_steps` is missing.
    """
    _check_clock(plan)
    model = captured.model
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    with torch.inference_mode(False), device:  # rates are written later, wherever this was called
        gm = rewrite(captured, plan.edits, lambda edit: build(edit).to(device))
        captured.view.release()
    gm.__dict__["surgery"] = Surgery(gm, plan.detached(), Context(seed))
    assert isinstance(gm, fx.GraphModule)
    return gm


def plan_recipe(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    example_inputs: Any = None,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    overrides: Overrides = None,
    seed: int | None = None,
) -> Plan:
    """Plan a recipe without changing anything; arguments and errors are those of `apply_recipe`.

    `total_steps` may be missing here: the plan shows rates at the start and the end. `str(plan)` is a table.
    """
    return _planned(model, recipe, example_inputs, total_steps, steps_per_epoch, overrides)[0]


def find_sites(model: nn.Module, pattern: str | None = None, *, example_inputs: Any = None) -> list[Site]:
    """All places where a regularizer could go: every edge of one pattern, or of all of them.

    Raises:
        SurgeryError: no such pattern.
        CaptureError: the model cannot be captured.
    """
    names = catalogue.names("patterns") if pattern is None else [pattern]
    for name in names:
        catalogue.load("patterns", name)
    sites = Sites(capture(model, example_inputs))
    return [site for name in names for edge in sites.pattern(name).edges for site in sites.of(name, edge)]


def get_regularizer(name: str) -> type[nn.Module]:
    """The Module class of a regularizer; it works alone, like any layer.

    Raises:
        SurgeryError: no such regularizer; the nearest names are shown.
    """
    cls: type[nn.Module] = catalogue.load("regularizers", name)
    return cls


def _planned(
    model: nn.Module, recipe: RecipeLike, inputs: Any, total: Any, per_epoch: Any, overrides: Overrides
) -> tuple[Plan, Captured]:
    loaded = load_recipe(recipe, overrides=overrides)
    captured = capture(model, inputs)
    return _planning.plan(captured, loaded, total_steps=total, steps_per_epoch=per_epoch), captured


def _check_clock(plan: Plan) -> None:
    waiting = sorted({edit.entry for edit in plan.edits if needs_total_steps(edit.schedule)})
    if waiting and plan.total_steps is None:
        raise PlanError(
            f"{plan.recipe.name}: the schedule of {', '.join(map(repr, waiting))} runs over the training, whose length "
            "is not known: give total_steps (optimizer steps in all, for instance epochs * len(loader))"
        )


def build(edit: Edit) -> nn.Module:
    """Make the regularizer of an edit, for the facts of its site.

    Raises:
        PlanError: it cannot work there.
    """
    site = edit.site
    try:
        made = catalogue.load("regularizers", edit.regularizer)(**edit.arguments)
        made.producer, made.gate = site.producer, site.gate
        if getattr(made, "asks_behind", False) and site.at is not None:
            made.behind = behind(site.at)
        made.images = _images(site)
        made.build(channel_axis=site.channel_axis, channels=site.channels, shape=site.shape, site_id=site.id)
        if edit.kind == "swap" and site.at is not None:
            made.bind(site.at.layer_module())
    except SurgeryError as error:
        raise PlanError(f"entry '{edit.entry}' at {site.id} (shape {list(site.shape)}): {error}") from error
    module: nn.Module = made
    return module


def _images(site: Site) -> int | None:
    """The batch of the model's example, which is that of its first tensor; None where it takes none."""
    nodes = site.at.node.graph.find_nodes(op="placeholder") if site.at is not None else ()
    values = (node.meta.get("value") for node in nodes if node.meta.get("component") is None)
    shape = next((value.shape for value in values if isinstance(value, TensorFact) and value.shape), (None,))
    return shape[0]
