"""Which residual joins are one block, and which modules are blocks.

Names say nothing here, the tree of modules does: joins of one forward (attention and MLP of ViT, the sums of a NASNet
cell) are one block, together with those of modules inside it (a positional encoding with a join of its own), unless
they repeat one another in a chain (a stage that loops over its blocks in its own forward). Modules that only add
their input to what one child makes of it (EfficientViT's `Residual`) are one block with their neighbours where several
modules hold the same row of them.
"""

from __future__ import annotations

from collections import Counter
from itertools import groupby, pairwise

from dropsurgery.capture.dataflow import Dataflow, place_of, prefixes
from dropsurgery.capture.joins import Region
from dropsurgery.kinds import kind_of

Kinds = tuple[str | None, ...]


def find_blocks(flow: Dataflow, regions: list[Region]) -> tuple[list[int], dict[str, list[int]]]:
    """The block of each of the outermost `regions`, and for each module that is a block the positions of its joins."""
    kinds = [_kinds(flow, region) for region in regions]
    homes = _homes(regions, kinds)
    groups = [(home, list(group)) for home, group in groupby(range(len(regions)), key=homes.__getitem__)]
    alike = Counter(tuple(kinds[index] for index in members) for _, members in groups)
    blocks: list[int] = []
    modules: dict[str, list[int]] = {}
    count = 0
    for home, members in groups:
        row = [kinds[index] for index in members]
        period = _period(flow, [regions[index] for index in members], row)
        if not home and period == len(members):  # the forward of the whole net is no block
            period = 1
        elif home and period > 1 and alike[tuple(row)] > 1:  # several modules like this one: that is the block
            period = len(members)
        blocks += [count + at // period for at in range(len(members))]
        count = blocks[-1] + 1
        if home and period == len(members):
            modules.setdefault(home, []).extend(members)
    return blocks, modules


def _kinds(flow: Dataflow, region: Region) -> Kinds:
    """What the branch of a join computes, in order."""
    kinds = (flow.kind[node] for node in sorted(region.branch, key=flow.order.__getitem__))
    return tuple(kind for kind in kinds if kind != "identity")


def _homes(regions: list[Region], kinds: list[Kinds]) -> list[str]:
    """The module whose joins are seen together, for each join; "" where there is none."""
    owners = [region.node.meta["owner"] for region in regions]
    own = Counter(owners)
    if len(own) == 1:  # one for all says nothing
        return [""] * len(owners)
    inside = Counter(prefix for owner in own for prefix in prefixes(owner)[:-1])
    outer = {
        # The outermost module with as many joins of its own as there are other owners of joins inside it.
        owner: next((prefix for prefix in prefixes(owner) if own[prefix] >= max(1, inside[prefix])), owner)
        for owner in own
    }
    homes = [outer[owner] for owner in owners]
    rows = _rows(regions, homes, kinds)
    repeated = Counter(rows.values())
    parents = [home.rpartition(".")[0] for home in homes]
    return [
        parent if parent in rows and repeated[rows[parent]] > 1 else home
        for home, parent in zip(homes, parents, strict=True)
    ]


def _rows(regions: list[Region], homes: list[str], kinds: list[Kinds]) -> dict[str, tuple[Kinds, ...]]:
    """The modules that hold several joins, each in a wrapper of its own, with what these compute."""
    rows: dict[str, list[Kinds]] = {}
    others: set[str] = set()
    count = Counter(homes)
    for region, home, what in zip(regions, homes, kinds, strict=True):
        parent = home.rpartition(".")[0]
        if count[home] == 1 and _wraps(region, home):
            rows.setdefault(parent, []).append(what)
        else:
            others.add(parent)
    return {parent: tuple(row) for parent, row in rows.items() if parent and parent not in others and len(row) > 1}


def _wraps(region: Region, home: str) -> bool:
    """Whether the branch of a join is one child of a module."""
    start = len(home) + 1
    working = [node for node in region.branch if kind_of(node) not in ("identity", "mul")]
    return len({place_of(node)[start:].partition(".")[0] for node in working}) == 1


def _period(flow: Dataflow, regions: list[Region], kinds: list[Kinds]) -> int:
    """After how many joins a chain of them repeats; all of them where they do not."""
    count = len(regions)
    if all(flow.order[after.join.fork] >= flow.order[before.node] for before, after in pairwise(regions)):
        for period in range(1, count // 2 + 1):
            if count % period == 0 and kinds[period:] == kinds[:-period]:
                return period
    return count
