"""What must be cut where: from the sites' own cuts to every tensor that goes with them, back and forth.

A layer whose output is cut loses rows, one whose input is cut loses columns, and there the spreading ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from dropsurgery.capture import Level
from dropsurgery.capture.dataflow import shape_of
from dropsurgery.capture.view import FlatView
from dropsurgery.compression.relations import Cut, Stuck
from dropsurgery.compression.rules import Rule, rule_of, users_of
from dropsurgery.errors import SurgeryError
from dropsurgery.matching import called
from dropsurgery.records import Edge


class Blocked(Exception):
    """A cut cannot pass a node: which, why, and the sites whose cut it is."""

    def __init__(self, node: fx.Node, reason: str, sites: frozenset[str] = frozenset()) -> None:
        super().__init__(reason)
        self.node, self.reason, self.sites = node, reason, sites

    def where(self) -> str:
        """The node in words."""
        path, owner = self.node.meta.get("path", ""), self.node.meta.get("owner", "")
        word = called(self.node)
        if self.node.op == "output":
            return word
        if self.node.op in ("placeholder", "get_attr"):
            return f"'{path or self.node.target}'"
        if self.node.op == "call_module":
            return f"{word} '{path}'"
        return f"{word} in " + (f"'{owner}'" if owner else "the model's own forward")


@dataclass(frozen=True)
class Mark:
    """One site's wish: of the `full` units on an axis the first `kept`, which its mask multiplies by `scale`."""

    site: str
    edges: tuple[Edge, ...]
    axis: int
    kept: int
    full: int
    scale: float

    def cut(self, source: fx.Node) -> Cut:
        """Its cut of the tensor that travels there; a second column holds the factor."""
        shape = shape_of(source)
        if shape is None:
            raise Blocked(source, "gives what is no single tensor", frozenset({self.site}))
        axis = self.axis % len(shape)
        if shape[axis] != self.full:
            raise SurgeryError(
                f"compress: expected {self.full} units at {self.site}, as when the recipe was applied, got "
                f"{shape[axis]}: give example_inputs of the size that it was applied with"
            )
        gone = (torch.arange(self.full) >= self.kept).to(torch.float64)
        return Cut(axis, torch.stack([gone, torch.full_like(gone, self.scale)], 1))


class Flow:
    """The flat graph as cuts see it; rules are asked for once."""

    def __init__(self, view: FlatView) -> None:
        self.graph = view.graph
        self._rules: dict[fx.Node, Rule] = {}
        self.escaping = _escaping(view)

    def rule(self, node: fx.Node, sites: frozenset[str] = frozenset()) -> Rule:
        """The rule of a node that the sites' cut has come to.

        Raises:
            Blocked: it has none.
        """
        if node not in self._rules:
            try:
                self._rules[node] = rule_of(node)
            except Stuck as stuck:
                raise Blocked(node, str(stuck), sites) from None
        return self._rules[node]


def _escaping(view: FlatView) -> set[fx.Node]:
    """The nodes whose value goes on in a forward that stays Python."""
    results = {node for each in view.opaque for part in each.components for node in _results(part.call)}
    return {node for node in view.graph.nodes if node.meta.get("level_node") in results} if results else set()


def _results(call: object) -> set[fx.Node]:
    """The nodes of recorded levels that give what a call gives."""
    if not isinstance(call, Level):
        return set()
    found: set[fx.Node] = set()
    for node in call.graph.output_node().all_input_nodes:
        child = call.children.get(node)
        found |= _results(child) if isinstance(child, Level) else set()
        found.add(node)
    return found


@dataclass
class Spread:
    """Every tensor that is cut: where, and by which sites."""

    cuts: dict[fx.Node, Cut]
    sites: dict[fx.Node, frozenset[str]]


def spread(flow: Flow, marks: list[Mark]) -> Spread:
    """Carry the sites' cuts to all tensors that have to be cut with them.

    Raises:
        Blocked: one cannot be cut.
    """
    made = Spread({}, defaultdict(frozenset))
    waiting: list[fx.Node] = []

    def demand(node: fx.Node, cut: Cut | None, sites: frozenset[str]) -> None:
        if cut is None or not bool(cut.gone.any()):
            return
        if _demanded(made, node, Cut(cut.axis, cut.table[:, :1]), sites):
            _refuse(flow, node, made.sites[node])
            waiting.append(node)

    for mark in marks:
        for edge in mark.edges:
            demand(edge.source, mark.cut(edge.source), frozenset({mark.site}))
    while waiting:
        node = waiting.pop()
        sites = made.sites[node]
        for operand in flow.rule(node, sites).operands:
            demand(operand.source, _passed(node, operand.relation.up, made.cuts[node], sites), sites)
        for user in users_of(node):
            for operand in flow.rule(user, sites).operands:
                if operand.source is node:
                    demand(user, _passed(user, operand.relation.down, made.cuts[node], sites), sites)
    return made


def _demanded(made: Spread, node: fx.Node, cut: Cut, sites: frozenset[str]) -> bool:
    """Note what is asked of a tensor; gives whether that is news."""
    before = made.cuts.get(node)
    made.sites[node] = made.sites[node] | sites
    if before is None:
        made.cuts[node] = cut
        return True
    if before.axis != cut.axis:
        raise Blocked(node, "would have to be cut on two of its axes", made.sites[node])
    merged = torch.maximum(before.table, cut.table)
    made.cuts[node] = Cut(cut.axis, merged)
    return not torch.equal(merged, before.table)


def _refuse(flow: Flow, node: fx.Node, sites: frozenset[str]) -> None:
    """Refuse tensors that no weight of the model makes as wide as they are, or that others hold."""
    if node.op == "placeholder":
        raise Blocked(node, "is an input of the model, or of a part that stays Python", sites)
    if node in flow.escaping or not node.users:
        raise Blocked(node, "gives its result to a part that stays Python, of which no graph tells what it does", sites)


def _passed(node: fx.Node, way: Callable[[Cut], Cut | None], cut: Cut, sites: frozenset[str]) -> Cut | None:
    try:
        passed = way(cut)
    except Stuck as stuck:
        raise Blocked(node, str(stuck), sites) from None
    if passed is not None and bool(passed.gone.all()):
        raise Blocked(node, "would keep nothing of one of its operands", sites)
    return passed
