"""Every schedule in the file is held to the laws, on examples made from the annotations of its options."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropsurgery import schedules
from dropsurgery.errors import PlanError, RecipeError
from dropsurgery.schedules import Instant, Schedule, needs_total_steps, resolve

FRACTIONS = st.floats(0, 1)


def rising_lists(most: int = 5) -> st.SearchStrategy[list[float]]:
    return st.lists(st.integers(0, 1000), min_size=1, max_size=most, unique=True).map(
        lambda numbers: [number / 1000 for number in sorted(numbers)]
    )


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Options of this annotation; a new kind of option needs a line here, and the laws say so by failing."""
    if annotation is float:
        return FRACTIONS
    if annotation == Sequence[float]:
        return rising_lists()
    if annotation == Sequence[Sequence[float]]:
        return rising_lists().flatmap(
            lambda places: st.tuples(*[st.tuples(st.just(place), FRACTIONS) for place in places])
        )
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    raise NotImplementedError(f"no example values for an option annotated {annotation}")


def schedule_of(kind: str) -> st.SearchStrategy[Schedule]:
    hints = get_type_hints(getattr(schedules, kind))
    told = {word: values_of(hints[option.name]) for word, option in schedules.options(kind).items()}
    return st.fixed_dictionaries(told).map(lambda options: Schedule(kind, options))


def call(schedule: Schedule, progress: Any) -> Any:
    told = {schedules.options(schedule.kind)[word].name: value for word, value in schedule.options.items()}
    return getattr(schedules, schedule.kind)(progress, **told)


def check_laws(function: Any, direction: str | None, low: float, high: float) -> None:
    """Bounds everywhere, the way it says it goes between `low` <= `high`, and 1 at the end where it is on."""
    assert 0 <= function(low) <= 1
    assert 0 <= function(high) <= 1
    if direction == "rising":
        assert function(low) <= function(high)
        assert function(1.0) == 1
    if direction == "falling":
        assert function(low) >= function(high)


@pytest.mark.parametrize("kind", schedules.names())
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_laws(kind: str, data: st.DataObject) -> None:
    schedule = data.draw(schedule_of(kind))
    low, high = sorted(data.draw(st.tuples(FRACTIONS, FRACTIONS)))
    direction = getattr(getattr(schedules, kind), "direction", None)
    check_laws(lambda progress: call(schedule, progress), direction, low, high)
    for progress in (0.0, low, high, 1.0):
        tensor = call(schedule, torch.tensor(progress, dtype=torch.float64))
        assert isinstance(tensor, torch.Tensor) and tensor.shape == () and tensor.dtype == torch.float64
        assert tensor.item() == pytest.approx(call(schedule, progress), abs=1e-12)
    assert schedule.factor(low) == call(schedule, low)
    assert (schedule.start, schedule.final) == (call(schedule, 0.0), call(schedule, 1.0))


@pytest.mark.parametrize(
    ("function", "direction"),
    [
        (lambda progress: 1.5 * progress, None),
        (lambda progress: progress - 1, None),
        (lambda progress: 1 - progress, "rising"),
        (lambda progress: progress / 2, "rising"),
        (lambda progress: progress, "falling"),
    ],
)
def test_the_laws_refuse_what_breaks_them(function: Any, direction: str | None) -> None:
    with pytest.raises(AssertionError):
        check_laws(function, direction, 0.2, 0.9)


def test_names_are_the_functions_of_the_file() -> None:
    assert schedules.names() == ["constant", "cosine", "early", "late", "linear", "piecewise", "step"]
    assert list(schedules.options("late")) == ["from"]
    assert schedules.options("early")["decay"].default == "once"


