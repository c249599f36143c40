"""Zoneout over all options of torch's recurrent layers, beside the formulas written out one sequence at a time."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

from dropsurgery.context import Context
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers import zoneout as module
from dropsurgery.regularizers._base import Regularizer
from dropsurgery.regularizers.zoneout import Zoneout, zoneout, zoneout_mean
from tests.regularizers.recurrent import (
    CELLS,
    EXACT,
    FORMS,
    HOSTS,
    INPUTS,
    LENGTHS,
    STEPS,
    Given,
    Numbers,
    close,
    given,
    hosts,
    rows_of,
    same,
    tensors,
)

CELLS_OF = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "tanh RNN": nn.RNNCell}


def bound(host: nn.Module, *rates: float, training: bool = True, **options: bool) -> Zoneout:
    layer = Zoneout(*rates, **options)
    layer.bind(host)
    host.train(training)
    return layer.train(training)


# ---- by hand: one sequence at a time, as the paper has it ----

Keep = Callable[[int, str, int, int], Any]
"""(part, "h" or "c", step, row) → how much of each unit's old value is kept: 0 or 1 each, or in eval the rate."""


def squashed(x: Numbers) -> Numbers:
    return 1 / (1 + np.exp(-x))


def alone(mode: str, weights: list[Numbers], bias: bool, x: Numbers, h: Numbers, c: Numbers) -> tuple[Numbers, Numbers]:
    """One step of the layer itself, without projection: (o * tanh(c~) or h~, c~); and for an LSTM, o as well."""
    b_ih, b_hh = weights[2:4] if bias else (0.0, 0.0)
    a, b = weights[0] @ x + b_ih, weights[1] @ h + b_hh
    if mode == "LSTM":
        i, f, g, o = np.split(a + b, 4)
        c = squashed(f) * c + squashed(i) * np.tanh(g)
        return squashed(o), c
    if mode == "GRU":
        (a_r, a_z, a_n), (b_r, b_z, b_n) = np.split(a, 3), np.split(b, 3)
        z = squashed(a_z + b_z)
        return (1 - z) * np.tanh(a_n + squashed(a_r + b_r) * b_n) + z * h, c
    return (np.tanh(a + b) if mode == "RNN_TANH" else np.maximum(a + b, 0)), c


def by_hand(host: nn.RNNBase, given: Given, keep: Keep, wrong: str = "") -> tuple[list[Numbers], list[Numbers]]:
    """The outputs of each sequence and the last states, with zoneout as `keep` has it, or in one of the wrong ways."""
    directions, mode = 1 + host.bidirectional, host.mode
    all_weights = [[each.detach().numpy() for each in part] for part in host.all_weights]
    outputs, last = [], [state.numpy().copy() for state in given.states]
    for row, sequence in enumerate(given.sequences):
        x = sequence.numpy()
        for layer in range(host.num_layers):
            sides = []
            for direction in range(directions):
                part = layer * directions + direction
                weights = all_weights[part]
                h, c = last[0][part, row], last[1][part, row] if mode == "LSTM" else np.zeros(0)
                side: list[Any] = [None] * len(x)
                for t in range(len(x))[:: -1 if direction else 1]:
                    made, new_c = alone(mode, weights, host.bias, x[t], h, c)
                    if mode == "LSTM":
                        d = keep(part, "h" if wrong == "one mask" else "c", t, row)
                        mixed = d * new_c + (1 - d) * c if wrong == "reversed" else d * c + (1 - d) * new_c
                        made = made * np.tanh(mixed if wrong == "zoned cell" else new_c)
                        made = weights[-1] @ made if host.proj_size else made
                        c = mixed
                    d = keep(part, "h", t, row)
                    h = d * made + (1 - d) * h if wrong == "reversed" else d * h + (1 - d) * made
                    side[t] = made if wrong == "other output" else h
                sides.append(np.stack(side))
                last[0][part, row] = h
                if mode == "LSTM":
                    last[1][part, row] = c
            x = np.concatenate(sides, 1)
            if host.dropout == 1 and host.training and layer < host.num_layers - 1:
                x = np.zeros_like(x)
        outputs.append(x)
    return outputs, last


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Numbers]:
    """The uniform numbers that zoneout draws, in order, of which the test can empty the list."""
    numbers: list[Numbers] = []

    def noted(*args: Any) -> Tensor:
        made = uniform(*args)
        numbers.append(made.numpy())
        return made

    uniform = module.uniform
    monkeypatch.setattr(module, "uniform", noted)
    return numbers


