"""Variational dropout and embedding dropout: against plain loops over single numbers of one sequence at a time."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from dropsurgery import apply_recipe, strip
from dropsurgery.errors import PlanError, SurgeryError
from dropsurgery.regularizers._recurrent import Noise, Part, recur
from dropsurgery.regularizers.embedding_dropout import EmbeddingDropout, embedding_dropout
from dropsurgery.regularizers.variational_dropout import (
    Factors,
    VariationalDropout,
    draws,
    factors_of,
    fused,
    variational_dropout,
)

LENGTHS = (3, 5, 1, 4)
INPUTS, CELLS = 3, 4


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


class Option(NamedTuple):
    """A recurrent layer, and how it is called."""

    mode: str
    layers: int
    bidirectional: bool
    batch_first: bool
    bias: bool
    proj: int
    given: bool
    form: str

    def layer(self) -> nn.RNNBase:
        names = {"LSTM": nn.LSTM, "GRU": nn.GRU, "tanh": nn.RNN, "relu": nn.RNN}
        more: dict[str, Any] = {"nonlinearity": self.mode} if names[self.mode] is nn.RNN else {}
        more |= {"proj_size": self.proj} if self.proj else {}
        return names[self.mode](
            INPUTS,
            CELLS,
            self.layers,
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.bidirectional,
            dtype=torch.float64,
            **more,
        )

    def call(self) -> tuple[Any, Any]:
        """An input of this form, and the initial states."""
        sequences = [torch.randn(n, INPUTS, dtype=torch.float64) for n in LENGTHS]
        if self.form == "packed":
            input: Any = pack_sequence(sequences, enforce_sorted=False)
        elif self.form == "packed, sorted":
            input = pack_sequence(sorted(sequences, key=len, reverse=True))
        elif self.form == "one":
            input = sequences[1]
        else:
            input = torch.randn((4, 5, INPUTS) if self.batch_first else (5, 4, INPUTS), dtype=torch.float64)
        batch = () if self.form == "one" else (4,)
        count = self.layers * (2 if self.bidirectional else 1)
        h = torch.randn(count, *batch, self.proj or CELLS, dtype=torch.float64)
        c = torch.randn(count, *batch, CELLS, dtype=torch.float64)
        return input, ((h, c) if self.mode == "LSTM" else h) if self.given else None


GRID = [
    Option(*each)
    for each in itertools.product(
        ("LSTM", "GRU", "tanh", "relu"),
        (1, 2, 3),
        (False, True),
        (False, True),
        (True, False),
        (0, 2),
        (False, True),
        ("batch", "one", "packed", "packed, sorted"),
    )
    if each[0] == "LSTM" or not each[5]
]
FEW = [option for index, option in enumerate(GRID) if index % 11 == 0]


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data, result.batch_sizes]
    return [each for part in result for each in flat(part)] if isinstance(result, tuple) else [result]


def close(a: Any, b: Any, most: float = 1e-12) -> bool:
    return all(x.shape == y.shape and (x - y).abs().max() <= most for x, y in zip(flat(a), flat(b), strict=True))


def share_is(drop: Tensor, p: float) -> bool:
    """Whether independent draws were dropped with probability p, within 4 standard errors."""
    return bool(abs(drop.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / drop.numel()))


def uncorrelated(a: Tensor, b: Tensor) -> bool:
    """Whether two masks were drawn apart: their correlation is that of chance, within 4 standard errors."""
    return bool(abs(np.corrcoef(a.flatten().double(), b.flatten().double())[0, 1]) <= 4 / math.sqrt(a.numel()))


# ---- the formulas, for one sequence of one batch at a time ----


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class Wrong(NamedTuple):
    """Variants that are not the method."""

    carry: bool = False  # the state that a GRU carries over is masked too
    cell: bool = False  # an LSTM's cell is masked
    each_step: bool = False  # another mask at each step


RIGHT = Wrong()


class OneSequence:
    """One layer and direction over the steps (T, width) of one sequence, with factors (width,) or (gates, width)."""

    def __init__(self, host: nn.RNNBase, index: int, noise: Noise, row: int, wrong: Wrong = RIGHT) -> None:
        arrays = [weight.detach().numpy() for weight in host.all_weights[index]]
        self.w_ih, self.w_hh = arrays[:2]
        zero = np.zeros(len(self.w_ih))
        self.b_ih, self.b_hh = arrays[2:4] if host.bias else (zero, zero)
        self.w_hr = arrays[-1] if host.proj_size else None
        self.mode, self.wrong = host.mode, wrong
        self.gates = len(self.w_ih) // host.hidden_size
        self.masks = [self.of(noise.inputs, row, self.w_ih), self.of(noise.hidden, row, self.w_hh)]

    def of(self, factor: Tensor | None, row: int, weight: np.ndarray) -> np.ndarray:
        """The factors of each gate (gates, width)."""
        if factor is None:
            return np.ones((self.gates, weight.shape[1]))
        own = factor[..., row if factor.shape[-2] > 1 else 0, :].numpy()
        return own if own.ndim == 2 else np.stack([own] * self.gates)

    def by_gate(self, weight: np.ndarray, bias: np.ndarray, masks: np.ndarray, x: np.ndarray) -> np.ndarray:
        weights = np.split(weight, self.gates)
        biases = np.split(bias, self.gates)
        return np.stack([w @ (x * m) + b for w, m, b in zip(weights, masks, biases, strict=True)])

    def step(self, x: np.ndarray, h: np.ndarray, c: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        from_x = self.by_gate(self.w_ih, self.b_ih, self.masks[0], x)
        from_h = self.by_gate(self.w_hh, self.b_hh, self.masks[1], h)
        if self.mode == "GRU":
            r, z = sigmoid(from_x[0] + from_h[0]), sigmoid(from_x[1] + from_h[1])
            n = np.tanh(from_x[2] + r * from_h[2])
            return (1 - z) * n + z * (h * self.masks[1][0] if self.wrong.carry else h), None
        total = from_x + from_h
        if self.mode != "LSTM":
            return (np.tanh(total[0]) if self.mode == "RNN_TANH" else np.maximum(total[0], 0)), None
        i, f, o = (sigmoid(total[gate]) for gate in (0, 1, 3))
        c = f * (c * self.masks[1][0] if self.wrong.cell else c) + i * np.tanh(total[2])
        h = o * np.tanh(c)
        return (h if self.w_hr is None else self.w_hr @ h), c

    def run(self, x: np.ndarray, h: np.ndarray, c: np.ndarray | None, reverse: bool) -> tuple[np.ndarray, list]:
        out = np.zeros((len(x), len(h)))
        for t in reversed(range(len(x))) if reverse else range(len(x)):
            if self.wrong.each_step:
                chance = np.random.default_rng(t)
                self.masks = [chance.permuted(mask, axis=1) for mask in self.masks]
            h, c = self.step(x[t], h, c)
            out[t] = h
        return out, [h] if c is None else [h, c]


def expected(host: nn.RNNBase, input: Any, hx: Any, factors: Factors, wrong: Wrong = RIGHT) -> list[Tensor]:
    """What each sequence gives by itself: outputs one after another, and the last states (index, B, width)."""
    packed = isinstance(input, PackedSequence)
    if packed:
        padded, lengths = pad_packed_sequence(input, batch_first=True)
    else:
        padded = input[None] if input.dim() == 2 else input if host.batch_first else input.transpose(0, 1)
        lengths = [padded.shape[1]] * len(padded)
    states = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
    directions = 2 if host.bidirectional else 1
    widths = (host.proj_size or host.hidden_size, host.hidden_size)[: 2 if host.mode == "LSTM" else 1]
    outputs, last = [], []
    for row, length in enumerate(lengths):
        x, ended = padded[row, :length].numpy(), []
        for layer in range(host.num_layers):
            sides = []
            for direction in range(directions):
                index = layer * directions + direction
                start = [np.zeros(width) for width in widths]
                if states:
                    start = [(each if each.dim() == 3 else each[:, None])[index, row].numpy() for each in states]
                one = OneSequence(host, index, factors.parts[index], row, wrong)
                y, end = one.run(x, start[0], start[1] if len(start) == 2 else None, bool(direction))
                sides.append(y)
                ended.append(end)
            x = np.concatenate(sides, 1)
        if factors.output is not None:
            x = x * factors.output[row if len(factors.output) > 1 else 0].numpy()
        outputs.append(torch.from_numpy(x))
        last.append(ended)
    ends = [
        torch.tensor(np.array([[part[k] for part in row] for row in last])).transpose(0, 1) for k in range(len(widths))
    ]
    return [torch.cat(outputs), *ends]


def in_one_form(host: nn.RNNBase, result: Any) -> list[Tensor]:
    """What a layer gave, as `expected` has it."""
    output, last = result
    if isinstance(output, PackedSequence):
        padded, lengths = pad_packed_sequence(output, batch_first=True)
        data = torch.cat([line[:n] for line, n in zip(padded, lengths, strict=True)])
    else:
        batch = output[None] if output.dim() == 2 else output if host.batch_first else output.transpose(0, 1)
        data = batch.flatten(0, 1)
    states = last if isinstance(last, tuple) else (last,)
    return [data.detach(), *((each if each.dim() == 3 else each[:, None]).detach() for each in states)]


def agree(host: nn.RNNBase, result: Any, wanted: list[Tensor]) -> bool:
    return close(tuple(in_one_form(host, result)), tuple(wanted))


def silent_factors(host: nn.RNNBase) -> Factors:
    return Factors([Noise()] * len(host.all_weights), None)


# ---- without noise: the layer itself ----


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "tanh", "relu"])
def test_the_loop_is_the_layer(mode: str) -> None:
    options = [option for option in GRID if option.mode == mode]
    assert len(options) >= 192
    for option in options:
        host = option.layer()
        input, hx = option.call()
        assert close(recur(host, input, hx), host(input, hx)), option


def test_the_loop_has_the_layers_gradients() -> None:
    for option in FEW:
        host, (input, hx) = option.layer(), option.call()
        grads = []
        for run in (host, lambda *given, host=host: recur(host, *given)):
            host.zero_grad()
            sum(each.double().square().sum() for each in flat(run(input, hx))).backward()
            grads.append(tuple(parameter.grad.clone() for parameter in host.parameters()))
        assert close(*grads, most=1e-10), option


@pytest.mark.parametrize("option", FEW[:4])
def test_the_formulas_of_this_file_are_the_layers(option: Option) -> None:
    host, (input, hx) = option.layer(), option.call()
    assert agree(host, host(input, hx), expected(host, input, hx, silent_factors(host)))


def test_between_layers_torchs_own_dropout_stays() -> None:
    host, x = nn.GRU(3, 40, 2, dropout=0.5), torch.randn(6, 5, 3)
    assert not torch.equal(recur(host, x)[0], recur(host, x)[0])
    assert close(recur(host.eval(), x), host(x), 1e-6)
    one = nn.GRU(3, 40, 1)
    one.dropout = 0.5  # after the last layer there is none
    assert close(recur(one, x), recur(one.eval(), x), 0)


def test_errors_are_those_of_the_layer() -> None:
    host = nn.LSTM(3, 4, batch_first=True)
    for input, hx in (
        (torch.randn(2, 5, 7), None),
        (torch.randn(2, 5, 3, 1), None),
        (torch.randn(2, 5, 3), (torch.zeros(1, 3, 4), torch.zeros(1, 2, 4))),
        (torch.randn(2, 5, 3), (torch.zeros(1, 4), torch.zeros(1, 4))),
        (torch.randn(2, 0, 3), None),
    ):
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            host(input, hx)
        with pytest.raises(theirs.type):
            recur(host, input, hx)


# ---- with masks ----


def drawn_for(host: nn.RNNBase, rows: int, tied: bool, rates: tuple[float, ...] = (0.4, 0.3, 0.5)) -> Factors:
    return factors_of(host, rows, rates, torch.zeros((), dtype=torch.float64), tied=tied)


@pytest.mark.parametrize("tied", [True, False])
def test_masks_enter_as_the_formulas_have_it(tied: bool) -> None:
    for option in FEW:
        host, (input, hx) = option.layer(), option.call()
        rows = 1 if option.form == "one" else 4
        numbers = torch.rand(draws(host, rows, tied=tied))
        y = variational_dropout(host, input, hx, 0.4, 0.3, 0.5, tied=tied, numbers=numbers)
        rates = (0.4, 0.3, 0.5)
        factors = factors_of(host, rows, rates, torch.zeros((), dtype=torch.float64), tied=tied, numbers=numbers)
        assert agree(host, y, expected(host, input, hx, factors)), option
        assert not close(y, host(input, hx), 1e-3), option


@pytest.mark.parametrize(
    ("mode", "wrong"),
    [("GRU", Wrong(carry=True)), ("LSTM", Wrong(cell=True)), ("tanh", Wrong(each_step=True))],
)
def test_other_readings_are_told_apart(mode: str, wrong: Wrong) -> None:
    host = Option(mode, 2, True, True, True, 0, False, "batch").layer()
    input, factors = torch.randn(4, 5, INPUTS, dtype=torch.float64), drawn_for(host, 4, True)
    y = recur(host, input, None, lambda part: factors.parts[part.index])
    kept = Factors(factors.parts, None)
    assert agree(host, y, expected(host, input, None, kept))
    assert not close(tuple(in_one_form(host, y)), tuple(expected(host, input, None, kept, wrong)), 1e-3)


def test_masks_follow_the_numbers() -> None:
    """Number by number: dropped below p, in the order of layers and directions, input, state, gates, and the output."""
    host = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    rates, numbers = (0.4, 0.25, 0.5), torch.rand(draws(host, 5, tied=False))
    factors = factors_of(host, 5, rates, torch.zeros(()), tied=False, numbers=numbers)
    left = iter(numbers.tolist())
    for index, part in enumerate(factors.parts):
        for factor, p, width in ((part.inputs, 0.4, 3 if index < 2 else 4), (part.hidden, 0.25, 2)):
            assert factor.shape == (4, 5, width)
            for each in factor.flatten().tolist():
                assert each == pytest.approx(0.0 if next(left) < np.float32(p) else 1 / (1 - p))
    for each in factors.output.flatten().tolist():
        assert each == (0.0 if next(left) < 0.5 else 2.0)
    assert factors.output.shape == (5, 4) and not list(left)
    none = factors_of(host, 5, (0.0, 0.3, 0.0), torch.zeros(()))
    assert none.output is None and all(part.inputs is None and part.hidden.shape == (5, 2) for part in none.parts)
    assert draws(host, 5, (False, True, False)) == 4 * 5 * 2


@pytest.mark.parametrize("tied", [True, False])
def test_the_fused_kernel_on_masked_weights_is_the_loop(tied: bool) -> None:
    for option in FEW:
        host, (input, hx) = option.layer(), option.call()
        factors = drawn_for(host, 1, tied)
        loop = recur(host, input, hx, lambda part: factors.parts[part.index])  # noqa: B023
        assert close(fused(host, input, hx, factors.parts), loop), option
        numbers = torch.rand(draws(host, 1, tied=tied))
        y = variational_dropout(host, input, hx, 0.4, 0.3, 0.5, tied=tied, mask="batch", numbers=numbers)
        rates = (0.4, 0.3, 0.5)
        factors = factors_of(host, 1, rates, torch.zeros((), dtype=torch.float64), tied=tied, numbers=numbers)
        assert agree(host, y, expected(host, input, hx, factors)), option


def test_gradients_of_the_fused_kernel_are_those_of_the_loop() -> None:
    host, x = nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64), torch.randn(5, 6, 3, dtype=torch.float64)
    factors, grads = drawn_for(host, 1, False), []
    for result in (fused(host, x, None, factors.parts), recur(host, x, None, lambda part: factors.parts[part.index])):
        host.zero_grad()
        result[0].square().sum().backward()
        grads.append(tuple(parameter.grad.clone() for parameter in host.parameters()))
    assert close(*grads)


def exposed(p_input: float, p_hidden: float, p_output: float, **options: Any) -> tuple[VariationalDropout, nn.RNN]:
    """A layer that gives its input back, times its masks: on ones, and with states of ones."""
    host = nn.RNN(60, 60, nonlinearity="relu", bias=False)
    with torch.no_grad():
        host.weight_ih_l0.copy_(torch.eye(60) if p_input else torch.zeros(60, 60))
        host.weight_hh_l0.copy_(torch.eye(60) if p_hidden else torch.zeros(60, 60))
        if p_output and not p_input:
            host.weight_ih_l0.copy_(torch.eye(60))
    layer = VariationalDropout(p_input, p_hidden, p_output, **options)
    layer.bind(host)
    return layer, host


def masks_seen(layer: VariationalDropout, batch: int = 300, steps: int = 7) -> Tensor:
    """The factors (steps, batch, 60) that the layer's output shows."""
    with torch.no_grad():
        y: Tensor = layer(torch.ones(steps, batch, 60), torch.ones(1, batch, 60))[0]
    return y


