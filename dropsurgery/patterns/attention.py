"""Attention: values weighted by products of queries and keys, and the layer that projects the result.

The core is one call (`F.scaled_dot_product_attention`, `nn.MultiheadAttention`) or written out: a softmax whose result
multiplies the values, or two products in a row without softmax (linear attention). Windows, heads, positions added to
the scores and layers that mix the heads (CaiT) are walked over.

`probabilities` is the softmax; a Miss where it is hidden in one call, or where there is none. `output` is the weighted
sum of the values, `projection` the layer that follows it in the same residual branch, `input` what the layers that
make queries, keys and values read. Pooling with a softmax to one vector (global context) is none.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from dropsurgery.kinds import data_inputs, kind_of, kinds_of, mixes, skip_identities, tensor_users
from dropsurgery.matching import Match, Miss, Pattern, called, ops
from dropsurgery.patterns._walks import depthwise, found, into_all, nearest, one_vector, pointwise_layer, reason
from dropsurgery.records import Edge, TensorFact


@dataclass(frozen=True)
class _Parts:
    """`operands`: queries, keys and values as the core takes them; `result`: the node that gives its result."""

    operands: list[fx.Node]
    softmax: fx.Node | None
    result: fx.Node


def _parts(core: fx.Node) -> _Parts | str:
    if kind_of(core) == "attention":
        several = isinstance(core.meta.get("module"), nn.MultiheadAttention)  # its result and the weights
        results = [user for user in tensor_users(core) if user.args[1:] == (0,)] if several else [core]
        return _Parts(data_inputs(core), None, results[0]) if results else "nothing reads the result of the attention"
    if len(data_inputs(core)) < 2:
        return f"{called(core)} has an operand that does not depend on the input"
    for weights in data_inputs(core):
        softmax = _behind([weights], "softmax")
        first = _behind(data_inputs(softmax) if softmax else [weights], "matmul")
        if softmax is None and (first is None or len(data_inputs(first)) < 2):
            continue
        values = [operand for operand in data_inputs(core) if operand is not weights]
        if first is None and one_vector(core):
            return "softmax pools to one vector"
        if _first_of_two(core):
            return f"{called(core)} is the first of two products"
        return _Parts([*(data_inputs(first) if first else [weights]), *values], softmax, core)
    return f"neither a softmax nor another product comes before {called(core)}"


def _behind(start: list[fx.Node], kind: str) -> fx.Node | None:
    """The nearest node of a kind that tensors come from, with one layer at most on the way, which mixes heads."""

    def stop(each: fx.Node) -> bool:
        return kind_of(each) in ("softmax", kind) or mixes(each)

    reached = nearest(start, data_inputs, stop)
    for layer in list(reached):
        if _mixes_heads(layer):
            reached += nearest(data_inputs(layer), data_inputs, stop)
    return next((each for each in reached if kind_of(each) == kind), None)


def _mixes_heads(layer: fx.Node) -> bool:
    if kind_of(layer) not in ("linear", "conv"):
        return False
    before, after = (node.meta.get("value") for node in (data_inputs(layer)[0], layer))
    return isinstance(after, TensorFact) and before == after and len(after.shape) == 4


def _first_of_two(core: fx.Node) -> bool:
    """Whether another product of data goes on with the result, which then is the core."""
    following = nearest(tensor_users(core), tensor_users, mixes)
    return any(kind_of(node) == "matmul" and len(data_inputs(node)) > 1 for node in following)


def _layers(parts: _Parts) -> list[fx.Node]:
    """The layers that make queries, keys and values."""
    return nearest(parts.operands, data_inputs, lambda node: mixes(node) and not depthwise(node))


def _found(match: Match) -> _Parts:
    return found(_parts(match.nodes["core"]))


def _projection(match: Match) -> tuple[Edge, ...] | Miss:
    parts = _found(match)
    layers = _layers(parts)
    begin = min(data_inputs(layer)[0] for layer in layers) if layers else parts.result

    def stop(node: fx.Node) -> bool:
        join = node.meta.get("join")
        return mixes(node) or (join is not None and not begin < join.fork)

    following = nearest(tensor_users(parts.result), tensor_users, stop)
    if len(following) != 1 or not pointwise_layer(following[0]):
        if isinstance(parts.result.args[0], fx.Node) and kind_of(parts.result.args[0]) == "attention":
            return (Edge(parts.result),)  # the projection is inside the call
        return Miss("no single layer projects the result of the attention", parts.result)
    (layer,) = following
    norms = [user for user in skip_identities(layer, tensor_users) if "batch_norm" in kinds_of(user)]
    return (Edge(norms[0] if len(norms) == 1 and len(tensor_users(layer)) == 1 else layer),)


def _probabilities(match: Match) -> tuple[Edge, ...] | Miss:
    parts = _found(match)
    if parts.softmax is None:
        hidden = kind_of(match.nodes["core"]) == "attention"
        where = "are inside one call" if hidden else "do not exist: it is linear, without a softmax"
        return Miss(f"probabilities of the attention {where}", parts.result)
    return (Edge(parts.softmax),)


def _output(match: Match) -> tuple[Edge, ...]:
    return (Edge(_found(match).result),)


def _input(match: Match) -> tuple[Edge, ...] | Miss:
    core, parts = match.nodes["core"], _found(match)
    layers = [core] if core.op == "call_module" else _layers(parts)
    if not layers:
        return Miss("queries, keys and values are made by no layer", core)
    return into_all(layers)


PATTERN = Pattern(
    "attention",
    forms=[ops(core="attention"), ops(core="matmul")],
    edges={"projection": _projection, "probabilities": _probabilities, "output": _output, "input": _input},
    check=lambda match: reason(_parts(match.nodes["core"])),
)