def kept_by(layer: Zoneout, numbers: list[Numbers]) -> Keep:
    """What was kept by numbers that were drawn part by part: for h, and then for c where there is one."""
    rates = {"h": float(layer.p_hidden), "c": float(layer.p_cell)}
    names = "hc" if layer.host.mode == "LSTM" else "h"  # type: ignore[union-attr]
    each = 1 if layer.share_mask else len(names)

    def keep(part: int, name: str, step: int, row: int) -> Any:
        own = numbers[part * each + (0 if layer.share_mask else names.index(name))]
        return (own[0 if layer.static_mask else step, row] < rates[name]).astype(float)

    return keep


def mean_of(layer: Zoneout) -> Keep:
    return lambda part, name, step, row: float(layer.p_hidden if name == "h" else layer.p_cell)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", HOSTS)
def test_it_is_what_the_formulas_say(kind: str, form: str, drawn: list[Numbers]) -> None:
    for host in hosts(kind):
        call = given(host, form, with_states=host.batch_first)
        layer = bound(host, 0.4, 0.3)
        drawn.clear()
        assert close(rows_of(call, host, layer(call.input, call.hx)), by_hand(host, call, kept_by(layer, drawn)))
        layer.eval()
        assert close(rows_of(call, host, layer(call.input, call.hx)), by_hand(host, call, mean_of(layer)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", HOSTS)
def test_without_rates_it_is_the_layer(kind: str, form: str) -> None:
    """The layer's own kernel; and the loop says the same."""
    for host, with_states in itertools.product(hosts(kind), (False, True)):
        call = given(host, form, with_states)
        for training in (True, False):
            layer = bound(host, 0.0, 0.0, training=training)
            plain = host(call.input, call.hx)
            own = layer(call.input, call.hx)
            assert same(own, plain)
            layer._nonzero = True
            looped = layer(call.input, call.hx)
            assert close(rows_of(call, host, looped), rows_of(call, host, plain))
            assert type(looped[0]) is type(plain[0]) and looped[0][0].shape == plain[0][0].shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", HOSTS)
def test_at_a_rate_of_one_the_states_stay(kind: str, form: str) -> None:
    for host, training in itertools.product(hosts(kind), (True, False)):
        call = given(host, form, with_states=True)
        outputs, last = rows_of(call, host, bound(host, 1.0, 1.0, training=training)(call.input, call.hx))
        directions = 1 + host.bidirectional
        for row, output in enumerate(outputs):
            ends = call.states[0][-directions:, row].flatten().numpy()
            assert (output == ends).all()
        assert all((ended == begun.numpy()).all() for ended, begun in zip(last, call.states, strict=True))


# ---- what is easily got wrong ----

Run = Callable[[nn.RNNBase, Given, bool], tuple[list[Numbers], list[Numbers]]]
RATES = (0.6, 0.3)


def ours(host: nn.RNNBase, call: Given, training: bool) -> tuple[list[Numbers], list[Numbers]]:
    return rows_of(call, host, bound(host, *RATES, training=training)(call.input, call.hx))


def wrongly(wrong: str) -> Run:
    """Zoneout by hand in a wrong way, with draws of its own."""

    def run(host: nn.RNNBase, call: Given, training: bool) -> tuple[list[Numbers], list[Numbers]]:
        source = np.random.default_rng(0)
        rows, widths = len(call.sequences), {"h": host.proj_size or host.hidden_size, "c": host.hidden_size}
        parts = host.num_layers * (1 + host.bidirectional)
        draws = {name: source.random((parts, STEPS, rows, width)) for name, width in widths.items()}
        rates = dict(zip("ch", RATES, strict=True))

        def keep(part: int, name: str, step: int, row: int) -> Any:
            return draws[name][part, step, row] < rates[name] if training else rates[name]

        none: Keep = lambda part, name, step, row: 0.0  # noqa: E731
        return by_hand(host, call, none if wrong == "no mean" and not training else keep, wrong)

    return run


def one_step(host: nn.RNNBase, rows: int = 3000) -> Given:
    """The same step many times."""
    torch.manual_seed(3)
    x, h, c = torch.randn(1, 1, INPUTS).double(), torch.randn(1, 1, CELLS).double(), torch.randn(1, 1, CELLS).double()
    x, h, c = (each.expand(-1, rows, -1) for each in (x, h, c))
    states = [h, c] if host.mode == "LSTM" else [h]
    hx = (h, c) if host.mode == "LSTM" else h
    return Given(list(x.unbind(1)), x, hx, states, list(range(rows)))


def output_is_the_state(run: Run) -> bool:
    for host, training in itertools.product(hosts("LSTM", num_layers=1, bias=True), (True, False)):
        for form in FORMS:
            outputs, (h, _) = run(host, call := given(host, form, True), training)
            for row in range(len(call.sequences)):
                ends = [outputs[row][-1, :CELLS], outputs[row][0, CELLS:]]
                if not all((a == b).all() for a, b in zip(ends, h[:, row], strict=False)):
                    return False
    return True


def mean_over_draws_is_eval(run: Run) -> bool:
    (host,) = hosts("LSTM", num_layers=1, bidirectional=False, batch_first=False, bias=True)
    call = one_step(host)
    _, drawn = run(host, call, True)
    _, mean = run(host, one_step(host, 1), False)
    for many, one in zip(drawn, mean, strict=True):
        error = many[0].std(0) / math.sqrt(len(many[0])) + 1e-9
        if (np.abs(many[0].mean(0) - one[0, 0]) > 4 * error).any():
            return False
    return True


def masks(run: Run) -> tuple[Numbers, Numbers]:
    """Which units of h and c kept their value in one step, row by row."""
    (host,) = hosts("LSTM", num_layers=1, bidirectional=False, batch_first=False, bias=True)
    call = one_step(host)
    _, states = run(host, call, True)
    h, c = (state[0] == begun[0].numpy() for state, begun in zip(states, call.states, strict=True))
    return h, c


def share_is(kept: Numbers, p: float) -> bool:
    return abs(kept.mean() - p) <= 4 * math.sqrt(p * (1 - p) / kept.size)


def masks_are_independent(run: Run) -> bool:
    h, c = masks(run)
    both = (h & c).mean()
    independent = abs(both - RATES[0] * RATES[1]) <= 4 * math.sqrt(both * (1 - both) / h.size)
    return share_is(h, RATES[1]) and share_is(c, RATES[0]) and bool(independent)


def output_reads_the_new_cell(run: Run) -> bool:
    """The first h is o * tanh(c~), where the cell keeps its old value for good (p_cell = 1, p_hidden = 0)."""
    (host,) = hosts("LSTM", num_layers=1, bidirectional=False, batch_first=False, bias=True)
    call = one_step(host, 1)
    _, (h, c) = run(host, call, True)
    plain, _ = host(call.input, call.hx)
    return bool((c == call.states[1].numpy()).all() and np.abs(h - plain.detach().numpy()).max() <= EXACT)


def with_rates(run: Callable[[str], Run], *rates: float) -> Callable[[str], Run]:
    def made(wrong: str) -> Run:
        def call(host: nn.RNNBase, given: Given, training: bool) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(globals(), "RATES", rates)
                return run(wrong)(host, given, training)

        return call

    return made


@pytest.mark.parametrize(
    ("holds", "wrong"),
    [
        (output_is_the_state, "other output"),
        (mean_over_draws_is_eval, "no mean"),
        (masks_are_independent, "reversed"),
        (masks_are_independent, "one mask"),
    ],
)
def test_it_is_none_of_the_wrong_ones(holds: Callable[[Run], bool], wrong: str) -> None:
    torch.manual_seed(5)
    assert holds(ours) and holds(wrongly(""))
    assert not holds(wrongly(wrong))


def test_the_output_comes_from_the_cell_before_zoneout() -> None:
    right, wrong = with_rates(lambda _: ours, 1.0, 0.0)(""), with_rates(wrongly, 1.0, 0.0)
    assert output_reads_the_new_cell(right) and output_reads_the_new_cell(wrong(""))
    assert not output_reads_the_new_cell(wrong("zoned cell"))


@pytest.mark.parametrize("kind", HOSTS)
def test_eval_is_another_function_than_the_layer(kind: str) -> None:
    for host in hosts(kind):
        call = given(host, "batch", False)
        layer = bound(host, 0.5, 0.05, training=False)
        first, again, plain = (rows_of(call, host, each(call.input)) for each in (layer, layer, host))
        assert close(first, again, 0.0) and not close(first, plain, 1e-3)


# ---- draws ----


def steps_kept(layer: Zoneout, rows: int, steps: int, width: int = 40) -> Tensor:
    """Which units of h kept their value, (steps, rows, width)."""
    torch.manual_seed(7)
    host = nn.GRU(INPUTS, width)
    layer.bind(host)
    h = torch.randn(1, rows, width)
    output, _ = layer(torch.randn(steps, rows, INPUTS), h)
    return output == torch.cat([h, output[:-1]])


def test_masks_are_fresh_at_each_step_and_sample_and_unit() -> None:
    kept = steps_kept(Zoneout(0.0, 0.3), 50, 30)
    assert share_is(kept.numpy(), 0.3)
    for axis in range(3):
        pairs = (kept.narrow(axis, 1, kept.shape[axis] - 1) & kept.narrow(axis, 0, kept.shape[axis] - 1)).double()
        assert abs(pairs.mean() - 0.09) <= 4 * math.sqrt(0.09 * 0.91 / pairs.numel())
    static = steps_kept(Zoneout(0.0, 0.3, static_mask=True), 50, 30)
    assert torch.equal(static, static[:1].expand_as(static)) and share_is(static[0].numpy(), 0.3)
    assert not torch.equal(kept, kept[:1].expand_as(kept))
    assert not torch.equal(static[0, 0], static[0, 1])


def test_one_draw_for_both_states_where_asked() -> None:
    def shared(host: nn.RNNBase, call: Given, training: bool) -> Any:
        return rows_of(call, host, bound(host, 0.4, 0.4, share_mask=True)(call.input, call.hx))

    def apart(host: nn.RNNBase, call: Given, training: bool) -> Any:
        return rows_of(call, host, bound(host, 0.4, 0.4)(call.input, call.hx))

    h, c = masks(shared)
    assert (h == c).all() and share_is(h, 0.4)
    h, c = masks(apart)
    assert (h != c).any()


@pytest.mark.parametrize("options", [{"static_mask": True}, {"share_mask": True}], ids=str)
def test_options_hold_in_all_parts(options: dict[str, bool], drawn: list[Numbers]) -> None:
    for host, form in itertools.product(hosts("LSTM", bias=True), FORMS):
        layer, call = bound(host, 0.4, 0.3, **options), given(host, form, True)
        drawn.clear()
        assert close(rows_of(call, host, layer(call.input, call.hx)), by_hand(host, call, kept_by(layer, drawn)))


def test_the_function_keeps_what_lies_below_the_rate() -> None:
    old, new, numbers = torch.zeros(6), torch.ones(6), torch.tensor([0.0, 0.29, 0.3, 0.31, 0.9, 0.99999])
    assert zoneout(old, new, 0.3, numbers=numbers).tolist() == [0, 0, 1, 1, 1, 1]
    assert torch.equal(zoneout(old, new, 1.0), old) and torch.equal(zoneout(old, new, 0.0), new)
    assert torch.equal(zoneout(old, new, 0.5, key=torch.tensor(3)), zoneout(old, new, 0.5, key=torch.tensor(3)))
    assert torch.allclose(zoneout_mean(old, new, 0.3), torch.full((6,), 0.7))
    with pytest.raises(SurgeryError, match=r"p: expected a number in \[0, 1\], got 1.5"):
        zoneout(old, new, 1.5)


def test_a_seed_decides_part_by_part() -> None:
    (host,) = hosts("LSTM", num_layers=2, bidirectional=True, batch_first=False, bias=True)
    call, layer = given(host, "batch", False), bound(host, 0.5, 0.5)

    def run(seed: int) -> Any:
        layer.context, layer.site_id = Context(seed), "site"
        return rows_of(call, host, layer(call.input))

    assert close(run(1), run(1), 0.0) and not close(run(1), run(2), 1e-3)


# ---- sequences of different lengths ----


@pytest.mark.parametrize("kind", HOSTS)
def test_packed_sequences_are_each_what_they_are_alone(kind: str) -> None:
    for host, sort in itertools.product(hosts(kind), (True, False)):
        call = given(host, "sorted" if sort else "unsorted", with_states=True)
        layer = bound(host, *RATES, training=False)
        outputs, last = rows_of(call, host, layer(call.input, call.hx))
        for row, sequence in enumerate(call.sequences):
            states = [state[:, row] for state in call.states]
            output, ended = layer(sequence, tuple(states) if host.mode == "LSTM" else states[0])
            ended = ended if isinstance(ended, tuple) else (ended,)
            assert np.abs(outputs[row] - output.detach().numpy()).max() <= EXACT
            for all_rows, one in zip(last, ended, strict=True):
                assert np.abs(all_rows[:, row] - one.detach().numpy()).max() <= EXACT


@pytest.mark.parametrize("training", [True, False])
def test_what_is_padded_has_no_say(training: bool) -> None:
    (host,) = hosts("LSTM", num_layers=2, bidirectional=True, batch_first=True, bias=True)
    layer, results = bound(host, *RATES, training=training), []
    padded = torch.randn(4, STEPS, INPUTS, dtype=torch.float64)
    for filling in (0.0, 1e9):
        for row, length in enumerate(LENGTHS):
            padded[row, length:] = filling
        torch.manual_seed(2)
        packed = pack_padded_sequence(padded, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
        output, (h, c) = layer(packed)
        results.append((output.data, h, c))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_between_layers_stays(training: bool, drawn: list[Numbers]) -> None:
    for host in hosts("GRU", num_layers=2):
        host.dropout = 1.0
        call, layer = given(host, "batch", True), bound(host, 0.0, 0.4, training=training)
        drawn.clear()
        result = rows_of(call, host, layer(call.input, call.hx))
        assert close(result, by_hand(host, call, kept_by(layer, drawn) if training else mean_of(layer)))


# ---- gradients ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", HOSTS)
def test_gradients(kind: str, training: bool) -> None:
    (host,) = hosts(kind, num_layers=2, bidirectional=True, batch_first=False, bias=True)
    layer, call = bound(host, *RATES, training=training), given(host, "unsorted", True)
    packed: Any = call.input
    names = [name for name, _ in host.named_parameters()]

    def run(data: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx, weights = rest[: len(call.states)], dict(zip(names, rest[len(call.states) :], strict=True))
        torch.manual_seed(0)
        bound_to = copy.copy(layer)
        twin = copy.copy(host)
        twin._parameters = weights  # type: ignore[assignment]
        bound_to.__dict__["_host"] = twin
        output, last = bound_to(packed._replace(data=data), hx if host.mode == "LSTM" else hx[0])
        return (output.data, *(last if isinstance(last, tuple) else (last,)))

    leaves = [packed.data, *call.states, *host.parameters()]
    leaves = [each.detach().clone().requires_grad_() for each in leaves]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("kind", "training", "allow"), [("LSTM", True, False), ("LSTM", True, True), ("GRU", False, True)]
)
def test_compiled_it_gives_the_same_numbers(kind: str, training: bool, allow: bool) -> None:
    """Torch does not compile recurrent layers by default: it runs them as they are. Where it is allowed to, it does."""
    (host,) = hosts(kind, num_layers=1, bidirectional=False, batch_first=True, bias=True)
    call, outcomes = given(host, "batch", True), []
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=allow):
        for compiled in (False, True):
            layer: Any = bound(host, *RATES, training=training)
            layer.context, layer.site_id = Context(1), "site"
            host.zero_grad()
            run = torch.compile(layer, backend="aot_eager", fullgraph=allow) if compiled else layer
            output, last = run(call.input[:, :3], call.hx)
            output.square().sum().backward()
            outcomes.append([each.detach().clone() for each in (output, *last, *(p.grad for p in host.parameters()))])
    assert all(torch.allclose(a, b, rtol=0, atol=EXACT) for a, b in zip(*outcomes, strict=True))
    plain, _ = host(call.input[:, :3], call.hx)
    assert not torch.allclose(outcomes[1][0], plain, atol=1e-3)


# ---- cells ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS_OF)
def test_a_cell_in_a_loop_is_the_layer(kind: str, bias: bool, drawn: list[Numbers]) -> None:
    """Where both meet the same numbers, or their means; and without rates each is the plain one."""
    (host,) = hosts(kind, num_layers=1, bidirectional=False, batch_first=False, bias=bias)
    cell = CELLS_OF[kind](INPUTS, CELLS, bias=bias).double()
    cell.load_state_dict({name.removesuffix("_l0"): each for name, each in host.state_dict().items()})
    call = given(host, "batch", True)
    for rates, training in itertools.product((RATES, (0.0, 0.0), (1.0, 1.0)), (True, False)):
        layer = bound(cell, *rates, training=training)
        assert isinstance(call.input, Tensor)
        state = call.hx if kind != "LSTM" else tuple(each[0] for each in call.hx)
        state = state[0] if kind != "LSTM" else state
        drawn.clear()
        outputs = []
        for x in call.input:
            state = layer(x, state)
            outputs.append(state if isinstance(state, Tensor) else state[0])
        last = [each[None].detach().numpy() for each in (state if isinstance(state, tuple) else (state,))]
        result = [each.detach().numpy() for each in torch.stack(outputs, 1)], last
        names = "hc" if kind == "LSTM" else "h"

        def keep(part: int, name: str, step: int, row: int, layer: Zoneout = layer, names: str = names) -> Any:
            rate = float(layer.p_hidden if name == "h" else layer.p_cell)
            if not layer.training or not rate:
                return rate
            return (drawn[step * len(names) + names.index(name)][row] < rate).astype(float)

        assert close(result, by_hand(host, call, keep))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", CELLS_OF)
def test_a_cell_takes_what_it_takes(kind: str, training: bool) -> None:
    cell = CELLS_OF[kind](INPUTS, CELLS)
    layer = bound(cell, 0.5, 0.5, training=training)
    for shape in ((4, INPUTS), (INPUTS,)):
        x = torch.randn(shape)
        first, plain = layer(x), cell(x)
        again = layer(x, first)
        assert type(first) is type(plain)
        for made in (first, again):
            shapes = [each.shape for each in tensors(made)]
            assert shapes == [each.shape for each in tensors(plain)]
    before = torch.zeros(4, CELLS) if kind != "LSTM" else (torch.zeros(4, CELLS), torch.zeros(4, CELLS))
    x = torch.randn(4, INPUTS)
    results = []
    for state in (None, before):
        torch.manual_seed(1)
        results.append(tensors(layer(x, state)))
    assert all(map(torch.equal, *results))


def test_a_cell_keeps_units_at_the_rates() -> None:
    torch.manual_seed(0)
    cell, x, state = nn.LSTMCell(INPUTS, CELLS), torch.randn(4000, INPUTS), (torch.randn(4000, CELLS),) * 2
    h, c = (now == before for now, before in zip(bound(cell, 0.6, 0.3)(x, state), state, strict=True))
    assert share_is(c.numpy(), 0.6) and share_is(h.numpy(), 0.3) and share_is((h & c).numpy(), 0.18)
    h, c = (now == before for now, before in zip(bound(cell, 0.3, 0.3, share_mask=True)(x, state), state, strict=True))
    assert torch.equal(h, c)


# ---- hosts and rates ----


class Wrapped(nn.LSTM):
    def forward(self, x: Tensor, hx: Any = None) -> Any:
        return super().forward(x * 2, hx)


def test_what_it_cannot_stand_in_for_is_refused() -> None:
    hidden = parametrizations.spectral_norm(nn.LSTM(3, 5), "weight_hh_l0")
    for host in (Wrapped(3, 5), hidden, nn.Linear(3, 5)):
        with pytest.raises(SurgeryError, match=r"zoneout at a layer: expected an nn.LSTM.*, got"):
            Zoneout().bind(host)
    with pytest.raises(SurgeryError, match=r"zoneout at a layer: static_mask expected .*, got GRUCell; leave it out"):
        Zoneout(static_mask=True).bind(nn.GRUCell(3, 5))
    with pytest.raises(SurgeryError, match=r"zoneout at a layer: share_mask expected .*, got LSTM; leave it out"):
        Zoneout(share_mask=True).bind(nn.LSTM(3, 5, proj_size=2))
    for name in ("share_mask", "static_mask"):
        with pytest.raises(SurgeryError, match=f"{name}: expected true or false, got 1"):
            Zoneout(**{name: 1})  # type: ignore[arg-type]
    layer = bound(nn.GRU(3, 5), 0.5, 0.5)
    for wrong in ((torch.randn(4, 2, 4),), (torch.randn(3),), (torch.randn(4, 2, 3), torch.randn(1, 3, 5))):
        with pytest.raises((RuntimeError, ValueError)):
            layer(*wrong)


def test_the_rate_of_a_cell_does_nothing_where_there_is_none() -> None:
    for host in (nn.GRU(3, 5), nn.RNN(3, 5), nn.GRUCell(3, 5)):
        layer, x = bound(host, 0.5, 0.0), torch.randn(4, 3)
        assert not layer.active and layer.p == 0.5
        for mode in (True, False):
            plain, own = (tensors(each(x)) for each in (host, layer.train(mode)))
            assert all(map(torch.equal, plain, own))
        layer.set_rate("p_hidden", 0.2)
        assert layer.train().active
    layer = bound(nn.LSTM(3, 5), 0.5, 0.0)
    assert layer.active and layer.p == 0.5 and "p_cell=0.5, p_hidden=0" in repr(layer)
    assert repr(Zoneout(static_mask=True)).endswith("static_mask=True)")


def test_the_layer_stays_what_it_was() -> None:
    host = nn.LSTM(3, 5, num_layers=2, bidirectional=True)
    names, parameters = list(host.state_dict()), list(host.parameters())
    layer, x = bound(host, 0.5, 0.05), torch.randn(4, 2, 3)
    for train in (True, False, True, False):
        layer.train(train)(x)
        assert list(host.state_dict()) == names
        assert all(a is b for a, b in zip(host.parameters(), parameters, strict=True))
        assert torch.equal(copy.deepcopy(host)(x)[0], host(x)[0])
    host.load_state_dict({name: torch.zeros_like(each) for name, each in host.state_dict().items()}, assign=True)
    assert not layer(x)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", HOSTS)
def test_low_precision(kind: str, mixed: bool, dtype: torch.dtype) -> None:
    (host,) = hosts(kind, num_layers=2, bidirectional=True, batch_first=True, bias=True)
    host.to(dtype)
    call = given(host, "batch", True)
    assert isinstance(call.input, Tensor)
    x, hx = call.input.to(dtype), tuple(each.to(dtype) for each in call.states)
    for training in (True, False):
        layer = bound(host, 1e-6, 1e-6, training=training)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed), torch.no_grad():
            made, plain = (each(x, hx if len(hx) > 1 else hx[0]) for each in (layer, host))
        for a, b in zip(*map(tensors, (made, plain)), strict=True):
            assert a.dtype == b.dtype and (a - b).abs().max() <= 0.03 * max(1, b.abs().max())


def test_large_and_empty_inputs_give_finite_numbers() -> None:
    for kind, scale in itertools.product(HOSTS, (0.0, 1e30)):
        (host,) = hosts(kind, num_layers=1, bidirectional=True, batch_first=True, bias=True)
        layer, x = bound(host.float(), 0.5, 0.5), torch.randn(2, 4, INPUTS)
        for training in (True, False):
            made = layer.train(training)((x * scale).requires_grad_())
            assert all(each.isfinite().all() for each in tensors(made)) or "relu" in kind


def test_every_regularizer_has_its_host() -> None:
    layer: Regularizer = Zoneout()
    assert layer.eval_rule != "identity" and layer.kind == "swap"
    with pytest.raises(SurgeryError, match="expected to be bound"):
        layer(torch.randn(4, 2, 3))
