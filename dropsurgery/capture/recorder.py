"""Recording: one graph for each module of the tree, one level deep, made by running each forward once.

The forwards run on a throw-away copy of the tree (a probe) under fake tensors: nothing of the model given is
touched, patched or computed. Each call of a child becomes one `call_module` node of its caller's graph and,
unless the child is a leaf, a level of its own. A forward that cannot be recorded stays opaque, and only that:
it is run once more on plain fake values so that its children are recorded all the same.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from dropsurgery.capture.traced import OPERATORS, Traced, TracedSize, Untraceable
from dropsurgery.capture.values import Values
from dropsurgery.errors import CaptureError
from dropsurgery.trees import HOOKS, copy_tree, own_class, paths_of

# Kinds whose subclasses are one operation to a reader, whatever their forward does inside.
_ATOMS = (_ConvNd, _NormBase, _DropoutNd, nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.RNNBase)
# Modules of torch.nn that only arrange others.
_ARRANGERS = ("torch.nn.modules.container", "torch.nn.modules.transformer")
_LOCK = threading.RLock()


class ModelFailed(Exception):
    """The model's own forward raised on plain values: its error is the cause."""


@dataclass(frozen=True, eq=False)
class Guard:
    """Something that Python decided on while recording: the graph holds where `node` has this value again."""

    node: fx.Node
    value: Any
    reason: str


@dataclass(eq=False)
class Level:
    """One forward of one module as a graph one level deep, and all that it took for granted.

    `module` is the module of the model given. `guards` are what Python decided from the example's sizes, dtypes
    or devices: where there are any, the graph holds for inputs of the same signature only.
    `reads` are the plain attributes that were read, `children` what each `call_module` node calls, `regions`
    the activation checkpoints (a node's `meta["region"]` is an index into them).
    """

    module: nn.Module
    path: str
    graph: fx.Graph
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    guards: list[Guard] = field(default_factory=list)
    guarded_tensors: list[str] = field(default_factory=list)
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    children: dict[fx.Node, Level | Opaque | Leaf] = field(default_factory=dict)
    regions: list[Callable[..., Any]] = field(default_factory=list)
    random: bool = False
    output: Any = None

    @property
    def reads_training(self) -> bool:
        """Whether Python looked at a `training` flag: the graph then holds for one mode only."""
        return any(name == "training" for _, name in self.reads)


@dataclass(eq=False)
class Opaque:
    """A call whose forward stays Python: why, and the levels of the children that it called."""

    module: nn.Module
    path: str
    reason: str
    components: list[Level | Opaque | Leaf] = field(default_factory=list)


