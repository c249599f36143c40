"""Uniform random numbers from torch's global generator or, for a seeded model, from a key."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(shape: Sequence[int], device: torch.device, key: Tensor | None) -> Tensor:
    """Return float32 numbers in [0, 1) of `shape`; the same for the same `key` (0-dim int64 on the CPU)."""
    # Float32 whatever the input is: in bfloat16, P(u < 0.0008) is three times what it should be.
    if key is None:
        return torch.rand(shape, device=device, dtype=torch.float32)
    numbers: Tensor = keyed_uniform(shape, device, key)
    return numbers


# The key is read on the host, which a captured CUDA graph would do only once.
@torch.library.custom_op(
    "dropsurgery::keyed_uniform",
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
def keyed_uniform(shape: Sequence[int], device: torch.device, key: Tensor) -> Tensor:
    """Return float32 numbers in [0, 1) from a generator of their own, seeded with `key`."""
    generator = torch.Generator(device).manual_seed(int(key))
    return torch.rand(shape, device=device, generator=generator, dtype=torch.float32)


@keyed_uniform.register_fake
def _(shape: Sequence[int], device: torch.device, key: Tensor) -> Tensor:
    return torch.empty(shape, device=device, dtype=torch.float32)


def scale_of(p: Tensor) -> Tensor:
    """Return 1 / (1 - p); at p = 1, where nothing is kept, it only has to be finite."""
    return 1 / (1 - p).clamp(min=torch.finfo(p.dtype).tiny)


def keep_scale(shape: Sequence[int], p: Tensor, like: Tensor, key: Tensor | None, *, rescale: bool = True) -> Tensor:
    """Return a factor of `shape`, in the dtype of `like`: 0 with probability `p`, else 1 / (1 - p) or 1."""
    kept = uniform(shape, like.device, key) >= p
    scale = (1 - p).reciprocal() if rescale else 1.0  # infinite at p = 1, where nothing is kept
    return torch.where(kept, scale, 0.0).to(like.dtype)
