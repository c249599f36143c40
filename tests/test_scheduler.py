"""Every way of counting wrong, tried on small models."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from dropsurgery import scheduler as module
from dropsurgery.context import Context
from dropsurgery.errors import PlanError, SurgeryError, SurgeryWarning
from dropsurgery.scheduler import SILENT_FORWARDS, Scheduler, Slot
from dropsurgery.schedules import Schedule

LINEAR = Schedule("linear")
X = torch.ones(2, 3)


class Noise(nn.Module):
    """Stands for a regularizer: a rate in a buffer, and how often it was written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("p", torch.tensor(-1.0), persistent=False)
        self.writes = 0

    def set_rate(self, name: str, value: float) -> None:
        self.get_buffer(name).fill_(value)
        self.writes += 1

    def after_step(self) -> None:
        pass


class Net(nn.Module):
    """A model with a regularizer and its clock, wired as surgery does."""

    def __init__(self, schedule: Schedule = LINEAR, **keywords: Any) -> None:
        super().__init__()
        self.first, self.noise, self.last = nn.Linear(3, 3), Noise(), nn.Linear(3, 1)
        self.clock = Scheduler(
            [Slot(self.noise, {"p": 0.1}, schedule)], self.parameters, **{"total_steps": 10} | keywords
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))

    @property
    def p(self) -> float:
        return self.noise.p.item()


def sgd(net: nn.Module, **keywords: Any) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.01, **keywords)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        net(X).sum().backward()
        optimizer.step()


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SurgeryWarning)
        yield


# What one step is


def test_rates_follow_the_optimizer() -> None:
    net = Net()
    assert (net.clock.current_step, net.clock.progress, net.p) == (0, 0.0, 0.0)
    optimizer = sgd(net)
    for step in range(1, 26):
        train(net, optimizer)
        assert net.clock.current_step == step
        assert net.clock.progress == min(step / 10, 1)
        assert net.p == pytest.approx(0.1 * min(step / 10, 1), abs=1e-6)
        assert net.clock.finished == (step >= 10)


def test_each_rate_has_its_own_target_and_schedule() -> None:
    written: dict[str, float] = {}

    class Rates:
        def set_rate(self, name: str, value: float) -> None:
            written[name] = value

        def after_step(self) -> None:
            pass

    clock = Scheduler(
        [
            Slot(Rates(), {"p": 0.1, "p_cell": 0.5}, LINEAR),
            Slot(Rates(), {"p_late": 0.3}, Schedule("late", {"from": 0.5})),
        ],
        list,
        total_steps=4,
    )
    assert written == {"p": 0.0, "p_cell": 0.0, "p_late": 0.0}
    clock.step()
    assert written == pytest.approx({"p": 0.025, "p_cell": 0.125, "p_late": 0.0}, abs=1e-12)
    clock.step()
    assert written == pytest.approx({"p": 0.05, "p_cell": 0.25, "p_late": 0.3}, abs=1e-12)


def test_rates_that_stand_are_not_written() -> None:
    net = Net(Schedule("linear", {}, 0.0, 0.2))
    train(net, sgd(net), 6)
    assert net.noise.writes == 3
    net.noise.p.fill_(0.7)
    net.clock.apply()
    assert net.p == pytest.approx(0.1)


def test_accumulation_counts_once() -> None:
    net = Net()
    optimizer = sgd(net)
    for _ in range(4):
        net(X).sum().backward()
    optimizer.step()
    assert net.clock.current_step == 1


def test_forwards_do_not_count() -> None:
    net = Net()
    with torch.no_grad():
        net(X)
    net.eval()(X)
    (net.train()(X) + net(X)).sum().backward()
    assert net.clock.current_step == 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_count(fused: bool) -> None:
    net = Net()
    optimizer, scaler = sgd(net, fused=fused), torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, factor in enumerate([1.0, float("inf"), 1.0, float("inf")]):
        before = net.first.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(net(X).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, net.first.weight) == (factor != 1)
        assert net.clock.current_step == step // 2 + 1


def test_a_closure_with_many_forwards_is_one_step() -> None:
    net = Net()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=5)
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = net(X).pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert calls > 1
    assert net.clock.current_step == 1


def test_checkpointing_does_not_count() -> None:
    net = Net()
    optimizer = sgd(net)
    checkpoint(net, X, use_reentrant=False).sum().backward()
    optimizer.step()
    assert net.clock.current_step == 1


