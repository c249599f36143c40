"""A map multiplied by a gate for each channel that is computed from that map alone: squeeze and excitation, ECA, ESE.

The gate ends in a sigmoid, has one value for each channel, and layers lie between it and the map; how it squeezes
(mean, maximum, attention pooling) is free. Gates for each position (spatial attention), gates from another tensor and
those that share one softmax (selective kernels, split attention) are none.

`output` is the gated map; `input` the map before, for the gate and the product alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dropsurgery.kinds import data_inputs, kind_of, kinds_of, mixes, tensor_users
from dropsurgery.matching import After, Match, Miss, Pattern, called, ops
from dropsurgery.patterns._walks import between, found, reason, size
from dropsurgery.records import Edge, TensorFact


@dataclass(frozen=True)
class _Parts:
    """The map, and all that lies between it and the product."""

    source: fx.Node
    inside: set[fx.Node]


def _parts(product: fx.Node) -> _Parts | str:
    operands = data_inputs(product)
    if len(operands) != 2:
        return f"{called(product)} has an operand that does not depend on the input"
    for gate, source in (operands, operands[::-1]):
        while kind_of(gate) in ("layout", "identity"):
            gate = data_inputs(gate)[0]
        if "sigmoid" in kinds_of(gate):
            return _gated(product, gate, source)
    return "no operand is a sigmoid"


def _gated(product: fx.Node, gate: fx.Node, source: fx.Node) -> _Parts | str:
    value, channels = source.meta.get("value"), source.meta["channels"]
    if not isinstance(value, TensorFact) or channels is None or size(gate) != value.shape[0] * channels:
        return "the gate does not have one value for each channel"
    if size(source) <= size(gate):
        return "the product is no map"
    while kind_of(source) == "identity" and between(gate, source) is None:
        source = data_inputs(source)[0]
    inside = between(gate, source)
    if inside is None:
        return "the gate is not computed from the map alone"
    if not any(map(mixes, inside)):
        return "no layer lies between the map and its gate"
    around = between(product, source)
    return _Parts(source, inside if around is None else around)


def _input(match: Match) -> tuple[Edge, ...] | Miss:
    parts = found(_parts(match.nodes["product"]))
    if not parts.inside.issuperset(tensor_users(parts.source)):
        return Miss(f"{called(parts.source)} is used elsewhere too", parts.source)
    return (Edge(parts.source),)


PATTERN = Pattern(
    "se_gate",
    forms=[ops(product="mul")],
    edges={"output": After("product"), "input": _input},
    check=lambda match: reason(_parts(match.nodes["product"])),
)
