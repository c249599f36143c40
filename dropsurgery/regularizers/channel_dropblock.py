"""Channel DropBlock: drop a channel and those that are most like it (Ding et al., BMVC 2021, arXiv:2106.03432).

    x (B, C, H, W) → x * M * C / (C - k)      M (B, C, 1, 1) = 0 for the k channels of a sample that are most like
                                              one of them, chosen at random; 1 for the others; k = floor(p * C)
    metric max_activation: near is more alike; |t_i - t_j|^2, t_i the (row, column) where the mean of 3x3 pixels, zeros
                           around the map, is largest in channel i
    metric bilinear:       a larger cosine is more alike; <x_i, x_j> / |x_i| |x_j|, x_i channel i as a vector

Channels that speak of the same part of an object go together, so that the net cannot make up for one by another. p is
the paper's gamma, the share that is dropped: 0.2 by max_activation and 0.05 by bilinear in the authors' settings
(PRIS-CV/DropChannelBlock_Pytorch_master). Of the paper's C x C matrix only the chosen row is computed.

Where the authors' code leaves its paper, the paper's algorithm is taken here:

- That code keeps what is less alike than the k-th channel, so that all channels as like as that one are dropped too,
  more than p and up to the whole sample, and divides by 1 - p all the same. Here k channels are dropped exactly, the
  chosen one first and of equally like ones those of lower index, and the scale is C / (C - k).
- A channel of zeros has a cosine of 0 to every other one: chosen, it goes with the k - 1 others of lowest index.
- Row and column are told apart by division of integers, and maps need not be square.

Of equally large means the first one, row by row, is the place of a channel. max_activation needs maps of 3x3 and more:
on smaller ones the means are all the same. bilinear takes every map, and tokens. p = 1 leaves one channel of each
sample. A p by which no channel would go is refused, unless `allow_noop` is true.

Placement: between stages; on a ResNet-50 for fine-grained classes once, after layer2 (recipe channel_dropblock_resnet),
on a VGG-19 once, after the third pooling (recipe channel_dropblock_vgg).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, rate_tensor, require
from dropsurgery.regularizers._blocks import by_samples
from dropsurgery.regularizers._channels import ROUNDING, channels_first, lowest, measured, times_channels
from dropsurgery.regularizers._maps import TOKENS, MapRegularizer, channels_at, extent, require_images
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import full_precision, is_traced
from dropsurgery.regularizers._uniform import uniform

Metric = Literal["max_activation", "bilinear"]
LEAST = 3  # rows and columns of a map in which channels can have their peaks at different places


def channel_dropblock(
    x: Tensor,
    p: float | Tensor,
    metric: Metric = "max_activation",
    *,
    allow_noop: bool = False,
    channel_axis: int | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Drop of each sample of `x` the floor(`p` * C) channels most like one chosen at random, and scale the others.

    Args:
        x: (B, C, H, W), or with its channels at `channel_axis`; by "bilinear" also (B, C, D, H, W), and (B, C, L) or
            tokens (B, N, C), where the axis has to be given.
        p: share of the channels to drop, in [0, 1]; as a 0-dim tensor it may move without a compiled model being
            compiled again, and is not checked.
        metric: what makes channels alike; see the head of this file.
        allow_noop: let a `p` pass by which no channel is dropped.
        key: what the random numbers depend on, a 0-dim int64 CPU tensor; None for torch's global generator.

    Raises:
        SurgeryError: `x` is not of such a shape, an argument is out of range, or `p` drops nothing.
    """
    axis = channels_at(x, channel_axis, "channel_dropblock")
    _check(metric, allow_noop)
    _check_size(metric, tuple(x.shape), axis, "channel_dropblock")
    rate = rate_tensor(p, x.device)
    if not isinstance(p, Tensor):
        _check_share(p, x.shape[axis], allow_noop, "channel_dropblock")
    count = _count(rate, x.shape[axis])
    dropped = _dropped(channels_first(x, axis), count, metric, uniform((x.shape[0],), x.device, key))
    return times_channels(x, dropped.logical_not() * _scale(count, x.shape[axis], x.dtype), axis)


