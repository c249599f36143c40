"""YAML or plain data → `Node` trees that know where each value was written; nothing of it is ever executed.

The parser's events are walked here, in one place, with every limit: size, depth, number of values (aliases
count each time they are used), duplicate keys, tags, non-finite numbers and control characters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from dropsurgery.errors import RecipeError

MAX_BYTES = 64 * 1024  # of one load, its includes counted; the longest bundled recipe has 2 kB
MAX_VALUES = 2_000
MAX_DEPTH = 16
MAX_TEXT = 2_000

# Controls but tab and newline, surrogates, byte order marks, line separators, overrides of the direction.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass(frozen=True)
class Place:
    """Where something is written: file, line and column (from 1; 0 if unknown), path inside the recipe."""

    source: str = ""
    path: str = ""
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        position = f"{self.source}:{self.line}:{self.column}" if self.line else self.source
        return " ".join(filter(None, (position, self.path)))

    def line_about(self, text: str) -> str:
        """`dropblock.yaml:9:12 entries[0].with.p: text`."""
        return f"{self}: {text}" if str(self) else text

    def inside(self, key: str | int, *, in_list: bool = False) -> Place:
        """The place of the child `key`, at the parent's line and column until its own are known."""
        child = f"[{key}]" if in_list else f".{key}" if self.path else str(key)
        return Place(self.source, self.path + child, self.line, self.column)


@dataclass(frozen=True)
class Node:
    """A value with its place: a scalar, a list or a dict of nodes (`keys` holds the keys' places)."""

    value: Any
    place: Place = field(default_factory=Place)
    keys: Mapping[str | int, Place] = field(default_factory=dict)

    @property
    def is_mapping(self) -> bool:
        """Whether this node has named children."""
        return isinstance(self.value, dict)

    def plain(self) -> Any:
        """The value without places: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def find(self, path: tuple[str | int, ...]) -> Node:
        """The node at `path`, or the deepest one on the way that exists."""
        node = self
        for key in path:
            known = range(len(node.value)) if isinstance(node.value, list) else node.value
            if not isinstance(known, dict | range) or key not in known:
                break
            node = node.value[key]
        return node


class Problems:
    """Everything that is wrong with a recipe, gathered so that its author reads all of it at once."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, place: Place, text: str) -> None:
        """Note that `text` is wrong at `place`; the same line twice counts once."""
        self._lines[place.line_about(text)] = None

    def check(self) -> None:
        """Raise one RecipeError with all problems, if there are any."""
        if not self._lines:
            return
        lines = tuple(self._lines)
        title = f"the recipe has {len(lines)} problems:\n  " if len(lines) > 1 else ""
        raise RecipeError(title + "\n  ".join(lines), lines)


@dataclass
class Budget:
    """What one load may still read, its includes counted, so that a small recipe cannot become a big one."""

    bytes: int = MAX_BYTES
    values: int = MAX_VALUES

    def spend(self, place: Place) -> None:
        """Count one value; RecipeError when there are too many of them."""
        self.values -= 1
        if self.values < 0:
            refuse(place, f"a recipe has at most {MAX_VALUES} values, aliases and includes counted each time")


def refuse(place: Place, text: str) -> NoReturn:
    """Give up at once: reading on would be unsafe or senseless."""
    raise RecipeError(place.line_about(text))


def read_yaml(content: bytes, place: Place, problems: Problems, budget: Budget) -> Node:
    """The one document in `content` (UTF-8, YAML 1.2) as a tree whose places start from `place`."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{place}: expected YAML text in UTF-8, got other bytes at {error.start}") from None
    _check_nesting(text, place)
    return _Builder(text, place, problems, budget).document()


def read_plain(value: Any, place: Place, problems: Problems, budget: Budget, depth: int = 0) -> Node:
    """A recipe given in Python as a tree: dicts, lists or tuples, texts, numbers, booleans and None only."""
    budget.spend(place)
    if depth > MAX_DEPTH:
        refuse(place, f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        children = {}
        for key, child in value.items():
            if isinstance(key, bool) or not isinstance(key, str | int):
                problems.add(place, f"expected a text or an integer as key, got {shown(key)}")
                continue
            _check_text(key, place, problems)
            children[key] = read_plain(child, place.inside(key), problems, budget, depth + 1)
        return Node(children, place)
    if isinstance(value, list | tuple):
        items = [
            read_plain(child, place.inside(index, in_list=True), problems, budget, depth + 1)
            for index, child in enumerate(value)
        ]
        return Node(items, place)
    if not isinstance(value, str | int | float | None):
        problems.add(place, f"expected plain data (text, number, list, mapping), got {type(value).__name__}")
        return Node(None, place)
    _check_text(value, place, problems)
    if isinstance(value, float) and not math.isfinite(value):
        problems.add(place, f"expected a finite number, got {value}")
        return Node(None, place)
    if isinstance(value, int) and abs(value) >= 2**63:
        problems.add(place, "this number is too long")
        return Node(None, place)
    return Node(value, place)


def shown(value: object) -> str:
    """`value` for a message: escaped, on one line and short."""
    text = repr(value) if isinstance(value, str | int | float | bool | list | dict | None) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _check_nesting(text: str, place: Place) -> None:
    """A bound that is cheap and far too high: the parser's work grows with the square of open brackets."""
    depth = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > 16 * MAX_DEPTH:
            refuse(place, f"nested more than {MAX_DEPTH} deep")


