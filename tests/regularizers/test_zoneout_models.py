"""Zoneout in whole models: in a traced graph, in a part that stays Python, on cells in loops, on timm's Sequencer."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dropsurgery import PlanError, SurgeryWarning, apply_recipe, diff, find_sites, plan_recipe, strip
from dropsurgery.regularizers.zoneout import Zoneout

WORDS, WIDTH, HIDDEN = 11, 8, 6


def recipe(**arguments: Any) -> dict[str, Any]:
    """Zoneout on all layers and cells."""
    entries = [
        {
            "name": pattern,
            "pattern": pattern,
            "edge": "module",
            "insert": "zoneout",
            "with": arguments,
            "optional": True,
        }
        for pattern in ("rnn", "rnn_cell")
    ]
    return {"version": 1, "name": "recurrent", "entries": entries}


class Tagger(nn.Module):
    """Recurrent layers between other ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.lstm = nn.LSTM(WIDTH, HIDDEN, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(2 * HIDDEN, HIDDEN, num_layers=2, batch_first=True)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(F.relu(self.conv(x.transpose(1, 2))).transpose(1, 2))
        y, last = self.gru(y)
        return self.head(y + last[-1][:, None])


class Packing(nn.Module):
    """Sequences of different lengths: what forward makes of them hangs on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, HIDDEN, num_layers=2, batch_first=True)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(words), lengths, batch_first=True, enforce_sorted=False)
        y, (last, _) = self.lstm(packed)
        padded, _ = pad_packed_sequence(y, batch_first=True)
        return self.head(padded.mean(1) + last[-1])


class Deciding(nn.Module):
    """A part that decides by numbers, and calls a layer, and a cell several times."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.cell = nn.RNN(WIDTH, HIDDEN), nn.GRUCell(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x.transpose(0, 1) if x.sum() > -1e9 else x)
        state = None
        for _ in range(3 + int(x.sum() < -1e9)):
            state = self.cell(y[-1], state)
        return state


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.head = nn.Linear(WIDTH, WIDTH), Deciding(), nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self.first(x)))


class Unrolled(nn.Module):
    """Two cells on one another, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = nn.LSTMCell(WIDTH, HIDDEN), nn.GRUCell(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        lower, upper = None, None
        for step in range(x.shape[1]):
            lower = self.lower(x[:, step], lower)
            upper = self.upper(lower[0], upper)
        return self.head(upper)


class Twice(nn.Module):
    """A block that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH))
        self.rnn = nn.RNN(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.block(x))
        y, _ = self.rnn(self.block(y))
        return y


def sequences(steps: int = 5) -> tuple[Tensor, ...]:
    return (torch.randn(4, steps, WIDTH),)


def words() -> tuple[Tensor, ...]:
    return torch.randint(WORDS, (4, 7)), torch.tensor([3, 7, 1, 5])


Make = Callable[[], nn.Module]
MODELS: list[tuple[Make, Callable[..., tuple[Tensor, ...]], int]] = [
    (Tagger, sequences, 2),
    (Packing, words, 1),
    (Around, sequences, 2),
    (Unrolled, sequences, 2),
    (Twice, sequences, 1),
]


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def step(gm: Any, inputs: tuple[Tensor, ...]) -> None:
    optimizer = torch.optim.Adam(gm.parameters(), lr=0.01)
    gm.train()
    first(gm(*inputs)).square().sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in gm.parameters())
    optimizer.step()


