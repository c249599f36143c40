"""Sizes that forwards write into a reshape, such as the number of heads, and the attributes that they read them from.

A size that is taken from a tensor's shape fits by itself. A number can be changed only where it is an attribute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import fx

from dropsurgery.capture import Captured
from dropsurgery.capture.dataflow import shape_of
from dropsurgery.compression.layers import argument
from dropsurgery.compression.rules import name_of
from dropsurgery.compression.spreading import Blocked, Flow, Spread
from dropsurgery.kinds import tensor_inputs

Attribute = tuple[str, str]
"""The path of a module, and the name of an attribute of it."""
_SHAPING = ("reshape", "view", "expand", "unflatten")
_AT_MOST = 4


@dataclass
class Literals:
    """Attributes that may have to change, with what they become; `unknown` are sizes that no attribute holds."""

    changes: dict[Attribute, int] = field(default_factory=dict)
    unknown: dict[fx.Node, int] = field(default_factory=dict)

    def attempts(self) -> Iterator[dict[Attribute, int]]:
        """What to try in turn: all changes, then those of fewer names, should a number stand for two things."""
        names = sorted({name for _, name in self.changes})
        if len(names) > _AT_MOST:
            names = []
            yield self.changes
        for count in range(len(names), -1, -1):
            for some in combinations(names, count):
                yield {key: size for key, size in self.changes.items() if key[1] in some}


def literals(captured: Captured, flow: Flow, cuts: Spread) -> Literals:
    """Find the sizes that would be wrong.

    Raises:
        Blocked: one is written in the code, and no attribute of its module is such a number.
    """
    found = Literals()
    owners: dict[str, bool] = {}
    for node, cut in cuts.cuts.items():
        shape = shape_of(node)
        if shape is not None and _written(node, cut.axis, len(shape)) == shape[cut.axis]:
            owner: str = node.meta["owner"]
            holding = _attributes(captured, owner, shape[cut.axis])
            found.changes |= dict.fromkeys(holding, int((~cut.gone).sum()))
            owners[owner] = owners.get(owner, False) or bool(holding)
            if not holding:
                found.unknown[node] = shape[cut.axis]
    for node, size in found.unknown.items():
        if not owners[node.meta["owner"]]:
            raise Blocked(node, f"has the number {size} written in its code", cuts.sites[node])
    _check_splits(flow, cuts)
    return found


def _written(node: fx.Node, axis: int, rank: int) -> int | None:
    """The number that a reshape names for an axis; None where it names none."""
    if name_of(node) not in _SHAPING or node.op == "call_module":
        return None
    if name_of(node) == "unflatten":
        dim, sizes = argument(node, "dim", 1), argument(node, "sizes", 2)
        if not isinstance(dim, int) or not isinstance(sizes, (list, tuple)):
            return None
        place = axis - dim % (rank - len(sizes) + 1)
    else:
        given: Any = node.kwargs.get("shape", node.kwargs.get("size", node.args[1:]))
        sizes = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
        place = axis if len(sizes) == rank else -1
    size = sizes[place] if 0 <= place < len(sizes) else None
    return size if isinstance(size, int) and size >= 0 else None


def _attributes(captured: Captured, owner: str, size: int) -> list[Attribute]:
    """The attributes that a module's forward has read and that are this number."""
    reads = (read for level in captured.view.levels.get(owner, []) for read in level.reads.items())
    return [
        (f"{owner}.{below}".strip("."), name) for (below, name), value in reads if type(value) is int and value == size
    ]


def _check_splits(flow: Flow, cuts: Spread) -> None:
    """Refuse splits whose parts would be of other sizes than the code asks for."""
    for node in flow.graph.nodes:
        name = name_of(node)
        if name not in ("chunk", "tensor_split", "split", "split_with_sizes") or not tensor_inputs(node):
            continue
        source = tensor_inputs(node)[0]
        cut, dim = cuts.cuts.get(source), argument(node, "dim", 2, 0)
        if cut is None or not isinstance(dim, int):
            continue
        if cut.axis != dim % len(shape_of(source) or ()):
            continue
        parts = torch.split(cut.gone, [part.shape[cut.axis] for part in node.meta["value"]])
        left = {int((~part).sum()) for part in parts}
        if name.startswith("split") or len(left) > 1:
            reason = "splits what is cut into parts whose sizes are written in its code, or that would not be equal"
            raise Blocked(node, reason, cuts.sites[source])
