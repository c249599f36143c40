"""The README is true: its code runs and prints what it shows, and its tables list what there is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import segmentation_models_pytorch as smp
import timm
import torch

from dropsurgery import catalogue, schedules
from dropsurgery.cli import main
from dropsurgery.recipe import bundled, load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CUT = "…"


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line that it begins at."""

    language: str
    text: str
    line: int


def blocks(document: str) -> Iterator[Block]:
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", document, re.MULTILINE | re.DOTALL):
        yield Block(found[1], found[2], document.count("\n", 0, found.start()) + 1)


def check_shown(shown: str, printed: str) -> None:
    """Whether `printed` holds each piece of `shown`, in order; pieces are set apart by lines with a `…`."""
    for piece in shown.split(f"\n{CUT}\n"):
        _, found, printed = printed.partition(piece.strip("\n"))
        assert found, f"the README shows what is not printed:\n{piece}"


def check_commands(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run each line after a `$`; where nothing is shown below it, it has to succeed."""
    for command, shown in re.findall(r"^\$ dropsurgery (.*)\n((?:[^$].*\n)*)", text, re.MULTILINE):
        code = main(shlex.split(command))
        printed = "".join(capsys.readouterr())
        if shown:
            check_shown(shown, printed)
        else:
            assert code == 0, printed


def run(document: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Run all Python and commands of a document, in order and in one namespace, in the working directory."""
    printed = ""
    for block in blocks(document):
        if block.language == "python":
            code = compile("\n" * block.line + block.text, "README.md", "exec", dont_inherit=True)
            exec(code, names)
            printed = capsys.readouterr().out
        elif block.language == "text":
            check_shown(block.text, printed)
        elif block.language == "yaml":
            Path(block.text.split()[1]).write_text(block.text, encoding="utf-8")
        elif block.language == "console":
            check_commands(block.text, capsys)


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, cell by cell, without its head."""
    _, _, below = README.partition(f"{heading}\n")
    rows = [line for line in below.partition("\n#")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_code_runs_and_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalogue, "_registered", {"regularizers": {}, "patterns": {}})
    torch.save(timm.create_model("resnet50").state_dict(), "resnet50.pth")
    torch.save(smp.Unet("resnet34", encoder_weights=None).encoder.state_dict(), "encoder.pth")
    run(README, {"epochs": 2, "loader": [(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))]}, capsys)


@pytest.mark.parametrize(
    "wrong",
    [
        "```python\nprint(1)\n```\n```text\n2\n```\n",
        "```python\nprint(1)\nprint(2)\n```\n```text\n2\n…\n1\n```\n",
        "```console\n$ dropsurgery patterns\nno_such_pattern\n```\n",
        "```console\n$ dropsurgery check no_such_recipe\n```\n",
    ],
)
def test_a_false_claim_is_found(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        run(wrong, {}, capsys)


def test_the_set_up_is_what_runs_on_a_clean_checkout() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ('pip install -e ".[test]"', "pytest"):
        assert command in README and re.search(rf"^timed {re.escape(command)}", script, re.MULTILINE)


def test_patterns_are_those_of_the_catalogue() -> None:
    stated = {words(name)[0]: words(edges) for name, edges, _ in table("### Patterns")}
    assert stated == {name: list(catalogue.load("patterns", name).edges) for name in catalogue.names("patterns")}


def test_regularizers_are_those_of_the_catalogue() -> None:
    stated = {words(name)[0]: paper for name, paper, *_ in table("### Regularizers")}
    classes = {name: catalogue.load("regularizers", name) for name in catalogue.names("regularizers")}
    assert stated == {name: cls.paper for name, cls in classes.items()}


def test_recipes_are_the_bundled_ones() -> None:
    recipes = {name: load_recipe(name) for name in bundled()}
    facts = {
        name: [recipe.summary, recipe.reference, ", ".join(f"{model} {n}" for model, n in recipe.tested_on.items())]
        for name, recipe in recipes.items()
    }
    assert {words(name)[0]: rest for name, *rest in table("### Recipes")} == facts


def test_schedules_are_those_there_are() -> None:
    stated = [re.split(r"\W", words(name)[0])[0] for name, _ in table("## Rates and steps")]
    assert sorted(stated) == schedules.names()
