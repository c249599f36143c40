"""Copies of a module tree that share tensors: new shells, the same parameters.

A shell is a module's own `__dict__` with children of its own. Everything else that a module's attributes
hold and that points into the tree (lists of modules, bound methods) is pointed at the copy.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

# The bookkeeping that every nn.Module carries, by role; `training` is an ordinary attribute.
_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
_TENSORS = ("_parameters", "_buffers")
HOOKS = tuple(sorted(name for name in _INTERNAL if "hooks" in name))

Make = Callable[[nn.Module], nn.Module]


def bare(module: nn.Module) -> nn.Module:
    """A new, empty instance of the module's own class, made without running any constructor."""
    empty: nn.Module = object.__new__(own_class(module))
    return empty


def copy_tree(root: nn.Module, make: Make = bare, *, share_tensors: bool = True) -> dict[nn.Module, nn.Module]:
    """Copy the shells of a whole tree; a module that is used twice is copied once.

    Args:
        root: the tree to copy; it is left as it was.
        make: gives the empty instance for a module (its class decides the copy's class).
        share_tensors: let the copy hold the very `_parameters` and `_buffers` dicts of the original, so that
            whatever happens to the one's tensors shows on the other; otherwise dicts of its own over the same tensors.

    Returns:
        original module → copied module, the root first.
    """
    copies: dict[nn.Module, nn.Module] = {module: make(module) for module in root.modules()}
    for module, copy in copies.items():
        for name, value in module.__dict__.items():
            copy.__dict__[name] = _copied(name, value, copies, share_tensors)
    return copies


def _copied(name: str, value: Any, copies: dict[nn.Module, nn.Module], share_tensors: bool) -> Any:
    if name in _TENSORS:
        return value if share_tensors else value.copy()
    if name == "_modules":
        return {key: copies[child] if child is not None else None for key, child in value.items()}
    if name in HOOKS:
        return OrderedDict(value) if isinstance(value, OrderedDict) else value
    if name in _INTERNAL:
        return value.copy() if isinstance(value, (set, dict)) else value
    return redirect(value, copies)


def redirect(value: Any, copies: dict[nn.Module, nn.Module]) -> Any:
    """The value with each module of the tree replaced by its copy, through containers and bound methods."""
    if isinstance(value, nn.Module):
        return copies.get(value, value)
    if type(value) in (list, tuple, set):
        return type(value)(redirect(item, copies) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, redirect(item, copies)) for key, item in value.items())
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, copies.get(value.__self__, value.__self__))
    if type(value) is functools.partial:
        return functools.partial(
            redirect(value.func, copies), *redirect(value.args, copies), **redirect(value.keywords, copies)
        )
    return value


def paths_of(root: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every path under which each module of the tree is reached, the first one first."""
    found: dict[nn.Module, tuple[str, ...]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        found[module] = (*found.get(module, ()), path)
    return found


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that the user wrote: a rewritten module's class says which one it stands for."""
    own: type[nn.Module] = getattr(type(module), "_own_class", type(module))
    return own


def attribute_at(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value
