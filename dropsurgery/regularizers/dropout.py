"""Dropout: drop each element by itself (Hinton et al. 2012, arXiv:1207.0580; Srivastava et al., JMLR 15, 2014).

    x → x * M / (1 - p)   in training, M ~ Bernoulli(1 - p), one draw an element; x in eval   `rescale: train`
    x → x * M             in training; x * (1 - p) in eval                                    `rescale: test`

The papers have the second: their test-time network has all units, and outgoing weights times 1 - p. The first,
inverted form is torch.nn.Dropout's; folding 1 / (1 - p) into the next weights makes the two one. Srivastava
et al. write p for the probability to keep. Placement: on the outputs of hidden layers, and on the input.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._blocks import run
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import is_transformed
from dropsurgery.regularizers._uniform import keep_scale

Rescale = Literal["train", "test"]


def dropout(x: Tensor, p: float | Tensor, *, rescale: Rescale = "train", key: Tensor | None = None) -> Tensor:
    """Drop each element of `x` (any shape) with probability `p`.

    With `rescale` "train" the others are divided by 1 - p; with "test" they are left as they are, and the
    caller multiplies by 1 - p at test time. `key`, a 0-dim int64 CPU tensor, is what the random numbers
    depend on; None for torch's global generator. A SurgeryError if `p` is a number out of [0, 1].
    """
    return drop(x, rate_tensor(p, x.device), key, scaled=rescale == "train")


def drop(x: Tensor, p: Tensor, key: Tensor | None, *, scaled: bool = True, in_place: bool = False) -> Tensor:
    """`dropout` by a rate that is a tensor; with `in_place`, `x` may be written to."""
    if x.device.type != "cpu" or is_transformed():
        return x * keep_scale(x.shape, p, x, key, rescale=scaled)
    maps = x if x.dim() > 2 else x.reshape(1, 1, -1)
    return run(maps, p, key, [1] * (maps.dim() - 2), False, False, False, scaled, in_place).view(x.shape)


class Dropout(Regularizer):
    """`dropout` as a layer."""

    paper = "Srivastava et al.: Dropout, JMLR 15, 2014"
    summary = "drops single elements"
    placement = "on hidden units; before the classifier: classifier_dropout; after convolutions: dropout_resnet_g34"
    examples = ({"p": 0.1}, {"p": 0.5}, {"p": 0.5, "rescale": "test"})
    taxonomy = Taxonomy(transforms=("data", "architecture"), space=("input", "hidden"))

    p: Tensor

    def __init__(self, p: Rate = 0.5, rescale: Rescale = "train") -> None:
        super().__init__(p=p)
        require(rescale in ("train", "test"), "rescale", "'train' or 'test'", rescale)
        self.rescale = rescale
        if rescale == "test":
            self.eval_rule = "times the share kept, 1 - p"

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with elements dropped; when not active, `x`, or by `rescale: test` x * (1 - p)."""
        if self.active:
            return dropout(x, self.p, rescale=self.rescale, key=self.next_key())
        if self.rescale == "test" and self._nonzero:
            return x * (1 - self.p)
        return x

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, whatever the shape."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate, and where the scale is made up for if not in training."""
        told = super().extra_repr()
        return told if self.rescale == "train" else f"{told}, rescale={self.rescale!r}"
