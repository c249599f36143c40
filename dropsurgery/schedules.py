"""Schedules: pure functions from progress in [0, 1] to the factor in [0, 1] that multiplies a rate.

To add one, write one public function here: `progress` first, then its options as keywords, with an underscore
where the recipe's word is one of Python's (`from_` is `from:`). It works on floats and on 0-dim tensors, and
says with `@rising` or `@falling` which way it goes, if it does. Recipes, errors and tests find it by looking.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

import torch

from .errors import PlanError, RecipeError

Progress = TypeVar("Progress", float, torch.Tensor)
Function = TypeVar("Function", bound=Callable[..., Any])
Unit = Literal["fraction", "steps", "epochs"]
# Progress between begin and end is a quotient: without this a jump may come one step late.
_ROUNDING = 1e-12
_INSTANT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{1,3}))?\s+(steps?|epochs?)")


def rising(function: Function) -> Function:
    """Mark a schedule that never falls and ends at 1: before `begin` it is off."""
    function.direction = "rising"  # type: ignore[attr-defined]
    return function


def falling(function: Function) -> Function:
    """Mark a schedule that never rises and starts at 1: before `begin` it is fully on."""
    function.direction = "falling"  # type: ignore[attr-defined]
    return function


@rising
def constant(progress: Progress) -> Progress:
    """1 all along."""
    return 0 * progress + 1


@rising
def linear(progress: Progress) -> Progress:
    """From 0 to 1 in proportion to progress: DropBlock's (Ghiasi, Lin, Le 2018) over the whole training."""
    return progress


@rising
def cosine(progress: Progress) -> Progress:
    """From 0 to 1 along half a cosine: slow at both ends."""
    if isinstance(progress, torch.Tensor):
        return (1 - torch.cos(math.pi * progress)) / 2
    return (1 - math.cos(math.pi * progress)) / 2


@rising
def step(progress: Progress, *, at: Sequence[float]) -> Progress:
    """From 0 to 1 in equal jumps, one at each instant of `at`: [0.3, 0.6] is 0, then 0.5, then 1."""
    _check_instants("step.at", at)
    return sum(_reached(progress, instant) for instant in at) / len(at)  # type: ignore[return-value]


def piecewise(progress: Progress, *, points: Sequence[Sequence[float]]) -> Progress:
    """Straight lines through the `points` [progress, factor]; level before the first and after the last."""
    _check_points(points)
    (_, first), *_ = points
    factor = 0 * progress + first
    for (left, low), (right, high) in itertools.pairwise(points):
        share = _clamp((progress - left) / (right - left))
        factor = factor + share * (high - low)
    return _clamp(factor)


@falling
def early(progress: Progress, *, until: float, decay: Literal["once", "linear"] = "once") -> Progress:
    """On at the start and off from `until`: at `once`, or `linear`ly falling on the way there.

    Liu et al. 2023, "Dropout Reduces Underfitting" (arXiv:2303.01500): early dropout, both of its forms.
    """
    _check_instant("early.until", until)
    if decay not in ("once", "linear"):
        raise RecipeError(f"early.decay: expected 'once' or 'linear', got {decay!r}")
    if decay == "linear" and until > 0:
        return 1 - _clamp(progress / until)
    return 1 - _reached(progress, until)


@rising
def late(progress: Progress, *, from_: float) -> Progress:
    """Off until `from`, then fully on: late dropout (Liu et al. 2023, arXiv:2303.01500)."""
    _check_instant("late.from", from_)
    return _reached(progress, from_)


def _reached(progress: Progress, instant: float) -> Progress:
    """1 from `instant` on, 0 before it."""
    reached = progress >= instant - _ROUNDING
    return reached.to(progress.dtype) if isinstance(progress, torch.Tensor) else float(reached)


def _clamp(value: Progress) -> Progress:
    if isinstance(value, torch.Tensor):
        return value.clamp(0, 1)
    return min(max(value, 0.0), 1.0)


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _check_instant(where: str, instant: object) -> None:
    if not _is_fraction(instant):
        raise RecipeError(f"{where}: expected a fraction of the training in [0, 1], got {instant!r}")


def _check_instants(where: str, instants: object) -> None:
    ok = isinstance(instants, list | tuple) and instants and all(map(_is_fraction, instants))
    if not (ok and _is_rising(instants)):
        raise RecipeError(
            f"{where}: expected a list of fractions of the training in [0, 1], in rising order, got {instants!r}"
        )


def _check_points(points: object) -> None:
    ok = isinstance(points, list | tuple) and points and all(map(_is_point, points))
    if not (ok and _is_rising([place for place, _ in points])):  # type: ignore[attr-defined]
        raise RecipeError(
            "piecewise.points: expected pairs [progress, factor], both in [0, 1], progress in rising order "
            f"(such as [[0, 0], [0.5, 1], [1, 0.2]]), got {points!r}"
        )


def _is_rising(numbers: Any) -> bool:
    return all(left < right for left, right in itertools.pairwise(numbers))


def _is_point(point: object) -> bool:
    return isinstance(point, list | tuple) and len(point) == 2 and all(map(_is_fraction, point))


def names() -> list[str]:
    """The schedules there are, by the names that recipes use."""
    return sorted(_functions())


