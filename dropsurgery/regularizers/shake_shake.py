"""Shake-Shake: mix two branches at random, and their gradients by another mixture (Gastaldi 2017, arXiv:1705.07485).

    a, b (B, ...) → 2 * (u * a + (1 - u) * b)      in training; the gradient of a is multiplied by 2 * v instead,
                                                   and that of b by 2 * (1 - v)
    a, b          → a + b                          in eval

u and v are uniform in [0, 1], drawn independently, each for the batch or for each sample ("image"); the paper calls
them alpha and beta. Its nets compute x + u * a + (1 - u) * b, and 0.5 * a + 0.5 * b in eval. This takes the place of
a sum a + b in a net as found, which in eval has to stay that sum: hence the factor 2 (`weights: sum`, the default).
`weights: mean` is the paper's own, and halves what the net had before.

Modes, as the paper names them: forward "shake" (u is drawn) or "even" (0.5), backward "shake" (v is drawn), "even"
(0.5) or "keep" (v = u). Shake-Shake-Image is forward: shake, backward: shake, level: image. p, which the paper has
not, is the share of forwards that are shaken, the rest being even: 1 is the paper's, less is for schedules. The
authors' code draws v when backward runs; here it is fixed when forward has run, so that backward run twice meets it
again.

Placement: where two equal branches of one block meet (recipes/shake_shake_cells.yaml). A block with a single branch
has nothing to be mixed with; there shakedrop is what comes nearest.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import uniform

Forward = Literal["shake", "even"]
Backward = Literal["shake", "even", "keep"]
Level = Literal["batch", "image"]
Weights = Literal["sum", "mean"]


def shake_shake(
    a: Tensor,
    b: Tensor,
    p: float | Tensor = 1.0,
    *,
    forward: Forward = "shake",
    backward: Backward = "shake",
    level: Level = "image",
    weights: Weights = "sum",
    key: Tensor | None = None,
) -> Tensor:
    """Mix `a` and `b` (B, ...), of one shape, with probability `p`; otherwise weigh them alike.

    `key`, a 0-dim int64 CPU tensor, is what the random numbers depend on; None for torch's global generator. A
    SurgeryError for shapes that differ, an unknown option, or `p` a number out of [0, 1].
    """
    _check(forward, backward, level, weights)
    shapes = tuple(a.shape), tuple(b.shape)
    require(shapes[0] == shapes[1] != (), "inputs of shake_shake", "two of one shape (B, ...)", shapes)
    dtype = torch.promote_types(a.dtype, b.dtype)
    count = a.shape[0] if level == "image" else 1
    numbers = uniform((2 * count + 1,), a.device, key)
    shaken = numbers[0] < rate_tensor(p, a.device)
    size = [count] + [1] * (a.dim() - 1)
    u = torch.where(shaken, numbers[1 : count + 1], 0.5).view(size)
    v = torch.where(shaken, numbers[count + 1 :], 0.5).view(size)
    even = torch.full_like(u, 0.5)
    forth = u if forward == "shake" else even
    back = {"shake": v, "even": even, "keep": forth}[backward]
    total = 2 if weights == "sum" else 1
    factors = [(total * each).to(dtype) for each in (forth, 1 - forth, back, 1 - back)]
    y: Tensor = _Mixed.apply(a.to(dtype), b.to(dtype), *factors)
    return y


class _Mixed(torch.autograd.Function):
    """A weighted sum, whose gradients have weights of their own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, forth_a: Tensor, forth_b: Tensor, back_a: Tensor, back_b: Tensor) -> Tensor:
        return torch.addcmul(a * forth_a, b, forth_b)  # not in place: compilers of torch 2.11 lose the gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[4:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back_a, back_b = ctx.saved_tensors
        return grad * back_a, grad * back_b, None, None, None, None


class ShakeShake(Regularizer):
    """`shake_shake` as a layer that stands in for the sum of two branches."""

    kind = "combine"
    paper = "Gastaldi: Shake-Shake regularization, 2017, arXiv:1705.07485"
    summary = "mixes two branches at random, and their gradients by another mixture"
    placement = "in place of the sum of two parallel branches: recipe shake_shake_cells"
    shapes = "two of one shape (B, ...)"
    examples = (
        {"p": 0.5},
        {"p": 0.5, "level": "batch"},
        {"p": 0.5, "backward": "keep"},
        {"p": 0.5, "backward": "even"},
    )
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden")
    drops = "other"

    p: Tensor

    def __init__(
        self,
        p: Rate = 1.0,
        forward: Forward = "shake",
        backward: Backward = "shake",
        level: Level = "image",
        weights: Weights = "sum",
    ) -> None:
        super().__init__(p=p)
        _check(forward, backward, level, weights)
        self.modes: tuple[Forward, Backward] = (forward, backward)
        self.level: Level = level
        self.weights: Weights = weights
        if weights == "mean":
            self.eval_rule = "the mean of the two branches in place of their sum"

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError where there is no batch."""
        if not shape:
            raise SurgeryError(
                f"shake_shake at {site_id}: expected a batch (B, ...), got a tensor of shape {shape}; "
                "leave this site out (`where: {exclude: …}`)"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the branches mixed; when not active their sum, or by `weights: mean` their mean."""
        if self.active:
            forward, backward = self.modes
            return shake_shake(
                a,
                b,
                self.p,
                forward=forward,
                backward=backward,
                level=self.level,
                weights=self.weights,
                key=self.next_key(),
            )
        return 0.5 * a + 0.5 * b if self.weights == "mean" and self._nonzero else a + b

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p: the share of forwards that are shaken. Nothing is dropped."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate, the modes, and what a draw holds for."""
        forward, backward = self.modes
        told = f"forward={forward!r}, backward={backward!r}, level={self.level!r}, weights={self.weights!r}"
        return f"{super().extra_repr()}, {told}"


def _check(forward: object, backward: object, level: object, weights: object) -> None:
    require(forward in ("shake", "even"), "forward", "'shake' or 'even'", forward)
    require(backward in ("shake", "even", "keep"), "backward", "'shake', 'even' or 'keep'", backward)
    require(level in ("batch", "image"), "level", "'batch' or 'image'", level)
    require(weights in ("sum", "mean"), "weights", "'sum' or 'mean'", weights)