@pytest.mark.parametrize("rates", [(0.4, 0.0, 0.0), (0.0, 0.3, 0.0), (0.0, 0.0, 0.6)])
def test_a_mask_holds_for_all_steps_of_one_sequence(rates: tuple[float, ...]) -> None:
    layer, _ = exposed(*rates)
    p = max(rates)
    y = masks_seen(layer)
    drop = y == 0
    assert (drop == drop[0]).all()  # the same at each step
    assert share_is(drop[0], p)
    assert uncorrelated(drop[0, 1:], drop[0, :-1]) and uncorrelated(drop[0, :, 1:], drop[0, :, :-1])
    assert uncorrelated(drop[0], (masks_seen(layer) == 0)[0])  # and another in the next call
    first = y[0]
    assert torch.allclose(first[first != 0], torch.tensor(1 / (1 - p)))
    assert abs(first.mean() - 1) <= 4 * math.sqrt(p / (1 - p) / first.numel())


def test_wrong_masks_are_seen() -> None:
    """Dropped at each step by itself, as `nn.LSTM(dropout=…)` does; or locked over the batch (1, B, C) on (B, T, C)."""
    x = torch.ones(7, 300, 60)

    def locked(y: Tensor) -> bool:
        drop = y == 0
        return bool((drop == drop[0]).all()) and uncorrelated(drop[0, 1:], drop[0, :-1])

    layer, _ = exposed(0.0, 0.0, 0.4)
    assert locked(layer(x)[0])
    assert not locked(F.dropout(x, 0.4))
    by_batch = x.transpose(0, 1) * (torch.rand(1, 7, 60) >= 0.4)
    assert not locked(by_batch.transpose(0, 1))
    one_for_all, _ = exposed(0.0, 0.0, 0.4, mask="batch")
    assert not locked(one_for_all(x)[0])


