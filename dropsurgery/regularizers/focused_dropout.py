"""FocusedDropout: keep of a map what its most active channel is focused on (Xie et al. 2021, arXiv:2103.15425).

    x (B, C, H, W) → x * M     in a batch that is used, which happens with probability p; x in the others, and in eval
    M (B, 1, H, W) = [r > gamma * max r]     r: the sample's channel of largest mean, gamma uniform in `gamma_range`

The mask is the sample's own and the same for all its channels; the comparison is strict and nothing is rescaled, so
that a batch that is used loses most of its map. The paper's participation rate is p, 0.1 there: one batch in ten. One
coin decides for all sites of a model, and for all forwards whose gradients one optimizer step adds up. A layer alone
draws its own.

Where the paper contradicts itself: gamma is random in [0.3, 0.6] by its text and its experiments, the default here,
and random(0.6, 0.9) in its algorithm 1 (`gamma_range: [0.6, 0.9]`); it is one number for an image by equation 4 (the
default, `gamma_scope: image`), and drawn anew for each pixel in algorithm 1 (`gamma_scope: pixel`). The library's
choices: a sample whose channel r is nowhere above 0 (or the least normal float32) passes unchanged, where the strict
comparison would drop all of it; of equal means the first channel is taken.

The paper has a larger weight decay in the batches that are used, 1e-3 at best; what it is in the others its text does
not say. So has the optimizer that is named by `gm.surgery.attach(optimizer)`: in the steps of such batches the weight
decay of its groups is `wd_active` (the value, no factor), but for groups without any. null leaves the optimizer alone.

Placement: the output of the last group but one, behind the activation: of a ResNet layer3 (recipe
focused_dropout_resnet). Behind what may be negative (a norm, GELU, SiLU) a channel's mean says little of how active it
is; a SurgeryWarning says so.
"""

from __future__ import annotations

import math
import warnings
from typing import Annotated, Literal, Protocol

import torch
from annotated_types import Gt
from torch import Tensor

from dropsurgery.errors import SurgeryError, SurgeryWarning
from dropsurgery.regularizers._base import Keys, Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._maps import extent, may_be_negative, require_images
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._tracing import is_traced
from dropsurgery.regularizers._uniform import uniform

Range = tuple[float, float]
Scope = Literal["image", "pixel"]
CPU = torch.device("cpu")
_COIN = "focused_dropout"


class BatchKeys(Keys, Protocol):
    """Where keys come from that all sites of a model get alike."""

    def batch_key(self, site_id: str, name: str) -> Tensor:
        """Return the key of this batch's draw called `name`, a 0-dim int64 tensor on the CPU."""

    def drawn_for_batch(self, name: str) -> Tensor | None:
        """Return the key of that draw, or None where this batch has not drawn it."""

    def shared_key(self, site_id: str, name: str) -> Tensor:
        """Return the key of this forward's draw called `name`, a 0-dim int64 tensor on the CPU."""


def focused_dropout(
    x: Tensor,
    p: float | Tensor = 0.1,
    gamma_range: Range = (0.3, 0.6),
    gamma_scope: Scope = "image",
    *,
    channel_axis: int = 1,
    key: Tensor | None = None,
    shared_key: Tensor | None = None,
) -> Tensor:
    """With probability `p`, for the whole batch, keep of each sample of `x` what it is focused on, and drop the rest.

    Args:
        x: (B, C, H, W), or (B, H, W, C) with `channel_axis` -1; of any floating dtype and memory layout.
        p: probability that the batch is used, in [0, 1].
        gamma_range: between which two numbers in [0, 1) the share of the peak is drawn that has to be exceeded.
        gamma_scope: whether one is drawn for an "image" or for each "pixel".
        key: what those draws depend on, a 0-dim int64 CPU tensor; None for torch's global generator.
        shared_key: what the batch's coin depends on; the same.

    Raises:
        SurgeryError: `x` is not of rank 4, or an argument is out of range.
    """
    require(x.dim() == 4, "input of focused_dropout", "4 dimensions (B, C, H, W) or (B, H, W, C)", tuple(x.shape))
    _check(gamma_range, gamma_scope)
    used = _coin(rate_tensor(p, x.device), shared_key)
    if used.is_cpu and not is_traced(x) and not bool(used):
        return x
    gamma = _thresholds(x, gamma_range, gamma_scope, channel_axis, key)
    # No number is above infinity: what is compared with it is kept.
    return x * focus(x, torch.where(used, gamma, -math.inf), channel_axis=channel_axis).to(x.dtype)


