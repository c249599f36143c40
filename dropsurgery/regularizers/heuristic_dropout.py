"""Heuristic dropout: filter the channels that score highest (Shi, Liu, Tao, Yuan, ICASSP 2022, pp. 1101-1105).

    x (B, C, H, W) → L * x        in the round(p * C) channels of each sample with the highest score, else x
    score = e + k / (v + eps)     v = unbiased variance of a channel over its positions
    e = -sum_q f_q ln f_q         f_q = share of round(b * tanh x) that is q, among those from 0 to b;  b = 10, k = 2

IEEE document 9747409. L is the Laplace kernel of 8 neighbours (8 in the middle, -1 around) with zeros beyond the border
(`mask: laplace`), or 0 (`mask: zero`); nothing is rescaled. All hangs on x and nothing on chance, and gradient flows
through the convolution only. The authors' rate is p, 0.1 in their code (sdc17/HeuristicDropout).

What it really does:

- The score is a filter for low variance. e is at most ln 11 = 2.4; k / v is more than that wherever v < 0.83, and grows
  without bound as v falls. In the decoder of a U-Net with random weights the rank correlation of score and -v is 0.96
  to 0.99 at k = 2, that of e and -v -0.5 to 0.5: the entropy hardly matters. `channel_scores` tells for other nets.
- The Laplace kernel drops nothing. It is a high-pass that amplifies: the variance of white noise grows 72-fold, and a
  constant c becomes 0 inside, 3c on an edge and 5c in a corner. What would leave float16 is cut to its largest number.
- Channels of zeros score k / eps, the most there is, and stay what they are: with round(p * C) of them the layer does
  nothing at all. `skip_dead` gives their places to others.

Readings taken: paper and code differ in the count, floor(p * c) and round(p * c); it is the code's here, half to even.
Both count values of 0 to b only; where a channel has none, at which the code raises, e is 0. `signed_bins` counts those
from -b to b instead. A map of one position has v = 0. Of equal scores the first channel counts as higher. A p that
comes to no channel at a site is refused there, unless `allow_noop`.

Placement: between the two convolutions of each stage of a U-Net, behind the first activation, in encoder and decoder;
recipe heuristic_dropout_unet_double_conv.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, check_count, rate_tensor, require
from dropsurgery.regularizers._blocks import CPU
from dropsurgery.regularizers._maps import require_images
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import is_traced, is_transformed

Mask = Literal["laplace", "zero"]
_PART = 1 << 20  # elements that are counted at once
_FILTERED = 1 << 18  # and filtered, which takes four copies


def heuristic_dropout(
    x: Tensor,
    p: float | Tensor = 0.1,
    k: float = 2.0,
    *,
    mask: Mask = "laplace",
    bins: int = 10,
    eps: float = 1e-7,
    skip_dead: bool = False,
    signed_bins: bool = False,
    channel_axis: int = 1,
) -> Tensor:
    """Filter the share `p` of the channels of each sample that has the highest `channel_scores`.

    Args:
        x: (B, C, H, W), or (B, H, W, C) with `channel_axis` -1; of any floating dtype and memory layout.
        p: share of the channels, in [0, 1]; as a 0-dim tensor it may move without compiling a compiled model again.
        k: weight of the variance in the score.
        mask: "laplace" or "zero".
        bins: b, at which tanh(x) = 1 is counted.
        eps: what is added to the variance.
        skip_dead: whether channels of zeros are left out of the choice.
        signed_bins: whether negative values are counted too.

    Raises:
        SurgeryError: `x` is not of rank 4, or an argument is out of range.
    """
    _check_mask(mask)
    rate = rate_tensor(p, x.device)
    scores = channel_scores(
        x, k, bins=bins, eps=eps, skip_dead=skip_dead, signed_bins=signed_bins, channel_axis=channel_axis
    )
    return filtered(x, highest(scores, rate), mask, channel_axis=channel_axis)


def channel_scores(
    x: Tensor,
    k: float = 2.0,
    *,
    bins: int = 10,
    eps: float = 1e-7,
    skip_dead: bool = False,
    signed_bins: bool = False,
    channel_axis: int = 1,
) -> Tensor:
    """Return the score of each channel, (B, C), without a gradient; by `skip_dead`, -inf for those of zeros.

    In float32, or float64 where `x` is; the arguments are those of `heuristic_dropout`.
    """
    require(x.dim() == 4, "input of heuristic_dropout", "4 dimensions (B, C, H, W) or (B, H, W, C)", tuple(x.shape))
    _check(k, bins, eps)
    maps = x.detach().movedim(channel_axis, 1)
    levels = _levels(bins, signed_bins)
    if _is_at_once(maps):
        return _scores(maps, k, eps, levels, skip_dead)
    # A part at a time: it takes two copies, which then lie in the cache.
    room = max(1, _PART * len(maps) // maps.numel())
    return torch.cat([_scores(part, k, eps, levels, skip_dead) for part in torch.split(maps, room)])


def highest(scores: Tensor, p: Tensor) -> Tensor:
    """Return which of the channels are the round(p * C) with the highest of `scores` (B, C); of equals the first."""
    count = _count(p, scores.shape[1])
    chosen = _first_at_once(scores, count) if _is_at_once(scores) else _first(scores, int(count))
    return chosen & (scores > -math.inf)


def _first_at_once(scores: Tensor, count: Tensor) -> Tensor:
    order = scores.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(scores.shape[1], device=scores.device) < count
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, first.expand_as(order))


def _first(scores: Tensor, count: int) -> Tensor:
    """The same on the CPU, where no device waits for the count, without a sort, which takes ten times as long."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    level = scores.topk(count, 1, sorted=False).values.amin(1, keepdim=True)
    above, equal = scores > level, scores == level
    missing = count - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))


