"""Whole channels of each sample: which have the lowest values, and what to multiply a map's channels with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dropsurgery.regularizers._blocks import by_samples
from dropsurgery.regularizers._tracing import is_traced, is_transformed
from dropsurgery.regularizers.spectral_dropout import nth_smallest

ROUNDING = 1e-3  # a share of channels that is a whole number is one, though float32 says a little less


def channels_first(x: Tensor, axis: int) -> Tensor:
    """Return the values of `x` with its channels, at `axis`, at 1; no gradient flows through them."""
    values = x.detach()
    return values if axis == 1 else values.movedim(axis, 1)


def lowest(values: Tensor, count: Tensor) -> Tensor:
    """Return (B, C) whether a channel has one of the `count` lowest `values` (B, C) of its sample; of equals the first.

    Of a sample's values at most one is below 0, and none is -0. `count` is a 0-dim tensor, from 0 to C.
    """
    chosen = torch.zeros_like(values, dtype=torch.bool)
    channels = torch.arange(values.shape[1], device=values.device)
    if values.device.type != "cpu" or is_transformed():
        return chosen.scatter(1, values.argsort(dim=1, stable=True), (channels < count).expand_as(chosen))
    order = _ranked(values, channels)
    if is_traced(values):
        level: Tensor = nth_smallest(order, (count - 1).clamp(min=0))
        return (order <= level) & (count > 0)
    # A sort takes ten times as long there, and comparing all with the last one twice.
    return chosen.scatter_(1, order.topk(int(count), 1, largest=False, sorted=False).indices, True)


def _ranked(values: Tensor, channels: Tensor) -> Tensor:
    """Whole numbers in the order of values, of equal ones in the order of channels."""
    if values.itemsize > 4:
        return values.argsort(dim=1, stable=True).argsort(dim=1)
    # The bits of a number, as a whole one, have its order.
    return torch.add(channels, values.view(torch.int32), alpha=len(channels))


def measured(measure: Callable[..., Tensor], maps: Tensor, *others: Tensor) -> Tensor:
    """Return what `measure` says of `maps` (B, C, ...) and `others` (B, ...); it is given maps of float32 or float64.

    Lower precision is widened some samples at a time, so that no copy of all maps is made.
    """
    if maps.itemsize > 2:
        return measure(maps, *others)
    if is_traced(maps) or maps.numel() == 0:
        return measure(maps.float(), *others)
    return torch.cat([measure(part.float(), *rest) for part, *rest in by_samples(maps, *others)])


def times_channels(x: Tensor, factor: Tensor, axis: int) -> Tensor:
    """Return `x` times a factor (B, C) for each channel, at `axis`, of each sample."""
    shape = [length if i in (0, axis) else 1 for i, length in enumerate(x.shape)]
    return x * factor.to(x.dtype).view(shape)
