"""The only place that changes an fx graph: insert after a node, on one edge, put a call in place of a node, carve.

y = f(x); g(y); h(y)      insert_after(f)       y = f(x); z = new(y); g(z); h(z)
y = f(x); g(y); h(y)      insert_on(g, 0)       y = f(x); z = new(y); g(z); h(y)
z = x + y; g(z)           combine(add)          z = new(x, y); g(z)
y = f(x); g(y)            swap(f)               y = new(x); g(y)

An insertion may leave out some users, or serve several of them by one call.
"""

from __future__ import annotations

import functools
import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import fx, nn

LocalName = tuple[str, int]
"""How a node is called within its graph, over captures: what it calls, and which such call it is."""

_AUGMENTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor")
IN_PLACE = frozenset(getattr(operator, f"i{name}") for name in _AUGMENTED)
"""The functions of `operator` that change a tensor: all that augment but `@=`, which makes a new one."""


def add_node(
    graph: fx.Graph, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> fx.Node:
    """`Graph.create_node` in half its time: that one looks for symbolic numbers in all arguments, where none can be."""
    node = graph.create_node(op, target, name=_word(target if isinstance(target, str) else target.__name__))
    _set_args(node, args)
    if kwargs:
        _set_kwargs(node, kwargs)
    return node


# What assigning these does, without `Node.__setattr__`, which looks whether something else is assigned.
_set_args: Callable[[fx.Node, Any], None] = fx.Node.args.fset  # type: ignore[attr-defined]
_set_kwargs: Callable[[fx.Node, Any], None] = fx.Node.kwargs.fset  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4096)
def _word(called: str) -> str:
    """What fx names a node after: the name of what it calls, as a Python word in snake case."""
    word = called[2:-2] if called.startswith("__") and called.endswith("__") else called
    snake = re.sub("(?<=[a-z])([A-Z])", r"_\1", word).lower()
    return re.sub("[^0-9a-zA-Z_]+", "_", snake)


def local_names(graph: fx.Graph) -> dict[LocalName, fx.Node]:
    """Every node of a graph by its stable name."""
    counts: Counter[str] = Counter()
    names: dict[LocalName, fx.Node] = {}
    for node in graph.nodes:
        called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        names[called, counts[called]] = node
        counts[called] += 1
    return names


def local_name(node: fx.Node) -> LocalName:
    """The stable name of one node."""
    return next(name for name, other in local_names(node.graph).items() if other is node)


def insert_after(
    node: fx.Node, target: str, *, module_of: Callable[[str], nn.Module], but: Collection[fx.Node] = ()
) -> fx.Node:
    """Call a module on the output of a node, for all its users except `but`.

    Where the node works in place, whoever reads the changed tensor under its old name later is a user too.
    """
    aliases = _aliases(node, module_of)
    with node.graph.inserting_after(node):
        made = node.graph.call_module(target, (node,))
    for alias in (node, *aliases):
        for user in list(alias.users):
            if user is not made and node < user and user not in but:
                user.replace_input_with(alias, made)
    return made


Operand = int | tuple[int, int]


def insert_on(
    node: fx.Node,
    operand: Operand,
    target: str,
    *,
    module_of: Callable[[str], nn.Module],
    also: Iterable[tuple[fx.Node, Operand]] = (),
) -> fx.Node:
    """Call a module on one argument of a node; all other users of that value keep it as it is.

    Where the node changes that argument in place, its result is written to the tensor that the others hold. `also` are
    arguments of later nodes, which take the result of the same call if they take the same value.
    """
    source = argument_of(node, operand)
    with node.graph.inserting_before(node):
        made = node.graph.call_module(target, (source,))
        if operand == 0 and works_in_place(node, module_of):
            made = node.graph.call_function(write_back, (source, made))
    for user, position in ((node, operand), *also):
        if argument_of(user, position) is source:
            _give(user, position, made)
    return made


def argument_of(node: fx.Node, operand: Operand) -> fx.Node:
    """The node whose value is an argument of another one."""
    outer, inner = operand if isinstance(operand, tuple) else (operand, None)
    argument: Any = node.args[outer]
    found: fx.Node = argument if inner is None else argument[inner]
    return found