@pytest.mark.parametrize("which", [0, 1])
def test_layers_and_directions_have_masks_of_their_own(which: int) -> None:
    host = nn.GRU(50, 25, 3, bidirectional=True)
    parts = drawn_for(host, 200, True).parts
    drops = [part[which] == 0 for part in parts]
    assert len(drops) == 6
    assert all(uncorrelated(a, b) for a, b in itertools.combinations(drops, 2))


def test_gates_share_masks_or_not() -> None:
    host = nn.LSTM(50, 50)
    for tied in (True, False):
        layer = VariationalDropout(0.4, 0.3, 0.0, tied=tied, mask="batch")
        layer.bind(host)
        columns = []
        for _ in range(40):
            host.zero_grad()
            layer(torch.randn(4, 3, 50))[0].square().sum().backward()
            grads = (host.weight_ih_l0.grad, host.weight_hh_l0.grad)
            drops = [(grad.view(4, 50, 50) == 0) for grad in grads]
            assert all((drop == drop[:, :1]).all() for drop in drops)  # whole columns
            columns.append(torch.stack([drop[:, 0] for drop in drops]))
        seen = torch.stack(columns, 2)  # (input and state, gates, calls, columns)
        assert share_is(seen[0, 0], 0.4) and share_is(seen[1, 0], 0.3) and uncorrelated(seen[0, 0], seen[1, 0])
        for (a, b), which in itertools.product(itertools.combinations(range(4), 2), range(2)):
            same = torch.equal(seen[which, a], seen[which, b])
            assert same if tied else uncorrelated(seen[which, a], seen[which, b])


