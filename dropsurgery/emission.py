"""What runs: a module's own tree in which only the modules that own an edit have a generated forward.

A rewritten module is, in place, an instance of a subclass of (its own class, GraphModule) made for it alone: same
name, same methods, the same `_parameters` and `_buffers`. Its forward is compiled from its recorded graph with the
regularizers called in it, and never runs where the recording may not hold: what Python had decided while recording
is part of a signature, another signature is recorded anew, and an attribute that was read is watched.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from dropsurgery.capture import Leaf, Level, record
from dropsurgery.capture.levels import map_tree
from dropsurgery.errors import CaptureError, SurgeryError
from dropsurgery.graph import LocalName, carve, insert_after, insert_on, local_names
from dropsurgery.trees import attribute_at, own_class

SLOTS = "_surgery"
"""The child under which a module keeps the regularizers of the edits that it owns."""
METADATA = "dropsurgery"
"""The key of the clock's copy in `state_dict()._metadata`."""

# Classes whose length and iteration are those of their children: their regularizers stay out of `_modules`.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What a GraphModule carries beside its graph.
_GRAPH_FIELDS: dict[str, Any] = {
    "_tracer_cls": None,
    "_tracer_extras": {},
    "_replace_hooks": [],
    "_create_node_hooks": [],
    "_erase_node_hooks": [],
    "_deepcopy_hooks": [],
}


Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class LocalEdit:
    """An edit within its owner: on the output of a node, or (with `operand`) on one of its arguments."""

    name: LocalName
    operand: int | tuple[int, int] | None
    slot: str
    site_id: str


