"""CorrDrop by blocks, SCD: drop blocks of a grid on the map, less correlated ones more often (Zeng et al. 2020, 2021).

    x (B, C, H, W) → x * S * numel(S) / sum(S)      S (B, 1, H, W) in {0, 1}, by equations (1) to (12)
    p' = p / k^2 * H W / (H' W')                    H' = ceil(H / k), W' = ceil(W / k): the blocks of the grid

The units of a sample are the k x k blocks of a grid, each a row of the C means of its cells; a block is dropped in all
channels at once. `_correlation.py` has the equations. The published rule hardly chooses: with the default
`gamma: softmax`, at 64 blocks and more, the most and the least correlated one differ by less than 4 % in their
probability to be dropped, and the 9 blocks at the recipe's sites in a ResNet-18 of random weights were seen to differ
by at most 3.5 %, so that this is in effect a dropout of random blocks. `gamma: minmax` is the deviation that chooses.

The rate is the authors' drop_prob, 0.2, or 0.03 beside cutout, and their block_size 5. By equation (10) p itself is
dropped only where k divides H and W; else it is p', which is less: 0.128 at p = 0.2, k = 5, 16x16, and 0.098 at 7x7.

The grid begins at the top left and is cut off where the map ends, so that the last blocks may be smaller, as the paper
says it; the authors' code is for square maps alone, and for some sizes pads and cuts so that the mask lies a pixel
aside of the blocks it was drawn for. That code also shrinks a block that is larger than the map to H - 1; here it is
refused when built, and later, on smaller images, covers an axis. A block that is alone on its map is never dropped.

Placement: in stages 3 and 4 of a ResNet, behind the last norm of a residual branch and before the sum, with blocks of 5
and of 3, the rate growing from 0 over the first 200 steps: recipe corrdrop_spatial_resnet_g34. The ramp is over steps
as the authors' code has it; it is as long as their training has epochs, and may have been meant for those.
"""

from __future__ import annotations

import math
from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, check_count, rate_tensor, require
from dropsurgery.regularizers._correlation import (
    MAX_UNITS,
    CorrDrop,
    Gamma,
    Rescale,
    Scope,
    check_options,
    grid,
    kept_units,
    rescaled,
    scores,
)
from dropsurgery.regularizers._maps import extent, require_images
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import uniform


def corrdrop_spatial(
    x: Tensor,
    p: float | Tensor,
    block_size: int = 5,
    *,
    gamma: Gamma = "softmax",
    rescale: Rescale = "batch",
    scope: Scope = "batch",
    nonnegative: bool = False,
    channel_axis: int = 1,
    drawn: Tensor | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Drop blocks of a grid on each sample of `x` with probability p', the less correlated ones rather than the others.

    Args:
        x: (B, C, H, W), or (B, H, W, C) with `channel_axis` -1.
        p: share to drop where blocks divide the map, in [0, 1]; p' by equation (10) elsewhere. As a 0-dim tensor it
            may move without a new compilation.
        block_size: cells along an axis of a block.
        gamma: "softmax" (the paper's) or "minmax" (a deviation), by which blocks are protected.
        rescale: what is kept is scaled by what was dropped in the "batch", in each "sample", or not ("none").
        scope: where the protected blocks make up for themselves, so that p' is dropped in all.
        nonnegative: the promise that no element of `x` is below 0, which saves multiplying all pairs of blocks.
        drawn: uniform numbers (2, B, H' W'), the first for M, the second for B; None to draw them.
        key: what the random numbers depend on, a 0-dim int64 CPU tensor; None for torch's global generator.

    Raises:
        SurgeryError: `x` is not of rank 4, or an argument is out of range.
    """
    require(x.dim() == 4, "input of corrdrop_spatial", "4 dimensions (B, C, H, W) or (B, H, W, C)", tuple(x.shape))
    check_count("block_size", block_size, 1)
    check_options(gamma, rescale, scope)
    size = extent(x.shape, channel_axis)
    rate = rate_tensor(p, x.device) * _share(size, block_size)
    found = scores(x, channel_axis, block_size, nonnegative)
    drawn = uniform((2, *found.shape), x.device, key) if drawn is None else drawn
    kept = kept_units(found, rate, drawn, gamma, scope)
    factor = rescaled(_spread(kept, size, block_size), rescale)
    return x * factor.to(x.dtype).unsqueeze(channel_axis)


class CorrDropSpatial(CorrDrop):
    """`corrdrop_spatial` as a layer; identity in eval."""

    summary = "drops blocks of a grid on the map, the less correlated ones a little more often"
    placement = "behind the last norm of a residual branch, stages 3 and 4: corrdrop_spatial_resnet_g34"
    shapes = "(B, C, H, W), (B, H, W, C)"
    examples = (
        {"p": 0.2, "block_size": 5},
        {"p": 0.1, "block_size": 2, "gamma": "minmax", "rescale": "sample"},
        {"p": 0.3, "block_size": 3, "rescale": "none", "scope": "sample"},
    )
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden", dependence="batch")
    unit = "blocks"
    remedy = "raise block_size, or max_units: time grows with the square of it"

    def __init__(
        self,
        p: Rate = 0.2,
        block_size: Annotated[int, Ge(1)] = 5,
        gamma: Gamma = "softmax",
        rescale: Rescale = "batch",
        scope: Scope = "batch",
        max_units: Annotated[int, Ge(2)] = MAX_UNITS,
    ) -> None:
        super().__init__(p, gamma, rescale, scope, max_units)
        check_count("block_size", block_size, 1)
        self.block_size = block_size

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError unless the tensor is a batch of maps that hold two blocks or more."""
        size = extent(shape, require_images("corrdrop_spatial", site_id, shape, channel_axis))
        if self.block_size > min(size):
            raise SurgeryError(
                f"corrdrop_spatial at {site_id}: expected maps of {self.block_size}x{self.block_size} or more for "
                f"block_size {self.block_size}, got {size[0]}x{size[1]}; lower block_size there"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with blocks dropped; `x` itself when not active."""
        if not self.active:
            return x
        return corrdrop_spatial(
            x,
            self.p,
            self.block_size,
            gamma=self.gamma,
            rescale=self.rescale,
            scope=self.scope,
            nonnegative=self.nonnegative,
            channel_axis=self.channel_axis,
            key=self.next_key(),
        )

    def units(self, shape: tuple[int, ...]) -> int:
        """Return the number of blocks on a map."""
        return math.prod(grid(extent(shape, self.channel_axis), self.block_size))

    def rate(self, shape: tuple[int, ...]) -> float:
        """Return p'."""
        return self._rates["p"] * _share(extent(shape, self.channel_axis), self.block_size)

    def extra_repr(self) -> str:
        """Return the rate, the block size, and the options that differ from the authors'."""
        rate, *changed = super().extra_repr().split(", ")
        return ", ".join([rate, f"block_size={self.block_size}", *changed])


def _share(size: tuple[int, int], block_size: int) -> float:
    """p' / p, equation (10): the area of a map, beside that of the whole blocks which it takes to cover it."""
    return math.prod(size) / (block_size**2 * math.prod(grid(size, block_size)))


def _spread(kept: Tensor, size: tuple[int, int], block_size: int) -> Tensor:
    """What holds for blocks (B, N) → for cells (B, H, W)."""
    batch, (rows, columns) = kept.shape[0], grid(size, block_size)
    whole = kept.view(batch, rows, 1, columns, 1).expand(-1, -1, block_size, -1, block_size)
    return whole.reshape(batch, rows * block_size, columns * block_size)[:, : size[0], : size[1]]
