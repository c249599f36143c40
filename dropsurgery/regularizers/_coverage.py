"""What a seed probability covers, in closed form: the expected drop share, and the probability that gives it.

On an axis of F cells with blocks of k, cell i is covered by a_i = min(i, F-k) - max(0, i-k+1) + 1 positions
of the seed; on a map by their product over the axes, n_ij = a_i * b_j, so that it is dropped with probability
1 - (1 - gamma)^n_ij. A `size` is (L,), (H, W) or (D, H, W), and a `block` has as many lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def expected_share(gamma: float, size: Sequence[int], block: Sequence[int]) -> float:
    """Return the mean over the map of P(dropped), for a `block` that fits into it."""
    return float(_share(torch.tensor([gamma], dtype=torch.float64, device="cpu"), size, block))


def paper_factor(size: Sequence[int], block: Sequence[int]) -> float:
    """Return gamma / p by the paper's equation 1: area of the map / of a block / of the region of seeds."""
    regions = [length - k + 1 for length, k in zip(size, block, strict=True)]
    return math.prod(size) / math.prod(block) / math.prod(regions)


def seed_probability(p: float, size: Sequence[int], block: Sequence[int], exact: bool) -> float:
    """Return gamma for the rate `p`: the paper's, or the `exact` one, at which the expected share is `p`."""
    if not exact:
        return p * paper_factor(size, block)
    return _exact_once(p, tuple(size), tuple(block))


def exact_probability(p: Tensor, size: Sequence[int], block: Sequence[int]) -> Tensor:
    """Return the float64 gamma at which the expected share is `p` (0-dim), on its device, without a sync."""
    goal = p.double()
    bits = 8 if len(size) < 3 else 4  # a round; with three axes each section is much to add up
    sections = 2**bits
    grid = torch.arange(sections, dtype=torch.float64, device=p.device) / sections
    low = torch.zeros_like(goal)
    for step in range(56 // bits):
        width = float(sections) ** -step
        index = (_share(low + width * grid, size, block) <= goal).sum().clamp(min=1) - 1
        low = low + width * index / sections
    return low


@lru_cache(maxsize=4096)
def _exact_once(p: float, size: tuple[int, ...], block: tuple[int, ...]) -> float:
    return float(exact_probability(torch.tensor(p, dtype=torch.float64, device="cpu"), size, block))


def _share(gammas: Tensor, size: Sequence[int], block: Sequence[int]) -> Tensor:
    """Expected share at each of `gammas` (float64)."""
    (covered, cells), *others = (_covers(*axis, gammas) for axis in zip(size, block, strict=True))
    for values, many in others:
        covered, cells = torch.outer(covered, values).flatten(), torch.outer(cells, many).flatten()
    spared = (1 - gammas)[:, None] ** covered
    return 1 - spared @ cells / math.prod(size)


def _covers(length: int, k: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The values that a_i takes, 1 to m, and how many cells each: a_i rises by 1 from each end up to m."""
    most = min(k, length - k + 1)
    values = torch.arange(1, most + 1, dtype=like.dtype, device=like.device)
    return values, torch.where(values == most, length - 2 * most + 2.0, 2.0).to(like.dtype)
