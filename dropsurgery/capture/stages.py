"""Stages and blocks of the backbone, told from its residual blocks, its halvings and the tree of modules.

How stages are numbered:

1. Every tensor has a *level*: the halvings on its way from the input. Dilation stands in for a stride: where the
   residual blocks change their width at one resolution and dilate more than those before, the level rises all the
   same, so that a dilated ResNet keeps its stage numbers. What only serves a later block of a lower level (the
   pooled queries of GC ViT) has the level of that block.
2. The *body* is what follows the stem (stage 0). It begins with the module that holds the stages, or after the one
   that takes the input, if the tree of modules has such; else at the first fork or grouped convolution (with the
   pre-activation before the fork, if any).
3. A node inside a block has the level of the block's result, so that a block that halves (its first convolution
   still at the larger map) is whole. What directly follows a join without parameters (its ReLU) belongs to the join.
   All further nodes between two blocks of different levels belong to the stage in whose module they are (a
   transition at the end of a CSP stage, the first layers of a stage); where the tree does not tell, to the later
   one: downsampling layers of ConvNeXt and Swin, blocks of EfficientNet that halve and so have no shortcut.
4. Level 2 (reduction 4) is stage 1 in nets that go down to reduction 32, and residual blocks before it are still
   stem (EfficientNet, MobileNet). Nets that end earlier (made for small images), or whose body begins only at
   reduction 16 (LeViT) or 8 (and goes down to 64), count from the level of their first residual block.
5. Nets whose body has one level only (ViT, Mixer) have no stages; decoders and heads neither.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from itertools import groupby, pairwise
from math import log2
from typing import NamedTuple

from torch import fx

from dropsurgery.capture.blocks import find_blocks
from dropsurgery.capture.dataflow import Dataflow, is_within, place_of, prefixes, shape_of
from dropsurgery.capture.joins import Region
from dropsurgery.capture.spaces import Space, main_input
from dropsurgery.kinds import conv_fact


class Place(NamedTuple):
    """Where a node of the backbone lies: its `stage`, its `depth` in [0, 1] and, inside a residual block, `block`."""

    stage: int | None
    depth: float | None
    block: tuple[int, int] | None


def find_places(
    flow: Dataflow, spaces: dict[fx.Node, Space], regions: list[Region], nodes: list[fx.Node]
) -> dict[fx.Node, Place]:
    """The place of each of a backbone's `nodes` (in topological order)."""
    backbone = _Backbone(flow, spaces, regions, nodes)
    stages = _stages(backbone)
    count = backbone.blocks[-1] + 1 if backbone.blocks else 0
    places = {}
    for node in nodes:
        home = backbone.home.get(node)
        near = home if home is not None else backbone.nearest(node)
        depth = None if near is None else backbone.blocks[near] / max(1, count - 1)
        places[node] = Place(stages[node], depth, None if home is None else (backbone.blocks[home], count))
    return places


