"""The level under construction, and what the stand-ins of its forward do to it."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from dropsurgery.capture.levels import Guard, Level, Opaque, like_dict, map_tree
from dropsurgery.capture.nodes import from_input, is_input, traceable, written, written_out
from dropsurgery.capture.traced import Traced, TracedItem, TracedSize, Untraceable
from dropsurgery.graph import add_node

if TYPE_CHECKING:
    from dropsurgery.capture.recorder import Recorder

# What gives as many tensors as a size says.
_BY_SIZE = frozenset({"unbind", "split", "chunk"})
_NOTHING = object()
# Asked by type: `isinstance` of a stand-in asks it for the class of what it stands for, which takes longer.
_STAND_INS = frozenset((Traced, TracedItem))
_CONSTANTS = frozenset((int, float, bool, str, type(None)))
_SETTABLE = _CONSTANTS | {torch.dtype, torch.device}


@dataclass(frozen=True)
class _Given:
    """A list or dict among a forward's arguments: its node, its stand-in now and before, and the caller's own."""

    node: fx.Node
    made: Any
    before: Any
    value: Any


class Frame:
    """The level under construction, and what the stand-ins of its forward do to it."""

    def __init__(self, recorder: Recorder, probe: nn.Module, path: str) -> None:
        self.recorder = recorder
        self.probe = probe
        self.path = path
        self.graph = fx.Graph()
        self.level = Level(recorder.original[probe], path, self.graph, ((), {}))
        self._shapes: dict[fx.Node, TracedSize] = {}
        self._attributes: dict[str, Traced] = {}
        self._index_guards: list[tuple[FrameType, int, fx.Node, int]] = []
        self._region: tuple[Callable[..., Any], int] | None = None
        self._grad_before: bool | None = None
        self.failure: Exception | None = None
        self._containers: list[tuple[str, Any, Any]] = []
        self._by_data: set[fx.Node] = set()
        self._given: list[_Given] = []
        self._set: dict[str, tuple[dict[str, Any], Any]] = {}
        self._binding = False

    # -- guards -----------------------------------------------------------------------------------------------
    def guard(self, node: fx.Node, value: Any, how: str) -> None:
        """Note that Python went by the value of a node."""
        if all(guard.node is not node for guard in self.level.guards):
            self.level.guards.append(Guard(node, value, f"{how} of {node.name} is {value!r}"))

    def environment_guard(self, question: Callable[..., bool], args: tuple[Any, ...], answer: bool) -> None:
        """Note that Python asked torch for a global state."""
        self.guard(self.graph.call_function(question, args), answer, question.__name__)

    def tensor_guard(self, node: fx.Node, name: str, value: Any) -> None:
        """Note that Python asked for the dtype, device or grad flag of a tensor."""
        if name == "requires_grad" and node.op not in {"placeholder", "get_attr"} and not is_input(node):
            raise Untraceable("asks whether an intermediate result requires gradients")
        if node.op == "get_attr" and node.target not in self.level.guarded_tensors:
            self.level.guarded_tensors.append(str(node.target))
        self.guard(self.graph.call_function(getattr, (node, name)), value, name)

    def index_guard(self, caller: FrameType, node: fx.Node, value: int) -> None:
        self._index_guards.append((caller, caller.f_lasti, node, value))

    def _parsed(self, caller: FrameType) -> None:
        """Forget the numbers that torch's argument parser looked at for the call that is being recorded."""
        self._index_guards = [g for g in self._index_guards if g[:2] != (caller, caller.f_lasti)]

    def settle(self) -> None:
        """The numbers that Python took for itself are guards.

        Raises:
            Untraceable: the forward did what has left no trace in the graph.
        """
        for _, _, node, value in self._index_guards:
            self.guard(node, value, "the number")
        self._index_guards.clear()
        if self._by_data and any(self._hangs_on_data(guard.node) for guard in self.level.guards):
            raise Untraceable("decides by sizes that hang on the data")
        if self._region is not None:
            raise Untraceable("leaves torch's state other than it found it")
        if self.failure is not None:
            raise Untraceable(f"goes on after an error: {self.failure}")
        for name, container, before in self._containers:
            if structure(container) != structure(before) and not self._memoized(container, before):
                raise Untraceable(f"changes what its attribute {name!r} holds")

    def _hangs_on_data(self, node: fx.Node) -> bool:
        return node in self._by_data or any(map(self._hangs_on_data, node.all_input_nodes))

    def _memoized(self, container: Any, before: Any) -> bool:
        """Whether a dict only gained tensors that could as well be made anew at each call: no input is in them."""
        if not isinstance(container, dict) or not before.items() <= container.items():
            return False
        gained = [value for key, value in container.items() if key not in before]
        anew = all(isinstance(value, Traced) and not from_input(value._node) for value in gained)
        return anew and not written(self.graph)

    def notes_down(self, name: str, value: Any) -> bool:
        """Whether an attribute is set to a plain value that hangs on nothing but what was taken for granted."""
        if type(value) not in _SETTABLE or ("", name) in self.level.reads:
            return False
        fields = self.probe.__dict__
        self._set.setdefault(name, (fields, fields.get(name, _NOTHING)))
        self.level.sets[name] = value
        return True

    def holds(self, name: str, value: Any) -> bool:
        """Whether an attribute is a plain value, and is set to that very one."""
        held = self.probe.__dict__.get(name, _NOTHING)
        return name not in self._set and type(value) in _SETTABLE and type(held) is type(value) and held == value

    def makes_anew(self, name: str, value: Any) -> bool:
        """Whether an attribute may be set to a value for the time of the recording."""
        fields = self.probe.__dict__
        if not isinstance(value, Traced) or value._frame is not self or from_input(value._node, weights=True):
            return False
        if name in fields["_buffers"]:
            if name not in fields["_non_persistent_buffers_set"]:
                return False
            fields = fields["_buffers"]
        self._set.setdefault(name, (fields, fields.get(name, _NOTHING)))
        return not written(self.graph)

    def close(self) -> None:
        """Put attributes and containers back to what they held, and let go of the stand-ins, which hold this frame."""
        for name, (fields, before) in self._set.items():
            fields.pop(name, None)
            if before is not _NOTHING:
                fields[name] = before
        self._shapes.clear()
        self._attributes.clear()
        for _, container, before in self._containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(before)

    def note_read(self, below: str, name: str, value: Any) -> None:
        """Note that Python read an attribute that is no tensor; what it holds must stay as it is."""
        if (below, name) not in self.level.reads and isinstance(value, (list, dict, set)):
            self._containers.append((name, value, copy.copy(value)))
        read = self.recorder.original.get(value, value) if isinstance(value, nn.Module) else value
        self.level.reads.setdefault((below, name), read)

    def _length_guard(self, node: fx.Node, name: str, value: Any) -> None:
        """Python unpacks as many tensors as there are: another size may give more or fewer."""
        listed = any(isinstance(item, (list, tuple)) for item in node.args[1:])
        if name in _BY_SIZE and not listed and not written_out(node, name):
            self.guard(self.graph.call_function(len, (node,)), len(value), "the number of parts")

    # -- regions: activation checkpoints, blocks without gradients or under autocast -------------------------------
    @contextmanager
    def region(self, rerun: Callable[..., Any]) -> Iterator[None]:
        """Mark what is recorded meanwhile as one region, which `rerun` will call."""
        self.begin_region(rerun)
        yield
        self.end_region()

    def begin_region(self, rerun: Callable[..., Any]) -> None:
        """What is recorded from now on, up to the end of the region, is to be run by `rerun`."""
        if self._region is not None:
            raise Untraceable("a checkpoint, autocast or no_grad block inside another one")
        self._region = (rerun, len(self.graph.nodes))

    def end_region(self) -> None:
        """End the region that was begun last."""
        assert self._region is not None
        rerun, before = self._region
        self._region = None
        nodes = list(self.graph.nodes)[before:]
        for node in nodes:
            node.meta["region"] = len(self.level.regions)
        if nodes:
            self.level.regions.append(rerun)

    def set_grad(self, enabled: bool) -> None:
        """The forward switches the recording of gradients, or switches it back."""
        if self._grad_before is None:
            if enabled != torch.is_grad_enabled():
                self.begin_region(functools.partial(under, torch.set_grad_enabled, (enabled,)))
                self._grad_before = not enabled
        elif enabled == self._grad_before:
            self.end_region()
            self._grad_before = None

    # -- nodes ------------------------------------------------------------------------------------------------
    def shape_of(self, tensor: Traced) -> TracedSize:
        node = tensor._node
        self.level.asks_rank = True
        if node not in self._shapes:
            with torch._C.DisableTorchFunction():
                sizes = tuple(tensor._value.shape)
            shape = add_node(self.graph, "call_function", getattr, (node, "shape"))
            self._shapes[node] = TracedSize(TracedItem(self, shape, index, size) for index, size in enumerate(sizes))
        return self._shapes[node]

    def input(self, node: fx.Node, value: Any) -> Any:
        """The stand-in for an argument; what is no tensor is taken for granted, and compared at each call."""
        node.meta["value"] = value
        if isinstance(value, (bool, int, float)):
            return value
        return self.wrap(node, value)

    def call_function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = self.recorder.values
        return self._record("call_function", function, args, kwargs, lambda a, k: values.of_function(function, a, k))

    def call_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = self.recorder.values
        return self._record("call_method", name, args, kwargs, lambda a, k: values.of_method(name, a, k))

    def guarded_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a method from the example, and note it."""
        answer = self.recorder.values.run(getattr(args[0]._value, name), *self.to_values((args[1:], kwargs)))
        node = self.graph.call_method(name, *self.to_nodes((args, kwargs)))
        self.guard(node, answer, f"{name}()")
        return answer

    def _record(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[..., Any]
    ) -> Any:
        if not traceable(target):
            raise Untraceable(f"calls {target!r}, which a graph cannot name")
        nodes = self.to_nodes((args, kwargs))
        self.recorder.values.drew = False
        try:
            value = compute(*self.to_values((args, kwargs)))
        except Exception as error:
            self.failure = error  # should the forward catch it: it may not be raised at another size
            raise
        if value is NotImplemented:
            return value
        node = add_node(self.graph, op, target, *nodes)
        name = target if op == "call_method" else getattr(target, "__name__", "")
        self._length_guard(node, name, value)
        if name == "bincount":  # as long as the largest number asks for: `Values` takes the length that is given
            self._by_data.add(node)
        if self.recorder.values.drew:
            node.meta["random"] = self.level.random = True
        return self.wrap(node, value)

    def call_child(self, probe: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = self.recorder.relative(probe, self.path)
        values = self.to_values((args, kwargs))
        ours, theirs = _containers_in((args, kwargs)), _containers_in(values)
        before = [copy.copy(container) for container in theirs]
        nodes = self.to_nodes((args, kwargs))
        call, value = self.recorder.record_call(probe, *values)
        passed = {
            id(mine): self._passed(mine)
            for mine, its, was in zip(ours, theirs, before, strict=True)
            if not _same_items(its, was)
        }
        if passed:
            nodes = self._with_passed((args, kwargs), passed)
        node = add_node(self.graph, "call_module", target, *nodes)
        self.level.children[node] = call
        if isinstance(call, Opaque) and call.on_data:
            if _nested(value):
                raise Untraceable(f"goes by how many things '{call.path}' gives, which hangs on the data")
            self._by_data.add(node)
        for mine, its, was in zip(ours, theirs, before, strict=True):
            if id(mine) in passed:
                self._take_back(mine, its, was, passed[id(mine)])
        return self.wrap(node, value)

    # -- lists and dicts that a forward changes for its caller ---------------------------------------------------
    def _passed(self, container: Any) -> fx.Node:
        """A list or dict of this forward as a node: a child changes it, and what it put in is read from the node."""
        nodes = self.to_nodes(container)
        return nodes if isinstance(nodes, fx.Node) else self.graph.call_function(type(container), (nodes,))

    def _with_passed(self, tree: Any, passed: dict[int, fx.Node]) -> Any:
        """The nodes of a call's arguments, where `passed` says which node stands for a container."""
        if id(tree) in passed:
            return passed[id(tree)]
        if type(tree) is dict:
            return {key: self._with_passed(item, passed) for key, item in tree.items()}
        if isinstance(tree, dict):
            return self._own_dict(type(tree), {key: self._with_passed(item, passed) for key, item in tree.items()})
        if type(tree) in (list, tuple):
            return type(tree)(self._with_passed(item, passed) for item in tree)
        return self.to_nodes(tree)

    def _take_back(self, mine: Any, its: Any, was: Any, node: fx.Node) -> None:
        """Do to a container of this forward what a child did to its own view of it."""
        keys = list(its) if isinstance(its, dict) else range(len(its))
        kept = was if isinstance(was, dict) else dict(enumerate(was))
        items = {
            key: mine[key] if key in kept and kept[key] is its[key]
            else self.wrap(self._item(node, key), its[key])
            for key in keys
        }  # fmt: skip
        _refill(mine, items if isinstance(mine, dict) else items.values())

    def give_back(self) -> None:
        """Let the caller see what this forward changed in the lists and dicts that it was given."""
        changed = [given for given in self._given if not _same_items(given.made, given.before)]
        for given in changed:
            if isinstance(given.made, dict):
                if list(given.made)[: len(given.before)] != list(given.before):
                    raise Untraceable("takes keys out of a dict that was given to it")
                for key, item in given.made.items():
                    if key not in given.before or item is not given.before[key]:
                        self.graph.call_function(operator.setitem, (given.node, key, self.to_nodes(item)))
            else:
                self.graph.call_function(operator.setitem, (given.node, slice(None), self.to_nodes(given.made)))
        for given in changed:
            values = self.to_values(given.made)
            _refill(given.value, values)

    # -- between stand-ins, values and nodes ---------------------------------------------------------------------
    def wrap(self, node: fx.Node, value: Any) -> Any:
        """The stand-in for a node; a container is unpacked, so that Python sees its real structure."""
        node.meta["value"] = value
        if type(value) is torch.Size:
            return TracedSize(TracedItem(self, node, index, size) for index, size in enumerate(value))
        if isinstance(value, (list, tuple)):
            items = [self.wrap(self._item(node, i), v) for i, v in enumerate(value)]
            if hasattr(value, "_fields"):
                return type(value)(*items)
            if type(value).__module__ == "torch.return_types":
                return type(value)(items)
            return self._made(node, value, items) if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            named = {key: self.wrap(self._item(node, key), item) for key, item in value.items()}
            return self._made(node, value, named if type(value) is dict else like_dict(type(value), named))
        if isinstance(value, (torch.Tensor, int, float)):
            return Traced(self, node, value)
        if value is None or isinstance(value, (str, torch.dtype, torch.device)):
            return value
        raise Untraceable(f"a value of type {type(value).__name__} travels between modules")

    def _item(self, node: fx.Node, key: Any) -> fx.Node:
        return add_node(self.graph, "call_function", operator.getitem, (node, key))

    def _made(self, node: fx.Node, value: Any, made: Any) -> Any:
        """Remember the lists and dicts among the arguments: the forward may change them for its caller."""
        if self._binding:
            self._given.append(_Given(node, made, copy.copy(made), value))
        return made

    @contextmanager
    def binding(self) -> Iterator[None]:
        """What is wrapped meanwhile are the arguments of the forward."""
        self._binding = True
        yield
        self._binding = False

    def to_nodes(self, tree: Any) -> Any:
        kind = type(tree)
        if kind in _STAND_INS:
            return self._to_node(tree)
        if kind in _CONSTANTS:
            return tree
        if kind in (list, tuple):
            return kind([self.to_nodes(item) for item in tree])
        if isinstance(tree, dict):
            items = {key: self.to_nodes(item) for key, item in tree.items()}
            return items if kind is dict else self._own_dict(kind, items)
        return map_tree(tree, self._to_node)

    def _own_dict(self, kind: type, items: dict[Any, Any]) -> fx.Node:
        """A dict of a class of its own as a node: as an argument of another it would lose its class."""
        if is_dataclass(kind):
            return self.graph.call_function(kind, (), items)
        return self.graph.call_function(kind, (items,))

    def _to_node(self, item: Any) -> Any:
        if type(item) in _STAND_INS:
            if item._frame is not self:
                raise Untraceable("a tensor comes from another module's forward by a way that is no argument")
            return item._node
        if isinstance(item, (int, float, str, bytes, complex, type(None), type(...), torch.dtype, torch.device)):
            return item
        if isinstance(item, (torch.layout, torch.memory_format)):
            return item
        raise Untraceable(f"an argument of type {type(item).__name__} ({item!r:.60})")

    def attribute(self, tensor: torch.Tensor, probe: nn.Module, name: str) -> Traced:
        """The stand-in for a parameter, buffer or plain tensor attribute of this module or of one below it."""
        if probe is not self.probe:
            name = f"{self.recorder.relative(probe, self.path)}.{name}"
        if name not in self._attributes:
            # By hand: `Graph.get_attr` looks the attribute up and warns where it is not found.
            node = self.graph.create_node("get_attr", name)
            # A fake, since the forward may write to it.
            with torch._C.DisableTorchFunction():
                node.meta["value"] = self.recorder.fake(tensor)
            self._attributes[name] = Traced(self, node, node.meta["value"])
        return self._attributes[name]

    def to_values(self, tree: Any) -> Any:
        return map_tree(tree, lambda item: item._value if type(item) in _STAND_INS else item)


