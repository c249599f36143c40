"""Regularizers with a state keep it out of the model's state_dict, and in `gm.surgery.state_dict()`: all of them.

Each has a case below: a small net, and the recipe's entry that puts it there.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropsurgery import apply_recipe, catalogue, strip
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Regularizer, check_state

State = Mapping[str, Mapping[str, Tensor]]


class Net(nn.Module):
    """Images to four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).mean((2, 3)))


def images(index: int = 0) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(index))


ENTRIES: dict[str, dict[str, Any]] = {
    "clustering_dropout": {"pattern": "classifier", "edge": "module", "with": {"interval": 2}},
    "guided_dropout": {"pattern": "conv_act", "edge": "output", "with": {"warmup": 2}},
    "nsdropout": {"pattern": "classifier", "edge": "input"},
}
LABELS = torch.tensor([0, 1, 1, 0])
STATEFUL = sorted(ENTRIES)


def has_state(name: str) -> bool:
    """Whether a regularizer has a state under some of its examples, alone or once it has a layer or a place."""
    cls = catalogue.load("regularizers", name)
    return any(_states(cls, example) for example in cls.examples)


def _states(cls: type[Regularizer], example: dict[str, Any]) -> bool:
    layer = cls(**example)
    if layer.kind == "swap":
        layer.bind(cls.example_host())  # type: ignore[attr-defined]
    return bool(layer.state())


def test_all_with_a_state_have_a_case() -> None:
    assert [name for name in catalogue.names("regularizers") if has_state(name)] == STATEFUL


def operated(name: str, net: nn.Module | None = None) -> Any:
    entry = {"name": "a", "insert": name, **ENTRIES[name]}
    recipe = {"version": 1, "name": "r", "entries": [entry]}
    torch.manual_seed(0)
    return apply_recipe(Net() if net is None else net, recipe, example_inputs=images(), total_steps=10).train()


def told(gm: Any, **more: Any) -> Any:
    """The labels, for those that go by them."""
    by_labels = any(each.needs_labels for each in gm.surgery.regularizers.values())
    return gm.surgery.batch(labels=LABELS, **more) if by_labels else nullcontext()


def outputs(gm: Any, x: Tensor) -> Tensor:
    with told(gm):
        y: Tensor = gm(x)
    return y


def train(gm: Any, steps: int, first: int = 0) -> None:
    optimizer = torch.optim.SGD(gm.parameters(), 0.05)
    with told(gm, validation=(images(99), LABELS)):
        for index in range(first, first + steps):
            optimizer.zero_grad()
            gm(images(index)).square().mean().backward()
            optimizer.step()


def trained(name: str) -> Any:
    gm = operated(name)
    train(gm, 3)
    return gm


def states(gm: Any) -> State:
    found: State = gm.surgery.state_dict()["regularizers"]
    return found


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(
        left[site].keys() == right[site].keys()
        and all(torch.equal(value, right[site][name]) for name, value in left[site].items())
        for site in left
    )


def filed(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", STATEFUL)
def test_it_is_with_the_handle_and_not_with_the_model(name: str) -> None:
    gm = trained(name)
    learned = {key for key, _ in gm.named_parameters()}
    buffers = {key for key, _ in Net().named_buffers()}
    assert set(gm.state_dict()) == learned | buffers
    assert all(states(gm)[site] for site in gm.surgery.regularizers)
    assert not same(states(gm), states(operated(name)))  # the training has left its mark


@pytest.mark.parametrize("name", STATEFUL)
def test_it_goes_through_a_file(name: str) -> None:
    gm, other = trained(name), operated(name)
    other.load_state_dict(filed(gm.state_dict()))
    other.surgery.load_state_dict(filed(gm.surgery.state_dict()))
    assert same(states(gm), states(other))
    for each in (gm, other):
        torch.manual_seed(1)
        train(each, 3, first=3)
    assert same(states(gm), states(other))
    torch.manual_seed(2)
    y = outputs(gm, images())
    torch.manual_seed(2)
    assert torch.equal(outputs(other, images()), y)


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda gm: torch.load(_file(gm), weights_only=False)])
def test_copies_have_it_and_one_of_their_own(name: str, way: Callable[[Any], Any]) -> None:
    gm = trained(name)
    copied = way(gm)
    before = states(gm)
    assert same(before, states(copied))
    torch.manual_seed(1)
    train(copied, 3, first=3)
    assert same(before, states(gm)) and not same(before, states(copied))
    torch.manual_seed(1)
    train(gm, 3, first=3)
    assert same(states(gm), states(copied))


