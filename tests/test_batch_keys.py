"""What all sites get alike for one batch: for all forwards of an optimizer step, with a seed and without."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dropsurgery.context import Context
from dropsurgery.scheduler import Scheduler

SEEDS = [None, 7]


def forward(context: Context, sites: str = "abc", name: str = "coin") -> int:
    """One forward of a net with these sites, which have to agree."""
    keys = {int(context.batch_key(site, name)) for site in sites}
    assert len(keys) == 1
    return keys.pop()


def counting(seed: int | None) -> Context:
    """A context that knows that steps are made."""
    context = Context(seed)
    context.one_batch = lambda: True
    return context


@pytest.mark.parametrize("seed", SEEDS)
def test_a_key_stays_until_the_step(seed: int | None) -> None:
    torch.manual_seed(0)
    context = counting(seed)
    keys = []
    for step in range(4):
        context.step = step
        forwards = [forward(context) for _ in range(3)]
        assert len(set(forwards)) == 1
        keys += forwards[:1]
    assert len(set(keys)) == 4


@pytest.mark.parametrize("seed", SEEDS)
def test_while_nobody_makes_steps_each_forward_is_a_batch(seed: int | None) -> None:
    torch.manual_seed(0)
    context = Context(seed)
    assert len({forward(context) for _ in range(5)}) == 5


@pytest.mark.parametrize("seed", SEEDS)
def test_the_batch_begins_with_the_forward_before_steps_are_known_of(seed: int | None) -> None:
    torch.manual_seed(0)
    context = Context(seed)
    first = forward(context)
    context.one_batch = lambda: True
    assert forward(context) == first


def test_it_is_told_what_was_drawn() -> None:
    context = counting(7)
    assert context.drawn_for_batch("coin") is None and not context.has_drawn_for_batch
    key = forward(context)
    assert int(context.drawn_for_batch("coin")) == key and context.has_drawn_for_batch
    assert context.drawn_for_batch("other") is None
    context.step = 1
    assert context.drawn_for_batch("coin") is None and not context.has_drawn_for_batch


@pytest.mark.parametrize("seed", SEEDS)
def test_the_step_set_to_what_it_is_leaves_the_batch_alone(seed: int | None) -> None:
    """As where rates are held for a moment, between forward and step."""
    torch.manual_seed(0)
    context = counting(seed)
    context.step = 3
    key = forward(context)
    context.step = 3
    assert int(context.drawn_for_batch("coin")) == forward(context) == key
    free = Context(seed)
    key = forward(free)
    free.step = 0
    assert free.drawn_for_batch("coin") is None


def test_other_draws_of_the_same_name_are_others() -> None:
    context = counting(7)
    others = int(context.shared_key("a", "coin")), int(context.key("coin")), forward(context, name="b")
    assert len({forward(context), *others}) == 4


def test_they_repeat_by_seed_and_step_or_by_torchs_generator() -> None:
    def run(seed: int | None, noise: int, step: int = 5) -> int:
        torch.manual_seed(noise)
        context = counting(seed)
        context.step = step
        return forward(context)

    assert run(7, 1) == run(7, 2) != run(8, 1)
    assert run(7, 1) != run(7, 1, step=6)
    assert run(None, 1) == run(None, 1) != run(None, 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_is_of_the_same_batch(seed: int | None) -> None:
    torch.manual_seed(0)
    context = counting(seed)
    key = forward(context)
    for twin in (copy.deepcopy(context), pickle.loads(pickle.dumps(context))):
        assert int(twin.drawn_for_batch("coin")) == key
        twin.one_batch = lambda: True
        assert forward(twin) == key
        twin.step = 1
        assert int(context.drawn_for_batch("coin")) == key


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_forward_meets_its_own(seed: int | None, known: bool, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    context, seen = counting(seed) if known else Context(seed), []

    def net(x: Tensor) -> Tensor:
        seen.append(forward(context))
        return x.sin()

    losses = [checkpoint(net, torch.ones(3, requires_grad=True), use_reentrant=use_reentrant).sum() for _ in range(3)]
    for loss in reversed(losses):
        loss.backward()
    assert seen[3:] == seen[:3][::-1]
    assert len(set(seen)) == (1 if known else 3)


# Who knows that steps are made


def clock(**keywords: object) -> tuple[Context, Scheduler, nn.Linear, torch.optim.SGD]:
    net, context = nn.Linear(1, 1), Context(0)
    made = Scheduler([], net.parameters, context=context, **keywords)  # type: ignore[arg-type]
    return context, made, net, torch.optim.SGD(net.parameters(), lr=0.1)


def test_a_clock_that_is_moved_makes_batches() -> None:
    context, made, _, optimizer = clock()
    assert not context.one_batch()
    optimizer.step()
    assert made.current_step == 1 and context.one_batch()
    context, made, _, optimizer = clock()
    made.attach(optimizer)
    assert context.one_batch()
    for how in ("forward", "manual"):
        context, made, *_ = clock(clock=how)
        assert made.clock == how and context.one_batch()


def test_gradients_that_are_added_up_make_a_batch() -> None:
    context, made, net, optimizer = clock()
    net(torch.ones(1, 1)).backward()
    assert context.one_batch()
    optimizer.zero_grad()
    assert made.current_step == 0 and not context.one_batch()