def dropped_channels(x: Tensor, p: Tensor, metric: Metric, drawn: Tensor, *, channel_axis: int | None = None) -> Tensor:
    """Return (B, C) whether a channel of `x` is dropped, by numbers `drawn` (B,) in [0, 1).

    The channel chosen in a sample is floor(number * C). `p` is a 0-dim tensor; for the rest see `channel_dropblock`.
    """
    axis = channels_at(x, channel_axis, "channel_dropblock")
    return _dropped(channels_first(x, axis), _count(p, x.shape[axis]), metric, drawn)


def _dropped(maps: Tensor, count: Tensor, metric: Metric, drawn: Tensor) -> Tensor:
    channels = maps.shape[1]
    chosen = (drawn * channels).long().clamp(max=channels - 1)[:, None]
    far = _distances(maps, chosen) if metric == "max_activation" else torch.rsub(cosines(maps, chosen), 1)
    return lowest(far.scatter(1, chosen, -1), count)  # the chosen one is before all others


def cosines(maps: Tensor, chosen: Tensor) -> Tensor:
    """Return (B, C), the cosine of each channel of `maps` (B, C, ...) with the channel `chosen` (B, 1) of its sample.

    0 where one of the two is all zeros.
    """
    return measured(_cosines, maps, chosen)


def peaks(maps: Tensor) -> Tensor:
    """Return (B, C), where in each map (B, C, H, W) the mean of 3x3 pixels is largest, as row * W + column."""
    if is_traced(maps) or maps.numel() == 0:
        return _peaks_at_once(maps)
    # Some samples at a time, which take little memory and lie in the cache.
    return torch.cat([_peaks_at_once(part) for (part,) in by_samples(maps)])


