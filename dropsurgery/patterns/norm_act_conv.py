"""norm ▶ activation ▶ conv, the unit of pre-activation nets (ResNet v2, DenseNet, DPN).

In a post-activation net the same three operations meet across two units, and are none. What tells them apart is where
a row of norms, activations and convolutions begins: here with a norm that reads a sum, a concatenation, a pooled
tensor or one that is used elsewhere too. The activation may have other users (a projection that starts after it).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dropsurgery.kinds import data_inputs, kind_of, tensor_users
from dropsurgery.matching import After, Into, Match, Miss, Pattern, called, ops
from dropsurgery.patterns._walks import found
from dropsurgery.records import Edge


@dataclass(frozen=True)
class _Unit:
    norm: fx.Node
    act: fx.Node


def _unit(conv: fx.Node) -> _Unit | str:
    act = _before(conv)
    if act is None or kind_of(act) not in ("activation", "norm_act"):
        return f"no activation comes before {called(conv)}"
    norm = act if kind_of(act) == "norm_act" else _before(act)
    if norm is None or kind_of(norm) not in ("norm", "norm_act"):
        return "no norm comes before the activation"
    if norm is not act and len(tensor_users(norm)) > 1:
        return f"{called(norm)} has several users"
    return _Unit(norm, act)


def _before(node: fx.Node) -> fx.Node | None:
    """The one tensor that a node works on, identities walked over."""
    inputs = data_inputs(node)
    while len(inputs) == 1 and kind_of(inputs[0]) == "identity":
        inputs = data_inputs(inputs[0])
    return inputs[0] if len(inputs) == 1 else None


def _begins_with_a_norm(match: Match) -> str | None:
    conv: fx.Node = match.nodes["conv"]
    while True:
        unit = _unit(conv)
        if isinstance(unit, str):
            return unit if conv is match.nodes["conv"] else "norm belongs to the convolution before it"
        source = _before(unit.norm)
        if source is None:
            return "norm reads the input"
        if len(tensor_users(source)) > 1 or kind_of(source) in ("add", "cat"):
            return None
        pooled = _before(source) if kind_of(source) == "pool" else None
        if pooled is not None and kind_of(pooled) in ("conv", "add", "cat", "norm", "norm_act", "activation"):
            return None
        if kind_of(source) != "conv":
            return f"norm follows {called(source)}"
        conv = source


def _found(match: Match) -> _Unit:
    return found(_unit(match.nodes["conv"]))


def _norm(match: Match) -> tuple[Edge, ...] | Miss:
    unit = _found(match)
    if unit.norm is unit.act:
        return Miss(f"{called(unit.norm)} is one layer, nothing between norm and activation can be reached", unit.norm)
    return (Edge(unit.norm),)


PATTERN = Pattern(
    "norm_act_conv",
    forms=[ops(conv="conv")],
    edges={
        "output": After("conv"),
        "conv": Into("conv"),
        "norm": _norm,
        "input": lambda match: (Edge(_found(match).norm, 0),),
    },
    check=_begins_with_a_norm,
)
