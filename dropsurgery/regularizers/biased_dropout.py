"""Biased dropout: drop what is large less often than what is small (Poernomo & Kang, Neural Networks 104:60-67, 2018).

    x (B, ...) → x * M / (1 - P)      M ~ Bernoulli(1 - P), one draw an element
    P = p - delta in the half of a sample's elements with the larger |x|, p + delta in the other half

Units of large activation say more and are kept more often; the others make up for it, so that p is dropped in all.
doi 10.1016/j.neunet.2018.03.016. Placement: on the outputs of hidden layers; recipe biased_dropout_vgg. Not verified in
the paper, and the reading taken here: groups of equal size (of an odd number of elements the larger group is the low
one), rates at equal distance from p, and the scale in training. Of equal elements the first count as larger. Where p is
so near to 0 or 1 that p - delta or p + delta would leave [0, 1], delta is cut down for both.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._blocks import by_samples, in_parts
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import is_traced, is_transformed
from dropsurgery.regularizers._uniform import uniform


def biased_dropout(x: Tensor, p: float | Tensor, delta: float = 0.2, *, key: Tensor | None = None) -> Tensor:
    """Drop the larger half of each sample of `x` (B, ...) at `p - delta`, the smaller at `p + delta`, and rescale.

    `key`, a 0-dim int64 CPU tensor, is what the random numbers depend on; None for torch's global generator.
    A SurgeryError if `x` has fewer than two dimensions, or a number is out of its range.
    """
    require(x.dim() >= 2, "input of biased_dropout", "2 dimensions (B, ...) or more", tuple(x.shape))
    _check(delta)
    rate = rate_tensor(p, x.device)
    if x.numel() == 0:
        return x.clone()
    spread = torch.minimum(rate, 1 - rate).clamp(max=delta)
    rates = rate - spread, rate + spread
    marks = _marks(x.detach(), uniform(x.shape, x.device, key), *rates)
    # Of a group that is dropped as a whole nothing is left to be scaled.
    scales = (1 / (1 - each).clamp(min=torch.finfo(each.dtype).eps) for each in rates)
    if is_transformed():
        return x * _factor(marks, *scales).to(x.dtype)
    y: Tensor = _Marked.apply(x, marks, *scales)
    return y


class BiasedDropout(Regularizer):
    """`biased_dropout` as a layer; identity in eval."""

    paper = "Poernomo, Kang: Biased Dropout and Crossmap Dropout, Neural Networks 104, 2018"
    summary = "drops elements, those of large magnitude less often"
    placement = "on the outputs of hidden layers: recipe biased_dropout_vgg"
    shapes = "any shape (B, ...) of 2 dimensions or more"
    examples = ({"p": 0.5}, {"p": 0.3, "delta": 0.3}, {"p": 0.1, "delta": 0.05})
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden", dependence="sample")

    p: Tensor

    def __init__(self, p: Rate = 0.5, delta: Annotated[float, Ge(0), Le(0.5)] = 0.2) -> None:
        super().__init__(p=p)
        _check(delta)
        self.delta = float(delta)

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError unless there are samples to rank the elements of."""
        if len(shape) < 2:
            raise SurgeryError(f"biased_dropout at {site_id}: expected (B, ...), got {shape}; use dropout there")
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with elements dropped; `x` itself when not active."""
        return biased_dropout(x, self.p, self.delta, key=self.next_key()) if self.active else x

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, and a little more where the low half has an element more than the other."""
        p, units = self._rates["p"], max(1, math.prod(shape[1:]))
        return p + min(self.delta, p, 1 - p) * (units % 2) / units

    def extra_repr(self) -> str:
        """Return the rate and how far the two groups are from it."""
        return f"{super().extra_repr()}, delta={self.delta:g}"


def _check(delta: float) -> None:
    is_number = isinstance(delta, int | float) and not isinstance(delta, bool)
    require(is_number and 0 <= delta <= 0.5, "delta", "a number in [0, 0.5]", delta)


def _larger_half(x: Tensor) -> Tensor:
    """Whether each element is in the half of its sample with the larger magnitudes; of equals the first."""
    size = x.flatten(1).abs()
    size = size if x.itemsize > 2 else size.float()
    units = size.shape[1]
    half = units // 2
    # A sort is what other devices do fast, and alike at each run; on the CPU it takes six times as long.
    rank = units - half
    level = size.kthvalue(rank, 1, keepdim=True)[0] if x.is_cpu else size.sort(1)[0][:, rank - 1 : rank]
    above, equal = size > level, size == level
    missing = half - above.sum(1, keepdim=True)
    return (above | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))).view(x.shape)


def _marks(x: Tensor, drawn: Tensor, *rates: Tensor) -> Tensor:
    """Bytes: 1 for what is kept of the larger half of each sample, 2 of the other, 0 for what is dropped."""
    if is_traced(x):
        return _marks_at_once(x, drawn, *rates)
    # A part at a time: to rank the elements takes ten bytes for each.
    return torch.cat([_marks_at_once(*part, *rates) for part in by_samples(x, drawn)])


def _marks_at_once(x: Tensor, drawn: Tensor, high_rate: Tensor, low_rate: Tensor) -> Tensor:
    high = _larger_half(x)
    kept_high, kept_low = high & (drawn >= high_rate), ~high & (drawn >= low_rate)
    return kept_high.to(torch.uint8) + 2 * kept_low.to(torch.uint8)


class _Marked(torch.autograd.Function):
    """Times a scale where `marks` is 1, another where it is 2, and zero elsewhere; keeps a byte an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, marks: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(marks, first, second)
        return _scaled(x, marks, first, second)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Marked.apply(grad, *ctx.saved_tensors), None, None, None


def _scaled(x: Tensor, marks: Tensor, first: Tensor, second: Tensor) -> Tensor:
    if is_traced(x):
        return x * _factor(marks, first, second).to(x.dtype)
    y = torch.empty_like(x)
    for made, part, bits in in_parts(y, x, marks):
        torch.mul(part, _factor(bits, first, second).to(x.dtype), out=made)
    return y


def _factor(marks: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.where(marks == 1, first, torch.where(marks == 2, second, torch.zeros_like(first)))