class ChannelDropBlock(MapRegularizer):
    """`channel_dropblock` as a layer; identity in eval."""

    paper = (
        "Ding et al.: Channel DropBlock: An Improved Regularization Method for Fine-Grained Visual Classification, "
        "BMVC 2021, arXiv:2106.03432"
    )
    summary = "drops a channel and those most like it"
    placement = "between stages, once after layer2 of a ResNet-50: recipes channel_dropblock_resnet, _vgg"
    shapes = f"maps (B, C, H, W) or (B, H, W, C) of 3x3 and more; by `metric: bilinear` {TOKENS}"
    examples = (
        {"p": 0.5, "metric": "bilinear", "allow_noop": True},
        {"p": 0.6, "metric": "bilinear", "allow_noop": True},
    )
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden", dependence="sample")

    p: Tensor

    def __init__(self, p: Rate = 0.2, metric: Metric = "max_activation", allow_noop: bool = False) -> None:
        super().__init__(p=p)
        _check(metric, allow_noop)
        self.metric: Metric = metric
        self.allow_noop = allow_noop
        self._asked = self._rates["p"]  # not what a schedule has made of it, which begins at 0

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError unless there are maps that can be compared, and p is a channel or more."""
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)
        where = f"channel_dropblock at {site_id}"
        if self.metric == "max_activation":
            require_images("channel_dropblock", site_id, shape, channel_axis, use="`metric: bilinear`")
        _check_size(self.metric, shape, self.channel_axis % len(shape), where)
        _check_share(self._asked, shape[self.channel_axis], self.allow_noop, where)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with channels dropped; `x` itself when not active."""
        if not self.active:
            return x
        _check_share(self._asked, x.shape[self.channel_axis], self.allow_noop, self.site_id or "channel_dropblock")
        return channel_dropblock(x, self.p, self.metric, channel_axis=self.told_axis, key=self.next_key())

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return the share of the channels that is dropped: p, down to a whole number of them."""
        channels = shape[self.channel_axis]
        return _counted(self._rates["p"], channels) / channels

    def extra_repr(self) -> str:
        """Return the rate, the metric, and whether nothing need be dropped."""
        changed = ", allow_noop=True" if self.allow_noop else ""
        return f"{super().extra_repr()}, metric={self.metric!r}{changed}"


def _check(metric: Metric, allow_noop: bool) -> None:
    require(metric in ("max_activation", "bilinear"), "metric", "'max_activation' or 'bilinear'", metric)
    require(isinstance(allow_noop, bool), "allow_noop", "true or false", allow_noop)


def _check_size(metric: Metric, shape: tuple[int, ...], axis: int, where: str) -> None:
    """A SurgeryError where the metric is of peaks, and the maps are too small to have them at different places."""
    if metric == "bilinear":
        return
    size = extent(shape, 1 if axis == 1 else -1) if len(shape) == 4 else ()
    if len(size) != 2 or min(size) < LEAST:
        raise SurgeryError(
            f"{where}: expected maps of {LEAST}x{LEAST} or more for `metric: max_activation`, got a tensor of shape "
            f"{shape}; use `metric: bilinear` there"
        )


def _check_share(p: float, channels: int, allow_noop: bool, where: str) -> None:
    """A SurgeryError where `p` is above 0, and yet so small that no channel would be dropped."""
    if p > 0 and not allow_noop and _counted(p, channels) == 0:
        least = f"a p of {1 / channels:.3g} or more" if channels > 1 else "2 channels or more"
        raise SurgeryError(
            f"{where}: expected {least}, got {p:g} of {channels} channels, by which none is dropped; give a larger p, "
            "or `allow_noop: true` to let it pass"
        )


def _count(p: Tensor, channels: int) -> Tensor:
    """How many channels are the share `p`; one is left of each sample."""
    return (p * channels + ROUNDING).floor().clamp(max=channels - 1)


def _scale(count: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """C / (C - k), in float32 at least; as a number over a tensor it would be rounded twice."""
    kept = torch.rsub(count.to(torch.promote_types(dtype, torch.float32)), channels)
    return torch.full_like(kept, channels) / kept


def _counted(p: float, channels: int) -> int:
    return min(math.floor(p * channels + ROUNDING), channels - 1)


def _cosines(maps: Tensor, chosen: Tensor) -> Tensor:
    vectors = maps.flatten(2)
    row = vectors.gather(1, chosen[:, :, None].expand(-1, -1, vectors.shape[2]))
    with full_precision(maps.device.type):
        products = torch.bmm(row, vectors.mT).squeeze(1)  # as matrix times vector it takes six times as long
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=2)
    # 0 / 0 where one is all zeros; the bounds are for rounding, and for what leaves float32.
    return (products / norms / norms.gather(1, chosen)).nan_to_num(0.0).clamp(-1, 1)


def _distances(maps: Tensor, chosen: Tensor) -> Tensor:
    """(B, C), the squares of the distances of the channels' peaks from that of the chosen channel, as float32."""
    at, width = peaks(maps), maps.shape[3]
    rows, columns = at // width, at % width
    squares = (rows - rows.gather(1, chosen)).square() + (columns - columns.gather(1, chosen)).square()
    return squares.to(torch.float32)


def _peaks_at_once(maps: Tensor) -> Tensor:
    sums = maps if maps.itemsize > 2 else maps.float()
    for axis in (2, 3):
        sums = _with_neighbours(sums, axis)
    return sums.flatten(2).argmax(2)


def _with_neighbours(values: Tensor, axis: int) -> Tensor:
    """Each value and the ones before and after it on an axis, added up: twice that is faster than a 3x3 pooling."""
    length = values.shape[axis] - 1
    sums = values.clone()
    sums.narrow(axis, 1, length).add_(values.narrow(axis, 0, length))
    sums.narrow(axis, 0, length).add_(values.narrow(axis, 1, length))
    return sums
