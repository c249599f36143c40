"""`compress`: the steps in order, and what is said where one of them refuses."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dropsurgery.capture import Captured, Inputs, record
from dropsurgery.capture.facts import annotate
from dropsurgery.capture.inputs import resolve_inputs
from dropsurgery.capture.levels import map_tree
from dropsurgery.capture.view import flat_view
from dropsurgery.compression.carrying import carried_out, set_attributes
from dropsurgery.compression.checking import Attempt, agreeing, device_of, dtype_of
from dropsurgery.compression.literals import Attribute, Literals, literals
from dropsurgery.compression.picks import Slices, slices
from dropsurgery.compression.spreading import Blocked, Flow, Mark, spread
from dropsurgery.compression.states import follow, marked_edges
from dropsurgery.emission import example_of
from dropsurgery.errors import SurgeryError
from dropsurgery.matching import chain
from dropsurgery.planning import Sites
from dropsurgery.rewriting import strip
from dropsurgery.widths import Widths, resolve_widths


def compress(gm: nn.Module, widths: Widths, example_inputs: Any = None) -> nn.Module:
    """Cut the weights of a model down to widths that structural dropout has prepared it for.

    Args:
        gm: a model made by `apply_recipe` from a recipe with structural_dropout; it is left as it is.
        widths: an integer, the units that each site keeps, always the first; a float above 0 and up to 1, the share
            of them; or a mapping of site ids, or patterns of them, to either. Sites that it does not name stay whole.
        example_inputs: as for `apply_recipe`; by default like those that it was given, with noise for numbers.

    Returns:
        a model of the user's own class, of ordinary modules with smaller weights of its own, in the mode that `gm` is
        in. Other regularizers are left out of it, as `strip` leaves them. In eval mode it computes what `gm` does
        within `gm.surgery.width(widths)`: that is checked here, on the example.

    Raises:
        SurgeryError: no such sites or widths; or something does not let the cut pass, such as a residual sum with a
            tensor that is not cut alike, a norm over the channels or a convolution of groups. The message names it.
    """
    kept = resolve_widths(gm, widths)
    model = strip(gm)
    inputs = _known(gm) if example_inputs is None else resolve_inputs(model, example_inputs)[0]
    captured = _captured(model, inputs)
    marks = _marks(gm, captured, kept)
    flow = Flow(captured.view)
    try:
        cuts = spread(flow, marks)
        todo = slices(captured, cuts, follow(flow, marks, cuts))
        written = literals(captured, flow, cuts)
    except Blocked as blocked:
        raise SurgeryError(_told(blocked, marks)) from None
    finally:
        captured.view.release()
    return agreeing(gm, _attempts(model, todo, written), kept, inputs)


def _known(gm: nn.Module) -> Inputs:
    """The example that the model was rewritten with, where the model is now and in its dtype; without numbers."""
    device, dtype = device_of(gm), dtype_of(gm)

    def placed(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        number = torch.zeros((), dtype=dtype if item.is_floating_point() else item.dtype, device=device)
        return number.expand(item.shape)

    inputs: Inputs = map_tree(example_of(gm), placed)
    return inputs


def _captured(model: nn.Module, inputs: Inputs) -> Captured:
    root = record(model, *inputs)
    view = flat_view(root, inputs)
    annotate(view.graph)
    return Captured(model, inputs, root, view)


def _marks(gm: Any, captured: Captured, kept: dict[str, int]) -> list[Mark]:
    """What each site asks for, on edges of the flat graph; sites that stay whole ask for nothing."""
    surgery: Any = gm.surgery
    declared = {name: chain(name, kinds) for name, kinds in surgery.recipe.patterns.items()}
    sites = Sites(captured, declared)
    marks = []
    for edit in surgery.plan.edits:
        site, regularizer = edit.site, surgery.regularizers.get(edit.site.id)
        if site.id not in kept or kept[site.id] == regularizer.full_width:
            continue
        found = [each for each in sites.of(site.pattern, site.edge.partition("[")[0]) if each.id == site.id]
        if not found or found[0].at is None:
            raise SurgeryError(
                f"compress: {site.id} is not found on this example: give example_inputs like those of apply_recipe"
            )
        scale = regularizer.full_width / kept[site.id] if regularizer.normalize else 1.0
        edges = marked_edges(captured.view.graph, found[0].at)
        axis, full = regularizer.channel_axis, regularizer.full_width
        marks.append(Mark(site.id, edges, axis, kept[site.id], full, scale))
    return marks


def _attempts(model: nn.Module, todo: Slices, written: Literals) -> Iterator[Attempt]:
    """Narrow models: one, unless it is open which of the numbers that its forwards read have to change."""

    def made(changes: dict[Attribute, int], exact: bool) -> nn.Module:
        narrow = carried_out(model, todo, exact=exact)
        set_attributes(narrow, changes)
        return narrow

    for changes in written.attempts():
        yield functools.partial(made, changes)


def _told(blocked: Blocked, marks: list[Mark]) -> str:
    """What is in the way, of which sites, and what to do."""
    concerned = [mark for mark in marks if mark.site in blocked.sites] or marks
    shown = ", ".join(f"{mark.site} ({mark.kept} of {mark.full})" for mark in concerned[:3])
    more = f" and {len(concerned) - 3} more" if len(concerned) > 3 else ""
    return (
        f"compress: {blocked.where()} {blocked.reason}. This stands in the way of {shown}{more}: give `widths` as a "
        "mapping that leaves them out, or cut elsewhere. Nothing was changed"
    )
