"""Whatever enlarges a map: interpolation, transposed convolution, pixel shuffle; not one that keeps its size."""

from __future__ import annotations

import math

from dropsurgery.kinds import data_inputs
from dropsurgery.matching import After, Into, Match, Pattern, called, ops
from dropsurgery.records import TensorFact


def _enlarges(match: Match) -> str | None:
    node = match.nodes["upsample"]
    before, after = (each.meta.get("value") for each in (data_inputs(node)[0], node))
    if not isinstance(before, TensorFact) or not isinstance(after, TensorFact):
        return f"{called(node)} has no map of known size"
    if math.prod(after.shape[2:]) <= math.prod(before.shape[2:]):
        return f"{called(node)} does not enlarge its map"
    return None


PATTERN = Pattern(
    "upsample",
    forms=[ops(upsample="upsample"), ops(upsample="conv_transpose")],
    edges={"output": After("upsample"), "input": Into("upsample")},
    check=_enlarges,
)
