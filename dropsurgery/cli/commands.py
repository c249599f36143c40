"""The commands that look at recipes, at the catalogue, and at what a recipe does to one model."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from dropsurgery.cli.arguments import counts_steps, inputs_of, length_of, model_of, recipe_of
from dropsurgery.cli.printing import first_line, pairs, print_json, print_table, say, write
from dropsurgery.errors import RecipeError

if TYPE_CHECKING:
    from dropsurgery.recipe import Recipe

_LENGTH = 1000  # steps, for a schedule that is shown over the whole of a training of unknown length


def recipes(args: argparse.Namespace) -> int:
    """List the bundled recipes."""
    from dropsurgery.recipe import bundled, load_recipe

    loaded = {name: load_recipe(name) for name in bundled()}
    if args.json:
        return print_json([_recipe_facts(name, recipe) for name, recipe in loaded.items()])
    rows = [(name, pairs(recipe.tested_on), recipe.summary) for name, recipe in loaded.items()]
    return print_table(("recipe", "tested on (edits)", "summary"), rows)


def _recipe_facts(name: str, recipe: Recipe) -> dict[str, Any]:
    return {
        "name": name,
        "summary": recipe.summary,
        "reference": recipe.reference,
        "tested_on": recipe.tested_on,
        "entries": [entry.name for entry in recipe.entries],
    }


def patterns(args: argparse.Namespace) -> int:
    """List the patterns and their edges."""
    from dropsurgery import catalogue

    facts = []
    for name in catalogue.names("patterns"):
        pattern = catalogue.load("patterns", name)
        home = sys.modules.get(f"dropsurgery.patterns.{name}")
        facts.append({"name": name, "edges": list(pattern.edges), "summary": first_line(home)})
    if args.json:
        return print_json(facts)
    rows = [(fact["name"], ", ".join(fact["edges"]), fact["summary"]) for fact in facts]
    return print_table(("pattern", "edges (the default first)", "what it finds"), rows)


def regularizers(args: argparse.Namespace) -> int:
    """List the regularizers that have the labels asked for: their arguments, or their labels in the taxonomy."""
    from dropsurgery import catalogue
    from dropsurgery.regularizers._taxonomy import conditions, markdown, meets

    wanted = conditions(args.where) if args.where is not None else []
    loaded = {name: catalogue.load("regularizers", name) for name in catalogue.names("regularizers")}
    labelled = {name: getattr(cls, "taxonomy", None) for name, cls in loaded.items()}
    chosen = [name for name, taxonomy in labelled.items() if meets(taxonomy, wanted)]
    if args.json:
        return print_json([_regularizer_facts(name, loaded[name]) for name in chosen])
    if args.markdown:
        return write(markdown([(name, labelled[name]) for name in chosen]))
    if args.taxonomy:
        return _print_labels({name: labelled[name] for name in chosen})
    columns = ("name", "kind", "summary", "arguments", "shapes", "needs", "paper")
    facts = [_regularizer_facts(name, loaded[name]) for name in chosen]
    rows = [[pairs(fact[key]) if key == "arguments" else fact[key] for key in columns] for fact in facts]
    heads = ("regularizer", "kind", "what it does", "arguments (defaults)", "accepts", "needs", "paper")
    return print_table(heads, rows)


def _regularizer_facts(name: str, cls: Any) -> dict[str, Any]:
    from dropsurgery import catalogue

    known = catalogue.arguments(cls)
    defaults = {key: None if argument.required else argument.default for key, argument in known.items()}
    told = {key: getattr(cls, key) for key in ("kind", "summary", "paper", "shapes", "needs", "placement")}
    taxonomy = getattr(cls, "taxonomy", None)
    labels = None if taxonomy is None else taxonomy.labels()
    return {"name": name, **told, "arguments": defaults, "taxonomy": labels}


def _print_labels(labelled: dict[str, Any]) -> int:
    from dropsurgery.regularizers._taxonomy import LABELS

    told = {name: {} if taxonomy is None else taxonomy.told() for name, taxonomy in labelled.items()}
    return print_table(("regularizer", *LABELS), [(name, *map(each.get, LABELS)) for name, each in told.items()])


def schema(args: argparse.Namespace) -> int:
    """Print the JSON Schema of recipes."""
    from dropsurgery.recipe import recipe_schema

    return print_json(recipe_schema())


def check(args: argparse.Namespace) -> int:
    """Check recipes: all problems, each with its place."""
    from dropsurgery.recipe import load_recipe

    facts = []
    for name in args.recipes:
        try:
            load_recipe(name)
        except RecipeError as error:
            say(str(error))
            facts.append({"recipe": name, "ok": False, "problems": error.problems})
        else:
            facts.append({"recipe": name, "ok": True, "problems": ()})
    if args.json:
        print_json(facts)
    else:
        write("".join(f"ok {fact['recipe']}\n" for fact in facts if fact["ok"]))
    return 0 if all(fact["ok"] for fact in facts) else 1


def sites(args: argparse.Namespace) -> int:
    """List the places in a model where a regularizer can go."""
    from dropsurgery import find_sites
    from dropsurgery.diffing import site_facts

    model = model_of(args.model)
    found = find_sites(model, args.pattern, example_inputs=inputs_of(args, model))
    if args.json:
        return print_json([site_facts(site) for site in found])
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
    return print_table(("site", "stage", "reduction", "block", "path", "role", "shape"), rows)


def plan(args: argparse.Namespace) -> int:
    """Show what a recipe would do to a model."""
    from dropsurgery import plan_recipe
    from dropsurgery.diffing import plan_facts

    recipe = recipe_of(args)
    model = model_of(args.model)
    plan = plan_recipe(model, recipe, example_inputs=inputs_of(args, model), **length_of(args))
    return print_json(plan_facts(plan)) if args.json else write(f"{plan}\n")


def diff(args: argparse.Namespace) -> int:
    """Show a model's graphs before and after a recipe."""
    from dropsurgery import apply_recipe, diff

    recipe, length = recipe_of(args), length_of(args)
    if length["total_steps"] is None and not counts_steps(recipe):
        length["total_steps"] = _LENGTH
        say(f"note: without --total-steps, the schedules are shown over a training of {_LENGTH} steps")
    model = model_of(args.model)
    gm = apply_recipe(model, recipe, example_inputs=inputs_of(args, model), **length)
    return write(diff(gm, format="json" if args.json else "html" if args.html else "text") + "\n")
