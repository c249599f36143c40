"""Residual joins: additions that bring a branch back to the place where it forked off.

An addition of two equally shaped operands is a residual join if both come from one tensor, the fork (the latest that
both depend on), and a convolution, a linear layer or another operation that mixes positions or channels lies between.
The operand with fewer of them on its longest way from the fork is the shortcut, a projection included (then the one
with fewer weights of any kind, then with fewer poolings); with equally many, both are branches (Shake-Shake).

No joins are: additions of a parameter (positional embeddings); merges that upsample on the way, in a decoder or where
the smaller map is used elsewhere too (FPN, LinkNet); merges of two streams each of which has residual blocks of its
own (HRNet), or of two tensors that a module was given and that have residual blocks between them (NASNet's cells,
TNT); sums of parts of one tensor that was split (Res2Net); sums in which the would-be shortcut takes in something
else than its fork (content and position logits of an attention, gated contexts); sums of two heads.
"""

from __future__ import annotations

import heapq
import operator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from dropsurgery.capture.dataflow import Dataflow, is_within, shape_of

_LAYERS = ("conv", "linear", "conv_transpose")
_MIXING = {operator.matmul, torch.matmul, torch.bmm, torch.einsum, F.scaled_dot_product_attention, "matmul", "bmm"}
# Between these a sum only rescales what it adds to (GRN, a gate without layers).
_POINTWISE = ("norm", "norm_act", "activation", "add", "mul", "identity")

# What lies on a way, counted in one number: layers first, then all that has weights, then poolings.
_LAYER, _WEIGHTED, _POOL = 1 << 40, 1 << 20, 1


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


class _Side(NamedTuple):
    """One operand of an addition: what lies on the ways from the fork to it, and the cost of the dearest of them."""

    inside: set[int]
    cost: int


def find_joins(flow: Dataflow, roles: dict[fx.Node, str]) -> tuple[list[Region], dict[fx.Node, str]]:
    """All residual joins in topological order, and for each other addition the reason why it is none."""
    finder = _Finder(flow, roles)
    refused: dict[fx.Node, str] = {}
    for at, node in enumerate(finder.nodes):
        if flow.kind[node] == "add":
            found = finder.region(at)
            if isinstance(found, str):
                refused[node] = found
            else:
                finder.found.append(found)
                if found.join.shortcut is not None:
                    finder.residual[at] = flow.order[found.join.fork]
    return finder.found, refused


