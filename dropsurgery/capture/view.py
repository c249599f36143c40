"""The flat view: all levels inlined into one graph, to match on and to take facts from.

Every node knows where it lives: `meta` holds `owner` (path of the innermost module whose forward holds it),
`path` and `call` (its stable name), `level_node` (the node of the owner's own graph), `module` (of a leaf),
`value` (shapes and dtypes on the example input), `given` (to or by a part that stays Python) and `identity`
(a stochastic layer that is silent in eval). What an opaque forward calls is in no graph of its owner: it has no
`level_node`, and a leaf there has the `inputs` of its call.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.dropout import _DropoutNd

from dropsurgery.capture.levels import Inputs, Leaf, Level, Opaque, map_tree
from dropsurgery.graph import add_node
from dropsurgery.records import TensorFact

Call = Level | Opaque | Leaf


@dataclass(frozen=True)
class FlatView:
    """One graph of the whole model. `levels` holds every recorded level by the path of its module."""

    graph: fx.Graph
    levels: dict[str, list[Level]]
    opaque: tuple[Opaque, ...]

    def release(self) -> None:
        """Let go of the model's modules now: a graph is one large cycle, which is freed when garbage is collected."""
        self.graph.owning_module = None
        for node in self.graph.nodes:
            node.meta.pop("module", None)


def flat_view(root: Call, inputs: Inputs = ((), {}), *, inline: Callable[[Level], bool] | None = None) -> FlatView:
    """Inline the levels of a recorded call.

    Args:
        root: what was recorded.
        inputs: the example that it was called with; asked for where the root is opaque.
        inline: whether a level may be inlined; what may not stays one `call_module` node. By default all are but
            the silent stochastic layers, and the children of opaque modules follow as components of their own.
    """
    builder = _Builder(inline)
    builder.root(root, inputs)
    return FlatView(builder.graph, builder.levels, tuple(builder.opaque))


