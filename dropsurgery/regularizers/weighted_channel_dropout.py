"""Weighted channel dropout: keep channels of high activation rather than those of low (Hou, Wang, AAAI 2019).

    x (B, C, H, W) → x * alpha * [c selected and u_c < q]      score_c = max(0, mean of the channel over its map)
    selected: the M = max(1, floor((1 - p) * C)) channels of largest r_c^(1 / score_c),  r_c, u_c ~ U(0, 1)
    alpha = sum of all scores / sum of the scores that are kept      of each sample, after both steps

Pages 8425-8432; no code was published. p is the share that the weighted selection drops, 1 - wrs_ratio of the paper; q
is its random filter, the probability with which a selected channel stays, so that about 1 - (1 - p) * q of the channels
are dropped: more than p, by design. p = 0 is off, as for every regularizer here, and its q with it; as long as p is
above 0 and below 1 / C, all channels are selected, and the filter alone remains (dropout of channels).

Channels are ranked by -log(r) / score, from the lowest: that is the order of r^(1 / score), which underflows to 0 in
float32 where scores are small. The paper says that channel c is selected with the probability of its share in the
scores. That holds for M = 1 alone; for more it is larger, and not in proportion. Taken here is the paper's algorithm.

What the paper leaves open: no gradient flows through alpha. Where a mean is negative, which after a ReLU none is, it
counts as 0: such a channel is selected only where there are too few others, and adds nothing to alpha. A sample whose
scores are all 0 stays as it is. Where the filter would leave nothing, or only channels of score 0, the channel of best
key is kept alone. Of equal keys the lower index counts. alpha can be large where only weak channels are left:
`alpha_max` bounds it, at the price of the sum; in float16 it is bounded by what that can hold.

Placement: after the last stages, behind their ReLU. A ResNet-101 has it behind the first and the last block of layer4
(recipe weighted_channel_dropout_resnet), a VGG16 behind the fourth pooling and, at p = 0.1 and q = 0.5, the fifth
(recipe weighted_channel_dropout_vgg).
"""

from __future__ import annotations

import math
import warnings
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from dropsurgery.errors import SurgeryWarning
from dropsurgery.regularizers._base import Rate, rate_tensor, require
from dropsurgery.regularizers._channels import ROUNDING, channels_first, lowest, measured, times_channels
from dropsurgery.regularizers._maps import TOKENS, MapRegularizer, channels_at
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import uniform

_NEVER_NEGATIVE = ("relu", "sigmoid")
_MAY_BE_NEGATIVE = ("activation", "norm", "conv", "conv_transpose", "linear", "attention", "add")
_ROOM = 0.99  # so that what is rounded in float16 does not leave it


