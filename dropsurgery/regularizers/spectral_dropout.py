"""Spectral dropout: drop coefficients of each map's cosine transform (Khan, Hayat, Porikli 2019, arXiv:1711.08591).

    x (B, C, H, W) → T⁻¹(z * M / (1 - p))      z = T(x), T the orthonormal DCT-II over rows and columns

The abstract says that weak and noisy coefficients of a fixed orthogonal transform of the activations are removed. THE
MASK RULE IS NOT VERIFIED: the paper's own could not be read, nor what it does at test time. Taken here: of each map's
coefficients, the share `p_weak` that is smallest in magnitude is removed, and each of the others is dropped with
probability p and divided by 1 - p if kept; in eval nothing is done. The rates, and that each map is transformed as it
lies (the paper compares several ways to reshape activations before), are the library's choice. With both rates at 0 the
map comes back as it was.

Placement: feature maps; the paper's places are not verified, and those of the recipe
spectral_dropout_resnet_g34 the library's choice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._blocks import by_samples
from dropsurgery.regularizers._maps import extent, require_images
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import full_precision, is_traced, is_transformed
from dropsurgery.regularizers._uniform import scale_of, uniform


def spectral_dropout(
    x: Tensor, p: float | Tensor, p_weak: float | Tensor, *, channel_axis: int = 1, key: Tensor | None = None
) -> Tensor:
    """Remove the share `p_weak` of each map's weakest DCT coefficients, and drop the others with probability `p`.

    `x` is (B, C, H, W), or (B, H, W, C) with `channel_axis` -1. `key`, a 0-dim int64 CPU tensor, is what the random
    numbers depend on; None for torch's global generator. A SurgeryError if `x` is not of rank 4, or a rate a number
    out of [0, 1].
    """
    require(x.dim() == 4, "input of spectral_dropout", "4 dimensions (B, C, H, W) or (B, H, W, C)", tuple(x.shape))
    drop, weak = (rate_tensor(rate, x.device) for rate in (p, p_weak))
    maps = x.movedim(channel_axis, 1).to(torch.promote_types(x.dtype, torch.float32))
    left = uniform(maps.shape, x.device, key) >= drop
    scale = scale_of(drop).to(maps.dtype)
    if is_transformed():  # where no other layout than the usual one can be asked for
        return _thinned(maps, left, weak, scale)[0].to(x.dtype).movedim(1, channel_axis)
    y: Tensor = _Thinned.apply(maps, left, weak, scale)
    return _like(y.to(x.dtype).movedim(1, channel_axis), x)


class SpectralDropout(Regularizer):
    """`spectral_dropout` as a layer; identity in eval."""

    paper = "Khan, Hayat, Porikli: Regularization of Deep Neural Networks with Spectral Dropout, arXiv:1711.08591"
    summary = "drops coefficients of each map's cosine transform"
    placement = "feature maps (recipe spectral_dropout_resnet_g34); the paper's own placement is not verified"
    shapes = "(B, C, H, W), (B, H, W, C)"
    examples = (
        {"p": 0.2, "p_weak": 0.5},
        {"p": 0.3, "p_weak": 0.0},
    )
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden", dependence="sample")
    drops = "other"
    uncounted = "coefficients are dropped, and each of them is spread over its map"

    p: Tensor
    p_weak: Tensor

    def __init__(self, p: Rate = 0.2, p_weak: Rate = 0.5) -> None:
        super().__init__(p=p, p_weak=p_weak)

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError unless the tensor is a batch of maps whose channel axis is known."""
        require_images("spectral_dropout", site_id, shape, channel_axis)
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with coefficients dropped; `x` itself when not active."""
        if not self.active:
            return x
        return spectral_dropout(x, self.p, self.p_weak, channel_axis=self.channel_axis, key=self.next_key())

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return the expected share of coefficients that are dropped from maps of `shape`."""
        cells = math.prod(extent(shape, self.channel_axis))
        weak = math.floor(self._rates["p_weak"] * cells + _ROUNDING) / cells
        return weak + (1 - weak) * self._rates["p"]


_ROUNDING = 1e-3  # a share of cells that is a whole number is one, though float32 says a little less


def _cosines(size: int, like: Tensor) -> Tensor:
    """The orthonormal DCT-II of `size` points as a matrix."""
    points = torch.arange(size, device=like.device)
    turns = (2 * points + 1) * points[:, None] % (4 * size)  # whole turns taken off, or float32 loses the angle
    waves = (turns.to(like.dtype) * (math.pi / (2 * size))).cos()
    constant = (points == 0).to(like.dtype)[:, None]  # the first row, which is shorter
    return waves * (math.sqrt(2 / size) * (1 - (1 - math.sqrt(0.5)) * constant))


class _Thinned(torch.autograd.Function):
    """Maps (B, C, H, W) without those coefficients that are not `left` or among the weak; the others are scaled.

    Once it is known which those are, this is a linear map that is its own adjoint. A byte a coefficient is kept.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, left: Tensor, weak: Tensor | None, scale: Tensor) -> Tensor:
        y, kept = _thinned(maps, left, weak, scale)
        ctx.save_for_backward(kept, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, scale = ctx.saved_tensors
        return _Thinned.apply(grad, kept, None, scale), None, None, None


def _thinned(maps: Tensor, left: Tensor, weak: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The maps without some coefficients, and which are kept."""
    down, right = (_cosines(size, maps) for size in maps.shape[2:])

    def thin(maps: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(maps.device.type):
            spectrum = torch.einsum("ih,bchw,jw->bcij", down, maps.contiguous(), right)
            kept = kept if weak is None else kept & _strong(spectrum.detach(), weak)
            return torch.einsum("ih,bcij,jw->bchw", down, spectrum * kept * scale, right), kept

    if is_traced(maps) or maps.numel() == 0:
        return thin(maps, left)
    y, kept = torch.empty_like(maps, memory_format=torch.contiguous_format), torch.empty_like(left)
    for y_part, kept_part, *given in by_samples(y, kept, maps, left):  # of which it takes six copies
        for part, made in zip((y_part, kept_part), thin(*given), strict=True):
            part.copy_(made)
    return y, kept


def _strong(spectrum: Tensor, share: Tensor) -> Tensor:
    """Which coefficients are left when the weakest `share` of each map is removed; of equals, all are left."""
    size = spectrum.flatten(2).abs()
    cells = size.shape[2]
    removed = (share * cells + _ROUNDING).floor().long()
    index = removed.clamp(max=cells - 1)
    if size.device.type == "cpu" and not is_transformed():
        least: Tensor = nth_smallest(size, index)
    else:
        least = size.sort(dim=2).values.gather(2, index.expand(*size.shape[:2], 1))
    return ((size >= least) & (removed < cells)).view(spectrum.shape)


# Takes a third of the time of a sort, but a number that is read on the host.
@torch.library.custom_op("dropsurgery::nth_smallest", mutates_args=())
def nth_smallest(values: Tensor, n: Tensor) -> Tensor:
    """The `n`-th smallest (from 0) along the last dimension, which stays with length 1."""
    return values.kthvalue(int(n) + 1, dim=-1, keepdim=True).values


@nth_smallest.register_fake
def _(values: Tensor, n: Tensor) -> Tensor:
    return values.new_empty((*values.shape[:-1], 1))


def _like(y: Tensor, x: Tensor) -> Tensor:
    """`y` in the memory layout of `x`."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return y.contiguous(memory_format=torch.channels_last)
    return y.contiguous()
