"""The layer that turns an image, or a map, into tokens: one for each patch.

- a convolution on the image whose patches do not overlap (kernel = stride): ViT, Swin, Mixer, ConvNeXt's stem;
- a linear layer on patches that were cut out before (NaFlexViT);
- outside of residual blocks, a convolution whose map is then laid out as a row of tokens: overlapping patches (MViT;
  PVT, with one for each stage that begins so), the last of a convolutional stem (LeViT, XCiT), the projection of a
  hybrid ViT. With stride 1 only if no convolution sees a map again (MobileViT cuts and pastes);
- before the first residual block, one whose map is then laid out with its channels last (the image encoder of SAM 2).

`output` is what follows directly as tokens, its norm included.
"""

from __future__ import annotations

from torch import fx

from dropsurgery.kinds import conv_fact, data_inputs, kind_of, skip_identities, tensor_users
from dropsurgery.matching import Into, Match, Pattern, called, ops
from dropsurgery.patterns._walks import first_inputs, nearest, only_user
from dropsurgery.records import Edge, TensorFact

_LAID_OUT = ("layout", "norm", "norm_act", "activation")


def _makes_tokens(match: Match) -> str | None:
    layer = match.nodes["layer"]
    fact = conv_fact(layer)
    first = bool(first_inputs(layer))
    if fact is None:
        return None if first and _embeds(layer) else f"{called(layer)} does not embed patches of the input"
    if fact.groups > 1:
        return f"{called(layer)} is grouped"
    if first and fact.kernel == fact.stride and min(fact.kernel) > 1:
        return None
    if layer.meta["flow"] != "trunk":
        return f"{called(layer)} lies inside a residual block"
    tokens = _follow(layer, (*_LAID_OUT, "add"))  # positions may be added to the map
    last = _rank(tokens) > 3 and tokens.meta["channel_axis"] == -1 and not _joins_before(layer)
    if _rank(tokens) != 3 and not last:
        return f"{called(layer)} makes no tokens"
    if max(fact.stride) == 1 and nearest(tensor_users(layer), tensor_users, lambda node: conv_fact(node) is not None):
        return f"{called(layer)} makes tokens that become a map again"
    return None


def _embeds(layer: fx.Node) -> bool:
    """Whether a linear layer that reads the input makes tokens to go on with: not queries or a hidden layer."""
    following = _follow(layer, ("layout", "norm", "norm_act"))
    users = skip_identities(following, tensor_users)
    alone = layer.meta["flow"] == "trunk" and not any(kind_of(user) in ("activation", "glu", "mul") for user in users)
    return alone and _rank(layer) == 3


def _rank(node: fx.Node) -> int:
    value = node.meta.get("value")
    return len(value.shape) if isinstance(value, TensorFact) else 0


def _joins_before(layer: fx.Node) -> bool:
    return bool(nearest(data_inputs(layer), data_inputs, lambda node: "join" in node.meta))


def _follow(layer: fx.Node, kinds: tuple[str, ...]) -> fx.Node:
    """The last node after a layer in a row of such kinds, each the only user of the one before, and no identity."""
    node = end = layer
    while True:
        user = only_user(node)
        if user is None or kind_of(user) not in ("identity", *kinds) or len(data_inputs(user)) > 1:
            return end
        node = user
        end = end if kind_of(node) == "identity" else node


def _tokens(match: Match) -> tuple[Edge, ...]:
    return (Edge(_follow(match.nodes["layer"], _LAID_OUT)),)


PATTERN = Pattern(
    "patch_embed",
    forms=[ops(layer="conv"), ops(layer="linear")],
    edges={"output": _tokens, "input": Into("layer")},
    check=_makes_tokens,
)