class _Backbone:
    """A backbone's nodes, its outermost joins in order with their blocks and levels, and for nodes the join (`home`)
    to whose block they belong."""

    def __init__(
        self, flow: Dataflow, spaces: dict[fx.Node, Space], regions: list[Region], nodes: list[fx.Node]
    ) -> None:
        self.flow, self.spaces, self.nodes = flow, spaces, nodes
        self.home: dict[fx.Node, int] = {}
        members, outer = set(nodes), []
        for region in reversed(regions):
            if region.node in members and region.node not in self.home:
                outer.append(region)
                self.home.update(dict.fromkeys((*region.branch, *region.shortcut, region.node), -len(outer)))
        self.home = {node: len(outer) + index for node, index in self.home.items()}
        outer.reverse()
        self.joins = [region.node for region in outer]
        self.positions = [flow.order[join] for join in self.joins]
        self.blocks, modules = find_blocks(flow, outer)
        self.dilated: list[int] = []
        self.levels = self._join_levels()
        self.floor = self._floor()
        self.levels = [int(min(level, self.floor[join])) for level, join in zip(self.levels, self.joins, strict=True)]
        self._complete_modules()
        self._adopt(modules)

    def _join_levels(self) -> list[int]:
        """The level of each join, dilation counted as a stride."""
        dilations = [1] * len(self.joins)
        for node, home in self.home.items():
            conv = conv_fact(node)
            if conv is not None and max(conv.kernel) > 1:
                dilations[home] = max(dilations[home], *conv.dilation)
        levels: list[int] = []
        extra, before = 0, (-1, 1)
        for (_, level), group in groupby(range(len(self.joins)), key=self._width_and_level):
            members = list(group)
            dilation = max(dilations[index] for index in members)
            if level == before[0] and dilation > before[1]:
                extra += round(log2(dilation / before[1]))
            levels += [level + extra] * len(members)
            self.dilated += [extra] * len(members)
            before = (level, dilation)
        return levels

    def _width_and_level(self, index: int) -> tuple[int | None, int]:
        join = self.joins[index]
        shape, space = shape_of(join) or (), self.spaces[join]
        return (None if space.axis is None else shape[space.axis], space.level)

    def _floor(self) -> dict[fx.Node, float]:
        """For each node the lowest level of a join that depends on it with no upsampling on the way.

        Of concatenated parts the largest counts: a class token goes around the upsampling of its map.
        """
        floor: dict[fx.Node, float] = dict.fromkeys(self.flow.order, float("inf"))
        own = dict(zip(self.joins, self.levels, strict=True))
        for node in reversed(self.flow.order):
            level = floor[node]
            if node in own:
                level = floor[node] = min(level, own[node])
            inputs = self.flow.inputs[node]
            kind = self.flow.kind[node]
            if inputs and kind not in ("upsample", "conv_transpose"):
                for source in [main_input(node, inputs, self.spaces)] if kind == "cat" else inputs:
                    if level < floor[source]:
                        floor[source] = level
        return floor

    def _complete_modules(self) -> None:
        """Give joins that open a stage's module at the size before (EfficientViT, GC ViT) the level of the others."""
        owners = [join.meta["owner"] for join in self.joins]
        for last, (here, after) in enumerate(pairwise(self.levels)):
            if here >= after:
                continue
            for module in prefixes(_split(owners[last], owners[last + 1])[0]):
                begin, end = last, last + 1
                while begin and is_within(owners[begin - 1], module):
                    begin -= 1
                while end < len(owners) and is_within(owners[end], module):
                    end += 1
                fewer = last + 1 - begin < end - last - 1
                if begin and fewer and set(self.levels[begin:end]) == {here, after}:
                    self.levels[begin : last + 1] = [after] * (last + 1 - begin)

    def _adopt(self, modules: dict[str, list[int]]) -> None:
        """Give to a block what is in its module, and what directly follows its join without parameters."""
        ends = dict.fromkeys(self.joins)
        for node in self.nodes:
            sources = self.flow.inputs[node]
            if node in self.home or not sources:
                continue
            module = next((prefix for prefix in prefixes(place_of(node)) if prefix in modules), None)
            source = main_input(node, sources, self.spaces)
            follows = source in ends and not self.flow.weighted(node) and self._continues(source, node)
            if follows and (module is None or self.home[source] in modules[module]):
                self.home[node] = self.home[source]
                ends[node] = None
            elif module is not None:
                self.home[node] = self._next_of(modules[module], node)

    def _continues(self, before: fx.Node, after: fx.Node) -> bool:
        """Whether a node is of the size of the one before, and not in another module than that."""
        same = self.spaces[before].size == self.spaces[after].size
        return same and is_within(before.meta["owner"], after.meta["owner"])

    def _next_of(self, joins: list[int], node: fx.Node) -> int:
        """Of a module's joins the first one after a node, else the last."""
        after = bisect_left([self.positions[join] for join in joins], self.flow.order[node])
        return joins[min(after, len(joins) - 1)]

    def around(self, node: fx.Node) -> tuple[int | None, int | None]:
        """The last join before a node and the first after it, in topological order."""
        after = bisect_left(self.positions, self.flow.order[node])
        return (after - 1 if after else None, after if after < len(self.joins) else None)

    def nearest(self, node: fx.Node) -> int | None:
        """The join whose block a node outside of all blocks leads to, else the last one; None without joins."""
        last, following = self.around(node)
        return last if following is None else following


def _stages(backbone: _Backbone) -> dict[fx.Node, int | None]:
    """The stage of every node; the module's docstring has the rule."""
    flow, nodes = backbone.flow, backbone.nodes
    tree = _Tree(backbone)
    start = tree.start()
    levels = {node: _level(backbone, tree, node) for node in nodes}
    worked = flow.closure({node for node in nodes if flow.weighted(node)})
    body = [levels[node] for node in nodes if flow.order[node] >= start and node in worked]
    if not body or min(body) == max(body):
        return dict.fromkeys(nodes, None)
    base = _base(body, backbone.levels)
    return {node: max(0, level - base) if flow.order[node] >= start else 0 for node, level in levels.items()}


def _base(body: list[int], joins: list[int]) -> int:
    """The level of stage 0, from the levels of the body's nodes and of its joins."""
    lowest, highest = min(body), max(body)
    if lowest >= 4 or (lowest == 3 and highest >= 6):
        return lowest - 1
    first = min(joins) if joins else lowest + 1
    return 1 if highest >= 5 and (first >= 1 or not joins) else first - 1


def _level(backbone: _Backbone, tree: _Tree, node: fx.Node) -> int:
    """The level of a node, whole blocks on one level and dilation counted."""
    if node in backbone.home:
        return backbone.levels[backbone.home[node]]
    last, following = backbone.around(node)
    own = int(min(backbone.spaces[node].level, backbone.floor[node]))
    if last is None:
        return max(own, tree.opening.get(_child(tree.holder, node), own)) if following == 0 else own
    here = backbone.levels[last]
    own += backbone.dilated[last]
    begins = following is not None and backbone.levels[following] > here and not tree.ends(node, last)
    return max(here + begins, own)


