"""Maps with one, two or three axes of positions, and where their channels lie."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Regularizer, require

MAPS = "maps (B, C, L), (B, C, H, W) or (B, C, D, H, W), or with channels at the end"
TOKENS = f"{MAPS}, as tokens (B, N, C)"
_NEVER_NEGATIVE = ("relu", "sigmoid")
_MAY_BE_NEGATIVE = ("activation", "norm", "conv", "conv_transpose", "linear", "matmul", "attention", "glu")


def may_be_negative(producer: tuple[str, ...]) -> bool:
    """Whether an operation of these kinds (`Regularizer.producer`) is known to give negative elements too."""
    return bool(producer) and producer[0] in _MAY_BE_NEGATIVE and not set(producer) & set(_NEVER_NEGATIVE)


def extent(shape: tuple[int, ...], channel_axis: int) -> tuple[int, int]:
    """Return (H, W) of maps (B, C, H, W), or (B, H, W, C) with `channel_axis` -1."""
    return (shape[2], shape[3]) if channel_axis == 1 else (shape[1], shape[2])


def require_images(
    name: str, site_id: str, shape: tuple[int, ...], channel_axis: int | None, what: str = "maps", use: str = "dropout"
) -> int:
    """Return the channel axis; a SurgeryError unless there is one, and two axes of positions."""
    if len(shape) != 4 or channel_axis is None:
        raise SurgeryError(
            f"{name} at {site_id}: expected {what} (B, C, H, W) or (B, H, W, C), got a tensor of shape {shape} with "
            f"channel axis {channel_axis}; use {use} there"
        )
    return channel_axis


def channels_at(x: Tensor, channel_axis: int | None, name: str) -> int:
    """Return the axis of the channels of maps, counted from the front; by None it is 1.

    A SurgeryError where `x` has no axis of positions, and at rank 3, where (B, C, L) and (B, N, C) look alike,
    unless the axis is given.
    """
    require(3 <= x.dim() <= 5, f"input of {name}", MAPS, tuple(x.shape))
    require(
        x.dim() > 3 or channel_axis is not None,
        f"input of {name}",
        "a channel axis to be given where there are 3 dimensions, as `build` does",
        tuple(x.shape),
    )
    return (1 if channel_axis is None else channel_axis) % x.dim()


class MapRegularizer(Regularizer):
    """A regularizer that has to know the channels from the positions: rank 3 to 5, channels at 1 or at the end.

    Attributes:
        takes_tokens: whether (B, N, C) will do, where neighbours in N need not be neighbours in space.
        told_axis: the channel axis, once `build` has said it.
    """

    takes_tokens: ClassVar[bool] = True
    told_axis: int | None = None

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError unless the tensor is a batch of maps whose channel axis is known."""
        known = 3 <= len(shape) <= 5 and channel_axis is not None
        if not known or not (self.takes_tokens or len(shape) > 3 or channel_axis == 1):
            name, maps = type(self).__module__.rpartition(".")[2], TOKENS if self.takes_tokens else f"{MAPS}, no tokens"
            raise SurgeryError(
                f"{name} at {site_id}: expected {maps}, with a known channel axis, got a tensor of shape {shape} "
                f"with channel axis {channel_axis}; use dropout there"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)
        self.told_axis = channel_axis
