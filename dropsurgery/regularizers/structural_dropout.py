"""Structural dropout: cut the last units of a layer, so that they are of use in order (Knodt 2022, arXiv:2205.06906).

    x (..., U, ...) → x * [i < c] * U / c      i = 0 ... U - 1 the place of a unit on the channel axis

    with probability p:   c uniform on lower_bound, lower_bound + step, ... < U      never U itself
    otherwise:            c = U

One draw holds for the whole batch. What is kept at one width is kept at every larger one, so that one net holds nets of
all widths: in training and in eval `set_width(c)`, or `gm.surgery.width(...)` for all sites of a model, keeps the first
c units and multiplies them by U / c. A unit is a channel, or with `granularity: head` an attention head, all of it.

The factor has a long tail, E[U / c] is about log(U / lower_bound) / (1 - lower_bound / U) in a cut: with the paper's
lower_bound of 1 and 256 units 6.1, and 256 at most. The default here is the eighth part of the units, for nets that
were trained without; `lower_bound: 1` is the paper's. `normalize: false` leaves the factor out. In float16 what would
leave its range is set to its largest number.

The p of the released code (JulianKnodt/structural_dropout) is the probability of a cut, as here; a figure of the paper
labels the branches the other way round. That code's last commit compares acos(1 - 2p) to a uniform number, by which
p = 0.5 cuts always and p = 0.01 in a fifth of all forwards; taken here is the commit before it.

Each site draws its own width, as in that code. Sites of one `share`, any name, have one coin and one relative width:
the same place in the grid of each, counted as a share of the grid.

A site may not lie on a residual stream, whose channels go on from block to block: a cut there would have to hold for
all of them. A batch norm behind it that sees the cut channels learns statistics mixed from all widths: a warning names
it. The author's nets normalise before the cut. That convolutions and heads can be cut alike is the author's remark; the
sites of the recipes for them, and the default bound, are the library's choice.

Placement: hidden units of fully connected layers (recipe structural_dropout_vgg), the features that a classifier reads
(structural_dropout_classifier), inner widths of residual blocks (structural_dropout_resnet), hidden units and heads of
transformers (structural_dropout_vit).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Annotated, Literal, Protocol

import torch
from annotated_types import Ge
from torch import Tensor

from dropsurgery.errors import SurgeryError, SurgeryWarning
from dropsurgery.regularizers._base import Keys, Rate, Regularizer, check_count, rate_tensor, require
from dropsurgery.regularizers._taxonomy import Taxonomy
from dropsurgery.regularizers._uniform import uniform

Granularity = Literal["channel", "head"]
_ATTENTION = ("attention", "matmul", "softmax")


class SharedKeys(Keys, Protocol):
    """Where keys come from that all sites of a model get alike."""

    def shared_key(self, site_id: str, name: str) -> Tensor:
        """Return the key of this forward's draw called `name`, a 0-dim int64 tensor on the CPU."""


def structural_dropout(
    x: Tensor,
    p: float | Tensor,
    lower_bound: int | None = None,
    step: int = 1,
    *,
    normalize: bool = True,
    channel_axis: int = 1,
    key: Tensor | None = None,
) -> Tensor:
    """Keep the first c channels of `x`, c drawn for the whole batch, and scale them by U / c; see above.

    Args:
        x: of any shape with a channel axis, of U channels.
        p: probability of a cut, in [0, 1]; as a 0-dim tensor it may move without a compiled model being compiled
            again, and is not checked.
        lower_bound: the least width of a cut, below U; None for the eighth part of U, 1 at least.
        step: between the widths that can be drawn.
        normalize: whether to scale by U / c.
        channel_axis: where the units are.
        key: what the random numbers depend on, a 0-dim int64 CPU tensor; None for torch's global generator.

    Raises:
        SurgeryError: an argument is out of range.
    """
    _check(lower_bound, step, normalize)
    rate = rate_tensor(p, x.device)
    units = x.shape[channel_axis]
    drawn = uniform((2,), x.device, key)
    if units < 2:  # nothing can be cut
        return x.clone()
    return keep_first(x, drawn_width(drawn, rate, units, lower_bound, step), normalize, channel_axis)


def drawn_width(drawn: Tensor, p: Tensor, units: int, lower_bound: int | None = None, step: int = 1) -> Tensor:
    """Return how many of 2 or more units are kept, a 0-dim integer, by numbers `drawn` (2,) in [0, 1).

    By the first of them there is a cut where it is below `p`, a 0-dim tensor; the second gives the place in the grid.
    """
    least = _least(units, lower_bound)
    count = _grid(units, lower_bound, step)
    cut = (drawn[1] * count).long()  # below `count`: a number below 1 times an integer is not rounded up to it
    return torch.where(drawn[0] < p, least + step * cut, units)


