"""Surgery on existing networks: match patterns in a model's graph, insert regularizers, strip them again.

>>> gm = apply_recipe(model, "dropblock_resnet_g34.yaml", total_steps=10_000)
"""

from __future__ import annotations

from dropsurgery.api import apply_recipe, find_sites, get_regularizer, plan_recipe
from dropsurgery.diffing import diff
from dropsurgery.errors import CaptureError, PlanError, RecipeError, SurgeryError, SurgeryWarning
from dropsurgery.recipe import load_recipe
from dropsurgery.rewriting import strip

__all__ = [
    "CaptureError",
    "PlanError",
    "RecipeError",
    "SurgeryError",
    "SurgeryWarning",
    "apply_recipe",
    "diff",
    "find_sites",
    "get_regularizer",
    "load_recipe",
    "plan_recipe",
    "strip",
]