def _thresholds(x: Tensor, between: Range, scope: Scope, channel_axis: int, key: Tensor | None) -> Tensor:
    shape = [1 if i == channel_axis % 4 else length for i, length in enumerate(x.shape)]
    numbers = uniform(shape if scope == "pixel" else (len(x), 1, 1, 1), x.device, key)
    low, high = between
    return low + (high - low) * numbers


def focus(x: Tensor, gamma: Tensor, *, channel_axis: int = 1) -> Tensor:
    """Return which positions of `x` (B, C, H, W) are kept, the bool mask (B, 1, H, W); all, where gamma is -inf.

    `gamma` is (B, 1, 1, 1), or of the mask's shape. With `channel_axis` -1 `x` is (B, H, W, C), the mask (B, H, W, 1).
    """
    places = (2, 3) if channel_axis % 4 == 1 else (1, 2)
    fixed = x.detach()
    wide = torch.promote_types(x.dtype, torch.float32)
    largest = fixed.mean(places, keepdim=True, dtype=wide).argmax(channel_axis, keepdim=True)
    shape = [1 if i == channel_axis % 4 else length for i, length in enumerate(x.shape)]
    reference = fixed.gather(channel_axis, largest.expand(shape)).to(wide)
    peak = reference.amax(places, keepdim=True)
    # Below that number a product is rounded to the peak itself, or to 0 by some processors.
    floor = torch.where(peak >= torch.finfo(torch.float32).tiny, gamma * peak, -math.inf)
    return reference > floor


