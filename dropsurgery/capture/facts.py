"""Facts on the nodes of a flat graph, by dataflow alone: no name of a module or class of a model is read.

`annotate` fills into each node's `meta` what recipes select by. How each is told: `spaces.py` (channels, reduction),
`joins.py` (residual joins, branch and shortcut), `roles.py` (backbone, decoder …), `stages.py` (stage, block, depth).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from dropsurgery.capture.dataflow import Dataflow, shape_of
from dropsurgery.capture.joins import Join, find_joins
from dropsurgery.capture.roles import find_roles
from dropsurgery.capture.spaces import Space, find_spaces, main_input
from dropsurgery.capture.stages import find_places

__all__ = ["Join", "annotate"]

_NOTHING: dict[str, Any] = {
    "stage": None,
    "reduction": None,
    "depth": None,
    "block": None,
    "flow": "trunk",
    "role": None,
    "channel_axis": None,
    "channels": None,
    "trainable": True,
}


def annotate(graph: fx.Graph) -> None:
    """Write the facts into each node's `meta`.

    - `stage`: resolution stage of the backbone, 0 the stem; None in isotropic nets, decoders and heads.
    - `reduction`: input size / feature size, rounded; None where nothing is known of a map.
    - `depth` in [0, 1]: position of the residual block (or, where there is none, of the owner) among all.
    - `block`: (index, count) of the residual block; None outside of blocks.
    - `flow`: "branch", "shortcut" (both between a residual join and its fork) or "trunk".
    - `role`: backbone, encoder, decoder, skip, head; None for nodes that do not carry the input's data.
    - `channel_axis` (NCHW 1, NHWC and tokens -1) and `channels`; None where unknown.
    - `trainable`: whether the latest parameters on the way to the node require gradients.
    - `join`: a `Join`, on residual additions only; `no_join`: the reason, on all other additions.
    """
    flow = Dataflow(graph)
    spaces = find_spaces(flow)
    roles = find_roles(flow, spaces)
    regions, refused = find_joins(flow, roles)
    body = [node for node in flow.order if roles[node] in ("backbone", "encoder")]
    places = find_places(flow, spaces, regions, body)
    trainable = _trainable(flow, spaces)
    for node in graph.nodes:
        meta = node.meta
        meta.update(_NOTHING)
        if node in flow.order:
            meta["role"], meta["trainable"] = roles[node], trainable[node]
            meta["reduction"], meta["channel_axis"], meta["channels"] = _channels(node, spaces[node])
        if node in places:
            meta["stage"], meta["depth"], meta["block"] = places[node]
    for region in regions:
        region.node.meta["join"] = region.join
        for side, name in ((region.branch, "branch"), (region.shortcut, "shortcut")):
            for node in side:
                if node.meta["flow"] == "trunk":  # inner joins come first, and their word stands
                    node.meta["flow"] = name
    for node, reason in refused.items():
        node.meta["no_join"] = reason
    _spread_depth([node for node in flow.order if node.meta["depth"] is None])


def _channels(node: fx.Node, space: Space) -> tuple[int | None, int | None, int | None]:
    """The reduction of a node's tensor, the axis of its channels and how many there are."""
    reduction = max(1, round(space.reduction)) if space.size else None
    shape, axis = shape_of(node), space.axis
    if shape is None or axis is None or axis not in (1, len(shape) - 1):
        return reduction, None, None
    return reduction, 1 if axis == 1 and len(shape) != 2 else -1, shape[axis]


def _trainable(flow: Dataflow, spaces: dict[fx.Node, Space]) -> dict[fx.Node, bool]:
    """Whether the latest parameters on the way to each node require gradients."""
    found: dict[fx.Node, bool] = {}
    for node, inputs in flow.inputs.items():
        own = flow.learns(node)
        if own is None:
            own = found[main_input(node, inputs, spaces)] if inputs else True
        found[node] = own
    return found


def _spread_depth(nodes: list[fx.Node]) -> None:
    """Depth of nodes that no residual block tells it of: the position of their owner among the owners."""
    owners = list(dict.fromkeys(node.meta["owner"] for node in nodes))
    positions = {owner: index / max(1, len(owners) - 1) for index, owner in enumerate(owners)}
    for node in nodes:
        node.meta["depth"] = positions[node.meta["owner"]]
