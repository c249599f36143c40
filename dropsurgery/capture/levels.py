"""What recording gives: a level for each forward that a graph can say, leaves, and calls that stay opaque.

A level is one deep: the children that a forward calls are `call_module` nodes of its graph, and levels of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from dropsurgery.capture.traced import Traced, TracedItem
from dropsurgery.trees import own_class

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with: positional and keyword arguments."""

# Kinds whose subclasses are one operation to a reader, whatever their forward does inside.
_ATOMS = (_ConvNd, _NormBase, _DropoutNd, nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.RNNBase)
# Modules of torch.nn that only arrange others.
_ARRANGERS = ("torch.nn.modules.container", "torch.nn.modules.transformer")


@dataclass(frozen=True, eq=False)
class Guard:
    """Something that Python decided on while recording: the graph holds where `node` has this value again."""

    node: fx.Node
    value: Any
    reason: str


@dataclass(eq=False)
class Level:
    """One forward of one module as a graph one level deep, and all that it took for granted.

    `module` is the module of the model given. Modules that cannot be told apart have one graph (`siblings.py`).
    `guards` are what Python decided from the example's sizes, dtypes or devices: where there are any, the graph
    holds for inputs of the same signature only.
    `reads` are the plain attributes that were read, `children` what each `call_module` node calls, `regions`
    the activation checkpoints (a node's `meta["region"]` is an index into them), `sets` the plain attributes that the
    forward sets, whatever its input.
    """

    module: nn.Module
    path: str
    graph: fx.Graph
    inputs: Inputs
    guards: list[Guard] = field(default_factory=list)
    guarded_tensors: list[str] = field(default_factory=list)
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    children: dict[fx.Node, Level | Opaque | Leaf] = field(default_factory=dict)
    regions: list[Callable[..., Any]] = field(default_factory=list)
    sets: dict[str, Any] = field(default_factory=dict)
    random: bool = False
    asks_rank: bool = False
    output: Any = None

    @property
    def reads_training(self) -> bool:
        """Whether Python looked at a `training` flag: the graph then holds for one mode only."""
        return any(name == "training" for _, name in self.reads)


@dataclass(eq=False)
class Opaque:
    """A call whose forward stays Python: why and because of which line, and the levels of the children that it called.

    `on_data` says that only numbers could tell what it calls and gives: it was run on such.
    """

    module: nn.Module
    path: str
    reason: str
    inputs: Inputs = ((), {})
    components: list[Component] = field(default_factory=list)
    on_data: bool = False
    line: str = ""


@dataclass(eq=False)
class Leaf:
    """A call of a module that is one operation."""

    module: nn.Module
    path: str


@dataclass(eq=False)
class Component:
    """A call that an opaque forward made, with the values that went in and came out.

    A tensor that travels from one call to the next is one object in both.
    """

    call: Level | Opaque | Leaf
    inputs: Inputs
    output: Any


_PLAIN = frozenset(
    (torch.Tensor, FakeTensor, nn.Parameter, fx.Node, Traced, TracedItem, int, float, bool, str, type(None))
)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one operation: torch's own layers and every subclass of a weighted one."""
    if isinstance(module, _ATOMS):
        return True
    home = next((cls for cls in own_class(module).__mro__ if "forward" in vars(cls)), nn.Module)
    return home.__module__.startswith("torch.nn.") and not home.__module__.startswith(_ARRANGERS)


def map_tree(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """Apply a function to the leaves of nested tuples, lists, dicts (of any class) and slices."""
    kind = type(tree)
    if kind in _PLAIN:  # most are: the questions below cost more
        return leaf(tree)
    if kind is tuple:
        return tuple([leaf(item) if type(item) in _PLAIN else map_tree(item, leaf) for item in tree])
    if kind in (list, immutable_list):
        return [leaf(item) if type(item) in _PLAIN else map_tree(item, leaf) for item in tree]
    if kind in (dict, immutable_dict):
        return {key: map_tree(item, leaf) for key, item in tree.items()} if tree else {}
    if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
        return tuple(map_tree(item, leaf) for item in tree)
    if kind is slice:
        return slice(map_tree(tree.start, leaf), map_tree(tree.stop, leaf), map_tree(tree.step, leaf))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return kind._make(map_tree(item, leaf) for item in tree)  # not by a constructor of its own (PackedSequence)
    if isinstance(tree, dict):
        return like_dict(kind, {key: map_tree(item, leaf) for key, item in tree.items()})
    return leaf(tree)


def kept(tree: Any) -> Any:
    """Arguments as they are now: a forward may change lists and objects given to it, such as a cache of keys.

    Tensors, modules and what is no object of Python's own stay what they are.
    """
    copies: dict[int, Any] = {}

    def leaf(item: Any) -> Any:
        if isinstance(item, _KEPT) or callable(item) or not hasattr(item, "__dict__"):
            return item
        if id(item) not in copies:
            made = copies[id(item)] = copy.copy(item)
            made.__dict__.update({name: map_tree(value, leaf) for name, value in vars(item).items()})
        return copies[id(item)]

    return map_tree(tree, leaf)


_KEPT = (torch.Tensor, nn.Module, type)


def like_dict(kind: Any, items: dict[Any, Any]) -> Any:
    """A dict of a class of its own, such as OrderedDict or a dataclass of named outputs, with these items."""
    if is_dataclass(kind):
        return cast(Any, kind)(**items)
    made = kind()
    made.update(items)
    return made


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Inputs in words: shapes and dtypes for tensors, the value for the rest."""

    def leaf(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return f"{str(item.dtype).removeprefix('torch.')}{list(item.shape)}"
        return item

    shown = [str(map_tree(item, leaf)) for item in args] + [f"{k}={map_tree(v, leaf)}" for k, v in kwargs.items()]
    return f"({', '.join(shown)})"
