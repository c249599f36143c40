"""Carry out edits on a tree that shares the model's parameters, and strip them off again.

model ── copy of all shells, same tensors ──▶ tree ── generated forwards where an edit lives ──▶ GraphModule
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from dropsurgery.capture import Captured
from dropsurgery.emission import drop_own_hooks, emit_owner, emit_root, empty, guard_ways, own_fields
from dropsurgery.errors import SurgeryError
from dropsurgery.forwards import SLOTS, LocalEdit
from dropsurgery.graph import local_name
from dropsurgery.records import Edit
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
    by_owner: dict[str, list[Edit]] = defaultdict(list)
    for edit in edits:
        if edit.kind == "insert":
            by_owner[edit.site.owner].append(edit)
    owners = {model.get_submodule(path): path for path in by_owner}
    generated = {model, *owners}
    copies = copy_tree(model, lambda module: empty(type(module)) if module in generated else bare(module))
    for module, path in owners.items():
        local = {_local(edit, slot): build(edit) for slot, edit in enumerate(by_owner[path])}
        emit_owner(copies[module], local, captured.view.levels[path])
    for edit in edits:
        if edit.kind == "adopt":
            _adopt(copies[model.get_submodule(edit.site.module)], edit)
    root = copies[model]
    if model in owners:
        guard_ways(root)
    else:
        emit_root(root, captured.inputs, captured.root)
    return root


def _adopt(layer: nn.Module, edit: Edit) -> None:
    """Remember the rates of a layer that comes under the clock, for `strip`."""
    layer.__dict__[ADOPTED] = {name: layer.__dict__[name] for name in edit.arguments}


def _local(edit: Edit, slot: int) -> LocalEdit:
    at = edit.site.at
    if at is None:
        raise SurgeryError(f"{edit.site.id}: this site was read from a file; plan again on the model to rewrite it")
    node: fx.Node = at.node.meta["level_node"]
    return LocalEdit(local_name(node), at.operand, f"s{slot}", edit.site.id)


def strip(gm: nn.Module) -> nn.Module:
    """Give back the model's own class, with the trained weights and no trace of surgery.

    The result shares its parameters and buffers with `gm`, which stays as it is and goes on working.

    Raises:
        SurgeryError: the module was not made by `apply_recipe`.
    """
    if "surgery" not in getattr(gm, "__dict__", {}):
        raise SurgeryError(f"strip: expected a model made by apply_recipe, got {type(gm).__name__}")
    copies = copy_tree(gm, bare)
    for module, plain in copies.items():
        fields: dict[str, Any] = plain.__dict__
        for name in own_fields(module):
            fields.pop(name, None)
        fields["_modules"].pop(SLOTS, None)
        fields.update(fields.pop(ADOPTED, {}))
        drop_own_hooks(plain)
    return copies[gm]
