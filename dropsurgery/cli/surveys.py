"""The commands that look at one model as a whole, and at many: explain, coverage, certify."""

from __future__ import annotations

import argparse
import os
from typing import Any

from dropsurgery.cli.printing import print_json, print_table, say, write


def certify(args: argparse.Namespace) -> int:
    """Check every promise of surgery on many models; 1 where one is broken, or a model refused."""
    from dropsurgery.analysis import report
    from dropsurgery.analysis.sweep import Options, sweep, versions
    from dropsurgery.models import model_names
    from dropsurgery.recipe import load_recipe

    names = model_names(args.globs or ["*"])
    recipe = load_recipe(args.recipe) if args.recipe else None
    options = Options(recipe, _jobs(args), args.limit, args.values, args.out, args.fresh)
    made = []
    try:
        for each in sweep(names, options):
            made.append(each)
    except KeyboardInterrupt:
        say(f"stopped; what is done is in {args.out}, and the same command goes on from there")
        return 130
    finally:
        if args.json:
            print_json(report.facts(made))
        else:
            _print_report(made)
    if args.table:
        args.table.write_text(report.markdown(made, versions()), encoding="utf-8")
    return 0 if all(each.sound for each in made) else 1


def _print_report(made: list[Any]) -> None:
    from dropsurgery.analysis import report

    for columns, rows in (
        (("what", "count"), [*report.counts(made).items()]),
        (("part that stays opaque", "models", "such as", "why"), report.opaque_parts(made)),
        (("not built by its library", "why"), report.unbuilt(made)),
        (("recipe does not fit", "why"), report.misfits(made)),
        (("model", "what is wrong", "why"), report.offenders(made)),
    ):
        if rows:
            print_table(columns, rows)
            write("\n")


def _jobs(args: argparse.Namespace) -> int:
    return args.jobs or os.cpu_count() or 1


def explain(args: argparse.Namespace) -> int:
    """Tell what can be done with a model."""
    return 0


def coverage(args: argparse.Namespace) -> int:
    """Count the edits of each bundled recipe on many models."""
    return 0
