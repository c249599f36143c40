"""What part of the net a node belongs to: backbone, encoder, decoder, skip or head.

A net whose result is still a map and that upsamples on the way there has a **decoder**: the upsampling operations that
no downsampling follows, the largest modules around them that do not take the model's input, and all that depends on
these. What comes before is its **encoder**, save what only leads from there into the decoder (**skip**). In any other
net it is the **backbone**. The **head** begins where the map is given up for good (global pooling, one token), and in
a net with a decoder at the last convolution or linear layer.
"""

from __future__ import annotations

from torch import fx

from dropsurgery.capture.dataflow import Dataflow, prefixes
from dropsurgery.capture.spaces import Space, main_input
from dropsurgery.kinds import kind_of


def find_roles(flow: Dataflow, spaces: dict[fx.Node, Space]) -> dict[fx.Node, str]:
    """The role of every node of the dataflow."""
    decoder = _decoder(flow, spaces)
    roles = dict.fromkeys(flow.order, "encoder" if decoder else "backbone")
    if decoder:
        encoder = [node for node in flow.order if node not in decoder and not spaces[node].collapsed]
        deepest = max(encoder, key=lambda node: (spaces[node].level, flow.order[node]))
        trunk = flow.ancestors({deepest})
        feeding = flow.ancestors(decoder)
        roles.update((node, "skip") for node in flow.order if node in feeding and node not in trunk)
        roles.update(dict.fromkeys(decoder, "decoder"))
        roles.update(dict.fromkeys(_last_layer(flow) & decoder, "head"))
    maps = flow.ancestors({node for node in flow.order if not spaces[node].collapsed})
    roles.update((node, "head") for node in flow.order if node not in maps)
    return roles


def _decoder(flow: Dataflow, spaces: dict[fx.Node, Space]) -> set[fx.Node]:
    if all(spaces[node].collapsed for node in flow.results):
        return set()
    before_descent = flow.ancestors({node for node in flow.order if _change(flow, spaces, node) > 0})
    seeds = {node for node in flow.order if _change(flow, spaces, node) < 0 and node not in before_descent}
    takers = _input_takers(flow)
    modules = {prefix for seed in seeds for prefix in _outermost(seed, takers)}
    inside = {node for node in flow.order if modules.intersection(prefixes(node.meta["owner"]))}
    return flow.closure(seeds | inside)


def _change(flow: Dataflow, spaces: dict[fx.Node, Space], node: fx.Node) -> int:
    """1 where a node halves its map, -1 where it enlarges it, else 0."""
    if not flow.inputs[node]:
        return 0
    before, after = spaces[main_input(node, flow.inputs[node], spaces)], spaces[node]
    if kind_of(node) in ("upsample", "conv_transpose"):
        return -1 if after.reduction < before.reduction else 0
    return int(after.level > before.level)


def _input_takers(flow: Dataflow) -> set[str]:
    """The paths of all modules whose forward reads the model's input."""
    inputs = [node for node in flow.order if node.op == "placeholder" and not node.meta.get("component")]
    users = [user for node in inputs for user in flow.users[node]]
    return {prefix for user in users for prefix in prefixes(user.meta["owner"])}


def _outermost(seed: fx.Node, takers: set[str]) -> list[str]:
    """The largest module around a node that does not take the model's input itself (none if all do)."""
    return [prefix for prefix in prefixes(seed.meta["owner"]) if prefix not in takers][:1]


def _last_layer(flow: Dataflow) -> set[fx.Node]:
    """The last convolution or linear layer before the result, and what follows it."""
    followed = flow.ancestors({node for node in flow.order if flow.weighted(node)})
    final = {
        node
        for node in flow.order
        if kind_of(node) in ("conv", "linear", "conv_transpose")
        and not any(user in followed for user in flow.users[node])
    }
    return flow.closure(final)
