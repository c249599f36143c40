"""A decision node of a soft tree, a hierarchical mixture of experts: g * left + (1 - g) * right, g = sigmoid(w x + b).

The gate is the sigmoid of a linear layer with one output; it is multiplied with one subtree, what it leaves of 1 with
the other, and both products are added. Left is the one that g is multiplied with. A subtree is an expert or another
node. Trees that compute the gates of several nodes at once, or in logarithms, do not show single nodes and are none.

`gate` is behind the sigmoid, so that g and 1 - g both see what goes there; `left` and `right` are what the subtrees
give, `output` their mixture.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from dropsurgery.kinds import data_inputs, kind_of, skip, tensor_users
from dropsurgery.matching import After, Match, Miss, Pattern, called, ops
from dropsurgery.patterns._walks import found, reason
from dropsurgery.records import Edge, TensorFact

_WALKED = ("identity", "layout")


@dataclass(frozen=True)
class _Parts:
    """The products of the two subtrees with their shares, and the sum."""

    left: fx.Node
    right: fx.Node
    mixture: fx.Node


def _parts(gate: fx.Node) -> _Parts | str:
    scorers = list(skip(gate, data_inputs, _WALKED))
    if len(scorers) != 1 or kind_of(scorers[0]) != "linear":
        return "the sigmoid is not one of a linear layer"
    value = scorers[0].meta.get("value")
    if not isinstance(value, TensorFact) or value.shape[-1] != 1:
        return "the linear layer gives more than one number: not the gate of a single node"
    users = list(skip(gate, tensor_users, _WALKED))
    left = [user for user in users if kind_of(user) == "mul"]
    rests = [user for user in users if _is_rest(user)]
    if len(left) != 1 or len(rests) != 1 or len(users) != 2:
        return f"the gate is used by {_listed(users)}, not by one product and one `1 - gate`"
    right = list(skip(rests[0], tensor_users, _WALKED))
    if len(right) != 1 or kind_of(right[0]) != "mul":
        return f"`1 - gate` is used by {_listed(right)}, not by one product"
    sums = [list(skip(product, tensor_users, _WALKED)) for product in (left[0], right[0])]
    if len(sums[0]) != 1 or sums[0] != sums[1] or kind_of(sums[0][0]) != "add":
        return "the two products are not added to each other"
    return _Parts(left[0], right[0], sums[0][0])


def _is_rest(node: fx.Node) -> bool:
    """Whether a node is 1 minus its only tensor."""
    if node.target is operator.sub:
        return len(node.args) == 2 and _is_one(node.args[0])
    reversed_sub = node.target in (torch.rsub, "rsub", "__rsub__")
    return reversed_sub and len(node.args) == 2 and _is_one(node.args[1]) and not node.kwargs


def _is_one(item: object) -> bool:
    return isinstance(item, (int, float)) and item == 1


def _listed(nodes: list[fx.Node]) -> str:
    return " and ".join(map(called, nodes)) or "nothing"


def _operand(product: fx.Node, gate: fx.Node) -> tuple[Edge, ...] | Miss:
    """The operand of a product that does not come from the gate alone."""
    for place, operand in enumerate(product.args[:2]):
        if isinstance(operand, fx.Node) and gate not in _sources(operand):
            return (Edge(product, place),)
    return Miss(f"{called(product)} has no operand besides the gate", product)


def _sources(node: fx.Node) -> set[fx.Node]:
    """The gate that a share comes from, itself or what it leaves of 1, walked back to over layouts."""
    reached: set[fx.Node] = {node}
    while kind_of(node) in _WALKED or _is_rest(node):
        (node,) = data_inputs(node)
        reached.add(node)
    return reached


def _left(match: Match) -> tuple[Edge, ...] | Miss:
    gate = match.nodes["gate"]
    return _operand(found(_parts(gate)).left, gate)


def _right(match: Match) -> tuple[Edge, ...] | Miss:
    gate = match.nodes["gate"]
    return _operand(found(_parts(gate)).right, gate)


def _mixture(match: Match) -> tuple[Edge, ...]:
    return (Edge(found(_parts(match.nodes["gate"])).mixture),)


PATTERN = Pattern(
    "hme_node",
    forms=[ops(gate="sigmoid")],
    edges={"gate": After("gate"), "left": _left, "right": _right, "output": _mixture},
    check=lambda match: reason(_parts(match.nodes["gate"])),
)
