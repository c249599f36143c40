"""SpatialDropout: drop whole feature maps (Tompson et al., CVPR 2015, arXiv:1411.4280).

    x (B, C, ...) → x * M / (1 - p)      M (B, C, 1, ...) ~ Bernoulli(1 - p), one draw a sample and channel

Placement: after convolutions, where neighbours in a map say much the same. With one, two and three axes of
positions it is torch.nn.Dropout1d, 2d and 3d, and it takes channels at the end too: at rank 3 that is
Keras's SpatialDropout1D, and on the tokens (B, N, C) of a transformer it drops a channel in all tokens of a
sample. Rank 3 tells nobody which axis is which: there the layer works only where `build` has said it.
"""

from __future__ import annotations

from torch import Tensor

from dropsurgery.regularizers._base import Rate, rate_tensor
from dropsurgery.regularizers._maps import TOKENS, MapRegularizer, channels_at
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import keep_scale


def spatial_dropout(
    x: Tensor, p: float | Tensor, *, channel_axis: int | None = None, key: Tensor | None = None
) -> Tensor:
    """Drop each channel of each sample of `x` with probability `p` and divide the others by 1 - p.

    `x` is (B, C, H, W) or (B, C, D, H, W), or has its channels at `channel_axis`, which has to be given at
    rank 3. `key`, a 0-dim int64 CPU tensor, is what the random numbers depend on; None for torch's global
    generator. A SurgeryError if `x` is of another rank, or `p` a number out of [0, 1].
    """
    axis = channels_at(x, channel_axis, "spatial_dropout")
    shape = [x.shape[i] if i in (0, axis) else 1 for i in range(x.dim())]
    return x * keep_scale(shape, rate_tensor(p, x.device), x, key)


class SpatialDropout(MapRegularizer):
    """`spatial_dropout` as a layer; identity in eval."""

    paper = "Tompson et al.: Efficient Object Localization, CVPR 2015, arXiv:1411.4280"
    summary = "drops whole feature maps"
    placement = "after convolutions: spatial_dropout_resnet_g34"
    shapes = TOKENS
    examples = ({"p": 0.1}, {"p": 0.5})
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden")

    p: Tensor

    def __init__(self, p: Rate = 0.1) -> None:
        super().__init__(p=p)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with channels dropped; `x` itself when not active."""
        if not self.active:
            return x
        return spatial_dropout(x, self.p, channel_axis=self.told_axis, key=self.next_key())

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, whatever the shape."""
        return self._rates["p"]
