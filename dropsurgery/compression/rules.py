"""What each operation does to a cut: which operands lie how in its result, and what becomes of zeros and factors.

An operation that has no rule here stops every cut: nothing is guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dropsurgery.capture.dataflow import shape_of
from dropsurgery.compression.layers import LAYERS, argument, layer_of
from dropsurgery.compression.relations import (
    Aligned,
    Axes,
    Halves,
    Never,
    Piece,
    Regrouped,
    Relation,
    Shape,
    Stuck,
    Whole,
    same_axes,
)
from dropsurgery.kinds import holds_tensor, kind_of, kinds_of, tensor_inputs
from dropsurgery.records import TensorFact

Position = int | tuple[int, int] | str
"""Where an argument stands: its place, its place in a list, or its name."""

_SPLITS = ("unbind", "chunk", "split", "split_with_sizes", "tensor_split")
_SHAPED_LIKE = ("view_as", "reshape_as", "expand_as", "type_as", "to")
_PADDING = "torch.nn.modules.padding"


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation takes."""

    position: Position
    source: fx.Node
    relation: Relation


@dataclass(frozen=True)
class Rule:
    """The operands of an operation, and what it does with their zeros and factors (`states.EFFECTS`)."""

    operands: tuple[Operand, ...]
    effect: str


def positions_of(node: fx.Node) -> Iterator[tuple[Position, fx.Node]]:
    """Every tensor that a node takes, with where it stands; one that is taken twice comes twice."""
    for place, item in enumerate(node.args):
        if isinstance(item, fx.Node):
            yield from [(place, item)] if holds_tensor(item.meta.get("value")) else []
        elif isinstance(item, (list, tuple)):
            for inner, part in enumerate(item):
                if isinstance(part, fx.Node) and holds_tensor(part.meta.get("value")):
                    yield (place, inner), part
    for name, item in node.kwargs.items():
        if isinstance(item, fx.Node) and holds_tensor(item.meta.get("value")):
            yield name, item


def rule_of(node: fx.Node) -> Rule:
    """The rule of what a node computes.

    Raises:
        Stuck: it has none.
    """
    if node.op in ("placeholder", "get_attr"):
        return Rule((), "made")
    if node.op == "output":
        return Rule(tuple(_never(node, "has to stay as wide as it is")), "made")
    if node.meta.get("opaque"):
        return Rule(tuple(_never(node, "stays Python, of which no graph tells what it does")), "made")
    if node.target in _LOOKS_AT_SHAPES:
        return Rule((), "made")
    kinds, name = kinds_of(node), name_of(node)
    rule = _BY_NAME.get(name) if not kinds or name in _FIRST_BY_NAME else None
    for kind in reversed(kinds):
        rule = rule or _BY_KIND.get(kind)
    module = node.meta.get("module")
    if rule is None and module is not None and type(module).__module__ == _PADDING:
        rule = _padded
    if rule is None:
        return Rule(tuple(_never(node, "is an operation of which it is not known how it takes a cut")), "made")
    return rule(node)


def name_of(node: fx.Node) -> str:
    """What a node calls, in one word: `relu_`, `isub` and `torch.sub` are `relu` and `sub`."""
    module = node.meta.get("module")
    if module is not None:
        return type(module).__name__
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return _AUGMENTED.get(name, name.rstrip("_"))


_AUGMENTED = {"isub": "sub", "itruediv": "truediv", "ipow": "pow"}
_LOOKS_AT_SHAPES = frozenset(f"new_{what}" for what in ("zeros", "ones", "full", "empty", "tensor"))


# -- one rule a family ------------------------------------------------------------------------------------------------
def _never(node: fx.Node, reason: str) -> Iterator[Operand]:
    for position, source in positions_of(node):
        yield Operand(position, source, Never(reason))


def _shapes(source: fx.Node, node: fx.Node) -> tuple[Shape, Shape]:
    before, after = shape_of(source), shape_of(node)
    if before is None or after is None:
        raise Stuck("takes or gives what is no single tensor")
    return before, after


def _elementwise(effect: str) -> Callable[[fx.Node], Rule]:
    def rule(node: fx.Node) -> Rule:
        taken = list(positions_of(node))
        return Rule(
            tuple(Operand(place, source, Aligned(*_shapes(source, node))) for place, source in taken),
            effect,
        )

    return rule


def _activation(node: fx.Node) -> Rule:
    name = name_of(node)
    if name == "prelu":
        return Rule(tuple(_never(node, "is a PReLU written as a function")), "made")
    homogeneous = name in ("ReLU", "relu", "LeakyReLU", "leaky_relu", "PReLU")
    return _first_only(node, Aligned, "carried" if homogeneous else "bent")


