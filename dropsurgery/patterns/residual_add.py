"""branch + shortcut, where both come from one fork; `dropsurgery.capture.joins` tells them apart."""

from __future__ import annotations

from dropsurgery.matching import After, Match, Miss, Pattern, ops
from dropsurgery.records import Edge


def _is_join(match: Match) -> str | None:
    meta = match.nodes["add"].meta
    return None if "join" in meta else meta["no_join"]


def _branch(match: Match) -> tuple[Edge, ...]:
    add = match.nodes["add"]
    return tuple(Edge(add, operand) for operand in add.meta["join"].branches)


def _shortcut(match: Match) -> tuple[Edge, ...] | Miss:
    add = match.nodes["add"]
    operand = add.meta["join"].shortcut
    if operand is None:
        return Miss("both operands carry the same computation: two branches and no shortcut", add)
    return (Edge(add, operand),)


PATTERN = Pattern(
    "residual_add",
    forms=[ops(add="add")],
    edges={"branch": _branch, "shortcut": _shortcut, "output": After("add")},
    check=_is_join,
)
