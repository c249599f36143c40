"""What a seed probability covers, in closed form: the expected drop share, and the probability that gives it.

On an axis of F cells with blocks of k, cell i is covered by a_i = min(i, F-k) - max(0, i-k+1) + 1 positions
of the seed; on a map by n_ij = a_i * b_j, so that it is dropped with probability 1 - (1 - gamma)^n_ij.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_SECTIONS = 256  # of the interval at each of 7 rounds: 56 bits


def expected_share(gamma: float, size: Sequence[int], block: Sequence[int]) -> float:
    """Return the mean over the map of P(dropped), for `size` = (H, W) and a `block` that fits into it."""
    return float(_share(torch.tensor([gamma], dtype=torch.float64), size, block))


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
    return float(exact_probability(torch.tensor(p, dtype=torch.float64), size, block))


def _share(gammas: Tensor, size: Sequence[int], block: Sequence[int]) -> Tensor:
    """Expected share at each of `gammas` (float64)."""
    rows, columns = (_covers(length, k) for length, k in zip(size, block, strict=True))
    counts = Counter(a * b for a in rows for b in columns)
    kept = sum((1 - gammas) ** n * (times / (size[0] * size[1])) for n, times in counts.items())
    return 1 - torch.as_tensor(kept)


def _covers(length: int, k: int) -> list[int]:
    return [min(i, length - k) - max(0, i - k + 1) + 1 for i in range(length)]
