"""The labels: every regularizer has them, they are known ones, and they are what is selected by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dropsurgery import catalogue, cli
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._taxonomy import LABELS, Taxonomy, conditions, markdown, meets

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- taxonomy -->\n", "<!-- /taxonomy -->\n"
NAMES = catalogue.names("regularizers")


def of(name: str) -> Taxonomy:
    taxonomy = catalogue.load("regularizers", name).taxonomy
    assert isinstance(taxonomy, Taxonomy), f"{name} has no taxonomy"
    return taxonomy


@pytest.mark.parametrize("name", NAMES)
def test_every_regularizer_has_its_own_labels(name: str) -> None:
    assert "taxonomy" in vars(catalogue.load("regularizers", name))
    labels = of(name).labels()
    assert list(labels) == list(LABELS)
    assert all(set(labels[key]) <= set(LABELS[key]) and labels[key] for key in LABELS)


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_in_keeping_with_what_the_class_does(name: str) -> None:
    """What says that it draws nothing, whatever its arguments, is deterministic; what is made for the input, so."""
    cls, labels = catalogue.load("regularizers", name), of(name).labels()
    draws = any(cls(**example).random for example in cls.examples)
    assert ("random" in labels["randomness"]) is draws
    assert ("stem.input" in cls.placement or "the net's input" in cls.placement) <= ("input" in labels["space"])


def test_reference_rows() -> None:
    """What the paper's table 1 says of methods that are here."""
    assert of("dropout").told() == {
        "transforms": "data, architecture",
        "space": "input, hidden",
        "randomness": "random",
        "phase": "training",
        "dependence": "p(θ)",
    }
    assert of("standout").told()["dependence"] == "p(θ|x, π)"
    assert of("stochastic_depth").told()["dependence"] == "p(θ)"
    assert of("stochastic_depth").labels()["space"] == ("hidden",)
    assert of("heuristic_dropout").labels()["randomness"] == ("deterministic",)
    assert of("clustering_dropout").told()["dependence"] == "p(θ|D, π)"


def test_no_label_has_two_keys() -> None:
    labels = [label for known in LABELS.values() for label in known]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"space": "hiden"}, "no space of a taxonomy 'hiden'; did you mean 'hidden'"),
        ({"dependence": ("sample", "moon")}, "no dependence of a taxonomy 'moon'; there are: none, label"),
        ({"phase": ()}, "expected one label or several different ones of phase, got"),
        ({"transforms": ("data", "data")}, "several different ones of transforms"),
    ],
)
def test_unknown_labels_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(SurgeryError, match=told):
        Taxonomy(**({"transforms": "data", "space": "input"} | given))


def test_conditions() -> None:
    assert conditions("phase=training,random") == [("phase", "training"), ("randomness", "random")]
    assert conditions(" space = input , sample ") == [("space", "input"), ("dependence", "sample")]
    assert meets(of("dropout"), conditions("input,hidden"))
    assert not meets(of("dropout"), conditions("input,sample"))
    assert meets(None, []) and not meets(None, conditions("random"))


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("fase=training", "no key to select by 'fase'; did you mean 'phase'.*transforms, space, randomness, phase"),
        ("phase=night", "no phase 'night'; there are: training, test"),
        ("randm", "no label 'randm'; did you mean 'random'"),
        ("phase=", "no phase ''"),
        ("random,", "no label ''; there are: data, .*hidden.*parameters"),
        ("", "no label ''"),
        ("x=y=z", "no key to select by 'x'"),
    ],
)
def test_wrong_conditions_say_what_there_is(where: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SurgeryError, match=told):
        conditions(where)
    assert cli.main(["regularizers", "--where", where]) == 1
    output = capsys.readouterr()
    assert output.out == "" and "there are" in output.err.lower()


def listed(*argv: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert cli.main(["regularizers", *argv, "--json"]) == 0
    return [fact["name"] for fact in json.loads(capsys.readouterr().out)]


def test_the_command_selects(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys=capsys) == NAMES
    random = listed("--where", "phase=training,random", capsys=capsys)
    assert set(NAMES) - set(random) >= {"heuristic_dropout"} and "dropout" in random
    assert listed("--where", "deterministic", capsys=capsys) == [n for n in NAMES if n not in random]
    assert "clustering_dropout" in listed("--where", "dependence=dataset,parameters", capsys=capsys)
    assert listed("--where", "error", capsys=capsys) == []
    assert cli.main(["regularizers", "--where", "space=input", "--taxonomy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["regularizer", *LABELS]
    assert [line.split()[0] for line in lines[1:]] == [n for n in NAMES if "input" in of(n).labels()["space"]]
    with pytest.raises(SystemExit):
        cli.main(["regularizers", "--json", "--markdown"])
    capsys.readouterr()


def test_json_has_the_labels(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["regularizers", "--json"])
    facts = {fact["name"]: fact["taxonomy"] for fact in json.loads(capsys.readouterr().out)}
    assert facts["standout"]["dependence"] == ["sample", "parameters"]


def test_a_plugin_without_labels_is_listed_and_never_selected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Plain(catalogue.load("regularizers", "dropout")):  # type: ignore[misc]
        taxonomy = None

    monkeypatch.setattr(catalogue, "_registered", {"regularizers": {"plain": Plain}, "patterns": {}})
    assert "plain" in listed(capsys=capsys) and "plain" not in listed("--where", "random", capsys=capsys)
    assert cli.main(["regularizers", "--taxonomy"]) == 0
    assert "plain " in capsys.readouterr().out
    assert markdown([("plain", None)]).endswith("| `plain` | - | - | - | - | - |\n")


def test_the_readme_has_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Between its marks stands what `dropsurgery regularizers --markdown` prints; paste it there."""
    text = README.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert cli.main(["regularizers", "--markdown"]) == 0
    assert text.partition(BEGIN)[2].partition(END)[0].strip("\n") == capsys.readouterr().out.strip("\n")