def test_masked_outputs_of_gates_are_not_masked_inputs() -> None:
    """awd-lstm-lm's WeightDrop(variational=True) masks rows; others write zeros into the parameters for good."""
    host = nn.LSTM(50, 50)

    def masks_columns(weight: Tensor) -> bool:
        drop = (weight == 0).view(4, 50, 50)
        return bool(drop.any() and (drop == drop[:, :1]).all())

    seen: list[Tensor] = []

    def spy(module: Any, parts: list[Noise]) -> None:
        seen.append(module.weight_hh_l0 * parts[0].hidden)

    spy(host, drawn_for(nn.LSTM(50, 50), 1, True).parts)
    assert masks_columns(seen[0])
    assert not masks_columns(host.weight_hh_l0 * (torch.rand(200, 1) >= 0.4))
    before = copy.deepcopy(host.state_dict())
    layer = VariationalDropout(mask="batch")
    layer.bind(host)
    layer(torch.randn(4, 3, 50))
    assert all(torch.equal(each, before[name]) for name, each in host.state_dict().items())


def test_plain_rnns_have_one_gate() -> None:
    host, x = nn.RNN(3, 4), torch.randn(5, 2, 3)
    runs = []
    for tied in (True, False):
        torch.manual_seed(1)
        runs.append(variational_dropout(host, x, tied=tied))
    assert close(*runs, 0)


