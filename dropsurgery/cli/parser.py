"""The words of the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dropsurgery.cli import arguments, commands, compressing, surveys

_RECIPE = "a bundled name, or a path (with a slash)"
_MODEL = "a name in timm.list_models(), smp:<Architecture>:<encoder>, torchvision:<name>, or package.module:factory"
_GLOBS = "with wildcards such as resnet*, smp:*:resnet34 or torchvision:*, and @FILE for a list, one a line"


def make_parser() -> argparse.ArgumentParser:
    """All commands with their arguments; `run` of what is parsed carries one out."""
    parser = argparse.ArgumentParser(
        prog="dropsurgery",
        description="Find where regularizers belong in a model, and see what a recipe does to it.",
    )
    known = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str, **options: Any) -> argparse.ArgumentParser:
        made = known.add_parser(name, help=summary, description=summary, **options)
        made.set_defaults(run=run)
        return made

    for name, run, summary in (
        ("recipes", commands.recipes, "list the bundled recipes"),
        ("patterns", commands.patterns, "list the patterns and their edges"),
    ):
        _add_json(command(name, run, summary))
    _add_labels(command("regularizers", commands.regularizers, "list the regularizers and their arguments"))
    command("schema", commands.schema, "print the JSON Schema of recipes")
    check = command("check", commands.check, "check recipes: all problems, each with its place")
    check.add_argument("recipes", nargs="+", metavar="RECIPE", help=_RECIPE)
    _add_json(check)
    sites = command("sites", commands.sites, "list the places in a model where a regularizer can go")
    sites.add_argument("--pattern", help="of this pattern only")
    plan = command("plan", commands.plan, "show what a recipe would do to a model")
    diff = command("diff", commands.diff, "show the model's graphs before and after a recipe")
    explain = command("explain", surveys.explain, "tell what can be done with a model")
    for each in (sites, plan, explain, diff):
        _add_model(each)
        output = _add_json(each)
    output.add_argument("--html", action="store_true", help="print one HTML page")
    for each in (plan, diff):
        _add_recipe(each)
    _add_compress(command("compress", compressing.compress, "cut a model with structural dropout down to a width"))
    lists = {"fromfile_prefix_chars": "@"}
    coverage = command("coverage", surveys.coverage, "count the edits of each bundled recipe on many models", **lists)
    _add_globs(coverage, "the smallest model of each family of timm's, and SMP's architectures")
    _add_json(coverage)
    _add_certify(command("certify", surveys.certify, "check every promise of surgery on many models", **lists))
    return parser


def _add_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--where", metavar="LABELS",
        help="those that have all these labels of the taxonomy, such as phase=training,random",
    )  # fmt: skip
    output = _add_json(parser)
    output.add_argument("--taxonomy", action="store_true", help="print the labels, in place of the arguments")
    output.add_argument("--markdown", action="store_true", help="print the labels as a table in markdown")


def _add_globs(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("globs", nargs="*", metavar="GLOB", help=f"names of models, {_GLOBS}; by default {default}")
    parser.add_argument("--jobs", type=arguments.count, metavar="N", help="processes; by default one a core")


def _add_compress(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_recipe(parser)
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="a state_dict of the model, as torch.save writes it"
    )
    parser.add_argument(
        "--width", action="append", type=compressing.width, metavar="[SITE=]WIDTH", required=True,
        help="how much each site keeps: a whole number of units, or a share such as 0.5; for one site, or a pattern "
        "of them, 'layer4.*=0.25'; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="where the narrow model goes: .pt (the model itself), .pth (its state_dict), .pt2 (torch.export), .onnx",
    )  # fmt: skip
    _add_json(parser)


def _add_certify(parser: argparse.ArgumentParser) -> None:
    _add_globs(parser, "all of timm")
    parser.add_argument("--recipe", metavar="RECIPE", help=f"{_RECIPE}; by default dropout goes everywhere")
    by_values = parser.add_mutually_exclusive_group()
    by_values.add_argument(
        "--values", action="store_const", const="all", default="smallest",
        help="compare every model by values too; by default the smallest of each family and class",
    )  # fmt: skip
    by_values.add_argument(
        "--no-values", action="store_const", const="none", dest="values", help="compare none by them"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("certify.jsonl"), metavar="FILE",
        help="where certificates are kept, for the next run to go on from; by default certify.jsonl",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="begin that file anew")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write a table by family, in markdown")
    parser.add_argument(
        "--limit", type=arguments.count, default=600, metavar="SECONDS", help="for one model; 600 by default"
    )
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> Any:
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    return output


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--input", type=arguments.shape, metavar="SHAPE", help="shape of the input, such as 2,3,224,224")
    size.add_argument("--image-size", type=arguments.size, metavar="N|HxW", help="size of the images")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help=_RECIPE)
    parser.add_argument(
        "--set", action="append", type=arguments.override, metavar="KEY=VALUE", dest="overrides",
        help="change a value of the recipe, such as 'conv branch.with.p=0.2'; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--total-steps", type=arguments.count, metavar="N", help="length of the training in optimizer steps"
    )
    parser.add_argument("--steps-per-epoch", type=arguments.count, metavar="N", help="for recipes that count in epochs")