class _Finder:
    """Judges additions in topological order; `residual` are the joins with a shortcut so far, with their forks.

    Nodes are told by their positions in the dataflow: a chain of additions asks for each of them many times.
    """

    def __init__(self, flow: Dataflow, roles: dict[fx.Node, str]) -> None:
        self.flow, self.roles = flow, roles
        self.found: list[Region] = []
        self.residual: dict[int, int] = {}
        self.nodes = list(flow.order)
        order, inputs = flow.order, flow.inputs
        self._sources = [[order[source] for source in inputs[node]] for node in self.nodes]
        self._costs = [self._cost(node) for node in self.nodes]
        self._mixing = {at for at, node in enumerate(self.nodes) if self._mixes(node)}
        self._enlarging = {order[node] for node, kind in flow.kind.items() if kind in ("upsample", "conv_transpose")}

    def region(self, at: int) -> Region | str:
        """The region of a join, or why the addition is none."""
        node = self.nodes[at]
        ends = [operand for operand in node.args[:2] if isinstance(operand, fx.Node)]
        if len(ends) < 2:
            return "add has an operand that is no tensor, or one passed by keyword"
        if not all(end in self.flow.order for end in ends):
            return "add has an operand that does not depend on the input (a parameter or constant)"
        if shape_of(ends[0]) is None or shape_of(ends[0]) != shape_of(ends[1]):
            return f"add has operands of shapes {shape_of(ends[0])} and {shape_of(ends[1])}"
        if self.roles[node] == "head":
            return "add merges two heads, after the map is given up"
        left, right = (self.flow.order[end] for end in ends)
        fork, needed = self._fork(left, right)
        if fork is None or shape_of(self.nodes[fork]) is None:
            return "add has operands that come from no common tensor"
        sides = [self._side(fork, left, needed, 1), self._side(fork, right, needed, 2)]
        return self._objection(at, fork, sides) or self._oriented(node, fork, sides)

    def _fork(self, left: int, right: int) -> tuple[int | None, list[tuple[int, int]]]:
        """The latest node that both depend on, and all later ones in order, with a bit for each side that needs them.

        Nodes are taken latest first, so that only those between fork and join are visited.
        """
        needed = {left: 1}
        needed[right] = needed.get(right, 0) | 2
        queue = [-at for at in needed]
        heapq.heapify(queue)
        taken: list[tuple[int, int]] = []
        while queue:
            at = -heapq.heappop(queue)
            bits = needed[at]
            if bits == 3:
                return at, taken[::-1]
            taken.append((at, bits))
            for source in self._sources[at]:
                before = needed.get(source)
                if before is None:
                    heapq.heappush(queue, -source)
                    needed[source] = bits
                else:
                    needed[source] = before | bits
        return None, taken

    def _side(self, fork: int, end: int, needed: list[tuple[int, int]], bit: int) -> _Side:
        """What lies between the fork and an operand, of the later nodes that the operand needs."""
        far = {fork: 0}
        sources, costs = self._sources, self._costs
        for at, bits in needed:
            if bits != bit:
                continue
            way = -1
            for source in sources[at]:
                ahead = far.get(source, -1)
                if ahead > way:  # many more of these than of all else here: `max` takes twice as long
                    way = ahead
            if way >= 0:
                far[at] = way + costs[at]
        cost = far[end]
        del far[fork]
        return _Side(set(far), cost)

    def _cost(self, node: fx.Node) -> int:
        kind, weighted = self.flow.kind[node], self.flow.weighted(node)
        layer = kind in _LAYERS or (weighted and kind in (None, "rnn", "rnn_cell") and node.op == "call_module")
        return _LAYER * layer + _WEIGHTED * weighted + _POOL * (kind == "pool")

    def _objection(self, at: int, fork: int, sides: list[_Side]) -> str | None:
        """Why operands that come from one fork are no branch and shortcut, whichever is which."""
        below = sides[0].inside | sides[1].inside
        inside = below | {at}
        node = self.nodes[at]
        if not inside.isdisjoint(self._enlarging):
            order, users = self.flow.order, self.flow.users
            closed = all(order[user] in inside for each in below for user in users[self.nodes[each]])
            if not closed or self.roles[node] == "decoder":
                return "add merges different resolutions: an operand is upsampled on its way from the fork"
        if not inside.isdisjoint(self.residual) and len(self._entries(inside, node.meta["owner"])) > 1:
            return "add merges two tensors that its module was given, with residual blocks between them"
        if not sides[0].cost and not sides[1].cost:
            return "add has no weighted operation between its operands and their fork"
        if below.isdisjoint(self._mixing):
            return "add has no convolution, linear layer or pooling between its operands and their fork"
        return None

    def _entries(self, inside: set[int], owner: str) -> set[int]:
        """The tensors from outside of a module that what lies inside of it takes."""
        own = {at for at in inside if self._is_within(at, owner)}
        return {source for at in own for source in self._sources[at] if not self._is_within(source, owner)}

    def _is_within(self, at: int, module: str) -> bool:
        return is_within(self.nodes[at].meta["owner"], module)

    def _mixes(self, node: fx.Node) -> bool:
        kind = self.flow.kind[node]
        if kind in _LAYERS or kind == "pool" or node.target in _MIXING:
            return True
        return node.op == "call_module" and kind not in _POINTWISE

    def _oriented(self, node: fx.Node, fork: int, sides: list[_Side]) -> Region | str:
        """Tell branch from shortcut by cost."""
        costs = [side.cost for side in sides]
        shortcut = costs.index(min(costs)) if costs[0] != costs[1] else None
        # An inner sum from the same fork is one more way only (three branches written as two additions).
        streams = [any(self.residual[at] != fork for at in side.inside & self.residual.keys()) for side in sides]
        if any(streams) if shortcut is None else streams[shortcut]:
            return "add merges two streams that each have residual blocks of their own"
        both, start = [self._nodes_of(side) for side in sides], self.nodes[fork]
        if shortcut is None:
            if not all(any(self.flow.kind[n] in _LAYERS for n in side) for side in both):
                return "add has operands of equal weight, not both with a convolution or linear layer"
            return Region(node, Join(start, (0, 1), None), both[0] | both[1], frozenset())
        straight = sides[shortcut].inside | {fork}
        if not all(source in straight for at in sides[shortcut].inside for source in self._sources[at]):
            return "add has no shortcut: both operands take in something else than their fork"
        return Region(node, Join(start, (1 - shortcut,), shortcut), both[1 - shortcut], both[shortcut])

    def _nodes_of(self, side: _Side) -> frozenset[fx.Node]:
        return frozenset(map(self.nodes.__getitem__, side.inside))