def _first_only(node: fx.Node, relation: Callable[[Shape, Shape], Relation], effect: str) -> Rule:
    """What works on its first argument, and of others takes settings."""
    source = tensor_inputs(node)[0]
    return Rule((Operand(_place(node, source), source, relation(*_shapes(source, node))),), effect)


def _place(node: fx.Node, source: fx.Node) -> Position:
    return next(place for place, each in positions_of(node) if each is source)


def _layout(node: fx.Node) -> Rule:
    if name_of(node) in _SHAPED_LIKE or node.op == "call_module" or len(tensor_inputs(node)) == 1:
        return _first_only(node, _laid_out, "carried")
    return _elementwise("carried")(node)


def _laid_out(before: Shape, after: Shape) -> Relation:
    regroups = before != after and math.prod(before) == math.prod(after)
    return Regrouped(before, after) if regroups else Aligned(before, after)


def _axes(given: Any, rank: int) -> list[int]:
    """One axis, or several, counted from the first."""
    axes = list(given) if isinstance(given, (list, tuple, range)) else [given]
    if not all(isinstance(axis, int) for axis in axes):
        raise Stuck("goes by axes that are not written as numbers")
    return [axis % rank for axis in axes]


def _permuted(node: fx.Node) -> Rule:
    source = tensor_inputs(node)[0]
    before, _ = _shapes(source, node)
    rank, name = len(before), name_of(node)
    if name in ("transpose", "swapaxes", "swapdims"):
        order = list(range(rank))
        first, second = (argument(node, f"dim{index}", index + 1) for index in (0, 1))
        if not isinstance(first, int) or not isinstance(second, int):
            raise Stuck("swaps axes that are not written as numbers")
        order[first], order[second] = order[second], order[first]
    elif name == "permute":
        given: Any = argument(node, "dims", 1)
        order = _axes(given if isinstance(given, (list, tuple)) else node.args[1:], rank)
    else:
        raise Stuck("moves axes in a way that has no rule")
    moves = {source_axis: axis for axis, source_axis in enumerate(order)}
    return _first_only(node, lambda *_: Axes(moves, "moves axes"), "carried")


def _leading(effect: str, reason: str) -> Callable[[fx.Node], Rule]:
    """What mixes positions and leaves samples and channels alone."""

    def rule(node: fx.Node) -> Rule:
        found = re.search("([123])d$", name_of(node))  # of how many axes its positions are
        rank = len(_shapes(tensor_inputs(node)[0], node)[0])
        free = rank - int(found[1]) if found and "pool" in kinds_of(node) else min(rank, 2)
        return _first_only(node, lambda *_: Axes(same_axes(free), reason), effect)

    return rule


def _rolled(node: fx.Node) -> Rule:
    dims: Any = argument(node, "dims", 2 if name_of(node) == "roll" else 1)
    rank = len(_shapes(tensor_inputs(node)[0], node)[0])
    moved = _axes(range(rank) if dims is None else dims, rank)
    moves = {axis: axis for axis in range(rank) if axis not in moved}
    return _first_only(node, lambda *_: Axes(moves, "moves positions on the axis that is cut"), "carried")


def _padded(node: fx.Node) -> Rule:
    module = node.meta.get("module")
    value = getattr(module, "value", 0) if module is not None else argument(node, "value", 3)
    effect = "carried" if not value else "stirred"
    source = tensor_inputs(node)[0]
    before, after = _shapes(source, node)
    whole = [axis for axis in range(len(before)) if before[axis] == after[axis]]
    return _first_only(node, lambda *_: Axes({axis: axis for axis in whole}, "pads the axis that is cut"), effect)


def _norm(node: fx.Node) -> Rule:
    kinds = kinds_of(node)
    name = kinds[-1].removesuffix("_act").replace("_", " ")
    if node.op != "call_module":
        raise Stuck(f"is a {name} written as a function")
    if kinds[-1].startswith(("batch_norm", "instance_norm")):
        return _leading("shifted", f"is a {name} over the axis that is cut")(node)
    if not kinds[-1].startswith(("layer_norm", "rms_norm")):
        reason = f"is a {name}, whose groups of channels would be others"
        return _first_only(node, lambda *_: Axes({0: 0}, reason), "stirred")
    shape: Any = getattr(node.meta["module"], "normalized_shape", None)
    rank = len(_shapes(tensor_inputs(node)[0], node)[0])
    free = 0 if _elsewhere(node, rank, shape) else rank - len(shape)
    reason = f"is a {name} over what is cut: its mean and variance are those of all channels"
    return _first_only(node, lambda *_: Axes(same_axes(free), reason), "stirred")