@dataclass(frozen=True)
class Spec:
    """What is kept of an example tensor: enough to record a forward again."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def tensor(self) -> torch.Tensor:
        """A tensor like the example; it takes no memory."""
        made = torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)
        return made.requires_grad_(self.requires_grad)


@dataclass(eq=False)
class Variant:
    """A generated forward for one signature. `missing` are edits that have no place in it."""

    graph: fx.Graph
    run: Callable[..., Any]
    missing: tuple[LocalEdit, ...] = ()


@dataclass
class Owner:
    """What a rewritten module knows of its own rewriting; everything else is derived from it.

    `example` are the arguments it was recorded with (specs for tensors), `edits` what was inserted. `exact` asks for
    full signatures (shapes, dtypes, devices …), else only structure is compared: which arguments are tensors of which
    rank, and the values of the others. `by_mode` says that training and eval have variants of their own.
    """

    edits: tuple[LocalEdit, ...]
    example: Example
    exact: bool = False
    by_mode: bool = False
    guarded_tensors: tuple[str, ...] = ()
    foreign: tuple[tuple[str, str], ...] = ()
    watched: dict[str, Any] = field(default_factory=dict)
    variants: dict[Any, Variant] = field(default_factory=dict)

    def dispatches(self, forward: Callable[..., Any]) -> bool:
        """Whether calls of this forward have to be told apart at all: not where all it ever takes are tensors."""
        args, kwargs = self.example
        plain = all(isinstance(item, Spec) for item in args) and not kwargs
        more = len(inspect.signature(forward).parameters) > len(args) + 1
        return not plain or more or self.exact or self.by_mode or bool(self.foreign)


class Surgical:
    """What an emitted module does beyond its own class. Mixed in before it."""

    _own_class: type[nn.Module]
    _owner: Owner | None

    def recompile(self) -> Any:
        """Generate the code of the graph; only a module that owns an edit also runs it."""
        code = self._graph.python_code("self")  # type: ignore[attr-defined]
        self.__dict__.update(_code=code.src, _lineno_map=code._lineno_map, _prologue_start=code._prologue_start)
        return code

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        owner: Owner | None = self.__dict__.get("_owner")
        if owner is not None and name in owner.watched and not _same(owner.watched[name], value):
            _install(self, replace(owner, variants={}, watched={}, exact=False, by_mode=False))  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> Any:
        """Set the mode; also of regularizers that a container keeps out of its children."""
        super().train(mode)  # type: ignore[misc]
        for slots in _hidden(self):
            slots.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc, no-untyped-call]
        for slots in _hidden(self):
            slots._apply(fn)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if "surgery" in self.__dict__ and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][METADATA] = self.__dict__["surgery"].metadata()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if "surgery" in self.__dict__:
            self.__dict__["surgery"].load_metadata(local_metadata.get(METADATA))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = empty(own_class(self))  # type: ignore[arg-type]
        memo[id(self)] = made
        shared = {"_owner", "_graph", "surgery"}
        for name, value in self.__dict__.items():
            made.__dict__[name] = value if name in shared else copy.deepcopy(value, memo)
        if self._owner is not None:
            made.__dict__["_owner"] = replace(self._owner, variants=dict(self._owner.variants))
            _choose_forward(made)
        if "surgery" in self.__dict__:
            made.__dict__["surgery"] = self.surgery.copy_for(made)  # type: ignore[attr-defined]
        return made

    def __copy__(self) -> Any:
        return copy.deepcopy(self, {id(tensor): tensor for tensor in _tensors(self)})  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        fields = {key: value for key, value in self.__dict__.items() if key not in {"_graph", "_code"}}
        owner = self._owner
        if owner is not None:
            fields["_owner"] = Owner(owner.edits, owner.example)
        return empty, (own_class(self),), fields  # type: ignore[arg-type]

    def __setstate__(self, fields: dict[str, Any]) -> None:
        super().__setstate__(fields)  # type: ignore[misc]
        owner: Owner | None = self.__dict__["_owner"]
        if owner is not None:
            _install(self, owner)  # type: ignore[arg-type]
        else:
            example = example_of(self)  # type: ignore[arg-type]
            emit_root(self, example, record(self, *example))  # type: ignore[arg-type]
        if "surgery" in fields:
            fields["surgery"].adopt(self)

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)


def empty(cls: type[nn.Module]) -> nn.Module:
    """An empty instance of a new subclass of (cls, GraphModule) that carries the name of `cls`."""
    bases = (Surgical, cls) if issubclass(cls, fx.GraphModule) else (Surgical, cls, fx.GraphModule)
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_own_class": cls,
    }
    made: nn.Module = object.__new__(type(cls.__name__, bases, namespace))
    made.__dict__["_owner"] = None
    made.__dict__.update({key: copy.copy(value) for key, value in _GRAPH_FIELDS.items()})
    return made


class OwnHook:
    """A forward pre-hook of ours: it holds its target weakly, and goes neither into copies nor into files."""

    def __init__(self, target: Callable[[], Any]) -> None:
        self.target = target

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnHook:
        return type(self)(_nothing)

    def __reduce__(self) -> Any:
        return type(self), (_nothing,)


def _nothing() -> None:
    return None


def drop_own_hooks(module: nn.Module) -> None:
    """Take our hooks off a module."""
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, OwnHook)]:
        del hooks[key]


def own_fields(module: nn.Module) -> tuple[str, ...]:
    """The entries of a module's `__dict__` that emission added."""
    if not isinstance(module, Surgical):
        return ()
    added = ("_owner", "_example", "_graph", "_code", "_lineno_map", "_prologue_start", "surgery", SLOTS)
    return (*added, *_GRAPH_FIELDS, *(("meta",) if module.__dict__.get("_added_meta") else ()), "_added_meta")


def example_of(root: nn.Module) -> Example:
    """The example that a rewritten root was recorded with; its tensors take no memory."""
    owner: Owner | None = root.__dict__["_owner"]
    example: Example = _tensors_of(owner.example if owner is not None else root.__dict__["_example"])
    return example


def emit_root(root: nn.Module, example: Example, level: Any) -> None:
    """Give a root that owns no edit its graph; its forward stays its own."""
    root.__dict__["_example"] = map_tree(example, _spec)
    root.__dict__["_graph"] = _root_graph(root, level)
    _add_meta(root)
    root.recompile()  # type: ignore[operator]