def _give(node: fx.Node, operand: Operand, made: fx.Node) -> None:
    outer, inner = operand if isinstance(operand, tuple) else (operand, None)
    argument: Any = node.args[outer]
    node.update_arg(outer, made if inner is None else [*argument[:inner], made, *argument[inner + 1 :]])


def give_more(made: fx.Node, tensors: Iterable[fx.Node]) -> None:
    """Let the call that an insertion made take further tensors."""
    call = made.all_input_nodes[1] if made.target is write_back else made
    call.args = (*call.args, *tensors)


def combine(node: fx.Node, target: str, *, module_of: Callable[[str], nn.Module]) -> fx.Node:
    """Call a module on the operands of a sum, in place of it.

    Where the sum works in place, the result is written to the tensor that others hold.
    """
    operands = node.args[:2]
    with node.graph.inserting_before(node):
        made = call = node.graph.call_module(target, operands)
        call.meta["instead_of"] = (node.op, node.target)
        if works_in_place(node, module_of):
            made = node.graph.call_function(write_back, (operands[0], call))
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    return made


def swap(node: fx.Node, target: str) -> fx.Node:
    """Call another module on what a module is called with."""
    node.meta["instead_of"] = (node.op, node.target)
    node.target = target
    return node


def write_back(tensor: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """Give a tensor the numbers of another one, for all who hold it: the next operation works on it in place."""
    return tensor if changed is tensor else tensor.copy_(changed)


def build_result(graph: fx.Graph) -> None:
    """Let calls make the named tuples of a graph's result: not every torch writes code for them that runs."""
    output = graph.output_node()

    def made(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: made(value) for key, value in item.items()}
        if not isinstance(item, (list, tuple)):
            return item
        items = [made(value) for value in item]
        if hasattr(item, "_fields"):
            return graph.call_function(type(item), tuple(items))
        return items if isinstance(item, list) else tuple(items)

    with graph.inserting_before(output):
        output.args = (made(output.args[0]),)


def undo(node: fx.Node) -> None:
    """Undo an edit: what stood in the place of its call stands there again, or nothing."""
    before = node.meta.pop("instead_of", None)
    if before is not None:
        node.op, node.target = before
    writes = [user for user in node.users if user.target is write_back]
    for write in writes:
        write.replace_all_uses_with(node)
        node.graph.erase_node(write)
    if before is None:
        node.replace_all_uses_with(node.all_input_nodes[0])
        node.graph.erase_node(node)


def _aliases(node: fx.Node, module_of: Callable[[str], nn.Module]) -> list[fx.Node]:
    """The nodes whose tensor is the very one that this node changed in place."""
    found = []
    while works_in_place(node, module_of) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        found.append(node)
    return found


def works_in_place(node: fx.Node, module_of: Callable[[str], Any]) -> bool:
    """Whether a node changes its first argument; `module_of` gives the module that a target calls."""
    if node.op == "call_module":
        return bool(getattr(module_of(str(node.target)), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    name = getattr(node.target, "__name__", "")
    return (
        node.target in IN_PLACE
        or bool(node.kwargs.get("inplace", False))
        or (name.endswith("_") and not name.endswith("__"))
    )


def carve(graph: fx.Graph, nodes: Iterable[fx.Node], target: str) -> fx.Graph:
    """Move some nodes into a graph of their own, and call it as one module in their place.

    Args:
        graph: what the nodes are taken from.
        nodes: in order; nothing between them may depend on them.
        target: the name under which the new graph will be called.

    Returns:
        the new graph: its placeholders are what the nodes took from outside, its output what others take from them.
    """
    inside = list(nodes)
    inputs = list(dict.fromkeys(i for n in inside for i in n.all_input_nodes if i not in inside))
    outputs = [n for n in inside if any(user not in inside for user in n.users)]
    carved = fx.Graph()
    moved = {node: carved.placeholder(node.name) for node in inputs}
    for node in inside:
        moved[node] = carved.node_copy(node, lambda n: moved[n])
    single = len(outputs) == 1
    carved.output(moved[outputs[0]] if single else tuple(moved[n] for n in outputs))
    with graph.inserting_after(inside[-1]):
        call = graph.call_module(target, tuple(inputs))
    for index, node in enumerate(outputs):
        result = call
        if not single:
            with graph.inserting_after(call):
                result = graph.call_function(operator.getitem, (call, index))
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(inside):
        graph.erase_node(node)
    return carved
