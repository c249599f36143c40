"""The command `dropsurgery`: look at recipes, patterns and models, without writing code.

Exit codes: 0 all is fine, 1 the recipe or the model is at fault (one message, no traceback), 2 wrong usage.
What is heavy (torch, model libraries) is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dropsurgery.errors import RecipeError, SurgeryError, SurgeryWarning

if TYPE_CHECKING:
    from torch import nn

    from dropsurgery.recipe import Recipe

_LENGTH = 1000  # steps, for a schedule that is shown over the whole of a training of unknown length
_FLAGS = {"example_inputs": "--input", "total_steps": "--total-steps", "steps_per_epoch": "--steps-per-epoch"}
_RECIPE = "a bundled name, or a path (with a slash)"
_MODEL = "a name in timm.list_models(), smp:<Architecture>:<encoder>, or package.module:factory"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives its exit code. Wrong usage is argparse's SystemExit(2)."""
    args = _parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no arrow still gets its table
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries speak to programmers
            warnings.simplefilter("always", SurgeryWarning)
            warnings.showwarning = lambda message, *_: _say(f"note: {message}")
            code: int = args.run(args)
        sys.stdout.flush()
    except SurgeryError as error:
        _say(str(error) + _hints(str(error)))
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


# -- the words of the command line ---------------------------------------------------------------------------
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dropsurgery",
        description="Find where regularizers belong in a model, and see what a recipe does to it.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=summary, description=summary)
        made.set_defaults(run=run)
        return made

    for name, run, summary in (
        ("recipes", _recipes, "list the bundled recipes"),
        ("patterns", _patterns, "list the patterns and their edges"),
        ("regularizers", _regularizers, "list the regularizers and their arguments"),
    ):
        _add_json(command(name, run, summary))
    command("schema", _schema, "print the JSON Schema of recipes")
    check = command("check", _check, "check recipes: all problems, each with its place")
    check.add_argument("recipes", nargs="+", metavar="RECIPE", help=_RECIPE)
    _add_json(check)
    sites = command("sites", _sites, "list the places in a model where a regularizer can go")
    sites.add_argument("--pattern", help="of this pattern only")
    plan = command("plan", _plan, "show what a recipe would do to a model")
    diff = command("diff", _diff, "show the model's graphs before and after a recipe")
    for each in (sites, plan, diff):
        _add_model(each)
        output = _add_json(each)
    output.add_argument("--html", action="store_true", help="print one HTML page")
    for each in (plan, diff):
        _add_recipe(each)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> Any:
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    return output


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--input", type=_shape, metavar="SHAPE", help="shape of the input, such as 2,3,224,224")
    size.add_argument("--image-size", type=_size, metavar="N|HxW", help="size of the images")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help=_RECIPE)
    parser.add_argument(
        "--set", action="append", type=_override, metavar="KEY=VALUE", dest="overrides",
        help="change a value of the recipe, such as 'conv branch.with.p=0.2'; may be repeated",
    )  # fmt: skip
    parser.add_argument("--total-steps", type=_count, metavar="N", help="length of the training in optimizer steps")
    parser.add_argument("--steps-per-epoch", type=_count, metavar="N", help="for recipes that count in epochs")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_count(size.strip()) for size in text.split(","))


def _size(text: str) -> tuple[int, int]:
    sizes = [_count(size) for size in text.split("x")]
    if len(sizes) > 2:
        raise argparse.ArgumentTypeError(f"expected N or HxW, got {text!r}")
    return sizes[0], sizes[-1]


