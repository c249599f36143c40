"""The folder is the registry; what is not in it is named with its nearest; plugins come by entry points."""

from __future__ import annotations

import inspect
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal, get_args

import pytest
from torch import nn

from dropsurgery import catalogue, regularizers
from dropsurgery.errors import RecipeError, SurgeryError
from dropsurgery.recipe import load_recipe
from dropsurgery.regularizers._base import Regularizer


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> dict[str, EntryPoint]:
    """Entry points of third parties, to be filled by the test."""
    points: dict[str, EntryPoint] = {}
    monkeypatch.setattr(catalogue, "entry_points", lambda group: [p for p in points.values() if p.group == group])
    return points


@pytest.fixture(autouse=True)
def own_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_registered", {"regularizers": {}, "patterns": {}})


def test_every_file_is_a_regularizer() -> None:
    files = {path.stem for path in Path(regularizers.__path__[0]).glob("[!_]*.py")}
    assert set(catalogue.names("regularizers")) == files
    assert {"dropblock", "dropout", "spatial_dropout", "stochastic_depth"} <= files
    for name in files:
        assert issubclass(catalogue.load("regularizers", name), Regularizer)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(SurgeryError, match="no regularizer 'dropblok'; did you mean 'dropblock'"):
        catalogue.load("regularizers", "dropblok")
    with pytest.raises(SurgeryError, match=r"no regularizer 'xyzzy'; there are: .*dropout"):
        catalogue.load("regularizers", "xyzzy")


@pytest.mark.parametrize("name", ["_base", "__init__", "../catalogue", "", "dropblock.DropBlock"])
def test_nothing_but_names_is_imported(name: str) -> None:
    with pytest.raises(SurgeryError, match="no regularizer"):
        catalogue.load("regularizers", name)


def test_plugins_are_listed_and_loaded(plugins: dict[str, EntryPoint]) -> None:
    plugins["mine"] = EntryPoint("mine", "torch.nn:Dropout", "dropsurgery.regularizers")
    assert "mine" in catalogue.names("regularizers")
    assert catalogue.load("regularizers", "mine") is nn.Dropout
    with pytest.raises(SurgeryError, match="did you mean 'mine'"):
        catalogue.load("regularizers", "mines")


def test_a_broken_plugin_shows_its_own_error(plugins: dict[str, EntryPoint]) -> None:
    plugins["broken"] = EntryPoint("broken", "no_such_package_at_all:Thing", "dropsurgery.regularizers")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        catalogue.load("regularizers", "broken")


def test_register_from_python(plugins: dict[str, EntryPoint]) -> None:
    catalogue.register("regularizers", "mine", nn.Dropout)
    catalogue.register("regularizers", "mine", nn.Dropout)
    assert catalogue.load("regularizers", "mine") is nn.Dropout
    assert "mine" in catalogue.names("regularizers")
    plugins["theirs"] = EntryPoint("theirs", "torch.nn:Dropout", "dropsurgery.regularizers")
    for taken in ("mine", "dropblock", "theirs"):
        with pytest.raises(SurgeryError, match=f"regularizer '{taken}': expected a new name"):
            catalogue.register("regularizers", taken, nn.Identity)


def test_arguments_are_those_of_the_constructor() -> None:
    found = catalogue.arguments(catalogue.load("regularizers", "dropblock"))
    assert list(found) == ["p", "block_size", "share_channels", "gamma", "clamp"]
    assert (found["p"].default, found["block_size"].default) == (0.1, 7)
    low, high = get_args(found["p"].annotation)[1:]
    assert (low.ge, high.le) == (0, 1)
    assert found["gamma"].annotation == Literal["paper", "exact"]
    assert not any(argument.required for argument in found.values())


def test_an_argument_without_default_is_required() -> None:
    class Needy(Regularizer):
        def __init__(self, groups: int, p: float = 0.1) -> None:
            super().__init__(p=p)

    found = catalogue.arguments(Needy)
    assert found["groups"] == catalogue.Argument(int, inspect.Parameter.empty)
    assert found["groups"].required and not found["p"].required


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("maxout", "is an architecture"),
        ("region_dropout", "is not determined by its source"),
        ("label_smoothing", r"cross_entropy\(logits, labels, label_smoothing=0\.1\)"),
    ],
)
def test_what_is_no_regularizer_is_refused_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(SurgeryError, match=f"no regularizer '{name}': .*{why}"):
        catalogue.load("regularizers", name)
    entry = {"name": "a", "pattern": "linear", "insert": name}
    with pytest.raises(RecipeError, match=rf"entries\[0\]\.insert: .*{why}"):
        load_recipe({"version": 1, "entries": [entry]})