def test_a_step_within_a_step_counts_once() -> None:
    class Clipped(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    net = Net()
    sgd(nn.Linear(1, 1)).step()  # from now on torch's hooks run for SGD.step as well as for Clipped.step
    train(net, Clipped(net.parameters(), lr=0.01), 3)
    assert net.clock.current_step == 3


def test_an_optimizer_around_another_counts_once() -> None:
    class Around(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure: Any = None) -> None:
            self.inner.step()

    net = Net()
    train(net, Around(sgd(net)), 3)
    assert net.clock.current_step == 3


def test_a_compiled_step_counts_and_compiles_once() -> None:
    torch._dynamo.reset()
    net = Net()
    optimizer = sgd(net)
    counter = CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    frames = []
    for _ in range(6):
        net(X).sum().backward()
        step()
        frames.append(counter.frame_count)
    assert net.clock.current_step == 6
    assert frames[2] == frames[-1]


# Whose step it is


def test_other_models_do_not_count() -> None:
    net, other = Net(), nn.Linear(3, 1)
    train(other, sgd(other))
    assert net.clock.current_step == 0


def test_parameters_added_to_an_optimizer_make_it_ours() -> None:
    net, other = Net(), nn.Linear(3, 1)
    optimizer = sgd(other)
    train(other, optimizer)
    optimizer.add_param_group({"params": list(net.last.parameters())})
    train(net, optimizer)
    assert net.clock.current_step == 1


def test_two_optimizers_of_one_model_count_once() -> None:
    net = Net()
    first, last = sgd(net.first), sgd(net.last)
    for _ in range(3):
        net(X).sum().backward()
        first.step()
        last.step()
    assert net.clock.current_step == 3


def test_when_the_first_optimizer_is_gone_the_next_one_takes_over() -> None:
    net = Net()
    optimizer = sgd(net)
    train(net, optimizer, 2)
    optimizer = sgd(net)
    gc.collect()
    train(net, optimizer, 3)
    assert net.clock.current_step == 5


def test_attach_names_the_optimizer() -> None:
    net = Net()
    first, last = sgd(net.first), sgd(net.last)
    net.clock.attach(last)
    train(net, first, 2)
    assert net.clock.current_step == 0
    train(net, last, 3)
    assert net.clock.current_step == 3
    net.clock.attach(first)
    train(net, last)
    train(net, first)
    assert net.clock.current_step == 4


def test_attach_refuses_what_cannot_move_the_clock() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.param_groups = inner.param_groups

        def step(self, closure: Any = None) -> None: ...

    net = Net()
    with pytest.raises(SurgeryError, match="SGD holds no parameter of the model"):
        net.clock.attach(sgd(nn.Linear(1, 1)))
    with pytest.raises(SurgeryError, match="got Wrapper; give the optimizer inside it"):
        net.clock.attach(Wrapper(sgd(net)))
    with pytest.raises(SurgeryError, match="got str"):
        net.clock.attach("sgd")  # type: ignore[arg-type]
    for clock in ("forward", "manual"):
        with pytest.raises(SurgeryError, match=f"clock: {clock}"):
            Net(clock=clock).clock.attach(sgd(net))


def test_the_hook_is_one_and_keeps_no_model() -> None:
    net = Net()
    train(net, sgd(net))
    Net()
    assert len(module._hooks) == 1
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


# By hand


def test_manual_first_turns_the_optimizer_clock_off() -> None:
    net = Net()
    optimizer = sgd(net)
    for step in range(1, 4):
        net.clock.step()
        train(net, optimizer)
        assert net.clock.current_step == step


def test_never_two_at_once() -> None:
    net = Net()
    optimizer = sgd(net)
    train(net, optimizer)
    with pytest.raises(SurgeryError, match=r"already moves this clock \(now at step 1\)"):
        net.clock.step()
    attached = Net()
    attached.clock.attach(optimizer := sgd(attached))
    with pytest.raises(SurgeryError, match="already moves this clock"):
        attached.clock.step()
    with pytest.raises(SurgeryError, match="counts forwards"):
        Net(clock="forward").clock.step()
    assert (net.clock.current_step, attached.clock.current_step) == (1, 0)


def test_a_manual_clock_leaves_optimizers_alone() -> None:
    net = Net(clock="manual")
    train(net, sgd(net))
    assert net.clock.current_step == 0
    net.clock.step()
    assert net.clock.current_step == 1


# By forwards


def forward_net() -> Net:
    net = Net(clock="forward")
    net.register_forward_pre_hook(net.clock.on_forward)
    return net


def test_forward_clock_counts_training_forwards() -> None:
    net = forward_net()
    rates = []
    net.register_forward_hook(lambda *_: rates.append(net.p))
    for _ in range(3):
        net(X).sum().backward()
    assert rates == pytest.approx([0, 0.01, 0.02], abs=1e-6)
    with torch.no_grad():
        net(X)
    net.eval()(X)
    assert net.clock.current_step == 2
    train(net.train(), sgd(net))
    assert net.clock.current_step == 3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_forward_clock_does_not_count_recomputation(use_reentrant: bool) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = forward_net(), 0
            self.net.first.register_forward_pre_hook(self.count)

        def count(self, *_: Any) -> None:
            self.calls += 1

    inner = Inner()
    x = X.clone().requires_grad_()
    for _ in range(3):
        loss = checkpoint(inner.net, x, use_reentrant=use_reentrant).sum()
        loss.backward()
    assert inner.calls == 6
    # The reentrant form runs its first forward without gradient: it cannot be told from inference.
    assert inner.net.clock.current_step == (0 if use_reentrant else 2)


def test_forward_clock_resumes_at_the_next_forward() -> None:
    net, resumed = forward_net(), forward_net()
    for _ in range(3):
        net(X)
    resumed.clock.load_state_dict(net.clock.state_dict())
    assert resumed.clock.state_dict() == net.clock.state_dict()
    for one in (net, resumed):
        one(X)
        assert one.clock.current_step == 3
    assert torch.equal(net.noise.p, resumed.noise.p)


def test_forward_clock_goes_on_in_a_copy_and_after_a_load() -> None:
    net = forward_net()
    for _ in range(3):
        net(X)
    clock = net.clock.copy_for([], list)
    clock.on_forward(net, ())
    assert clock.current_step == 3
    net.clock.load_state_dict(GOOD | {"step": 7})
    net(X)
    assert net.clock.current_step == 7


# Copies and checkpoints

GOOD = {"version": 1, "step": 3, "total_steps": 10, "clock": "optimizer"}


def copied(net: Net) -> Net:
    """A deep copy as surgery makes it."""
    clock, net.clock = net.clock, None
    other = copy.deepcopy(net)
    net.clock = clock
    other.clock = clock.copy_for([Slot(other.noise, {"p": 0.1}, LINEAR)], other.parameters)
    return other


@pytest.mark.parametrize("copying", [copied, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_stand_still_until_they_are_trained(copying: Callable[[Net], Net]) -> None:
    net = Net()
    optimizer = sgd(net)
    train(net, optimizer, 2)
    ema = copying(net)
    train(net, optimizer, 3)
    assert (net.clock.current_step, ema.clock.current_step) == (5, 2)
    assert ema.p == pytest.approx(0.02)
    train(ema, sgd(ema), 2)
    assert (net.clock.current_step, ema.clock.current_step) == (5, 4)
    assert ema.p == pytest.approx(0.04)
    assert net.p == pytest.approx(0.05)


def test_manual_stays_manual_in_copies() -> None:
    net = Net()
    net.clock.step()
    for other in (copied(net), copy.deepcopy(net)):
        train(other, sgd(other))
        assert other.clock.current_step == 1


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", ["state_dict", "metadata"])
def test_resume_is_bit_equal(way: str) -> None:
    net, resumed = Net(), Net()
    optimizer = sgd(net)
    train(net, optimizer, 3)
    resumed.load_state_dict(net.state_dict())
    if way == "state_dict":
        resumed.clock.load_state_dict(through_a_file(net.clock.state_dict()))
    else:
        resumed.clock.load_metadata(through_a_file(net.clock.metadata()))
    assert resumed.clock.state_dict() == net.clock.state_dict()
    again = sgd(resumed)
    for _ in range(12):
        assert torch.equal(net.noise.p, resumed.noise.p)
        train(net, optimizer)
        train(resumed, again)
    assert resumed.clock.current_step == 15
    assert torch.equal(net.first.weight, resumed.first.weight)


def test_a_manual_clock_resumes_as_one() -> None:
    net, resumed = Net(), Net()
    net.clock.step()
    resumed.clock.load_state_dict(net.clock.state_dict())
    train(resumed, sgd(resumed))
    assert resumed.clock.current_step == 1
    resumed.clock.step()
    assert resumed.clock.current_step == 2


def test_another_total_warns_and_does_not_count() -> None:
    net, longer = Net(), Net(total_steps=20)
    train(net, sgd(net), 5)
    with pytest.warns(SurgeryWarning, match="saved at step 5 of 10, and this model has total_steps=20, which counts"):
        longer.clock.load_state_dict(net.clock.state_dict())
    assert longer.clock.progress == 0.25
    assert longer.p == pytest.approx(0.025)
    Net(Schedule(), total_steps=None).clock.load_state_dict(net.clock.state_dict())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"expected the keys .*'step'.* got \[\]"),
        (GOOD | {"extra": 1}, "got .*'extra'"),
        ([1], "got list"),
        (GOOD | {"version": 2}, "expected version 1, got 2"),
        (GOOD | {"step": -1}, "step=-1"),
        (GOOD | {"step": "3"}, "step='3'"),
        (GOOD | {"total_steps": 1.5}, "total_steps=1.5"),
    ],
)
def test_a_state_that_is_none_is_refused_whole(state: Any, message: str) -> None:
    net = Net()
    for load in (net.clock.load_state_dict, net.clock.load_metadata):
        with pytest.raises(SurgeryError, match=message):
            load(state)
    assert net.clock.current_step == 0


