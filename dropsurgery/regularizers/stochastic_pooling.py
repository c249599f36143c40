"""Stochastic pooling: pick one element of each window, by its share (Zeiler and Fergus 2013, arXiv:1301.3557).

    training:  y = a_l, l drawn with probability a_l / sum a     a: the elements of a window, never negative
    eval:      y = sum a^2 / sum a                               the mean of that draw
    a window of zeros gives 0

One draw a sample, channel and window. It stands in for a max or average pooling layer and keeps its windows:
kernel, stride, padding (padded elements are never picked), dilation and `ceil_mode`. The paper has no rate: p is
the probability that a window is pooled so and not as the layer does, 1 by default, at which this is the paper's;
eval is the mean over that too. Negative elements are refused where that costs no wait for the device, in eager
mode on the CPU; elsewhere they are taken for zeros.

Placement: each pooling layer behind a ReLU; recipe stochastic_pooling_vgg.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer
from dropsurgery.regularizers._hosts import own_class, require_host
from dropsurgery.regularizers._maps import may_be_negative
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import is_traced
from dropsurgery.regularizers._uniform import uniform

Sizes = int | Sequence[int]
_MAX = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_FORWARDS: tuple[Any, ...] = tuple(cls.forward for cls in (*_MAX, *_AVERAGE))
_SCALE = 2.0**-16  # so that no window's sum overflows


def stochastic_pool(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    *,
    key: Tensor | None = None,
) -> Tensor:
    """Pick one element of each window of `x` (B, C, ...), with the probability of its share in the window's sum.

    Windows are those of `torch.nn.functional.max_pool2d`, on as many axes as `x` has behind the second; as tuples,
    sizes say themselves on how many. What is negative counts as 0. `key`, a 0-dim int64 CPU tensor, is what the
    random numbers depend on; None for torch's global generator.
    """
    windows = _windows(x, kernel_size, stride, padding, dilation, ceil_mode)
    size = tuple(x.shape[-len(windows.kernel) :])
    counts = windows.counts(size)
    draws = uniform([*x.shape[: -len(size)], *counts], x.device, key)
    if _is_channels_last(x, len(size)):
        return _pick(x.movedim(1, -1), windows, counts, 1, draws.movedim(1, -1)).movedim(-1, 1)
    return _pick(x, windows, counts, x.dim() - len(size), draws)


def weighted_pool(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Return the mean of `stochastic_pool`: sum a^2 / sum a over the elements a of each window; 0 where all are 0."""
    windows = _windows(x, kernel_size, stride, padding, dilation, ceil_mode)
    first = x.dim() - len(windows.kernel)
    counts = windows.counts(tuple(x.shape[first:]))
    wide = _padded(x, windows, counts, first).to(torch.promote_types(x.dtype, torch.float32)).relu()
    cells = _cells(wide, windows, counts, first)
    with torch.no_grad():  # the result does not depend on it: it keeps squares from over- and underflow
        top = cells[0]
        for cell in cells[1:]:
            top = torch.maximum(top, cell)
        top = top.clamp(min=torch.finfo(top.dtype).tiny)
    mass = energy = torch.zeros_like(top)
    for cell in cells:
        share = cell / top
        mass, energy = mass + share, energy + share * share
    return (top * (energy / mass.clamp(min=0.5))).to(x.dtype)  # a window's mass is 0, or 1 and more