def fact_of(value: Any) -> Any:
    """The value of a node as plain facts: `TensorFact` for tensors, through containers."""
    if type(value) is FakeTensor:
        return _tensor_fact(tuple(value.shape), value.dtype)
    return map_tree(value, lambda v: _tensor_fact(tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else v)


# Most of a net's tensors are of a few shapes.
_tensor_fact = functools.lru_cache(maxsize=1024)(TensorFact)


class _Builder:
    def __init__(self, inline: Callable[[Level], bool] | None) -> None:
        self._may_inline = inline or _speaks
        self._components = inline is None
        self.graph = fx.Graph()
        self.levels: dict[str, list[Level]] = {}
        self.opaque: list[Opaque] = []
        self._given: dict[int, fx.Node] = {}
        self._lone: Counter[str] = Counter()
        self._first_calls: dict[str, dict[str, int]] = {}  # of layers, by owner
        self._calls: Counter[str] = Counter()

    def root(self, call: Call, inputs: Inputs) -> None:
        """The model's own call, whose result is the graph's output."""
        self.graph.output(self._start(call, inputs, None))

    def _start(self, call: Call, inputs: Inputs, output: Any, component: str | None = None) -> Any:
        """A call that is fed by placeholders: the root, or a child that an opaque module called (a component)."""
        if isinstance(call, Level):
            env = {}
            for node in call.graph.find_nodes(op="placeholder"):
                name = str(node.target) if component is None else str(node.target).lstrip("*")
                env[node] = self._copy(node, "placeholder", name, node.args, {}, call.path)
                env[node].meta["component"] = component
                if component is not None:
                    self._continue(env[node], node.meta.get("value"))
            return self._inline(call, env)
        values = (*inputs[0], *inputs[1].values())
        fed = [self._copy(None, "placeholder", f"input{index}", (), {}, call.path) for index in range(len(values))]
        for node, value in zip(fed, values, strict=True):
            node.meta.update(value=fact_of(value), component=component)
            self._continue(node, value)
        result = self._call(call, None, "", tuple(fed), {})
        result.meta.update(value=fact_of(output), inputs=inputs)
        self._name(result, self._lone)
        return result

    def _continue(self, node: fx.Node, value: Any) -> None:
        """Note where the tensor of a component's placeholder comes from, if an opaque forward only passed it on."""
        if id(value) in self._given:
            node.meta["continues"] = self._given[id(value)]

    def _give(self, made: Any, value: Any) -> None:
        """Note which node a tensor comes from, before an opaque forward passes it on."""
        if isinstance(made, fx.Node) and isinstance(value, torch.Tensor):
            self._given[id(value)] = made
            made.meta["given"] = True
        elif isinstance(made, dict) and isinstance(value, dict):
            for key, item in made.items():
                self._give(item, value.get(key))
        elif isinstance(made, (list, tuple)) and isinstance(value, (list, tuple)):
            for item, part in zip(made, value, strict=False):
                self._give(item, part)

    def _inline(self, level: Level, env: dict[fx.Node, Any]) -> Any:
        """Copy a level's nodes; `env` maps its nodes to nodes (or containers of nodes) of the flat graph."""
        self.levels.setdefault(level.path, []).append(level)
        names: Counter[str] = Counter()
        result = None
        for node in level.graph.nodes:
            if node.op == "placeholder":
                continue
            args, kwargs = _resolve(node.args, env), _resolve(node.kwargs, env) if node.kwargs else {}
            if node.op == "output":
                result = args[0]
            elif node.op == "call_module":
                child = level.children[node]
                env[node] = self._call(child, node, level.path, args, kwargs)
                if not (isinstance(child, Level) and self._may_inline(child)):  # else its result has its number already
                    self._name(env[node], names)
                    self._tell_owners_apart(env[node])
            elif node.op == "call_function" and self._is_unpacked(level, node, args):
                self._unpack(node, args, kwargs, env)
            else:
                target = f"{level.path}.{node.target}".lstrip(".") if node.op == "get_attr" else node.target
                env[node] = self._copy(node, node.op, target, args, kwargs, level.path)
                self._name(env[node], names)
        return result

    def _is_unpacked(self, level: Level, node: fx.Node, args: tuple[Any, ...]) -> bool:
        """Whether a function only arranges in a container what is in the flat graph without it."""
        target = node.target
        if target is operator.getitem:
            return isinstance(args[0], (list, tuple, dict))
        if target is operator.setitem:
            return isinstance(args[0], (list, dict))
        if not isinstance(target, type):
            return False
        # The class of a dict does not matter here; and where a child changes a container, it is inlined, and does so.
        own_dict = self._components and issubclass(target, dict) and target is not dict
        return own_dict or (target in (list, dict) and self._inlines_users(level, node))

    @staticmethod
    def _unpack(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], env: dict[fx.Node, Any]) -> None:
        """Do here what a node does with a container."""
        if node.target is operator.getitem:
            env[node] = args[0][args[1]]
        elif node.target is operator.setitem:
            args[0][args[1]] = args[2]
        else:
            env[node] = args[0] if node.target in (list, dict) else dict(*args, **kwargs)

    def _inlines_users(self, level: Level, node: fx.Node) -> bool:
        calls = [level.children[user] for user in node.users if user in level.children]
        return all(isinstance(call, Level) and self._may_inline(call) for call in calls)

    def _call(self, call: Call, node: fx.Node | None, owner: str, args: Any, kwargs: Any) -> Any:
        if isinstance(call, Level) and self._may_inline(call):
            return self._inline(call, _bind(call, args, kwargs))
        made = self._copy(node, "call_module", call.path, args, kwargs, owner)
        made.meta.update(path=call.path, module=call.module)
        if isinstance(call.module, (_DropoutNd, nn.Identity)) or (isinstance(call, Level) and not _speaks(call)):
            made.meta["identity"] = True
        if isinstance(call, Opaque):
            made.meta.update(opaque=True, reason=call.reason, line=call.line)
            self.opaque.append(call)
            self._give((args, kwargs), call.inputs)
            for part in call.components if self._components else ():
                self._give(self._start(part.call, part.inputs, part.output, part.call.path), part.output)
        return made

    def _copy(self, node: fx.Node | None, op: str, target: Any, args: Any, kwargs: Any, owner: str) -> fx.Node:
        made = add_node(self.graph, op, target, tuple(args), dict(kwargs))
        name = target if isinstance(target, str) else getattr(target, "__name__", None) or str(target)
        meta = made.meta
        meta["owner"], meta["call"] = owner, 0
        meta["path"] = f"{owner}.{name}" if owner and op != "get_attr" else name
        if node is not None:
            given = node.meta
            if "fact" not in given:  # graphs are shared
                given["fact"] = fact_of(given.get("value"))
            meta["level_node"], meta["value"] = node, given["fact"]
            if "random" in given:
                meta["random"] = True
        return made

    @staticmethod
    def _name(made: Any, names: Counter[str]) -> None:
        """Number the nodes of one name within their owner."""
        if isinstance(made, fx.Node):
            meta = made.meta
            path = meta["path"]
            meta["call"] = count = names.get(path, 0)
            names[path] = count + 1

    def _tell_owners_apart(self, made: fx.Node) -> None:
        """Number the calls of one layer on from owner to owner; a forward that runs again has the numbers it had."""
        meta = made.meta
        path, owner, count = meta["path"], meta["owner"], meta["call"]
        first = self._first_calls.setdefault(path, {})
        if owner not in first:
            first[owner] = self._calls[path]
        meta["call"] = call = first[owner] + count
        self._calls[path] = max(self._calls[path], call + 1)


def _speaks(level: Level) -> bool:
    """Not a stochastic layer: one that looks at its mode, and in eval does nothing but hand its input on."""
    if not level.reads_training:
        return True
    (output,) = level.graph.find_nodes(op="output")
    first = next(iter(level.graph.nodes))
    return not (output.args[0] is first and first.op == "placeholder")


def _resolve(tree: Any, env: dict[fx.Node, Any]) -> Any:
    if len(tree) == 1 and type(tree) is tuple and type(tree[0]) is fx.Node:  # half of all
        return (env[tree[0]],)
    return map_tree(tree, lambda item: env[item] if isinstance(item, fx.Node) else item)


def _bind(level: Level, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[fx.Node, Any]:
    """What each placeholder of a level stands for in a call with these arguments."""
    env: dict[fx.Node, Any] = {}
    left, named = list(args), dict(kwargs)
    for node in level.graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if name.startswith("**"):
            env[node] = named
        elif name.startswith("*"):
            env[node], left = tuple(left), []
        elif left:
            env[node] = left.pop(0)
        else:
            env[node] = named.pop(name, node.args[0] if node.args else None)
    return env
