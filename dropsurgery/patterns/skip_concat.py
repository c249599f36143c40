"""Where a decoder concatenates an upsampled map with one that skipped the deeper layers (U-Net, U-Net++, DeepLabV3+).

`skip` is each operand that comes from the encoder with no upsampling on its way, or a concatenation with such a part;
`upsampled` each that was enlarged since the last sum or concatenation. What was enlarged from a pooled summary (the
branches of pyramid pooling and ASPP) is none, so that their concatenations are none either, nor are those of
Inception and DenseNet.
"""

from __future__ import annotations

from torch import fx

from dropsurgery.kinds import data_inputs, kind_of, kinds_of
from dropsurgery.matching import After, Match, Miss, Pattern, called, ops
from dropsurgery.patterns._walks import concatenated, enlarges, found, main_input, nearest, operands, reason
from dropsurgery.records import Edge


def _upsampled(operand: fx.Node) -> bool:
    """Whether a tensor was enlarged on its way from the last sum or concatenation, and not from a pooled summary."""
    enlarged = False
    node: fx.Node | None = operand
    while node is not None and kind_of(node) != "cat":
        if kind_of(node) == "add":
            join = node.meta.get("join")
            node = join.fork if join is not None else None
            continue
        if enlarged and ("adaptive_pool" in kinds_of(node) or kind_of(node) == "reduction"):
            return False
        enlarged = enlarged or enlarges(node)
        node = main_input(node)
    return enlarged


def _skips(operand: fx.Node) -> bool:
    """Whether a tensor comes from the encoder without upsampling, or is a concatenation with such a part."""
    if not nearest([operand], data_inputs, enlarges):
        return True
    node: fx.Node | None = operand
    while node is not None and kind_of(node) == "identity":
        node = main_input(node)
    return node is not None and kind_of(node) == "cat" and any(map(_skips, concatenated(node)))


def _parts(cat: fx.Node) -> tuple[list[int], list[int]] | str:
    """The indices of the operands that skip and of those that were upsampled."""
    joined = concatenated(cat)
    if len(joined) < 2:
        return f"{called(cat)} does not join maps along their channels"
    upsampled = [index for index, operand in enumerate(joined) if _upsampled(operand)]
    if not upsampled:
        return "no operand is upsampled"
    skips = [index for index, operand in enumerate(joined) if index not in upsampled and _skips(operand)]
    return (skips, upsampled) if skips else "no operand skips from the encoder"


def _edges(match: Match, which: int) -> tuple[Edge, ...] | Miss:
    cat = match.nodes["cat"]
    return operands(cat, found(_parts(cat))[which])


PATTERN = Pattern(
    "skip_concat",
    forms=[ops(cat="cat")],
    edges={
        "skip": lambda match: _edges(match, 0),
        "upsampled": lambda match: _edges(match, 1),
        "output": After("cat"),
    },
    check=lambda match: reason(_parts(match.nodes["cat"])),
)
