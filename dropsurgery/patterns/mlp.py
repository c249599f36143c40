"""Two layers on each position with one activation between: the MLP of transformers, ConvNeXt and Mixer, fc6 and fc7.

A layer is linear or a convolution of kernel 1. Between them may lie norms (batch norm, GRN, a sub-norm), a depthwise
convolution before the activation (PVT v2, SegFormer) and a product with a second way (GLU, SwiGLU), which is the
hidden tensor then. No MLPs are: what works on one pooled point and makes a gate or a kernel of it (squeeze and
excitation), inverted residuals (a depthwise convolution after an activation), convolutions of kernel 1 that go on
with an activation (NIN, HGNet).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dropsurgery.kinds import data_inputs, kind_of, mixes, skip_identities, tensor_users
from dropsurgery.matching import After, Pattern, called, ops
from dropsurgery.patterns._walks import between, depthwise, found, into_all, nearest, pointwise_layer, pooled, reason
from dropsurgery.records import Edge

_ACTIVATIONS = ("activation", "norm_act", "glu")
_INSIDE = (*_ACTIVATIONS, "identity", "layout", "norm", "add", "mul", "conv", None)


@dataclass(frozen=True)
class _Parts:
    """The first layers (two in a GLU of separate weights) and the node whose result is the hidden tensor."""

    first: list[fx.Node]
    hidden: fx.Node


def _parts(last: fx.Node) -> _Parts | str:
    if not pointwise_layer(last):
        return f"{called(last)} is no layer on each position alone"
    hidden, after = data_inputs(last)[0], {last}
    while (before := _before_norm(hidden)) is not None:
        after |= between(hidden, before) or set()
        hidden = before
    first = nearest([hidden], data_inputs, _ends)
    inside = _inside(hidden, first)
    problem = _not_hidden(hidden, first, inside) or _leaves(inside | set(first), inside | after)
    if problem is None and kind_of(last) == "conv" and last.meta["role"] != "head" and _activated(last):
        problem = "the second convolution is followed by an activation"
    if problem is None and any(kind_of(node) in ("matmul", "attention") for node in _next_layers(last)):
        problem = "the second layer makes queries, keys or values"
    return problem or _Parts(first, hidden)


def _ends(node: fx.Node) -> bool:
    """Where a hidden tensor begins: a layer, a source or a residual join."""
    return (mixes(node) and not depthwise(node)) or "join" in node.meta or not data_inputs(node)


def _before_norm(node: fx.Node) -> fx.Node | None:
    """What a norm, or a node without effect, is applied to; None where the node is neither.

    A norm may also be written out and end in a sum, as GRN does: x + f(x) without activation or layer in f.
    """
    inputs = data_inputs(node)
    if kind_of(node) in ("identity", "layout", "norm"):
        return inputs[0] if inputs else None
    if kind_of(node) == "add" and len(inputs) == 2:
        source = min(inputs)
        inside = between(node, source)
        if inside and not any(mixes(each) or kind_of(each) in _ACTIVATIONS for each in inside):
            return source
    return None


def _inside(hidden: fx.Node, first: list[fx.Node]) -> set[fx.Node]:
    """The nodes from the first layers (left out) to the hidden tensor."""
    inside: set[fx.Node] = set()
    queue = [hidden]
    while queue:
        node = queue.pop()
        if node not in inside and node not in first:
            inside.add(node)
            queue += data_inputs(node)
    return inside


def _not_hidden(hidden: fx.Node, first: list[fx.Node], inside: set[fx.Node]) -> str | None:
    """Why what lies between two layers is not the hidden part of an MLP."""
    strange = [node for node in first if not pointwise_layer(node)]
    if strange:
        return f"{called(strange[0])} comes before the activation"
    if len({_read(layer) for layer in first}) > 1:
        return "the hidden tensor comes from several layers of different inputs"
    if not any(kind_of(node) in _ACTIVATIONS for node in inside):
        return "no activation between the layers"
    if pooled(first[0]):
        return "the layers work on one pooled point: those of a gate"
    other = [node for node in inside if kind_of(node) not in _INSIDE]
    if other:
        return f"{called(other[0])} lies between the layers"
    for conv in (node for node in inside if depthwise(node)):
        if any(kind_of(node) not in ("identity", "layout") for node in _inside(conv, first) - {conv}):
            return "a depthwise convolution follows a norm or an activation"
    return None


def _read(layer: fx.Node) -> fx.Node:
    """What a layer reads, before it was laid out anew or clamped."""
    source = data_inputs(layer)[0]
    while kind_of(source) in ("identity", "layout", None) and not mixes(source) and len(data_inputs(source)) == 1:
        source = data_inputs(source)[0]
    return source


def _leaves(nodes: set[fx.Node], inside: set[fx.Node]) -> str | None:
    """Which of the nodes is read from elsewhere too."""
    for node in nodes:
        if not inside.issuperset(tensor_users(node)):
            return f"{called(node)} is used elsewhere too"
    return None


def _next_layers(layer: fx.Node) -> list[fx.Node]:
    """The layers, residual joins and results that a layer's result goes to."""
    return nearest(tensor_users(layer), tensor_users, lambda node: mixes(node) or "join" in node.meta)


def _activated(layer: fx.Node) -> bool:
    """Whether an activation follows a layer, directly or after a norm."""
    for user in skip_identities(layer, tensor_users):
        following = skip_identities(user, tensor_users) if kind_of(user) == "norm" else [user]
        if any(kind_of(node) in ("activation", "norm_act") for node in following):
            return True
    return False


PATTERN = Pattern(
    "mlp",
    forms=[ops(layer="linear"), ops(layer="conv")],
    edges={
        "hidden": lambda match: (Edge(found(_parts(match.nodes["layer"])).hidden),),
        "output": After("layer"),
        "input": lambda match: into_all(found(_parts(match.nodes["layer"])).first),
    },
    check=lambda match: reason(_parts(match.nodes["layer"])),
)
