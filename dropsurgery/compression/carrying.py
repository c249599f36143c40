"""Carry slices out on a copy of the model: smaller parameters in the same modules, and sizes that fit them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dropsurgery.compression.picks import Slices


def carried_out(model: nn.Module, slices: Slices, *, exact: bool = False) -> nn.Module:
    """A copy of the model with the slices carried out; it shares nothing with the model, which stays as it is.

    With `exact` it is in float64, in which factors are multiplied in without rounding that would show.
    """
    made = _copied(model)
    made = made.double() if exact else made
    twins = dict(zip(model.modules(), made.modules(), strict=True))
    done: dict[int, Tensor] = {}
    for module, twin in twins.items():
        for fields, own in ((module._parameters, twin._parameters), (module._buffers, twin._buffers)):
            for name, tensor in fields.items():
                if tensor is not None and id(tensor) in slices.tensors:
                    if id(tensor) not in done:
                        done[id(tensor)] = _sliced(tensor, slices, exact)
                    own[name] = done[id(tensor)]  # type: ignore[assignment]
    for (module, name), size in slices.sizes.items():
        setattr(twins[module], name, size)
    return made


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy, without gradients."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        twin = parameter.detach().clone()
        memo[id(parameter)] = nn.Parameter(twin, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _sliced(tensor: Tensor, slices: Slices, exact: bool) -> Tensor:
    part = tensor.detach()
    part = part.double() if exact and part.is_floating_point() else part
    for axis, pick in slices.tensors[id(tensor)].items():
        part = pick.of(part, axis)
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        part = part.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


def set_attributes(model: nn.Module, changes: dict[tuple[str, str], int]) -> None:
    """Set sizes that forwards read, by the path of their module and their name."""
    for (path, name), size in changes.items():
        setattr(model.get_submodule(path), name, size)
