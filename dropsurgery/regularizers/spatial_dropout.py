"""SpatialDropout: drop whole feature maps (Tompson et al., CVPR 2015, arXiv:1411.4280).

    x (B, C, H, W) → x * M / (1 - p)      M (B, C, 1, 1) ~ Bernoulli(1 - p), one draw a sample and channel

The same as torch.nn.Dropout2d, and on (B, H, W, C) too.
"""

from __future__ import annotations

from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._uniform import keep_scale


def spatial_dropout(x: Tensor, p: float | Tensor, *, channel_axis: int = 1, key: Tensor | None = None) -> Tensor:
    """Drop each channel of each sample of `x` with probability `p` and divide the others by 1 - p.

    `x` is (B, C, H, W), or (B, H, W, C) with `channel_axis` -1. `key`, a 0-dim int64 CPU tensor, is what the
    random numbers depend on; None for torch's global generator. A SurgeryError if `x` is not of rank 4, or
    `p` a number out of [0, 1].
    """
    require(x.dim() == 4, "input of spatial_dropout", "4 dimensions (B, C, H, W) or (B, H, W, C)", tuple(x.shape))
    shape = [x.shape[0], 1, 1, 1]
    shape[channel_axis] = x.shape[channel_axis]
    return x * keep_scale(shape, rate_tensor(p, x.device), x, key)


class SpatialDropout(Regularizer):
    """`spatial_dropout` as a layer; identity in eval."""

    paper = "Tompson et al.: Efficient Object Localization, CVPR 2015, arXiv:1411.4280"
    summary = "drops whole feature maps"
    placement = "after convolutions: spatial_dropout_resnet_g34"
    shapes = "maps (B, C, H, W) or (B, H, W, C)"
    examples = ({"p": 0.1}, {"p": 0.5})

    p: Tensor

    def __init__(self, p: Rate = 0.1) -> None:
        super().__init__(p=p)

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError unless the tensor is a batch of maps whose channel axis is known."""
        if len(shape) != 4 or channel_axis is None:
            raise SurgeryError(
                f"spatial_dropout at {site_id}: expected maps (B, C, H, W) or (B, H, W, C), got a tensor of "
                f"shape {shape} with channel axis {channel_axis}; use dropout there"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with channels dropped; `x` itself when not active."""
        if not self.active:
            return x
        return spatial_dropout(x, self.p, channel_axis=self.channel_axis, key=self.next_key())

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p, whatever the shape."""
        return self._rates["p"]
