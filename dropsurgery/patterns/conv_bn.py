"""conv ▶ norm that no activation follows: the last of a residual branch (also before a gate), a projection."""

from __future__ import annotations

from dropsurgery.kinds import skip_identities, tensor_users
from dropsurgery.matching import Match, Pattern, after, into, kind_of, ops


def _no_activation(match: Match) -> str | None:
    users = skip_identities(match.nodes["norm"], tensor_users)
    return "norm is followed by an activation" if any(kind_of(user) == "activation" for user in users) else None


PATTERN = Pattern(
    "conv_bn",
    forms=[ops(conv="conv", norm="norm")],
    edges={"output": after("norm"), "conv": after("conv"), "norm": after("norm"), "input": into("conv")},
    check=_no_activation,
)
