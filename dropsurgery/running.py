"""An emitted model is run aside: on which arguments, in which mode, and with nothing of it left behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from dropsurgery.capture.inputs import resolve_inputs
from dropsurgery.capture.levels import map_tree
from dropsurgery.emission import example_of
from dropsurgery.errors import SurgeryError


def arguments(batch: Any, model: nn.Module) -> Any:
    """The arguments of one call: those of a batch, or noise of the example's shape."""
    if batch is None:
        args, kwargs = example_of(model)
        return map_tree((args, kwargs), _noise)
    (inputs,) = resolve_inputs(model, batch)
    return inputs


def _noise(item: Any) -> Any:
    if not isinstance(item, torch.Tensor):
        return item
    make = torch.randn if item.is_floating_point() else torch.zeros
    return make(item.shape, dtype=item.dtype, device=item.device)


def arguments_of(inputs: Any, model: nn.Module) -> Any:
    """The arguments of one call of a validation; a SurgeryError where there are none."""
    if inputs is None:
        raise SurgeryError("validation: expected inputs for the model, got None")
    (arguments,) = resolve_inputs(model, inputs)
    return arguments


def device_of(model: nn.Module, otherwise: torch.device) -> torch.device:
    """Where the model's first parameter is, unless that is nowhere."""
    device = next((parameter.device for parameter in model.parameters()), otherwise)
    return otherwise if device.type == "meta" else device


def moved(arguments: Any, model: nn.Module) -> Any:
    """The arguments, with their tensors where the model is."""

    def move(item: Any) -> Any:
        return item.to(device_of(model, item.device)) if isinstance(item, torch.Tensor) else item

    return map_tree(arguments, move)


@contextmanager
def resting(model: nn.Module, regularizers: list[nn.Module]) -> Iterator[None]:
    """The model is in eval mode, within; after it, each module is in the mode that it was in."""
    modes = {module: module.training for module in (*model.modules(), *regularizers)}  # some are no children
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def apart(devices: list[torch.device]) -> Iterator[None]:
    """Without gradients, the random state and what was compiled being left as they are; results live on after it."""
    # Dynamo is not to be imported for it: what is not there has compiled nothing.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices), eager:
        yield


def cuda_devices(model: nn.Module) -> list[torch.device]:
    """The CUDA devices that a model is on."""
    return list({tensor.device for tensor in model.parameters() if tensor.is_cuda})
