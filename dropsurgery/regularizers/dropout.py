"""Dropout: drop each element by itself (Srivastava et al., JMLR 15, 2014).

    x → x * M / (1 - p)      M ~ Bernoulli(1 - p), one draw an element

The paper scales the weights at test time instead; this is the inverted form, as of torch.nn.Dropout.
"""

from __future__ import annotations

from torch import Tensor

from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor
from dropsurgery.regularizers._blocks import run
from dropsurgery.regularizers._uniform import keep_scale


def dropout(x: Tensor, p: float | Tensor, *, key: Tensor | None = None) -> Tensor:
    """Drop each element of `x` (any shape) with probability `p` and divide the others by 1 - p.

    `key`, a 0-dim int64 CPU tensor, is what the random numbers depend on; None for torch's global generator.
    A SurgeryError if `p` is a number out of [0, 1].
    """
    rate = rate_tensor(p, x.device)
    if x.device.type != "cpu":
        return x * keep_scale(x.shape, rate, x, key)
    maps = x if x.dim() == 4 else x.reshape(1, 1, 1, -1)
    return run(maps, rate, key, [1, 1], False, False, False).view(x.shape)


class Dropout(Regularizer):
    """`dropout` as a layer; identity in eval."""

    paper = "Srivastava et al.: Dropout, JMLR 15, 2014"
    summary = "drops single elements"
    placement = "on hidden units; before the classifier: classifier_dropout; after convolutions: dropout_resnet_g34"
    examples = ({"p": 0.1}, {"p": 0.5})

    p: Tensor

    def __init__(self, p: Rate = 0.5) -> None:
        super().__init__(p=p)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with elements dropped; `x` itself when not active."""
        return dropout(x, self.p, key=self.next_key()) if self.active else x

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, whatever the shape."""
        return self._rates["p"]
