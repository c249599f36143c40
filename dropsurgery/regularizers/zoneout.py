"""Zoneout: units of a recurrent state keep their old value for a step (Krueger et al., ICLR 2017, arXiv:1606.01305).

    c_t = d_c * c_{t-1} + (1 - d_c) * c~      d_c ~ Bernoulli(p_cell)       LSTM alone
    h_t = d_h * h_{t-1} + (1 - d_h) * h~      d_h ~ Bernoulli(p_hidden)     LSTM (h~ = o * tanh(c~)), GRU, RNN

c~ and h~ are what the layer alone makes of its states, h~ from a c~ that zoneout has not met. Draws are fresh for each
unit, sample and step, and those of c and h independent; nothing is rescaled. In eval each d is its mean:
c_t = p_cell * c_{t-1} + (1 - p_cell) * c~, and h_t alike, so that eval is another function than the layer's own. h_t
as it is after zoneout is the output, and what the next step and the next layer read. The states before the first step
take part: at a rate of 1 they stay for ever. A sequence that has ended keeps its last state.

A rate is the probability that the OLD value is kept, the paper's z_c and z_h. Some of the authors' scripts
(teganmaharaj/zoneout) take the probability of the update instead: p_cell 0.5 and p_hidden 0.05 are 0.5 and 0.95 there.
A GRU or RNN has no c: p_hidden is its only rate, and p_cell is not used. Layers with `proj_size` zone h behind the
projection.

Two options are of the authors' code. `share_mask`: one draw for c and h, so that equal rates keep the same units.
`static_mask`: one draw a sequence, for all of its steps.

Placement: LSTMs, GRUs and RNNs (recipes zoneout_lstm and zoneout_gru, pattern rnn), and cells (`nn.LSTMCell` …, pattern
rnn_cell), which draw at each call. With a rate above 0 the layer runs step by step, in eval too; with none it is the
layer's own kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers._base import Rate, Regularizer, rate_tensor, require
from dropsurgery.regularizers._hosts import filled, own_class, require_host
from dropsurgery.regularizers._recurrent import Mix, Noise, Part, recur, require_recurrent
from dropsurgery.regularizers._uniform import uniform


def zoneout(
    old: Tensor, new: Tensor, p: float | Tensor, *, numbers: Tensor | None = None, key: Tensor | None = None
) -> Tensor:
    """Return `new` (any shape), in which each unit keeps its value in `old` with probability `p`.

    `numbers`, of the same shape and uniform in [0, 1), decide: a unit is kept where its number is below `p`. By default
    they are drawn: `key`, a 0-dim int64 CPU tensor, is what they depend on; None for torch's global generator. A
    SurgeryError if `p` is a number out of [0, 1].
    """
    rate = rate_tensor(p, new.device)
    numbers = uniform(new.shape, new.device, key) if numbers is None else numbers
    return torch.where(numbers < rate, old.to(new.dtype), new)


def zoneout_mean(old: Tensor, new: Tensor, p: float | Tensor) -> Tensor:
    """Return the mean of `zoneout`, p * old + (1 - p) * new: what it is in eval."""
    return torch.lerp(new, old.to(new.dtype), rate_tensor(p, new.device).to(new.dtype))


class Zoneout(Regularizer):
    """`zoneout` at each step of a recurrent layer, or in each call of a cell; its mean in eval."""

    kind = "swap"
    paper = (
        "Krueger et al.: Zoneout: Regularizing RNNs by Randomly Preserving Hidden Activations, "
        "ICLR 2017, arXiv:1606.01305"
    )
    summary = "lets units of a recurrent state keep their old value for a step"
    placement = "in recurrent layers and cells: zoneout_lstm, zoneout_gru"
    shapes = "what the layer takes: sequences of either layout, with or without batch, packed ones"
    needs = "an nn.LSTM, nn.GRU or nn.RNN, or a cell of one (nn.LSTMCell, nn.GRUCell, nn.RNNCell)"
    examples = ({"p_cell": 0.5, "p_hidden": 0.05}, {"p_cell": 0.2, "p_hidden": 0.2, "share_mask": True})
    drops = "other"
    uncounted = "a unit keeps the value of the step before, which differs from no other value"
    eval_rule = "at each step the mean of old and new state: rate * old + (1 - rate) * new"

    p_cell: Tensor
    p_hidden: Tensor

    def __init__(
        self, p_cell: Rate = 0.5, p_hidden: Rate = 0.05, share_mask: bool = False, static_mask: bool = False
    ) -> None:
        super().__init__(p_cell=p_cell, p_hidden=p_hidden)
        require(isinstance(share_mask, bool), "share_mask", "true or false", share_mask)
        require(isinstance(static_mask, bool), "static_mask", "true or false", static_mask)
        self.share_mask = share_mask
        self.static_mask = static_mask

    @staticmethod
    def example_host() -> nn.Module:
        """Return a small layer for tests."""
        return filled(nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True))

    @staticmethod
    def example_inputs(batch: int) -> tuple[Tensor, ...]:
        """Return an input for that layer: `batch` sequences."""
        return (torch.randn(batch, 6, 5),)

    @property
    def p(self) -> Tensor:
        """The larger of its rates, as the plan has it."""
        return torch.maximum(self.p_cell, self.p_hidden)

    @property
    def _has_cell(self) -> bool:
        host = self.host
        return host is None or isinstance(host, nn.LSTMCell) or getattr(host, "mode", "") == "LSTM"

    def bind(self, host: nn.Module) -> None:
        """Stand in for a recurrent layer or a cell; a SurgeryError where it is none, or cannot have these options."""
        if isinstance(host, nn.RNNCellBase):
            self._refuse(self.static_mask, "static_mask", "sequences, and a cell knows of none", host)
        else:
            require_host(isinstance(host, nn.RNNBase), "zoneout", self.site_id, self.needs, host)
            require_recurrent("zoneout", self.site_id, host)
            projects = bool(getattr(host, "proj_size", 0))
            self._refuse(self.share_mask and projects, "share_mask", "states of one width, and proj_size", host)
        super().bind(host)
        self._note_rates()

    def set_rate(self, name: str, value: float) -> None:
        """Set the rate `name` to `value` in [0, 1], in place; that of c does nothing where there is none."""
        super().set_rate(name, value)
        self._note_rates()

    def _note_rates(self) -> None:
        self._nonzero = bool(self._rates["p_hidden"] or (self._has_cell and self._rates["p_cell"]))

    def _refuse(self, wrong: bool, option: str, why: str, host: nn.Module) -> None:
        if wrong:
            raise SurgeryError(
                f"zoneout at {self.site_id or 'a layer'}: {option} expected {why} separates them, got "
                f"{own_class(host).__name__}; leave it out"
            )

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Return what the layer gives with zoneout; its own forward's result where its rates are 0."""
        if not self._nonzero:
            return self.own(input, hx)
        host: Any = self.bound()
        if isinstance(host, nn.RNNCellBase):
            return self._cell(input, hx)
        return recur(host, input, hx, self._noise)

    def _noise(self, part: Part) -> Noise:
        """What one layer and direction does with its states."""
        rates = (self.p_hidden, self.p_cell) if self._has_cell else (self.p_hidden,)
        if self._draws:
            steps = 1 if self.static_mask else part.steps
            shapes = [(steps, part.batch, width) for width in (part.outputs, part.cells)[: len(rates)]]
            numbers = self._numbers(shapes, part.like.device)
            mixes = [_drawn(each, rate, part.steps) for each, rate in zip(numbers, rates, strict=True)]
        else:
            mixes = [_mean(rate) for rate in rates]
        return Noise(None, None, mixes[1] if len(mixes) > 1 else None, mixes[0])

    def _cell(self, input: Tensor, hx: Any) -> Any:
        """A call of a cell: its own new states, mixed with those that it was given."""
        made = self.own(input, hx)
        new = made if isinstance(made, tuple) else (made,)
        old = [torch.zeros_like(each) for each in new] if hx is None else [hx] if isinstance(hx, Tensor) else hx
        rates = (self.p_hidden, self.p_cell)[: len(new)]
        if self._draws:
            numbers = self._numbers([each.shape for each in new], new[0].device)
            mixed = [zoneout(*each[:3], numbers=each[3]) for each in zip(old, new, rates, numbers, strict=True)]
        else:
            mixed = list(map(zoneout_mean, old, new, rates))
        return tuple(mixed) if isinstance(made, tuple) else mixed[0]

    @property
    def _draws(self) -> bool:
        return self.training or self.forced

    def _numbers(self, shapes: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
        """Uniform numbers for h and, where there is one, for c."""
        if self.share_mask:
            return [uniform(shapes[0], device, self.next_key())] * len(shapes)
        return [uniform(shape, device, self.next_key()) for shape in shapes]

    def expected_drop(self, shape: tuple[int, ...]) -> float:
        """Return p_hidden: the share of the output that is the step before's."""
        return self._rates["p_hidden"]

    def extra_repr(self) -> str:
        """Return the rates, and the options that are on."""
        options = (f", {name}=True" for name in ("share_mask", "static_mask") if getattr(self, name))
        return super().extra_repr() + "".join(options)


def _drawn(numbers: Tensor, p: Tensor, steps: int) -> Mix:
    """Zoneout by numbers for each step, or for all of them."""
    kept = (numbers < p).expand(steps, -1, -1).unbind()

    def mix(step: int, old: Tensor, new: Tensor) -> Tensor:
        keep = kept[step]
        if len(keep) > len(new):  # of a packed sequence some rows have ended, or not begun
            keep = keep[: len(new)]
        return torch.where(keep, old.to(new.dtype), new)

    return mix


def _mean(p: Tensor) -> Mix:
    return lambda step, old, new: zoneout_mean(old, new, p)
