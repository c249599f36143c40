"""A sweep goes on from its file, and its report says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dropsurgery import cli
from dropsurgery.analysis import report, sweep
from dropsurgery.analysis.certify import FAILED, OPAQUE, REFUSED, TRACES, UNBUILT, VALUES, WHOLE, Certificate
from dropsurgery.analysis.pool import Lost
from dropsurgery.analysis.sweep import Options
from dropsurgery.errors import SurgeryError
from dropsurgery.recipe import load_recipe

SIZES = {"small": 10, "large": 1000, "other": 50, "strange": 5}


def certificate(model: str, kind: str = TRACES, **fields: Any) -> Certificate:
    facts: dict[str, Any] = {
        "status": WHOLE,
        "family": "strange" if model == "strange" else "nets",
        "cls": "Other" if model == "other" else "Net",
        "parameters": SIZES.get(model, 0),
        "nodes": 3,
        "sites": {"conv_bn": 2, "stem": 0},
        "compared": kind,
        "seconds": {"build": 0.1, "capture": 0.2},
        **fields,
    }
    return Certificate(model, kind, "", **facts)


class Here:
    """In the place of the pool: tasks run in this process, one by one."""

    ran: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, function: Callable[[Any], Any], *args: Any) -> None:
        self.function = function

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def run(self, tasks: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        for task in tasks:
            self.ran.append((task.model, task.kind))
            yield task, Lost("it hangs") if task.model == "hangs" else self.function(task)


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    monkeypatch.setattr(sweep, "Pool", Here)
    monkeypatch.setattr(sweep, "certify", lambda model, recipe, kind: certificate(model, kind))
    monkeypatch.setattr(Here, "ran", [])
    return Here.ran


def names(made: Iterable[Certificate]) -> list[tuple[str, str]]:
    return [(each.model, each.kind) for each in made]


# -- sweeping ----------------------------------------------------------------------------------------------------
def test_the_smallest_of_each_family_and_class_is_compared_by_values(tmp_path: Path) -> None:
    made = sweep.sweep(["large", "small", "other", "strange"], Options(file=tmp_path / "file"))
    traced = [(name, TRACES) for name in ("large", "small", "other", "strange")]
    assert names(made) == [*traced, ("strange", VALUES), ("small", VALUES), ("other", VALUES)]


@pytest.mark.parametrize(("values", "expected"), [("none", []), ("all", ["small", "large"])])
def test_more_or_no_values(values: str, expected: list[str], tmp_path: Path) -> None:
    made = sweep.sweep(["large", "small"], Options(values=values, file=tmp_path / "file"))
    assert [each.model for each in made if each.kind == VALUES] == expected


def test_it_goes_on_from_its_file(tmp_path: Path, ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(values="none", file=tmp_path / "file")
    first = list(sweep.sweep(["small", "large"], options))
    assert list(sweep.sweep(["large", "other", "small"], options))[:2] == [first[1], first[0]]
    assert ran == [("small", TRACES), ("large", TRACES), ("other", TRACES)]
    list(sweep.sweep(["small"], Options(values="none", file=tmp_path / "file", fresh=True)))
    assert len(sweep.read(options.file)) == 1
    recipe = load_recipe({"version": 1, "entries": [{"pattern": "conv_bn", "insert": "dropout"}]})
    list(sweep.sweep(["small"], Options(recipe, values="none", file=options.file)))
    monkeypatch.setattr(sweep, "versions", lambda: {"dropsurgery": "another"})
    list(sweep.sweep(["small"], options))
    assert len(sweep.read(options.file)) == 3


def test_a_line_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    options = Options(values="none", file=tmp_path / "file")
    list(sweep.sweep(["small", "large"], options))
    whole = options.file.read_text()
    options.file.write_text(whole[:-20])
    assert names(sweep.sweep(["small", "large"], options)) == [("small", TRACES), ("large", TRACES)]
    assert options.file.read_text() == whole


@pytest.mark.parametrize("text", ["what is this\n", "[1]\n", '{"model": "small"}\n'])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(SurgeryError, match=r"file:1: expected a certificate as JSON, got"):
        list(sweep.sweep(["small"], Options(file=tmp_path / "file")))
    assert (tmp_path / "file").read_text() == text


def test_a_model_that_hangs_is_reported(tmp_path: Path) -> None:
    (made,) = sweep.sweep(["hangs"], Options(file=tmp_path / "file"))
    assert (made.status, made.reason, made.sound) == (FAILED, "it hangs", False)
    assert sweep.read(tmp_path / "file") == [made]


# -- the report --------------------------------------------------------------------------------------------------
PART = {"path": "head", "class": "Head", "reason": "sets its attribute 'seen'"}
MADE = [
    certificate("small"),
    certificate("large", status=OPAQUE, opaque=[PART]),
    certificate("other", status=REFUSED, reason="capture: no", nodes=0),
    certificate("hangs", status=FAILED, reason="it hangs", nodes=0, family=""),
    certificate("abstract", status=UNBUILT, reason="build: no", nodes=0, seconds={}),
    certificate("strange", misfit="does not fit"),
    certificate("small", VALUES, broken=["values in eval: other outputs"]),
]


def test_counts() -> None:
    assert report.counts(MADE) == {
        "models": 6,
        WHOLE: 2,
        OPAQUE: 1,
        REFUSED: 1,
        UNBUILT: 1,
        FAILED: 1,
        "the recipe does not fit": 1,
        "compared by values": 1,
        "with broken promises": 1,
    }


def test_what_is_told_of_whom() -> None:
    assert report.offenders(MADE) == [
        ("other", REFUSED, "capture: no"),
        ("hangs", FAILED, "it hangs"),
        ("small", "broken", "values in eval: other outputs"),
    ]
    assert report.opaque_parts(MADE) == [("Head", "1", "large head", PART["reason"])]
    assert report.unbuilt(MADE) == [("abstract", "build: no")]
    assert report.misfits(MADE) == [("strange", "does not fit")]


def test_the_table() -> None:
    text = report.markdown(MADE, {"torch": "2.11"})
    assert "torch 2.11" in text and "2 wholly, 1 with opaque parts, 1 refused" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        ["nets", "4", "1", "1", "1", "1", "200", "2.00", "small: conv_bn 2"],
        ["not built", "1", "0", "0", "1", "0", "-", "-", "-"],
        ["strange", "1", "1", "0", "0", "0", "200", "2.00", "strange: conv_bn 2"],
    ]


# -- the command -----------------------------------------------------------------------------------------------
def run(*argv: str) -> int:
    return cli.main(["certify", "resnet18", *argv])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list").write_text("resnet34\nresnet26\n")
    assert run("@list", "--table", "table.md", "--jobs", "1") == 0
    out = capsys.readouterr().out
    assert "models                   3" in out and "what is wrong" not in out
    assert "| nets | 3 | 3 |" in (tmp_path / "table.md").read_text()
    assert len(sweep.read(tmp_path / "certify.jsonl")) == 4


@pytest.mark.parametrize(
    "fields",
    [{"broken": ["in eval: other"]}, {"status": REFUSED, "reason": "other"}, {"status": FAILED, "reason": "other"}],
)
def test_what_is_wrong_fails_the_command(
    fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "certify", lambda model, recipe, kind: certificate(model, kind, **fields))
    assert run("--out", str(tmp_path / "file"), "--no-values") == 1
    assert "resnet18" in capsys.readouterr().out
    assert run("--out", str(tmp_path / "file"), "--no-values", "--json") == 1
    ((wrong),) = json.loads(capsys.readouterr().out)["wrong"]
    assert wrong["model"] == "resnet18" and "other" in wrong["why"]


@pytest.mark.parametrize("fields", [{"status": UNBUILT, "reason": "other"}, {"misfit": "other"}])
def test_what_is_not_dropsurgerys_fault_does_not(
    fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "certify", lambda model, recipe, kind: certificate(model, kind, **fields))
    assert run("--out", str(tmp_path / "file"), "--no-values") == 0
    assert "other" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def certify(model: str, recipe: Any, kind: str) -> Certificate:
        if model == "resnet34":
            raise KeyboardInterrupt
        return certificate(model, kind)

    monkeypatch.setattr(sweep, "certify", certify)
    assert run("resnet34", "--out", str(tmp_path / "file")) == 130
    output = capsys.readouterr()
    assert "the same command goes on from there" in output.err and "models                   1" in output.out
    assert names(sweep.read(tmp_path / "file")) == [("resnet18", TRACES)]


@pytest.mark.parametrize(
    ("glob", "told"),
    [("no_such_*", "no model name fits 'no_such_*'"), ("resnt18", "did you mean 'resnet18'"), ("smp:Unt:*", "fits")],
)
def test_a_glob_that_fits_nothing(glob: str, told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["certify", glob, "--out", str(tmp_path / "file")]) == 1
    assert told in capsys.readouterr().err