def emit_owner(module: nn.Module, edits: dict[LocalEdit, nn.Module], levels: list[Level]) -> None:
    """Generate the forward of a module that owns edits.

    Args:
        module: an empty instance (`empty`) that has been filled with its fields.
        edits: what to insert where; the regularizers become children of the module.
        levels: what was recorded of it, one level a call.
    """
    slots = Slots()
    for edit, regularizer in edits.items():
        slots.add_module(edit.slot, regularizer)
    slots.train(module.training)
    if isinstance(module, _CONTAINERS):
        module.__dict__[SLOTS] = slots
    else:
        module._modules[SLOTS] = slots
    _add_meta(module)
    first, *others = levels
    example = map_tree(first.inputs, _spec)
    _install(module, Owner(tuple(edits), example), first)
    known = {graph_key(first.graph)}
    if any(graph_key(level.graph) not in known for level in others):
        owner: Owner = module.__dict__["_owner"]
        owner.exact = True
        owner.variants.clear()
        _choose_forward(module)


def _root_graph(root: nn.Module, level: Any) -> fx.Graph:
    """The root's own level; one opaque node where no graph says all of it."""
    if isinstance(level, Level) and not (level.guards or level.random or level.reads_training or level.regions):
        return clean(level.graph)
    graph = fx.Graph()
    names = [name for name in inspect.signature(own_class(root).forward).parameters if name != "self"]
    graph.output(graph.call_module("", tuple(graph.placeholder(name) for name in names)))
    return graph


def clean(graph: fx.Graph) -> fx.Graph:
    """A copy without the fake values of the recording."""
    made = fx.Graph()
    moved: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        moved[node] = made.node_copy(node, lambda n: moved[n])
        moved[node].meta = {key: node.meta[key] for key in ("region", "random") if key in node.meta}
    return made


def graph_key(graph: fx.Graph) -> tuple[Any, ...]:
    """What a graph computes, comparable between recordings."""
    order = {node: index for index, node in enumerate(graph.nodes)}

    def leaf(item: Any) -> Any:
        return ("node", order[item]) if isinstance(item, fx.Node) else item

    return tuple((n.op, n.target, repr(map_tree((n.args, n.kwargs), leaf))) for n in graph.nodes)


# -- generating a forward ----------------------------------------------------------------------------------------
def _install(module: nn.Module, owner: Owner, level: Level | None = None) -> None:
    """Derive everything from the owner's edits and example: guards, watched attributes, the first variant."""
    module.__dict__["_owner"] = owner
    getattr(module, SLOTS).forget_regions()
    args, kwargs = _tensors_of(owner.example)
    if level is None:
        level = _recorded(module, args, kwargs, training=False)
    _note(owner, level)
    variants = {module.training: _variant(module, owner, level)}
    if level.reads_training:
        other = _recorded(module, args, kwargs, training=True)
        _note(owner, other)
        owner.by_mode = graph_key(level.graph) != graph_key(other.graph)
        if owner.by_mode:
            variants = {False: _variant(module, owner, level), True: _variant(module, owner, other)}
    for mode, variant in variants.items():
        if variant.missing:
            raise CaptureError(_lost(module, variant.missing))
        owner.variants[_signature(module, owner, mode, args, kwargs)] = variant
    module.__dict__["_graph"] = next(iter(variants.values())).graph
    module.recompile()  # type: ignore[operator]
    _choose_forward(module)


def _note(owner: Owner, level: Level) -> None:
    """Take over what a level took for granted."""
    owner.exact = owner.exact or bool(level.guards)
    owner.guarded_tensors = tuple({*owner.guarded_tensors, *level.guarded_tensors})
    plain = {key: value for key, value in level.reads.items() if not isinstance(value, nn.Module)}
    owner.foreign = tuple({*owner.foreign, *((path, name) for path, name in plain if path and name != "training")})
    owner.watched.update(
        {name: value for (path, name), value in level.reads.items() if not path and name != "training"}
    )


def _recorded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool) -> Level:
    level = record(module, args, kwargs, training=training)
    if isinstance(level, Level):
        return level
    reason = level.reason if not isinstance(level, Leaf) else "it is one operation"
    raise CaptureError(f"the forward of {own_class(module).__name__} cannot be recorded as it is now: {reason}")


