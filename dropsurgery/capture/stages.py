"""Stages and blocks of the backbone, told from its residual blocks and halvings.

How stages are numbered:

1. Every tensor has a *level*: the halvings on its way from the input. Dilation stands in for a stride: where the
   residual blocks change their width at one resolution and dilate more than those before, the level rises all the
   same, so that a dilated ResNet keeps its stage numbers.
2. The *body* begins at the first fork or grouped convolution (with the pre-activation before the fork, if any).
   What comes before is the stem, stage 0.
3. A node inside a residual block has the level of the block's result, so that a block that halves (its first
   convolution still at the larger map) is whole. What directly follows a join without parameters (its ReLU) belongs
   to the join; all further nodes before the next block belong to the next stage, if one begins there: downsampling
   layers of ConvNeXt and Swin, blocks of EfficientNet that halve and so have no shortcut.
4. Level 2 (reduction 4) is stage 1 in nets that go down to reduction 32, and residual blocks before it are still
   stem (EfficientNet, MobileNet). Nets that end earlier (made for small images), or whose body begins only at
   reduction 16 (LeViT), count from the level of their first residual block.
5. Nets whose body has one level only (ViT, Mixer) have no stages; decoders and heads neither.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import groupby
from math import log2

from torch import fx

from dropsurgery.capture.dataflow import Dataflow, shape_of
from dropsurgery.capture.joins import Region
from dropsurgery.capture.spaces import Space, main_input
from dropsurgery.kinds import conv_fact, kind_of


@dataclass(frozen=True)
class Place:
    """Where a node of the backbone lies: its `stage`, its `depth` in [0, 1] and, inside a residual block, `block`."""

    stage: int | None
    depth: float | None
    block: tuple[int, int] | None


def find_places(
    flow: Dataflow, spaces: dict[fx.Node, Space], regions: list[Region], nodes: list[fx.Node]
) -> dict[fx.Node, Place]:
    """The place of each of a backbone's `nodes` (in topological order)."""
    backbone = _Backbone(flow, spaces, regions, nodes)
    stages = backbone.stages()
    blocks, count = _blocks(backbone.joins)
    places = {}
    for node in nodes:
        home = backbone.home.get(node)
        near = home if home is not None else backbone.nearest(node)
        depth = None if near is None else blocks[near] / max(1, count - 1)
        places[node] = Place(stages[node], depth, None if home is None else (blocks[home], count))
    return places


def _blocks(joins: list[fx.Node]) -> tuple[list[int], int]:
    """The block index of each join: joins in a row of one owner (attention and MLP of ViT) are one block."""
    owners = [join.meta["owner"] for join in joins]
    several = len(set(owners)) > 1  # one owner for all says nothing: each join is a block then
    blocks: list[int] = []
    for index, owner in enumerate(owners):
        same = several and index > 0 and owner == owners[index - 1]
        blocks.append(blocks[-1] + (not same) if blocks else 0)
    return blocks, blocks[-1] + 1 if blocks else 0


class _Backbone:
    """A backbone's nodes, its outermost joins in order, and for the nodes in their blocks which one (`home`)."""

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
        self.joins = [region.node for region in reversed(outer)]
        self.positions = [flow.order[join] for join in self.joins]
        self.levels = self._join_levels()
        self._adopt_followers()

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
            before = (level, dilation)
        return levels

    def _width_and_level(self, index: int) -> tuple[int | None, int]:
        join = self.joins[index]
        shape, space = shape_of(join) or (), self.spaces[join]
        return (None if space.axis is None else shape[space.axis], space.level)

    def _adopt_followers(self) -> None:
        """Give what directly follows a join, without parameters and at its size, to the join's block."""
        ends = set(self.joins)
        for node in self.nodes:
            if node in self.home or not self.flow.inputs[node] or self.flow.weighted(node):
                continue
            source = main_input(node, self.flow.inputs[node], self.spaces)
            if source in ends and self.spaces[source].size == self.spaces[node].size:
                self.home[node] = self.home[source]
                ends.add(node)

    def _around(self, node: fx.Node) -> tuple[int | None, int | None]:
        """The last join before a node and the first after it, in topological order."""
        after = bisect_left(self.positions, self.flow.order[node])
        return (after - 1 if after else None, after if after < len(self.joins) else None)

    def nearest(self, node: fx.Node) -> int | None:
        """The join whose block a node outside of all blocks leads to, else the last one; None without joins."""
        last, following = self._around(node)
        return last if following is None else following

    def level(self, node: fx.Node) -> int:
        """The level of a node, whole blocks on one level and dilation counted."""
        if node in self.home:
            return self.levels[self.home[node]]
        last, following = self._around(node)
        if last is None:
            return self.spaces[node].level
        here = self.levels[last]
        dilated = here - self.spaces[self.joins[last]].level
        begins = following is not None and self.levels[following] > here
        return max(here + begins, self.spaces[node].level + dilated)

    def stages(self) -> dict[fx.Node, int | None]:
        """The stage of every node; the module's docstring has the rule."""
        start = self._body_start()
        levels = {node: self.level(node) for node in self.nodes}
        body = [levels[node] for node in self.nodes if self.flow.order[node] >= start and self.flow.inputs[node]]
        if not body or min(body) == max(body):
            return dict.fromkeys(self.nodes, None)
        first = min(self.levels) if self.levels else min(body) + 1
        classic = max(body) >= 5 and min(body) <= 3 and (first >= 1 or not self.levels)
        base = 1 if classic else first - 1
        return {node: max(0, level - base) if self.flow.order[node] >= start else 0 for node, level in levels.items()}

    def _body_start(self) -> int:
        """The position of the first node after the stem; 0 in plain chains (VGG), which have none."""
        members = set(self.nodes)
        for node in self.nodes:
            conv = conv_fact(node)
            if conv is not None and conv.groups > 1:
                return self.flow.order[node]
            if sum(user in members for user in self.flow.users[node]) > 1:
                return self._opening(node)
        return 0

    def _opening(self, fork: fx.Node) -> int:
        """The position at which the block of a fork begins: after it, or at its pre-activation if it has one."""
        first = fork
        while kind_of(first) in ("norm", "norm_act", "activation", "identity") and self.flow.inputs[first]:
            below = self.flow.inputs[first][0]
            if kind_of(below) == "pool":
                return self.flow.order[first]
            first = below
        return self.flow.order[fork] + 1
