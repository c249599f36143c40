"""`nn.LSTM`, `nn.GRU` and `nn.RNN` step by step on their own weights, with places for noise that fused kernels lack.

    gates = W_ih (x_t * inputs) + b_ih + W_hh (h_{t-1} * hidden) + b_hh
    LSTM    i, f, g, o = gates;  c~ = f * c_{t-1} + i * g;  c_t = cell(c_{t-1}, c~)
            h~ = W_hr (o * tanh(c~));                       h_t = state(h_{t-1}, h~)
    GRU     r, z, n = gates, where r multiplies what W_hh and b_hh give to n;  h~ = (1 - z) * n + z * h_{t-1}
    RNN     h~ = tanh(gates), or relu(gates)

`inputs` and `hidden` are factors that hold for a whole sequence, `cell` and `state` mix an old state with a new one at
each step; a `Noise` names them for one layer and direction, and what it leaves out does nothing. W_ih meets all steps
in one product before the loop. Rows of a step are those sequences that are still running: in a `PackedSequence` they
get fewer, and the reverse direction starts with few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dropsurgery.regularizers._hosts import own_class, require_host

Mix = Callable[[int, Tensor, Tensor], Tensor]
"""(step, old, new) → what the state becomes; the step counts in the sequence's order, in both directions."""

_FORWARDS = (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)
GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


class Noise(NamedTuple):
    """What is done within one layer and direction during one sequence; None does nothing.

    Factors are (B, width), or (gates, B, width) with their own for each gate, in torch's order of the gates. With B = 1
    all sequences share one.
    """

    inputs: Tensor | None = None
    hidden: Tensor | None = None
    cell: Mix | None = None
    state: Mix | None = None


@dataclass(frozen=True)
class Part:
    """One layer in one direction, and what it is given: `batch` sequences of up to `steps` steps."""

    index: int  # as in hx: layer * directions + direction
    layer: int
    reverse: bool
    gates: int
    batch: int
    steps: int
    inputs: int  # the width of x_t
    cells: int  # the width of c_t
    outputs: int  # the width of h_t: that of c_t but for `proj_size`
    like: Tensor  # of the dtype and on the device of x


def silent(part: Part) -> Noise:
    """No noise."""
    return Noise()


def require_recurrent(layer: str, site_id: str, host: nn.Module) -> None:
    """Raise a SurgeryError where a host is no LSTM, GRU or RNN of torch's own forward, or hides its weights."""
    known = isinstance(host, nn.RNNBase) and own_class(host).forward in _FORWARDS
    names: Any = host._flat_weights_names if known else ()
    known = known and all(name in host._parameters for name in names)
    expected = "an nn.LSTM, nn.GRU or nn.RNN that runs torch's own forward on plain parameters"
    require_host(known, layer, site_id, expected, host)


# ---- a whole call ----


def recur(host: nn.RNNBase, input: Any, hx: Any = None, noise: Callable[[Part], Noise] = silent) -> Any:
    """Return what the layer's own forward gives, computed step by step, with the noise that each part is to have.

    Args:
        host: an `nn.LSTM`, `nn.GRU` or `nn.RNN` with any options.
        input: a tensor with or without batch, or a PackedSequence; its noise has the rows in the packed order.
        hx: as the layer takes it.
        noise: called once for each layer and direction, in the order of `hx`.
    """
    sequence = _opened(host, input, hx)
    x, last = _layers(host, sequence, noise)
    return _closed(host, sequence, x, last)


class _Sequence(NamedTuple):
    """An input in one form, whatever form it came in: rows of all steps one after another."""

    rows: Tensor  # (sum of sizes, width)
    sizes: list[int]  # how many sequences run at each step
    states: tuple[Tensor, ...]  # (layers * directions, B, width) each: h, and c
    packed: PackedSequence | None
    batched: bool