def _variant(module: nn.Module, owner: Owner, level: Level) -> Variant:
    graph = clean(level.graph)
    missing = apply_edits(graph, owner.edits, module)
    for index, rerun in enumerate(level.regions):
        nodes = [node for node in graph.nodes if node.meta.get("region") == index]
        slots: Slots = getattr(module, SLOTS)
        name = f"region{len(slots._modules)}"
        slots.add_module(name, Region(module, _compiled(carve(graph, nodes, f"{SLOTS}.{name}")), rerun))
    graph.lint()
    return Variant(graph, _compiled(graph), missing)


def apply_edits(graph: fx.Graph, edits: tuple[LocalEdit, ...], module: nn.Module) -> tuple[LocalEdit, ...]:
    """Insert the regularizers into a level's graph; gives the edits that found no place."""
    names = local_names(graph)
    missing = []
    # Operands first: an edit on an output must see the users that they leave.
    for edit in sorted(edits, key=lambda e: e.operand is None):
        node = names.get(edit.name)
        target = f"{SLOTS}.{edit.slot}"
        if node is None:
            missing.append(edit)
        elif edit.operand is None:
            made = insert_after(node, target, module_of=module.get_submodule)
            _same_region(node, made)
        else:
            _same_region(node, insert_on(node, edit.operand, target))
    return tuple(missing)


def _same_region(node: fx.Node, made: fx.Node) -> None:
    if "region" in node.meta:
        made.meta["region"] = node.meta["region"]


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function of (self, *inputs)."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<dropsurgery>", "exec"), namespace)
    return namespace["forward"]  # type: ignore[no-any-return]


class Slots(nn.Module):
    """Holds the regularizers of one owner, and the checkpointed regions of its forward."""

    def forget_regions(self) -> None:
        """Drop what is derived from the owner's forward."""
        for name in [name for name, child in self._modules.items() if isinstance(child, Region)]:
            del self._modules[name]

    def __getstate__(self) -> dict[str, Any]:
        fields = dict(self.__dict__)
        fields["_modules"] = {k: child for k, child in self._modules.items() if not isinstance(child, Region)}
        return fields


class Region(nn.Module):
    """A part of a generated forward that runs under the model's own activation checkpoint."""

    def __init__(self, module: nn.Module, function: Callable[..., Any], rerun: Callable[..., Any]) -> None:
        super().__init__()
        # Kept out of `_modules`: the region is a part of the module, not the other way round.
        self.__dict__["_module"] = module
        self._function = function
        self._rerun = rerun

    def forward(self, *inputs: Any) -> Any:
        """Run the part through `torch.utils.checkpoint`, as the model's own forward does."""
        return self._rerun(functools.partial(self._function, self.__dict__["_module"]), *inputs)


# -- choosing a variant --------------------------------------------------------------------------------------------
def _choose_forward(module: nn.Module) -> None:
    owner: Owner = module.__dict__["_owner"]
    cls: Any = type(module)
    first = next(iter(owner.variants.values()), None)
    told_apart = first is None or owner.dispatches(own_class(module).forward)
    cls.forward = _dispatch if first is None or told_apart else first.run


def _dispatch(self: Any, *args: Any, **kwargs: Any) -> Any:
    owner: Owner = self._owner
    variant = owner.variants.get(_signature(self, owner, self.training, args, kwargs))
    if variant is None:
        variant = _record_variant(self, owner, args, kwargs)
    if variant.missing:
        _refuse_missing(self, variant.missing)
    return variant.run(self, *args, **kwargs)