@functools.cache
def options(kind: str) -> dict[str, inspect.Parameter]:
    """What schedule `kind` can be told, by the recipe's words; default `Parameter.empty` means required."""
    parameters = list(inspect.signature(_function(kind)).parameters.values())[1:]
    return {parameter.name.rstrip("_"): parameter for parameter in parameters}


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Public functions of this file whose first argument is `progress`."""
    here = vars(sys.modules[__name__])
    return {
        name: member
        for name, member in here.items()
        if inspect.isfunction(member)
        and member.__module__ == __name__
        and not name.startswith("_")
        and next(iter(inspect.signature(member).parameters), "") == "progress"
    }


def _function(kind: str) -> Callable[..., Any]:
    functions = _functions()
    if kind not in functions:
        close = get_close_matches(str(kind), functions, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(functions))}"
        raise RecipeError(f"no schedule {kind!r}; {hint}")
    return functions[kind]


@dataclass(frozen=True)
class Schedule:
    """One schedule with its options, stretched over `begin` to `end` (fractions of the training).

    Before `begin` a rising schedule is 0 and any other stands at its start; after `end` the last value holds.
    Wrong kinds, options and bounds are a RecipeError when it is made.
    """

    kind: str = "constant"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        known = options(self.kind)
        unknown = [name for name in self.options if name not in known]
        missing = [
            name
            for name, parameter in known.items()
            if parameter.default is parameter.empty and name not in self.options
        ]
        if unknown or missing:
            what = f"unknown {unknown}" if unknown else f"missing {missing}"
            raise RecipeError(f"schedule {self.kind}: {what}; its options are {list(known) or 'none'}")
        if not 0 <= self.begin < min(self.end, 1.0):
            raise RecipeError(
                f"schedule {self.kind}: expected 0 <= begin < end, and begin < 1 (the end of the training), "
                f"got begin {self.begin:g} and end {self.end:g}"
            )
        self._local(0.0)  # the function checks the values of its options

    def factor(self, progress: float) -> float:
        """The factor in [0, 1] at `progress` (a fraction of the training, clamped to [0, 1])."""
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.begin and getattr(_function(self.kind), "direction", None) == "rising":
            return 0.0
        return self._local(min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0))

    @property
    def start(self) -> float:
        """The factor before the first update."""
        return self.factor(0.0)

    @property
    def final(self) -> float:
        """The factor at the end of the training."""
        return self.factor(1.0)

    def __str__(self) -> str:
        told = "".join(f" {name}={value}" for name, value in self.options.items())
        span = f" over {self.begin:g}..{self.end:g}" if (self.begin, self.end) != (0, 1) else ""
        return f"{self.kind}{told}{span}"

    def _local(self, progress: float) -> float:
        known = options(self.kind)
        told = {known[name].name: value for name, value in self.options.items()}
        return float(_function(self.kind)(progress, **told))


def needs_total_steps(schedule: Schedule) -> bool:
    """Whether the length of the training has to be known: for all but a constant from the very start."""
    return schedule.kind != "constant" or schedule.begin > 0


def check_count(name: str, value: object) -> None:
    """Raise a PlanError unless `value`, a number of optimizer steps, is an integer above 0 or not known (None)."""
    integral = hasattr(value, "__index__") and not isinstance(value, bool)  # NumPy's integers are some too
    if value is not None and (not integral or value < 1):  # type: ignore[operator]
        raise PlanError(f"{name}: expected the number of optimizer steps, an int above 0, got {value!r}")


@dataclass(frozen=True)
class Instant:
    """A moment of the training as a recipe gives it: a fraction of it, or a number of steps or epochs."""

    value: float
    unit: Unit = "fraction"

    @classmethod
    def parse(cls, given: object) -> Instant:
        """Read `0.25`, `"1000 steps"` or `"5 epochs"`; anything else is a RecipeError."""
        if _is_fraction(given):
            return cls(float(given))  # type: ignore[arg-type]
        found = _INSTANT.fullmatch(given.strip()) if isinstance(given, str) else None
        if found is None:
            raise RecipeError(f"expected a fraction in [0, 1], 'N steps' or 'N epochs', got {given!r}")
        number = float(f"{found[1]}e{found[2] or 0}")
        return cls(number, "steps" if found[3].startswith("step") else "epochs")

    def __str__(self) -> str:
        return f"{self.value:g}" if self.unit == "fraction" else f"{self.value:g} {self.unit}"


def resolve(instant: Instant, total_steps: int | None, steps_per_epoch: int | None) -> float:
    """`instant` as a fraction of `total_steps`; above 1 where it lies beyond the end of the training.

    A PlanError says which of `total_steps` and `steps_per_epoch` is needed and missing.
    """
    if instant.unit == "fraction":
        return instant.value
    needed = {"total_steps": total_steps}
    if instant.unit == "epochs":
        needed["steps_per_epoch"] = steps_per_epoch
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise PlanError(
            f"the schedule's instant {str(instant)!r} needs {' and '.join(missing)}: give it to "
            "apply_recipe(...) or plan_recipe(...), or write the instant as a fraction of the training"
        )
    assert total_steps is not None
    steps = instant.value * (steps_per_epoch or 1) if instant.unit == "epochs" else instant.value
    return steps / total_steps
