"""What a seed probability covers, in closed form: the expected drop share, and the probability that gives it.

On an axis of F cells with blocks of k, cell i is covered by a_i = min(i, F-k) - max(0, i-k+1) + 1 positions
of the seed; on a map by n_ij = a_i * b_j, so that it is dropped with probability 1 - (1 - gamma)^n_ij.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_SECTIONS = 256  # of the interval at each of 7 rounds: 56 bits


def expected_share(gamma: float, size: Sequence[int], block: Sequence[int]) -> float:
    """Return the mean over the map of P(dropped), for `size` = (H, W) and a `block` that fits into it."""
    return float(_share(torch.tensor([gamma], dtype=torch.float64, device="cpu"), size, block))


def paper_factor(size: Sequence[int], block: Sequence[int]) -> float:
    """Return gamma / p by the paper's equation 1: area of the map / of a block / of the region of seeds."""
    (height, width), (kh, kw) = size, block
    return height * width / (kh * kw) / ((height - kh + 1) * (width - kw + 1))


def seed_probability(p: float, size: Sequence[int], block: Sequence[int], exact: bool) -> float:
    """Return gamma for the rate `p`: the paper's, or the `exact` one, at which the expected share is `p`."""
    if not exact:
        return p * paper_factor(size, block)
    return _exact_once(p, tuple(size), tuple(block))


def exact_probability(p: Tensor, size: Sequence[int], block: Sequence[int]) -> Tensor:
    """Return the float64 gamma at which the expected share is `p` (0-dim), on its device, without a sync."""
    goal = p.double()
    grid = torch.arange(_SECTIONS, dtype=torch.float64, device=p.device) / _SECTIONS
    low = torch.zeros_like(goal)
    for step in range(7):
        width = float(_SECTIONS) ** -step
        index = (_share(low + width * grid, size, block) <= goal).sum().clamp(min=1) - 1
        low = low + width * index / _SECTIONS
    return low


@lru_cache(maxsize=4096)
def _exact_once(p: float, size: tuple[int, int], block: tuple[int, int]) -> float:
    return float(exact_probability(torch.tensor(p, dtype=torch.float64, device="cpu"), size, block))


def _share(gammas: Tensor, size: Sequence[int], block: Sequence[int]) -> Tensor:
    """Expected share at each of `gammas` (float64)."""
    (rows, high), (columns, wide) = (_covers(*axis, gammas) for axis in zip(size, block, strict=True))
    spared = (1 - gammas)[:, None] ** torch.outer(rows, columns).flatten()
    return 1 - spared @ torch.outer(high, wide).flatten() / (size[0] * size[1])


def _covers(length: int, k: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The values that a_i takes, 1 to m, and how many cells each: a_i rises by 1 from each end up to m."""
    most = min(k, length - k + 1)
    values = torch.arange(1, most + 1, dtype=like.dtype, device=like.device)
    return values, torch.where(values == most, length - 2 * most + 2.0, 2.0).to(like.dtype)
