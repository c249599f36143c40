"""The emitted tree: the user's own modules, of which only those that own an edit have a generated forward.

A rewritten module is, in place, an instance of a subclass of (its own class, GraphModule) made for it alone: same
name, same methods, the same `_parameters` and `_buffers`. The root is one in any case; all others keep their class.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from dropsurgery.capture import Inputs, Level, record
from dropsurgery.capture.levels import map_tree
from dropsurgery.errors import SurgeryError
from dropsurgery.forwards import (
    SLOTS,
    LocalEdit,
    Owner,
    Part,
    Slots,
    choose_forward,
    clean,
    install,
    refuse_skipped,
    same,
    spec_of,
    tell_apart,
    tensors_of,
    whole_call,
)
from dropsurgery.trees import own_class

OWN_GRAPH = "_own_graph"
"""Where a rewritten GraphModule keeps the fields of its graph as they were."""
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
        if owner is not None and name in owner.watched and not same(owner.watched[name], value):
            install(self, replace(owner, variants={}, watched={}, exact=False, by_mode=False))  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> Any:
        """Set the mode; also of regularizers that a container keeps out of its children."""
        super().train(mode)  # type: ignore[misc]
        for slots in _hidden(self):
            slots.train(mode)
        if "surgery" in self.__dict__:  # the root; its own `train` may leave parts out, as SMP's does a frozen encoder
            for owner in self.modules():  # type: ignore[attr-defined]
                for regularizer in _regularizers(owner):
                    regularizer.train(mode and owner.training)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        for slots in _hidden(self):
            slots._apply(fn)  # type: ignore[no-untyped-call]
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
            choose_forward(made)
        if "surgery" in self.__dict__:
            made.__dict__["surgery"] = self.surgery.copy_for(made)  # type: ignore[attr-defined]
        return made

    def __copy__(self) -> Any:
        return copy.deepcopy(self, {id(tensor): tensor for tensor in _tensors(self)})  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        own = own_class(self)  # type: ignore[arg-type]
        if "<locals>" in own.__qualname__:
            raise SurgeryError(
                f"{own.__name__} cannot be saved whole: its class was made in a function, and no file can name it "
                "(a torch.fx.GraphModule's is). Save gm.state_dict(), and load it after applying the recipe anew"
            )
        fields = {key: value for key, value in self.__dict__.items() if key not in {"_graph", "_code"}}
        owner = self._owner
        if owner is not None:
            fields["_owner"] = Owner(owner.edits, owner.example)
        return empty, (own_class(self),), fields  # type: ignore[arg-type]

    def __setstate__(self, fields: dict[str, Any]) -> None:
        super().__setstate__(fields)  # type: ignore[misc]
        owner: Owner | None = self.__dict__["_owner"]
        if owner is not None:
            install(self, owner)  # type: ignore[arg-type]
        else:
            example = example_of(self)  # type: ignore[arg-type]
            emit_root(self, example, record(self, *example))  # type: ignore[arg-type]
        if "surgery" in fields:
            fields["surgery"].adopt(self)

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)


class SurgicalContainer(Surgical):
    """A Sequential or list that owns edits: to take it apart is to leave them out."""

    def __iter__(self) -> Iterator[nn.Module]:
        refuse_skipped(self, "iterating over it")  # type: ignore[arg-type]
        return super().__iter__()  # type: ignore[misc, no-any-return]

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)  # type: ignore[misc]
        refuse_skipped(self, "taking a part of it")  # type: ignore[arg-type]
        own: Any = own_class(self)  # type: ignore[arg-type]
        items = list(self._modules.items())[index]  # type: ignore[attr-defined]
        return own(OrderedDict(items)) if issubclass(own, nn.Sequential) else own([child for _, child in items])


def empty(cls: type[nn.Module]) -> nn.Module:
    """An empty instance of a new subclass of (cls, GraphModule) that carries the name of `cls`."""
    mixin = SurgicalContainer if issubclass(cls, (nn.Sequential, nn.ModuleList)) else Surgical
    bases = (mixin, cls) if issubclass(cls, fx.GraphModule) else (mixin, cls, fx.GraphModule)
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


def keep_own_graph(module: nn.Module) -> None:
    """Put the graph of a module that was a GraphModule before surgery aside, for `strip`."""
    if issubclass(own_class(module), fx.GraphModule):
        names = ("_graph", "_code", "_lineno_map", "_prologue_start", *_GRAPH_FIELDS)
        module.__dict__[OWN_GRAPH] = {name: module.__dict__[name] for name in names if name in module.__dict__}


def own_fields(module: nn.Module) -> tuple[str, ...]:
    """The entries of a module's `__dict__` that emission added."""
    if not isinstance(module, Surgical):
        return ()
    added = ("_owner", "_example", "_graph", "_code", "_lineno_map", "_prologue_start", "surgery", SLOTS)
    return (*added, *_GRAPH_FIELDS, *(("meta",) if module.__dict__.get("_added_meta") else ()), "_added_meta")


def example_of(root: nn.Module) -> Inputs:
    """The example that a rewritten root was recorded with; its tensors take no memory."""
    owner: Owner | None = root.__dict__["_owner"]
    example: Inputs = tensors_of(owner.example if owner is not None else root.__dict__["_example"])
    return example


def emit_root(root: nn.Module, example: Inputs, level: Any) -> None:
    """Give a root that owns no edit its graph; its forward stays its own."""
    keep_own_graph(root)
    root.__dict__["_example"] = map_tree(example, spec_of)
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
    keep_own_graph(module)
    slots = Slots()
    for edit, regularizer in edits.items():
        slots.add_module(edit.slot, regularizer)
        if edit.kind == "swap":
            regularizer.bind(module)  # type: ignore[operator]
    slots.train(module.training)
    if isinstance(module, _CONTAINERS):
        module.__dict__[SLOTS] = slots
    else:
        module._modules[SLOTS] = slots
    _add_meta(module)
    first, *others = levels
    install(module, Owner(tuple(edits), map_tree(first.inputs, spec_of)), first)
    if others:
        tell_apart(module, levels)


def _root_graph(root: nn.Module, level: Any) -> fx.Graph:
    """The root's own level; one opaque node where no graph says all of it."""
    if isinstance(level, Level) and not (
        level.guards or level.random or level.reads_training or level.regions or level.sets
    ):
        return clean(level.graph)
    return whole_call(root, "")


def _add_meta(module: nn.Module) -> None:
    """GraphModule's `meta`, unless the model has an attribute of that name."""
    if "meta" not in module.__dict__:
        module.__dict__.update(meta={}, _added_meta=True)


def _regularizers(module: nn.Module) -> list[nn.Module]:
    """The regularizers that a module owns."""
    if module.__dict__.get("_owner") is None:
        return []
    return [child for child in getattr(module, SLOTS).children() if not isinstance(child, Part)]


def _hidden(module: Any) -> Iterator[nn.Module]:
    """The regularizers of a container, which stand outside of its children."""
    slots = module.__dict__.get(SLOTS)
    if slots is not None:
        yield slots


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