def _signature(module: Any, owner: Owner, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a variant depends on, of these arguments and of the world."""
    describe = _exactly if owner.exact else _roughly
    items: list[Any] = [describe(item) for item in args]
    items += [(name, describe(item)) for name, item in sorted(kwargs.items())]
    if owner.by_mode:
        items.append(training)
    if owner.exact:
        items += [
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"),
        ]
        items += [(tensor.dtype, tensor.device) for tensor in _guarded(module, owner)]
    items += [getattr(module.get_submodule(path), name) for path, name in owner.foreign]
    return tuple(items)


def _exactly(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return (tuple(item.shape), item.dtype, item.device, item.requires_grad, item.is_contiguous())
    if isinstance(item, (list, tuple)):
        return tuple([_exactly(part) for part in item])
    if isinstance(item, dict):
        return tuple([(key, _exactly(part)) for key, part in item.items()])
    return (type(item), item)


def _roughly(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return item.ndim
    if isinstance(item, (list, tuple)):
        return tuple([_roughly(part) for part in item])
    if isinstance(item, dict):
        return tuple([(key, _roughly(part)) for key, part in item.items()])
    return (type(item), item)


def _guarded(module: nn.Module, owner: Owner) -> list[torch.Tensor]:
    return [attribute_at(module, path) for path in owner.guarded_tensors]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _record_variant(module: Any, owner: Owner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
    """Record the forward for a signature that was not met before.

    Where the model itself refuses the input, its own error is raised.
    """
    key = _signature(module, owner, module.training, args, kwargs)
    try:
        level = _recorded(module, args, kwargs, training=module.training)
    except CaptureError as error:
        if error.__cause__ is not None:
            raise error.__cause__ from None
        raise
    exact = owner.exact
    _note(owner, level)
    if owner.exact and not exact:  # what was told apart roughly until now is not told apart enough
        owner.variants.clear()
        key = _signature(module, owner, module.training, args, kwargs)
    owner.variants[key] = _variant(module, owner, level)
    return owner.variants[key]


def _refuse_missing(module: nn.Module, missing: tuple[LocalEdit, ...]) -> None:
    """Training without a regularizer that was asked for would be silent."""
    slots: Slots = getattr(module, SLOTS)
    if any(slots.get_submodule(edit.slot).active for edit in missing):
        raise SurgeryError(_lost(module, missing))


def _lost(module: nn.Module, missing: tuple[LocalEdit, ...]) -> str:
    names = ", ".join(f"{edit.site_id} ({edit.name[0]})" for edit in missing)
    return (
        f"the forward of {own_class(module).__name__} does not pass {names} on this input or in this mode: "
        "expected the place that was found on the example. Leave it out of the recipe, or give example_inputs "
        "of the size that you train with."
    )


# -- what leads around a generated forward -------------------------------------------------------------------------
def guard_ways(module: nn.Module) -> None:
    """Make the class's other `forward_*` methods refuse to run while they would leave out active edits.

    They hold the class's own Python code: what the generated forward inserts at this level is not in it.
    """
    for name in dir(own_class(module)):
        method = getattr(own_class(module), name)
        if name.startswith("forward_") and callable(method) and not hasattr(nn.Module, name):
            setattr(type(module), name, _guarded_way(name, method))


def _guarded_way(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def way(self: Any, *args: Any, **kwargs: Any) -> Any:
        skipped = [edit for edit in self._owner.edits if getattr(self, SLOTS).get_submodule(edit.slot).active]
        if skipped:
            raise SurgeryError(
                f"{own_class(self).__name__}.{name} would run without {len(skipped)} regularizers that belong to "
                f"the model's own forward ({', '.join(edit.site_id for edit in skipped[:3])}): call the model itself, "
                f"switch it to eval, or leave these sites out of the recipe (where: exclude)"
            )
        return method(self, *args, **kwargs)

    return way


def _add_meta(module: nn.Module) -> None:
    """GraphModule's `meta`, unless the model has an attribute of that name."""
    if "meta" not in module.__dict__:
        module.__dict__.update(meta={}, _added_meta=True)


# -- small things ----------------------------------------------------------------------------------------------------
def _spec(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return Spec(tuple(item.shape), item.dtype, item.device, item.requires_grad)
    return item


def _tensors_of(tree: Any) -> Any:
    return map_tree(tree, lambda item: item.tensor() if isinstance(item, Spec) else item)


def _same(before: Any, after: Any) -> bool:
    plain = (int, float, str, tuple, type(None))
    return before is after or (type(before) is type(after) and isinstance(after, plain) and before == after)


def _hidden(module: Any) -> Iterator[nn.Module]:
    """The regularizers of a container, which stand outside of its children."""
    slots = module.__dict__.get(SLOTS)
    if slots is not None:
        yield slots


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
