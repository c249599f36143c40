"""Copies of a module tree that share tensors: new shells, the same parameters.

A shell is a module's own `__dict__` with children of its own. Everything else that a module's attributes
hold and that points into the tree (lists of modules, bound methods) is pointed at the copy.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

# The bookkeeping that every nn.Module carries, by role; `training` is an ordinary attribute.
_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
_TENSORS = ("_parameters", "_buffers")
HOOKS = tuple(sorted(name for name in _INTERNAL if "hooks" in name))

# Of what a module's fields mostly are: nothing in them to copy.
_ATOMS = frozenset({bool, int, float, str, type(None), type})

Make = Callable[[nn.Module], nn.Module]
Twins = dict[int, Any]
"""By the id of an object of the original tree: the object that stands for it in the copy."""


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
    copies: dict[nn.Module, nn.Module] = {module: make(module) for module in modules_of(root)}
    twins: Twins = {id(module): copied for module, copied in copies.items()}
    collectors = collectors_of(root)
    twins.update({id(collector): copy.copy(collector) for collector in collectors})
    for module, copied in copies.items():
        fields = copied.__dict__
        for name, value in module.__dict__.items():
            kind = type(value)
            if kind in _ATOMS:
                fields[name] = value
            elif kind is OrderedDict and not value:  # mostly the hooks that there are not
                fields[name] = OrderedDict()
            else:
                fields[name] = _copied(name, value, twins, share_tensors)
            if collectors and name in HOOKS:
                twins[id(value)] = fields[name]
    for collector in collectors:  # last: the handles in it are those of hooks
        redirected = {name: redirect(value, twins) for name, value in collector.__dict__.items()}
        twins[id(collector)].__dict__.update(redirected)
    return copies


def collectors_of(root: nn.Module) -> list[Any]:
    """What the tree's own hooks write to: the objects that hooks are methods of and that modules of the tree hold."""
    modules = modules_of(root)
    hooks = [hook for module in modules for name in hooks_of(module) for hook in module.__dict__[name].values()]
    homes = {id(home): home for home in map(home_of_hook, hooks) if home is not None}
    held = {id(value) for module in modules for value in module.__dict__.values()} if homes else set()
    found = [home for key, home in homes.items() if key in held and hasattr(home, "__dict__")]
    return [home for home in found if not isinstance(home, nn.Module)]


def hooks_of(module: nn.Module) -> list[str]:
    """The names of a module's dicts of hooks that hold any."""
    fields = module.__dict__
    return [name for name in HOOKS if fields.get(name)]


def home_of_hook(hook: Any) -> Any:
    """The object that a hook is a method of, through partials; None for plain functions."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return hook.__self__ if isinstance(hook, MethodType) else None


def _copied(name: str, value: Any, twins: Twins, share_tensors: bool) -> Any:
    if name in _TENSORS:
        return value if share_tensors else value.copy()
    if name == "_modules":
        return {key: twins[id(child)] if child is not None else None for key, child in value.items()}
    if name in HOOKS:
        if not isinstance(value, OrderedDict):
            return value
        return redirect(value, twins) if value else OrderedDict()
    if name in _INTERNAL:
        return value.copy() if isinstance(value, (set, dict)) else value
    return redirect(value, twins)


def redirect(value: Any, twins: Twins) -> Any:
    """The value with each object of the tree replaced by its twin, through containers, partials and bound methods."""
    if id(value) in twins:
        return twins[id(value)]
    if type(value) in (list, tuple, set):
        return type(value)(redirect(item, twins) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, redirect(item, twins)) for key, item in value.items())
    if type(value) is defaultdict:
        return defaultdict(value.default_factory, {key: redirect(item, twins) for key, item in value.items()})
    if isinstance(value, MethodType) and id(value.__self__) in twins:
        return MethodType(value.__func__, twins[id(value.__self__)])
    if isinstance(value, RemovableHandle):
        return _handle_of_twin(value, twins)
    if type(value) is functools.partial:
        return functools.partial(
            redirect(value.func, twins), *redirect(value.args, twins), **redirect(value.keywords, twins)
        )
    return value


def _handle_of_twin(handle: RemovableHandle, twins: Twins) -> RemovableHandle:
    """A handle that removes the twin of a hook."""
    first, key, others = handle.__getstate__()  # type: ignore[no-untyped-call]
    made = object.__new__(RemovableHandle)
    kept = tuple(twins.get(id(hooks), hooks) for hooks in others if hooks is not None)
    made.__setstate__((twins.get(id(first), first), key, kept))
    return made


def modules_of(root: nn.Module) -> list[nn.Module]:
    """`root.modules()`, which takes three times as long."""
    found: dict[nn.Module, None] = {}

    def visit(module: nn.Module) -> None:
        found[module] = None
        for child in module._modules.values():
            if child is not None and child not in found:
                visit(child)

    visit(root)
    return list(found)


def paths_of(root: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every path under which each module of the tree is reached, the first one first."""
    found: dict[nn.Module, tuple[str, ...]] = {}

    def visit(module: nn.Module, path: str) -> None:
        found[module] = (*found.get(module, ()), path)
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{path}.{name}" if path else name)

    visit(root, "")
    return found


def path_below(paths: tuple[str, ...], owner: str) -> str:
    """The first of the paths that lies below the owner, relative to it; empty where none does."""
    if not owner:
        return next((path for path in paths if path), "")
    return next((path[len(owner) + 1 :] for path in paths if path.startswith(owner + ".")), "")


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


def is_by_position(forward: Callable[..., Any]) -> bool:
    """Whether the values of a forward's parameters, in order, are its arguments as they are."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return all(parameter.kind in kinds for parameter in inspect.signature(forward).parameters.values())


def spread(forward: Callable[..., Any], values: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The values of all parameters of a forward but `self`, in order, as the arguments to call it with."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for parameter, value in zip(list(inspect.signature(forward).parameters.values())[1:], values, strict=False):
        if parameter.kind is parameter.VAR_POSITIONAL:
            args += value
        elif parameter.kind is parameter.VAR_KEYWORD:
            kwargs.update(value)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[parameter.name] = value
        else:
            args.append(value)
    return tuple(args), kwargs
