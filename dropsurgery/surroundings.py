"""What a tensor goes to in the graph while its channels are still apart."""

from __future__ import annotations

from torch import fx

from dropsurgery.kinds import conv_fact, kinds_of, mixes, tensor_users
from dropsurgery.records import Behind, Edge

_NORMS = frozenset(("batch_norm", "batch_norm_act"))


def behind(at: Edge) -> Behind:
    """Follow the tensor on an edge up to the layers that mix its channels: which norms see it, which stream it is.

    A depthwise convolution keeps channels apart, and so do activations, poolings, products, sums and concatenations.
    A residual stream is what a later residual addition adds to: the tensor that its branch forks off from, or its
    shortcut. The end of a branch is none; it is followed up to its addition.
    """
    streams = {node.meta["join"].fork: node for node in at.node.graph.nodes if _adds_to_stream(node)}
    norms: dict[str, None] = {}
    # A node's output is all its users'; one argument of a node is that node's alone.
    ways = [(at.source, at.node)] if at.operand is not None else _ways(at.node)
    stream = "" if at.operand is not None else _path(streams.get(at.node))
    seen: set[fx.Node] = set()
    while ways:
        source, node = ways.pop(0)
        if _adds_to_stream(node) and node.args[node.meta["join"].shortcut] is source:
            stream = stream or _path(node)
        if node in seen or _ends(node):
            continue
        seen.add(node)
        if not _NORMS.isdisjoint(kinds_of(node)):
            norms[_path(node)] = None
        stream = stream or _path(streams.get(node))
        ways += _ways(node)
    return Behind(tuple(norms), stream)


def _ways(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    return [(node, user) for user in tensor_users(node)]


def _path(node: fx.Node | None) -> str:
    return "" if node is None else str(node.meta["path"])


def _adds_to_stream(node: fx.Node) -> bool:
    """Whether a node is a residual addition with a shortcut."""
    join = node.meta.get("join")
    return join is not None and join.shortcut is not None


def _ends(node: fx.Node) -> bool:
    """Whether the channels are mixed here, or added to others'."""
    if node.op == "output" or "join" in node.meta:
        return True
    fact = conv_fact(node)
    depthwise = fact is not None and fact.groups == fact.out_channels > 1
    return mixes(node) and not depthwise