class _Tree:
    """What the tree of modules says of a backbone's stages."""

    def __init__(self, backbone: _Backbone) -> None:
        self.backbone = backbone
        owners = [join.meta["owner"] for join in backbone.joins]
        self.splits = {
            index: _split(owners[index], owners[index + 1])
            for index, (here, after) in enumerate(pairwise(backbone.levels))
            if here < after
        }
        weighted = (node for node in backbone.nodes if backbone.flow.weighted(node))
        self.first = next(weighted, None)
        self.holder, _ = next(iter(self.splits.values()), ("", ""))
        self.opening = self._opening()

    def _opening(self) -> dict[str, int]:
        """The level that each module before the first join reaches, of those side by side with the first stage."""
        backbone = self.backbone
        levels: dict[str, int] = {}
        for node in backbone.nodes:
            if not self.splits or backbone.flow.order[node] > backbone.positions[0]:
                break
            child, home = _child(self.holder, node), backbone.home.get(node)
            own = min(backbone.spaces[node].level, backbone.floor[node]) if home is None else backbone.levels[home]
            levels[child] = max(levels.get(child, 0), int(own))
        return levels

    def ends(self, node: fx.Node, last: int) -> bool:
        """Whether a node behind the last join of a stage is in the module of that stage."""
        _, module = self.splits[last]
        return bool(module) and is_within(place_of(node), module)

    def start(self) -> int:
        """The position of the first node after the stem; 0 in plain chains (VGG), which have none."""
        found = _first_fork(self.backbone)
        holder = self._holder()
        if not holder:
            return max(found, self._stem_end(found))
        order = self.backbone.flow.order
        begin = next(order[node] for node in self.backbone.nodes if is_within(place_of(node), holder))
        joins = zip(self.backbone.joins, self.backbone.levels, strict=True)
        before = [(join, level) for join, level in joins if order[join] < begin]
        stem = self._stem(holder)
        early = all(level <= 2 and is_within(join.meta["owner"], stem) for join, level in before)
        return begin if early else found

    def _holder(self) -> str:
        """The module that holds most of the stages and does not take the input; "" if there is none."""
        holders = Counter(holder for holder, _ in self.splits.values() if holder)
        taken = "" if self.first is None else place_of(self.first)
        return next((holder for holder, _ in holders.most_common() if not is_within(taken, holder)), "")

    def _stem(self, holder: str) -> str:
        """The outermost module around the first layer that is not around the stages too."""
        assert self.first is not None
        outside = [prefix for prefix in prefixes(place_of(self.first)) if not is_within(holder, prefix)]
        return outside[0] if outside else place_of(self.first)

    def _stem_end(self, fork: int) -> int:
        """The position after the module that takes the input, if that goes to reduction 4 and has the first fork."""
        if self.first is None:
            return 0
        backbone, order = self.backbone, self.backbone.flow.order
        highest = max(backbone.spaces[node].level for node in backbone.nodes)
        for module in prefixes(place_of(self.first))[:-1]:
            inside = [node for node in backbone.nodes if is_within(place_of(node), module)]
            reached = max(backbone.spaces[node].level for node in inside)
            if reached < highest:
                end = max(order[node] for node in inside) + 1
                return end if reached == 2 and fork < end else 0
        return 0


def _split(before: str, after: str) -> tuple[str, str]:
    """The smallest module around two paths, and the largest around the first that is not around the second."""
    ours, theirs = prefixes(before), prefixes(after)
    shared = [prefix for prefix, other in zip(ours, theirs, strict=False) if prefix == other]
    rest = ours[len(shared) :]
    return (shared[-1] if shared else "", rest[0] if rest and len(theirs) > len(shared) else "")


def _child(module: str, node: fx.Node) -> str:
    """The path of the module's child that a node is in; "" if it is in none."""
    place = place_of(node)
    start = len(module) + 1 if module else 0
    name, _, rest = place[start:].partition(".")
    return place[: start + len(name)] if is_within(place, module) and (rest or node.op != "call_module") else ""


def _first_fork(backbone: _Backbone) -> int:
    """The position after the first fork, or of the first grouped convolution before it; 0 where there is none."""
    members = set(backbone.nodes)
    for node in backbone.nodes:
        conv = conv_fact(node)
        if conv is not None and conv.groups > 1:
            return backbone.flow.order[node]
        if sum(user in members for user in backbone.flow.users[node]) > 1:
            return _opening(backbone.flow, node)
    return 0


def _opening(flow: Dataflow, fork: fx.Node) -> int:
    """The position at which the block of a fork begins: after it, or at its pre-activation if it has one."""
    first = fork
    while flow.kind[first] in ("norm", "norm_act", "activation", "identity") and flow.inputs[first]:
        below = flow.inputs[first][0]
        if flow.kind[below] == "pool":
            return flow.order[first]
        first = below
    return flow.order[fork] + 1
