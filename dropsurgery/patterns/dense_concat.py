"""Where a dense block appends what its layer made to all that the layer got (DenseNet, RDNet, the dense path of DPN).

Such concatenations come in a row: each takes the operands of the one before, or its result or a part of that, and
appends what layers made from it. A concatenation that stands alone is none (Inception, Ghost, the one-shot aggregation
of VoVNet and HGNet), nor is one whose new part was merged with an upsampled map (U-Net++).
"""

from __future__ import annotations

import operator

from torch import fx

from dropsurgery.kinds import data_inputs, kind_of, mixes, tensor_users
from dropsurgery.matching import After, Match, Miss, Pattern, ops
from dropsurgery.patterns._walks import concatenated, enlarges, found, operands, reason
from dropsurgery.records import Edge


def _appended(cat: fx.Node) -> list[int] | str:
    """The indices of the operands that are new; or why there are none."""
    joined = concatenated(cat)
    if len(joined) < 2:
        return "it does not join several maps along their channels"
    for before in _before(joined):
        new = _new(joined, before)
        if new and (kind_of(before) == "cat" or _goes_on(cat)):
            return new
    return "no operand was made from what the others join"


def _before(joined: list[fx.Node]) -> list[fx.Node]:
    """What the row may have held before: a concatenation of some of the operands, or one operand itself."""
    cats = [user for user in tensor_users(joined[0]) if kind_of(user) == "cat"]
    shorter = [each for each in cats if set(concatenated(each)) < set(joined)]
    return [*shorter[::-1], *map(_whole, joined)]


def _whole(operand: fx.Node) -> fx.Node:
    """What an operand is a part of, if it is a slice."""
    while kind_of(operand) == "identity" or operand.target is operator.getitem:
        operand = data_inputs(operand)[0]
    return operand


def _new(joined: list[fx.Node], before: fx.Node) -> list[int]:
    """The indices of the operands that layers made from `before`; a residual sum (DPN) is carried on, not new."""
    held = set(concatenated(before)) if kind_of(before) == "cat" else set()
    fresh = [index for index, each in enumerate(joined) if each not in held and "join" not in each.meta]
    return [index for index in fresh if _whole(joined[index]) is not before and _made(joined[index], before)]


def _made(node: fx.Node, before: fx.Node) -> bool:
    """Whether layers made a tensor from an earlier one, with no upsampled map merged on the way."""
    seen: set[fx.Node] = set()
    queue, reached, layers = [node], False, False
    while queue:
        each = queue.pop()
        if each in seen:
            continue
        seen.add(each)
        reached = reached or each is before
        if enlarges(each):
            return False
        if before < each:
            layers = layers or mixes(each)
            queue += data_inputs(each)
    return reached and layers


def _goes_on(cat: fx.Node) -> bool:
    """Whether a later concatenation appends to this one."""
    later = [user for user in tensor_users(cat) if kind_of(user) == "cat"]
    return any(_new(concatenated(each), cat) for each in later)


def _new_edges(match: Match) -> tuple[Edge, ...] | Miss:
    cat = match.nodes["cat"]
    return operands(cat, found(_appended(cat)))


PATTERN = Pattern(
    "dense_concat",
    forms=[ops(cat="cat")],
    edges={"new": _new_edges, "output": After("cat")},
    check=lambda match: reason(_appended(match.nodes["cat"])),
)
