"""The values of a recipe's `where:` and `expect:`, each parsed once into a frozen value that can be asked.

A parser takes what YAML gives (or its own result) and raises ValueError with what was expected and what came.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from time import monotonic
from typing import Any

import regex

from dropsurgery.errors import RecipeError

from .reading import shown

OPERATORS: dict[str, Callable[[int, int], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
PATHS = ("branch", "shortcut", "trunk")
ROLES = ("backbone", "encoder", "decoder", "skip", "head")
MAX_PATTERN = 200
_MATCH_SECONDS = 0.2
_COMPARISON = re.compile(r"(>=|<=|==|>|<)\s*(\d{1,12})")
_BLOCKS = re.compile(r"(first|last)\s+(\d{1,3}(?:\.\d{1,6})?)\s*%")


@dataclass(frozen=True)
class Comparison:
    """An integer to compare with: `>=64`, or a number alone for equality."""

    operator: str
    bound: int

    def holds(self, value: int | None) -> bool:
        """Whether `value` is known and on the right side of the bound."""
        return value is not None and OPERATORS[self.operator](value, self.bound)

    def __str__(self) -> str:
        return f"{self.operator}{self.bound}"


@dataclass(frozen=True)
class Blocks:
    """Which of the repeated blocks: by index (negative: from the end), or the first or last share of them."""

    indices: tuple[int, ...] = ()
    end: str = ""
    percent: float = 0.0

    def holds(self, block: tuple[int, int] | None) -> bool:
        """Whether (index, count) is chosen; a share is rounded down, but it is one block at least."""
        if block is None:
            return False
        index, count = block
        if not self.end:
            return index in self.indices or index - count in self.indices
        chosen = max(1, int(count * Fraction(str(self.percent)) / 100))
        return index < chosen if self.end == "first" else index >= count - chosen

    def __str__(self) -> str:
        return f"{self.end} {self.percent:g}%" if self.end else str(list(self.indices))


@dataclass(frozen=True)
class PathPattern:
    """A glob on a module's dotted path (`*` crosses dots), or after `re:` a regular expression."""

    text: str

    def holds(self, path: str) -> bool:
        """Whether the whole `path` fits; RecipeError for an expression that does not come to an end."""
        if not self.text.startswith("re:"):
            return fnmatchcase(path, self.text)
        try:
            return regex.fullmatch(self.text[3:], path, timeout=_MATCH_SECONDS) is not None
        except TimeoutError:
            raise RecipeError(f"{self.text!r} takes too long on {shown(path)}; write a simpler expression") from None

    def __str__(self) -> str:
        return self.text


def explodes(patterns: Iterable[PathPattern], seconds: float = 0.3) -> list[PathPattern]:
    """The expressions that do not come to an end (all within `seconds`) on texts of their own letters."""
    deadline = monotonic() + seconds
    return [pattern for pattern in patterns if pattern.text.startswith("re:") and _hangs(pattern.text[3:], deadline)]


def _hangs(expression: str, deadline: float) -> bool:
    letters = dict.fromkeys([*re.findall(r"\w", expression)[:20], "a", "0", ".", "a."])
    try:
        for letter in letters:
            left = max(deadline - monotonic(), 0.001)
            regex.fullmatch(expression, letter * 60 + "\n", timeout=min(left, 0.1))
    except TimeoutError:
        return True
    return False


def parse_whole(value: object) -> tuple[int, ...]:
    """One integer from 0 on, or a list of them."""
    return _each(value, _is_whole, "an integer from 0 on, or a list of them")


def parse_integers(value: object) -> tuple[int, ...]:
    """One integer, or a list of them; negative ones count from the end."""
    return _each(value, _is_integer, "an integer (negative: from the end), or a list of them")


def parse_path(value: object) -> tuple[str, ...]:
    """Where a site lies between fork and join: one of PATHS, or a list of them."""
    return _each(value, lambda item: item in PATHS, _one_of(PATHS))


def parse_role(value: object) -> tuple[str, ...]:
    """Which part of the model a site belongs to: one of ROLES, or a list of them."""
    return _each(value, lambda item: item in ROLES, _one_of(ROLES))


def parse_depth(value: object) -> tuple[float, float]:
    """A range [from, to] within [0, 1], both ends included."""
    pair = list(value) if isinstance(value, list | tuple) else []
    if len(pair) != 2 or not all(_is_number(bound) for bound in pair) or not 0 <= pair[0] <= pair[1] <= 1:
        raise ValueError(f"expected a range [from, to] within [0, 1], got {shown(value)}")
    return float(pair[0]), float(pair[1])


def parse_block(value: object) -> Blocks:
    """`last 50%`, `first 25%`, or indices as parse_integers reads them."""
    if isinstance(value, Blocks):
        return value
    if isinstance(value, str):
        found = _BLOCKS.fullmatch(value.strip())
        if found and 0 < float(found[2]) <= 100:
            return Blocks(end=found[1], percent=float(found[2]))
        raise ValueError(f"expected 'first N%', 'last N%' or indices such as [0, -1], got {shown(value)}")
    return Blocks(indices=parse_integers(value))


def parse_comparison(value: object) -> Comparison:
    """`>=64` (or `<=`, `==`, `>`, `<`), or an integer alone for equality."""
    if isinstance(value, Comparison):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Comparison("==", value)
    found = _COMPARISON.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"expected an integer or a comparison such as '>=64', got {shown(value)}")
    return Comparison(found[1], int(found[2]))


def parse_expect(value: object) -> Comparison:
    """How many sites an entry must hit: a count, a comparison or `any`."""
    if value == "any":
        return Comparison(">=", 0)
    try:
        return parse_comparison(value)
    except ValueError:
        raise ValueError(f"expected a count, a comparison such as '>=1', or 'any', got {shown(value)}") from None


def parse_globs(value: object) -> tuple[PathPattern, ...]:
    """One glob (or `re:` expression) on module paths, or a list of them."""
    items = value if isinstance(value, list | tuple) else (value,)
    if not items:
        raise ValueError("expected a glob such as 'layer4.*', or a list of them, got an empty list")
    return tuple(_pattern(item) for item in items)


def parse_edges(value: object) -> tuple[str, ...]:
    """One `pattern.edge`, or a list of them."""
    return _each(
        value,
        lambda item: isinstance(item, str) and all(item.rpartition(".")),
        "'pattern.edge', such as residual_add.shortcut, or a list of them",
    )


def _pattern(item: object) -> PathPattern:
    if isinstance(item, PathPattern):
        return item
    if not isinstance(item, str) or not item:
        raise ValueError(f"expected a glob such as 'layer4.*' or 're:…', got {shown(item)}")
    if len(item) > MAX_PATTERN:
        raise ValueError(f"a pattern of {len(item)} characters; at most {MAX_PATTERN} are allowed")
    if item.startswith("re:"):
        _compile(item)
    return PathPattern(item)


def _compile(item: str) -> None:
    if re.search(r"\d{4}", item):  # counts this large make the engine itself slow
        raise ValueError(f"{shown(item)} repeats too often; counts have at most three digits")
    try:
        regex.compile(item[3:])
    except (regex.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{shown(item)} is not a regular expression: {error}") from None


def _each(value: object, fits: Callable[[Any], bool], expected: str) -> tuple[Any, ...]:
    items = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not items or not all(fits(item) for item in items):
        raise ValueError(f"expected {expected}, got {shown(value)}")
    return items


def _one_of(words: tuple[str, ...]) -> str:
    return f"one of {', '.join(words)}, or a list of them"


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
