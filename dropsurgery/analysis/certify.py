"""Certify one model: build it, capture it, put regularizers everywhere, and check every promise of surgery.

A certificate is plain data, one line of JSON in the file that a sweep writes (`sweep.py`).
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx, nn

from dropsurgery import api, catalogue
from dropsurgery.analysis import laws, memory, values
from dropsurgery.analysis.examples import smaller_images
from dropsurgery.analysis.traces import NotComparable
from dropsurgery.capture import Captured, capture
from dropsurgery.capture.inputs import resolve_inputs
from dropsurgery.capture.levels import describe
from dropsurgery.errors import CaptureError, PlanError, SurgeryError
from dropsurgery.models import example_inputs, family, make_model
from dropsurgery.planning import Sites, plan
from dropsurgery.recipe import Recipe, load_recipe
from dropsurgery.records import Site, TensorFact
from dropsurgery.rewriting import strip

WHOLE, OPAQUE, REFUSED, UNBUILT, FAILED = "wholly", "with opaque parts", "refused", "not built", "failed"
"""What a capture comes to; UNBUILT: the model's own library cannot build it; FAILED: no answer, or a crash."""

TRACES, VALUES = "traces", "values"
_STEPS = 10


@dataclass
class Certificate:
    """What is known of one model.

    Attributes:
        status: one of the words above; `reason` says why it is refused, not built or failed.
        opaque: the parts that stay opaque: path, class and reason.
        sites: pattern → number of sites over all its edges.
        misfit: why the recipe that was asked for does not fit; then no law was checked.
        compared: how equality was shown, by traces or by values.
        broken: one line for each broken promise; none is what a certificate is for.
        seconds: what each stage took of a processor, so that other work on the machine shows less.
        memory: peak of the process, in bytes.
    """

    model: str
    kind: str
    recipe: str
    versions: dict[str, str] = field(default_factory=dict)
    status: str = FAILED
    reason: str = ""
    family: str = ""
    cls: str = ""
    parameters: int = 0
    nodes: int = 0
    opaque: list[dict[str, str]] = field(default_factory=list)
    sites: dict[str, int] = field(default_factory=dict)
    edits: int = 0
    misfit: str = ""
    compared: str = ""
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: int = 0

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong: captured and no promise broken, or not dropsurgery's to build."""
        return not self.broken and self.status not in (REFUSED, FAILED)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def certify(name: str, recipe: Recipe | None = None, *, kind: str = TRACES) -> Certificate:
    """Check one model.

    Args:
        name: of a model, as `make_model` takes it.
        recipe: what to insert; by default dropout on every edge of every pattern, at rates that begin at 0.
        kind: compare by TRACES, on the meta device, or by VALUES, with random weights. A model whose forward needs
            values is compared by values in any case.

    Errors of the model or of surgery are part of the certificate.
    """
    made = Certificate(name, kind, recipe.name if recipe else "")
    with memory.peak() as peak, warnings.catch_warnings(), suppress(_Stop):
        warnings.simplefilter("ignore")
        _certify(made, recipe)
    gc.collect()
    made.memory = peak.bytes
    return made


def _certify(made: Certificate, recipe: Recipe | None) -> None:
    model = _built(made)
    before = laws.snapshot(model)
    try:
        captured = _captured(made, model)
        gm = _operated(made, captured, recipe)
    finally:
        made.broken += laws.untouched(before, model)
    if gm is None:
        return
    with _stage(made, "checks", FAILED), laws.silenced(model, gm) if recipe else nullcontext():
        made.broken += _broken(made, model, gm, captured.inputs)
    if made.compared == VALUES != made.kind:  # its forward needs values
        again = certify(made.model, recipe, kind=VALUES)
        made.broken += again.broken
        made.seconds["values"] = sum(again.seconds.values())


def _broken(made: Certificate, model: nn.Module, gm: fx.GraphModule, inputs: Any) -> Iterator[str]:
    plain = strip(gm)
    yield from laws.same_state(model, gm)
    yield from laws.same_tree(model, gm)
    yield from laws.stripped_clean(model, plain)
    made.compared = made.kind
    if made.kind == VALUES:
        yield from values.same_values(model, gm, inputs)
        if values.not_finite(model, inputs):
            made.notes.append("numbers that are not finite")
        return
    try:
        yield from laws.same_traces(model, gm, plain, inputs)
    except NotComparable as reason:
        made.notes.append(f"compared by values: {reason}")
        made.compared = VALUES