def _elsewhere(node: fx.Node, rank: int, shape: Any) -> bool:
    """Whether a layer norm works on other axes than the last ones, as some of its subclasses do."""
    after = shape_of(node)
    if "2d" in name_of(node).lower():
        return True
    return after is None or not isinstance(shape, tuple) or after[rank - len(shape) :] != tuple(shape)


def _reduction(node: fx.Node) -> Rule:
    source = tensor_inputs(node)[0]
    before, after = _shapes(source, node)
    dims: Any = argument(node, "dim", 1)
    everything = dims is None or dims in ((), [])
    gone = _axes(range(len(before)) if everything else dims, len(before))
    left = [axis for axis in range(len(before)) if axis not in gone]
    kept = len(before) == len(after)
    moves = {axis: axis if kept else place for place, axis in enumerate(left)}
    effect = "carried" if kinds_of(node)[-1] in ("mean", "amax") or name_of(node) == "sum" else "stirred"
    return _first_only(node, lambda *_: Axes(moves, f"takes the {name_of(node)} over what is cut"), effect)


def _softmax(node: fx.Node) -> Rule:
    module = node.meta.get("module")
    over = module.dim if module is not None else argument(node, "dim", 1)
    rank = len(_shapes(tensor_inputs(node)[0], node)[0])
    moves = same_axes(rank) if isinstance(over, int) else {}
    if isinstance(over, int):
        del moves[over % rank]
    return _first_only(node, lambda *_: Axes(moves, "is a softmax over what is cut"), "stirred")


def _cat(node: fx.Node) -> Rule:
    after = shape_of(node)
    dim = argument(node, "dim", 1, argument(node, "axis", 1, 0))
    if after is None or not isinstance(dim, int):
        raise Stuck("concatenates along an axis that is not written as a number")
    axis, start, operands = dim % len(after), 0, []
    for position, source in positions_of(node):
        shape = shape_of(source)
        if shape is None:
            raise Stuck("concatenates what is no single tensor")
        operands.append(Operand(position, source, Piece(axis, start, shape[axis], after[axis])))
        start += shape[axis]
    return Rule(tuple(operands), "joined")


def _stack(node: fx.Node) -> Rule:
    after = shape_of(node)
    dim = argument(node, "dim", 1, 0)
    if after is None or not isinstance(dim, int):
        raise Stuck("stacks along an axis that is not written as a number")
    axis = dim % len(after)
    moves = {source: source + (source >= axis) for source in range(len(after) - 1)}
    relation = Axes(moves, "stacks tensors along the axis that is cut")
    return Rule(tuple(Operand(place, source, relation) for place, source in positions_of(node)), "alike")


def _split(node: fx.Node) -> Rule:
    """A split by itself: its parts are taken from what it splits, by `getitem`."""
    return Rule((), "made")


def _item(node: fx.Node) -> Rule:
    source: Any = node.args[0]
    if shape_of(source) is None:
        return _part(node, source)
    before, _ = _shapes(source, node)
    index: Any = node.args[1]
    if isinstance(index, fx.Node) and isinstance(index.meta.get("value"), TensorFact):
        return _looked_up(node, index.meta["value"], len(before))
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(item, (int, slice, type(None), type(...))) for item in items):
        raise Stuck("picks by a tensor")
    if ... in items:
        place = items.index(...)
        missing = len(before) - sum(item is not None and item is not ... for item in items)
        items[place : place + 1] = [slice(None)] * missing
    moves: dict[int, int] = {}
    old, new = 0, 0
    for item in [*items, *[slice(None)] * len(before)]:
        if item is None:
            new += 1
        elif old < len(before):
            if isinstance(item, slice):
                moves |= {old: new} if item == slice(None) else {}
                new += 1
            old += 1
    return _first_only(node, lambda *_: Axes(moves, "picks positions on the axis that is cut"), "carried")


def _looked_up(node: fx.Node, index: TensorFact, rank: int) -> Rule:
    """Rows of a table, such as positions relative to each other: the axes behind the first stay."""
    if index.dtype not in (torch.int64, torch.int32):
        raise Stuck("picks by a mask")
    moves = {axis: axis + len(index.shape) - 1 for axis in range(1, rank)}
    return _first_only(node, lambda *_: Axes(moves, "picks positions on the axis that is cut"), "carried")


