"""U-Net's two convolutions in a row: (conv ▶ norm? ▶ activation) twice, in the encoder or decoder of a net with both.

Exactly two, of one width and one kernel larger than 1: the first begins a level (it reads a pooled, upsampled or
concatenated map, the image, or halves the map itself), the second keeps its size, and in the encoder no third such
convolution goes on with its result (in the decoder that one is the next block's, as in MAnet). So a VGG's levels of two
are pairs where it is the encoder of a U-Net, its levels of three are not; nor are stems of three convolutions,
Inception's branches, blocks with a residual join, or anything in a net without a decoder.
"""

from __future__ import annotations

from torch import fx

from dropsurgery.kinds import ConvFact, conv_fact, kind_of, skip_identities, tensor_users
from dropsurgery.matching import After, Match, Pattern, ops, units
from dropsurgery.patterns._walks import main_input


def _is_pair(match: Match) -> str | None:
    first, second = match.nodes["conv"], match.nodes["conv2"]
    fact, fact2 = conv_fact(first), conv_fact(second)
    if first.meta["role"] == "backbone":
        return "the net has no decoder"
    if any(conv.meta["flow"] != "trunk" for conv in (first, second)):
        return "conv lies inside a residual block"
    if fact is None or fact2 is None or not _alike(fact, fact2) or max(fact2.stride) > 1:
        return "convs differ in width or kernel, or have a kernel of 1, or the second has a stride"
    if max(fact.stride) == 1 and not _begins_a_level(first):
        return "conv goes on with a layer before it"
    following = skip_identities(match.nodes["act2"], tensor_users)
    if first.meta["role"] != "decoder" and any(_goes_on(node, fact2) for node in following):
        return "a third convolution goes on with the second"
    return None


def _alike(first: ConvFact, second: ConvFact) -> bool:
    return min(first.kernel) > 1 and first.kernel == second.kernel and first.out_channels == second.out_channels


def _begins_a_level(conv: fx.Node) -> bool:
    """Whether what a convolution reads was not made by a layer at the same size."""
    source = main_input(conv)
    while source is not None and kind_of(source) == "identity":
        source = main_input(source)
    return source is None or kind_of(source) not in ("activation", "norm", "norm_act", "conv")


def _goes_on(node: fx.Node, second: ConvFact) -> bool:
    """Whether a node is another convolution like those of a pair, at the same size."""
    fact = conv_fact(node)
    return fact is not None and fact.kernel == second.kernel and max(fact.stride) == 1


_FIRST = [
    ops(conv="conv", norm="norm", act="activation"),
    ops(conv="conv", act="norm_act"),
    ops(conv="conv", act="activation"),
]
_SECOND = [
    ops(conv2="conv", norm2="norm", act2="activation"),
    ops(conv2="conv", act2="norm_act"),
    ops(conv2="conv", act2="activation"),
]

PATTERN = Pattern(
    "double_conv",
    forms=units(_FIRST, _SECOND),
    edges={"between": After("act"), "output": After("act2")},
    check=_is_pair,
)
