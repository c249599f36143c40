"""A merged tree of nodes against the models and the catalogue: records out, every problem with its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dropsurgery import catalogue
from dropsurgery.kinds import KINDS
from dropsurgery.matching import chain

from .arguments import ADOPT, check_arguments, mismatch, suggestion
from .models import Entry, Scale, Where
from .reading import Node, Place, Problems, shown
from .selection import PathPattern, explodes

Model = TypeVar("Model", bound=BaseModel)
_NESTED: dict[str, type[BaseModel]] = {"where": Where, "scale": Scale}

_EXPECTED = {
    "string_type": "a text",
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "list_type": "a list",
    "tuple_type": "a list",
    "string_too_short": "a name",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "a name on one line, without blanks around it",
    "greater_than_equal": "a number >= {ge:g}",
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
}


def validate(model: type[Model], node: Node, problems: Problems, *, data: Any = None) -> Model | None:
    """`node` (or `data`, its checked form) as a `model`; None where `problems` tell why not."""
    try:
        return model.model_validate(node.plain() if data is None else data)
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            _explain(model, node, error, problems)
        return None


def _explain(model: type[BaseModel], node: Node, error: ErrorDetails, problems: Problems) -> None:
    path, kind, context = error["loc"], error["type"], error.get("ctx", {})
    parent, found = node.find(path[:-1]), node.find(path)
    if kind == "extra_forbidden":
        owner = _NESTED.get(str(path[0]), model) if len(path) > 1 else model
        place = parent.keys.get(path[-1], found.place)
        problems.add(place, f"no field {shown(path[-1])}; {suggestion(path[-1], _fields(owner))}")
    elif kind == "missing":
        problems.add(parent.place, f"{path[-1]!r} is missing")
    elif kind == "value_error":
        problems.add(found.place, str(context["error"]))
    elif kind == "literal_error":
        problems.add(found.place, mismatch(f"{context['expected']}", error["input"]))
    elif kind in _EXPECTED:
        problems.add(found.place, mismatch(_EXPECTED[kind].format(**context), error["input"]))
    else:
        problems.add(found.place, f"{error['msg']}, got {shown(error['input'])}")


def _fields(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


class EntryChecker:
    """Checks the entries of one recipe; the names that it knows are read once."""

    def __init__(self, chains: Mapping[str, Node], problems: Problems) -> None:
        self.chains, self.problems = chains, problems
        self.patterns = [*catalogue.names("patterns"), *chains]
        self.regularizers = [*catalogue.names("regularizers"), ADOPT]
        for name, kinds in chains.items():
            if name in catalogue.names("patterns"):
                text = f"the catalogue has a pattern {shown(name)} already; choose another name"
                problems.add(kinds.place, text)
            for kind in kinds.value if isinstance(kinds.value, list) else ():
                if isinstance(kind.value, str) and kind.value not in KINDS:
                    text = f"no kind of node {shown(kind.value)}; {suggestion(kind.value, KINDS)}"
                    problems.add(kind.place, text)

    def check(self, node: Node) -> Entry | None:
        """One merged entry as a record, or None where `problems` tell why not."""
        self._check_pattern(node)
        self._check_not_on(node)
        data = node.plain()
        arguments = self._arguments(node)
        if arguments is not None:
            data["with"] = arguments
        entry = validate(Entry, node, self.problems, data=data)
        if entry is not None:
            self._check_rates(entry, node)
        return entry

    def check_expressions(self, entries: list[tuple[Entry, Node]]) -> None:
        """Refuse regular expressions that do not come to an end, within a fixed time for all entries."""
        asked: dict[PathPattern, Place] = {}
        for entry, node in entries:
            for selector in ("module", "exclude"):
                for pattern in getattr(entry.where, selector) or ():
                    asked.setdefault(pattern, node.find(("where", selector)).place)
        for pattern in explodes(asked):
            self.problems.add(asked[pattern], f"{shown(pattern.text)} takes too long; write a simpler expression")

    def _check_pattern(self, node: Node) -> None:
        pattern, insert = (node.value[key].value if key in node.value else None for key in ("pattern", "insert"))
        if pattern is None:
            if insert != ADOPT:
                self.problems.add(node.place, "'pattern' is missing")
            elif "edge" in node.value:
                self.problems.add(node.value["edge"].place, "an edge needs a pattern")
            return
        place = node.value["pattern"].place
        edge = node.value["edge"] if "edge" in node.value else Node(None, place)
        self._check_edge(pattern, edge.value, place, edge.place)

    def _check_not_on(self, node: Node) -> None:
        where = node.value.get("where", Node({}))
        found = where.value.get("not_on", Node([])) if where.is_mapping else Node([])
        for item in found.value if isinstance(found.value, list) else [found]:
            if isinstance(item.value, str) and all(item.value.rpartition(".")):
                pattern, _, edge = item.value.rpartition(".")
                self._check_edge(pattern, edge, item.place, item.place)

    def _check_edge(self, pattern: object, edge: object, place: Place, edge_place: Place) -> None:
        if not isinstance(pattern, str):
            return  # the models say so
        if pattern not in self.patterns:
            self.problems.add(place, f"no pattern {shown(pattern)}; {suggestion(pattern, self.patterns)}")
            return
        edges = self._edges(pattern)
        if isinstance(edge, str) and edges is not None and edge not in edges:
            hint = suggestion(edge, list(edges), "its edges are")
            self.problems.add(edge_place, f"{pattern} has no edge {shown(edge)}; {hint}")

    def _edges(self, pattern: str) -> Iterable[str] | None:
        """The names of a pattern's edges; None for a declared chain that is wrong itself."""
        if pattern not in self.chains:
            return cast(Iterable[str], catalogue.load("patterns", pattern).edges)
        kinds = self.chains[pattern].plain()
        fine = isinstance(kinds, list) and all(isinstance(kind, str) and kind in KINDS for kind in kinds)
        return chain(pattern, kinds).edges if fine and kinds else None

    def _arguments(self, node: Node) -> dict[str, Any] | None:
        insert, given = node.value.get("insert"), node.value.get("with", Node({}, node.place))
        if insert is None or not isinstance(insert.value, str) or not given.is_mapping:
            return None  # the models say so
        if insert.value not in self.regularizers:
            why = catalogue.NO_REGULARIZERS.get(str(insert.value))
            hint = why or suggestion(insert.value, self.regularizers)
            self.problems.add(insert.place, f"no regularizer {shown(insert.value)}; {hint}")
            return None
        return check_arguments(insert.value, given, self.problems)

    def _check_rates(self, entry: Entry, node: Node) -> None:
        for name, value in entry.arguments.items():
            if (name == "p" or name.startswith("p_")) and value is not None and value * entry.scale.largest > 1:
                text = f"{name} = {value:g} times {entry.scale.largest:g} is above 1; lower one of them"
                self.problems.add(node.find(("scale",)).place, text)


def merged(defaults: Node, entry: Node) -> Node:
    """`entry` with what `defaults` add: `where`, `with` and `scale` key by key, everything else as a whole.

    Those under `with` belong to the default regularizer: an entry that inserts another does not get them.
    """
    fields = dict(defaults.value)
    own, default = entry.value.get("insert"), defaults.value.get("insert")
    if own is not None and default is not None and own.value != default.value:
        fields.pop("with", None)
    for key, child in entry.value.items():
        base = fields.get(key)
        if key in ("where", "with", "scale") and base is not None and base.is_mapping and child.is_mapping:
            child = Node({**base.value, **child.value}, child.place, {**base.keys, **child.keys})
        fields[key] = child
    return Node(fields, entry.place, {**defaults.keys, **entry.keys})


def tidied(entry: Node) -> Node:
    """`entry` without what is set to null: that says "not this", also against a default (but for `with`)."""
    fields = {}
    for key, child in entry.value.items():
        if key in ("where", "scale") and child.is_mapping:
            child = replace(child, value={name: fact for name, fact in child.value.items() if fact.value is not None})
        if child.value is not None:
            fields[key] = child
    return replace(entry, value=fields)
