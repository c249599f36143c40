"""Router input jitter: multiply what a gate reads by numbers near 1 (Fedus, Zoph, Shazeer 2021, arXiv:2101.03961).

    x (..., d) → x * U      U uniform in [1 - epsilon, 1 + epsilon), one draw an element, in training

Of Switch Transformers: Hugging Face's have epsilon 0.01, its Mixtral 0, DeepSpeed's policy "Jitter" 0.01. Here the
gate alone reads the jittered numbers. Some implementations multiply in place, or before the block's input is shared, so
that the experts read them too; a model that has a jitter of its own keeps it, and needs no second one.

p, which the sources have not, is the share of tokens whose input is jittered: 1 is theirs, less is for schedules.
Nothing is dropped.

Placement: the input of a gate's linear layer (recipe router_jitter_switch).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._blocks import fresh_key
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import is_transformed
from dropsurgery.regularizers._uniform import uniform


def router_jitter(
    x: Tensor, p: float | Tensor = 1.0, epsilon: float = 0.01, *, channel_axis: int = -1, key: Tensor | None = None
) -> Tensor:
    """Multiply the elements of each token of `x` (..., d), with probability `p`, by numbers in 1 ± `epsilon`.

    `channel_axis` is the one of the d features. `key`, a 0-dim int64 CPU tensor, is what the random numbers depend on;
    None for torch's global generator. A SurgeryError if `p` is a number out of [0, 1], or `epsilon` out of [0, 1).
    """
    _check(epsilon)
    require(x.dim() > 0, "input of router_jitter", "tokens (..., d)", tuple(x.shape))
    rate = rate_tensor(p, x.device)
    axis = channel_axis % x.dim()
    if is_transformed():
        return _jittered(x, rate, epsilon, axis, key)
    if key is None:
        if x.device.type != "cpu":  # a key is read on the host, which a captured CUDA graph would do only once
            return _jittered(x, rate, epsilon, axis, None)
        key = fresh_key()
    y: Tensor = _DrawnTwice.apply(x, rate, epsilon, axis, key)
    return y


def factors(numbers: Tensor, p: Tensor, epsilon: float, shape: tuple[int, ...], axis: int) -> Tensor:
    """Return what each element of a `shape` is multiplied by, of uniform `numbers`: its elements', then its tokens'.

    They are made in the place of the numbers, so that no memory is taken besides.
    """
    tokens = [1 if i == axis else length for i, length in enumerate(shape)]
    count = numbers.numel() - torch.Size(tokens).numel()
    own, coins = numbers[:count].view(shape), numbers[count:].view(tokens)
    return own.mul_(2 * epsilon).add_(1 - epsilon).masked_fill_(coins >= p, 1.0)


def _jittered(x: Tensor, p: Tensor, epsilon: float, axis: int, key: Tensor | None) -> Tensor:
    tokens = torch.Size([1 if i == axis else length for i, length in enumerate(x.shape)]).numel()
    numbers = uniform((x.numel() + tokens,), x.device, key)
    y = x * factors(numbers, p, epsilon, tuple(x.shape), axis)
    # Not `y.to(x.dtype)` at once: where that gives `y` itself, compilers of torch 2.11 lose the gradient.
    return y if y.dtype == x.dtype else y.to(x.dtype)


class _DrawnTwice(torch.autograd.Function):
    """`_jittered`, whose numbers are drawn once more for backward instead of being kept: four bytes an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, epsilon: float, axis: int, key: Tensor) -> Tensor:
        ctx.save_for_backward(p.clone(), key)  # the rate may move before backward
        ctx.options = epsilon, axis
        return _jittered(x, p, epsilon, axis, key)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p, key = ctx.saved_tensors
        epsilon, axis = ctx.options
        return _jittered(grad, p, epsilon, axis, key), None, None, None, None


class RouterJitter(Regularizer):
    """`router_jitter` as a layer; identity in eval."""

    paper = "Fedus, Zoph, Shazeer: Switch Transformers, 2021, arXiv:2101.03961"
    summary = "multiplies what a gate reads by numbers near 1"
    placement = "the input of a gate's linear layer: recipe router_jitter_switch"
    shapes = "tokens (..., d)"
    needs = "a mixture of experts (pattern moe_gate)"
    examples = ({"p": 0.5}, {"p": 0.2, "epsilon": 0.3})
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden")
    drops = "other"

    p: Tensor

    def __init__(self, p: Rate = 1.0, epsilon: Annotated[float, Ge(0), Lt(1)] = 0.01) -> None:
        super().__init__(p=p)
        _check(epsilon)
        self.epsilon = epsilon
        self.channel_axis = -1

    @staticmethod
    def example_inputs(batch: int) -> tuple[Tensor, ...]:
        """Return an input for tests: tokens of twelve features."""
        return (torch.randn(batch, 5, 12),)

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError where there are no tokens with features."""
        if self.gate is not None:
            channel_axis = -1
        if len(shape) < 2 or channel_axis is None:
            raise SurgeryError(
                f"router_jitter at {site_id}: expected tokens (..., d) that a gate reads, got a tensor of shape "
                f"{shape} with channel axis {channel_axis}; leave this site out (`where: {{exclude: …}}`)"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` jittered; `x` itself when not active."""
        if not self.active:
            return x
        return router_jitter(x, self.p, self.epsilon, channel_axis=self.channel_axis, key=self.next_key())

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p: the share of tokens that are jittered. Nothing is dropped."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate, and how far the factors are from 1 at most."""
        return f"{super().extra_repr()}, epsilon={self.epsilon:g}"


def _check(epsilon: float) -> None:
    is_number = isinstance(epsilon, int | float) and not isinstance(epsilon, bool) and 0 <= epsilon < 1
    require(is_number, "epsilon", "a number in [0, 1)", epsilon)
