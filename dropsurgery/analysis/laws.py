"""What surgery promises of a model, checked: each function yields one line for each promise that is broken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from dropsurgery.analysis.examples import larger_images, more_samples
from dropsurgery.analysis.traces import Marks, NotComparable, record, replay
from dropsurgery.capture import Inputs
from dropsurgery.forwards import SLOTS
from dropsurgery.planning import ADOPT
from dropsurgery.records import Edit

_PLAIN = (int, float, str, bool, tuple, type(None))
_ATOMS = frozenset((int, float, str, bool, type(None)))
_INTERNAL = frozenset(nn.Module().__dict__)


def snapshot(model: nn.Module) -> list[Any]:
    """What a model and torch's global state are, to be compared later; tensors by identity and version."""
    modules = [
        (path, type(module), id(module), [(name, _entry(value)) for name, value in module.__dict__.items()])
        for path, module in model.named_modules(remove_duplicate=False)
    ]
    grad, dtype, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    world = ("the global state", grad, dtype, device, nn.Module.__call__, nn.Module.__getattr__)
    return [*modules, world, ("the random state", torch.get_rng_state().numpy().tobytes())]


def _entry(value: Any) -> Any:
    if type(value) in _ATOMS:  # most are
        return id(value)
    if isinstance(value, dict):
        if not value:
            return id(value)
        return id(value), [(key, _entry(item)) for key, item in value.items()]
    if isinstance(value, (list, set)):
        return id(value), [id(item) for item in value]
    if isinstance(value, torch.Tensor):
        return id(value), value._version, value.requires_grad, value.dtype, id(value.grad)
    return id(value)


def untouched(before: list[Any], model: nn.Module) -> Iterator[str]:
    """The model that surgery was given, and torch, are as they were."""
    for one, other in zip(before, snapshot(model), strict=True):
        if one != other:
            yield f"surgery changed {one[0] or 'the model'}"


def same_state(model: nn.Module, gm: nn.Module) -> Iterator[str]:
    """Names, order and the tensors themselves."""
    if list(model.state_dict()) != list(gm.state_dict()):
        yield f"other state_dict keys: {_first_difference(list(model.state_dict()), list(gm.state_dict()))}"
    for what in ("parameters", "buffers"):
        theirs, ours = list(getattr(model, f"named_{what}")()), list(_own(getattr(gm, f"named_{what}")()))
        if [name for name, _ in theirs] != [name for name, _ in ours]:
            yield f"other {what}: {_first_difference([n for n, _ in theirs], [n for n, _ in ours])}"
        elif any(a is not b for (_, a), (_, b) in zip(theirs, ours, strict=True)):
            yield f"{what} that are not the model's own tensors"


def same_tree(model: nn.Module, gm: nn.Module) -> Iterator[str]:
    """The classes of all modules, their names and plain attributes."""
    if not isinstance(gm, fx.GraphModule):
        yield "no GraphModule"
    theirs, ours = dict(model.named_modules()), dict(_own(gm.named_modules()))
    if list(theirs) != list(ours):
        yield f"other modules: {_first_difference(list(theirs), list(ours))}"
        return
    for path, module in theirs.items():
        other, where = ours[path], path or "the root"
        if not isinstance(other, type(module)) or type(other).__name__ != type(module).__name__:
            yield f"{where}: expected the class {type(module).__name__}, got {type(other).__name__}"
        for key, value in module.__dict__.items():
            if key not in _INTERNAL and isinstance(value, _PLAIN) and other.__dict__.get(key, ...) != value:
                yield f"{where}: the attribute {key} differs"


def stripped_clean(model: nn.Module, plain: nn.Module) -> Iterator[str]:
    """Stripped, it is of the model's own classes, with the model's state."""
    theirs = [(path, type(module)) for path, module in model.named_modules()]
    if theirs != [(path, type(module)) for path, module in plain.named_modules()]:
        yield "strip: other modules or classes than the model's"
    yield from (f"strip: {line}" for line in same_state(model, plain))


def same_traces(model: nn.Module, gm: nn.Module, plain: nn.Module, inputs: Inputs) -> Iterator[str]:
    """The same computation in eval, in training, for more samples and larger images, and stripped.

    Everything is on the meta device.

    Raises:
        NotComparable: the model's forward needs values.
    """
    trace = record(model.eval(), inputs, grad=True)
    if trace.error is not None:
        raise NotComparable(f"{trace.error[0].__name__}: {trace.error[1]}")
    yield from _told("in eval", replay(trace, gm.eval(), inputs, grad=True))
    yield from _told("stripped", replay(trace, plain.eval(), inputs, grad=True))
    yield from _training(model, gm, inputs)
    others = {"for larger images": larger_images(inputs), "for another batch size": more_samples(inputs)}
    if others["for larger images"] is not None:
        others["for larger images"] = more_samples(others["for larger images"])
    for what, other in others.items():
        if other is None:
            continue
        trace = record(model.eval(), other)
        yield from _told(what, replay(trace, gm.eval(), other))
        if trace.error is None:
            return  # larger images and more of them in one


def _training(model: nn.Module, gm: nn.Module, inputs: Inputs) -> Iterator[str]:
    """Equal while all rates are 0; each regularizer is called, and what it gives back is used."""
    marks, sites = Marks(), inserted(gm)
    trace = record(model.train(), inputs, grad=True)
    with marks.on(sites):
        difference = replay(trace, gm.train(), inputs, grad=True, marks=marks)
    yield from _told("in training", difference)
    if difference is None and trace.error is None:
        yield from _told_of("regularizers that no training forward calls", sites.keys() - marks.made)
        yield from _told_of("regularizers whose result nothing uses", marks.made - marks.used)


@contextmanager
def silenced(model: nn.Module, gm: Any) -> Iterator[None]:
    """All rates are 0 in here, also where a schedule begins higher: those of adopted layers in the model too."""
    adopted = [
        (model.get_submodule(edit.site.module), edit.arguments) for edit in gm.surgery.plan.edits if _adopts(edit)
    ]
    before = [(layer, {name: getattr(layer, name) for name in rates}) for layer, rates in adopted]
    try:
        for layer, rates in before:
            layer.__dict__.update(dict.fromkeys(rates, 0.0))
        with gm.surgery.active(p=0.0):
            yield
    finally:
        for layer, rates in before:
            layer.__dict__.update(rates)


def _adopts(edit: Edit) -> bool:
    return edit.kind == ADOPT


def inserted(gm: Any) -> dict[str, nn.Module]:
    """The regularizers that surgery put into a model, by site."""
    adopted = {edit.site.id for edit in gm.surgery.plan.edits if _adopts(edit)}
    return {site: module for site, module in gm.surgery.regularizers.items() if site not in adopted}


def _told(what: str, difference: str | None) -> Iterator[str]:
    if difference is not None:
        yield f"{what}: {difference}"


def _told_of(what: str, sites: set[str]) -> Iterator[str]:
    if sites:
        yield f"{len(sites)} {what}: {', '.join(sorted(sites)[:3])}{' …' if len(sites) > 3 else ''}"


def _own(named: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    return (item for item in named if SLOTS not in item[0].split("."))


def _first_difference(expected: list[str], got: list[str]) -> str:
    for one, other in zip(expected, got, strict=False):
        if one != other:
            return f"expected {one}, got {other}"
    return f"expected {len(expected)} names, got {len(got)}"
