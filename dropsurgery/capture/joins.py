"""Residual joins: additions that bring a branch back to the place where it forked off.

An addition of two equally shaped operands is a residual join if both come from one tensor, the fork (the latest that
both depend on), and weighted operations lie between. The operand with fewer weighted operations on its longest way
from the fork is the shortcut, a projection included; with equally many, both are branches (Shake-Shake).

No joins are: additions of a parameter (positional embeddings), merges that upsample on the way (FPN, LinkNet), merges
of two streams each of which has residual blocks of its own (HRNet), sums of differently sliced halves of one tensor.
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


def find_joins(flow: Dataflow) -> tuple[list[Region], dict[fx.Node, str]]:
    """All residual joins in topological order, and for each other addition the reason why it is none."""
    regions: list[Region] = []
    refused: dict[fx.Node, str] = {}
    residual: set[fx.Node] = set()
    for node in flow.order:
        if kind_of(node) != "add":
            continue
        found = _region(flow, node, residual)
        if isinstance(found, str):
            refused[node] = found
        else:
            regions.append(found)
            if found.join.shortcut is not None:
                residual.add(node)
    return regions, refused


def _region(flow: Dataflow, node: fx.Node, residual: set[fx.Node]) -> Region | str:
    operands = node.args[:2]
    if len(operands) < 2 or not all(isinstance(operand, fx.Node) for operand in operands):
        return "add has an operand that is no tensor in its positional arguments"
    left, right = operands
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if left not in flow.order or right not in flow.order:
        return "add has an operand that does not depend on the input (a parameter or constant)"
    if shape_of(left) is None or shape_of(left) != shape_of(right):
        return f"add has operands of shapes {shape_of(left)} and {shape_of(right)}"
    fork, reach = _fork(flow, left, right)
    if fork is None or shape_of(fork) is None:
        return "add has operands that come from no common tensor"
    sides = tuple(_distances(flow, fork, end, [n for n in reach if reach[n] & bit]) for end, bit in ((left, 1), (right, 2)))
    return _judge(flow, node, fork, sides, residual)


def _judge(
    flow: Dataflow, node: fx.Node, fork: fx.Node, sides: tuple[dict[fx.Node, int], ...], residual: set[fx.Node]
) -> Region | str:
    """`sides` holds, per operand, the nodes from the fork (included) to it with their weighted distance."""
    weights = [side[operand] for side, operand in zip(sides, node.args[:2], strict=True)]  # type: ignore[index]
    inner = [frozenset(side) - {fork} for side in sides]
    if not any(weights):
        return "add has no weighted operation between its operands and their fork"
    if any(kind_of(n) in ("upsample", "conv_transpose") for side in inner for n in side):
        return "add merges different resolutions: an operand is upsampled on its way from the fork"
    equal = weights[0] == weights[1]
    lesser = int(weights[1] < weights[0])
    if inner[lesser] & residual or (equal and inner[1] & residual):
        return "add merges two streams that each have residual blocks of their own"
    if equal:
        if not all(any(kind_of(n) in _MIXING for n in side) for side in inner):
            return "add has operands of equal weight, not both with a convolution or linear layer"
        return Region(node, Join(fork, (0, 1), None), inner[0] | inner[1], frozenset())
    return Region(node, Join(fork, (1 - lesser,), lesser), inner[1 - lesser], inner[lesser])


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
