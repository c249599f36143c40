"""Widths as users write them, and `gm.surgery.width`, which sets them and takes them back."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropsurgery import SurgeryError, apply_recipe
from dropsurgery.widths import resolve_widths

X = torch.rand(6, 5)
FIRST, SECOND = "act1#0:hidden.output", "act2#0:hidden.output"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act1 = nn.Linear(5, 10), nn.ReLU()
        self.fc2, self.act2 = nn.Linear(10, 33), nn.ReLU()
        self.fc3 = nn.Linear(33, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.act2(self.fc2(self.act1(self.fc1(x)))))


def model(insert: str = "structural_dropout") -> Any:
    torch.manual_seed(0)
    entry = {"name": "e", "pattern": "hidden", "edge": "output", "insert": insert, "with": {"p": 0.5}}
    recipe = {"version": 1, "name": "r", "patterns": {"hidden": ["linear", "activation"]}, "entries": [entry]}
    return apply_recipe(Net(), recipe, example_inputs=X)


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        (3, {FIRST: 3, SECOND: 3}),
        (10, {FIRST: 10, SECOND: 10}),
        (1.0, {FIRST: 10, SECOND: 33}),
        (0.5, {FIRST: 5, SECOND: 17}),
        (0.25, {FIRST: 3, SECOND: 8}),
        (1e-9, {FIRST: 1, SECOND: 1}),
        ({FIRST: 4}, {FIRST: 4}),
        ({"act*": 4}, {FIRST: 4, SECOND: 4}),
        ({"*": 0.5, "act2*": 2}, {FIRST: 5, SECOND: 2}),
        ({SECOND: 2, "*": 0.5}, {FIRST: 5, SECOND: 2}),
        ({}, {}),
    ],
    ids=str,
)
def test_what_is_written_is_units_of_each_site(widths: Any, expected: dict[str, int]) -> None:
    resolved = resolve_widths(model(), widths)
    assert resolved == expected and list(resolved) == list(expected)
    assert all(type(units) is int for units in resolved.values())


@pytest.mark.parametrize("width", [0, -1, 11, 34, True, False, 0.0, -0.5, 1.1, float("nan"), "3", None, [3]])
def test_a_width_that_a_site_cannot_have_is_refused(width: Any) -> None:
    gm = model()
    for widths in (width, {FIRST: width}):
        with pytest.raises(SurgeryError, match=r"widths: expected for act1#0:hidden.output an integer from 1 to 10"):
            resolve_widths(gm, widths)
        with pytest.raises(SurgeryError, match="widths: expected"), gm.surgery.width(widths):
            raise AssertionError("never entered")
    assert all(site.width is None for site in gm.surgery.regularizers.values())


@pytest.mark.parametrize("name", ["act3#0:hidden.output", "layer4*", 3])
def test_a_site_that_is_not_there_is_refused(name: Any) -> None:
    with pytest.raises(SurgeryError, match=r"which fits none of 2; did you mean 'act"):
        resolve_widths(model(), {name: 2})


def test_models_without_such_sites_are_refused() -> None:
    with pytest.raises(SurgeryError, match="expected a model made by apply_recipe, got Net"):
        resolve_widths(Net(), 2)
    gm = model("dropout")
    with pytest.raises(SurgeryError, match="expected a model with structural_dropout, got one with 2 other sites"):
        resolve_widths(gm, 2)
    with pytest.raises(SurgeryError, match="expected a model with structural_dropout"), gm.surgery.width(2):
        pass


def masked(gm: Any, first: int, second: int) -> Tensor:
    """By hand."""
    one, two = torch.zeros(10), torch.zeros(33)
    one[:first], two[:second] = 10 / first, 33 / second
    return gm.fc3(gm.fc2(gm.fc1(X).relu() * one).relu() * two)


@pytest.mark.parametrize("training", [True, False])
def test_widths_hold_within_and_are_taken_back(training: bool) -> None:
    gm = model().train(training)
    state = torch.get_rng_state()
    with gm.surgery.width(0.5):
        assert torch.allclose(gm(X), masked(gm, 5, 17), atol=1e-6)
        with gm.surgery.width({FIRST: 2}):
            assert torch.allclose(gm(X), masked(gm, 2, 17), atol=1e-6)
        assert torch.allclose(gm(X), masked(gm, 5, 17), atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(site.width is None for site in gm.surgery.regularizers.values())
    assert torch.allclose(gm.eval()(X), masked(gm, 10, 33), atol=1e-6)


def test_widths_are_taken_back_after_an_error() -> None:
    gm = model().eval()
    with pytest.raises(ZeroDivisionError), gm.surgery.width(2):
        _ = 1 / 0
    assert torch.allclose(gm(X), masked(gm, 10, 33), atol=1e-6)


def test_a_width_is_no_part_of_copies_and_files() -> None:
    gm = model().eval()
    file = io.BytesIO()
    with gm.surgery.width(2):
        twin = copy.deepcopy(gm)
        torch.save(gm, file)
        assert list(gm.state_dict()) == list(Net().state_dict())
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert all(site.width is None for site in other.surgery.regularizers.values())
        assert torch.allclose(other(X), masked(gm, 10, 33), atol=1e-6)
        with other.surgery.width(2):
            assert torch.allclose(other(X), masked(gm, 2, 2), atol=1e-6)


def test_a_compiled_model_runs_at_each_width() -> None:
    torch._dynamo.reset()
    gm = model().eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(gm, fullgraph=True, backend=counter)
    for width in (1, 3, 7, 10):
        with gm.surgery.width(width):
            assert torch.allclose(run(X), masked(gm, width, width), atol=1e-6)
    assert counter.frame_count == 1
    assert torch.allclose(run(X), masked(gm, 10, 33), atol=1e-6)
