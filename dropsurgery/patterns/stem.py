"""Where a net takes its input: from the image to its first layer, and what that layer gives.

`input` is the image, before padding or scaling of its own; where several layers read it, one edit is seen by all.
`output` is the first layer's result with the norm and activation that follow it directly.
"""

from __future__ import annotations

from dropsurgery.kinds import kind_of, tensor_users
from dropsurgery.matching import Match, Pattern, called, ops
from dropsurgery.patterns._walks import first_inputs, only_user
from dropsurgery.records import Edge


def _is_first(match: Match) -> str | None:
    layer = match.nodes["layer"]
    return None if first_inputs(layer) else f"{called(layer)} is not the first layer"


def _input(match: Match) -> tuple[Edge, ...]:
    edges: dict[Edge, None] = {}
    for image in first_inputs(match.nodes["layer"]):
        users = tensor_users(image)
        positions = [at for user in users for at, value in enumerate(user.args) if value is image]
        alone = len(users) == 1 and len(positions) == 1 and users[0].op != "output"
        edges[Edge(users[0], positions[0]) if alone else Edge(image)] = None
    return tuple(edges)


def _output(match: Match) -> tuple[Edge, ...]:
    node = match.nodes["layer"]
    for kinds in (("norm", "norm_act"), ("activation",)):
        user = only_user(node)
        while user is not None and kind_of(user) == "identity":
            user = only_user(user)
        if user is not None and kind_of(user) in kinds:
            node = user
    return (Edge(node),)


PATTERN = Pattern(
    "stem",
    forms=[ops(layer="conv"), ops(layer="linear")],
    edges={"input": _input, "output": _output},
    check=_is_first,
)
