"""Groups of numbers on one axis, and the rates of dropping that follow from them: no host reads them."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 20  # of Lloyd's iteration
MOST = 0.95  # no group is dropped more often, unless the mean itself is above


def k_means(values: Tensor, k: int, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Return the group of each of `values` (N), and the `k` centres: Lloyd's iteration on one axis.

    It begins at the quantiles (j + 1/2) / k and takes `steps` steps, however soon it stands still. A group without a
    value keeps its centre; of centres as near to a value, the first one counts. No numbers are drawn.
    """
    wide = _wide(values)
    ordered = wide.sort().values
    at = (torch.arange(k, device=wide.device) + 0.5) / k * (len(wide) - 1)
    low = at.floor()
    centres = torch.lerp(ordered[low.long()], ordered[at.ceil().long()], (at - low).to(wide.dtype))
    groups = torch.arange(k, device=wide.device)[:, None]
    for _ in range(steps):
        own = nearest(wide, centres) == groups
        sizes = own.sum(1)
        means = torch.where(own, wide, 0).sum(1) / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)
    return nearest(wide, centres), centres.to(values.dtype)


def nearest(values: Tensor, centres: Tensor) -> Tensor:
    """Return for each of `values` the index of the nearest of `centres`; of several as near, the first."""
    return (values[:, None] - centres).abs().argmin(1)


def offsets_of(labels: Tensor, centres: Tensor, spread: float) -> Tensor:
    """Return by how much the rate of each value differs from the mean rate, as the centre of its group says.

    It falls by `spread` from the lowest centre to the highest, and its mean over the values is 0; where all centres
    are one, it is 0.
    """
    low, high = centres.aminmax()
    width = high - low
    share = (centres - low) / width
    share = torch.where(width >= torch.finfo(width.dtype).tiny, share, 0.5)
    offsets = (spread * (0.5 - _wide(share)))[labels]
    return (offsets - offsets.mean()).to(centres.dtype)


def rates_of(offsets: Tensor, p: float | Tensor) -> Tensor:
    """Return p + s * offsets, all in [0, 0.95]: s is 1, or the largest number for which that holds (0 where none is).

    As the offsets have mean 0, the mean of the rates is p in any case, and whoever has the higher one keeps it.
    """
    low, high = offsets.aminmax()
    tiny = torch.finfo(offsets.dtype).tiny
    room = torch.minimum(p / (-low).clamp(min=tiny), (MOST - p) / high.clamp(min=tiny)).clamp(0, 1)
    return (p + room * offsets).clamp(0, 1)


def _wide(values: Tensor) -> Tensor:
    """In float64, in which the mean of equal float32 numbers is that number; Apple's devices have none."""
    return values if values.device.type == "mps" else values.double()
