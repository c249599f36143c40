"""Crossmap dropout: drop positions, the same in all feature maps (Poernomo & Kang, Neural Networks 104:60-67, 2018).

    x (B, C, ...) → x * M / (1 - p)      M (B, 1, ...) ~ Bernoulli(1 - p), one draw a sample and position

Units at one position of the maps are correlated: they are dropped together or kept together, while
neighbours in a map are told apart. Placement: after convolutions; recipe crossmap_dropout_resnet_g34.
doi 10.1016/j.neunet.2018.03.016. The scale 1 / (1 - p) in training is the reading taken here; how the paper
makes up for p is not verified. On 1x1 maps it drops whole samples.
"""

from __future__ import annotations

from torch import Tensor

from dropsurgery.regularizers._base import Rate, rate_tensor
from dropsurgery.regularizers._maps import TOKENS, MapRegularizer, channels_at
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import keep_scale


def crossmap_dropout(
    x: Tensor, p: float | Tensor, *, channel_axis: int | None = None, key: Tensor | None = None
) -> Tensor:
    """Drop each position of each sample of `x`, in all its channels, with probability `p`; divide the rest by 1 - p.

    `x` is (B, C, H, W) or (B, C, D, H, W), or has its channels at `channel_axis`, which has to be given at
    rank 3. `key`, a 0-dim int64 CPU tensor, is what the random numbers depend on; None for torch's global
    generator. A SurgeryError if `x` is of another rank, or `p` a number out of [0, 1].
    """
    axis = channels_at(x, channel_axis, "crossmap_dropout")
    shape = [1 if i == axis else length for i, length in enumerate(x.shape)]
    return x * keep_scale(shape, rate_tensor(p, x.device), x, key)


class CrossmapDropout(MapRegularizer):
    """`crossmap_dropout` as a layer; identity in eval."""

    paper = "Poernomo, Kang: Biased Dropout and Crossmap Dropout, Neural Networks 104, 2018"
    summary = "drops positions, the same ones in all feature maps"
    placement = "after convolutions: recipe crossmap_dropout_resnet_g34"
    shapes = TOKENS
    examples = ({"p": 0.1}, {"p": 0.5})
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden")

    p: Tensor

    def __init__(self, p: Rate = 0.5) -> None:
        super().__init__(p=p)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with positions dropped; `x` itself when not active."""
        if not self.active:
            return x
        return crossmap_dropout(x, self.p, channel_axis=self.told_axis, key=self.next_key())

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, whatever the shape."""
        return self._rates["p"]