EARLY = {"until": 0.2}
POINTS = {"points": [[0, 0], [0.5, 1], [1, 0.2]]}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), {0: 1, 0.5: 1, 1: 1}),
        (Schedule("constant", {}, 0.3, 1), {0: 0, 0.29: 0, 0.3: 1, 1: 1}),
        (Schedule("linear"), {-1: 0, 0: 0, 0.25: 0.25, 1: 1, 2: 1}),
        (Schedule("linear", {}, 0.2, 0.6), {0: 0, 0.2: 0, 0.4: 0.5, 0.6: 1, 0.9: 1}),
        (Schedule("linear", {}, 0.0, 2.0), {0.5: 0.25, 1: 0.5, 3: 0.5}),
        (Schedule("cosine"), {0: 0, 0.5: 0.5, 1: 1, 1 / 3: 0.25}),
        (Schedule("step", {"at": [0.3, 0.6]}), {0.29: 0, 0.3: 0.5, 0.59: 0.5, 0.6: 1, 1: 1}),
        (Schedule("piecewise", POINTS), {0: 0, 0.25: 0.5, 0.5: 1, 0.75: 0.6, 1: 0.2}),
        (Schedule("piecewise", {"points": [[0.2, 0.3], [0.4, 0.5]]}), {0: 0.3, 0.3: 0.4, 1: 0.5}),
        (Schedule("piecewise", {"points": [[0, 0.7]]}, 0.5, 1), {0: 0.7, 1: 0.7}),
        (Schedule("early", EARLY), {0: 1, 0.19: 1, 0.2: 0, 1: 0}),
        (Schedule("early", EARLY | {"decay": "linear"}), {0: 1, 0.1: 0.5, 0.2: 0, 1: 0}),
        (Schedule("early", EARLY, 0.5, 1), {0: 1, 0.59: 1, 0.6: 0, 1: 0}),
        (Schedule("late", {"from": 0.5}), {0: 0, 0.49: 0, 0.5: 1, 1: 1}),
    ],
    ids=str,
)
def test_values(schedule: Schedule, expected: dict[float, float]) -> None:
    for progress, factor in expected.items():
        assert schedule.factor(progress) == pytest.approx(factor, abs=1e-12), progress


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (("liner", {}), "no schedule 'liner'; did you mean 'linear'"),
        (("options", {}), "no schedule 'options'"),
        (("linear", {"until": 1}), r"unknown \['until'\]; its options are none"),
        (("late", {"from_": 0.5}), r"unknown \['from_'\]; its options are \['from'\]"),
        (("late", {}), r"missing \['from'\]"),
        (("late", {"from": 1.5}), r"late.from: expected a fraction .* got 1.5"),
        (("early", {"until": float("nan")}), "early.until: .* got nan"),
        (("early", {"until": True}), "early.until: .* got True"),
        (("early", {"until": 0.5, "decay": "slow"}), "early.decay: expected 'once' or 'linear', got 'slow'"),
        (("step", {"at": [0.6, 0.3]}), r"step.at: .* rising order, got \[0.6, 0.3\]"),
        (("step", {"at": []}), r"step.at: .* got \[\]"),
        (("step", {"at": 0.3}), "step.at: expected a list"),
        (("piecewise", {"points": [[0, 0], [1]]}), "piecewise.points"),
        (("piecewise", {"points": [[0, 0], [0.5, 2]]}), "piecewise.points"),
        (("piecewise", {"points": [[0.5, 0], [0.5, 1]]}), "piecewise.points"),
        (("linear", {}, 0.5, 0.5), "begin < end, .* got begin 0.5 and end 0.5"),
        (("linear", {}, -0.1, 1.0), "0 <= begin"),
        (("linear", {}, 1.0, 2.0), "begin < 1"),
        (("linear", {}, float("nan"), 1.0), "0 <= begin"),
    ],
)
def test_nonsense_is_refused_when_made(given_: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Schedule(*given_)


def test_text() -> None:
    assert str(Schedule()) == "constant"
    assert str(Schedule("late", {"from": 0.5}, 0.1, 0.75)) == "late from=0.5 over 0.1..0.75"


def test_equality_hash_and_copies() -> None:
    one = Schedule("early", {"until": 0.5})
    assert one == Schedule("early", {"until": 0.5}) and hash(one) == hash(Schedule("early", {"until": 0.5}))
    assert one != Schedule("early", {"until": 0.4})
    assert copy.deepcopy(one) == one == pickle.loads(pickle.dumps(one))


def test_all_but_a_constant_from_the_start_need_the_length_of_the_training() -> None:
    assert not needs_total_steps(Schedule())
    assert needs_total_steps(Schedule("constant", {}, 0.1, 1))
    assert needs_total_steps(Schedule("linear"))


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (0.25, Instant(0.25)),
        (1, Instant(1.0)),
        ("1000 steps", Instant(1000, "steps")),
        ("1 step", Instant(1, "steps")),
        ("5 epochs", Instant(5, "epochs")),
        (" 0.5  epoch ", Instant(0.5, "epochs")),
        ("1e3 steps", Instant(1000, "steps")),
    ],
)
def test_instants_are_read(given_: object, expected: Instant) -> None:
    assert Instant.parse(given_) == expected
    assert Instant.parse(str(expected) if expected.unit != "fraction" else expected.value) == expected


@pytest.mark.parametrize("given_", [1.5, -0.1, True, "1000", "steps", "-1 steps", "5 days", None, [1], "nan steps"])
def test_other_instants_are_refused(given_: object) -> None:
    with pytest.raises(RecipeError, match="expected a fraction"):
        Instant.parse(given_)


def test_resolve() -> None:
    assert resolve(Instant(0.25), None, None) == 0.25
    assert resolve(Instant(300, "steps"), 1000, None) == 0.3
    assert resolve(Instant(5, "epochs"), 1000, 40) == 0.2
    assert resolve(Instant(2000, "steps"), 1000, None) == 2.0


@pytest.mark.parametrize(
    ("instant", "known", "message"),
    [
        (Instant(10, "steps"), (None, 5), "'10 steps' needs total_steps:"),
        (Instant(10, "epochs"), (100, None), "'10 epochs' needs steps_per_epoch:"),
        (Instant(10, "epochs"), (None, None), "needs total_steps and steps_per_epoch:"),
    ],
)
def test_resolve_says_what_is_missing(instant: Instant, known: tuple[Any, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        resolve(instant, *known)
