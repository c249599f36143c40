"""Grid dropout: black out random cells of a grid over the image (Zhang et al., ICME 2018, arXiv:1805.02901).

    x (B, C, H, W) → x * M      M (B, 1, g, g) ~ Bernoulli(1 - p), each entry spread over its cell of the image

A cell goes in all channels at once, each with probability p; what is kept is not rescaled. The paper ("grid dropout
with masking label") also learns to predict which cells were blacked out: that head is yours to build, and `last_grid`
is its label. Size of the grid and rate in the paper are not verified: g = 8 and p = 0.1 are the library's choice. A
grid that does not divide the image evenly has cells that differ by one pixel.

Placement: the network's input; recipe grid_dropout.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, check_count, rate_tensor, require
from dropsurgery.regularizers._maps import extent, require_images
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import uniform


def grid_dropout(
    x: Tensor, p: float | Tensor, grid: int = 8, *, channel_axis: int = 1, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Black out each cell of a `grid` x `grid` grid over each image with probability `p`.

    `x` is (B, C, H, W), or (B, H, W, C) with `channel_axis` -1. `key`, a 0-dim int64 CPU tensor, is what the random
    numbers depend on; None for torch's global generator. Returns the images, and which cells are black, bool
    (B, grid, grid). A SurgeryError if `x` is not of rank 4, or an argument is out of range.
    """
    require(x.dim() == 4, "input of grid_dropout", "4 dimensions (B, C, H, W) or (B, H, W, C)", tuple(x.shape))
    check_count("grid", grid, 1)
    height, width = extent(x.shape, channel_axis)
    black = uniform((x.shape[0], grid, grid), x.device, key) < rate_tensor(p, x.device)
    kept = black.logical_not().to(torch.uint8)
    for axis, size in ((2, width), (1, height)):  # the rows last: they are copied whole
        kept = kept.index_select(axis, torch.arange(size, device=x.device) * grid // size)
    return x * kept.unsqueeze(channel_axis), black


class GridDropout(Regularizer):
    """`grid_dropout` as a layer for the network's input; identity in eval.

    Attributes:
        last_grid: which cells the last forward blacked out, bool (B, grid, grid); None if it did nothing.
    """

    paper = (
        "Zhang et al.: Image Ordinal Classification and Understanding: Grid Dropout with Masking Label, ICME 2018, "
        "arXiv:1805.02901"
    )
    summary = "blacks out cells of a grid over the image"
    placement = "the network's input: recipe grid_dropout"
    shapes = "(B, C, H, W), (B, H, W, C)"
    needs = "images: it belongs on the network's input alone; the paper's auxiliary head is yours (`last_grid`)"
    examples = (
        {"p": 0.1},
        {"p": 0.4, "grid": 3},
    )
    taxonomy = Taxonomy(transforms="data", space="input")

    p: Tensor

    def __init__(self, p: Rate = 0.1, grid: Annotated[int, Ge(1)] = 8) -> None:
        super().__init__(p=p)
        check_count("grid", grid, 1)
        self.grid = grid
        self.last_grid: Tensor | None = None

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError unless the tensor is a batch of images that each cell has a pixel of."""
        axis = require_images("grid_dropout", site_id, shape, channel_axis, "images", "input_dropout")
        least = min(extent(shape, axis))
        if least < self.grid:
            raise SurgeryError(
                f"grid_dropout at {site_id}: expected a grid of {least} or less on images of shape {shape}, got "
                f"{self.grid}: some of its cells would have no pixel; use a smaller one"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with cells blacked out; `x` itself when not active."""
        if not self.active:
            self.last_grid = None
            return x
        y, self.last_grid = grid_dropout(x, self.p, self.grid, channel_axis=self.channel_axis, key=self.next_key())
        return y

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, whatever the shape."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate, and the cells along an axis."""
        return f"{super().extra_repr()}, grid={self.grid}"
