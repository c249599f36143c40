"""The JSON Schema of recipes, generated from the models that check them: editors complete by it."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

from dropsurgery import catalogue, schedules

from .arguments import ADOPT, adapter, known_arguments
from .models import Entry, RecipeFile

_INSTANT = {
    "anyOf": [
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "string", "pattern": r"^\s*\S+\s+(steps?|epochs?)\s*$"},
    ]
}


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, with every regularizer's own arguments under `with`."""
    schema = RecipeFile.model_json_schema()
    entry = Entry.model_json_schema(ref_template="#/$defs/{model}")
    definitions = entry.pop("$defs")
    definitions["ScheduleSpec"] = _schedule()
    _fill(entry)
    del entry["required"]  # a default may hold what an entry does not say
    definitions["Entry"] = entry
    schema["properties"]["entries"]["items"] = {"$ref": "#/$defs/Entry"}
    schema["properties"]["defaults"] = {"$ref": "#/$defs/Entry"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "$defs": definitions}


def _fill(entry: dict[str, Any]) -> None:
    """Say which names there are, and what each of them allows."""
    patterns, regularizers = catalogue.names("patterns"), [*catalogue.names("regularizers"), ADOPT]
    for field in entry["properties"].values():
        if isinstance(field.get("default"), dict):  # a parsed value, not what a recipe would write
            del field["default"]
    entry["properties"]["insert"]["enum"] = regularizers
    entry["properties"]["pattern"]["examples"] = patterns  # a recipe may declare more of them
    entry["allOf"] = [
        *(_if("insert", name, {"with": _arguments(name)}) for name in regularizers),
        *(_if("pattern", name, {"edge": {"enum": [*_edges(name), None]}}) for name in patterns),
    ]


def _if(key: str, name: str, then: dict[str, Any]) -> dict[str, Any]:
    return {"if": {"properties": {key: {"const": name}}, "required": [key]}, "then": {"properties": then}}


def _edges(pattern: str) -> tuple[str, ...]:
    return tuple(catalogue.load("patterns", pattern).edges)


def _arguments(regularizer: str) -> dict[str, Any]:
    known = known_arguments(regularizer)
    properties = {name: adapter(argument.annotation).json_schema() for name, argument in known.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _schedule() -> dict[str, Any]:
    """A kind alone, a mapping with its kind, or a mapping whose one other key is the kind."""
    span = {"begin": _INSTANT, "end": _INSTANT}
    forms: list[dict[str, Any]] = [{"enum": schedules.names()}]
    for kind in schedules.names():
        options = schedules.options(kind)
        hints = get_type_hints(getattr(schedules, kind), include_extras=True)
        properties = {word: adapter(hints[option.name]).json_schema() for word, option in options.items()}
        required = [word for word, option in options.items() if option.default is inspect.Parameter.empty]
        forms.append(_closed({"kind": {"const": kind}, **properties, **span}, ["kind", *required]))
        if options:
            first = next(iter(properties.values()))
            forms.append(_closed({kind: {"anyOf": [first, _closed(properties, required)]}, **span}, [kind]))
    return {"anyOf": forms}


def _closed(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
