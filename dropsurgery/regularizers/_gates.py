"""The scores of experts and the machines that these are on; where a gate's regularizers take their facts from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Regularizer

SCORES = "scores of experts (..., E)"


def machine_of(shape: tuple[int, ...], machines: int, along: int | None, device: torch.device) -> Tensor:
    """Return the machine of each element of a `shape`, which lie on `machines` in parts of equal size.

    The parts are in a row in the flattened shape, or along the axis `along`; then the other axes are of length 1.
    """
    if along is not None:
        places = [length if i == along % len(shape) else 1 for i, length in enumerate(shape)]
    else:
        places = list(shape)
    count = math.prod(places)
    return (torch.arange(count, device=device) * machines // max(count, 1)).view(places)


def away(scores: Tensor, machine: Tensor | int, machines: int, axis: int = -1) -> Tensor:
    """Return which of the `scores` are of experts that are on another machine than their token.

    `machine` is the one of each token, with an axis of length 1 for the experts, or one for all. Of E experts the
    first E / machines are on the first machine, and so on.
    """
    experts = scores.shape[axis]
    owner = torch.arange(experts, device=scores.device) // (experts // machines)
    places = [1] * scores.dim()
    places[axis] = experts
    return owner.view(places) != machine


def require_experts(layer: Regularizer, name: str, channels: int | None, channel_axis: int | None) -> None:
    """A SurgeryError unless it is known which axis the experts' scores are on, and there are two or more."""
    gate = layer.gate
    axis, experts = (channel_axis, channels) if gate is None else (gate.axis, gate.experts)
    if axis is None or experts is None or experts < 2 or (gate is None and axis != -1):
        raise SurgeryError(
            f"{name} at {layer.site_id}: expected {SCORES} of a mixture of two or more experts (pattern moe_gate, edge "
            f"logits), got {experts} on axis {axis}; leave this site out (`where: {{exclude: …}}`)"
        )
    layer.channel_axis = axis
