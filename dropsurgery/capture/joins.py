"""Residual joins: additions that bring a branch back to the place where it forked off.

An addition of two equally shaped operands is a residual join if both come from one tensor, the fork (the latest that
both depend on), and weighted operations lie between. The operand with fewer weighted operations on its longest way
from the fork is the shortcut, a projection included; with equally many, both are branches (Shake-Shake).

No joins are: additions of a parameter (positional embeddings); merges that upsample on the way, in a decoder or where
the smaller map is used elsewhere too (FPN, LinkNet); merges of two streams each of which has residual blocks of its
own (HRNet); sums of parts of one tensor that was split (Res2Net); sums of two heads.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from torch import fx

from dropsurgery.capture.dataflow import Dataflow, shape_of
from dropsurgery.kinds import kind_of

_MIXING = ("conv", "linear", "conv_transpose")


@dataclass(frozen=True)
class Join:
    """A residual addition: where it forked, and the positions in `args` of its branches and of its shortcut."""

    fork: fx.Node
    branches: tuple[int, ...]
    shortcut: int | None


@dataclass(frozen=True)
class Region:
    """What lies between a join and its fork, both left out."""

    node: fx.Node
    join: Join
    branch: frozenset[fx.Node]
    shortcut: frozenset[fx.Node]


def find_joins(flow: Dataflow, roles: dict[fx.Node, str]) -> tuple[list[Region], dict[fx.Node, str]]:
    """All residual joins in topological order, and for each other addition the reason why it is none."""
    finder = _Finder(flow, roles)
    refused: dict[fx.Node, str] = {}
    for node in flow.order:
        if kind_of(node) == "add":
            found = finder.region(node)
            if isinstance(found, str):
                refused[node] = found
            else:
                finder.found.append(found)
                if found.join.shortcut is not None:
                    finder.residual[node] = found.join.fork
    return finder.found, refused


class _Finder:
    """Judges additions in topological order; `residual` are the joins with a shortcut so far, with their forks."""

    def __init__(self, flow: Dataflow, roles: dict[fx.Node, str]) -> None:
        self.flow, self.roles = flow, roles
        self.found: list[Region] = []
        self.residual: dict[fx.Node, fx.Node] = {}

    def region(self, node: fx.Node) -> Region | str:
        """The region of a join, or why the addition is none."""
        ends = [operand for operand in node.args[:2] if isinstance(operand, fx.Node)]
        if len(ends) < 2:
            return "add has an operand that is no tensor, or one passed by keyword"
        if not all(end in self.flow.order for end in ends):
            return "add has an operand that does not depend on the input (a parameter or constant)"
        if shape_of(ends[0]) is None or shape_of(ends[0]) != shape_of(ends[1]):
            return f"add has operands of shapes {shape_of(ends[0])} and {shape_of(ends[1])}"
        if self.roles[node] == "head":
            return "add merges two heads, after the map is given up"
        fork, needed = _fork(self.flow, ends[0], ends[1])
        if fork is None or shape_of(fork) is None:
            return "add has operands that come from no common tensor"
        ways = [
            _distances(self.flow, fork, end, [n for n in needed if needed[n] & bit])
            for end, bit in zip(ends, (1, 2), strict=True)
        ]
        sides = [frozenset(way) - {fork} for way in ways]
        if self._merges_resolutions(node, sides):
            return "add merges different resolutions: an operand is upsampled on its way from the fork"
        # An inner sum from the same fork is one more way only (three branches written as two additions).
        streams = [any(self.residual.get(n, fork) is not fork for n in side) for side in sides]
        return _oriented(node, fork, sides, [way[end] for way, end in zip(ways, ends, strict=True)], streams)

    def _merges_resolutions(self, node: fx.Node, sides: list[frozenset[fx.Node]]) -> bool:
        inside = sides[0] | sides[1] | {node}
        if not any(kind_of(n) in ("upsample", "conv_transpose") for n in inside):
            return False
        closed = all(user in inside for side in sides for n in side for user in self.flow.users[n])
        return not closed or self.roles[node] == "decoder"


def _oriented(
    node: fx.Node, fork: fx.Node, sides: list[frozenset[fx.Node]], weights: list[int], streams: list[bool]
) -> Region | str:
    """Tell branch from shortcut by `weights`; `streams` says which side has residual blocks of its own."""
    if not any(weights):
        return "add has no weighted operation between its operands and their fork"
    shortcut = weights.index(min(weights)) if weights[0] != weights[1] else None
    if any(streams) if shortcut is None else streams[shortcut]:
        return "add merges two streams that each have residual blocks of their own"
    if shortcut is not None:
        return Region(node, Join(fork, (1 - shortcut,), shortcut), sides[1 - shortcut], sides[shortcut])
    if not all(any(kind_of(n) in _MIXING for n in side) for side in sides):
        return "add has operands of equal weight, not both with a convolution or linear layer"
    return Region(node, Join(fork, (0, 1), None), sides[0] | sides[1], frozenset())


def _fork(flow: Dataflow, left: fx.Node, right: fx.Node) -> tuple[fx.Node | None, dict[fx.Node, int]]:
    """The latest node that both depend on, and all later ones with a bit for each side that needs them.

    Nodes are taken latest first, so that only those between fork and join are visited.
    """
    needed = {left: 1}
    needed[right] = needed.get(right, 0) | 2
    queue = [(-flow.order[node], node.name, node) for node in needed]
    heapq.heapify(queue)
    while queue:
        _, _, node = heapq.heappop(queue)
        if needed[node] == 3:
            return node, needed
        for source in flow.inputs[node]:
            if source not in needed:
                heapq.heappush(queue, (-flow.order[source], source.name, source))
            needed[source] = needed.get(source, 0) | needed[node]
    return None, needed


def _distances(flow: Dataflow, fork: fx.Node, end: fx.Node, nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """For each node on a way from fork to `end`: how many weighted operations its longest way has."""
    far = {fork: 0}
    for node in sorted(nodes, key=flow.order.__getitem__):
        ways = [far[source] for source in flow.inputs[node] if source in far]
        if node is not fork and ways and flow.order[node] <= flow.order[end]:
            far[node] = max(ways) + flow.weighted(node)
    return far
