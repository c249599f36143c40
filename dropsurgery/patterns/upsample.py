"""Whatever enlarges a map: interpolation, transposed convolution, pixel shuffle; not one that keeps its size."""

from __future__ import annotations

from dropsurgery.matching import After, Into, Match, Pattern, called, ops
from dropsurgery.patterns._walks import enlarges


def _enlarges(match: Match) -> str | None:
    node = match.nodes["upsample"]
    return None if enlarges(node) else f"{called(node)} does not enlarge its map"


PATTERN = Pattern(
    "upsample",
    forms=[ops(upsample="upsample"), ops(upsample="conv_transpose")],
    edges={"output": After("upsample"), "input": Into("upsample")},
    check=_enlarges,
)
