"""ShakeDrop: a random factor on a residual branch, and another on its gradient (Yamada et al. 2018, arXiv:1802.02375).

    x → x * (b + a - b * a)      in training; its gradient is multiplied by b + c - b * c instead
    x → x * (1 - p + p * E[a])   in eval

b ~ Bernoulli(1 - p) is the gate, one draw a batch: open (1), the branch is as it was, forward and backward; closed
(0), it is multiplied by a, uniform in `forward_range`, and its gradient by c, uniform in `backward_range`, drawn on
its own. `level` says what one draw of a and of c holds for: the batch, a sample ("image"), one of its channels, or a
single element ("pixel", as in the paper, "in each element"). The paper calls a and c alpha and beta, and 1 - p is
its p_l; it found [-1, 1] with [0, 1] best, and alpha = 0 with [0, 1] ([0, 0] here). As the mean of a in [-1, 1] is
0, eval multiplies by p_l. The gradient's factor is fixed when forward has run: backward run twice meets it again.

Placement: at the end of each residual branch, behind its last BatchNorm and before the sum. A branch that does not
end in a norm is refused: without one, training is said to diverge. p grows linearly with depth to 0.5 at the last
block, 1 - p_l = l / L * 0.5 (recipes/shakedrop_resnet.yaml).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._blocks import fresh_key
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import is_traced, is_transformed
from dropsurgery.regularizers._uniform import uniform

Level = Literal["batch", "image", "channel", "pixel"]
Range = tuple[float, float]
_LEVELS = ("batch", "image", "channel", "pixel")


def shakedrop(
    x: Tensor,
    p: float | Tensor,
    level: Level = "pixel",
    *,
    forward_range: Range = (-1.0, 1.0),
    backward_range: Range = (0.0, 1.0),
    channel_axis: int = 1,
    key: Tensor | None = None,
) -> Tensor:
    """With probability `p`, multiply `x` (B, ...) by random numbers and its gradient by others.

    `level`: what one number holds for; channels are those of `channel_axis`. `key`, a 0-dim int64 CPU tensor, is what
    all random numbers depend on; None for torch's global generator. A SurgeryError for an unknown level, a range that
    is none, or `p` a number out of [0, 1].
    """
    _check(level, forward_range, backward_range)
    gate = uniform((), x.device, key) >= rate_tensor(p, x.device)
    if is_transformed():
        return _shaken_at_once(x, gate, _shape_of(level, x.shape, channel_axis), key, (forward_range, backward_range))
    # Backward draws its numbers from a key: none have to be kept, and a second time they are the same. One that
    # forward has used too: a compiler would ask for another one inside backward, where the answer is an older one.
    forth, back = (None, fresh_key()) if key is None else (key + 1, key + 2)
    if _can_look(gate) and bool(gate):  # saves the numbers
        return x
    shape = _shape_of(level, x.shape, channel_axis)
    factor = _factor(gate, shape, forth, forward_range, x)
    y: Tensor = _Shaken.apply(x, factor, gate, back, shape, backward_range)
    return y


def _shaken_at_once(
    x: Tensor, gate: Tensor, shape: Sequence[int], key: Tensor | None, ranges: tuple[Range, Range]
) -> Tensor:
    """The same with the numbers of backward drawn in forward, and kept: a transform knows no later draws."""
    keys = (None, None) if key is None else (key + 1, key + 2)
    opened = gate.float()
    factors = []
    for each, (low, high) in zip(keys, ranges, strict=True):
        numbers = low + (high - low) * uniform(shape, x.device, each)
        factors.append((opened + (1 - opened) * numbers).to(x.dtype))
    y: Tensor = _Twofold.apply(x, *factors)
    return y


class _Twofold(torch.autograd.Function):
    """x times a factor, and its gradient times another one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, forth: Tensor, back: Tensor) -> Tensor:
        return x * forth

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.saved_tensors[0], None, None


def _shape_of(level: Level, shape: Sequence[int], channel_axis: int) -> list[int]:
    """How many numbers there are along each axis."""
    if level == "pixel":
        return list(shape)
    sizes = [1] * len(shape)
    if level != "batch":
        sizes[0] = shape[0]
    if level == "channel":
        sizes[channel_axis] = shape[channel_axis]
    return sizes


def _factor(gate: Tensor, shape: Sequence[int], key: Tensor | None, bounds: Range, like: Tensor) -> Tensor:
    """Return 1 where the gate is open, else numbers in `bounds`, in the dtype of `like`."""
    low, high = bounds
    if low == high:
        return torch.where(gate, 1.0, low).to(like.dtype)
    opened = gate.float()
    # Where the gate is open, 0 * number + 1.
    span, start = (1 - opened) * (high - low), (1 - opened) * low + opened
    if like.device.type != "cpu":
        return uniform(shape, like.device, key).mul_(span).add_(start).to(like.dtype)
    steps: Tensor = keyed_steps(shape, fresh_key() if key is None else key)
    return steps.float().mul_(span / 2**16).add_(start + span * (2**15 + 0.5) / 2**16).to(like.dtype)


