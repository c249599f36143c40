"""Pooling, local and global: max, average, adaptive, and a mean or maximum over all positions of a map or its tokens.

`x.mean((2, 3))` is global average pooling, the squeeze of a gate included; a mean over the channels is none.
"""

from __future__ import annotations

from typing import Any

from dropsurgery.kinds import data_inputs, kind_of
from dropsurgery.matching import After, Into, Layer, Match, Pattern, called, ops
from dropsurgery.records import TensorFact


def _over_positions(match: Match) -> str | None:
    node = match.nodes["pool"]
    if kind_of(node) == "pool":
        return None
    source = data_inputs(node)[0]
    value, channels = source.meta.get("value"), source.meta["channel_axis"]
    dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(value, TensorFact) or channels is None or not isinstance(dims, (list, tuple)):
        return f"{called(node)} is over unknown axes"
    rank = len(value.shape)
    if {dim % rank for dim in dims} != set(range(1, rank)) - {channels % rank}:
        return f"{called(node)} is not over all positions"
    return None


PATTERN = Pattern(
    "pool",
    forms=[ops(pool="pool"), ops(pool="mean"), ops(pool="amax")],
    edges={"output": After("pool"), "input": Into("pool"), "module": Layer("pool")},
    check=_over_positions,
)