# ---- groups of rows ----


def test_rows_of_a_group_share_their_masks() -> None:
    layer, _ = exposed(0.0, 0.0, 0.5, mask_group=4)
    drop = masks_seen(layer, batch=400)[0] == 0
    groups = drop.view(100, 4, 60)
    assert (groups == groups[:, :1]).all()
    assert share_is(groups[:, 0], 0.5) and uncorrelated(groups[1:, 0], groups[:-1, 0])
    with pytest.raises(SurgeryError, match=r"batch of variational_dropout: expected whole groups of 4 rows .*, got 6"):
        masks_seen(layer, batch=6)


def test_groups_keep_their_rows_in_packed_sequences() -> None:
    layer, _ = exposed(0.4, 0.3, 0.5, mask_group=2)
    sequences = [torch.ones(n, 60) for n in LENGTHS]
    with torch.no_grad():
        output, _ = layer(pack_sequence(sequences, enforce_sorted=False), torch.ones(1, 4, 60))
    padded, _ = pad_packed_sequence(output)
    drop = padded[0] == 0
    assert torch.equal(drop[0], drop[1]) and torch.equal(drop[2], drop[3]) and not torch.equal(drop[0], drop[2])


# ---- packed sequences ----


@pytest.mark.parametrize("mask", ["sample", "batch"])
def test_a_packed_sequence_gives_what_it_gives_alone(mask: Any) -> None:
    for option in (each for each in FEW if each.form.startswith("packed")):
        host, (input, hx) = option.layer(), option.call()
        factors = drawn_for(host, 1, True)
        y, last = variational_dropout(host, input, hx, 0, 0, 0, mask=mask)
        noisy = recur(host, input, hx, lambda part: factors.parts[part.index])  # noqa: B023
        padded, lengths = pad_packed_sequence(input)
        for (output, ended), noise in (((y, last), False), (noisy, True)):
            outputs, _ = pad_packed_sequence(output)
            for row, length in enumerate(lengths):
                start = None if hx is None else _row(hx, row)
                alone = recur(
                    host,
                    padded[:length, row : row + 1].transpose(0, 1)
                    if option.batch_first
                    else padded[:length, row : row + 1],
                    start,
                    (lambda part: factors.parts[part.index]) if noise else (lambda part: Noise()),  # noqa: B023
                )
                steps = alone[0].flatten(0, 1)
                assert close(outputs[:length, row], steps) and close(_row(ended, row), alone[1])


def _row(states: Any, row: int) -> Any:
    one = tuple(each[:, row : row + 1] for each in (states if isinstance(states, tuple) else (states,)))
    return one if isinstance(states, tuple) else one[0]


# ---- the layer ----


@pytest.mark.parametrize("options", [{}, {"tied": False}, {"mask": "batch"}, {"mask": "batch", "tied": False}])
def test_the_layer_stays_what_it_was(options: dict[str, Any]) -> None:
    host = nn.LSTM(3, 5, num_layers=2, proj_size=2)
    names, parameters = list(host.state_dict()), list(host.parameters())
    layer, x = VariationalDropout(**options), torch.randn(4, 2, 3)
    layer.bind(host)
    other = nn.LSTM(3, 5, num_layers=2, proj_size=2)
    other.load_state_dict(host.state_dict())
    for train in (True, False, True, False):
        y = layer.train(train)(x)
        assert close(y, other(x), 0) != train
        assert list(host.state_dict()) == names
        assert all(a is b for a, b in zip(host.parameters(), parameters, strict=True))
        assert all(a is b for a, b in zip(host._flat_weights, parameters, strict=True))
        for twin in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
            assert torch.equal(twin(x)[0], other(x)[0])
    host.load_state_dict({name: torch.randn_like(each) for name, each in host.state_dict().items()}, assign=True)
    torch.manual_seed(1)
    y = layer.train()(x)
    torch.manual_seed(1)
    rates = (layer.p_input, layer.p_hidden, layer.p_output)
    assert close(y, variational_dropout(copy.deepcopy(host), x, None, *rates, tied=layer.tied, mask=layer.mask), 0)