def _part(node: fx.Node, split: fx.Node) -> Rule:
    """One of the tensors that another is split into."""
    name, index = name_of(split), node.args[1]
    if name not in _SPLITS or not isinstance(index, int):
        return Rule((Operand(0, split, Never("gives several tensors in a way that has no rule")),), "carried")
    source = tensor_inputs(split)[0]
    before, after = _shapes(source, node)
    dim = argument(split, "dim", 1 if name == "unbind" else 2, 0)
    if not isinstance(dim, int):
        raise Stuck("splits along an axis that is not written as a number")
    axis = dim % len(before)
    if name == "unbind":
        moves = {old: old - (old > axis) for old in range(len(before)) if old != axis}
        return Rule((Operand(0, source, Axes(moves, "takes apart the axis that is cut")),), "carried")
    sizes = [part.shape[axis] for part in split.meta["value"]]
    piece = Piece(axis, sum(sizes[:index]), after[axis], before[axis])
    return Rule((Operand(0, source, Whole(piece)),), "carried")


def _glu(node: fx.Node) -> Rule:
    module = node.meta.get("module")
    dim = module.dim if module is not None else argument(node, "dim", 1, -1)
    rank = len(_shapes(tensor_inputs(node)[0], node)[0])
    return _first_only(node, lambda *_: Halves(int(dim) % rank), "gated")


def _product(node: fx.Node) -> Rule:
    if name_of(node) == "einsum":
        return Rule(tuple(_never(node, "is a product whose axes are given by a text")), "made")
    return _batched(node, "multiplied")


def _attention(node: fx.Node) -> Rule:
    if node.op == "call_module":
        return Rule(tuple(_never(node, "is one call whose heads cannot be taken apart")), "made")
    return _batched(node, "attended")


def _batched(node: fx.Node, effect: str) -> Rule:
    """Products of matrices, of which the last two axes are; those before are positions, such as heads."""
    after, operands = shape_of(node), []
    for position, source in positions_of(node):
        shape = shape_of(source)
        if shape is None or after is None:
            raise Stuck("multiplies what is no single tensor")
        shift = len(after) - len(shape)
        rows = len(after) - 2
        moves = {axis - shift: axis for axis in range(max(0, shift), rows) if shape[axis - shift] == after[axis]}
        repeated = frozenset(range(rows)) - frozenset(moves.values())
        operands.append(Operand(position, source, Axes(moves, "is a product over the axis that is cut", repeated)))
    return Rule(tuple(operands), effect)


def _layer(node: fx.Node) -> Rule:
    layer = layer_of(node)
    source: Any = node.args[0]
    assert layer is not None
    return Rule((Operand(0, source, layer.relation),), "layer")


_BY_KIND: dict[str, Callable[[fx.Node], Rule]] = {
    **dict.fromkeys(LAYERS, _layer),
    "norm": _norm,
    "norm_act": _norm,
    "activation": _activation,
    "identity": lambda node: _first_only(node, Aligned, "carried"),
    "add": _elementwise("added"),
    "mul": _elementwise("multiplied"),
    "pool": _leading("carried", "pools over the axis that is cut"),
    "lp_pool": _leading("stirred", "pools over the axis that is cut"),
    "upsample": _leading("carried", "resizes the axis that is cut"),
    "reduction": _reduction,
    "softmax": _softmax,
    "cat": _cat,
    "layout": _layout,
    "permute": _permuted,
    "glu": _glu,
    "matmul": _product,
    "attention": _attention,
}
_BY_NAME: dict[str, Callable[[fx.Node], Rule]] = {
    "getitem": _item,
    **dict.fromkeys(_SPLITS, _split),
    "stack": _stack,
    "roll": _rolled,
    "flip": _rolled,
    "pad": _padded,
    "sub": _elementwise("added"),
    "rsub": _elementwise("added"),
    **dict.fromkeys(("div", "truediv", "divide"), _elementwise("divided")),
    **dict.fromkeys(("neg", "abs"), _elementwise("carried")),
    **dict.fromkeys(
        ("pow", "exp", "erf", "clamp", "clip", "sqrt", "rsqrt", "square", "log", "sin", "cos"), _elementwise("bent")
    ),
    **dict.fromkeys(
        ("PixelShuffle", "pixel_shuffle"),
        lambda node: Rule(tuple(_never(node, "makes positions of channels")), "made"),
    ),
}
_FIRST_BY_NAME = frozenset({"PixelShuffle", "pixel_shuffle"})


def users_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that take a node's tensor; the parts of a split stand for the split itself."""
    found: list[fx.Node] = []
    for user in node.users:
        if user.op == "output":
            found.append(user)
        elif kind_of(user) is None and name_of(user) in _SPLITS and user.op != "call_module":
            found += user.users
        elif holds_tensor(user.meta.get("value")):
            found.append(user)
    return found