def weighted_channel_dropout(
    x: Tensor,
    p: float | Tensor,
    q: float = 0.9,
    *,
    alpha_max: float | None = None,
    channel_axis: int | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Keep of each sample of `x` channels selected by their mean, and of these each with probability `q`; rescale.

    Args:
        x: (B, C, H, W) or (B, C, D, H, W), or with its channels at `channel_axis`, which has to be given at rank 3.
        p: share of the channels that the selection drops, in [0, 1]; at 0 the filter alone is at work.
        q: probability with which a selected channel passes the random filter, above 0 and up to 1.
        alpha_max: the largest scale, 1 or more; None for no bound.
        key: what the random numbers depend on, a 0-dim int64 CPU tensor; None for torch's global generator.

    Raises:
        SurgeryError: `x` is of another rank, or an argument is out of range.
    """
    axis = channels_at(x, channel_axis, "weighted_channel_dropout")
    _check(q, alpha_max)
    rate = rate_tensor(p, x.device)
    maps = channels_first(x, axis)
    scores = channel_scores(maps)
    kept = kept_channels(scores, rate, q, uniform((2, *scores.shape), x.device, key))
    alpha = _alpha(scores, kept)
    if alpha_max is not None:
        alpha = alpha.clamp(max=alpha_max)
    if x.dtype == torch.float16:
        alpha = torch.minimum(alpha, _most(maps, kept))
    return times_channels(x, kept * alpha, axis)


def channel_scores(maps: Tensor) -> Tensor:
    """Return (B, C), the mean of each channel of `maps` (B, C, ...) where that is above 0, and else 0."""
    # Added up in one order, whatever the layout: so the scale is the same to the last bit.
    means = measured(lambda part: part.contiguous().flatten(2).mean(2), maps)
    return means.clamp(0, torch.finfo(means.dtype).max / maps.shape[1])  # so that their sum is finite


def kept_channels(scores: Tensor, p: Tensor, q: float, drawn: Tensor) -> Tensor:
    """Return (B, C) whether a channel is kept, by numbers `drawn` (2, B, C) in [0, 1): for selection and filter.

    `scores` (B, C) are not negative, and `p` is a 0-dim tensor.
    """
    ranking, filtering = drawn[0], drawn[1]
    keys = ranking.clamp(min=torch.finfo(ranking.dtype).tiny).log().neg() / scores  # at score 0: infinite
    kept = lowest(keys, _selected(p, scores.shape[1])) & (filtering < q)
    best = torch.zeros_like(kept).scatter(1, keys.argmin(1, keepdim=True), True)
    kept = torch.where((scores * kept).sum(1, keepdim=True) > 0, kept, best)
    return kept | (scores.sum(1, keepdim=True) == 0)


class WeightedChannelDropout(MapRegularizer):
    """`weighted_channel_dropout` as a layer; identity in eval."""

    paper = "Hou, Wang: Weighted Channel Dropout for Regularization of Deep Convolutional Neural Network, AAAI 2019"
    summary = "keeps channels with a chance that grows with their activation, and the sum of these"
    placement = "after the last stages, behind a ReLU: recipes weighted_channel_dropout_resnet, _vgg"
    shapes = TOKENS
    needs = "means that are not negative, as after a ReLU"
    examples = (
        {"p": 0.2, "q": 0.9},
        {"p": 0.5, "q": 0.5, "alpha_max": 20.0},
    )
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden", dependence="sample")

    p: Tensor

    def __init__(
        self,
        p: Rate = 0.2,
        q: Annotated[float, Gt(0), Le(1)] = 0.9,
        alpha_max: Annotated[float, Ge(1)] | None = None,
    ) -> None:
        super().__init__(p=p)
        _check(q, alpha_max)
        self.q = float(q)
        self.alpha_max = None if alpha_max is None else float(alpha_max)

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a warning where what comes before is known to give negative means."""
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)
        kinds = self.producer
        if kinds and kinds[0] in _MAY_BE_NEGATIVE and not set(kinds) & set(_NEVER_NEGATIVE):
            warnings.warn(
                f"weighted_channel_dropout at {site_id}: expected an input that is never negative (that of a ReLU), "
                f"got that of {' '.join(kinds)}: channels with a negative mean count as 0 and are dropped first",
                SurgeryWarning,
                stacklevel=2,
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with channels dropped and the others scaled; `x` itself when not active."""
        if not self.active:
            return x
        return weighted_channel_dropout(
            x, self.p, self.q, alpha_max=self.alpha_max, channel_axis=self.told_axis, key=self.next_key()
        )

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return the expected share of dropped channels, of which enough are above 0: about 1 - (1 - p) * q."""
        p, channels = self._rates["p"], shape[self.channel_axis]
        if p == 0:
            return 0.0
        selected = max(1, math.floor((1 - p) * channels + ROUNDING))
        kept = selected * self.q + (1 - self.q) ** selected  # where all are filtered out, one is kept
        return 1 - kept / channels

    def extra_repr(self) -> str:
        """Return the rate, the filter, and the bound of the scale where there is one."""
        bound = "" if self.alpha_max is None else f", alpha_max={self.alpha_max:g}"
        return f"{super().extra_repr()}, q={self.q:g}{bound}"


def _check(q: float, alpha_max: float | None) -> None:
    is_number = isinstance(q, int | float) and not isinstance(q, bool) and 0 < q <= 1
    require(is_number, "q", "a number above 0 and up to 1", q)
    is_bound = isinstance(alpha_max, int | float) and not isinstance(alpha_max, bool) and alpha_max >= 1
    require(alpha_max is None or is_bound, "alpha_max", "a number of 1 or more, or nothing", alpha_max)


def _selected(p: Tensor, channels: int) -> Tensor:
    """How many channels the selection keeps."""
    return (torch.rsub(p, 1) * channels + ROUNDING).floor().clamp(min=1)


def _alpha(scores: Tensor, kept: Tensor) -> Tensor:
    """(B, 1), by which the kept channels have the sum of all scores; 1 where that is 0."""
    total, mass = scores.sum(1, keepdim=True), (scores * kept).sum(1, keepdim=True)
    return (total / mass).nan_to_num(1.0)  # infinity becomes the largest number


def _most(maps: Tensor, kept: Tensor) -> Tensor:
    """(B, 1), the largest scale by which no kept element leaves the maps' dtype."""
    axes = tuple(range(2, maps.dim()))
    size = torch.maximum(maps.amax(axes), -maps.amin(axes)).float() * kept
    most = _ROOM * torch.finfo(maps.dtype).max
    return (most / size.amax(1, keepdim=True)).clamp(1, most)