def test_only_what_has_a_rate_is_drawn() -> None:
    layer, host = VariationalDropout(0.0, 0.0, 0.0), nn.GRU(3, 5)
    layer.bind(host)
    x = torch.randn(4, 2, 3)
    state = torch.get_rng_state()
    assert close(layer(x), host(x), 0) and torch.equal(torch.get_rng_state(), state)
    layer.set_rate("p_output", 0.5)
    y, last = layer(x)
    assert (y == 0).any() and close(last, host(x)[1], 1e-6)
    layer.set_rate("p_output", 0.0)
    assert close(layer(x), host(x), 0)
    for name in ("p_input", "p_hidden", "p_output"):
        layer.set_rate(name, 1.0)
        assert all(each.isfinite().all() for each in flat(layer(x)))


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_the_compiled_loop_gives_the_same_numbers(make: Callable[..., nn.RNNBase]) -> None:
    host = make(3, 5)
    layer, x = VariationalDropout(0.4, 0.3, 0.2, tied=make is nn.GRU), torch.randn(3, 2, 3)
    layer.bind(host)
    for allow in (False, True):  # torch does not compile RNNs by default: it runs them as they are
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        with torch._dynamo.config.patch(allow_rnn=allow):
            compiled = torch.compile(layer, backend=counter, fullgraph=allow)
            results = []
            for run in (compiled, layer):
                host.zero_grad()
                torch.manual_seed(1)
                y = run(x)
                y[0].square().sum().backward()
                results.append((*flat(y), *(parameter.grad.clone() for parameter in host.parameters())))
        assert counter.frame_count == allow  # no part of the loop by itself
        assert close(*results, 1e-6)


def test_what_it_cannot_mask_is_refused() -> None:
    class Doubled(nn.LSTM):
        def forward(self, x: Tensor, hx: Any = None) -> Any:
            return super().forward(x * 2, hx)

    hidden = parametrizations.spectral_norm(nn.LSTM(3, 5), "weight_hh_l0")
    for host in (nn.LSTMCell(3, 5), Doubled(3, 5), hidden, nn.Linear(3, 5)):
        with pytest.raises(SurgeryError, match=r"variational_dropout at a layer: expected an nn.LSTM.*, got"):
            VariationalDropout().bind(host)
    for options, words in (
        ({"mask": "row"}, "mask: expected 'sample' or 'batch', got 'row'"),
        ({"tied": 1}, "tied: expected true or false, got 1"),
        ({"mask_group": 0}, "mask_group: expected an integer of 1 or more, got 0"),
        ({"mask_group": "picture"}, "mask_group: expected"),
        ({"mask_group": "image", "mask": "batch"}, "mask_group: expected 1, since `mask: batch`"),
    ):
        with pytest.raises(SurgeryError, match=words):
            VariationalDropout(**options)
    with pytest.raises(SurgeryError, match=r"p: expected a number in \[0, 1\], got 1.5"):
        variational_dropout(nn.GRU(3, 4), torch.ones(2, 3), p_hidden=1.5)
    with pytest.raises(
        SurgeryError, match="variational_dropout at a layer: `mask_group: image` expected a layer whose"
    ):
        VariationalDropout(mask_group="image").bind(nn.LSTM(3, 5))


# ---- embeddings ----


def words_kept(y: Tensor) -> Tensor:
    return (y != 0).any(-1)


def locked_to_words(kept: Tensor, words: Tensor) -> bool:
    """Whether within each sequence (rows) equal words have one fate."""
    fates: dict[tuple[int, int], set[bool]] = {}
    for row, (line, fate) in enumerate(zip(words.tolist(), kept.tolist(), strict=True)):
        for word, each in zip(line, fate, strict=True):
            fates.setdefault((row, word), set()).add(each)
    return all(len(each) == 1 for each in fates.values())


