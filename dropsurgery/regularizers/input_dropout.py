"""Input dropout: drop pixels between the input and the first layer (ACIIDS 2021, doi 10.1007/978-981-16-1685-3_21).

    x → x * M / (1 - p)      M ~ Bernoulli(1 - p), one draw an element, or with `unit: pixel` one for all its channels

"Dropout Regularization for Automatic Segmented Dental Images" puts one dropout layer of rate 0.3 between the input
and the first hidden layer of a Keras Sequential model, and nowhere else. It is taken as Keras's layer: 0.3 is the share
that is dropped, each element of a colour image by itself (`unit: element`), and what is kept is divided by 1 - p, so
that eval is the identity. Dropping a pixel in all of its channels (`unit: pixel`, one mask (B, 1, H, W)) is the
library's option. To drop visible units beside hidden ones is as old as dropout (Srivastava et al., JMLR 15, 2014).

Placement: the network's input, in a recipe `pattern: stem, edge: input` (recipes/input_dropout.yaml).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import scale_of, uniform
from dropsurgery.regularizers.dropout import dropout

Unit = Literal["element", "pixel"]


def input_dropout(
    x: Tensor, p: float | Tensor, unit: Unit = "element", *, channel_axis: int = 1, key: Tensor | None = None
) -> Tensor:
    """Drop each element (any shape) or pixel of `x` with probability `p`, and divide the others by 1 - p.

    By pixels `x` is (B, C, H, W), or (B, H, W, C) with `channel_axis` -1. `key`, a 0-dim int64 CPU tensor, is what the
    random numbers depend on; None for torch's global generator. A SurgeryError if `p` is a number out of [0, 1],
    `unit` is unknown, or pixels are asked of what is no image.
    """
    _check(unit)
    if unit == "element":
        return dropout(x, p, key=key)
    require(x.dim() == 4, "input of input_dropout by pixels", "4 dimensions", tuple(x.shape))
    rate = rate_tensor(p, x.device)
    shape = list(x.shape)
    shape[channel_axis] = 1
    kept = (uniform(shape, x.device, key) >= rate).to(torch.uint8)
    return x * kept * scale_of(rate).to(x.dtype)  # bytes first: they are all that backward needs


class InputDropout(Regularizer):
    """`input_dropout` as a layer for the network's input; identity in eval."""

    paper = (
        "Dropout Regularization for Automatic Segmented Dental Images, ACIIDS 2021, doi 10.1007/978-981-16-1685-3_21"
    )
    summary = "drops elements or pixels of the network's input"
    placement = "the network's input (pattern stem, edge input): recipe input_dropout"
    shapes = "any shape; by pixels (B, C, H, W), (B, H, W, C)"
    needs = "the network's input: on hidden layers it is dropout"
    examples = (
        {"p": 0.3},
        {"p": 0.2, "unit": "pixel"},
    )
    taxonomy = Taxonomy(transforms="data", space="input")

    p: Tensor

    def __init__(self, p: Rate = 0.3, unit: Unit = "element") -> None:
        super().__init__(p=p)
        _check(unit)
        self.unit = unit

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError where pixels are asked of what is no batch of images."""
        if self.unit == "pixel" and (len(shape) != 4 or channel_axis is None):
            raise SurgeryError(
                f"input_dropout at {site_id}: expected images (B, C, H, W) or (B, H, W, C) to drop pixels of, got a "
                f"tensor of shape {shape} with channel axis {channel_axis}; use `unit: element` there"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with elements or pixels dropped; `x` itself when not active."""
        if not self.active:
            return x
        return input_dropout(x, self.p, self.unit, channel_axis=self.channel_axis, key=self.next_key())

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, whatever the shape."""
        return self._rates["p"]

    def extra_repr(self) -> str:
        """Return the rate, and what is dropped at once."""
        return f"{super().extra_repr()}, unit={self.unit!r}"


def _check(unit: Unit) -> None:
    require(unit in ("element", "pixel"), "unit", "'element' or 'pixel'", unit)
