"""branch + branch: a sum of two branches with as many layers each from one fork, and no shortcut (Shake-Shake)."""

from __future__ import annotations

from dropsurgery.matching import After, Into, Match, Pattern, ops


def _without_shortcut(match: Match) -> str | None:
    meta = match.nodes["add"].meta
    if "join" not in meta:
        reason: str = meta["no_join"]
        return reason
    return None if meta["join"].shortcut is None else "one operand is a shortcut, with fewer layers than the other"


PATTERN = Pattern(
    "branch_add",
    forms=[ops(add="add")],
    edges={"output": After("add"), "first": Into("add", 0), "second": Into("add", 1)},
    check=_without_shortcut,
)