def test_weights_without_a_clock_warn_once_it_has_moved() -> None:
    net = Net()
    net.clock.load_metadata(None)
    train(net, sgd(net))
    with pytest.warns(SurgeryWarning, match="carries no clock, which stays at step 1 of 10"):
        net.clock.load_metadata(None)
    assert net.clock.current_step == 1
    constant = Net(Schedule())
    train(constant, sgd(constant))
    constant.clock.load_metadata(None)


def test_the_context_goes_along() -> None:
    context = Context(seed=0)
    net = Net(context=context)
    optimizer = sgd(net)
    train(net, optimizer, 2)
    assert context.step == 2
    net.clock.load_state_dict(GOOD)
    assert context.step == 3


# What is refused, what is warned of


def test_needing_total_steps_is_an_error() -> None:
    with pytest.raises(PlanError, match="total_steps is needed by the schedule linear"):
        Net(total_steps=None)
    for wrong in (0, -5, 1.5, True, "10"):
        with pytest.raises(PlanError, match="expected the number of optimizer steps"):
            Net(total_steps=wrong)
    with pytest.raises(PlanError, match="clock: expected one of optimizer, forward, manual, got 'epoch'"):
        Net(clock="epoch")
    net = Net(Schedule(), total_steps=None)
    train(net, sgd(net))
    assert (net.clock.current_step, net.clock.progress, net.clock.finished) == (1, 0.0, True)
    assert net.p == pytest.approx(0.1)


