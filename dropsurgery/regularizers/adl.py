"""ADL, attention-based dropout layer: hide the most discriminative area (Choe, Shim, CVPR 2019, arXiv:1908.10028).

    x (B, C, H, W) → x * [a < gamma * max a]   with probability p, else   x * sigmoid(a)      a = mean of x over C

a (B, 1, H, W) is the sample's own attention, and max a its largest value on the map. One coin a batch chooses between
the drop mask and the importance map; nothing is rescaled; gradient flows through the importance map, and not through
the mask. As in the authors' code (clovaai/wsolevaluation, wsol/method/adl.py), whose drop_rate is p and whose
drop_threshold is gamma; 0.75 and 0.9 are those of its training configuration. Where a is negative all over the map,
gamma * max a lies above it, and the mask hides nothing.

p = 0 is off, as for every regularizer here; with the authors' drop_rate 0 the importance map would stay.

Placement: on a ResNet-50 of that code behind blocks layer3[0], layer4[0] and layer4[2], after their last ReLU
(recipes/adl_resnet.yaml; its layer4 keeps the resolution of layer3, which a ResNet as found does not).
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._maps import extent, require_images
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import uniform


def attention_dropout(
    x: Tensor, p: float | Tensor, gamma: float = 0.9, *, channel_axis: int = 1, key: Tensor | None = None
) -> Tensor:
    """Hide where the attention of `x` is above `gamma` of its maximum, with probability `p`; else weigh by it.

    `x` is (B, C, H, W), or (B, H, W, C) with `channel_axis` -1. `key`, a 0-dim int64 CPU tensor, is what the random
    number depends on; None for torch's global generator. A SurgeryError if `x` is not of rank 4, or `p` or `gamma` a
    number out of [0, 1].
    """
    require(x.dim() == 4, "input of adl", "4 dimensions (B, C, H, W) or (B, H, W, C)", tuple(x.shape))
    _check(gamma)
    # In float32 at least: sums over the channels leave float16, here and in backward.
    attention = x.mean(channel_axis, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    shown = _shown(attention.detach(), gamma)
    hide = uniform((), x.device, key) < rate_tensor(p, x.device)
    return (x * torch.where(hide, shown.to(attention.dtype), attention.sigmoid())).to(x.dtype)


def _shown(attention: Tensor, gamma: float) -> Tensor:
    return attention < gamma * attention.amax((1, 2, 3), keepdim=True)


class ADL(Regularizer):
    """`attention_dropout` as a layer; identity in eval."""

    paper = (
        "Choe, Shim: Attention-based Dropout Layer for Weakly Supervised Object Localization, CVPR 2019, "
        "arXiv:1908.10028"
    )
    summary = "hides the most discriminative area, or weighs the map by its importance"
    placement = "late stages, on the output of a residual block: recipe adl_resnet"
    shapes = "(B, C, H, W), (B, H, W, C)"
    examples = (
        {"p": 0.75, "gamma": 0.9},
        {"p": 0.5, "gamma": 0.8},
    )
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden", dependence="sample")
    drops = "other"
    by_values = True

    p: Tensor

    def __init__(self, p: Rate = 0.75, gamma: Annotated[float, Ge(0), Le(1)] = 0.9) -> None:
        super().__init__(p=p)
        _check(gamma)
        self.gamma = gamma

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError unless the tensor is a batch of maps of more than one point."""
        axis = require_images("adl", site_id, shape, channel_axis)
        if extent(shape, axis) == (1, 1):
            raise SurgeryError(
                f"adl at {site_id}: expected maps of more than one point, got shape {shape}, whose only point would be "
                "hidden whole; use dropout there"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with an area hidden, or weighed by its importance; `x` itself when not active."""
        if not self.active:
            return x
        return attention_dropout(x, self.p, self.gamma, channel_axis=self.channel_axis, key=self.next_key())

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return the share for constant maps above 0, which are hidden whole: p. On others it is less."""
        return self._rates["p"]

    def realised_drop(self, x: Tensor) -> float:
        """Return p times the share of `x` that a batch in which an area is hidden loses."""
        attention = x.mean(self.channel_axis, keepdim=True, dtype=torch.float32)
        return self._rates["p"] * (1 - float(_shown(attention, self.gamma).float().mean()))

    def extra_repr(self) -> str:
        """Return the rate, and the threshold."""
        return f"{super().extra_repr()}, gamma={self.gamma:g}"


def _check(gamma: float) -> None:
    is_number = isinstance(gamma, int | float) and not isinstance(gamma, bool) and 0 <= gamma <= 1
    require(is_number, "gamma", "a number in [0, 1]", gamma)
