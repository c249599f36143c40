"""What the arguments of the command line mean: their types, and the models, inputs and recipes they stand for."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from dropsurgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import nn

    from dropsurgery.recipe import Recipe


def count(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def shape(text: str) -> tuple[int, ...]:
    """The sizes of a tensor, such as 2,3,224,224."""
    return tuple(count(size.strip()) for size in text.split(","))


def size(text: str) -> tuple[int, int]:
    """Height and width, given as one number or as two."""
    sizes = [count(size) for size in text.split("x")]
    if len(sizes) > 2:
        raise argparse.ArgumentTypeError(f"expected N or HxW, got {text!r}")
    return sizes[0], sizes[-1]


def override(text: str) -> str:
    """A change of a value of a recipe, such as shortcut.with.p=0.2."""
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return text


def model_of(name: str) -> nn.Module:
    """The model of that name, on the meta device."""
    from dropsurgery.models import SMP, TORCHVISION, call_factory, make_model

    if ":" not in name or name.startswith((SMP, TORCHVISION)):
        return make_model(name)
    sys.path.insert(0, os.getcwd())  # the user's own module, as `python -m` finds it
    return call_factory(name)


def inputs_of(args: argparse.Namespace, model: nn.Module) -> Any:
    """An example input of the size that is asked for; what the model is known to take otherwise."""
    import torch

    from dropsurgery.capture.inputs import resolve_inputs
    from dropsurgery.models import example_inputs

    usual = example_inputs(args.model)
    if args.input is not None:
        like = next(model.parameters(), torch.empty(0))
        return torch.zeros((), dtype=like.dtype, device=like.device).expand(args.input)
    if args.image_size is None:
        return usual
    (images, *others), _ = resolve_inputs(model, usual)[0]
    if others or not isinstance(images, torch.Tensor):
        raise SurgeryError(f"--image-size: expected a model that takes one batch of images, {args.model} takes more")
    return images[..., :1, :1].expand(*images.shape[:-2], *args.image_size)


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that is asked for, with its overrides."""
    from dropsurgery.recipe import load_recipe

    return load_recipe(args.recipe, overrides=args.overrides)


def length_of(args: argparse.Namespace) -> dict[str, Any]:
    """The length of the training, as `apply_recipe` takes it."""
    return {"total_steps": args.total_steps, "steps_per_epoch": args.steps_per_epoch}


def counts_steps(recipe: Recipe) -> bool:
    """Whether a schedule names steps or epochs, which mean nothing in a training of unknown length."""
    schedules = [entry.schedule for entry in recipe.entries]
    return any(at.unit != "fraction" for schedule in schedules for at in (schedule.begin, schedule.end))
