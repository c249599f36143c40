"""Surgery on existing networks: match patterns in a model's graph, insert regularizers, strip them again.

>>> gm = apply_recipe(model, "dropblock_resnet_g34.yaml", total_steps=10_000)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dropsurgery.errors import CaptureError, PlanError, RecipeError, SurgeryError, SurgeryWarning

if TYPE_CHECKING:
    from dropsurgery.analysis.width_curve import width_curve
    from dropsurgery.api import apply_recipe, find_sites, get_regularizer, plan_recipe
    from dropsurgery.compression import compress
    from dropsurgery.diffing import diff
    from dropsurgery.recipe import load_recipe
    from dropsurgery.rewriting import strip

__all__ = [
    "CaptureError",
    "PlanError",
    "RecipeError",
    "SurgeryError",
    "SurgeryWarning",
    "apply_recipe",
    "compress",
    "diff",
    "find_sites",
    "get_regularizer",
    "load_recipe",
    "plan_recipe",
    "strip",
    "width_curve",
]

# Imported when first asked for: what needs no torch (`dropsurgery --help`) does not wait for it.
_HOMES = {
    "apply_recipe": "api",
    "compress": "compression",
    "diff": "diffing",
    "find_sites": "api",
    "get_regularizer": "api",
    "load_recipe": "recipe",
    "plan_recipe": "api",
    "strip": "rewriting",
    "width_curve": "analysis.width_curve",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
