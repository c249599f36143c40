"""conv ▶ norm (of any kind) that no activation follows: the end of a residual branch or its gate, a projection."""

from __future__ import annotations

from dropsurgery.kinds import compound, skip, tensor_users
from dropsurgery.matching import After, Into, Layer, Match, Pattern, called, kind_of, ops


def _no_activation(match: Match) -> str | None:
    norm = match.nodes["norm"]
    users = skip(norm, tensor_users, ("identity", "permute"))
    together = compound(norm)
    if any(kind_of(user) == "activation" for user in users) or (together and together[0] == "activation"):
        return f"{called(norm)} is followed by an activation"
    return None


PATTERN = Pattern(
    "conv_bn",
    forms=[ops(conv="conv", norm="norm")],
    edges={
        "output": After("norm"),
        "conv": After("conv"),
        "norm": After("norm"),
        "input": Into("conv"),
        "conv_module": Layer("conv"),
    },
    check=_no_activation,
)
