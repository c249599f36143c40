"""Recipes: YAML → frozen `Recipe`, with every problem at once, each with its line, column and path."""

from __future__ import annotations

from .loading import bundled, load_recipe, recipes_folder
from .models import Entry, Recipe, Scale, Where
from .schema import recipe_schema
from .selection import Blocks, Comparison, PathPattern
from .timing import ScheduleSpec

__all__ = [
    "Blocks",
    "Comparison",
    "Entry",
    "PathPattern",
    "Recipe",
    "Scale",
    "ScheduleSpec",
    "Where",
    "bundled",
    "load_recipe",
    "recipe_schema",
    "recipes_folder",
]
