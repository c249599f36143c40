"""Every law on random small models (`fuzz.py`).

`DROPSURGERY_FUZZ=5000` tries that many models of each group, others each time.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pickle import PicklingError
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, event, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from dropsurgery import CaptureError, SurgeryError, apply_recipe, catalogue, forwards, graph, strip
from dropsurgery.capture.frame import Frame
from dropsurgery.capture.levels import Level
from dropsurgery.matching import After, Into, Pattern, ops
from dropsurgery.regularizers._base import Rate, Regularizer
from tests.laws import checks, fuzz
from tests.laws.models import EDGES, STEPS

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about what random models do

EXAMPLES = int(os.environ.get("DROPSURGERY_FUZZ", "0"))
PROFILE = settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
KINDS = ["conv", "conv_transpose", "norm", "activation", "linear", "add", "mul", "cat", "pool", "upsample"]
KINDS += ["reduction", "identity"]
PATTERNS = {
    f"any_{kind}": Pattern(f"any_{kind}", [ops(it=kind)], {"output": After("it"), "input": Into("it")})
    for kind in KINDS
}
ENTRIES = [(name, edge) for name, pattern in PATTERNS.items() for edge in pattern.edges]
ENTRIES += [(pattern, edge) for pattern, edges in EDGES.items() for edge in edges]
SIZES = ((3, 8, 8), (1, 12, 12), (2, 6, 10), (2, 3, 3))


class Echo(Regularizer):
    """Gives what it takes, as another tensor, at one site twice of it; says where it was met."""

    heard: ClassVar[set[str]] = set()
    loud: ClassVar[str] = ""

    def __init__(self, p: Rate = 0.5) -> None:
        super().__init__(p=p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        self.heard.add(self.site_id)
        return x * 2 if self.site_id == self.loud else x.clone()


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalogue._registered["regularizers"], "echo", Echo)
    for name, pattern in PATTERNS.items():
        monkeypatch.setitem(catalogue._registered["patterns"], name, pattern)


def recipe(entries: list[tuple[str, str]]) -> dict[str, Any]:
    """Echoes on some edges of some patterns, their rate 0 at first."""
    common = {"insert": "echo", "with": {"p": 0.5}, "schedule": {"kind": "linear"}, "optional": True}
    return {
        "version": 1,
        "name": "fuzz",
        "entries": [{"name": f"{p} {edge}", "pattern": p, "edge": edge, **common} for p, edge in entries],
    }


def outcome(model: nn.Module, call: checks.Call, training: bool) -> checks.Run | Exception:
    """All that a call did, or its own error."""
    try:
        return checks.run(model, call, training)
    except SurgeryError:
        raise
    except Exception as error:
        return error


def check_same(one: checks.Run | Exception, other: checks.Run | Exception, gradients: bool = True) -> None:
    """Two calls did the same, or failed in the same words."""
    if isinstance(one, Exception) or isinstance(other, Exception):
        if not isinstance(one, Exception) and isinstance(other, Exception):
            raise other
        assert isinstance(other, Exception), f"not refused: {one!r}"
        assert (type(one), str(one)) == (type(other), str(other)), "refused otherwise"
        return
    if gradients:
        checks.check_same(one, other)
    else:
        assert checks.equal(one.outputs, other.outputs), "other outputs"
        assert checks.equal(one.buffers, other.buffers), "other buffers"


def calls(program: fuzz.Program) -> Iterator[tuple[str, checks.Call]]:
    """Calls with other inputs than the example, and in other states of the world."""
    for size in SIZES:
        yield str(size), lambda model, size=size: fuzz.run(model, program.example(*size))
    for index, example in enumerate(program.examples()[1:]):
        yield f"way {index}", lambda model, example=example: fuzz.run(model, example)
    for name, world in WORLDS.items():

        def within(model: nn.Module, world: Callable[[], Any] = world) -> Any:
            with world():
                return fuzz.run(model, program.example())

        yield name, within


WORLDS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def check_laws(program: fuzz.Program, entries: list[tuple[str, str]]) -> None:
    """Put echoes into a model, and hold every law."""

    def call(model: nn.Module) -> Any:
        return fuzz.run(model, program.example())

    model = program.build()
    expected = both(program.build(), call)
    with checks.check_untouched(model):
        gm = applied(model, program, entries, expected[0])
    if gm is None:
        return
    assume(not any(map(infinite, expected)))
    checks.check_identity(model, gm)
    checks.check_state(model, gm)
    for other in (*copies(model, gm), strip(gm), gm):
        check_alike(expected, other, call)
    if not any(isinstance(run, Exception) for run in expected):
        checks.check_hooks(model, gm, call)
        check_flat(gm, call, expected)
    check_echo(gm, call, expected)
    check_place(model, gm, call)
    for name, other_call in calls(program):
        note(name)
        check_alike(both(model, other_call), gm, other_call)
    assert list(model.state_dict()) == list(gm.state_dict())


def both(model: nn.Module, call: checks.Call) -> list[checks.Run | Exception]:
    """What a call does in eval and in training."""
    return [outcome(model, call, training) for training in (False, True)]


def check_alike(expected: list[checks.Run | Exception], other: nn.Module, call: checks.Call) -> None:
    """In eval, in training, and in eval again."""
    for training in (False, True, False):
        check_same(expected[training], outcome(other, call, training))


def copies(model: nn.Module, gm: fx.GraphModule) -> Iterator[nn.Module]:
    """Copies of an emitted model; through a file only where the model itself goes through one."""
    yield copy.deepcopy(gm)
    try:
        checks.saved(model)
    except (RuntimeError, PicklingError):
        event("cannot be pickled")
    else:
        yield checks.saved(gm)


def applied(
    model: nn.Module, program: fuzz.Program, entries: list[tuple[str, str]], expected: checks.Run | Exception
) -> fx.GraphModule | None:
    """The emitted model; None where the original raises on the example too, or an edit has no place in one mode."""
    try:
        gm = apply_recipe(model, recipe(entries), example_inputs=program.example(), total_steps=STEPS)
    except CaptureError as error:
        if "does not pass" in str(error) and "training" in repr(program):
            event("a site in one mode only")
            return None
        assert isinstance(expected, Exception), f"refused: {error}"
        event("original raises")
        return None
    assert not isinstance(expected, Exception), f"not refused: {expected!r}"
    event(f"{min(len(gm.surgery.regularizers), 5)} sites")
    return gm


def infinite(run: checks.Run | Exception) -> bool:
    return not isinstance(run, Exception) and not all(bool(torch.isfinite(out).all()) for out in run.outputs)


def check_flat(gm: fx.GraphModule, call: checks.Call, expected: list[Any]) -> None:
    """Law 3: the flat graph computes what the tree does."""
    flat = gm.surgery.flatten()
    for training in (False, True):
        with checks.restored(gm):
            flat.train(training)
            torch.manual_seed(3)
            assert checks.equal(checks.tensors(call(flat)), expected[training].outputs), "other outputs when flat"


def check_echo(gm: fx.GraphModule, call: checks.Call, expected: list[checks.Run | Exception]) -> None:
    """Another tensor with the same numbers in it, on every edge, changes nothing; and every edge is met."""
    with gm.surgery.active(p=0.5):
        for training in (False, True):
            Echo.heard.clear()
            try:
                found = outcome(gm, call, training)
            except SurgeryError as error:
                event(f"refused: {str(error)[:40]}")
                continue
            check_same(expected[training], found, gradients=False)
            if not isinstance(found, Exception):
                missed = set(gm.surgery.regularizers) - Echo.heard
                assert not missed, f"left out: {sorted(missed)}"


def check_place(model: nn.Module, gm: fx.GraphModule, call: checks.Call) -> None:
    """What is put behind a layer does what a hook on that layer does."""
    layers = {name: layer for name, layer in model.named_modules() if name and not getattr(layer, "inplace", False)}
    after = [edit.site.id for edit in gm.surgery.plan.edits if edit.site.edge in {"output", "conv", "norm"}]
    for site in [site for site in after if site.partition("#")[0] in layers][:2]:
        met: list[int] = []

        def double(layer: nn.Module, args: Any, output: Any, met: list[int] = met) -> Any:
            met.append(1)
            return output * 2

        handle = layers[site.partition("#")[0]].register_forward_hook(double)
        with torch.no_grad():
            expected = both(model, call)
        handle.remove()
        Echo.loud = site if len(met) == 2 else ""  # else it is called more than once: one of several places
        with torch.no_grad(), gm.surgery.active(p=0.5):
            for training in (False, True) if Echo.loud else ():
                try:
                    check_same(expected[training], outcome(gm, call, training), gradients=False)
                except SurgeryError as error:
                    event(f"refused: {str(error)[:40]}")
        Echo.loud = ""


def drop_relu(made: fx.Graph) -> None:
    """Leave the first ReLU out of a graph."""
    relu = next(node for node in made.nodes if node.target is F.relu)
    relu.replace_all_uses_with(relu.args[0])
    made.erase_node(relu)


def entries_strategy() -> st.SearchStrategy[list[tuple[str, str]]]:
    """Mostly every edge of every pattern, else a few of them: other modules own edits then."""
    return st.one_of(st.just(ENTRIES), st.lists(st.sampled_from(ENTRIES), min_size=6, max_size=12, unique=True))


def hold(programs: st.SearchStrategy[fuzz.Program], entries: st.SearchStrategy[list[tuple[str, str]]]) -> None:
    """Hold every law on models and recipes that are drawn."""
    PROFILE(given(programs, entries)(check_laws))()


@pytest.mark.parametrize("group", fuzz.STATEMENTS)
def test_random_models(group: str, echo: None) -> None:
    hold(fuzz.programs(group), entries_strategy())


BROKEN: dict[str, tuple[Any, str, Any, str]] = {
    "guards are forgotten": (Frame, "guard", lambda *_: None, "x = x if x.shape[-1] > 9 else -x"),
    "modes are overlooked": (Level, "reads_training", property(lambda _: False), "x = -x if self.training else x"),
    "effects are lost": (graph, "works_in_place", lambda *_: False, "y = x + 1; y.add_(x); x = y"),
    "nothing is inserted": (graph, "insert_after", lambda node, *_, **__: node, "x = x + 1"),
    "an operation is left out": (forwards, "build_result", drop_relu, "x = F.relu(x) + 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_engine_is_found(case: str, echo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, broken, line = BROKEN[case]
    program = fuzz.program(f"        {line}\n        return F.relu(x * 2)")
    hold(st.just(program), st.just(ENTRIES))
    for home in (place, forwards) if place is graph else (place,):
        if hasattr(home, name):
            monkeypatch.setattr(home, name, broken)
    with pytest.raises((AssertionError, KeyError)):
        hold(st.just(program), st.just(ENTRIES))