@pytest.mark.parametrize("mask", ["sample", "batch"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_words_are_dropped_wherever_they_occur(mask: Any, batch_first: bool) -> None:
    p, host = 0.3, nn.Embedding(40, 3)
    layer = EmbeddingDropout(p, mask, batch_first)
    layer.bind(host)
    words = torch.randint(40, (50, 30))
    given = words if batch_first else words.t()
    seen = []
    for _ in range(20):
        y = layer(given)
        y = y if batch_first else y.transpose(0, 1)
        kept = words_kept(y)
        assert locked_to_words(kept, words)
        assert torch.allclose(y[kept], host(words)[kept] / (1 - p))
        first = [(line == word).nonzero() for line in words for word in range(40)]
        fates = torch.stack(
            [fate[where[0, 0]] for fate, where in zip(kept.repeat_interleave(40, 0), first, strict=True) if len(where)]
        )
        seen.append(fates)
        by_word = [kept[words == word] for word in range(40)]
        assert all(fate.all() or not fate.any() for fate in by_word) == (mask == "batch")
    if mask == "sample":
        assert share_is(~torch.stack(seen), p) and uncorrelated(seen[0], seen[1])
    # A mask that hangs on the place, and not on the word, is seen.
    assert not locked_to_words(torch.rand(words.shape) >= p, words)
    assert torch.equal(layer.eval()(given), host(given))


def test_words_follow_the_numbers() -> None:
    words = torch.tensor([[7, 2, 7, 9], [5, 5, 5, 1]])
    numbers = torch.tensor([[0.1, 0.9, 0.2, 0.0], [0.8, 0.1, 0.0, 0.0]])
    rows = torch.ones(2, 4, 3)
    y = embedding_dropout(rows, words, 0.5, numbers=numbers)
    # In sorted order: 2, 7, 9 have the first row's numbers, 1 and 5 the second's.
    assert torch.equal(y[..., 0], torch.tensor([[2.0, 0, 2, 0], [0, 0, 0, 2]]))
    by_word = torch.tensor([0.0, 0.9, 0.1, 0, 0, 0.6, 0, 0.2, 0, 0.7])
    y = embedding_dropout(rows, words, 0.5, mask="batch", count=10, numbers=by_word)
    assert torch.equal(y[..., 0], torch.tensor([[0.0, 0, 0, 2], [2, 2, 2, 2]]))
    assert embedding_dropout(torch.ones(4, 3), words[0], 0.5, numbers=numbers[0])[:, 0].tolist() == [2, 0, 2, 0]
    assert torch.equal(embedding_dropout(torch.ones(0, 4, 3), words[:0], 0.5), torch.ones(0, 4, 3))


def test_embedding_dropout_refuses_what_it_cannot_take() -> None:
    for host in (nn.Linear(3, 4), nn.EmbeddingBag(3, 4)):
        with pytest.raises(SurgeryError, match=r"embedding_dropout at a layer: expected an nn.Embedding.*, got"):
            EmbeddingDropout().bind(host)
    with pytest.raises(SurgeryError, match="mask: expected 'sample' or 'batch', got 'row'"):
        EmbeddingDropout(mask="row")  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="count: expected the number of words"):
        embedding_dropout(torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64), 0.5, mask="batch")


# ---- whole models ----

ENTRY = {"name": "rnn", "pattern": "rnn", "edge": "module", "insert": "variational_dropout"}


def recipe(*more: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    return {"version": 1, "name": "own", "entries": [{**ENTRY, "with": arguments}, *more]}


class Speech(nn.Module):
    """An LSTM within a larger graph: convolutions before it, a head behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.rnn = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, _) = self.rnn(F.relu(self.conv(x)).transpose(1, 2))
        return self.head(y.mean(1)) + self.head(torch.cat([h[-2], h[-1]], -1))


class Words(nn.Module):
    """A language model over packed sequences, whose forward asks for values: an opaque part."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 5)
        self.rnn = nn.GRU(5, 5, batch_first=True)
        self.head = nn.Linear(5, 12)

    def forward(self, words: Tensor) -> Tensor:
        lengths = [max(1, int((line > 0).sum())) for line in words]
        x = self.embedding(words)
        y, _ = self.rnn(pack_sequence([line[:n] for line, n in zip(x, lengths, strict=True)], enforce_sorted=False))
        return self.head(pad_packed_sequence(y, batch_first=True)[0].sum(1))


def check_surgery(model: nn.Module, made: dict[str, Any], inputs: Tensor, folder: Path, count: int) -> nn.Module:
    """Converted, trained a step, saved, resumed, stripped: eval is the model's own all along."""
    expected = model.eval()(inputs)
    gm: Any = apply_recipe(model, made, example_inputs=inputs, total_steps=4)
    assert len(gm.surgery.regularizers) == count
    assert list(gm.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(gm.parameters(), model.parameters(), strict=True))
    assert torch.equal(gm.eval()(inputs), expected) and torch.equal(gm(inputs), gm(inputs))
    with torch.no_grad(), gm.surgery.active():
        assert not torch.equal(gm(inputs), gm(inputs))  # Monte-Carlo
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    gm.train()
    assert not torch.equal(gm(inputs), gm(inputs))
    gm(inputs).square().mean().backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in gm.parameters())
    torch.save({"model": gm.state_dict(), "surgery": gm.surgery.state_dict()}, folder / "saved.pt")
    saved = torch.load(folder / "saved.pt", weights_only=True)
    again: Any = apply_recipe(copy.deepcopy(model), made, example_inputs=inputs, total_steps=4)
    again.load_state_dict(saved["model"])
    again.surgery.load_state_dict(saved["surgery"])
    assert again.surgery.current_step == 1
    runs = []
    for each in (gm, again):
        torch.manual_seed(3)
        runs.append(each.train()(inputs))
    assert torch.equal(*runs)
    stripped = strip(again).eval()
    assert type(stripped) is type(model) and torch.equal(stripped(inputs), gm.eval()(inputs))
    twin = copy.deepcopy(gm)
    assert torch.equal(twin(inputs), gm(inputs))
    return gm


@pytest.mark.parametrize("options", [{}, {"mask": "batch"}, {"tied": False}])
def test_an_lstm_in_a_larger_graph(options: dict[str, Any], tmp_path: Path) -> None:
    gm: Any = check_surgery(Speech(), recipe(**options), torch.randn(3, 4, 9), tmp_path, 1)
    assert not any(module.__class__.__name__ == "Opaque" for module in gm.modules())


