"""What the nodes of a level under construction tell: where their numbers come from, and what they change."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import fx

from dropsurgery.graph import works_in_place

# Nodes that the recorder itself makes to unpack containers and shapes; pure, so dropped where nothing uses them.
_UNPACKING = (operator.getitem, getattr)


def is_input(node: fx.Node) -> bool:
    """Whether a node is an element of an argument."""
    while node.op == "call_function" and node.target is operator.getitem:
        (node,) = node.all_input_nodes
    return node.op == "placeholder"


def from_input(node: fx.Node, *, weights: bool = False) -> bool:
    """Whether numbers of an input (or also of the model's own tensors) are in a tensor; its sizes do not count."""
    if not isinstance(node.meta.get("value"), torch.Tensor):
        return False
    if node.op == "placeholder" or "random" in node.meta or (weights and node.op in {"get_attr", "call_module"}):
        return True
    return any(from_input(source, weights=weights) for source in node.all_input_nodes)


def written(graph: fx.Graph) -> bool:
    """Whether an operation in place put numbers of an input into a tensor that had none."""
    for node in graph.nodes:
        if node.target is operator.setitem or works_in_place(node, lambda target: None):
            first, *others = node.all_input_nodes
            if any(map(from_input, others)) and not from_input(first):
                return True
    return False


def written_out(node: fx.Node, name: str) -> bool:
    """Whether the code itself says how many parts there are: `x.reshape(n, 3, c).unbind(1)`."""
    source: Any = node.args[0]
    position = 1 if name == "unbind" else 2
    axis: Any = node.kwargs.get("dim", node.args[position] if len(node.args) > position else 0)
    while isinstance(source, fx.Node) and isinstance(axis, int):
        value = source.meta.get("value")
        if not isinstance(value, torch.Tensor):
            return False
        axis %= value.ndim
        called = source.target if isinstance(source.target, str) else getattr(source.target, "__name__", "")
        given: Any = source.args[1:]
        given = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
        if called in ("reshape", "view"):
            return len(given) == value.ndim and isinstance(given[axis], int) and given[axis] >= 0
        if not all(isinstance(item, int) for item in given):
            return False
        if called == "permute":
            axis = given[axis]
        elif called == "transpose":
            first, second = (item % value.ndim for item in given)
            axis = {first: second, second: first}.get(axis, axis)
        else:
            return False
        source = source.args[0]
    return False


def traceable(target: Any) -> bool:
    """Whether generated code can name a function: it must live in a module, under its own name."""
    if isinstance(target, str):
        return True
    name = getattr(target, "__name__", "<lambda>")
    home = sys.modules.get(getattr(target, "__module__", None) or "torch")
    return name.isidentifier() and ("<locals>" not in getattr(target, "__qualname__", name) or hasattr(home, name))


def drop_unused(graph: fx.Graph, kept: set[fx.Node]) -> None:
    """Erase the nodes that only unpacked something which nobody used."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node not in kept and (node.op == "get_attr" or node.target in _UNPACKING):
            graph.erase_node(node)
