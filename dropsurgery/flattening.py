"""The emitted tree as one flat graph: what runs, regularizers included, in a classical GraphModule.

A level is inlined where its graph says all of it. A module that depends on its mode, draws numbers of its own or runs
under an activation checkpoint stays one call, and so does one whose Python decides from sizes or dtypes, unless there
are edits in it: then what it had decided is checked as the graph runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from dropsurgery.capture import Leaf, Level, Opaque, record
from dropsurgery.capture.view import flat_view
from dropsurgery.emission import example_of
from dropsurgery.errors import SurgeryError
from dropsurgery.forwards import Owner, apply_edits, clean, graph_key, leaf_level, stands_in, whole_call
from dropsurgery.graph import build_result
from dropsurgery.trees import HOOKS, attribute_at, own_class, spread

_WHOLE = "model"
_BY_POSITION = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}


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


class _Whole(nn.Module):
    """A model that is called with the values of all its parameters in order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *values: Any) -> Any:
        """Call the model."""
        args, kwargs = spread(own_class(self.model).forward, values)
        return self.model(*args, **kwargs)


def flatten(gm: nn.Module) -> fx.GraphModule:
    """A flat GraphModule that shares all leaves with the emitted tree and computes the same."""
    root = record(gm, *example_of(gm), share=False)  # their graphs are changed below
    for level in list(_levels(root)):
        _edited(level)
    if isinstance(root, Level) and _says_all(root) and not stands_in(gm):
        graph = flat_view(root, inline=_inlined).graph
        build_result(graph)
        return fx.GraphModule(gm, graph)
    kinds = {parameter.kind for parameter in inspect.signature(own_class(gm).forward).parameters.values()}
    return fx.GraphModule({_WHOLE: gm if kinds <= _BY_POSITION else _Whole(gm)}, whole_call(gm, _WHOLE))


def _levels(call: Level | Opaque | Leaf) -> Iterator[Level]:
    """All levels of a recorded call; a leaf that owns an edit becomes one, unless that stands in for it."""
    if not isinstance(call, Level):
        return
    yield call
    for node, child in call.children.items():
        owner: Owner | None = child.module.__dict__.get("_owner")
        if stands_in(child.module):
            call.children[node] = child = Leaf(child.module, child.path)
        elif isinstance(child, Leaf) and owner is not None:
            call.children[node] = child = leaf_level(child.module, ((), {}), child.path)
        yield from _levels(child)


def _edited(level: Level) -> None:
    """Put the owner's regularizers and the checks of its guards into a freshly recorded level."""
    graph = level.graph
    owner: Owner | None = level.module.__dict__.get("_owner")
    if owner is not None:
        apply_edits(graph, owner.edits, level.module)
    for node in graph.find_nodes(op="call_module"):
        if node not in level.children:  # ours
            target = str(node.target)
            path = f"{level.path}.{target}".lstrip(".")
            level.children[node] = Leaf(attribute_at(level.module, target), path)
    for guard in level.guards:
        with graph.inserting_after(guard.node):
            graph.call_function(expect, (guard.node, guard.value, guard.reason))


def _inlined(level: Level) -> bool:
    """Whether a level becomes part of the flat graph: it says all, and either takes nothing for granted or holds edits.

    A guarded module without edits stays one call, which decides anew for each input.
    """
    return _says_all(level) and (not level.guards or any(_owns(inner) for inner in _levels(level)))


def _owns(level: Level) -> bool:
    return level.module.__dict__.get("_owner") is not None


def _says_all(level: Level) -> bool:
    """Whether a level's graph may stand for its module in both modes, with nothing run around it."""
    if level.random or level.regions or level.sets or any(getattr(level.module, name) for name in HOOKS):
        return False
    if not level.reads_training:
        return True
    again = record(level.module, *level.inputs, training=True)
    plain = record(level.module, *level.inputs)
    return isinstance(again, Level) and isinstance(plain, Level) and _key(again) == _key(plain)


def _key(level: Level) -> Any:
    return graph_key(clean(level.graph))