@pytest.mark.parametrize("options", [{}, {"mask": "batch"}])
def test_a_gru_and_an_embedding_in_an_opaque_part(options: dict[str, Any], tmp_path: Path) -> None:
    words = {"name": "words", "pattern": "embedding", "edge": "module", "insert": "embedding_dropout"}
    inputs = torch.randint(1, 12, (4, 7))
    inputs[1, 4:] = inputs[2, 2:] = 0
    check_surgery(Words(), recipe(words, **options), inputs, tmp_path, 2)


def test_all_layers_of_a_sequencer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("sequencer2d_s", num_classes=10)
    nn.init.normal_(model.head.fc.weight, std=0.1)  # it begins at zero
    gm: Any = check_surgery(model, "variational_dropout_lstm", torch.randn(2, 3, 64, 64), tmp_path, 36)  # type: ignore[arg-type]
    assert {type(each).__name__ for each in gm.surgery.regularizers.values()} == {"VariationalDropout"}


def small_sequencer() -> nn.Module:
    return timm.create_model("sequencer2d_s", num_classes=10, layers=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32))


def test_one_mask_an_image_in_a_sequencer() -> None:
    """Rows of the LSTMs' batches are columns and rows of images; those of one image share their masks."""
    images = torch.randn(3, 3, 64, 96)
    gm: Any = apply_recipe(small_sequencer(), "variational_dropout_sequencer", example_inputs=images, total_steps=4)
    for _ in range(4):
        gm.surgery.step()
    sites = gm.surgery.regularizers
    groups = {site.split("#")[0].split("rnn_tokens.")[1]: each._rows_of_an_image() for site, each in sites.items()}
    assert groups == {"rnn_v": (6, 4), "rnn_h": (4, 6)}  # the last stages; the first have twice as many
    shared = []
    for layer in sites.values():
        layer.set_rate("p_input", 0.0)
        layer.set_rate("p_hidden", 0.0)
        layer.set_rate("p_output", 0.5)
        layer.bound().register_forward_hook(lambda _, __, result: shared.append(result[0]))
    gm.train()(images)
    assert len(shared) == 8
    for y in shared:
        drop = (y == 0).view(3, -1, *y.shape[1:])
        assert (drop == drop[:, :1, :1]).all() and not torch.equal(drop[0], drop[1])
    with pytest.raises(SurgeryError, match=r"rnn_v.*: expected \d+ sequences of \d+ steps an image, .*example_inputs"):
        gm(torch.randn(3, 3, 128, 96))
    assert gm(torch.randn(5, 3, 64, 96)).shape == (5, 10)  # another batch is no matter
    with torch.no_grad():
        assert gm.eval()(torch.randn(3, 3, 128, 96)).isfinite().all()


def test_where_no_image_is_told_it_is_refused() -> None:
    class Summed(Speech):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(0, 1)[:7])

    with pytest.raises(
        PlanError, match=r"rnn#0:rnn.module.*whose batch is a multiple of the model's, got \[7, 9, 6\] for 2"
    ):
        apply_recipe(Summed(), recipe(mask_group="image"), example_inputs=torch.randn(2, 4, 4, 9))
    gm: Any = apply_recipe(Speech(), recipe(mask_group="image"), example_inputs=torch.randn(2, 4, 9))
    assert gm.train()(torch.randn(5, 4, 11)).shape == (5, 3)  # one row an image, however long


def test_noise_is_asked_for_part_by_part() -> None:
    parts: list[Part] = []

    def note(part: Part) -> Noise:
        parts.append(part)
        return Noise()

    recur(nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2, batch_first=True), torch.randn(4, 6, 3), None, note)
    assert [(part.index, part.layer, part.reverse) for part in parts] == [
        (0, 0, False),
        (1, 0, True),
        (2, 1, False),
        (3, 1, True),
    ]
    assert [part.inputs for part in parts] == [3, 3, 4, 4]
    assert {(part.gates, part.batch, part.steps, part.cells, part.outputs) for part in parts} == {(4, 4, 6, 5, 2)}


def mixed(host: nn.RNNBase, **mixes: Callable[..., Tensor]) -> Any:
    return recur(host, torch.randn(4, 2, 3, dtype=torch.float64), None, lambda part: Noise(**mixes))


def test_states_are_mixed_after_the_step() -> None:
    """h comes from the cell as the layer computed it, before that is mixed; what is mixed goes on, and comes out."""
    host = nn.LSTM(3, 5, dtype=torch.float64)
    seen: list[tuple[int, Tensor, Tensor]] = []

    def keep_cell(step: int, old: Tensor, new: Tensor) -> Tensor:
        seen.append((step, old, new))
        return old

    y, (h, c) = mixed(host, cell=keep_cell)
    assert [step for step, *_ in seen] == [0, 1, 2, 3] and not c.any() and y.any()
    assert all(not old.any() for _, old, _ in seen) and torch.equal(y[-1], h[0])
    y, (h, c) = mixed(host, state=lambda step, old, new: old)
    assert not y.any() and not h.any() and c.any()
    y, h = mixed(nn.GRU(3, 5, bidirectional=True, dtype=torch.float64), state=lambda step, old, new: (old + new) / 2)
    assert torch.equal(y[-1, :, :5], h[0]) and torch.equal(y[0, :, 5:], h[1])