def resumed(gm: Any, model: nn.Module, given: Any, inputs: tuple[Tensor, ...]) -> Any:
    """What a new process would have of a model that was saved."""
    file = io.BytesIO()
    torch.save({"model": gm.state_dict(), "surgery": gm.surgery.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    new: Any = apply_recipe(model, given, example_inputs=inputs, total_steps=10, seed=3)
    new.load_state_dict(state["model"], strict=True)
    new.surgery.load_state_dict(state["surgery"])
    return new


@pytest.mark.parametrize(("make", "make_inputs", "sites"), MODELS)
def test_a_model_is_converted_trained_saved_resumed_and_stripped(
    make: Make, make_inputs: Callable[..., tuple[Tensor, ...]], sites: int
) -> None:
    torch.manual_seed(0)
    model, inputs = make(), make_inputs()
    names, parameters = list(model.state_dict()), list(model.parameters())
    silent = apply_recipe(model, recipe(p_cell=0.0, p_hidden=0.0), example_inputs=inputs, total_steps=10)
    for mode in (True, False):
        plain, made = (first(each.train(mode)(*inputs)) for each in (model, silent))
        assert torch.equal(plain, made)

    given = recipe(p_cell=0.5, p_hidden=0.2)
    gm: Any = apply_recipe(model, given, example_inputs=inputs, total_steps=10, seed=3)
    layers = [each for each in gm.surgery.regularizers.values() if isinstance(each, Zoneout)]
    assert len(layers) == len(gm.surgery.plan.edits) == sites
    assert list(gm.state_dict()) == names and all(a is b for a, b in zip(gm.parameters(), parameters, strict=True))
    assert not torch.equal(first(gm.train()(*inputs)), first(gm(*inputs)))
    assert not torch.equal(first(gm.eval()(*inputs)), first(model.eval()(*inputs)))
    assert torch.equal(first(gm(*inputs)), first(gm(*inputs)))

    step(gm, inputs)
    for twin in (copy.deepcopy(gm), resumed(gm, make(), given, inputs)):
        assert twin.surgery.current_step == 1
        for mode in (False, True):
            gm.surgery.context.step, twin.surgery.context.step = 2, 2
            assert torch.equal(first(twin.train(mode)(*inputs)), first(gm.train(mode)(*inputs)))
    make().load_state_dict(gm.state_dict(), strict=True)
    gm.load_state_dict(make().state_dict(), strict=True)

    rule = "in eval: at each step the mean of old and new state"
    assert rule in str(gm.surgery.plan) and "rate * old + (1 - rate) * new" in diff(gm)
    with pytest.warns(SurgeryWarning, match="strip: in eval this .* the mean of old and new state"):
        stripped = strip(gm).eval()
    assert type(stripped) is type(model) and list(stripped.state_dict()) == names
    plain = copy.deepcopy(model).eval()
    plain.load_state_dict(gm.state_dict())
    assert torch.equal(first(stripped(*inputs)), first(plain(*inputs)))
    gm.surgery.audit(inputs)


@pytest.mark.parametrize(("make", "make_inputs", "sites"), [case for case in MODELS if case[1] is sequences])
def test_other_lengths_run_too(make: Make, make_inputs: Callable[..., tuple[Tensor, ...]], sites: int) -> None:
    torch.manual_seed(0)
    model = make()
    gm = apply_recipe(model, recipe(p_cell=0.0, p_hidden=0.0), example_inputs=make_inputs(), total_steps=10)
    loud: Any = apply_recipe(model, recipe(p_cell=0.5, p_hidden=0.2), example_inputs=make_inputs(), total_steps=10)
    for steps in (1, 3, 9):
        inputs = make_inputs(steps)
        assert torch.equal(first(gm(*inputs)), first(model(*inputs)))
        assert first(loud(*inputs)).shape == first(model(*inputs)).shape
        with loud.surgery.active(p=0.0):
            assert torch.equal(first(loud(*inputs)), first(model(*inputs)))


def test_noise_in_eval_where_asked() -> None:
    torch.manual_seed(0)
    inputs = sequences()
    gm: Any = apply_recipe(Tagger(), recipe(p_cell=0.5, p_hidden=0.2), example_inputs=inputs, total_steps=10).eval()
    mean = gm(*inputs)
    with gm.surgery.active():
        drawn = [gm(*inputs) for _ in range(2)]
    assert not torch.equal(*drawn) and torch.equal(gm(*inputs), mean)


def test_all_calls_of_a_cell_are_one_layer() -> None:
    plan = plan_recipe(Unrolled(), recipe(), example_inputs=sequences())
    assert plan.hits == {"rnn": 0, "rnn_cell": 2}
    assert [len(edit.merged) for edit in plan.edits] == [4, 4]
    assert len(find_sites(Unrolled(), "rnn_cell", example_inputs=sequences())) == 10


def test_a_rate_for_some_calls_of_a_cell_alone_is_refused() -> None:
    given = recipe()
    given["entries"][1]["where"] = {"index": 0}
    with pytest.raises(PlanError, match="'lower' is called 5 times, of which 1 are sites"):
        plan_recipe(Unrolled(), given, example_inputs=sequences())


def test_weight_drop_and_zoneout_cannot_both_stand_in() -> None:
    given = recipe()
    given["entries"].append({"name": "weights", "pattern": "rnn", "edge": "module", "insert": "weight_drop"})
    with pytest.raises(PlanError, match=r"weight_drop.* meets zoneout"):
        plan_recipe(Tagger(), given, example_inputs=sequences())


@pytest.mark.parametrize("name", ["weight_drop", "zoneout"])
def test_layers_inside_an_opaque_part_are_swapped_where_they_stand(name: str) -> None:
    inputs = sequences()
    entry = {"name": "all", "pattern": "rnn", "edge": "module", "insert": name}
    gm: Any = apply_recipe(Around(), {"version": 1, "entries": [entry]}, example_inputs=inputs, total_steps=10)
    assert list(gm.surgery.regularizers) == ["part.rnn#0:rnn.module"]
    assert type(gm.part) is Deciding
    assert not torch.equal(gm(*inputs), gm(*inputs))


# ---- timm's Sequencer ----


def sequencer(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("sequencer2d_s", num_classes=5, **options)
    nn.init.normal_(model.head.fc.weight)  # it begins at zero
    return model


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32)


def test_a_sequencer_without_rates_is_itself() -> None:
    model, x = sequencer(), images()
    overrides = {"recurrent layers.with.p_cell": 0.0, "recurrent layers.with.p_hidden": 0.0}
    gm: Any = apply_recipe(model, "zoneout_lstm", total_steps=10, overrides=overrides)
    assert len(gm.surgery.regularizers) == 36
    with torch.no_grad():
        for mode in (True, False):
            plain, made = (each.train(mode)(x) for each in (model, gm))
            assert torch.equal(plain, made)


def test_a_sequencer_is_trained_saved_resumed_and_stripped() -> None:
    model, x = sequencer(), images()
    gm: Any = apply_recipe(model, "zoneout_lstm", total_steps=10, seed=3)
    assert len(gm.surgery.regularizers) == 36
    layers = gm.surgery.regularizers.values()
    assert {(float(each.p_cell), float(each.p_hidden)) for each in layers} == {(0.5, float(torch.tensor(0.05)))}
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.01)
    gm.train()(x).square().sum().backward()
    optimizer.step()
    new = resumed(gm, sequencer(), "zoneout_lstm", None)  # type: ignore[arg-type]
    with torch.no_grad():
        made = gm.eval()(x)
        assert torch.equal(made, gm(x)) and torch.equal(made, new.eval()(x))
        drawn = [gm.train()(x) for _ in range(2)]
        assert not torch.equal(*drawn)
        with pytest.warns(SurgeryWarning, match=r"the mean of old and new state.*\(36 sites\)"):
            stripped = strip(gm).eval()
        assert type(stripped) is type(model) and not torch.allclose(stripped(x), made, atol=1e-5)
        plain = sequencer().eval()
        plain.load_state_dict(gm.state_dict())
        assert torch.equal(plain(x), stripped(x))


def test_the_state_of_a_gru_alone() -> None:
    gm: Any = apply_recipe(Tagger(), "zoneout_gru", example_inputs=sequences(), total_steps=10)
    assert len(gm.surgery.regularizers) == 2
    assert all(float(each.p) == pytest.approx(0.15) for each in gm.surgery.regularizers.values())
    for steps in itertools.repeat(5, 2):
        assert gm.train()(*sequences(steps)).isfinite().all()
