"""Stochastic depth: drop a whole residual branch (Huang et al., ECCV 2016, arXiv:1603.09382).

    x (B, ...) → x * b             in training, b ~ Bernoulli(1 - p); x * (1 - p) in eval   `rescale: test`
    x (B, ...) → x * b / (1 - p)   in training; x in eval                                   `rescale: train`

The paper has the first, with one draw a batch (`mode: batch`); timm's DropPath and torchvision's "row" have
the second, with one a sample (`mode: row`). The paper's survival probability p_l is 1 - p.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import keep_scale

Mode = Literal["row", "batch"]
Rescale = Literal["train", "test"]


def stochastic_depth(
    x: Tensor, p: float | Tensor, mode: Mode = "row", *, rescale: Rescale = "train", key: Tensor | None = None
) -> Tensor:
    """Drop samples of `x` (B, ...) with probability `p`, each by itself ("row") or all at once ("batch").

    With `rescale` "train" the others are divided by 1 - p; with "test" they are left as they are, and the
    caller multiplies by 1 - p at test time. `key`, a 0-dim int64 CPU tensor, is what the random numbers
    depend on; None for torch's global generator. A SurgeryError if `p` is a number out of [0, 1].
    """
    shape = [x.shape[0] if mode == "row" else 1] + [1] * (x.dim() - 1)
    return x * keep_scale(shape, rate_tensor(p, x.device), x, key, rescale=rescale == "train")


class StochasticDepth(Regularizer):
    """`stochastic_depth` as a layer, to be put at the end of a residual branch."""

    paper = "Huang et al.: Deep Networks with Stochastic Depth, ECCV 2016, arXiv:1603.09382"
    summary = "drops whole residual branches"
    placement = "at the end of each residual branch, p growing with depth: stochastic_depth_linear"
    shapes = "any shape (B, ...)"
    examples = ({"p": 0.2}, {"p": 0.2, "mode": "batch"}, {"p": 0.5, "mode": "batch", "rescale": "test"})
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden")

    p: Tensor

    def __init__(self, p: Rate = 0.1, mode: Mode = "row", rescale: Rescale = "train") -> None:
        super().__init__(p=p)
        require(mode in ("row", "batch"), "mode", "'row' or 'batch'", mode)
        require(rescale in ("train", "test"), "rescale", "'train' or 'test'", rescale)
        self.mode = mode
        self.rescale = rescale
        if rescale == "test":
            self.eval_rule = "times the survival probability 1 - p"

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with samples dropped; when not active, `x`, or by `rescale: test` x * (1 - p)."""
        if self.active:
            return stochastic_depth(x, self.p, self.mode, rescale=self.rescale, key=self.next_key())
        if self.rescale == "test" and self._nonzero:
            return x * (1 - self.p)
        return x

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, whatever the shape."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate, and where a draw holds and the scale is made up for."""
        return f"{super().extra_repr()}, mode={self.mode!r}, rescale={self.rescale!r}"