def _opened(host: nn.RNNBase, input: Any, hx: Any) -> _Sequence:
    packed = input if isinstance(input, PackedSequence) else None
    if packed is not None:
        sizes: list[int] = packed.batch_sizes.tolist()  # on the CPU wherever the data are
        states = _states(host, packed.data, sizes[0], hx)
        host.check_forward_args(packed.data, _given(host, states), packed.batch_sizes)
        order = packed.sorted_indices
        if hx is not None and order is not None:
            states = tuple(each.index_select(1, order) for each in states)
        return _Sequence(packed.data, sizes, states, packed, True)
    if input.dim() not in (2, 3):
        raise ValueError(f"{own_class(host).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    batched = input.dim() == 3
    if not batched:
        input = input.unsqueeze(0 if host.batch_first else 1)
    steps, batch = (input.shape[1], input.shape[0]) if host.batch_first else input.shape[:2]
    states = _states(host, input, batch, hx, batched)
    host.check_forward_args(input, _given(host, states), None)
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    rows = (input.transpose(0, 1) if host.batch_first else input).reshape(steps * batch, input.shape[-1])
    return _Sequence(rows, [batch] * steps, states, None, batched)


def _states(host: nn.RNNBase, x: Tensor, batch: int, hx: Any, batched: bool = True) -> tuple[Tensor, ...]:
    """The initial states, zeros where none are given."""
    if hx is None:
        count = host.num_layers * (2 if host.bidirectional else 1)
        widths = (host.proj_size or host.hidden_size, host.hidden_size)
        return tuple(x.new_zeros(count, batch, width) for width in widths[: 2 if host.mode == "LSTM" else 1])
    given = hx if host.mode == "LSTM" else (hx,)
    rank = 3 if batched else 2
    if any(each.dim() != rank for each in given):
        ranks = ", ".join(f"{each.dim()}-D" for each in given)
        raise RuntimeError(f"For an input of {rank} dimensions, hx should have {rank} too, but got {ranks} tensors")
    return tuple(given) if batched else tuple(each.unsqueeze(1) for each in given)


def _given(host: nn.RNNBase, states: tuple[Tensor, ...]) -> Any:
    return states if host.mode == "LSTM" else states[0]


def _closed(host: nn.RNNBase, sequence: _Sequence, x: Tensor, last: tuple[Tensor, ...]) -> Any:
    """The output and the last states, in the form that the input had, and in the dtype of torch's own kernel."""
    lower = _lowered(host, sequence.rows)
    if lower is not None:
        x, last = x.to(lower), tuple(each.to(lower) for each in last)
    packed = sequence.packed
    if packed is not None:
        if packed.unsorted_indices is not None:
            last = tuple(each.index_select(1, packed.unsorted_indices) for each in last)
        return packed._replace(data=x), _given(host, last)
    output = x.view(len(sequence.sizes), sequence.sizes[0], x.shape[-1])
    if host.batch_first:
        output = output.transpose(0, 1)
    if not sequence.batched:
        output = output.squeeze(0 if host.batch_first else 1)
        last = tuple(each.squeeze(1) for each in last)
    return output, _given(host, last)


def _lowered(host: nn.RNNBase, x: Tensor) -> torch.dtype | None:
    """What autocast makes of a fused kernel's results; None where there is none, and each operation decides."""
    kind = x.device.type
    fused = kind == "cuda" or (kind == "cpu" and host.mode == "LSTM" and not host.proj_size)
    if not fused or x.dtype != torch.float32 or 0 in x.shape or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


# ---- layers and directions ----


def _layers(host: nn.RNNBase, sequence: _Sequence, noise: Callable[[Part], Noise]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What the last layer gives at all steps, and the last states of all."""
    x, last = sequence.rows, []
    weights = host.all_weights
    directions = 2 if host.bidirectional else 1
    for layer in range(host.num_layers):
        sides = []
        for direction in range(directions):
            index = layer * directions + direction
            part = _part(host, sequence, x, index, layer, bool(direction))
            states = tuple(each[index] for each in sequence.states)
            loop = _Loop(host, part, weights[index], noise(part))
            y, ended = loop.run(x, states, sequence.sizes)
            sides.append(y)
            last.append(ended)
        x = sides[0] if len(sides) == 1 else torch.cat(sides, -1)
        if host.dropout and host.training and layer < host.num_layers - 1:
            x = F.dropout(x, host.dropout)
    return x, tuple(torch.stack(each) for each in zip(*last, strict=True))


def _part(host: nn.RNNBase, sequence: _Sequence, x: Tensor, index: int, layer: int, reverse: bool) -> Part:
    return Part(
        index=index,
        layer=layer,
        reverse=reverse,
        gates=GATES[host.mode],
        batch=sequence.sizes[0],
        steps=len(sequence.sizes),
        inputs=x.shape[-1],
        cells=host.hidden_size,
        outputs=host.proj_size or host.hidden_size,
        like=sequence.rows,
    )


class _Loop:
    """One layer in one direction: its weights, its noise, and the steps."""

    def __init__(self, host: nn.RNNBase, part: Part, weights: Any, noise: Noise) -> None:
        self.part = part
        self.noise = noise
        self.w_ih, self.w_hh, *others = weights
        self.b_ih: Tensor | None = others[0] if host.bias else None
        self.b_hh: Tensor | None = others[1] if host.bias else None
        self.w_hr = others[-1] if host.proj_size else None
        self.by_gate = noise.hidden is not None and noise.hidden.dim() == 3
        self.w_step = self._by_gate(self.w_hh).transpose(1, 2) if self.by_gate else self.w_hh.t()
        steps = {"LSTM": self._lstm, "GRU": self._gru, "RNN_TANH": self._tanh, "RNN_RELU": self._relu}
        self.step = steps[host.mode]

    def run(self, x: Tensor, states: tuple[Tensor, ...], sizes: list[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The outputs of all steps as rows, and the states that each sequence ended with."""
        projected = torch.split(self._projected(x, sizes), sizes, -2)
        outputs: list[Tensor] = [states[0]] * len(sizes)
        ended: list[tuple[Tensor, ...]] = []
        now = states if sizes[0] == sizes[-1] or not self.part.reverse else _rows(states, 0, sizes[-1])
        for t in reversed(range(len(sizes))) if self.part.reverse else range(len(sizes)):
            rows, running = sizes[t], len(now[0])
            if rows < running:  # some have ended
                ended.append(_rows(now, rows, running))
                now = _rows(now, 0, rows)
            elif rows > running:  # in reverse, some begin
                now = _joined((now, _rows(states, running, rows)))
            now = self._mixed(t, now, self.step(projected[t], now))
            outputs[t] = now[0]
        return torch.cat(outputs), _joined((now, *reversed(ended))) if ended else now

    def _mixed(self, t: int, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The states after a step, of which the new ones are what the layer alone would give."""
        state, cell = self.noise.state, self.noise.cell
        if state is None and cell is None:
            return new
        h = new[0] if state is None else state(t, old[0], new[0])
        if len(new) == 1:
            return (h,)
        return h, new[1] if cell is None else cell(t, old[1], new[1])

    # -- products --

    def _projected(self, x: Tensor, sizes: list[int]) -> Tensor:
        """What all steps get from their inputs: (rows, gates * cells), or by gate (gates, rows, cells)."""
        bias, factor = self.b_ih, self.noise.inputs
        if (
            bias is not None and self.b_hh is not None and self.part.gates != 3
        ):  # a GRU's second bias is multiplied by r
            bias = bias + self.b_hh
        if factor is not None and factor.dim() == 3:
            weight = self._by_gate(self.w_ih).transpose(1, 2)
            y = torch.bmm(spread(x.expand(self.part.gates, *x.shape), factor, sizes), weight)
            y = y if bias is None else y + bias.view(self.part.gates, 1, -1)
            return y if self.by_gate else y.transpose(0, 1).flatten(1)
        y = F.linear(x if factor is None else spread(x, factor, sizes), self.w_ih, bias)
        return y.view(len(x), self.part.gates, -1).transpose(0, 1) if self.by_gate else y

    def _by_gate(self, weight: Tensor) -> Tensor:
        return weight.view(self.part.gates, -1, weight.shape[1])

    def _noisy(self, h: Tensor) -> Tensor:
        factor = self.noise.hidden
        if factor is None:
            return h
        return h * (factor if factor.shape[-2] == len(h) else factor[..., : len(h), :])

    def _gates(self, projected: Tensor, h: Tensor) -> Tensor:
        """All gates before their activations, of the form that `_projected` gives."""
        product = torch.baddbmm if self.by_gate else torch.addmm
        y: Tensor = product(projected, self._noisy(h), self.w_step)
        return y

    # -- steps --

    def _lstm(self, projected: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = states
        gates = self._gates(projected, h)
        i, f, g, o = gates.unbind() if self.by_gate else gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return h if self.w_hr is None else F.linear(h, self.w_hr), c

    def _gru(self, projected: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h,) = states
        noisy = self._noisy(h)
        if self.by_gate:
            zero = 0 if self.b_hh is None else self.b_hh.view(3, 1, -1)
            r, z, n = (torch.bmm(noisy, self.w_step) + zero).unbind()
            x_r, x_z, x_n = projected.unbind()
        else:
            y = torch.mm(noisy, self.w_step) if self.b_hh is None else torch.addmm(self.b_hh, noisy, self.w_step)
            r, z, n = y.chunk(3, -1)
            x_r, x_z, x_n = projected.chunk(3, -1)
        r, z = (x_r + r).sigmoid(), (x_z + z).sigmoid()
        n = (x_n + r * n).tanh()
        return (n + z * (h - n),)

    def _tanh(self, projected: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._gates(projected, states[0]).view(-1, self.part.cells).tanh(),)

    def _relu(self, projected: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._gates(projected, states[0]).view(-1, self.part.cells).relu(),)


def _rows(states: tuple[Tensor, ...], begin: int, end: int) -> tuple[Tensor, ...]:
    return tuple(each[begin:end] for each in states)


def _joined(parts: tuple[tuple[Tensor, ...], ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


# ---- factors of sequences ----


def spread(rows: Tensor, factor: Tensor, sizes: list[int]) -> Tensor:
    """Rows (..., sum of sizes, width) of all steps, times factors (..., B, width) that are the same at each step."""
    if factor.shape[-2] == 1:
        return rows * factor
    if sizes[0] == sizes[-1]:
        steps = rows.view(*rows.shape[:-2], len(sizes), sizes[0], rows.shape[-1])
        return (steps * factor.unsqueeze(-3)).flatten(-3, -2)
    return rows * torch.cat([factor[..., :size, :] for size in sizes], -2)


def scaled(sequence: Any, factor: Tensor, batch_first: bool) -> Any:
    """A sequence as a recurrent layer takes or gives it, times factors (B, width) that are the same at each step."""
    if isinstance(sequence, PackedSequence):
        return sequence._replace(data=spread(sequence.data, factor, sequence.batch_sizes.tolist()))
    return sequence * (factor.unsqueeze(1) if batch_first and sequence.dim() == 3 else factor)
