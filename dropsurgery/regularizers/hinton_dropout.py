"""Dropout as first published, with a bound on the weights' norms (Hinton et al. 2012, arXiv:1207.0580).

    training:  y = W (x * m) + b          m ~ Bernoulli(1 - p), one draw an element
    eval:      y = W (x * (1 - p)) + b    the paper's "mean network": outgoing weights times 1 - p
    after each optimizer step:  w_i ← w_i * max_norm / |w_i|  where |w_i| > max_norm

w_i are the incoming weights of unit i: a row of a linear layer, a filter of a convolution; the norm is L2. The
paper drops hidden units with p = 0.5. Its bound is not verified here and depends on the width of the layer:
`max_norm` is none by default. At p = 0 nothing is bounded either, and weights that are not trained are left alone.

Placement: the layer that reads the units that are dropped; recipe hinton_dropout_vgg.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from dropsurgery.regularizers._base import Rate, Regularizer, require
from dropsurgery.regularizers._hosts import filled, require_host
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers.dropout import dropout


def bound_norms_(weight: Tensor, max_norm: float) -> None:
    """Scale each unit's incoming weights, `weight[i]`, in place down to an L2 norm of `max_norm` at most."""
    with torch.no_grad():
        wide = torch.promote_types(weight.dtype, torch.float32)
        norms = torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=wide)
        scale = (max_norm / norms).clamp(max=1)  # of a unit without weights too
        weight.mul_(scale.view(-1, *[1] * (weight.dim() - 1)))


class HintonDropout(Regularizer):
    """`dropout` with `rescale: test` in front of a layer, and a bound on its weights."""

    kind = "swap"
    paper = "Hinton et al.: Improving neural networks by preventing co-adaptation, arXiv:1207.0580, 2012"
    summary = "drops what a layer reads without rescale, and bounds the norm of its weights"
    placement = "on the inputs of fully connected layers; recipe hinton_dropout_vgg"
    shapes = "what the layer takes"
    needs = "a linear layer or a convolution whose weight is a plain parameter"
    examples = ({"p": 0.5}, {"p": 0.2, "max_norm": 3.0})
    taxonomy = Taxonomy(transforms=("data", "architecture"), space=("input", "hidden"))
    drops = "other"
    uncounted = "inputs are dropped, and an output is the sum of many"
    eval_rule = "its input times the keep probability 1 - p"

    p: Tensor

    def __init__(self, p: Rate = 0.5, max_norm: Annotated[float, Gt(0)] | None = None) -> None:
        super().__init__(p=p)
        is_number = isinstance(max_norm, int | float) and not isinstance(max_norm, bool)
        is_bound = max_norm is None or (is_number and 0 < max_norm < float("inf"))
        require(is_bound, "max_norm", "a number above 0, or none", max_norm)
        self.max_norm = max_norm

    @staticmethod
    def example_host() -> nn.Module:
        """Return a small layer for tests."""
        return filled(nn.Conv2d(6, 4, 3))

    def bind(self, host: nn.Module) -> None:
        """Stand in for a linear layer or a convolution; a SurgeryError where it is none, or hides its weight."""
        known = isinstance(host, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        known = known and host._parameters.get("weight") is not None
        require_host(known, "hinton_dropout", self.site_id, self.needs, host)
        super().bind(host)

    def forward(self, input: Tensor) -> Tensor:
        """Return what the layer gives with inputs dropped; in eval, with its input times 1 - p."""
        x = input
        if self.active:
            x = dropout(input, self.p, rescale="test", key=self.next_key())
        elif self._nonzero:
            x = input * (1 - self.p)
        y: Tensor = self.own(x)
        return y

    def after_step(self) -> None:
        """Bound the norms of the layer's weights, where they are trained."""
        weight: Tensor = self.bound().weight  # type: ignore[assignment]
        if self.max_norm is not None and self._nonzero and weight.requires_grad:
            bound_norms_(weight, self.max_norm)

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, the share of the layer's input."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate, and the bound if there is one."""
        bound = "" if self.max_norm is None else f", max_norm={self.max_norm:g}"
        return super().extra_repr() + bound
