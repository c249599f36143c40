"""CorrDrop by channels, CCD: drop whole channels, less correlated ones more often (Zeng et al. 2020, 2021).

    x (B, C, ...) → x * S * numel(S) / sum(S)      S (B, C, 1, ...) in {0, 1}, by equations (1) to (8), (13), (14)

The units of a sample are its C channels, each a row of all its positions; `_correlation.py` has the equations. The
published rule hardly chooses: with the default `gamma: softmax`, at 64 channels and more, the most and the least
correlated one differ by less than 4 % in their probability to be dropped (0.5 % at 512), and at the recipe's sites in a
ResNet-18 of random weights they were seen to differ by at most 0.06 %, so that this is in effect spatial dropout.
`gamma: minmax` is the deviation that chooses. The rate is the authors' drop_prob, 0.2, or 0.1 beside cutout.

The layer is told where its input comes from. Behind a ReLU no product is negative, and the sum of a row of products is
the product with a sum: C x C products are not made there, and cost and memory grow with C instead of its square.
Elsewhere they are made and summed up some rows at a time.

Placement: in stages 3 and 4 of a ResNet, behind the last norm of a residual branch and before the sum, the rate
growing from 0 over the first 200 steps: recipe corrdrop_channel_resnet_g34. The ramp is over steps as the authors' code
has it; it is as long as their training has epochs, and may have been meant for those.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from dropsurgery.regularizers._base import Rate, rate_tensor
from dropsurgery.regularizers._correlation import (
    MAX_UNITS,
    CorrDrop,
    Gamma,
    Rescale,
    Scope,
    check_options,
    kept_units,
    rescaled,
    scores,
)
from dropsurgery.regularizers._maps import TOKENS, channels_at
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import uniform


def corrdrop_channel(
    x: Tensor,
    p: float | Tensor,
    *,
    gamma: Gamma = "softmax",
    rescale: Rescale = "batch",
    scope: Scope = "batch",
    nonnegative: bool = False,
    channel_axis: int | None = None,
    drawn: Tensor | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Drop channels of each sample of `x` with probability `p`, the less correlated ones rather than the others.

    Args:
        x: (B, C, H, W) or (B, C, D, H, W), or with its channels at `channel_axis`, which has to be given at rank 3.
        p: probability to drop a channel, in [0, 1]; as a 0-dim tensor it may move without a new compilation.
        gamma: "softmax" (the paper's) or "minmax" (a deviation), by which channels are protected.
        rescale: what is kept is scaled by what was dropped in the "batch", in each "sample", or not ("none").
        scope: where the protected channels make up for themselves, so that p is dropped in all.
        nonnegative: the promise that no element of `x` is below 0, which saves most of the cost.
        drawn: uniform numbers (2, B, C), the first for M, the second for B; None to draw them.
        key: what the random numbers depend on, a 0-dim int64 CPU tensor; None for torch's global generator.

    Raises:
        SurgeryError: `x` is not of rank 3 to 5, or an argument is out of range.
    """
    axis = channels_at(x, channel_axis, "corrdrop_channel")
    check_options(gamma, rescale, scope)
    rate = rate_tensor(p, x.device)
    found = scores(x, axis, 0, nonnegative)
    drawn = uniform((2, *found.shape), x.device, key) if drawn is None else drawn
    factor = rescaled(kept_units(found, rate, drawn, gamma, scope), rescale)
    return x * factor.to(x.dtype).view([x.shape[i] if i in (0, axis) else 1 for i in range(x.dim())])


class CorrDropChannel(CorrDrop):
    """`corrdrop_channel` as a layer; identity in eval."""

    summary = "drops whole channels, the less correlated ones a little more often"
    placement = "behind the last norm of a residual branch, stages 3 and 4: corrdrop_channel_resnet_g34"
    shapes = TOKENS
    examples = (
        {"p": 0.2},
        {"p": 0.1, "gamma": "minmax", "rescale": "sample"},
        {"p": 0.3, "rescale": "none", "scope": "sample"},
    )
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden", dependence="batch")
    unit = "channels"
    remedy = "raise max_units: time grows with the square of it"

    def __init__(
        self,
        p: Rate = 0.2,
        gamma: Gamma = "softmax",
        rescale: Rescale = "batch",
        scope: Scope = "batch",
        max_units: Annotated[int, Ge(2)] = MAX_UNITS,
    ) -> None:
        super().__init__(p, gamma, rescale, scope, max_units)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with channels dropped; `x` itself when not active."""
        if not self.active:
            return x
        return corrdrop_channel(
            x,
            self.p,
            gamma=self.gamma,
            rescale=self.rescale,
            scope=self.scope,
            nonnegative=self.nonnegative,
            channel_axis=self.told_axis,
            key=self.next_key(),
        )

    def units(self, shape: tuple[int, ...]) -> int:
        """Return the number of channels."""
        return shape[self.channel_axis]
