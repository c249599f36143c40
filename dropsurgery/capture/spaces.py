"""Where the channels are, and how much smaller than the input a feature is, followed from operation to operation.

Sizes are followed, not guessed from one shape: windows, heads and tokens keep the size of the map they came from,
and each halving counts as 2 also where odd sizes round (7 to 4), so that small images give the same facts.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from dropsurgery.capture.dataflow import Dataflow, shape_of
from dropsurgery.kinds import kind_of, kinds_of

_ATTENTION = {operator.matmul, torch.matmul, torch.bmm, F.scaled_dot_product_attention, "matmul", "bmm"}
_RESHAPES = {torch.reshape, torch.flatten, "reshape", "view", "flatten", "unflatten", "contiguous"}
_PERMUTES = {torch.permute, "permute"}
_POOLING = {"reduction", "adaptive_pool"}
_SWAPS = {torch.transpose, torch.swapaxes, "transpose", "swapaxes", "swapdims"}


class Space(NamedTuple):
    """Facts of one tensor.

    `axis`: index of the channels, None if unknown. `size`: extents of the map that it is or came from.
    `reduction`: input size / feature size. `level`: halvings on the way, global pooling not counted.
    `collapsed`: the map is gone for good (pooled to one number a channel, or one token selected).
    """

    axis: int | None
    size: tuple[int, ...] | None
    reduction: float
    level: int
    collapsed: bool = False


def find_spaces(flow: Dataflow) -> dict[fx.Node, Space]:
    """The space of every node of the dataflow."""
    spaces: dict[fx.Node, Space] = {}
    sources = [shape for node in flow.order if not flow.inputs[node] and (shape := shape_of(node)) is not None]
    whole = next((shape for shape in sources if len(shape) > 3), sources[0] if sources else ())
    for node in flow.order:
        inputs = flow.inputs[node]
        if not inputs or (shape_of(inputs[0]) is None and not flow.inputs[inputs[0]]):  # also a part of a container
            spaces[node] = _of_input(shape_of(node) or (), whole)
        else:
            spaces[node] = _follow(node, inputs, spaces, whole)
    return spaces


def main_input(node: fx.Node, inputs: list[fx.Node], spaces: dict[fx.Node, Space]) -> fx.Node:
    """The input whose map a node goes on with: the query of an attention, else the largest (not a gate)."""
    if len(inputs) == 1 or node.target in _ATTENTION or isinstance(node.meta.get("module"), nn.MultiheadAttention):
        return inputs[0]
    return max(inputs, key=lambda source: (math.prod(shape_of(source) or ()), spaces[source].axis is not None))


def _of_input(shape: tuple[int, ...], whole: tuple[int, ...]) -> Space:
    if len(shape) < 3:
        return Space(len(shape) - 1 if len(shape) == 2 else None, None, 1.0, 0)
    shrunk = max(1.0, whole[-1] / shape[-1]) if len(whole) == len(shape) else 1.0  # a part inside an opaque module
    return Space(1, shape[2:], shrunk, round(math.log2(shrunk)))


def _follow(node: fx.Node, inputs: list[fx.Node], spaces: dict[fx.Node, Space], whole: tuple[int, ...]) -> Space:
    source = main_input(node, inputs, spaces)
    before, shape = spaces[source], shape_of(node)
    gone = all(spaces[each].collapsed for each in inputs)
    if shape is None:
        return before if gone == before.collapsed else before._replace(collapsed=gone)
    axis = _axis(node, before.axis, shape_of(source), shape)
    vector = len(shape) <= 2 and shape[:1] == whole[:1]  # positions may also be folded into the batch
    same = axis == before.axis and (gone or vector) == before.collapsed
    space = before if same else before._replace(axis=axis, collapsed=gone or vector)
    pools = not _POOLING.isdisjoint(kinds_of(node))
    if len(shape) == 3 and len(whole) == 4 and pools and axis is not None and shape[3 - axis] == 1:
        return space._replace(collapsed=True)
    if pools and len(shape) == 3:
        return _pool_tokens(space, math.prod(shape_of(source) or ()) // math.prod(shape), shape[1])
    if len(shape) != len(whole) or len(shape) < 3 or axis not in (1, len(shape) - 1) or shape[0] != whole[0]:
        return space
    size = tuple(extent for index, extent in enumerate(shape) if index not in (0, axis))
    return _resize(node, space, size, pools)


def _pool_tokens(space: Space, ratio: int, tokens: int) -> Space:
    """Account for tokens of which every `ratio` became one (Hiera): the map that they came from shrinks alike."""
    side = math.isqrt(ratio)
    if side < 2 or side**2 != ratio or not space.size or math.prod(space.size) != ratio * tokens:
        return space
    size = tuple(extent // side for extent in space.size)
    return space._replace(size=size, reduction=space.reduction * side, level=space.level + round(math.log2(side)))


def _resize(node: fx.Node, space: Space, size: tuple[int, ...], pools: bool) -> Space:
    """Account for a map of another size than before."""
    if size == space.size and not all(extent == 1 for extent in size):
        return space
    before = space.size or size
    down = max(old / new for old, new in zip(before, size, strict=True))
    up = max(new / old for old, new in zip(before, size, strict=True))
    enlarges = kind_of(node) in ("upsample", "conv_transpose") or node.target in _RESHAPES
    if up >= 1.5 and (down >= 1.5 or not enlarges):
        return space  # no map: tokens by heads, or attention weights that a convolution mixes
    pooled = all(extent == 1 for extent in size)
    # A convolution over the whole map is the first fully connected layer of older nets; `x.norm` pools like `x.mean`.
    pools = pools or (pooled and down > 4 and (kind_of(node) != "conv" or space.level > 0))
    space = space._replace(size=size, collapsed=space.collapsed or (pools and pooled))
    if down >= 1.5:
        halvings = 0 if pools else round(math.log2(round(down)))
        return space._replace(reduction=space.reduction * round(down), level=space.level + halvings)
    if up >= 1.5:
        doublings = round(math.log2(round(up)))
        return space._replace(reduction=space.reduction / round(up), level=space.level - doublings)
    return space


def _axis(node: fx.Node, axis: int | None, old: tuple[int, ...] | None, new: tuple[int, ...]) -> int | None:
    if not new:
        return None
    kind, last = kind_of(node), len(new) - 1
    if kind in ("conv", "conv_transpose", "upsample", "pool"):
        return 1 if len(new) > 2 else None
    if kind == "linear" or isinstance(node.meta.get("module"), nn.Embedding):
        return last
    if axis is None or old is None:
        return last if kind == "norm" and "layer_norm" in kinds_of(node) else None
    order = _permutation(node, len(new))
    if order is not None:
        return order.index(axis)
    if node.target in _RESHAPES:
        return _axis_after_reshape(axis, old, new)
    if len(old) == len(new):
        return axis
    return last if axis == len(old) - 1 else axis if axis <= last else None


def _axis_after_reshape(axis: int, old: tuple[int, ...], new: tuple[int, ...]) -> int | None:
    channels, last = old[axis], len(new) - 1
    candidates = (last, 1) if axis == len(old) - 1 else (1, last)
    return next((at for at in candidates if 0 < at <= last and new[at] == channels), None)


def _permutation(node: fx.Node, rank: int) -> list[int] | None:
    """Which old axis each new axis is, for nodes that only reorder axes; None for others or unknown orders."""
    given: Any = node.args[1:]
    if node.target in _PERMUTES:
        order: Any = node.kwargs.get("dims", given[0] if given and isinstance(given[0], (tuple, list)) else given)
        return [int(axis) % rank for axis in order]
    if node.target in _SWAPS and len(given) == 2:
        axes = list(range(rank))
        first, second = given
        axes[first], axes[second] = axes[second], axes[first]
        return axes
    return None
