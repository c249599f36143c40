"""U-Net's two convolutions in a row: (conv ▶ norm? ▶ activation) twice, with the same output width.

Both keep the size of the map (stride 1) and see more than a point along each axis, which leaves out stems and
bottlenecks, and neither lies between a residual join and its fork. Pairs do not overlap: of three convolutions in a
row (VGG) the first two are one.
"""

from __future__ import annotations

from torch import fx

from dropsurgery.kinds import conv_fact, kind_of
from dropsurgery.matching import After, Match, Pattern, ops, units


def _is_pair(match: Match) -> str | None:
    convs = (match.nodes["conv"], match.nodes["conv2"])
    if any(conv.meta["flow"] != "trunk" for conv in convs):
        return "conv lies inside a residual block"
    if not _alike(*convs):
        return "convs differ in width, or have a stride or a kernel of 1"
    if _pairs_before(convs[0]) % 2:
        return "conv is the second of another pair"
    return None


def _alike(first: fx.Node, second: fx.Node) -> bool:
    facts = [conv_fact(first), conv_fact(second)]
    wide = all(fact and max(fact.stride) == 1 and min(fact.kernel) > 1 for fact in facts)
    return wide and first.meta["channels"] == second.meta["channels"]


def _pairs_before(conv: fx.Node) -> int:
    """How many convolutions directly before this one, and before that one, would pair with their next."""
    node = conv.args[0]
    while isinstance(node, fx.Node) and kind_of(node) in ("activation", "norm", "norm_act", "identity"):
        node = node.args[0] if node.args and len(node.users) == 1 else None
    if isinstance(node, fx.Node) and kind_of(node) == "conv" and len(node.users) == 1 and _alike(node, conv):
        return 1 + _pairs_before(node)
    return 0


_FIRST = [
    ops(conv="conv", norm="norm", act="activation"),
    ops(conv="conv", act="norm_act"),
    ops(conv="conv", act="activation"),
]
_SECOND = [
    ops(conv2="conv", norm2="norm", act2="activation"),
    ops(conv2="conv", act2="norm_act"),
    ops(conv2="conv", act2="activation"),
]

PATTERN = Pattern(
    "double_conv",
    forms=units(_FIRST, _SECOND),
    edges={"between": After("act"), "output": After("act2")},
    check=_is_pair,
)
