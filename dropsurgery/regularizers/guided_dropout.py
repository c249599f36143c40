"""Guided dropout: drop the nodes that have become strong (Keshari, Singh, Vatsa, AAAI 2019, arXiv:1812.03965).

    x → x * t * M      t a strength for each node (channel), learned with the net; M 0 for dropped nodes

    mode top_k:  the floor(p * C) nodes of largest |t| are dropped, the same each time until the strengths change
    mode dr:     |t| / max |t| falls into 100 bins; the nodes of the fullest one (inactive) stay, each of the others
                 (active) is dropped with probability p

A node is dropped for the whole batch, and what is kept is not rescaled. The strengths multiply in eval too. The paper's
drop rate theta is p. In the first `warmup` optimizer steps nothing is dropped and the strengths are only learned.

How the paper trains the strengths and schedules its phases is not verified; bins and region of `dr` are read off a
third party's code (lingjivoo/guided-dropout-pytorch). The library's choices: strengths begin at 1, so that a pretrained
net is at first what it was (that code draws them from [0, 1)); of equal strengths, the first nodes count as stronger;
of equally full bins, the lower is the inactive one; no warm-up unless it is asked for. While all strengths are equal
`dr` drops nothing, and `top_k` the first nodes.

The strengths are parameters that the net did not have, `strength` under `_surgery` in its state_dict: build the
optimizer after the surgery. `strip` takes them away with all else; multiply them into the weights behind them before,
if the net is to compute the same without.

Placement: after an activation, on features (B, D) or maps; the paper's places are not verified, and those of the
recipe guided_dropout_vgg the library's choice.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, check_count, check_state, rate_tensor, require
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import uniform

Mode = Literal["top_k", "dr"]
BINS = 100
_ROUNDING = 1e-3  # a share of nodes that is a whole number is one, though float32 says a little less


def guided_dropout(
    x: Tensor,
    strength: Tensor,
    p: float | Tensor,
    mode: Mode = "dr",
    *,
    channel_axis: int = 1,
    key: Tensor | None = None,
) -> Tensor:
    """Multiply the channels of `x` by their strengths, and drop strong ones.

    Args:
        x: of any shape with a channel axis.
        strength: of each channel, (C,).
        p: share of the nodes ("top_k"), or probability with which an active node is dropped ("dr"), in [0, 1].
        mode: which nodes go; see the head of this file.
        channel_axis: where the C channels are.
        key: what the random numbers depend on, a 0-dim int64 CPU tensor; None for torch's global generator.

    Raises:
        SurgeryError: `strength` does not fit `x`, or an argument is out of range.
    """
    _check_mode(mode)
    rate = rate_tensor(p, x.device)
    size = strength.detach().abs()
    if mode == "top_k":
        dropped = _ranks(size) < _count(rate, len(size))
    else:
        dropped = _is_active(size) & (uniform(size.shape, x.device, key) < rate)
    return _times(x, strength, channel_axis, dropped.logical_not())


class GuidedDropout(Regularizer):
    """`guided_dropout` as a layer that learns its strengths; x times the strengths in eval.

    Alone it is to be told its `channels`, as a norm is; in a recipe `build` tells it.

    Attributes:
        strength: one for each channel, learned; None before it is known how many.
        steps: the optimizer steps counted so far.
    """

    paper = "Keshari, Singh, Vatsa: Guided Dropout, AAAI 2019, arXiv:1812.03965"
    summary = "drops the nodes of largest learned strength"
    placement = "after an activation (recipe guided_dropout_vgg); the paper's own placement is not verified"
    shapes = "any shape with a channel axis"
    needs = "an optimizer built after surgery: it learns a strength for each channel"
    examples = (
        {"p": 0.5, "mode": "top_k"},
        {"p": 0.2, "mode": "dr"},
    )
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden", dependence="parameters")
    learned: ClassVar[tuple[str, ...]] = ("strength",)

    p: Tensor
    strength: nn.Parameter | None

    def __init__(
        self,
        p: Rate = 0.2,
        mode: Mode = "dr",
        warmup: Annotated[int, Ge(0)] = 0,
        channels: Annotated[int, Ge(1)] | None = None,
    ) -> None:
        super().__init__(p=p)
        _check_mode(mode)
        check_count("warmup", warmup, 0)
        if channels is not None:
            check_count("channels", channels, 1)
        self.mode = mode
        self.warmup = warmup
        self.random = mode == "dr"
        self.eval_rule = "times the learned strength of each channel"
        self._set_steps(0)
        self.register_parameter("strength", None if channels is None else nn.Parameter(torch.ones(channels)))

    @property
    def active(self) -> bool:
        """Always: without it, the learned strengths would be left out, in eval too."""
        return True

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts, and make the strengths; a SurgeryError unless it is known what the channels are."""
        if channel_axis is None or channels is None:
            raise SurgeryError(
                f"guided_dropout at {site_id}: expected a known channel axis, whose channels are the nodes, got none "
                f"for shape {shape}; use dropout there"
            )
        if self.strength is not None and len(self.strength) != channels:
            raise SurgeryError(
                f"guided_dropout at {site_id}: expected {len(self.strength)} channels, as its argument says, got "
                f"{channels}; leave `channels` out in a recipe"
            )
        super().build(channel_axis=channel_axis, channels=channels, shape=shape, site_id=site_id)
        self.strength = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` times the strengths, with nodes dropped in training after the warm-up."""
        axis = self.channel_axis
        if self.strength is None:
            raise SurgeryError(f"guided_dropout: expected `channels` where it is used alone, {x.shape[axis]} here")
        if not ((self.training or self.forced) and self._nonzero and self._warm):
            return _times(x, self.strength, axis)
        key = self.next_key() if self.random else None
        return guided_dropout(x, self.strength, self.p, self.mode, channel_axis=axis, key=key)

    def after_step(self) -> None:
        """Count an optimizer step, for the warm-up."""
        self._set_steps(self.steps + 1)

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return the expected share of dropped nodes at the current strengths, 0 during the warm-up."""
        if not self._warm:
            return 0.0
        nodes = shape[self.channel_axis]
        if self.mode == "top_k":
            return math.floor(self._rates["p"] * nodes + _ROUNDING) / nodes
        if self.strength is None:
            return 0.0
        return self._rates["p"] * float(_is_active(self.strength.detach().abs()).double().mean())

    def state(self) -> dict[str, Tensor]:
        """Return the optimizer steps counted; the strengths are in the net's own state_dict."""
        return {"steps": torch.tensor(self.steps, device="cpu")}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        check_state(state, self.state())
        steps = int(state["steps"])
        require(steps >= 0, "state: steps", "0 or more", steps)
        self._set_steps(steps)

    def extra_repr(self) -> str:
        """Return the rate, the mode and the warm-up."""
        return f"{super().extra_repr()}, mode={self.mode!r}, warmup={self.warmup}"

    def _set_steps(self, steps: int) -> None:
        self.steps = steps
        self._warm = steps >= self.warmup  # a flag of its own: a compiled forward is not guarded by the count


def _check_mode(mode: Mode) -> None:
    require(mode in ("top_k", "dr"), "mode", "'top_k' or 'dr'", mode)


def _times(x: Tensor, strength: Tensor, channel_axis: int, kept: Tensor | None = None) -> Tensor:
    """`x` times the strengths of its channels, of which only the `kept` are not 0."""
    channels = x.shape[channel_axis]
    require(strength.shape == (channels,), "strength", f"one number for each of {channels} channels", strength.shape)
    factor = strength.to(torch.promote_types(strength.dtype, torch.float32))
    if kept is not None:
        factor = factor * kept
    shape = [1] * x.dim()
    shape[channel_axis] = channels
    # Multiplied before it is rounded to the dtype of x: the strengths' gradient, a sum over the batch and the map, is
    # so taken in float32 without a copy of x being kept.
    return (x * factor.view(shape)).to(x.dtype)


def _count(p: Tensor, nodes: int) -> Tensor:
    """How many nodes are the share `p`."""
    return (p * nodes + _ROUNDING).floor()


def _ranks(size: Tensor) -> Tensor:
    """The place of each node, 0 for the strongest; of equals the first is first."""
    order = size.argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(size), device=size.device))


def _is_active(size: Tensor) -> Tensor:
    """Which nodes lie outside of the fullest bin of |t| / max |t|."""
    share = size.float() / size.amax().float().clamp(min=torch.finfo(torch.float32).tiny)
    bins = (share * BINS).long().clamp(max=BINS - 1)
    counts = (bins[:, None] == torch.arange(BINS, device=size.device)).sum(0)
    # No two are equal: of equally full bins the lower has more.
    fullest = (counts * BINS - torch.arange(BINS, device=size.device)).argmax()
    return bins != fullest
