"""The command that cuts a trained model down to a width and writes it to a file."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dropsurgery.cli.arguments import counts_steps, inputs_of, length_of, recipe_of
from dropsurgery.cli.printing import print_json, print_table, say
from dropsurgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import nn

_LENGTH = 1  # steps: no schedule is followed here


def width(text: str) -> tuple[str, int | float]:
    """A width for all sites, or SITE=WIDTH: a whole number of units, or a share of them such as 0.5."""
    site, _, number = text.rpartition("=")
    try:
        return site or "*", int(number) if number.isdecimal() else float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, or SITE=NUMBER, got {text!r}") from None


def compress(args: argparse.Namespace) -> int:
    """Cut a model down to a width."""
    from dropsurgery import apply_recipe
    from dropsurgery import compress as cut
    from dropsurgery.compression.checking import numbers
    from dropsurgery.compression.exporting import export
    from dropsurgery.emission import example_of

    _check_output(args.output)
    recipe, length = recipe_of(args), length_of(args)
    if length["total_steps"] is None and not counts_steps(recipe):
        length["total_steps"] = _LENGTH
    model = _model(args).eval()
    _load(args, model)
    gm = apply_recipe(model, recipe, example_inputs=inputs_of(args, model), **length)
    narrow = cut(gm, dict(args.width))
    if args.output is not None:
        export(narrow, args.output, numbers(example_of(gm), narrow))
    facts = {
        "model": args.model,
        "recipe": recipe.name,
        "widths": dict(args.width),
        "parameters": sum(p.numel() for p in model.parameters()),
        "compressed": sum(p.numel() for p in narrow.parameters()),
        "output": None if args.output is None else str(args.output),
    }
    if args.json:
        return print_json(facts)
    share = facts["compressed"] / max(1, facts["parameters"])
    row = (args.model, facts["parameters"], facts["compressed"], f"{share:.1%}", facts["output"])
    return print_table(("model", "parameters", "compressed", "share", "written to"), [row])


def _check_output(path: Path | None) -> None:
    """Refuse a file that could not be written, before anything is computed."""
    from dropsurgery.compression.exporting import require_ending

    if path is None:
        return
    require_ending(path)
    if not path.parent.is_dir():
        raise SurgeryError(f"--output: there is no folder {path.parent}")


def _model(args: argparse.Namespace) -> nn.Module:
    """The model with weights: those of its factory, or random ones until a file is loaded."""
    from dropsurgery.models import SMP, TORCHVISION, call_factory, make_model

    name: str = args.model
    if ":" in name and not name.startswith((SMP, TORCHVISION)):
        sys.path.insert(0, os.getcwd())  # the user's own module, as `python -m` finds it
        return call_factory(name)
    if args.weights is None:
        say("note: without --weights, the weights are random")
    return make_model(name, device="cpu")


def _load(args: argparse.Namespace, model: nn.Module) -> None:
    """Load a state_dict, the model's own or that of the model after surgery, also where a checkpoint holds it."""
    import torch

    if args.weights is None:
        return
    try:
        state = torch.load(args.weights, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
        model.load_state_dict(state)
    except Exception as error:
        told = str(error).splitlines()
        more = f" … and {len(told) - 3} more" if len(told) > 3 else ""
        raise SurgeryError(
            f"--weights: expected a state_dict of {args.model} in {args.weights}: {type(error).__name__}: "
            f"{' '.join(line.strip() for line in told[:3])}{more}"
        ) from None
