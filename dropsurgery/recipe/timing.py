"""Schedules as recipes write them: `linear`, `{kind: linear, end: 0.5}` or `{step: [0.3, 0.6], end: 0.5}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from dropsurgery import schedules
from dropsurgery.errors import RecipeError

from .arguments import suggestion
from .reading import shown


class Strict(BaseModel):
    """Frozen, and closed to what it does not know: no text is taken for a number, no key is passed over."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class ScheduleSpec(Strict):
    """A schedule as the recipe gives it: begin and end in steps or epochs until a plan resolves them."""

    kind: str = "constant"
    options: dict[str, Any] = Field(default_factory=dict)
    begin: Annotated[schedules.Instant, PlainSerializer(str, return_type=str)] = schedules.Instant(0.0)
    end: Annotated[schedules.Instant, PlainSerializer(str, return_type=str)] = schedules.Instant(1.0)

    def resolve(self, total_steps: int | None, steps_per_epoch: int | None) -> schedules.Schedule:
        """The schedule in fractions of the training; PlanError where a length is needed and missing."""
        begin, end = (schedules.resolve(instant, total_steps, steps_per_epoch) for instant in (self.begin, self.end))
        return schedules.Schedule(self.kind, self.options, begin, end)

    def notation(self) -> dict[str, Any]:
        """The mapping that a recipe would hold."""
        span = {"begin": self.begin, "end": self.end}
        told = {word: at.value if at.unit == "fraction" else str(at) for word, at in span.items()}
        return {"kind": self.kind, **self.options, **told}


def parse_schedule(value: object) -> ScheduleSpec:
    """Read `linear`, `{kind: linear, end: 0.5}` or `{step: [0.3, 0.6], begin: 0.1}`; ValueError otherwise."""
    if isinstance(value, ScheduleSpec):
        return value
    told = {"kind": value} if isinstance(value, str) else value
    if not isinstance(told, dict):
        raise ValueError(f"expected a schedule such as linear or {{kind: linear, end: 0.5}}, got {shown(value)}")
    try:
        spec = _spec(_long_form(told))
        schedules.Schedule(spec.kind, spec.options)  # checks the options
    except RecipeError as error:
        raise ValueError(str(error)) from None
    if spec.begin.unit == spec.end.unit and spec.begin.value >= spec.end.value:
        raise ValueError(f"expected begin before end, got begin {spec.begin} and end {spec.end}")
    return spec


def _long_form(told: Mapping[str, Any]) -> dict[str, Any]:
    """`{step: [0.3, 0.6]}` as `{kind: step, at: [0.3, 0.6]}`: its options, or the first one."""
    if "kind" in told:
        return dict(told)
    kinds = [word for word in told if word not in ("begin", "end")]
    if len(kinds) != 1:
        raise RecipeError(f"expected one kind of schedule, got {shown(kinds)}; write {{kind: linear, …}}")
    kind, value = kinds[0], told[kinds[0]]
    span = {word: told[word] for word in told if word != kind}
    known = list(schedules.options(kind))
    if not known:
        raise RecipeError(f"schedule {kind} has no options; write {{kind: {kind}}}")
    return {"kind": kind, **(value if isinstance(value, dict) else {known[0]: value}), **span}


def _spec(told: dict[str, Any]) -> ScheduleSpec:
    kind = told.pop("kind")
    if not isinstance(kind, str):
        raise RecipeError(f"expected the name of a schedule, got {shown(kind)}")
    span = {word: schedules.Instant.parse(told.pop(word)) for word in ("begin", "end") if word in told}
    known = schedules.options(kind)
    for word in told:
        if word not in known:
            raise RecipeError(f"no option {shown(word)}; {suggestion(word, [*known, 'begin', 'end'])}")
    return ScheduleSpec(kind=kind, options=told, **span)


Schedule = Annotated[
    ScheduleSpec,
    BeforeValidator(parse_schedule),
    PlainSerializer(ScheduleSpec.notation),
]
