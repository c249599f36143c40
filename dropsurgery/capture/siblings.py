"""Modules that cannot be told apart are recorded once: nets repeat their blocks.

Two calls give the same graph where the modules are of one class and hold equal plain attributes, tensors laid out
alike and children of which the same is true, and where the arguments are laid out alike as well. The second call's
level then has the graph of the first, and modules, paths and values of its own. Where that is not certain (an
attribute of another kind, a child that stays opaque, a forward that sets something), each is recorded by itself.
"""

from __future__ import annotations

import enum
import functools
import operator
import types
from collections import OrderedDict
from dataclasses import replace
from itertools import chain, pairwise, takewhile
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor

from dropsurgery.capture.levels import Leaf, Level, Opaque, map_tree
from dropsurgery.capture.values import Values
from dropsurgery.trees import HOOKS, path_below

Paths = dict[nn.Module, tuple[str, ...]]

# Not those that notice, while a forward is recorded, who calls them.
_is_grad_enabled, _is_autocast_enabled = torch.is_grad_enabled, torch.is_autocast_enabled
_VALUES = frozenset((int, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))
_BY_IDENTITY = (types.FunctionType, types.BuiltinFunctionType, type)
_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer, FakeTensor)
# Fields of every module that say nothing of its forward, or are looked at by themselves.
_INTERNAL = frozenset(nn.Module().__dict__) - {"training"} | {"_recorder", "forward", "_own_forward"}


class _Unclear(Exception):
    """Something of which it cannot be said whether it is the same as something else."""