def under(context: Callable[..., Any], options: tuple[Any, ...], function: Callable[..., Any], *inputs: Any) -> Any:
    """Call a function within a context manager, made anew."""
    with context(*options):
        return function(*inputs)


def _containers_in(tree: Any) -> list[Any]:
    """The lists and dicts in a call's arguments, in order; the dict of the keyword arguments itself is none."""
    args, kwargs = tree
    return [inner for item in (*args, *kwargs.values()) for inner in _nested(item)]


def _nested(tree: Any) -> list[Any]:
    items = tree.values() if isinstance(tree, dict) else tree if type(tree) in (list, tuple) else ()
    inner = [found for item in items for found in _nested(item)]
    return [tree, *inner] if type(tree) is list or isinstance(tree, dict) else inner


def _same_items(one: Any, other: Any) -> bool:
    """Whether two lists or dicts hold the same objects in the same order."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(item is other[key] for key, item in one.items())
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _refill(container: Any, items: Any) -> None:
    items = items.copy() if isinstance(items, dict) else list(items)
    container.clear()
    (container.update if isinstance(container, dict) else container.extend)(items)


def placeholders(
    frame: Frame, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make the graph's placeholders after the forward's own signature; give the stand-ins to call it with."""
    signature = frame.recorder.signature_of(forward)
    bound = signature.bind(*args, **kwargs)
    for parameter in signature.parameters.values():
        name = parameter.name
        if parameter.kind is parameter.VAR_POSITIONAL:
            values = bound.arguments.get(name, ())
            bound.arguments[name] = tuple(frame.wrap(frame.graph.placeholder(f"*{name}"), values)) if values else ()
            if not values:
                frame.graph.placeholder(f"*{name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            node = frame.graph.placeholder(f"**{name}")
            bound.arguments[name] = frame.wrap(node, dict(bound.arguments.get(name, {})))
        else:
            default = inspect.Signature.empty if parameter.default is parameter.empty else parameter.default
            node = frame.graph.placeholder(name, default_value=default)
            if name in bound.arguments:
                bound.arguments[name] = frame.input(node, bound.arguments[name])
            elif parameter.default is not None:
                node.meta["value"] = parameter.default
    return bound.args, bound.kwargs


def structure(tree: Any) -> Any:
    """A comparable picture of nested containers, the leaves by identity."""
    if isinstance(tree, dict):
        return tuple((key, structure(item)) for key, item in tree.items())
    if isinstance(tree, (list, tuple, set)):
        return tuple(structure(item) for item in tree)
    return id(tree)
