"""What the two forms of CorrDrop share: a score of how much each unit is like the others, and a draw that goes by it.

Zeng, Dai, Xia, ICASSP 2020; Zeng, Dai, Chen, Xia, Lu, Pattern Recognition 120, 2021, doi 10.1016/j.patcog.2021.108117;
the authors' code: Sandy-Zeng/CorrDrop. A sample has N units, the rows of A (N, K); equations (1) to (8):

    A' = A / |A| row by row                 P = |A' A'^T - I|          F_i = sum_j P_ij / N
    M_i ~ Bernoulli(softmax(F)_i)           1 protects a unit
    p^ = p * n / (n - sum M), at most 1     n units in the batch, or in a sample (`scope`)
    S_i = 0 where M_i = 0 and u_i < p^, else 1                         u_i uniform in [0, 1)

A row of zeros stays one, so that it has 1 on the diagonal of P; a row whose squares leave the dtype counts as one of
zeros. The paper does not rescale. The authors' code multiplies by numel(S) / sum(S) over the whole batch, and takes n
and M over the whole batch too: those are the defaults of `rescale` and `scope`. Where nothing at all would be left to
rescale, everything is kept; a unit that is alone in its sample always is.

THE PUBLISHED RULE HARDLY CHOOSES. A softmax sums to 1, so that of a sample's units one is protected on average,
however many there are. The probabilities with which two of them are dropped differ at most by a factor of

    e (e + N - 1) / (1 + (N - 1) e):     1.70 for N = 4, 1.28 for 9, 1.05 for 49, 1.037 for 64, 1.009 for 256

so that with 64 units and more it is less than 4 %, and the layer is in effect spatial dropout, or a dropout of the
blocks of a fixed grid. `gamma: minmax` is a deviation from the paper that does choose: M_i has the probability
(F_i - min F) / (max F - min F), or 1/2 where all scores of a sample are alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import check_count, require
from dropsurgery.regularizers._maps import MapRegularizer
from dropsurgery.regularizers._tracing import full_precision, is_traced, is_transformed

Gamma = Literal["softmax", "minmax"]
Scope = Literal["batch", "sample"]
Rescale = Literal["batch", "sample", "none"]
PAPER = (
    "Zeng, Dai, Xia: Corrdrop: Correlation Based Dropout for Convolutional Neural Networks, ICASSP 2020; Zeng et al.: "
    "Correlation-based structural dropout for convolutional neural networks, Pattern Recognition 120, 2021"
)
MAX_UNITS = 4096
_NEVER_NEGATIVE = {"relu", "sigmoid", "softmax"}
_WIDE = (torch.float32, torch.float64)
_PART = 1 << 19  # elements that are worked on at once on the CPU, where they stay in the cache
_PART_ELSEWHERE = 1 << 24
_TABLE = 1 << 13  # entries of a table that adds up blocks faster than pooling does
_ROWS = 128  # units that are multiplied with the others at once on the CPU


def scores(x: Tensor, axis: int, block: int, nonnegative: bool) -> Tensor:
    """Return F (B, N) of the channels of `x`, which are at `axis`, or if `block` is not 0, of its blocks.

    Blocks are `block` x `block` cells of the map, from its top left on; what its border leaves of one counts as one.
    `nonnegative` promises that no element is below 0, which saves multiplying all pairs of units.
    """
    fixed = x.detach()
    if is_traced(fixed) and not is_transformed():
        found: Tensor = correlation_scores(fixed, axis, block, nonnegative)
        return found
    return _scores(fixed, axis, block, nonnegative)


# An operator where something traces: its parts are as many as the sizes ask for.
@torch.library.custom_op("dropsurgery::correlation_scores", mutates_args=())
def correlation_scores(x: Tensor, axis: int, block: int, nonnegative: bool) -> Tensor:
    """Do what `scores` does."""
    return _scores(x, axis, block, nonnegative)


@correlation_scores.register_fake
def _(x: Tensor, axis: int, block: int, nonnegative: bool) -> Tensor:
    size = list(x.shape)
    batch, channels = size.pop(0), size.pop(axis % x.dim() - 1)
    units = math.prod(grid(size, block)) if block else channels
    return x.new_empty((batch, units), dtype=torch.promote_types(x.dtype, torch.float32))


def grid(size: Sequence[int], block: int) -> tuple[int, ...]:
    """How many blocks there are along each axis of a map of `size`."""
    return tuple((length + block - 1) // block for length in size)


@torch.no_grad()
def _scores(x: Tensor, axis: int, block: int, nonnegative: bool) -> Tensor:
    maps = x.movedim(axis, 1)
    samples = (_PART if x.is_cpu else _PART_ELSEWHERE) // max(1, _made(maps, block, nonnegative))
    samples = 1 << max(1, samples).bit_length() - 1  # a power of two is shared evenly by threads
    with full_precision(x.device.type):
        return torch.cat([_of_units(_units(part, block), nonnegative) for part in torch.split(maps, samples)])


def _made(maps: Tensor, block: int, nonnegative: bool) -> int:
    """How many elements are made on the way for each sample, at the most at a time."""
    channels, *size = maps.shape[1:]
    units, width = (math.prod(grid(size, block)), channels) if block else (channels, math.prod(size))
    widened = 0 if maps.dtype in _WIDE else channels * math.prod(size)
    if nonnegative:
        return max(widened, units * width if block else 0)
    return max(widened, units * width, units * min(units, _ROWS))


def _units(maps: Tensor, block: int) -> Tensor:
    """Maps (B, C, ...) → (B, N, K): their channels, or their blocks."""
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if not block:
        return wide.flatten(2)
    # A sum of finite numbers need not be finite: of such a block, this channel says nothing.
    return _means(wide, block).nan_to_num(0.0, 0.0, 0.0)


def _means(maps: Tensor, block: int) -> Tensor:
    """(B, C, H, W) → (B, N, C): the mean of each block, or its sum, which for the score is the same."""
    size = maps.shape[2:]
    if maps.is_contiguous() and math.prod(size) * math.prod(grid(size, block)) <= _TABLE:
        down, right = (_members(length, block, maps) for length in size)
        return torch.kron(down, right) @ maps.flatten(2).mT
    return F.avg_pool2d(maps, block, ceil_mode=True, count_include_pad=False).flatten(2).mT


def _members(length: int, block: int, like: Tensor) -> Tensor:
    """Which cells of an axis are in each block: (blocks, length) of 0 and 1."""
    (count,) = grid((length,), block)
    blocks, cells = (torch.arange(size, device=like.device) for size in (count, length))
    return (blocks[:, None] == cells // block).to(like.dtype)


def _of_units(units: Tensor, nonnegative: bool) -> Tensor:
    """Units (B, N, K) → F (B, N)."""
    norm: Tensor = torch.linalg.vector_norm(units, dim=-1, keepdim=True)
    live = (norm > math.sqrt(torch.finfo(norm.dtype).tiny)) & (norm < math.inf)
    inverse = torch.where(live, 1 / norm, 0.0)
    if nonnegative:  # with no sign to be taken off, the products' sum is the product with the sum
        sums = torch.where(live, ((inverse.mT @ units) @ units.mT).mT * inverse, 0.0).squeeze(-1)
    else:
        sums = _sums(units * inverse)
    # The diagonal of P has 0 where that of the product has 1, and 1 for a row of zeros.
    return ((sums + 1 - 2 * live.squeeze(-1).to(sums.dtype)) / max(1, units.shape[1])).clamp(min=0)


def _sums(rows: Tensor) -> Tensor:
    """Rows (B, N, K) → the sums of their products' absolute values with all of them, (B, N)."""
    samples, count, _ = rows.shape
    most = _ROWS if rows.is_cpu else max(1, _PART_ELSEWHERE // max(1, samples * count))
    sums = rows.new_zeros(samples, count)
    for begin in range(0, count, most):
        end = begin + most
        # What lies before was multiplied with these rows already.
        products = (rows[:, begin:end] @ rows[:, begin:].mT).abs_()
        sums[:, begin:end] += products.sum(-1)
        if end < count:
            sums[:, end:] += products[:, :, most:].sum(1)
    return sums


def protection(found: Tensor, gamma: Gamma) -> Tensor:
    """Return the probability of each unit's M to be 1, 1 - gamma in the paper: (B, N) scores → (B, N)."""
    if gamma == "softmax" or found.shape[-1] == 1:  # the softmax of one is 1
        return found.softmax(-1)
    low, high = found.amin(-1, keepdim=True), found.amax(-1, keepdim=True)
    spread = high - low
    # What rounding makes of equal scores is no difference between them.
    alike = spread <= 16 * torch.finfo(found.dtype).eps
    return torch.where(alike, 0.5, (found - low) / torch.where(alike, 1.0, spread))


def kept_units(found: Tensor, p: Tensor, drawn: Tensor, gamma: Gamma, scope: Scope) -> Tensor:
    """Return S, bool (B, N), for scores (B, N) and uniform numbers (2, B, N): the first for M, the second for B."""
    protected = drawn[0] < protection(found, gamma)
    groups = (0, 1) if scope == "batch" else (1,)
    candidates = protected.logical_not().to(torch.float32).mean(groups, keepdim=True)
    # Above 1 it drops all of them, as 1 does; where there are none, any rate will do.
    rate = p / candidates.clamp(min=torch.finfo(torch.float32).tiny)
    return protected | (drawn[1] >= rate)


def rescaled(kept: Tensor, rescale: Rescale) -> Tensor:
    """Return what is kept, bool (B, ...), as factors: 0 where dropped, else numel / sum of the batch or the sample."""
    mask = kept.to(torch.float32)
    if rescale == "none":
        return mask
    left = mask.mean(tuple(range(rescale == "sample", mask.dim())), keepdim=True)
    return torch.where(left > 0, mask / left.clamp(min=torch.finfo(torch.float32).tiny), 1.0)


def expected_share(p: float, batch: int, units: int, gamma: Gamma, scope: Scope, rescale: Rescale) -> float:
    """Return the expected share of dropped units where all units of a sample have the same score.

    It is p but where most units are protected, so that less than p is left to be dropped, and where a group may
    lose all of its units, so that it keeps all instead.
    """
    if units < 2 or p == 0:
        return 0.0
    protect = 1 / units if gamma == "softmax" else 0.5
    every = batch * units
    group = every if scope == "batch" else units
    share = sum(chance * min(p, 1 - m / group) for m, chance in _binomial(group, protect))
    if rescale == "none":
        return share
    saved = every if rescale == "batch" else units
    if scope == "sample":
        return share - ((1 - protect) * p) ** saved
    others = _binomial(every - saved, protect)
    return share - sum(chance * ((1 - protect) * min(1.0, p * every / (every - m))) ** saved for m, chance in others)


def _binomial(n: int, p: float) -> list[tuple[int, float]]:
    """The numbers of hits in `n` tries that are at all likely, each with its probability."""
    mean, reach = n * p, 10 * math.sqrt(n * p * (1 - p)) + 20
    likely = range(max(0, math.floor(mean - reach)), min(n, math.ceil(mean + reach)) + 1)
    hit, miss, tries = math.log(p), math.log1p(-p), math.lgamma(n + 1)
    logs = (tries - math.lgamma(m + 1) - math.lgamma(n - m + 1) + m * hit + (n - m) * miss for m in likely)
    return [(m, math.exp(log)) for m, log in zip(likely, logs, strict=True)]


def check_options(gamma: Gamma, rescale: Rescale, scope: Scope) -> None:
    """A SurgeryError unless each option is one of its words."""
    require(gamma in ("softmax", "minmax"), "gamma", "'softmax' or 'minmax'", gamma)
    require(rescale in ("batch", "sample", "none"), "rescale", "'batch', 'sample' or 'none'", rescale)
    require(scope in ("batch", "sample"), "scope", "'batch' or 'sample'", scope)


class CorrDrop(MapRegularizer):
    """What the layers of both forms share: the options, and what `build` has to see to.

    Attributes:
        unit: what is dropped as one.
        remedy: what to do where there are too many units.
        nonnegative: whether the input is known to have no element below 0, by where it comes from.
    """

    paper = PAPER
    unit: ClassVar[str]
    remedy: ClassVar[str]

    p: Tensor
    nonnegative: bool = False

    def __init__(self, p: float, gamma: Gamma, rescale: Rescale, scope: Scope, max_units: int) -> None:
        super().__init__(p=p)
        check_options(gamma, rescale, scope)
        check_count("max_units", max_units, 2)
        self.gamma: Gamma = gamma
        self.rescale: Rescale = rescale
        self.scope: Scope = scope
        self.max_units = max_units

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError unless there are units to choose from, and no more than `max_units`."""
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)
        name, count = type(self).__module__.rpartition(".")[2], self.units(shape)
        if not 2 <= count <= self.max_units:
            raise SurgeryError(
                f"{name} at {site_id}: expected 2 to {self.max_units} {self.unit} in a sample, got {count} for shape "
                f"{shape}; {self.remedy if count > self.max_units else 'use dropout there'}"
            )
        self.nonnegative = not _NEVER_NEGATIVE.isdisjoint(self.producer)

    def units(self, shape: tuple[int, ...]) -> int:
        """Return how many units a sample of an input of `shape` has."""
        raise NotImplementedError

    def rate(self, shape: tuple[int, ...]) -> float:
        """Return the probability that the draw is asked to drop units of an input of `shape` with."""
        return self._rates["p"]

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return the expected share of dropped elements where all scores of a sample are alike.

        By "minmax" it is less where so many units are protected that the rest is less than the share asked for.
        """
        options = self.gamma, self.scope, self.rescale
        return expected_share(self.rate(shape), max(1, shape[0]), self.units(shape), *options)

    def extra_repr(self) -> str:
        """Return the rate, and the options that differ from the authors'."""
        usual = {"gamma": "softmax", "rescale": "batch", "scope": "batch", "max_units": MAX_UNITS}
        changed = [f"{name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value]
        return ", ".join([super().extra_repr(), *changed])
