"""What part of the net a node belongs to: backbone, encoder, decoder, skip or head.

A net whose result is still a map and that upsamples on the way there has a **decoder**: the upsampling operations
after which no map is halved to a size smaller than any before (a second way down, as in PAFPN, is decoder too), the
largest modules around them that do not take the model's input, and all that depends on these. Of several such modules
the outermost count, so that an encoder may upsample inside (HRNet). What comes before is the **encoder**, save what
only leads from there into the decoder and is not in a module that takes the input (**skip**). In any other net it is
the **backbone**. The **head** begins where the map is given up for good (global pooling, one token), and in a net with
a decoder at the last convolution or linear layer. Parts of an opaque forward that nothing is known to feed, and that
begin at smaller maps than the model's input, are decoder if a decoder came before (the heads of detectors).
"""

from __future__ import annotations

from torch import fx

from dropsurgery.capture.dataflow import Dataflow, prefixes, shape_of
from dropsurgery.capture.spaces import Space, main_input


def find_roles(flow: Dataflow, spaces: dict[fx.Node, Space]) -> dict[fx.Node, str]:
    """The role of every node of the dataflow."""
    decoder = _decoder(flow, spaces)
    roles = dict.fromkeys(flow.order, "encoder" if decoder else "backbone")
    if decoder:
        encoder = [node for node in flow.order if node not in decoder and not spaces[node].collapsed]
        deepest = max(encoder, key=lambda node: (spaces[node].level, flow.order[node]))
        trunk = flow.ancestors({deepest})
        feeding = flow.ancestors(decoder)
        shared = {prefix for node in decoder for prefix in prefixes(node.meta["owner"])}
        encoders = _input_takers(flow, spaces) - shared
        leading = (node for node in flow.order if node in feeding and node not in trunk)
        roles.update((node, "skip") for node in leading if not encoders.intersection(prefixes(node.meta["owner"])))
        roles.update(dict.fromkeys(decoder, "decoder"))
        roles.update(dict.fromkeys(_last_layer(flow, decoder) & decoder, "head"))
    maps = flow.ancestors({node for node in flow.order if not spaces[node].collapsed})
    roles.update((node, "head") for node in flow.order if node not in maps)
    return roles


def _decoder(flow: Dataflow, spaces: dict[fx.Node, Space]) -> set[fx.Node]:
    if flow.results and all(spaces[node].collapsed for node in flow.results):
        return set()
    before_descent = flow.ancestors(_new_depths(flow, spaces))
    seeds = [node for node in flow.order if _enlarges(flow, spaces, node) and node not in before_descent]
    takers = _input_takers(flow, spaces)
    modules = {seed: _outermost(seed, takers) for seed in seeds}
    outermost = min((len(prefixes(module)) for module in modules.values() if module), default=0)
    modules = {seed: module for seed, module in modules.items() if _at(seed, module) <= max(1, outermost)}
    around = {module for module in modules.values() if module}
    inside = {node for node in flow.order if around.intersection(prefixes(node.meta["owner"]))}
    first = min((flow.order[seed] for seed in modules), default=len(flow.order))
    parts = {node for node in _unfed(flow) if flow.order[node] > first and node.meta["owner"] not in takers}
    return flow.closure({*modules, *inside, *parts})


def _at(seed: fx.Node, module: str) -> int:
    """How deep in the tree of modules an upsampling operation lies, with the largest module around it."""
    return len(prefixes(module)) if module else len(prefixes(seed.meta["owner"])) + 1


def _new_depths(flow: Dataflow, spaces: dict[fx.Node, Space]) -> set[fx.Node]:
    """The nodes that halve a map to a size smaller than any before."""
    deepest, found = 0, set()
    for node in flow.order:
        if flow.inputs[node] and spaces[node].level > deepest:
            deepest = spaces[node].level
            found.add(node)
    return found


def _enlarges(flow: Dataflow, spaces: dict[fx.Node, Space], node: fx.Node) -> bool:
    if flow.kind[node] not in ("upsample", "conv_transpose"):
        return False
    return spaces[node].reduction < spaces[main_input(node, flow.inputs[node], spaces)].reduction


def _unfed(flow: Dataflow) -> list[fx.Node]:
    """The inputs of parts of an opaque forward that come from nothing known."""
    return [node for node in flow.order if node.meta.get("component") and not flow.inputs[node]]


def _input_takers(flow: Dataflow, spaces: dict[fx.Node, Space]) -> set[str]:
    """The paths of all modules whose forward reads the model's input, or in an opaque forward a map of its size."""
    inputs = [node for node in flow.order if node.op == "placeholder" and not node.meta.get("component")]
    inputs += [node for node in _unfed(flow) if len(shape_of(node) or ()) > 2 and spaces[node].reduction == 1]
    places = [user.meta["owner"] for node in inputs for user in flow.users[node]]
    places += [node.meta["owner"] for node in inputs]
    return {prefix for place in places for prefix in prefixes(place)}


def _outermost(seed: fx.Node, takers: set[str]) -> str:
    """The largest module around a node that does not take the model's input itself; "" if all do."""
    return next((prefix for prefix in prefixes(seed.meta["owner"]) if prefix not in takers), "")


def _last_layer(flow: Dataflow, decoder: set[fx.Node]) -> set[fx.Node]:
    """The last convolution or linear layer before the result, and what follows it."""
    followed = flow.ancestors({node for node in flow.order if flow.weighted(node)})
    parts = [flow.order[node] for node in _unfed(flow) if node in decoder]
    final = {
        node
        for node in flow.order
        if flow.kind[node] in ("conv", "linear", "conv_transpose")
        and flow.order[node] >= max(parts, default=0)  # what ends an earlier part of an opaque forward is used later
        and not any(user in followed for user in flow.users[node])
    }
    return flow.closure(final)
