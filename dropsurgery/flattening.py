"""The emitted tree as one flat graph: what runs, regularizers included, in a classical GraphModule.

A level is inlined where its graph says all of it. A module whose Python decides from sizes or dtypes, depends on its
mode, draws numbers of its own or runs under an activation checkpoint stays one call; what the root itself had decided
is checked as the graph runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from dropsurgery.capture import Leaf, Level, Opaque, record
from dropsurgery.capture.view import flat_view
from dropsurgery.emission import example_of
from dropsurgery.errors import SurgeryError
from dropsurgery.forwards import Owner, apply_edits, clean, graph_key, whole_call

_WHOLE = "model"


def expect(value: Any, expected: Any, what: str) -> None:
    """Check what a flat graph takes for granted.

    Raises:
        SurgeryError: the input is of another kind than the example.
    """
    if value != expected:
        raise SurgeryError(
            f"this flat graph holds for inputs like its example only: {what}, now {value!r}. "
            "Call the model itself, which decides anew for each input."
        )


def flatten(gm: nn.Module) -> fx.GraphModule:
    """A flat GraphModule that shares all leaves with the emitted tree and computes the same."""
    root = record(gm, *example_of(gm))
    for level in list(_levels(root)):
        _edited(level)
    if isinstance(root, Level) and _says_all(root):
        view = flat_view(root, inline=lambda level: level is root or (not level.guards and _says_all(level)))
        return fx.GraphModule(gm, view.graph)
    return fx.GraphModule({_WHOLE: gm}, whole_call(gm, _WHOLE))


def _levels(call: Level | Opaque | Leaf) -> Iterator[Level]:
    if isinstance(call, Level):
        yield call
        for child in call.children.values():
            yield from _levels(child)


def _edited(level: Level) -> None:
    """Put the owner's regularizers and the checks of its guards into a freshly recorded level."""
    graph = level.graph
    owner: Owner | None = level.module.__dict__.get("_owner")
    known = set(graph.nodes)
    if owner is not None:
        apply_edits(graph, owner.edits, level.module)
    for node in graph.nodes:
        if node not in known:
            target = str(node.target)
            path = f"{level.path}.{target}".lstrip(".")
            level.children[node] = Leaf(level.module.get_submodule(target), path)
    for guard in level.guards if not level.path else ():
        with graph.inserting_after(guard.node):
            graph.call_function(expect, (guard.node, guard.value, guard.reason))


def _says_all(level: Level) -> bool:
    """Whether a level's graph may stand for its module in both modes."""
    if level.random or level.regions:
        return False
    if not level.reads_training:
        return True
    again = record(level.module, *level.inputs, training=True)
    plain = record(level.module, *level.inputs)
    return isinstance(again, Level) and isinstance(plain, Level) and _key(again) == _key(plain)


def _key(level: Level) -> Any:
    return graph_key(clean(level.graph))
