"""Ways through a graph that patterns share; all of them keep to the nodes that carry the input's data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import fx

from dropsurgery.kinds import conv_fact, data_inputs, kind_of, kinds_of, mixes, positions, tensor_users
from dropsurgery.matching import Miss, called
from dropsurgery.records import Edge, TensorFact

Parts = TypeVar("Parts")
Step = Callable[[fx.Node], list[fx.Node]]


def reason(parts: Parts | str) -> str | None:
    """What a pattern's check says of the parts that it looked for: None, or why they are not there."""
    return parts if isinstance(parts, str) else None


def found(parts: Parts | str) -> Parts:
    """The parts of a match, which are there by its check."""
    assert not isinstance(parts, str), parts
    return parts


def size(node: fx.Node) -> int:
    """The elements of a node's tensor; 0 where it is no single tensor."""
    value = node.meta.get("value")
    return math.prod(value.shape) if isinstance(value, TensorFact) else 0


def main_input(node: fx.Node) -> fx.Node | None:
    """The largest of a node's inputs, the first of equals: the map, not its gate; None for a source."""
    inputs = data_inputs(node)
    return max(inputs, key=size) if inputs else None


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that consumes a tensor; None where there are several, or only the result."""
    users = tensor_users(node)
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def nearest(start: Iterable[fx.Node], step: Step, stop: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The first nodes for which `stop` holds on every way from `start` on, itself included; others are walked over."""
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    queue = list(start)
    while queue:
        node = queue.pop(0)
        if node in seen or node.op == "output":
            continue
        seen.add(node)
        if stop(node):
            found[node] = None
        else:
            queue += step(node)
    return list(found)


def between(end: fx.Node, start: fx.Node) -> set[fx.Node] | None:
    """All that `end` is computed from up to `start` (left out); None where it needs anything besides `start`."""
    inside: set[fx.Node] = set()
    queue = [end]
    while queue:
        node = queue.pop()
        if node is start or node in inside:
            continue
        inputs = data_inputs(node)
        if not inputs or node < start:
            return None
        inside.add(node)
        queue += inputs
    return inside


def concatenated(cat: fx.Node) -> list[fx.Node]:
    """The tensors that a concatenation along the channels joins; none for other axes."""
    given = cat.args[0] if cat.args else cat.kwargs.get("tensors")
    value, channels = cat.meta.get("value"), cat.meta["channel_axis"]
    if not isinstance(given, (list, tuple)) or not isinstance(value, TensorFact):
        return []
    dim = cat.kwargs.get("dim", cat.args[1] if len(cat.args) > 1 else 0)
    rank = len(value.shape)
    if not isinstance(dim, int) or dim % rank != (1 if channels is None else channels % rank):
        return []
    joined = [each for each in given if isinstance(each, fx.Node)]
    return joined if len(joined) == len(given) else []


def operands(cat: fx.Node, indices: Iterable[int]) -> tuple[Edge, ...] | Miss:
    """Some of the tensors that a concatenation joins, as edges."""
    if not cat.args:
        return Miss(f"{called(cat)} takes its operands by keyword, only positions can be reached", cat)
    return tuple(Edge(cat, (0, index)) for index in indices)


def enlarges(node: fx.Node) -> bool:
    """Whether a node upsamples its map."""
    source = main_input(node)
    if source is None or kind_of(node) not in ("upsample", "conv_transpose"):
        return False
    before, after = positions(source), positions(node)
    return before is not None and after is not None and after > before


def first_inputs(layer: fx.Node) -> list[fx.Node]:
    """The inputs of the net that a layer reads with no layer, norm or pool before it; none if it is not first."""
    ends = nearest(
        data_inputs(layer),
        data_inputs,
        lambda node: mixes(node) or kind_of(node) in ("norm", "norm_act", "pool") or not data_inputs(node),
    )
    return ends if all(node.op == "placeholder" and not node.meta.get("component") for node in ends) else []


def one_vector(node: fx.Node) -> bool:
    """Whether a node gives one vector for each sample."""
    value = node.meta.get("value")
    return isinstance(value, TensorFact) and sum(extent > 1 for extent in value.shape[1:]) < 2


def pooled(node: fx.Node) -> bool:
    """Whether a node outside of the head works on the one vector that a map was pooled to: the layer of a gate."""
    if node.meta["role"] == "head":
        return False
    source: fx.Node | None = node
    while source is not None and one_vector(source):
        node, source = source, main_input(source)
    if source is None or node is source:
        return False
    return kind_of(node) in ("reduction", "matmul") or "adaptive_pool" in kinds_of(node)


def pointwise_layer(node: fx.Node) -> bool:
    """Whether a node mixes the channels of each position alone: linear, a convolution of kernel 1.

    In a head a convolution over the whole map is the first fully connected layer of older nets, and counts too.
    """
    if kind_of(node) == "linear":
        return True
    fact = conv_fact(node)
    if fact is None or fact.groups > 1:
        return False
    return node.meta["role"] == "head" or max(*fact.kernel, *fact.stride) == 1


def depthwise(node: fx.Node) -> bool:
    """Whether a node is a convolution of each channel by itself."""
    fact = conv_fact(node)
    return fact is not None and fact.groups == fact.out_channels > 1


def into_all(layers: list[fx.Node]) -> tuple[Edge, ...] | Miss:
    """What layers take: one edge where they are all that read one tensor, else one edge for each."""
    sources = {data_inputs(layer)[0] for layer in layers}
    if len(sources) == 1 and len(layers) > 1:
        (source,) = sources
        if set(tensor_users(source)) == set(layers):
            return (Edge(source),)
    for layer in layers:
        if not layer.args or not isinstance(layer.args[0], fx.Node):
            return Miss(f"{called(layer)} takes its input by keyword, only positions can be reached", layer)
    return tuple(Edge(layer, 0) for layer in layers)


def layers_behind(node: fx.Node) -> list[fx.Node]:
    """The nearest layers that a tensor is made by, depthwise convolutions walked over."""
    return nearest([node], data_inputs, lambda each: mixes(each) and not depthwise(each))
