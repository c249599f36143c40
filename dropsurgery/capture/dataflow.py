"""The part of a flat graph that carries the input's data: parameters, sizes and constants left out."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx, nn

from dropsurgery.kinds import holds_tensor, kind_of, tensor_inputs
from dropsurgery.records import TensorFact

# They look at a tensor's shape or dtype and not at its values: all arguments, or all but the first.
_OF_NO_VALUE = {
    *(getattr(torch, f"{what}_like") for what in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
}
_OF_THE_FIRST = {"expand_as", "view_as", "reshape_as", "type_as", "to"}


class Dataflow:
    """Nodes that depend on a placeholder, in topological order, with edges between them only, and their kinds.

    A component of an opaque part whose input is the very tensor of an earlier node (`meta["continues"]`) goes on
    from there.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order: dict[fx.Node, int] = {}
        self.inputs: dict[fx.Node, list[fx.Node]] = {}
        self.users: dict[fx.Node, list[fx.Node]] = {}
        self.kind: dict[fx.Node, str | None] = {}
        self._tensors: dict[fx.Node, list[fx.Node]] = {}
        self._weighted: dict[fx.Node, bool] = {}
        for node in graph.nodes:
            tensors = self._tensors[node] = tensor_inputs(node)
            sources = [source for source in _data_inputs(node, tensors) if source in self.order]
            if _is_source(node) or (sources and holds_tensor(node.meta.get("value"))):
                self.order[node], self.kind[node] = len(self.order), kind_of(node)
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
        known = self._weighted.get(node)
        if known is None:
            module = node.meta.get("module")
            known = any(map(_is_weight, self._others(node))) if module is None else bool(_parameters_of(module))
            self._weighted[node] = known
        return known

    def learns(self, node: fx.Node) -> bool | None:
        """Whether a node's parameters, its own or passed to it, require gradients; None if it has none.

        A constant that scales or shifts is no parameter; the weight of a layer is one, also when it is frozen.
        """
        module = node.meta.get("module")
        if module is not None:
            parameters = _parameters_of(module)
            return any(parameter.requires_grad for parameter in parameters) if parameters else None
        weights = self._passed(node)
        if any(_requires_grad(weight) for weight in weights):
            return True
        return False if weights and kind_of(node) in ("conv", "conv_transpose", "linear", "norm") else None

    def _others(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that an operation takes and that are no data."""
        tensors = self._tensors[node]
        if tensors == self.inputs[node]:  # of most operations
            return []
        return [source for source in tensors if source not in self.order]

    def _passed(self, node: fx.Node) -> list[fx.Node]:
        """The tensors of modules that an operation takes, through what is computed on them before."""
        found, left = [], self._others(node)
        while left:
            source = left.pop()
            found += [source] if source.op == "get_attr" else []
            left += [below for below in self._tensors[source] if below not in self.order]
        return found


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's tensor; None where the value is no single tensor."""
    value: Any = node.meta.get("value")
    return value.shape if isinstance(value, TensorFact) else None


def is_within(path: str, module: str) -> bool:
    """Whether a dotted path is a module's own or that of something inside it; all is inside the root."""
    return not module or path == module or path.startswith(f"{module}.")


@functools.lru_cache(maxsize=4096)
def prefixes(path: str) -> tuple[str, ...]:
    """`a`, `a.b`, `a.b.c` for `a.b.c`; nothing for the root."""
    parts = path.split(".") if path else []
    return tuple(".".join(parts[: end + 1]) for end in range(len(parts)))


def place_of(node: fx.Node) -> str:
    """The path of a leaf, or of the module whose forward holds the operation."""
    path: str = node.meta["path"] if node.op == "call_module" else node.meta["owner"]
    return path


def _parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a leaf; to walk down a tree takes longer, and most leaves have none below them."""
    if module._modules:
        return list(module.parameters())
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _data_inputs(node: fx.Node, tensors: list[fx.Node]) -> list[fx.Node]:
    """The arguments, of those that are tensors, whose values the node's value depends on."""
    before = node.meta.get("continues")
    if before is not None:
        return [before]
    if node.target in _OF_NO_VALUE:
        return []
    return [source for source in tensors if source is node.args[0]] if node.target in _OF_THE_FIRST else tensors


def _is_source(node: fx.Node) -> bool:
    # The input of a lone leaf inside an opaque module is a placeholder of unknown value.
    return node.op == "placeholder" and (holds_tensor(node.meta.get("value")) or bool(node.meta.get("component")))


def _requires_grad(node: fx.Node) -> bool:
    value = node.meta["level_node"].meta.get("value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def _is_weight(node: fx.Node) -> bool:
    value = node.meta.get("value")
    return isinstance(value, TensorFact) and value.dtype.is_floating_point