class Siblings:
    """What has been recorded so far, by what cannot be told apart."""

    def __init__(self, values: Values, original: dict[nn.Module, nn.Module], paths: Paths) -> None:
        """`original` has the module that each probe stands for, `paths` all paths of each such module."""
        self._values, self._original, self._paths = values, original, paths
        self._doubled = _holders_of_doubles(paths)
        self._numbers: dict[Any, int] = {}
        self._looks: dict[nn.Module, int | None] = {}
        self._known: dict[Any, Level] = {}
        self._complete: set[Level] = set()  # what others may take over
        self._stopped = False

    def stop(self) -> None:
        """Something may have changed what modules look like: from now on each is recorded by itself."""
        self._stopped = True

    def release(self) -> None:
        """Let go of the model's modules."""
        for held in (self._looks, self._known, self._numbers, self._complete):
            held.clear()

    def key(self, probe: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What all calls have in common that give the same graph; None where that is not certain."""
        if self._stopped or _is_autocast_enabled("cpu") or _is_autocast_enabled("cuda"):
            return None
        look = self._look(probe)
        if look is None:
            return None
        try:
            return look, _of_inputs(args, kwargs), _is_grad_enabled(), torch.get_default_dtype()
        except _Unclear:
            return None

    def keep(self, key: Any, level: Level, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember a level, if others may take it over as it is; the arguments are those that it was recorded on."""
        whole = all(type(call) is Leaf or call in self._complete for call in level.children.values())
        modules = [value for value in level.reads.values() if isinstance(value, nn.Module)]
        inside = all(path_below(self._paths[module], level.path) for module in modules)
        if whole and inside and not (level.regions or self._stopped) and _is_as_before(key[1], level, args, kwargs):
            self._known[key] = level
            self._complete.add(level)

    def level_of(self, key: Any, probe: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Level | None:
        """The level of a call, after one that was recorded of another; None where there is none."""
        known = self._known.get(key)
        if known is None:
            return None
        level = self._moved(known, self._original[probe])
        level.inputs = map_tree((args, kwargs), lambda item: item)
        twins: dict[int, Any] = dict(zip(map(id, _tensors_in(*known.inputs)), _tensors_in(args, kwargs), strict=True))
        level.output = map_tree(known.output, lambda item: self._twin(item, twins))
        return level

    def _twin(self, item: Any, twins: dict[int, Any]) -> Any:
        """What stands for a value of the first call in the second: its own argument, or a tensor of its own."""
        if not isinstance(item, torch.Tensor):
            return item
        if id(item) not in twins:
            twins[id(item)] = self._values.twin(item)
        return twins[id(item)]

    def _moved(self, level: Level, module: nn.Module) -> Level:
        """A level as that of another module."""
        children: dict[fx.Node, Level | Opaque | Leaf] = {}
        for node, call in level.children.items():
            child = _module_at(module, str(node.target))
            children[node] = self._moved(call, child) if type(call) is Level else Leaf(child, self._paths[child][0])
        reads = {key: self._read(level, value, module) for key, value in level.reads.items()}
        path = self._paths[module][0]
        moved = replace(level, module=module, path=path, children=children, reads=reads)
        self._complete.add(moved)
        return moved

    def _read(self, level: Level, value: Any, module: nn.Module) -> Any:
        """What another module's forward reads where this level's reads a value."""
        if not isinstance(value, nn.Module):
            return value
        return _module_at(module, path_below(self._paths[value], level.path))

    def _look(self, probe: nn.Module) -> int | None:
        """A number that modules share which cannot be told apart; None for one of which that is unclear."""
        if probe not in self._looks:
            try:
                self._looks[probe] = self._numbers.setdefault(self._picture(probe), len(self._numbers))
            except _Unclear:
                self._looks[probe] = None
        return self._looks[probe]

    def _picture(self, probe: nn.Module) -> Any:
        fields = probe.__dict__
        # All of them are looked at, also behind one that is unclear.
        children = [(name, None if child is None else self._look(child)) for name, child in fields["_modules"].items()]
        unclear = any(look is None and fields["_modules"][name] is not None for name, look in children)
        if unclear or fields["_own_forward"] is not None or any(fields[name] for name in HOOKS):
            raise _Unclear
        named = (*fields["_parameters"].items(), *fields["_buffers"].items())
        tensors = [(name, _of_value(item)) for name, item in named]
        plain = [
            (name, type(item), item) if type(item) in _VALUES else (name, _of_value(item))
            for name, item in fields.items()
            if name not in _INTERNAL
        ]
        kept = frozenset(fields["_non_persistent_buffers_set"])
        module = self._original[probe]
        doubles = _places(module, {}) if module in self._doubled else ()
        return type(probe), tuple(children), tuple(tensors), kept, tuple(plain), doubles


def _module_at(module: nn.Module, path: str) -> nn.Module:
    """`module.get_submodule(path)`, which takes longer."""
    for name in path.split("."):
        module = module._modules[name]  # type: ignore[assignment]
    return module


def _holders_of_doubles(paths: Paths) -> set[nn.Module]:
    """The smallest modules around two places of one and the same module."""
    holders: set[str] = set()
    for each in paths.values():
        for one, other in pairwise(sorted(path.split(".") for path in each)):
            pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
            holders.add(".".join(name for name, _ in pairs))
    return {module for module, each in paths.items() if not holders.isdisjoint(each)}


def _places(module: nn.Module, found: dict[nn.Module, int]) -> tuple[int, ...]:
    """Number the modules of a tree, place by place, so that it shows which are one and the same."""
    here = found.setdefault(module, len(found))
    below = (_places(child, found) for child in module._modules.values() if child is not None)
    return here, *chain.from_iterable(below)


def _of_value(value: Any) -> Any:
    """An attribute as far as forwards that read it may differ.

    Raises:
        _Unclear: it is of a kind of which nothing is known.
    """
    kind = type(value)
    if kind in _VALUES or kind in _BY_IDENTITY or isinstance(value, enum.Enum):
        return kind, value
    if kind is float:
        return kind, value.hex()  # tells the zeros apart
    if kind in (tuple, list, torch.Size):
        return kind, tuple(map(_of_value, value))
    if kind in (dict, OrderedDict):
        return kind, tuple((_of_value(key), _of_value(item)) for key, item in value.items())
    if kind is functools.partial:
        return kind, _of_value(value.func), _of_value(value.args), _of_value(value.keywords)
    if kind in _TENSORS:
        return kind, *_of_tensor(value)
    raise _Unclear


def _of_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a call as far as its graph hangs on them: which tensors are one counts, too.

    Raises:
        _Unclear: one is of a kind of which nothing is known.
    """
    found: dict[int, int] = {}

    def of(item: Any) -> Any:
        if type(item) is FakeTensor:
            return found.setdefault(id(item), len(found)), *_of_tensor(item)
        if type(item) in (tuple, list):
            return type(item), tuple(map(of, item))
        if type(item) is dict:
            return dict, tuple((_of_value(name), of(value)) for name, value in item.items())
        if type(item) in (*_VALUES, float, torch.Size):
            return _of_value(item)
        raise _Unclear

    with torch._C.DisableTorchFunction():
        return of(args), of(kwargs)


def _is_as_before(picture: Any, level: Level, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a forward left the layout of its arguments, and what is in lists and dicts among them, as it was."""
    given, now = _tensors_in(*level.inputs), _tensors_in(args, kwargs)
    return bool(_of_inputs(args, kwargs) == picture) and all(map(operator.is_, given, now))


def _of_tensor(tensor: torch.Tensor) -> Any:
    if tensor.layout is not torch.strided:
        raise _Unclear
    return tensor.size(), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found: list[Any] = []
    map_tree(
        (args, tuple(kwargs.values())), lambda item: found.append(item) if isinstance(item, torch.Tensor) else None
    )
    return found
