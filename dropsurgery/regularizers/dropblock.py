"""DropBlock: drop contiguous blocks of each feature map (Ghiasi, Lin, Le 2018, arXiv:1810.12890).

    x (B, C, H, W) → x * M * numel(M) / sum(M)      M = 0 in blocks of k x k, 1 elsewhere
    gamma = p * (H * W) / k^2 / ((H - k + 1) * (W - k + 1))      where a block begins

As in the authors' code (tensorflow/tpu, resnet_model.py): seeds lie where their block is wholly inside of
the map, each channel has its own, a block larger than the map is cut down to it (and then drops whole
channels), and one scale, in float32, holds for the whole mask. The paper's keep_prob is 1 - p. With the
paper's gamma the expected drop share is at most p (at 14x14, k = 7, p = 0.1: 0.093); `gamma: exact` solves
for p. On signals (B, C, L) and volumes (B, C, D, H, W), which the paper does not have, the same holds with
one and three axes: blocks of k and of k x k x k. Tokens (B, N, C) are refused: neighbours in N are not
neighbours in space.

Placement: after each convolution with its BN and ReLU, after the last BN of a branch, and on the shortcuts,
in groups 3 and 4 of a ResNet, at p / 4 in group 3, p growing from 0 over the training.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from dropsurgery.regularizers._base import Rate, check_count, rate_tensor, require
from dropsurgery.regularizers._blocks import run
from dropsurgery.regularizers._coverage import (
    exact_probability,
    expected_share,
    paper_factor,
    seed_probability,
)
from dropsurgery.regularizers._maps import MapRegularizer, channels_at
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import is_transformed
from dropsurgery.regularizers._uniform import uniform

Gamma = Literal["paper", "exact"]
Clamp = Literal["dimension", "square"]


def drop_block(
    x: Tensor,
    p: float | Tensor,
    block_size: int = 7,
    *,
    share_channels: bool = False,
    gamma: Gamma = "paper",
    clamp: Clamp = "dimension",
    channel_axis: int | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Drop blocks of `block_size` cells along each axis and rescale by what was kept; zeros if nothing was.

    Args:
        x: (B, C, H, W) or (B, C, D, H, W), or with its channels at `channel_axis`, which has to be given at
            rank 3, for (B, C, L); of any floating dtype and memory layout.
        p: share to drop, in [0, 1]; as a 0-dim tensor it may move without a compiled model being compiled again.
        block_size: cells along an axis; cut down to each dimension of the map (`clamp` "dimension") or to the
            smallest one ("square", as torchvision has it).
        share_channels: one mask for all channels of a sample.
        gamma: "paper" (equation 1) or "exact", at which the expected drop share is p.
        key: what the random numbers depend on, a 0-dim int64 CPU tensor; None for torch's global generator.

    Raises:
        SurgeryError: `x` is not of rank 3 to 5, or an argument is out of range.
    """
    axis = channels_at(x, channel_axis, "drop_block")
    _check(block_size, gamma, clamp)
    rate = rate_tensor(p, x.device)
    maps = x if axis == 1 else x.movedim(axis, 1)
    block = _block(maps.shape[2:], block_size, clamp)
    exact = gamma == "exact"
    if x.device.type == "cpu" and not is_transformed():
        y = run(maps, rate, key, block, share_channels, exact, True)
    else:
        y = _drop_block(maps, rate, key, block, share_channels, exact)
    return y if axis == 1 else y.movedim(1, axis)


class DropBlock(MapRegularizer):
    """`drop_block` as a layer; identity in eval."""

    paper = "Ghiasi, Lin, Le: DropBlock, NeurIPS 2018, arXiv:1810.12890"
    summary = "drops contiguous blocks of each feature map"
    placement = "after conv-BN(-ReLU) and on the shortcuts, in groups 3 and 4: dropblock_resnet_g34"
    shapes = "maps (B, C, L), (B, C, H, W) or (B, C, D, H, W), the last two with channels at the end too"
    takes_tokens = False
    examples = (
        {"p": 0.1, "block_size": 7},
        {"p": 0.3, "block_size": 2, "gamma": "exact"},
        {"p": 0.2, "block_size": 3, "share_channels": True, "clamp": "square"},
    )
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden")

    p: Tensor

    def __init__(
        self,
        p: Rate = 0.1,
        block_size: Annotated[int, Ge(1)] = 7,
        share_channels: bool = False,
        gamma: Gamma = "paper",
        clamp: Clamp = "dimension",
    ) -> None:
        super().__init__(p=p)
        _check(block_size, gamma, clamp)
        require(isinstance(share_channels, bool), "share_channels", "true or false", share_channels)
        self.block_size = block_size
        self.share_channels = share_channels
        self.gamma = gamma
        self.clamp = clamp

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with blocks dropped; `x` itself when not active."""
        if not self.active:
            return x
        return drop_block(
            x,
            self.p,
            self.block_size,
            share_channels=self.share_channels,
            gamma=self.gamma,
            clamp=self.clamp,
            channel_axis=self.told_axis,
            key=self.next_key(),
        )

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return the expected share of dropped cells for maps of `shape`, in closed form."""
        size = tuple(shape[2:] if self.channel_axis == 1 else shape[1:-1])
        block = _block(size, self.block_size, self.clamp)
        return expected_share(seed_probability(self._rates["p"], size, block, self.gamma == "exact"), size, block)

    def extra_repr(self) -> str:
        """Return the rate, the block size, and the options that differ from the authors'."""
        options = {"share_channels": False, "gamma": "paper", "clamp": "dimension"}
        changed = [f"{name}={getattr(self, name)!r}" for name, usual in options.items() if getattr(self, name) != usual]
        return ", ".join([super().extra_repr(), f"block_size={self.block_size}", *changed])


def _check(block_size: int, gamma: Gamma, clamp: Clamp) -> None:
    check_count("block_size", block_size, 1)
    require(gamma in ("paper", "exact"), "gamma", "'paper' or 'exact'", gamma)
    require(clamp in ("dimension", "square"), "clamp", "'dimension' or 'square'", clamp)


def _block(size: tuple[int, ...], block_size: int, clamp: Clamp) -> list[int]:
    """Cut the block down to a map of `size`."""
    most = size if clamp == "dimension" else [min(size)] * len(size)
    return [min(block_size, length) for length in most]


def _drop_block(
    x: Tensor, p: Tensor, key: Tensor | None, block: list[int], share_channels: bool, exact: bool
) -> Tensor:
    """The same in torch's own operators, for every device; p is not read, so nothing waits for the device."""
    batch, channels, *size = x.shape
    gamma = exact_probability(p, size, block) if exact else p * paper_factor(size, block)
    region = (length - k + 1 for length, k in zip(size, block, strict=True))
    seeds = (uniform((batch, 1 if share_channels else channels, *region), x.device, key) < gamma).float()
    room = [k - 1 for k in reversed(block) for _ in "ab"]  # at both ends of each axis, the last one first
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(block) - 1]
    kept = pool(F.pad(seeds, room), block, stride=1) == 0
    # With nothing kept all is zero anyway, and the scale only has to be finite.
    scale = kept.numel() / kept.sum().clamp(min=1)
    return x * scale.to(x.dtype) * kept  # a product, and so in the layout of x, forward and backward