class StochasticPooling(Regularizer):
    """`stochastic_pool` in place of a pooling layer's forward; in eval `weighted_pool`."""

    kind = "swap"
    paper = (
        "Zeiler, Fergus: Stochastic Pooling for Regularization of Deep Convolutional Neural Networks, arXiv:1301.3557"
    )
    summary = "pools each window by picking one element with the probability of its share"
    placement = "in place of max or average pooling behind a ReLU; recipe stochastic_pooling_vgg"
    shapes = "what the layer takes, without negative elements"
    needs = "a max or average pooling layer (not an adaptive one) behind a ReLU"
    examples = ({"p": 0.5}, {"p": 0.9})
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden", dependence="sample")
    drops = "other"
    uncounted = "what is picked may be what the layer would give"
    eval_rule = "sum a^2 / sum a over each window, mixed with the layer's own pooling by p"

    p: Tensor

    def __init__(self, p: Rate = 1.0) -> None:
        super().__init__(p=p)
        # A flag of its own, as of `_nonzero`: the rate's value guards no compiled forward.
        self._always = self._rates["p"] == 1

    def set_rate(self, name: str, value: float) -> None:
        """Set the rate, in place."""
        super().set_rate(name, value)
        self._always = self._rates["p"] == 1

    @staticmethod
    def example_host() -> nn.Module:
        """Return a small layer for tests."""
        return nn.MaxPool2d(3, stride=2, padding=1)

    @staticmethod
    def example_inputs(batch: int) -> tuple[Tensor, ...]:
        """Return an input for that layer."""
        return (torch.randn(batch, 6, 14, 14).relu(),)

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError where what comes before the layer is known to give negative elements."""
        if may_be_negative(self.producer):
            raise SurgeryError(
                f"stochastic_pooling at {site_id}: expected an input that is never negative (that of a ReLU), got "
                f"that of {' '.join(self.producer)}; leave this layer as it is (`where: {{exclude: …}}`)"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def bind(self, host: nn.Module) -> None:
        """Stand in for a max or average pooling layer; a SurgeryError where it is none, or gives indices too."""
        known = isinstance(host, (*_MAX, *_AVERAGE)) and own_class(host).forward in _FORWARDS
        known = known and not getattr(host, "return_indices", False)
        expected = "a max or average pooling layer of torch with a kernel and without `return_indices`"
        require_host(known, "stochastic_pooling", self.site_id, expected, host)
        super().bind(host)

    def forward(self, input: Tensor) -> Tensor:
        """Return the windows pooled; the layer's own result at p = 0."""
        if not self._nonzero:
            own: Tensor = self.own(input)
            return own
        self._refuse_negative(input)
        windows = self._windows()
        if not (self.training or self.forced):
            mean = weighted_pool(input, *windows)
            return mean if self._always else torch.lerp(self.own(input), mean, self.p.to(mean.dtype))
        picked = stochastic_pool(input, *windows, key=self.next_key())
        if self._always:
            return picked
        # In the layout of the result: torch.where goes by its first argument.
        chosen = torch.empty_like(picked, dtype=torch.float32)
        chosen.copy_(uniform(picked.shape, picked.device, self.next_key()))
        return torch.where(chosen < self.p, picked, self.own(input))

    def _windows(self) -> tuple[Any, ...]:
        host: Any = self.bound()
        axes = next(axes for axes in (1, 2, 3) if isinstance(host, (_MAX[axes - 1], _AVERAGE[axes - 1])))
        dilation = getattr(host, "dilation", 1)
        sizes = (_each(size, axes) for size in (host.kernel_size, host.stride, host.padding, dilation))
        return *sizes, host.ceil_mode

    def _refuse_negative(self, x: Tensor) -> None:
        if x.device.type == "cpu" and not is_traced(x) and x.numel() and float(x.detach().amin()) < 0:
            raise SurgeryError(
                f"stochastic_pooling at {self.site_id or 'a layer'}: expected an input that is never negative (that of "
                "a ReLU), got negative elements; leave this layer as it is (`where: {exclude: …}`)"
            )

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, the share of the windows that are not pooled as the layer does."""
        return self._rates["p"]


class _Windows(NamedTuple):
    """Where a pooling layer looks, each by axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool

    def counts(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """How many windows there are on each axis of a map of `size`."""
        return tuple(map(self._count, size, self.kernel, self.stride, self.padding, self.dilation))

    def _count(self, length: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
        room = length + 2 * padding - dilation * (kernel - 1) - 1
        count = (room + (stride - 1 if self.ceil_mode else 0)) // stride + 1
        # With `ceil_mode`, no window begins in the padding at the end.
        return count - (self.ceil_mode and (count - 1) * stride >= length + padding)


def _each(size: Sizes, axes: int) -> tuple[int, ...]:
    return (size,) * axes if isinstance(size, int) else tuple(size)


def _windows(
    x: Tensor, kernel_size: Sizes, stride: Sizes | None, padding: Sizes, dilation: Sizes, ceil_mode: bool
) -> _Windows:
    given = (kernel_size, kernel_size if stride is None else stride, padding, dilation)
    axes = next((len(size) for size in given if not isinstance(size, int)), x.dim() - 2)
    kernel, step, pad, gap = (_each(size, axes) for size in given)
    return _Windows(kernel, step, pad, gap, ceil_mode)


def _is_channels_last(x: Tensor, axes: int) -> bool:
    if axes == 1 or x.dim() != axes + 2 or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last if axes == 2 else torch.channels_last_3d)


def _padded(x: Tensor, windows: _Windows, counts: Sequence[int], first: int) -> Tensor:
    """`x` with zeros around its spatial axes, the first of which is `first`, as far as windows reach."""
    room = [0, 0] * (x.dim() - first - len(counts))  # F.pad has the last axis first
    for axis in reversed(range(len(counts))):
        reach = (counts[axis] - 1) * windows.stride[axis] + windows.dilation[axis] * (windows.kernel[axis] - 1) + 1
        before = windows.padding[axis]
        room += [before, max(0, reach - before - x.shape[first + axis])]
    return F.pad(x, room) if any(room) else x


def _cells(padded: Tensor, windows: _Windows, counts: Sequence[int], first: int) -> list[Tensor]:
    """The first elements of all windows, the second ones, and so on: views of `padded`."""
    views = []
    for position in itertools.product(*map(range, windows.kernel)):
        slices = [slice(None)] * first
        for at, gap, step, count in zip(position, windows.dilation, windows.stride, counts, strict=True):
            slices.append(slice(at * gap, at * gap + (count - 1) * step + 1, step))
        views.append(padded[tuple(slices)])
    return views


def _pick(x: Tensor, windows: _Windows, counts: Sequence[int], first: int, draws: Tensor) -> Tensor:
    padded = _padded(x, windows, counts, first)
    last = first + len(counts) - 1
    index = _picked(padded.detach(), windows, counts, first, draws)
    picked = padded.flatten(first, last).gather(first, index.flatten(first, last)).view(index.shape)
    return picked.relu()  # a window without positive elements gives 0


def _picked(padded: Tensor, windows: _Windows, counts: Sequence[int], first: int, draws: Tensor) -> Tensor:
    """Where in the flattened map the element of each window lies that the draw, in [0, 1), falls on."""
    wide = torch.promote_types(padded.dtype, torch.float32)
    cells = _cells(padded.to(wide).clamp(min=0) * _SCALE, windows, counts, first)
    total = cells[0].clone()
    for cell in cells[1:]:
        total += cell
    total *= draws
    sizes = padded.shape[first : first + len(counts)]
    jumps = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]  # from a row to the next, and so on
    index = torch.zeros_like(total, dtype=torch.int64)
    for axis, (count, step, jump) in enumerate(zip(counts, windows.stride, jumps, strict=True)):
        starts = torch.arange(count, device=padded.device) * (step * jump)
        index += starts.view(-1, *[1] * (index.dim() - first - axis - 1))
    positions = itertools.product(*map(range, windows.kernel))
    steps = [gap * jump for gap, jump in zip(windows.dilation, jumps, strict=True)]
    places = [sum(map(operator.mul, position, steps)) for position in positions]
    passed = cells[0].clone()
    for number in range(1, len(cells)):  # past each element that the draw lies behind, on to the next
        index.add_(passed <= total, alpha=places[number] - places[number - 1])
        passed += cells[number]
    return index
