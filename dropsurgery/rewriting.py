"""Carry out edits on a tree that shares the model's parameters, and strip them off again.

model ── copy of all shells, same tensors ──▶ tree ── generated forwards where an edit lives ──▶ GraphModule
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from dropsurgery import catalogue
from dropsurgery.capture import Captured, Inputs, Leaf, Level, Opaque, record
from dropsurgery.capture.levels import is_leaf, map_tree
from dropsurgery.capture.view import fact_of
from dropsurgery.emission import OWN_GRAPH, drop_own_hooks, emit_owner, emit_root, empty, own_fields
from dropsurgery.errors import CaptureError, SurgeryError, SurgeryWarning
from dropsurgery.forwards import OWN, SLOTS, LocalEdit, leaf_level, lost
from dropsurgery.graph import LocalName, local_name
from dropsurgery.records import Edge, Edit
from dropsurgery.trees import bare, copy_tree

ADOPTED = "_adopted"
"""Where an adopted layer keeps the rates that it came with."""

Build = Callable[[Edit], nn.Module]


def rewrite(captured: Captured, edits: Sequence[Edit], build: Build) -> nn.Module:
    """Give a tree in which the edits are carried out; the captured model stays as it was.

    Args:
        captured: the model and what was recorded of it.
        edits: what to insert, in order; edits on the same place stack in this order.
        build: makes the regularizer of an edit.

    Returns:
        an instance of (the model's class, `fx.GraphModule`) over the same parameters and buffers.
    """
    model = captured.model
    calls = Counter(node.meta["module"] for node in captured.view.graph.nodes if "module" in node.meta)
    by_owner: dict[str, dict[LocalEdit, Edit]] = defaultdict(dict)
    for edit in edits:
        if edit.kind != "adopt":
            path, local = _home(model, calls, edit)
            by_owner[path][replace(local, slot=f"s{len(by_owner[path])}")] = edit
    _check_training(captured, by_owner)
    owners = {model.get_submodule(path): path for path in by_owner}
    generated = {model, *owners}
    copies = copy_tree(model, lambda module: empty(type(module)) if module in generated else bare(module))
    for module, path in owners.items():
        regularizers = {local: build(edit) for local, edit in by_owner[path].items()}
        _tell_what_is_given(captured, path, regularizers)
        emit_owner(copies[module], regularizers, _levels_of(captured, path, by_owner[path]))
    for edit in edits:
        if edit.kind == "adopt":
            _adopt(copies[model.get_submodule(edit.site.module)], edit)
    root = copies[model]
    if model not in owners:
        emit_root(root, captured.inputs, captured.root)
    return root


def _levels_of(captured: Captured, path: str, edits: Collection[LocalEdit]) -> list[Level]:
    """What was recorded of a module; of one whose forward a regularizer stands in for, its calls."""
    module = captured.model.get_submodule(path)
    levels = captured.view.levels.get(path, [])
    if all(edit.kind != "swap" for edit in edits) and levels:
        return levels
    calls = [level.inputs for level in levels] or list(_inputs_of(captured, module))
    return [leaf_level(module, inputs) for inputs in calls]


def _tell_what_is_given(captured: Captured, path: str, regularizers: Mapping[LocalEdit, Any]) -> None:
    """Tell those that stand in for a whole module, and ask for it, what that was given and gave on the example."""
    for regularizer in regularizers.values():
        if not getattr(regularizer, "asks_example", False):
            continue
        levels = captured.view.levels.get(path)
        known = [node.meta.get("value") for node in captured.view.graph.nodes if node.meta.get("path") == path]
        regularizer.returns = fact_of(levels[0].output) if levels else next(iter(known), None)
        calls = [levels[0].inputs] if levels else _inputs_of(captured, captured.model.get_submodule(path))
        regularizer.given = map_tree(next(iter(calls), None), fact_of)


def _check_training(captured: Captured, homes: Mapping[str, Collection[LocalEdit]]) -> None:
    """Refuse edits in modules that are called in eval alone: in training nothing would tell that they never run."""
    levels = [level for calls in captured.view.levels.values() for level in calls]
    by_mode = {
        id(level): _called_in_training(captured, level)
        for level in levels
        if level.reads_training and any(_below(home, child) for child in _called(level) for home in homes)
    }
    trained = {path for level in levels for path in by_mode.get(id(level), _called(level))} if by_mode else set()
    for level in levels:
        left_out = _called(level) - trained if id(level) in by_mode else set()
        missing = [edit for path in left_out for home, edits in homes.items() if _below(home, path) for edit in edits]
        if missing:
            raise CaptureError(lost(level.module, missing))


def _called(call: Level | Opaque | Leaf) -> set[str]:
    """The paths of the modules that a forward calls itself."""
    if isinstance(call, Level):
        return {child.path for child in call.children.values()}
    return {part.call.path for part in call.components} if isinstance(call, Opaque) else set()


def _called_in_training(captured: Captured, level: Level) -> set[str]:
    try:
        return _called(record(captured.model, *level.inputs, path=level.path, training=True))
    except CaptureError:  # it takes no such input in training: no training leaves anything out
        return _called(level)


def _below(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _adopt(layer: nn.Module, edit: Edit) -> None:
    """Remember the rates of a layer that comes under the clock, for `strip`."""
    layer.__dict__[ADOPTED] = {name: layer.__dict__[name] for name in edit.arguments}


def _home(model: nn.Module, calls: Counter[nn.Module], edit: Edit) -> tuple[str, LocalEdit]:
    """The module that carries an edit out, and the edit's place in its graph.

    That is the owner of the edge; but where the owner is the root or a plain Sequential, whose children are called
    from outside of its forward too (`forward_features`, `for layer in model.features`), it is the one leaf that the
    edge comes out of or goes into, so that no way leads around it.
    """
    at = edit.site.at
    if at is None:
        raise SurgeryError(f"{edit.site.id}: this site was read from a file; plan again on the model to rewrite it")
    if edit.kind == "swap":
        return _swapped(model, edit, at.node)
    owner = model.get_submodule(edit.site.owner)
    alone = "level_node" not in at.node.meta  # called by a forward that stays opaque
    if edit.kind == "insert" and (alone or owner is model or type(owner).forward is nn.Sequential.forward):
        leaf = _leaf_at(at, calls)
        if leaf is not None:
            takes = tuple((OWN, 0) for _ in _taken(edit))  # what a lone layer reads is all that there is beside it
            if alone or not takes:
                return leaf[0], LocalEdit(OWN, leaf[1], "", edit.site.id, takes=takes)
        if alone:
            raise SurgeryError(
                f"{edit.site.id}: '{edit.site.module}' is called several times by a forward that stays Python, or runs "
                "a forward of its own instance: leave this site out (`where: {exclude: …}`)"
            )
    if "forward" in owner.__dict__:  # it would run instead of the generated one
        raise SurgeryError(
            f"{edit.site.id}: expected {type(owner).__name__} '{edit.site.owner}' to run its class's forward, got one "
            "that is set on the instance: leave this site out (`where: {exclude: …}`), or subclass the module"
        )
    return edit.site.owner, _local(edit, at)


def _local(edit: Edit, at: Edge) -> LocalEdit:
    """An edit's place in the graph of its owner."""
    beside = dict(at.beside)
    for name in _taken(edit):
        if name not in beside or beside[name].node.meta["owner"] != at.node.meta["owner"]:
            raise SurgeryError(
                f"{edit.site.id}: {edit.regularizer} needs the {name} of this place beside it, which is not in reach "
                f"of the forward of '{edit.site.owner}'"
            )
    return LocalEdit(
        _name(at.node),
        at.operand,
        "",
        edit.site.id,
        edit.kind,
        also=tuple((_name(node), operand) for node, operand in at.also),
        but=tuple(map(_name, at.but)),
        takes=tuple((_name(beside[name].node), beside[name].operand or 0) for name in _taken(edit)),
    )


def _taken(edit: Edit) -> tuple[str, ...]:
    """The names of the further tensors that a regularizer takes."""
    names: tuple[str, ...] = catalogue.load("regularizers", edit.regularizer).takes_by(edit.arguments)
    return names


def _name(node: fx.Node) -> LocalName:
    level_node: fx.Node = node.meta["level_node"]
    return local_name(level_node)


def _swapped(model: nn.Module, edit: Edit, node: fx.Node) -> tuple[str, LocalEdit]:
    """The layer itself carries a swap out, wherever it is called."""
    layer = model.get_submodule(edit.site.module)
    whole = edit.site.at is not None and edit.site.at.module is not None
    fits = whole or (is_leaf(layer) and not node.meta.get("opaque"))
    if not fits or "forward" in layer.__dict__:
        raise SurgeryError(
            f"{edit.site.id}: expected one layer that runs its class's forward, got {type(layer).__name__}; "
            "leave this site out (`where: {exclude: …}`)"
        )
    return edit.site.module, LocalEdit(OWN, None, "", edit.site.id, "swap")


def _leaf_at(at: Edge, calls: Counter[nn.Module]) -> tuple[str, int | None] | None:
    """The leaf, called once in the whole model, before or behind an edge: its path, and 0 where the edge goes in.

    A norm is none: `SyncBatchNorm.convert_sync_batchnorm` puts another object in its place.
    """
    node, operand = at.node, at.operand
    if at.also or at.but:
        return None
    users = list(node.users)
    if operand is None and isinstance(node.meta.get("module"), _NormBase) and len(users) == 1:
        node, operand = users[0], 0
        if node.op == "output" or node.all_input_nodes != [at.node] or node.meta["owner"] != at.node.meta["owner"]:
            return None
    module = node.meta.get("module")
    if module is None or calls[module] != 1 or isinstance(module, _NormBase) or operand not in (None, 0):
        return None
    if node.meta.get("opaque") or not is_leaf(module) or "forward" in module.__dict__:
        return None
    return node.meta["path"], 0 if operand == 0 else None


def _inputs_of(captured: Captured, module: nn.Module) -> Iterator[Inputs]:
    """What a leaf is called with on the example, call by call."""
    for node in captured.view.graph.nodes:
        if node.meta.get("module") is module:
            if "level_node" not in node.meta:  # called by a forward that stays opaque
                yield node.meta["inputs"]
                continue
            level_node: fx.Node = node.meta["level_node"]
            call = (level_node.args, level_node.kwargs)
            yield map_tree(call, lambda item: item.meta["value"] if isinstance(item, fx.Node) else item)


def strip(gm: nn.Module) -> nn.Module:
    """Give back the model's own class, with the trained weights and no trace of surgery.

    The result shares its parameters and buffers with `gm`, which stays as it is and goes on working.

    Where a regularizer does something in eval too, or has learned something, a SurgeryWarning says that this is lost.

    Raises:
        SurgeryError: the module was not made by `apply_recipe`.
    """
    if "surgery" not in getattr(gm, "__dict__", {}):
        raise SurgeryError(f"strip: expected a model made by apply_recipe, got {type(gm).__name__}")
    _tell_what_is_lost(gm)
    copies = copy_tree(gm, bare)
    for module, plain in copies.items():
        fields: dict[str, Any] = plain.__dict__
        for name in own_fields(module):
            fields.pop(name, None)
        fields["_modules"].pop(SLOTS, None)
        fields.update(fields.pop(OWN_GRAPH, {}))
        fields.update(fields.pop(ADOPTED, {}))
        drop_own_hooks(plain)
    return copies[gm]


def _tell_what_is_lost(gm: nn.Module) -> None:
    """Warn of what regularizers do in eval: a stripped model does not."""
    surgery: Any = gm.surgery
    rules = surgery.plan.eval_rules()
    if rules:
        done = "; ".join(f"{rule} ({count} sites)" for rule, count in rules.items())
        warnings.warn(
            f"strip: in eval this {type(gm).__name__} also computes: {done}. The stripped model does not, and its "
            "outputs will differ",
            SurgeryWarning,
            stacklevel=3,
        )
