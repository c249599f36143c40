"""The commands that look at one model as a whole, and at many: explain, coverage, certify."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dropsurgery.cli.printing import pairs, print_json, print_table, say, write

if TYPE_CHECKING:
    from dropsurgery.analysis.coverage import Row
    from dropsurgery.analysis.explain import Explanation


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

    sections = (
        (("what", "count"), list(report.counts(made).items())),
        (("part that stays opaque", "models", "such as", "why"), report.opaque_parts(made)),
        (("not built by its library", "why"), report.unbuilt(made)),
        (("recipe does not fit", "why"), report.misfits(made)),
        (("model", "what is wrong", "why"), report.offenders(made)),
    )
    _print_sections(sections)


def _print_sections(sections: Iterable[tuple[Sequence[str], Sequence[Sequence[Any]]]]) -> int:
    """Tables with an empty line between them; those without rows are left out."""
    for index, (columns, rows) in enumerate(section for section in sections if section[1]):
        write("\n" if index else "")
        print_table(columns, rows)
    return 0


def _jobs(args: argparse.Namespace) -> int:
    return args.jobs or os.cpu_count() or 1


def explain(args: argparse.Namespace) -> int:
    """Tell what can be done with a model."""
    from dropsurgery.analysis.explain import explain
    from dropsurgery.cli.arguments import inputs_of, model_of

    model = model_of(args.model)
    told = explain(model, inputs_of(args, model))
    if args.json:
        return print_json(asdict(told))
    write(f"{args.model}: {told.model}, {told.parameters / 1e6:.1f} million parameters\n\n")
    stages = sorted({stage for edges in told.sites.values() for at in edges.values() for stage in at}, key=_order)
    fit, unfit = ([fit for fit in told.fits if bool(fit.edits) is fits] for fits in (True, False))
    sections = (
        (("sites: pattern", "edge", *map(_stage, stages), "all"), list(_site_rows(told, stages))),
        (
            ("stochastic layer", "class", "rate"),
            [(layer["path"], layer["class"], layer["rate"]) for layer in told.stochastic],
        ),
        (("opaque part", "class", "why"), [(part["path"], part["class"], part["reason"]) for part in told.opaque]),
        (
            ("recipe that fits", "edits", "by entry"),
            [(each.recipe, each.edits, pairs(each.entries)) for each in fit],
        ),
        (("recipe that does not", "why"), [(each.recipe, each.reason) for each in unfit]),
    )
    return _print_sections(sections)


def _site_rows(told: Explanation, stages: Sequence[int | None]) -> Iterator[tuple[Any, ...]]:
    """A row for each edge that has sites, those of its pattern's default edge first."""
    for pattern, edges in told.sites.items():
        for edge, at in edges.items():
            if at:
                yield (pattern, edge, *(at.get(stage) for stage in stages), sum(at.values()))


def _order(stage: int | None) -> float:
    return math.inf if stage is None else stage


def _stage(stage: int | None) -> str:
    return "no stage" if stage is None else f"stage {stage}"


def coverage(args: argparse.Namespace) -> int:
    """Count the edits of each bundled recipe on many models; 1 where a model cannot be captured."""
    from dropsurgery.analysis.coverage import coverage
    from dropsurgery.analysis.families import REPRESENTATIVES
    from dropsurgery.analysis.progress import followed
    from dropsurgery.models import model_names
    from dropsurgery.recipe import bundled

    names = model_names(args.globs or REPRESENTATIVES)
    rows = {row.model: row for row in followed("models", coverage(names, _jobs(args)), len(names))}
    ordered = [rows[name] for name in names]
    if args.json:
        print_json([asdict(row) for row in ordered])
    else:
        _print_coverage(ordered, bundled())
    return 1 if any(row.reason for row in ordered) else 0


def _print_coverage(rows: Sequence[Row], recipes: Sequence[str]) -> None:
    """The matrix; recipes are columns by number, for their names are long."""
    numbers = {recipe: str(number) for number, recipe in enumerate(recipes, 1)}
    cells = [(row.family, row.model, *map(row.edits.get, recipes)) for row in rows if row.edits]
    sections = (
        (("column", "recipe"), [(number, recipe) for recipe, number in numbers.items()]),
        (("family", "model", *numbers.values()), cells),
        (("refused", "why"), [(row.model, row.reason) for row in rows if row.reason]),
    )
    _print_sections(sections)