def notice(net: Net, times: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            net.clock.notice_forward()
    return [str(one.message) for one in caught if one.category is SurgeryWarning]


def test_a_clock_that_stands_warns_once() -> None:
    net = Net()
    assert notice(net, SILENT_FORWARDS - 1) == []
    (message,) = notice(net, 3 * SILENT_FORWARDS)
    assert "clock still stands at step 0 of 10" in message
    assert "surgery.step()" in message and "clock: forward" in message


def test_a_clock_that_stands_knows_why() -> None:
    net = Net()
    first, last = sgd(net.first), sgd(net.last)
    train(net, first)
    train(net, last)
    (message,) = notice(net, SILENT_FORWARDS)
    assert "surgery.attach(optimizer)" in message
    (message,) = notice(Net(clock="manual"), SILENT_FORWARDS)
    assert "Call surgery.step() after each update" in message


def test_no_warning_where_all_is_well() -> None:
    moving = Net()
    optimizer = sgd(moving)
    for _ in range(4):
        assert notice(moving, SILENT_FORWARDS - 1) == []
        train(moving, optimizer)
    finished = Net()
    train(finished, optimizer := sgd(finished), 10)
    for net in (finished, Net(Schedule()), Net(clock="forward")):
        assert notice(net, 2 * SILENT_FORWARDS) == []
    with torch.no_grad():
        assert notice(Net(), 2 * SILENT_FORWARDS) == []
