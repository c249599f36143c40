"""How wide the sites of structural dropout are to be: what users write, as a number of units for each site."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers.structural_dropout import StructuralDropout

Width = int | float
Widths = Width | Mapping[str, Width]


def resolve_widths(gm: Any, widths: Widths) -> dict[str, int]:
    """Return how many units each named site of structural dropout is to keep, by site id, in the order of the plan.

    Args:
        gm: a model made by `apply_recipe` from a recipe with structural_dropout.
        widths: an integer, the units that each site keeps; a float above 0 and up to 1, the share of its units that
            each site keeps, to the nearest whole number, 1 at least; or a mapping of site ids, or patterns of them
            (`"layer4.*"`), to either. What a mapping does not name is left out of the result, and stays as wide as it
            is. Where several entries fit a site its own id counts, else the last of them.

    Raises:
        SurgeryError: no such model, no such sites, or a width that a site cannot have; nothing is changed.
    """
    surgery = getattr(gm, "__dict__", {}).get("surgery")
    if surgery is None:
        raise SurgeryError(f"widths: expected a model made by apply_recipe, got {type(gm).__name__}")
    return resolve(structural_sites(surgery.regularizers), widths)


def structural_sites(regularizers: Mapping[str, Any]) -> dict[str, StructuralDropout]:
    """Return the sites of structural dropout among those of a model; a SurgeryError where there is none."""
    found = {site: each for site, each in regularizers.items() if isinstance(each, StructuralDropout)}
    if not found:
        raise SurgeryError(
            f"widths: expected a model with structural_dropout, got one with {len(regularizers)} other sites; apply a "
            "recipe that inserts it (structural_dropout_resnet, _vit, _classifier)"
        )
    return found


def resolve(sites: Mapping[str, StructuralDropout], widths: Widths) -> dict[str, int]:
    """`resolve_widths` for the sites themselves."""
    if not isinstance(widths, Mapping):
        return {site: _units(site, each.full_width, widths) for site, each in sites.items()}
    asked: dict[str, Width] = {}
    for name, width in widths.items():
        asked.update(dict.fromkeys(_named(name, sites), width))
    asked |= {site: widths[site] for site in sites if site in widths}
    return {site: _units(site, each.full_width, asked[site]) for site, each in sites.items() if site in asked}


def _named(name: Any, sites: Mapping[str, StructuralDropout]) -> list[str]:
    """The sites of that id, or that fit a pattern."""
    if name in sites:
        return [name]
    found = [site for site in sites if isinstance(name, str) and fnmatch.fnmatchcase(site, name)]
    if not found:
        near = difflib.get_close_matches(str(name), sites, n=1, cutoff=0.4) or list(sites)[:3]
        raise SurgeryError(
            f"widths: expected ids of structural_dropout's sites, or patterns of them, got {name!r}, which fits none "
            f"of {len(sites)}; did you mean {' or '.join(map(repr, near))}?"
        )
    return found


def _units(site: str, full: int, width: Any) -> int:
    """How many units are the width asked for."""
    if isinstance(width, Integral):
        if not isinstance(width, bool) and 1 <= int(width) <= full:
            return int(width)
    elif isinstance(width, Real) and 0 < float(width) <= 1:
        return max(1, math.floor(float(width) * full + 0.5))
    raise SurgeryError(
        f"widths: expected for {site} an integer from 1 to {full}, its units, or a float above 0 and up to 1, the "
        f"share of them, got {width!r}"
    )
