"""What is under `with:`, checked against a regularizer's constructor: its annotations are the only truth."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from math import isfinite
from typing import Annotated, Any, Literal

import annotated_types
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from dropsurgery import catalogue

from .reading import Node, Problems, shown

ADOPT = "adopt"  # takes over the stochastic layers that a model already has; no regularizer of its own
_ADOPT_ARGUMENTS = {
    "p": catalogue.Argument(Annotated[float, annotated_types.Ge(0), annotated_types.Le(1)], default=None)
}
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?\s*")
_WORDS: dict[Any, str] = {
    float: "a number",
    int: "an integer",
    str: "a text",
    bool: "true or false",
    type(None): "nothing (null)",
}


def known_arguments(regularizer: str) -> dict[str, catalogue.Argument]:
    """The arguments of a regularizer in the catalogue, or of `adopt`, by name."""
    if regularizer == ADOPT:
        return _ADOPT_ARGUMENTS
    return catalogue.arguments(catalogue.load("regularizers", regularizer))


def check_arguments(regularizer: str, given: Node, problems: Problems, *, complete: bool = True) -> dict[str, Any]:
    """The arguments in the types of their annotations (a list becomes the tuple that is asked for).

    What is wrong goes to `problems`; `complete` asks for those without a default too.
    """
    known = known_arguments(regularizer)
    checked = {}
    for name, child in given.value.items():
        if name not in known:
            hint = suggestion(name, known, "its arguments are")
            place = given.keys.get(name, child.place)
            problems.add(place, f"{regularizer} has no argument {shown(name)}; {hint}")
            continue
        value, annotation = child.plain(), known[name].annotation
        try:
            checked[name] = adapter(annotation).validate_json(json.dumps(value))
        except ValidationError as error:
            culprit = child.find(tuple(error.errors()[0]["loc"]))
            problems.add(culprit.place, mismatch(describe(annotation), value))
    missing = [name for name, argument in known.items() if argument.required and name not in given.value]
    if missing and complete:
        problems.add(given.place, f"{regularizer} needs {' and '.join(map(repr, missing))}")
    return checked


def adapter(annotation: Any) -> TypeAdapter[Any]:
    """A strict reader of one argument: no text is taken for a number."""
    try:
        return TypeAdapter(annotation, config=ConfigDict(strict=True))
    except PydanticUserError:  # the type brings a configuration of its own
        return TypeAdapter(annotation)


def mismatch(expected: str, value: object) -> str:
    """`expected …, got …`, with the remedy where a number was written as text."""
    numeric = "a number" in expected or "an integer" in expected
    if numeric and isinstance(value, str) and _NUMBER.fullmatch(value) and isfinite(number := float(value)):
        return f"got the text {json.dumps(value)}; write {int(number) if number.is_integer() else number}"
    return f"expected {expected}, got {shown(value)}"


def suggestion(word: object, known: Iterable[str], otherwise: str = "there are") -> str:
    """`did you mean 'x'?`, or all there is when nothing comes near."""
    names = sorted(known)
    near = get_close_matches(str(word)[:100], names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise}: {', '.join(names) or 'none'}"


def describe(annotation: Any) -> str:
    """An annotation in words: `a number in [0, 1]`, `one of 'paper', 'exact'`."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return describe(parts[0]) + _bounds(parts[1:])
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}" if len(parts) > 1 else repr(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(part) for part in parts))
    if origin is tuple and parts and parts[-1] is not Ellipsis:
        return f"a list of {len(parts)}: {', '.join(describe(part) for part in parts)}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each {describe(parts[0])}"
    if isinstance(origin, type) and issubclass(origin, dict):
        return "a mapping"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(metadata: tuple[Any, ...]) -> str:
    """The limits of an annotation: ` in [0, 1]`, ` >= 1`."""
    low, high = _limit(metadata, "ge", "gt"), _limit(metadata, "le", "lt")
    if low and high:
        left, right = ("[" if low[0] == "ge" else "("), ("]" if high[0] == "le" else ")")
        return f" in {left}{low[1]:g}, {high[1]:g}{right}"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return "".join(f" {signs[name]} {value:g}" for name, value in filter(None, (low, high)))


def _limit(metadata: tuple[Any, ...], *names: str) -> tuple[str, Any] | None:
    found = [(name, getattr(item, name)) for item in metadata for name in names if hasattr(item, name)]
    return found[0] if found else None