def _check_text(value: object, place: Place, problems: Problems) -> None:
    if not isinstance(value, str):
        return
    if len(value) > MAX_TEXT:
        refuse(place, f"a text of {len(value)} characters; at most {MAX_TEXT} are allowed")
    if found := _UNPRINTABLE.search(value):
        refuse(place, f"the text holds a control character ({found[0]!a}); remove it")


class _Builder:
    """Walks the parser's events once, from the top down."""

    def __init__(self, text: str, place: Place, problems: Problems, budget: Budget) -> None:
        self.place, self.problems, self.budget = place, problems, budget
        self.anchors: dict[str, Node] = {}
        self.events: Iterator[Event] = YAML(typ="safe", pure=True).parse(text)

    def document(self) -> Node:
        self.next()  # the stream's start
        if isinstance(self.next(), StreamEndEvent):
            refuse(self.place, "the recipe is empty")
        root = self.node(self.next(), self.place, 0)
        self.next()  # the document's end
        if isinstance(again := self.next(), DocumentStartEvent):
            refuse(self.mark(again, self.place), "a recipe is one YAML document; remove what follows '---'")
        return root

    def next(self) -> Any:
        try:
            return next(self.events)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = self.at(mark, self.place) if mark else self.place
            told = " ".join(filter(None, (error.context, error.problem)))
        except Exception as error:  # on text that is no YAML at all the parser fails in many ways
            place, told = self.place, str(error).partition("\n")[0]
        raise RecipeError(f"{place}: not valid YAML: {told[:200]!a}")

    def mark(self, event: Any, place: Place) -> Place:
        return self.at(event.start_mark, place)

    def at(self, mark: Any, place: Place) -> Place:
        if self.place.path:  # a value of an override: its lines are of no interest
            return place
        return Place(place.source, place.path, mark.line + 1, mark.column + 1)

    def node(self, event: Any, place: Place, depth: int) -> Node:
        place = self.mark(event, place)
        self.budget.spend(place)
        if depth > MAX_DEPTH:
            refuse(place, f"nested more than {MAX_DEPTH} deep")
        if isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                refuse(place, f"alias {shown(event.anchor)} has no anchor before it")
            return self.moved(self.anchors[event.anchor], place, depth)
        if event.tag is not None:
            refuse(place, f"a recipe holds no YAML tags, got {str(event.tag)[:60]!a}; remove the tag")
        if isinstance(event, MappingStartEvent):
            node = self.mapping(place, depth)
        elif isinstance(event, SequenceStartEvent):
            node = self.sequence(place, depth)
        else:
            node = Node(self.scalar(event, place), place)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def mapping(self, place: Place, depth: int) -> Node:
        children: dict[str | int, Node] = {}
        keys: dict[str | int, Place] = {}
        while not isinstance(event := self.next(), MappingEndEvent):
            at = self.mark(event, place)
            if not isinstance(event, ScalarEvent) or event.tag is not None:
                refuse(at, "a key must be a word or an integer")
            key = self.scalar(event, at)
            if isinstance(key, bool) or not isinstance(key, str | int):
                refuse(at, f"expected a word or an integer as key, got {shown(key)}")
            if key in children:
                self.problems.add(at, f"the key {shown(key)} is there twice (first at line {keys[key].line})")
            keys[key] = self.mark(event, place.inside(key))
            children[key] = self.node(self.next(), place.inside(key), depth + 1)
        return Node(children, place, keys)

    def sequence(self, place: Place, depth: int) -> Node:
        items: list[Node] = []
        while not isinstance(event := self.next(), SequenceEndEvent):
            items.append(self.node(event, place.inside(len(items), in_list=True), depth + 1))
        return Node(items, place)

    def scalar(self, event: ScalarEvent, place: Place) -> Any:
        text: str = event.value
        _check_text(text, place, self.problems)
        if not event.implicit[0]:  # quoted or a block: always a text
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _NOT_FINITE.fullmatch(text) or (_NUMBER.fullmatch(text) and not math.isfinite(float(text))):
            self.problems.add(place, f"expected a finite number, got {shown(text)}")
            return None
        if _INTEGER.fullmatch(text):
            if len(text) > 18:
                refuse(place, f"this number is too long: {shown(text)}")
            return int(text, 0 if text[:2] in ("0o", "0x") else 10)
        return float(text) if _NUMBER.fullmatch(text) else text

    def moved(self, node: Node, place: Place, depth: int) -> Node:
        """What an alias stands for: the anchor's lines under the alias's path."""
        self.budget.spend(place)
        if depth > MAX_DEPTH:
            refuse(place, f"nested more than {MAX_DEPTH} deep")
        here = replace(node.place, path=place.path)
        value = node.value
        if isinstance(value, dict):
            value = {key: self.moved(child, here.inside(key), depth + 1) for key, child in value.items()}
        elif isinstance(value, list):
            value = [
                self.moved(child, here.inside(index, in_list=True), depth + 1) for index, child in enumerate(value)
            ]
        return Node(value, here, node.keys)
