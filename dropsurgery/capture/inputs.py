"""Example inputs: what the user gives, put into one form, or what a timm or SMP model says of itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dropsurgery.capture.levels import Inputs
from dropsurgery.errors import CaptureError

# Two samples, so that a batch of one is not mistaken for a broadcast.
_BATCH = 2
_SMP_SIZE = (224, 224)


def resolve_inputs(model: nn.Module, example_inputs: Any) -> tuple[Inputs, ...]:
    """The arguments to call a model with; several to be tried in turn where they are inferred.

    Args:
        model: the model, asked only where nothing is given.
        example_inputs: a tensor, a tuple or list of positional arguments, a dict of keyword arguments, or None.

    Raises:
        CaptureError: nothing was given, and the model is neither timm's nor SMP's.
    """
    if example_inputs is None:
        return tuple(((tensor,), {}) for tensor in _inferred(model))
    if isinstance(example_inputs, torch.Tensor):
        return (((example_inputs,), {}),)
    if isinstance(example_inputs, (tuple, list)):
        return ((tuple(example_inputs), {}),)
    if isinstance(example_inputs, dict):
        return (((), dict(example_inputs)),)
    raise CaptureError(
        f"example_inputs: expected a tensor, a tuple of arguments or a dict of keyword arguments, "
        f"got {type(example_inputs).__name__}"
    )


def _inferred(model: nn.Module) -> list[torch.Tensor]:
    size = _timm_size(model)
    sizes = [size] if size else _smp_sizes(model)
    if not sizes:
        raise CaptureError(
            f"{type(model).__name__} does not say what it takes: give example_inputs, for instance "
            "example_inputs=torch.empty(2, 3, 224, 224) (only shapes, dtypes and devices count)"
        )
    said, first = sizes[0][0], _first_channels(model)
    # A model made with `in_chans` keeps its old config; one that rearranges pixels first has another first layer.
    likely = _named_channels(model) or (said if size else first)
    counts = dict.fromkeys((likely or said, said, first or said))
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    # Expanded from one number: it has the shape without the memory.
    number = torch.zeros((), dtype=weight.dtype, device=weight.device)
    return [number.expand(_BATCH, channels, *area) for _, *area in sizes for channels in counts]


def _timm_size(model: nn.Module) -> tuple[int, ...] | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(config, dict) or len(config.get("input_size") or ()) != 3:
        return None
    channels, height, width = config["input_size"]
    area = getattr(getattr(model, "patch_embed", None), "img_size", None) or (height, width)
    return (channels, *area)


def _smp_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """The usual size, and the one that its encoder says of itself: some take no other."""
    if not type(model).__module__.startswith("segmentation_models_pytorch."):
        return []
    said = (size for module in model.modules() if (size := _timm_size(module)) is not None)
    return list(dict.fromkeys(((3, *_SMP_SIZE), *said)))


def _named_channels(model: nn.Module) -> int | None:
    """The channels that the layer takes which timm's config names as the first one."""
    config = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("first_conv") if isinstance(config, dict) else None
    name = names[0] if isinstance(names, (tuple, list)) and names else names
    module = dict(model.named_modules()).get(name) if isinstance(name, str) else None
    channels = getattr(module, "in_channels", None)
    return channels if isinstance(channels, int) else None


def _first_channels(model: nn.Module) -> int | None:
    """The channels that the first 2-d convolution takes."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels if first is not None else None