class FocusedDropout(Regularizer):
    """`focused_dropout` as a layer; identity in eval."""

    paper = "Xie et al.: FocusedDropout for Convolutional Neural Network, 2021, arXiv:2103.15425"
    summary = "keeps what the most active channel is focused on, in one batch of ten"
    placement = "the output of the last stage but one, behind its activation: recipe focused_dropout_resnet"
    shapes = "(B, C, H, W), (B, H, W, C)"
    needs = "`gm.surgery.attach(optimizer)` for its larger weight decay (`wd_active: null` does without)"
    examples = (
        {"p": 0.5},
        {"p": 0.5, "gamma_range": (0.6, 0.9), "gamma_scope": "pixel"},
    )
    by_values = True
    taxonomy = Taxonomy(
        transforms=("data", "architecture", "optimization"), space="hidden", dependence=("sample", "time")
    )

    p: Tensor
    context: BatchKeys | None = None

    def __init__(
        self,
        p: Rate = 0.1,
        gamma_range: tuple[float, float] = (0.3, 0.6),
        gamma_scope: Scope = "image",
        wd_active: Annotated[float, Gt(0)] | None = 1e-3,
    ) -> None:
        super().__init__(p=p)
        _check(gamma_range, gamma_scope)
        is_number = isinstance(wd_active, int | float) and not isinstance(wd_active, bool)
        known = wd_active is None or (is_number and 0 < wd_active < math.inf)
        require(known, "wd_active", "a number above 0, or None", wd_active)
        self.gamma_range = gamma_range
        self.gamma_scope: Scope = gamma_scope
        self.wd_active = wd_active
        self.step_options = {} if wd_active is None else {"weight_decay": float(wd_active)}

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError unless the tensor is a batch of maps of more than one point."""
        axis = require_images("focused_dropout", site_id, shape, channel_axis)
        if extent(shape, axis) == (1, 1):
            raise SurgeryError(
                f"focused_dropout at {site_id}: expected maps of more than one point, got shape {shape}, whose only "
                "point is the peak and always kept; use dropout there"
            )
        if may_be_negative(self.producer):
            warnings.warn(
                f"focused_dropout at {site_id}: expected maps that are never negative (those of a ReLU), got those of "
                f"{' '.join(self.producer)}: there a channel's mean says little of how active it is, and a sample "
                "whose channel of the largest mean is nowhere above 0 passes unchanged",
                SurgeryWarning,
                stacklevel=2,
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with what lies outside of the focus dropped; `x` itself when not active."""
        if not self.active:
            return x
        return focused_dropout(
            x,
            self.p,
            self.gamma_range,
            self.gamma_scope,
            channel_axis=self.channel_axis,
            key=self.next_key(),
            shared_key=self._coins_key(),
        )

    def acted(self) -> bool:
        """Whether this step's batch was one that is used: whether the coin that its forwards drew says so."""
        key = None if self.context is None else self.context.drawn_for_batch(_COIN)
        return key is not None and bool(_coin(rate_tensor(self._rates["p"], CPU), key))

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p times the share that a batch in use loses of maps of independent Gaussian numbers, rectified or not.

        Of a net's own maps, whose neighbours are alike, it loses less or more.
        """
        return self._rates["p"] * _share(math.prod(extent(shape, self.channel_axis)), self.gamma_range)

    def realised_drop(self, x: Tensor) -> float:
        """Return p times the share that a batch in use loses of `x`."""
        gamma = _thresholds(x, self.gamma_range, self.gamma_scope, self.channel_axis, None)
        kept = focus(x, gamma, channel_axis=self.channel_axis)
        return self._rates["p"] * (1 - float(kept.float().mean()))

    def extra_repr(self) -> str:
        """Return the rate, the range of thresholds and what one holds for, and the weight decay."""
        low, high = self.gamma_range
        options = f"gamma_range=({low:g}, {high:g}), gamma_scope={self.gamma_scope!r}, wd_active={self.wd_active}"
        return f"{super().extra_repr()}, {options}"

    def _coins_key(self) -> Tensor | None:
        if self.context is None:
            return None
        if self.training:
            return self.context.batch_key(self.site_id, _COIN)
        return self.context.shared_key(self.site_id, _COIN)  # forced in eval, where no step ends a batch


def _check(gamma_range: Range, gamma_scope: Scope) -> None:
    require(gamma_scope in ("image", "pixel"), "gamma_scope", "'image' or 'pixel'", gamma_scope)
    numbers = isinstance(gamma_range, tuple | list) and len(gamma_range) == 2
    numbers = numbers and all(isinstance(each, int | float) and not isinstance(each, bool) for each in gamma_range)
    # What float32 rounds to 1 would drop the peak too.
    holds = numbers and 0 <= gamma_range[0] <= gamma_range[1] < 1 - 2**-25
    require(holds, "gamma_range", "two numbers in [0, 1) in rising order", gamma_range)


def _coin(p: Tensor, key: Tensor | None) -> Tensor:
    """Whether the batch is used; of a key, the same on whatever device."""
    return uniform((), CPU, key) < p


def _share(cells: int, gamma_range: Range) -> float:
    """The expected share of `cells` independent Gaussian numbers that is not above gamma times their largest."""
    low, high = gamma_range
    middles = (torch.arange(256, dtype=torch.float64, device=CPU) + 0.5) / 256
    # The largest of n is below z with probability Phi(z)^n, and each of the others is then below it for certain.
    peak = torch.special.ndtri(middles ** (1 / cells))[:, None]
    gamma = low + (high - low) * middles[::8]
    below = torch.special.ndtr(gamma * peak) / torch.special.ndtr(peak)
    return (cells - 1) / cells * float(torch.where(peak > 0, below, 0).mean())