def keep_first(x: Tensor, width: Tensor, normalize: bool = True, channel_axis: int = 1) -> Tensor:
    """Return `x` with all but its first `width` channels 0, and these times U / width.

    `width` is a 0-dim integer, from 1 to U.
    """
    units = x.shape[channel_axis]
    # In float32 at least; as a number over a tensor it would be rounded twice.
    kept = width.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.full_like(kept, units) / kept if normalize else torch.ones_like(kept)
    factor = torch.where(torch.arange(units, device=x.device) < width, scale, 0.0).to(x.dtype)
    shape = [1] * x.dim()
    shape[channel_axis] = units
    y = x * factor.view(shape)
    if x.dtype != torch.float16 or not normalize:
        return y
    most = torch.finfo(torch.float16).max
    return y.clamp(-most, most)


class StructuralDropout(Regularizer):
    """`structural_dropout` as a layer; identity in eval, unless a width is set.

    Attributes:
        width: how many units are kept in training and in eval, nothing being drawn; None where that is drawn.
        full_width: the units of the site; known once `build` has said it.
    """

    paper = "Knodt: Structural Dropout for Model Width Compression, 2022, arXiv:2205.06906"
    summary = "cuts the last units, so that the net works at many widths"
    placement = (
        "hidden units of fully connected layers: recipes structural_dropout_vgg, _classifier; extended to _resnet, _vit"
    )
    shapes = "any shape with a channel axis, or (B, heads, N, d) by `granularity: head`"
    taxonomy = Taxonomy(transforms=("data", "architecture"), space="hidden")
    examples = (
        {"p": 0.5},
        {"p": 0.8, "lower_bound": 1, "normalize": False},
        {"p": 0.5, "granularity": "head", "step": 2},
    )
    asks_behind = True

    p: Tensor
    budget: Tensor
    context: SharedKeys | None = None

    def __init__(
        self,
        p: Rate = 0.5,
        lower_bound: Annotated[int, Ge(1)] | None = None,
        step: Annotated[int, Ge(1)] = 1,
        normalize: bool = True,
        granularity: Granularity = "channel",
        share: str | None = None,
        eval_width: Annotated[int, Ge(1)] | None = None,
    ) -> None:
        super().__init__(p=p)
        _check(lower_bound, step, normalize)
        require(granularity in ("channel", "head"), "granularity", "'channel' or 'head'", granularity)
        require(share is None or (isinstance(share, str) and share != ""), "share", "a name, or nothing", share)
        if eval_width is not None:
            check_count("eval_width", eval_width, 1)
            self.eval_rule = f"keeps the first {eval_width} units"
        self.lower_bound, self.step, self.normalize = lower_bound, step, normalize
        self.granularity: Granularity = granularity
        self.share, self.eval_width = share, eval_width
        self._units: int | None = None
        # A tensor, so that a compiled model sees it move; whether it counts is a flag of its own.
        self.register_buffer("budget", torch.tensor(1), persistent=False)
        self.width: int | None = None
        self._budgeted = False

    @property
    def full_width(self) -> int:
        """How many units its site has; a SurgeryError where it was never told."""
        require(self._units is not None, "structural_dropout", "to be told its units by `build`", None)
        return self._units  # type: ignore[return-value]

    def set_width(self, width: int | None) -> None:
        """Keep the first `width` units from now on, in training and in eval; None to draw again.

        A model that is compiled need not be compiled again for another width. Copies and files of a model forget it.
        """
        if width is not None:
            check_count("width", width, 1)
            most = self._units
            require(most is None or width <= most, "width", f"{most} units at most, as {self.site_id} has", width)
            self.budget.fill_(width)
        self.width, self._budgeted = width, width is not None

    def build(self, *, channel_axis: int | None, channels: int | None, shape: tuple[int, ...], site_id: str) -> None:
        """Take the facts; a SurgeryError unless there are units that can be cut, and they are those of no stream."""
        where = f"structural_dropout at {site_id}"
        axis = self._axis(shape, channel_axis, where)
        super().build(channel_axis=axis, channels=channels, shape=shape, site_id=site_id)
        units = self._units = shape[axis]
        least = self.lower_bound or 1
        if units <= least or units < (self.eval_width or 1):
            wanted = f"more units than its lower_bound of {least}"
            also = "" if self.eval_width is None else f", and its eval_width of {self.eval_width} at least"
            raise SurgeryError(
                f"{where}: expected {wanted}{also}, got {units}; leave this site out (`where: {{exclude: …}}`)"
            )
        if self.behind is None:
            return
        if self.behind.stream:
            raise SurgeryError(
                f"{where}: expected units that one block alone uses, got those of a residual stream, which go on to "
                f"'{self.behind.stream}'; cut between two layers of a branch (`where: {{path: branch}}`)"
            )
        self._tell_norms(self.behind.norms, where)

    def _axis(self, shape: tuple[int, ...], channel_axis: int | None, where: str) -> int:
        """Where the units are."""
        if self.granularity == "head":
            if len(shape) != 4 or (self.producer and self.producer[0] not in _ATTENTION):
                raise SurgeryError(
                    f"{where}: expected heads (B, heads, N, d) behind the product with the values (edge "
                    f"attention.output) for `granularity: head`, got shape {shape} behind "
                    f"{' '.join(self.producer) or 'an unknown operation'}; use `granularity: channel` there"
                )
            return 1
        if channel_axis is None:
            raise SurgeryError(f"{where}: expected a known channel axis, got none for shape {shape}; use dropout there")
        return channel_axis

    @staticmethod
    def _tell_norms(norms: tuple[str, ...], where: str) -> None:
        """Warn of batch norms that see the channels that were cut."""
        if norms:
            warnings.warn(
                f"{where}: the batch norm {', '.join(norms[:3])} behind it sees channels that are cut in some forwards "
                "and scaled in others, and learns statistics mixed from all widths; insert it behind the norm",
                SurgeryWarning,
                stacklevel=2,
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` cut to the width that is set, or else drawn; `x` itself in eval, and at rate 0, without one."""
        if self._budgeted:
            return keep_first(x, self._within(x, self.budget), self.normalize, self.channel_axis)
        if self.eval_width is not None and not (self.training or self.forced):
            width = torch.full((), self.eval_width, device=x.device)
            return keep_first(x, self._within(x, width), self.normalize, self.channel_axis)
        if not self.active:
            return x
        axis, key = self.channel_axis, self._key()
        return structural_dropout(
            x, self.p, self.lower_bound, self.step, normalize=self.normalize, channel_axis=axis, key=key
        )

    def _within(self, x: Tensor, width: Tensor) -> Tensor:
        """A width of `x`, which a layer alone may be given less than."""
        return width.clamp(max=x.shape[self.channel_axis])

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return the expected share of an input that is cut: p times what a mean cut takes away."""
        units = shape[self.channel_axis]
        if self.width is not None:
            return 1 - min(self.width, units) / units
        if units < 2:
            return 0.0
        mean = _least(units, self.lower_bound) + self.step * (_grid(units, self.lower_bound, self.step) - 1) / 2
        return self._rates["p"] * (1 - mean / units)

    def extra_repr(self) -> str:
        """Return the rate, the grid, and what else is not as usual."""
        options = [f"{super().extra_repr()}, lower_bound={self.lower_bound}, step={self.step}"]
        options += [] if self.normalize else ["normalize=False"]
        options += [] if self.granularity == "channel" else [f"granularity={self.granularity!r}"]
        named = {"share": self.share, "eval_width": self.eval_width, "width": self.width}
        return ", ".join([*options, *(f"{name}={value!r}" for name, value in named.items() if value is not None)])

    def _key(self) -> Tensor | None:
        """The key of the next draw: its own, or that of all sites of its share."""
        if self.share is None or self.context is None:
            return self.next_key()
        return self.context.shared_key(self.site_id, f"structural_dropout|{self.share}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Regularizer:
        # As with the rates: the width moves to a device, and stays what it is.
        super()._apply(fn, recurse)
        self._buffers["budget"] = torch.tensor(self.width or 1, device=self.budget.device)
        return self


def _check(lower_bound: int | None, step: int, normalize: bool) -> None:
    if lower_bound is not None:
        check_count("lower_bound", lower_bound, 1)
    check_count("step", step, 1)
    require(isinstance(normalize, bool), "normalize", "true or false", normalize)


def _least(units: int, lower_bound: int | None) -> int:
    """The least width of a cut."""
    least = max(1, units // 8) if lower_bound is None else lower_bound
    require(least < units, "lower_bound", f"less than the {units} units there are", least)
    return least


def _grid(units: int, lower_bound: int | None, step: int) -> int:
    """How many widths there are: lower_bound, lower_bound + step, ... below the number of units."""
    return (units - _least(units, lower_bound) + step - 1) // step