def filtered(x: Tensor, chosen: Tensor, mask: Mask = "laplace", *, channel_axis: int = 1) -> Tensor:
    """Return `x` with the Laplace kernel over the `chosen` (B, C) of its channels, or with zeros in them."""
    maps = x.movedim(channel_axis, 1)
    if mask == "zero":
        y = maps * chosen.logical_not()[..., None, None].to(x.dtype)
    elif is_transformed():
        y = _filtered(maps, chosen, True)
    else:
        y = _Filtered.apply(maps, chosen, True)
    return y.movedim(1, channel_axis)


class HeuristicDropout(Regularizer):
    """`heuristic_dropout` as a layer; identity in eval."""

    paper = "Shi, Liu, Tao, Yuan: Heuristic Dropout, ICASSP 2022, pp. 1101-1105"
    summary = "filters the channels of lowest variance, by a score"
    placement = "between the two convolutions of each stage of a U-Net: recipe heuristic_dropout_unet_double_conv"
    shapes = "(B, C, H, W), (B, H, W, C)"
    examples = (
        {"p": 0.5},
        {"p": 0.5, "mask": "zero", "skip_dead": True},
        {"p": 0.5, "k": 0.1, "bins": 4, "signed_bins": True},
    )
    taxonomy = Taxonomy(
        transforms=("data", "architecture"), space="hidden", randomness="deterministic", dependence="sample"
    )
    drops = "other"
    random = False

    p: Tensor

    def __init__(
        self,
        p: Rate = 0.1,
        k: Annotated[float, Ge(0)] = 2.0,
        mask: Mask = "laplace",
        bins: Annotated[int, Ge(1)] = 10,
        eps: Annotated[float, Gt(0)] = 1e-7,
        skip_dead: bool = False,
        signed_bins: bool = False,
        allow_noop: bool = False,
    ) -> None:
        super().__init__(p=p)
        _check(k, bins, eps)
        _check_mask(mask)
        flags = {"skip_dead": skip_dead, "signed_bins": signed_bins, "allow_noop": allow_noop}
        for name, value in flags.items():
            require(isinstance(value, bool), name, "true or false", value)
        self.k, self.bins, self.eps = float(k), bins, float(eps)
        self.mask = mask
        self.skip_dead = skip_dead
        self.signed_bins = signed_bins
        self.allow_noop = allow_noop

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError unless there are maps, and `p` of their channels is one or more."""
        axis = require_images("heuristic_dropout", site_id, shape, channel_axis)
        p, there = self._rates["p"], shape[axis]
        if p and not self.allow_noop and _share(p, there) == 0:
            raise SurgeryError(
                f"heuristic_dropout at {site_id}: expected one channel or more to filter, got p = {p:g} of {there} "
                "channels, which rounds to none; give a larger p, or say allow_noop: true"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with channels filtered; `x` itself when not active."""
        if not self.active:
            return x
        return filtered(x, highest(self.scores(x), self.p), self.mask, channel_axis=self.channel_axis)

    def scores(self, x: Tensor) -> Tensor:
        """Return the score (B, C) of each channel of `x`, by which forward chooses."""
        return channel_scores(
            x,
            self.k,
            bins=self.bins,
            eps=self.eps,
            skip_dead=self.skip_dead,
            signed_bins=self.signed_bins,
            channel_axis=self.channel_axis,
        )

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return round(p * C) / C, the share of filtered channels, of which none is dead."""
        return _share(self._rates["p"], shape[self.channel_axis])

    def extra_repr(self) -> str:
        """Return the rate, and the options that differ from the authors'."""
        usual = {"k": 2.0, "mask": "laplace", "bins": 10, "eps": 1e-7}
        usual |= {"skip_dead": False, "signed_bins": False, "allow_noop": False}
        changed = [f"{name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value]
        return ", ".join([super().extra_repr(), *changed])


def _check(k: float, bins: int, eps: float) -> None:
    require(_is_number(k) and k >= 0, "k", "a number of 0 or more", k)
    check_count("bins", bins, 1)
    require(_is_number(eps) and eps > 0, "eps", "a number above 0", eps)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_mask(mask: Mask) -> None:
    require(mask in ("laplace", "zero"), "mask", "'laplace' or 'zero'", mask)


_GRID = 1024  # a share of channels that lies on a half is on a half, though float32 says a little less or more


def _count(p: Tensor, channels: int) -> Tensor:
    """How many channels are the share `p`: the nearest whole number, and half way the even one."""
    return ((p * (channels * _GRID)).round() / _GRID).round()


def _share(p: float, channels: int) -> float:
    return int(_count(torch.tensor(p, dtype=torch.float32, device=CPU), channels)) / channels


def _is_at_once(maps: Tensor) -> bool:
    """Whether all is to be done in one go: elsewhere than on the CPU, or where something looks on."""
    return maps.device.type != "cpu" or is_traced(maps) or maps.numel() == 0


# ---- the score ----


def _levels(bins: int, signed: bool) -> list[float]:
    """Where a value begins to count as q, for each q in ascending order."""
    # round(b * tanh x) >= q is x >= artanh((q - 1/2) / b): no tanh has to be taken.
    first = -bins if signed else 0
    return [math.atanh((q - 0.5) / bins) if q > -bins else -math.inf for q in range(first, bins + 1)]


def _scores(maps: Tensor, k: float, eps: float, levels: list[float], skip_dead: bool) -> Tensor:
    """The score (B, C) of maps (B, C, H, W)."""
    rows = maps.to(torch.promote_types(maps.dtype, torch.float32)).flatten(2)
    if not _is_at_once(maps):
        rows = rows.contiguous()
    mean, variance = _moments(rows)
    scores = _entropy(_reached(rows, levels)) + k / (variance + eps)
    if skip_dead:
        scores = scores.masked_fill((mean == 0) & (variance == 0), -math.inf)
    return scores


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance along the last dimension; of a single number the variance is 0."""
    cells = max(1, rows.shape[-1])
    mean = rows.sum(-1) / cells
    apart = rows - mean[..., None]
    # The mean is rounded: what that adds to the squares is taken off, so that a constant has no variance.
    rounded = apart.sum(-1).square() / cells
    return mean, (apart.square_().sum(-1) - rounded).clamp(min=0) / max(1, cells - 1)


def _reached(rows: Tensor, levels: list[float]) -> Tensor:
    """How many reach each of the levels along the last dimension, (levels, ...)."""
    if _is_at_once(rows):
        return torch.stack([(rows >= level).sum(-1) for level in levels]).to(rows.dtype)
    # As numbers: what gives bools, and sums of bools, takes three times as long.
    marks = torch.empty_like(rows)
    reached = rows.new_empty(len(levels), *rows.shape[:-1])
    for level, counted in zip(levels, reached, strict=True):
        torch.sum(torch.ge(rows, level, out=marks), -1, out=counted)
    return reached


def _entropy(reached: Tensor) -> Tensor:
    """Entropy of the bins, given how many reach the begin of each and of those above it; 0 where all are empty."""
    counts = torch.cat([reached[:-1] - reached[1:], reached[-1:]])
    total = reached[0].clamp(min=1)
    return total.log() - (counts * counts.clamp(min=1).log()).sum(0) / total


# ---- the filter ----


class _Filtered(torch.autograd.Function):
    """Maps with the Laplace kernel over the chosen: linear in them, and its own adjoint."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, chosen: Tensor, cut: bool) -> Tensor:
        ctx.save_for_backward(chosen)
        return _filtered(maps, chosen, cut)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Not cut: a gradient that leaves float16 has to be seen, to be scaled otherwise.
        return _Filtered.apply(grad, *ctx.saved_tensors, False), None, None


def _filtered(maps: Tensor, chosen: Tensor, cut: bool) -> Tensor:
    if _is_at_once(maps):
        return torch.where(chosen[..., None, None], _laplace(maps, cut), maps)
    y = maps.clone()
    room = max(1, _FILTERED // math.prod(maps.shape[2:]))
    for sample, channel in zip(*(torch.split(each, room) for each in chosen.nonzero(as_tuple=True)), strict=True):
        y[sample, channel] = _laplace(maps[sample, channel], cut)
    return y


def _laplace(maps: Tensor, cut: bool) -> Tensor:
    """The Laplace kernel over the last two dimensions: nine times a map, less its sums over 3 x 3."""
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
    # Three times three, as the sums are added up: on a constant, the difference is 0 and not a rounding error.
    y = (wide * 3).mul_(3).sub_(_sum_of_three(_sum_of_three(wide, -1), -2))
    if cut and maps.itemsize < 4:
        most = torch.finfo(maps.dtype).max
        y = y.clamp(-most, most)
    return y.to(maps.dtype)


def _sum_of_three(maps: Tensor, axis: int) -> Tensor:
    """The sum of each number and its two neighbours along an axis, zeros beyond the ends."""
    others = maps.shape[axis] - 1
    y = maps.clone()
    y.narrow(axis, 1, others).add_(maps.narrow(axis, 0, others))
    y.narrow(axis, 0, others).add_(maps.narrow(axis, 1, others))
    return y
