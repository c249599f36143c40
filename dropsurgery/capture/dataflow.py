"""The part of a flat graph that carries the input's data: parameters, sizes and constants left out."""

from __future__ import annotations

from typing import Any

from torch import fx

from dropsurgery.kinds import holds_tensor, tensor_inputs
from dropsurgery.records import TensorFact


class Dataflow:
    """Nodes that depend on a placeholder, in topological order, with edges between them only."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order: dict[fx.Node, int] = {}
        self.inputs: dict[fx.Node, list[fx.Node]] = {}
        self.users: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            sources = [source for source in tensor_inputs(node) if source in self.order]
            if _is_source(node) or (sources and holds_tensor(node.meta.get("value"))):
                self.order[node] = len(self.order)
                self.inputs[node], self.users[node] = sources, []
                for source in sources:
                    self.users[source].append(node)
            elif node.op == "output":
                self.results: list[fx.Node] = sources

    def closure(self, start: set[fx.Node]) -> set[fx.Node]:
        """`start` and all that depends on it."""
        reached = set(start)
        for node in self.order:
            if any(source in reached for source in self.inputs[node]):
                reached.add(node)
        return reached

    def ancestors(self, start: set[fx.Node]) -> set[fx.Node]:
        """`start` and all that it depends on."""
        reached = set(start)
        for node in reversed(self.order):
            if any(user in reached for user in self.users[node]):
                reached.add(node)
        return reached

    def weighted(self, node: fx.Node) -> bool:
        """Whether the node has parameters, its own or passed to it (`F.conv2d`, a layer scale)."""
        module = node.meta.get("module")
        if module is not None:
            return next(module.parameters(), None) is not None
        return any(_is_weight(source) for source in tensor_inputs(node) if source not in self.order)


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's tensor; None where the value is no single tensor."""
    value: Any = node.meta.get("value")
    return value.shape if isinstance(value, TensorFact) else None


def _is_source(node: fx.Node) -> bool:
    # The input of a lone leaf inside an opaque module is a placeholder of unknown value.
    return node.op == "placeholder" and (holds_tensor(node.meta.get("value")) or bool(node.meta.get("component")))


def _is_weight(node: fx.Node) -> bool:
    value = node.meta.get("value")
    return isinstance(value, TensorFact) and value.dtype.is_floating_point
