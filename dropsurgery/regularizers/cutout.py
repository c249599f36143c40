"""Cutout: blank a square of each image (DeVries, Taylor 2017, arXiv:1708.04552).

    x (B, C, H, W) → x * M      M = 0 in `n_holes` squares, the same in all channels; 1 elsewhere

As in the authors' code (uoguelph-mlrg/Cutout, util/cutout.py): the centre is any pixel of the image with the
same probability, rows cy - length // 2 to cy + length // 2 - 1 go (columns likewise), and what lies outside of
the image is cut off: a hole has length x length pixels (an odd length: length - 1) at most, and less at the
border. What is kept is not rescaled. The blank is 0, which is the mean colour, since images come normalised.

Placement: the network's input, in a recipe `pattern: stem, edge: input` (recipes/cutout.yaml). The authors cut
images in the data pipeline, which comes to the same.
Their length is 16 for CIFAR-10, 8 for CIFAR-100 and 20 for SVHN, all of 32x32 pixels, with one hole. Each of their
images is cut: p, the share of images that are, is 1.
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


def cutout(
    x: Tensor,
    p: float | Tensor = 1.0,
    length: int = 16,
    n_holes: int = 1,
    *,
    channel_axis: int = 1,
    key: Tensor | None = None,
) -> Tensor:
    """Blank `n_holes` squares in each image of `x` with probability `p`; all else stays as it is.

    Args:
        x: (B, C, H, W), or (B, H, W, C) with `channel_axis` -1; of any floating dtype and memory layout.
        p: share of the images that get holes, in [0, 1].
        length: side of a hole in pixels, 2 or more; an odd one is taken for the even one below it.
        n_holes: holes in an image; they may overlap.
        key: what the random numbers depend on, a 0-dim int64 CPU tensor; None for torch's global generator.

    Raises:
        SurgeryError: `x` is not of rank 4, or an argument is out of range.
    """
    require(x.dim() == 4, "input of cutout", "4 dimensions (B, C, H, W) or (B, H, W, C)", tuple(x.shape))
    _check(length, n_holes)
    height, width = extent(x.shape, channel_axis)
    # One draw for all: an image's coin, and the centres of its holes.
    numbers = uniform((x.shape[0], 1 + 2 * n_holes), x.device, key)
    cut = numbers[:, :1] < rate_tensor(p, x.device)
    rows = _spans(numbers[:, 1 : 1 + n_holes], height, length) * cut[..., None]
    columns = _spans(numbers[:, 1 + n_holes :], width, length)
    kept = _outside(rows, columns)
    return x * kept.unsqueeze(channel_axis)


class Cutout(Regularizer):
    """`cutout` as a layer for the network's input; identity in eval."""

    paper = "DeVries, Taylor: Improved Regularization of Convolutional Neural Networks with Cutout, arXiv:1708.04552"
    summary = "blanks a square of each image"
    placement = "the network's input (pattern stem, edge input): recipe cutout"
    shapes = "(B, C, H, W), (B, H, W, C)"
    needs = "images: it belongs on the network's input alone"
    examples = (
        {"p": 1.0, "length": 6},
        {"p": 0.5, "length": 9, "n_holes": 2},
    )
    taxonomy = Taxonomy(transforms="data", space="input")

    p: Tensor

    def __init__(self, p: Rate = 1.0, length: Annotated[int, Ge(2)] = 16, n_holes: Annotated[int, Ge(1)] = 1) -> None:
        super().__init__(p=p)
        _check(length, n_holes)
        self.length = length
        self.n_holes = n_holes

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError unless the tensor is a batch of images that a hole leaves something of."""
        axis = require_images("cutout", site_id, shape, channel_axis, "images", "input_dropout")
        height, width = extent(shape, axis)
        if self.length // 2 >= max(height, width):
            raise SurgeryError(
                f"cutout at {site_id}: expected a length below {2 * max(height, width)}, at which a hole covers the "
                f"image of {height}x{width} wherever it lies, got {self.length}; use a length of about half the image"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with squares blanked; `x` itself when not active."""
        if not self.active:
            return x
        return cutout(x, self.p, self.length, self.n_holes, channel_axis=self.channel_axis, key=self.next_key())

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return the expected share of blank pixels for images of `shape`, counted over all centres."""
        high, wide = (_hits(size, self.length) / size for size in extent(shape, self.channel_axis))
        spared = (1 - torch.outer(high, wide)) ** self.n_holes
        return self._rates["p"] * float((1 - spared).mean())

    def extra_repr(self) -> str:
        """Return the rate, and size and number of the holes."""
        return f"{super().extra_repr()}, length={self.length}, n_holes={self.n_holes}"


def _check(length: int, n_holes: int) -> None:
    check_count("length", length, 2)
    check_count("n_holes", n_holes, 1)


def _spans(numbers: Tensor, size: int, length: int) -> Tensor:
    """Bytes (B, n, size), 1 in the span of each centre: for (B, n) numbers in [0, 1)."""
    centres = (numbers * size).floor()[..., None]
    cells = torch.arange(size, device=numbers.device)
    inside = (cells >= centres - length // 2) & (cells < centres + length // 2)
    return inside.to(torch.uint8)  # bytes: with bool, all that follows takes ten times as long


def _outside(rows: Tensor, columns: Tensor) -> Tensor:
    """Bytes (B, H, W), 0 where a hole has both the row and the column: (B, n, H), (B, n, W)."""
    holes = rows[:, 0, :, None] & columns[:, 0, None, :]
    for index in range(1, rows.shape[1]):
        holes |= rows[:, index, :, None] & columns[:, index, None, :]
    return holes ^ 1


def _hits(size: int, length: int) -> Tensor:
    """How many centres have each of `size` cells in their span; float64."""
    cells = torch.arange(size, dtype=torch.float64, device="cpu")
    half = length // 2
    return (cells + half).clamp(max=size - 1) - (cells - half + 1).clamp(min=0) + 1