def _file(gm: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_it_outlives_a_change_of_dtype(name: str, dtype: torch.dtype) -> None:
    gm = trained(name)
    before = states(gm)
    gm.to(dtype)
    assert same(before, states(gm))
    other = operated(name).to(dtype)
    other.surgery.load_state_dict(filed(gm.surgery.state_dict()))
    assert same(before, states(other))
    assert outputs(gm, images().to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", STATEFUL)
def test_a_model_made_without_memory_begins_anew(name: str) -> None:
    with torch.device("meta"):
        net = Net()
    entry = {"name": "a", "insert": name, **ENTRIES[name]}
    gm: Any = apply_recipe(net, {"version": 1, "name": "r", "entries": [entry]}, example_inputs=images().to("meta"))
    gm.to_empty(device="cpu")
    other = trained(name)
    assert same(states(gm), states(operated(name)))
    gm.load_state_dict(other.state_dict())
    gm.surgery.load_state_dict(other.surgery.state_dict() | {"recipe": "r"})
    assert same(states(gm), states(other))
    torch.manual_seed(1)
    y = outputs(gm.train(), images())
    torch.manual_seed(1)
    assert torch.equal(outputs(other.train(), images()), y)


def spoiled(good: Mapping[str, Tensor]) -> dict[str, Any]:
    """States of one regularizer of which each has one thing wrong."""
    first = sorted(good)[0]
    return {
        "no mapping": None,
        "a list": [1],
        "empty": {},
        "a key missing": {name: value for name, value in good.items() if name != first},
        "a key too many": {**good, "other": torch.zeros(())},
        "another shape": {**good, first: torch.zeros(3, 7, dtype=good[first].dtype)},
        "another dtype": {**good, first: good[first].to(torch.complex64)},
        "no tensor": {**good, first: 1},
    }


@pytest.mark.parametrize("wrong", spoiled({"a": torch.zeros(())}))
@pytest.mark.parametrize("name", STATEFUL)
def test_a_bad_state_is_refused_with_nothing_changed(name: str, wrong: str) -> None:
    gm = trained(name)
    clock, before = gm.surgery.current_step, states(gm)
    ((site, good),) = states(operated(name)).items()
    bad = operated(name).surgery.state_dict() | {"regularizers": {site: spoiled(good)[wrong]}}
    with pytest.raises(SurgeryError, match=r"state.*: expected .*, got "):
        gm.surgery.load_state_dict(bad)
    assert same(before, states(gm)) and gm.surgery.current_step == clock


@pytest.mark.parametrize("name", STATEFUL)
def test_states_of_other_sites_are_refused_with_nothing_changed(name: str) -> None:
    gm = trained(name)
    before, good = states(gm), operated(name).surgery.state_dict()
    (state,) = good["regularizers"].values()
    wrong: dict[str, tuple[Any, str]] = {
        "another site": ({**good["regularizers"], "elsewhere": state}, "this model has no site elsewhere"),
        "none": ({}, "expected the states of 1 regularizers, and of .* there is none"),
        "no mapping": ([state], "regularizers: expected a state for each site, got"),
    }
    for regularizers, told in wrong.values():
        with pytest.raises(SurgeryError, match=told):
            gm.surgery.load_state_dict(good | {"regularizers": regularizers})
        assert same(before, states(gm)) and gm.surgery.current_step == 3
    # A clock that is none is found last, when the regularizers have been set.
    with pytest.raises(SurgeryError, match="state of the clock"):
        gm.surgery.load_state_dict(good | {"scheduler": {"step": -1}})
    assert same(before, states(gm)) and gm.surgery.current_step == 3


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.filterwarnings("ignore:strip")
def test_strip_leaves_none_of_it(name: str) -> None:
    stripped = strip(trained(name))
    assert list(stripped.state_dict()) == list(Net().state_dict())
    assert [key for key, _ in stripped.named_buffers()] == [key for key, _ in Net().named_buffers()]


def test_what_a_state_has_to_be_like() -> None:
    like = {"a": torch.zeros(2), "b": torch.zeros((), dtype=torch.int64)}
    check_state({"a": torch.ones(2), "b": torch.tensor(3)}, like)
    for name, bad in spoiled(like).items():
        with pytest.raises(SurgeryError, match=r"state.*: expected .*, got "):
            check_state(bad, like)
        assert name
    with pytest.raises(SurgeryError, match=r"state: expected no entries, got \['a'\]"):
        check_state({"a": torch.ones(2)}, {})
