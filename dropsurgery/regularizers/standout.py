"""Standout: keep a unit the more often the larger its pre-activation (Ba and Frey, NIPS 2013).

    training:  g(z) → g(z) * m            m ~ Bernoulli(k(z))
    eval:      g(z) → g(z) * k(z)         k(z) = sigmoid(alpha * z + beta)

z is what the activation g takes, so the layer's own weights decide what is dropped. p is the drop probability of
a unit whose z is 0: beta = log((1 - p) / p), and p = 0.5 is beta = 0. At p = 0 all is kept; at alpha = 0 this is
dropout without rescale. No gradient goes through k in training. The paper's affine form is read in two ways by
those who wrote it anew, (alpha W + beta) v being the other; alpha = 1 and p = 0.5 are the library's choice.

Placement: the activation of a hidden layer.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._hosts import require_host
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import uniform

_NOT_POINTWISE = (nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d, nn.GLU)
_ACTIVATIONS = tuple(
    cls
    for cls in vars(nn.modules.activation).values()
    if isinstance(cls, type) and issubclass(cls, nn.Module) and cls not in (nn.Module, *_NOT_POINTWISE)
)


def keep_probability(z: Tensor, p: float | Tensor, alpha: float = 1.0) -> Tensor:
    """Return, in float32 or wider, the probability to keep a unit of pre-activation `z` (any shape).

    It is 1 - p at 0 and rises with `z`, the faster the larger `alpha`. A SurgeryError if `p` is a number out of
    [0, 1].
    """
    rate = rate_tensor(p, z.device)
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    most = torch.finfo(torch.float32).max  # at p = 1 the logarithm is infinite
    return (alpha * wide + (torch.log1p(-rate) - rate.log()).clamp(-most, most)).sigmoid()


class Standout(Regularizer):
    """Standout in place of an activation's forward."""

    kind = "swap"
    paper = "Ba, Frey: Adaptive dropout for training deep neural networks, NIPS 2013"
    summary = "drops units the more often the smaller their pre-activation"
    placement = "at the activation of a hidden layer"
    shapes = "any shape"
    needs = "an activation of torch that works point by point"
    examples = ({"p": 0.5}, {"p": 0.2, "alpha": 2.0})
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden", dependence=("sample", "parameters"))
    drops = "other"
    uncounted = "the share hangs on the values, and an activation has zeros of its own"
    eval_rule = "times the keep probability sigmoid(alpha * input + log((1 - p) / p))"

    p: Tensor

    def __init__(self, p: Rate = 0.5, alpha: Annotated[float, Ge(0)] = 1.0) -> None:
        super().__init__(p=p)
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        require(is_number and 0 <= alpha < float("inf"), "alpha", "a number of 0 or more", alpha)
        self.alpha = alpha

    @staticmethod
    def example_host() -> nn.Module:
        """Return a small layer for tests."""
        return nn.SiLU()

    def bind(self, host: nn.Module) -> None:
        """Stand in for an activation; a SurgeryError where it is none."""
        require_host(isinstance(host, _ACTIVATIONS), "standout", self.site_id, self.needs, host)
        super().bind(host)

    def forward(self, input: Tensor) -> Tensor:
        """Return the activation with units dropped; in eval, times their keep probability."""
        if self.active:
            # Before the activation runs, which may work in place.
            keep = keep_probability(input.detach(), self.p, self.alpha)
            y: Tensor = self.own(input) * (uniform(input.shape, input.device, self.next_key()) < keep)
        elif self._nonzero:
            keep = keep_probability(input, self.p, self.alpha)
            y = self.own(input)
            y = y * keep.to(y.dtype)
        else:
            y = self.own(input)
        return y

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p: the share where pre-activations are 0. It is less where they are mostly positive."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate and the slope."""
        return f"{super().extra_repr()}, alpha={self.alpha:g}"