# -- the stages ------------------------------------------------------------------------------------------------
def _built(made: Certificate) -> nn.Module:
    with _stage(made, "build", UNBUILT):
        made.family = family(made.model)
        model = make_model(made.model, "cpu" if made.kind == VALUES else "meta")
        if made.kind == VALUES:
            values.randomize(model)
    made.cls = type(model).__name__
    made.parameters = sum(parameter.numel() for parameter in model.parameters())
    return model


def _captured(made: Certificate, model: nn.Module) -> Captured:
    with _stage(made, "capture", REFUSED):
        captured = _captured_small(made, model) or capture(model, example_inputs(made.model))
    view = captured.view
    made.status = OPAQUE if view.opaque else WHOLE
    made.nodes = len(view.graph.nodes)
    parts = {part.path: part for part in view.opaque}
    made.opaque = [{"path": p, "class": type(o.module).__name__, "reason": o.reason} for p, o in parts.items()]
    return captured


def _captured_small(made: Certificate, model: nn.Module) -> Captured | None:
    """For numbers: captured on smaller images, if those of the model are large and it takes others as well."""
    if made.kind != VALUES:
        return None
    inputs, *_ = resolve_inputs(model, example_inputs(made.model))
    for smaller in smaller_images(inputs):
        with suppress(CaptureError):
            captured = capture(model, smaller[0] or smaller[1])
            made.notes.append(f"numbers on smaller images: {describe(*smaller)}")
            return captured
    return None


def _operated(made: Certificate, captured: Captured, recipe: Recipe | None) -> fx.GraphModule | None:
    """Carry the recipe out, as `apply_recipe` does; None where it does not fit."""
    with _stage(made, "sites", REFUSED):
        sites = Sites(captured)
        found = sites_by_edge(sites)
        made.sites = {pattern: sum(map(len, edges.values())) for pattern, edges in found.items()}
    with _stage(made, "surgery", REFUSED):
        try:
            planned = plan(captured, recipe or load_recipe(everywhere(found)), total_steps=_STEPS, sites=sites)
        except PlanError as error:
            if recipe is None:
                raise
            made.misfit = str(error)
            return None
        made.edits = len(planned.edits)
        gm = api.operate(captured, planned)
    if any(getattr(each, "leaks_labels", False) for each in laws.inserted(gm).values()):
        made.misfit = f"{planned.recipe.name} tells the model the labels that it is tested on; certify no such recipe"
        return None
    return gm


def sites_by_edge(sites: Sites) -> dict[str, dict[str, list[Site]]]:
    """Pattern → edge → sites, for every pattern of the catalogue."""
    return {
        name: {edge: sites.of(name, edge) for edge in sites.pattern(name).edges} for name in catalogue.names("patterns")
    }


def everywhere(found: dict[str, dict[str, list[Site]]]) -> dict[str, Any]:
    """A recipe with dropout on every edge of every pattern that holds numbers, its rate growing from 0."""
    entries = [
        {
            "name": f"{pattern} {edge}",
            "pattern": pattern,
            "edge": edge,
            "insert": "dropout",
            "with": {"p": 0.2},
            "schedule": {"kind": "linear"},
            "optional": True,
        }
        for pattern, edges in found.items()
        for edge, sites in edges.items()
        if sites and all(map(_holds_numbers, sites))
    ]
    return {"version": 1, "name": "everywhere", "entries": entries}


def _holds_numbers(site: Site) -> bool:
    if site.at and site.at.layer:
        return False
    value = site.at.source.meta.get("value") if site.at else None
    return isinstance(value, TensorFact) and bool(value.dtype.is_floating_point)


# -- around a stage --------------------------------------------------------------------------------------------
class _Stop(Exception):
    """A stage failed: the certificate says how."""


@contextmanager
def _stage(made: Certificate, stage: str, status: str) -> Iterator[None]:
    """Time a stage; an error in it ends the certificate. One that is not raised on purpose is told by its type too."""
    begin = time.process_time()
    try:
        yield
    except Exception as error:
        own = isinstance(error, SurgeryError)
        made.status, made.reason = status, f"{stage}: {error}" if own else f"{stage}: {type(error).__name__}: {error}"
        raise _Stop from error
    finally:
        made.seconds[stage] = round(time.process_time() - begin, 4)
