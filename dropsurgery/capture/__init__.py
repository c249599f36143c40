"""Capture: from a model to graphs that can be trusted, without touching the model.

`capture` records one graph a module, one level deep (`recorder`), inlines them into one flat view to match on
(`view`), and fills in the facts that recipes select by (`facts`).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from dropsurgery.capture.facts import annotate
from dropsurgery.capture.inputs import resolve_inputs
from dropsurgery.capture.levels import Inputs, Leaf, Level, Opaque
from dropsurgery.capture.recorder import record
from dropsurgery.capture.view import FlatView, flat_view
from dropsurgery.errors import CaptureError
from dropsurgery.trees import own_class, paths_of

__all__ = ["Captured", "Inputs", "Leaf", "Level", "Opaque", "capture", "record"]


@dataclass(frozen=True)
class Captured:
    """A model and what was recorded of it. The model is the user's own object, untouched."""

    model: nn.Module
    inputs: Inputs
    root: Level | Opaque | Leaf
    view: FlatView


def capture(model: nn.Module, example_inputs: Any = None) -> Captured:
    """Record a model in eval mode on an example input.

    Args:
        model: any module; it is left bit for bit as it was.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; inferred for timm and SMP models.

    Raises:
        CaptureError: not a module that can be rewritten (compiled, scripted, wrapped for parallel training,
            already rewritten), no inputs known, or its forward raises on them.
    """
    refuse_unfit(model)
    with _no_collection():
        inputs, root = _recorded(model, resolve_inputs(model, example_inputs))
        view = flat_view(root, inputs)
        view.graph.owning_module = model  # type: ignore[assignment]  # where its targets lie
        annotate(view.graph)
    return Captured(model, inputs, root, view)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No looking for garbage meanwhile: nearly all that is made stays in use, and to find that out takes long."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _recorded(model: nn.Module, candidates: tuple[Inputs, ...]) -> tuple[Inputs, Level | Opaque | Leaf]:
    """The first inputs that the model accepts, and what was recorded on them."""
    first, *others = candidates
    try:
        return first, record(model, *first)
    except CaptureError:
        for inputs in others:
            try:
                return inputs, record(model, *inputs)
            except CaptureError:
                continue
        raise


def refuse_unfit(model: Any) -> None:
    """Raise CaptureError for what is no plain tree of modules."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}")
    checked: set[type] = set()
    for module, (path, *_) in paths_of(model).items():
        where = f"'{path}' is" if path else "the model is"
        if own_class(module) is not type(module):
            raise CaptureError(
                f"{where} already rewritten: strip it first (dropsurgery.strip), or put all entries into one recipe"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(f"{where} scripted (TorchScript), which has no Python forward: apply the recipe first")
        if isinstance(module, OptimizedModule) or module.__dict__.get("_compiled_call_impl") is not None:
            raise CaptureError(f"{where} compiled: apply the recipe to the plain model, then torch.compile the result")
        if type(module) not in checked and _parallel(module):
            raise CaptureError(
                f"{where} wrapped for parallel training ({type(module).__name__}): apply the recipe "
                "to the plain module, then wrap the result"
            )
        checked.add(type(module))


def _parallel(module: nn.Module) -> bool:
    kinds = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule"}
    return any(cls.__name__ in kinds and cls.__module__.startswith("torch.") for cls in type(module).__mro__)