# Of 65536 values, in a third of the time that uniform float32 take: with level "pixel" they are nearly all the cost.
@torch.library.custom_op("dropsurgery::keyed_steps", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def keyed_steps(shape: Sequence[int], key: Tensor) -> Tensor:
    """Return random int16, all values alike, from a generator of their own on the CPU, seeded with `key`."""
    count = math.prod(shape)
    generator = torch.Generator().manual_seed(int(key))
    words = torch.empty(count // 4 + 1, dtype=torch.int64, device="cpu").random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].view(shape)


@keyed_steps.register_fake
def _(shape: Sequence[int], key: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.int16, device="cpu")


def _can_look(gate: Tensor) -> bool:
    """Whether the value of a tensor costs nothing and is not to be kept open for a compiler or tracer."""
    return gate.device.type == "cpu" and not is_traced(gate)


class _Shaken(torch.autograd.Function):
    """x times a factor; the gradient times numbers that are drawn when they are needed."""

    @staticmethod
    def forward(x: Tensor, factor: Tensor, gate: Tensor, key: Tensor, shape: Sequence[int], bounds: Range) -> Tensor:
        return x * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, gate, key, ctx.shape, ctx.bounds = inputs
        ctx.save_for_backward(gate, key)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, key = ctx.saved_tensors
        drawn = None if grad.is_meta else key  # a generator has no place on the meta device
        return grad * _factor(gate, ctx.shape, drawn, ctx.bounds, grad), None, None, None, None, None


class ShakeDrop(Regularizer):
    """`shakedrop` as a layer, to be put at the end of a residual branch."""

    paper = "Yamada et al.: ShakeDrop Regularization for Deep Residual Learning, IEEE Access 2019, arXiv:1802.02375"
    summary = "multiplies residual branches by random numbers, and their gradients by others"
    placement = "at the end of residual branches, behind their last norm, p growing with depth: recipe shakedrop_resnet"
    shapes = "any shape (B, ...); level 'channel': a known channel axis"
    needs = "a norm as the last operation of the branch"
    examples = (
        {"p": 0.5},
        {"p": 0.2, "level": "batch"},
        {"p": 0.5, "level": "image"},
        {"p": 0.5, "level": "channel", "forward_range": (0.0, 0.5)},
    )
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden")
    drops = "other"

    p: Tensor

    def __init__(
        self,
        p: Rate = 0.5,
        level: Level = "pixel",
        forward_range: tuple[float, float] = (-1.0, 1.0),
        backward_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(p=p)
        _check(level, forward_range, backward_range)
        self.level: Level = level
        self.forward_range = forward_range
        self.backward_range = backward_range
        mean = sum(forward_range) / 2
        self.eval_rule = f"times 1 - p + p * {mean:g}" if mean else "times 1 - p"

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError where the branch is known to end in something else than a norm."""
        if self.producer and "norm" not in self.producer:
            raise SurgeryError(
                f"shakedrop at {site_id}: expected a branch that ends in a norm, got one that ends in "
                f"{self.producer[-1].replace('_', ' ')}, behind which training is unstable; use stochastic_depth there"
            )
        if not shape or (self.level == "channel" and channel_axis is None):
            wanted = "a known channel axis for level 'channel'" if shape else "a batch (B, ...)"
            raise SurgeryError(
                f"shakedrop at {site_id}: expected {wanted}, got a tensor of shape {shape} with channel axis "
                f"{channel_axis}; use level 'image' there, or leave this site out (`where: {{exclude: …}}`)"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, shaken while the gate is closed; in eval times the expected factor."""
        if self.active:
            return shakedrop(
                x,
                self.p,
                self.level,
                forward_range=self.forward_range,
                backward_range=self.backward_range,
                channel_axis=self.channel_axis,
                key=self.next_key(),
            )
        return x * (1 - self.p * (1 - sum(self.forward_range) / 2)) if self._nonzero else x

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p: the share of batches in which the branch is shaken."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate, the level and the ranges."""
        ranges = f"forward_range={self.forward_range}, backward_range={self.backward_range}"
        return f"{super().extra_repr()}, level={self.level!r}, {ranges}"


def _check(level: object, *ranges: object) -> None:
    require(level in _LEVELS, "level", f"one of {_LEVELS}", level)
    for bounds in ranges:
        pair = isinstance(bounds, tuple | list) and len(bounds) == 2
        numbers = pair and all(isinstance(each, int | float) and not isinstance(each, bool) for each in bounds)  # type: ignore[attr-defined]
        holds = numbers and float("-inf") < bounds[0] <= bounds[1] < float("inf")  # type: ignore[index]
        require(bool(holds), "range", "two numbers in rising order", bounds)