@dataclass(eq=False)
class Leaf:
    """A call of a module that is one operation."""

    module: nn.Module
    path: str


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one operation: torch's own layers and every subclass of a weighted one."""
    if isinstance(module, _ATOMS):
        return True
    home = next((cls for cls in own_class(module).__mro__ if "forward" in vars(cls)), nn.Module)
    return home.__module__.startswith("torch.nn.") and not home.__module__.startswith(_ARRANGERS)


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
        self._in_region = False

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
        if name == "requires_grad" and node.op not in {"placeholder", "get_attr"} and not _is_input(node):
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
        """The numbers that Python took for itself are guards."""
        for _, _, node, value in self._index_guards:
            self.guard(node, value, "the number")
        self._index_guards.clear()

    # -- activation checkpoints ---------------------------------------------------------------------------------
    @contextmanager
    def region(self, rerun: Callable[..., Any]) -> Iterator[None]:
        """Mark what is recorded meanwhile as one checkpointed region, which `rerun` will call."""
        if self._in_region:
            raise Untraceable("a checkpoint inside a checkpoint")
        self._in_region = True
        before = len(self.graph.nodes)
        yield
        for node in list(self.graph.nodes)[before:]:
            node.meta["region"] = len(self.level.regions)
        self.level.regions.append(rerun)
        self._in_region = False

    # -- nodes ------------------------------------------------------------------------------------------------
    def shape_of(self, tensor: Traced) -> TracedSize:
        node = tensor._node
        if node not in self._shapes:
            with torch._C.DisableTorchFunction():
                sizes = tuple(tensor._value.shape)
            shape = self.graph.call_function(getattr, (node, "shape"))
            items = [self.graph.call_function(operator.getitem, (shape, i)) for i in range(len(sizes))]
            self._shapes[node] = TracedSize(
                Traced(self, item, size) for item, size in zip(items, sizes, strict=True)
            )
        return self._shapes[node]

    def input(self, node: fx.Node, value: Any) -> Any:
        """The stand-in for an argument; what is no tensor is taken for granted, and compared at each call."""
        node.meta["value"] = value
        if isinstance(value, (bool, int, float)):
            return value
        return self.wrap(node, value)

    def call_function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = self.recorder.values
        return self._record(
            "call_function", function, args, kwargs, lambda a, k: values.of_function(function, a, k)
        )

    def call_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = self.recorder.values
        return self._record(
            "call_method", name, args, kwargs, lambda a, k: values.run(getattr(a[0], name), a[1:], k)
        )

    def guarded_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a method from the example, and note it."""
        answer = self.recorder.values.run(getattr(args[0]._value, name), *self.to_values((args[1:], kwargs)))
        node = self.graph.call_method(name, *self.to_nodes((args, kwargs)))
        self.guard(node, answer, f"{name}()")
        return answer

    def _record(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[..., Any]
    ) -> Any:
        if not _traceable(target):
            raise Untraceable(f"calls {target!r}, which a graph cannot name")
        nodes = self.to_nodes((args, kwargs))
        self.recorder.values.drew = False
        value = compute(*self.to_values((args, kwargs)))
        if value is NotImplemented:
            return value
        node = self.graph.create_node(op, target, *nodes)
        if self.recorder.values.drew:
            node.meta["random"] = self.level.random = True
        return self.wrap(node, value)

    def call_child(self, probe: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = self.recorder.relative(probe, self.path)
        nodes = self.to_nodes((args, kwargs))
        call, value = self.recorder.record_call(probe, *self.to_values((args, kwargs)))
        node = self.graph.create_node("call_module", target, *nodes)
        self.level.children[node] = call
        return self.wrap(node, value)

    # -- between stand-ins, values and nodes ---------------------------------------------------------------------
    def wrap(self, node: fx.Node, value: Any) -> Any:
        """The stand-in for a node; a container is unpacked, so that Python sees its real structure."""
        node.meta["value"] = value
        if type(value) is torch.Size:
            items = [self.wrap(self.graph.call_function(operator.getitem, (node, i)), v) for i, v in enumerate(value)]
            return TracedSize(items)
        if isinstance(value, (list, tuple)):
            items = [self.wrap(self.graph.call_function(operator.getitem, (node, i)), v) for i, v in enumerate(value)]
            if hasattr(value, "_fields"):
                return type(value)(*items)
            return items if isinstance(value, list) else tuple(items)
        if type(value) is dict:
            return {
                key: self.wrap(self.graph.call_function(operator.getitem, (node, key)), item)
                for key, item in value.items()
            }
        if isinstance(value, (torch.Tensor, int, float)):
            return Traced(self, node, value)
        if value is None or isinstance(value, (str, torch.dtype, torch.device)):
            return value
        raise Untraceable(f"a value of type {type(value).__name__} travels between modules")

    def to_nodes(self, tree: Any) -> Any:
        return map_tree(tree, self._to_node)

    def _to_node(self, item: Any) -> Any:
        if type(item) is Traced:
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
            node.meta["value"] = tensor
            self._attributes[name] = Traced(self, node, tensor)
        return self._attributes[name]

    def to_values(self, tree: Any) -> Any:
        return map_tree(tree, lambda item: item._value if type(item) is Traced else item)


def _is_input(node: fx.Node) -> bool:
    """Whether a node is an element of an argument."""
    while node.op == "call_function" and node.target is operator.getitem:
        (node,) = node.all_input_nodes
    return node.op == "placeholder"


def _traceable(target: Any) -> bool:
    """Whether generated code can name a function: it must live in a module, under its own name."""
    if isinstance(target, str):
        return True
    module = getattr(target, "__module__", None) or "torch"
    name = getattr(target, "__name__", "<lambda>")
    return bool(name.isidentifier() and "<locals>" not in getattr(target, "__qualname__", name) and module)


def map_tree(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """Apply a function to the leaves of nested tuples, lists, dicts and slices."""
    kind = type(tree)
    if kind is Traced:
        return leaf(tree)
    if kind in (tuple, TracedSize, torch.Size):
        return tuple(map_tree(item, leaf) for item in tree)
    if kind in (list, immutable_list):
        return [map_tree(item, leaf) for item in tree]
    if kind in (dict, immutable_dict):
        return {key: map_tree(item, leaf) for key, item in tree.items()}
    if kind is slice:
        return slice(map_tree(tree.start, leaf), map_tree(tree.stop, leaf), map_tree(tree.step, leaf))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return kind(*(map_tree(item, leaf) for item in tree))
    return leaf(tree)


class Recorder(TorchFunctionMode):
    """Records the calls of one model. Use through `record`."""

    def __init__(self, root: nn.Module, training: bool) -> None:
        super().__init__()
        copies = copy_tree(root, _probe, share_tensors=False)
        self.root = copies[root]
        self.original = {copy: module for module, copy in copies.items()}
        self.values = Values()
        self.frames: list[Frame] = []
        self._opaque: list[Opaque] = []
        self._paths = paths_of(self.root)
        for probe in self.original:
            fields = probe.__dict__
            fields["_own_forward"] = fields.pop("forward", None)
            fields["forward"] = _Intercepted(probe)
            fields["training"] = training
            fields["_recorder"] = self
            for name in HOOKS:
                hooks = probe.__dict__.get(name)
                if isinstance(hooks, dict):
                    hooks.clear()

    def fake(self, tree: Any) -> Any:
        """The tree with each tensor replaced by a fake one of the same shape, dtype, device and grad flag."""

        def leaf(item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            with torch.no_grad(), self.values:
                made = torch.empty_like(item, dtype=item.dtype, device=item.device)
            return made.requires_grad_(item.requires_grad)

        return map_tree(tree, leaf)

    # -- names ------------------------------------------------------------------------------------------------
    def relative(self, probe: nn.Module, owner: str) -> str:
        below = _below(self._paths[probe], owner)
        if not below:
            raise Untraceable(f"calls module '{self._paths[probe][0]}', which is not below it")
        return below

    # -- calls ------------------------------------------------------------------------------------------------
    def record_call(self, probe: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Record one call on plain fake values: what was called, and the value that it gave."""
        path = self._paths[probe][0]
        module = self.original[probe]
        forward = _forward_of(probe)
        if is_leaf(module):
            with self.aside():
                return Leaf(module, path), self.values.of_leaf(module, forward, args, kwargs)
        frame = Frame(self, probe, path)
        try:
            return frame.level, self._run_level(frame, forward, args, kwargs)
        except ModelFailed:
            raise
        except Exception as error:
            return self._run_opaque(probe, path, error, args, kwargs)

    def _run_level(self, frame: Frame, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame.level.inputs = (args, kwargs)
        traced_args, traced_kwargs = _placeholders(frame, forward, args, kwargs)
        before = _structure((traced_args, traced_kwargs))
        self.frames.append(frame)
        try:
            with self:
                result = forward(*traced_args, **traced_kwargs)
        finally:
            self.frames.pop()
        frame.settle()
        if _structure((traced_args, traced_kwargs)) != before:
            raise Untraceable("changes a list or dict that was given to it")
        frame.graph.output(frame.to_nodes(result))
        _drop_unused(frame.graph, {guard.node for guard in frame.level.guards})
        frame.level.output = frame.to_values(result)
        return frame.level.output

    def _run_opaque(
        self, probe: nn.Module, path: str, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Opaque, Any]:
        opaque = Opaque(self.original[probe], path, f"{type(error).__name__}: {error}")
        frames, self.frames = self.frames, []
        self._opaque.append(opaque)
        try:
            with torch.no_grad(), self.values:
                value = _forward_of(probe)(*args, **kwargs)
        except ModelFailed:
            raise
        except Exception as failure:
            raise ModelFailed(path) from failure
        finally:
            self.frames = frames
            self._opaque.pop()
        return opaque, value

    def intercept(self, probe: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a probe's forward does instead of itself."""
        if self.frames:
            return self.frames[-1].call_child(probe, args, kwargs)
        if self._opaque:
            call, value = self.record_call(probe, args, kwargs)
            self._opaque[-1].components.append(call)
            return value
        return _forward_of(probe)(*args, **kwargs)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run something of the model without recording it."""
        frames, opaque = self.frames, self._opaque
        self.frames, self._opaque = [], []
        try:
            yield
        finally:
            self.frames, self._opaque = frames, opaque

    def read(self, probe: nn.Module, name: str, value: Any) -> Any:
        """The forward under recording read an attribute: a tensor becomes a node, all else is taken for granted."""
        if not self.frames or self.values.running:
            return value
        frame = self.frames[-1]
        if isinstance(value, torch.Tensor):
            return frame.attribute(value, probe, name)
        if not isinstance(value, Traced):
            below = _below(self._paths[probe], frame.path) if probe is not frame.probe else ""
            frame.level.reads.setdefault((below, name), value)
        return value

    # -- torch functions --------------------------------------------------------------------------------------
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.frames:
            return func(*args, **kwargs)
        frame = self.frames[-1]
        frame._parsed(sys._getframe(1))
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property of a tensor that this forward made or holds for itself
            with torch._C.DisableTorchFunction():
                return func(*args)
        if name in OPERATORS or name.startswith("__r") and "__" + name[3:] in OPERATORS:
            function = OPERATORS.get(name) or OPERATORS["__" + name[3:]]
            return frame.call_function(function, args if name in OPERATORS else args[::-1], kwargs)
        if inspect.ismethoddescriptor(func):
            return frame.call_method(name, args, kwargs)
        return frame.call_function(func, args, kwargs)


def _below(paths: tuple[str, ...], owner: str) -> str:
    """The first of the paths that lies below the owner, relative to it; empty where none does."""
    if not owner:
        return next((path for path in paths if path), "")
    return next((path[len(owner) + 1 :] for path in paths if path.startswith(owner + ".")), "")


def _placeholders(
    frame: Frame, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make the graph's placeholders after the forward's own signature; give the stand-ins to call it with."""
    signature = inspect.signature(forward)
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


def _structure(tree: Any) -> Any:
    """A comparable picture of nested containers, the leaves by identity."""
    if isinstance(tree, dict):
        return tuple((key, _structure(item)) for key, item in tree.items())
    if isinstance(tree, (list, tuple)):
        return tuple(_structure(item) for item in tree)
    return id(tree)


# Nodes that the recorder itself makes to unpack containers and shapes; pure, so dropped where nothing uses them.
_UNPACKING = (operator.getitem, getattr)


def _drop_unused(graph: fx.Graph, kept: set[fx.Node]) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node not in kept and (node.op == "get_attr" or node.target in _UNPACKING):
            graph.erase_node(node)


@functools.cache
def _probe_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass that reports which plain attributes are read, and whose forward is recorded instead of run."""
    internal = frozenset(nn.Module().__dict__) - {"training"} | {"_recorder", "_own_forward", "forward"}

    def __getattribute__(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name[:2] != "__" and name not in internal:
            fields = object.__getattribute__(self, "__dict__")
            if name in fields and "_recorder" in fields:
                return fields["_recorder"].read(self, name, value)
        return value

    def __getattr__(self: Any, name: str) -> Any:
        return self.__dict__["_recorder"].read(self, name, super(probe, self).__getattr__(name))

    namespace = {
        "__getattribute__": __getattribute__,
        "__getattr__": __getattr__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    probe = type(cls.__name__, (cls,), namespace)
    return probe




def _probe(module: nn.Module) -> nn.Module:
    probe: nn.Module = object.__new__(_probe_class(own_class(module)))
    return probe


def _forward_of(probe: nn.Module) -> Callable[..., Any]:
    """The probe's real forward: that of its class, or one that somebody had put on the instance."""
    own: Callable[..., Any] | None = probe.__dict__["_own_forward"]
    return own or functools.partial(type(probe).forward, probe)


class _Intercepted:
    """The instance attribute that stands before a probe's forward."""

    def __init__(self, probe: nn.Module) -> None:
        self.probe = probe

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder: Recorder = self.probe.__dict__["_recorder"]
        return recorder.intercept(self.probe, args, kwargs)


def record(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, path: str = "", training: bool = False
) -> Level | Opaque | Leaf:
    """Record one call of the module at `path` below `root` (the root itself by default).

    Args:
        root: the model; it is not touched.
        args, kwargs: tensors of any device, only their shapes, dtypes and devices count.
        path: which module is called with them.
        training: the mode of every module while it is recorded.

    Raises:
        CaptureError: the model's own forward raises on these inputs; its error is the cause.
    """
    with _LOCK:
        recorder = Recorder(root, training)
        probe = recorder.root.get_submodule(path)
        faked = recorder.fake((args, kwargs))
        try:
            with recorder.aside(), _watched(recorder):
                return recorder.record_call(probe, *faked)[0]
        except ModelFailed as failure:
            raise CaptureError(
                f"the model's forward raises on the example input {describe(args, kwargs)}, in "
                f"'{failure}': {failure.__cause__!r}. Give `example_inputs` that the model accepts."
            ) from failure.__cause__


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Inputs in words: shapes and dtypes for tensors, the value for the rest."""

    def leaf(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return f"{str(item.dtype).removeprefix('torch.')}{list(item.shape)}"
        return item

    shown = [str(map_tree(item, leaf)) for item in args] + [f"{k}={map_tree(v, leaf)}" for k, v in kwargs.items()]
    return f"({', '.join(shown)})"


@contextmanager
def _watched(recorder: Recorder) -> Iterator[None]:
    """Notice the calls that leave no trace in a graph: activation checkpoints, questions about autocast and grad mode."""
    home = torch.utils.checkpoint
    thread = threading.get_ident()

    def frame() -> Frame | None:
        mine = threading.get_ident() == thread and recorder.frames and not recorder.values.running
        return recorder.frames[-1] if mine else None

    def ask(question: Callable[..., bool]) -> Callable[..., bool]:
        def answer(*args: Any) -> bool:
            asked = frame()
            if asked:
                asked.environment_guard(question, args, question(*args))
            return question(*args)

        return answer

    reentrant, plain = home.CheckpointFunction, home._checkpoint_without_reentrant_generator

    class Reentrant:
        @staticmethod
        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            asked = frame()
            rerun = functools.partial(home.checkpoint, use_reentrant=True, preserve_rng_state=preserve)
            if asked is None:
                return reentrant.apply(function, preserve, *args)
            with asked.region(rerun):
                return function(*args)

    def generator(function: Any, preserve: bool, context_fn: Any, check: str, debug: bool, *rest: Any, **kw: Any) -> Any:
        asked = frame()
        if asked is None:
            yield from plain(function, preserve, context_fn, check, debug, *rest, **kw)
            return
        rerun = functools.partial(
            home.checkpoint, use_reentrant=False, preserve_rng_state=preserve, context_fn=context_fn,
            determinism_check=check, debug=debug,
        )
        with asked.region(rerun):
            yield

    with (
        mock.patch.object(home, "CheckpointFunction", Reentrant),
        mock.patch.object(home, "_checkpoint_without_reentrant_generator", generator),
        mock.patch.object(torch, "is_autocast_enabled", ask(torch.is_autocast_enabled)),
        mock.patch.object(torch, "is_grad_enabled", ask(torch.is_grad_enabled)),
    ):
        yield