def _override(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return text


# -- the commands --------------------------------------------------------------------------------------------
def _recipes(args: argparse.Namespace) -> int:
    from dropsurgery.recipe import bundled, load_recipe

    loaded = {name: load_recipe(name) for name in bundled()}
    if args.json:
        return _print_json([_recipe_facts(name, recipe) for name, recipe in loaded.items()])
    rows = [(name, _pairs(recipe.tested_on), recipe.summary) for name, recipe in loaded.items()]
    return _print_table(("recipe", "tested on (edits)", "summary"), rows)


def _recipe_facts(name: str, recipe: Recipe) -> dict[str, Any]:
    return {
        "name": name,
        "summary": recipe.summary,
        "reference": recipe.reference,
        "tested_on": recipe.tested_on,
        "entries": [entry.name for entry in recipe.entries],
    }


def _patterns(args: argparse.Namespace) -> int:
    from dropsurgery import catalogue

    facts = []
    for name in catalogue.names("patterns"):
        pattern = catalogue.load("patterns", name)
        home = sys.modules.get(f"dropsurgery.patterns.{name}")
        facts.append({"name": name, "edges": list(pattern.edges), "summary": _first_line(home)})
    if args.json:
        return _print_json(facts)
    rows = [(fact["name"], ", ".join(fact["edges"]), fact["summary"]) for fact in facts]
    return _print_table(("pattern", "edges (the default first)", "what it finds"), rows)


def _regularizers(args: argparse.Namespace) -> int:
    from dropsurgery import catalogue

    facts = []
    for name in catalogue.names("regularizers"):
        cls = catalogue.load("regularizers", name)
        known = catalogue.arguments(cls)
        defaults = {key: None if argument.required else argument.default for key, argument in known.items()}
        facts.append({"name": name, "summary": cls.summary, "arguments": defaults, "paper": cls.paper})
    if args.json:
        return _print_json(facts)
    rows = [(fact["name"], fact["summary"], _pairs(fact["arguments"]), fact["paper"]) for fact in facts]
    return _print_table(("regularizer", "what it does", "arguments (defaults)", "paper"), rows)


def _schema(args: argparse.Namespace) -> int:
    from dropsurgery.recipe import recipe_schema

    return _print_json(recipe_schema())


def _check(args: argparse.Namespace) -> int:
    from dropsurgery.recipe import load_recipe

    facts = []
    for name in args.recipes:
        try:
            load_recipe(name)
        except RecipeError as error:
            _say(str(error))
            facts.append({"recipe": name, "ok": False, "problems": error.problems})
        else:
            facts.append({"recipe": name, "ok": True, "problems": ()})
    if args.json:
        _print_json(facts)
    else:
        _print("".join(f"ok {fact['recipe']}\n" for fact in facts if fact["ok"]))
    return 0 if all(fact["ok"] for fact in facts) else 1


def _sites(args: argparse.Namespace) -> int:
    from dropsurgery import find_sites
    from dropsurgery.diffing import site_facts

    model = _model(args.model)
    found = find_sites(model, args.pattern, example_inputs=_inputs(args, model))
    if args.json:
        return _print_json([site_facts(site) for site in found])
    rows = [
        (
            site.id,
            site.stage,
            site.reduction,
            site.block,
            site.path,
            site.role,
            "x".join(map(str, site.shape)),
        )
        for site in found
    ]
    return _print_table(("site", "stage", "reduction", "block", "path", "role", "shape"), rows)


def _plan(args: argparse.Namespace) -> int:
    from dropsurgery import plan_recipe
    from dropsurgery.diffing import plan_facts

    recipe = _recipe(args)
    model = _model(args.model)
    plan = plan_recipe(model, recipe, example_inputs=_inputs(args, model), **_length(args))
    return _print_json(plan_facts(plan)) if args.json else _print(f"{plan}\n")


def _diff(args: argparse.Namespace) -> int:
    from dropsurgery import apply_recipe, diff

    recipe, length = _recipe(args), _length(args)
    if length["total_steps"] is None and not _counts_steps(recipe):
        length["total_steps"] = _LENGTH
        _say(f"note: without --total-steps, the schedules are shown over a training of {_LENGTH} steps")
    model = _model(args.model)
    gm = apply_recipe(model, recipe, example_inputs=_inputs(args, model), **length)
    return _print(diff(gm, format="json" if args.json else "html" if args.html else "text") + "\n")


# -- what the arguments mean ---------------------------------------------------------------------------------
def _model(name: str) -> nn.Module:
    from dropsurgery.models import call_factory, make_model

    if ":" not in name or name.startswith("smp:"):
        return make_model(name)
    sys.path.insert(0, os.getcwd())  # the user's own module, as `python -m` finds it
    return call_factory(name)


def _inputs(args: argparse.Namespace, model: nn.Module) -> Any:
    """An example input of the size that is asked for; None leaves it to the model."""
    import torch

    from dropsurgery.capture.inputs import resolve_inputs

    if args.input is None and args.image_size is None:
        return None
    if args.image_size is not None:
        ((usual,), _), *_ = resolve_inputs(model, None)
        return usual[:, :, :1, :1].expand(*usual.shape[:2], *args.image_size)
    like = next(model.parameters(), torch.empty(0))
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(args.input)


def _recipe(args: argparse.Namespace) -> Recipe:
    from dropsurgery.recipe import load_recipe

    return load_recipe(args.recipe, overrides=args.overrides)


def _length(args: argparse.Namespace) -> dict[str, Any]:
    return {"total_steps": args.total_steps, "steps_per_epoch": args.steps_per_epoch}


def _counts_steps(recipe: Recipe) -> bool:
    """Whether a schedule names steps or epochs, which mean nothing in a training of unknown length."""
    schedules = [entry.schedule for entry in recipe.entries]
    return any(at.unit != "fraction" for schedule in schedules for at in (schedule.begin, schedule.end))


# -- printing ------------------------------------------------------------------------------------------------
def _print(text: str) -> int:
    sys.stdout.write(text)
    return 0


def _print_json(facts: Any) -> int:
    return _print(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> int:
    """A table that fits the terminal; in a pipe, padded columns of which nothing is cut."""
    cells = [columns, *([_cell(cell) for cell in row] for row in rows)]
    if sys.stdout.isatty():
        _print_rich(cells)
        return 0
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
    return _print("".join(f"{line}\n" for line in lines))


def _print_rich(cells: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in cells[0]:
        table.add_column(column, overflow="fold")
    for row in cells[1:]:
        table.add_row(*map(Text, row))  # as text: brackets are no markup
    Console().print(table)


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def _pairs(items: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in items.items())


def _first_line(module: Any) -> str:
    return (getattr(module, "__doc__", None) or "").strip().partition("\n")[0]


def _say(text: str) -> None:
    sys.stderr.write(f"dropsurgery: {text}\n")


def _hints(message: str) -> str:
    """What the words of the Python functions are called here."""
    return "".join(f"\n  (here, {word} is {flag})" for word, flag in _FLAGS.items() if word in message)
