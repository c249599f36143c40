"""The layers that make a net's result from its pooled features: linear, or a convolution on one point.

A net with two heads has two (distilled ViTs). A segmentation head is none: its result is a map.
"""

from __future__ import annotations

from torch import fx

from dropsurgery.kinds import mixes, positions, tensor_users
from dropsurgery.matching import After, Into, Layer, Match, Pattern, called, ops


def _makes_the_result(match: Match) -> str | None:
    layer = match.nodes["layer"]
    if positions(layer) != 1:
        return f"{called(layer)} makes a map or tokens, not one vector"
    seen: set[fx.Node] = set()
    queue = tensor_users(layer)
    while queue:
        node = queue.pop()
        if node in seen or node.op == "output":
            continue
        if mixes(node):
            return f"{called(layer)} is not the last layer: {called(node)} follows"
        if node.meta["role"] != "head" and (positions(node) or 1) > 1:
            return f"{called(layer)} acts on a map: {called(node)}"
        seen.add(node)
        queue += tensor_users(node)
    return None


PATTERN = Pattern(
    "classifier",
    forms=[ops(layer="linear"), ops(layer="conv")],
    edges={"output": After("layer"), "input": Into("layer"), "module": Layer("layer")},
    check=_makes_the_result,
)
