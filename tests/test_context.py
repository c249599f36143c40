"""Keys depend on (seed, site, step, forward) and on nothing else; a repeated forward gets its own again."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dropsurgery.context import Context


def keys(context: Context, site: str, times: int = 3) -> list[int]:
    return [int(context.key(site)) for _ in range(times)]


def at_step(step: int, seed: int = 1) -> Context:
    context = Context(seed)
    context.step = step
    return context


def test_without_a_seed_there_is_no_key_and_no_number_is_drawn() -> None:
    state = torch.get_rng_state()
    assert Context().key("a") is None
    assert torch.equal(torch.get_rng_state(), state)


def test_keys_repeat_by_seed_site_step_and_forward() -> None:
    first = keys(at_step(4), "a")
    torch.manual_seed(123)
    other = at_step(4)
    keys(other, "b", 5)
    assert keys(other, "a") == first
    every = [first, keys(at_step(5), "a"), keys(at_step(4, seed=2), "a"), keys(at_step(4), "b")]
    assert len({key for each in every for key in each}) == 12


def test_the_step_starts_the_count_of_forwards_anew() -> None:
    context = at_step(4)
    first = keys(context, "a")
    context.step = 5
    assert keys(context, "a") != first
    context.step = 4
    assert keys(context, "a") == first
    assert context.step == 4


def test_copies_go_on_by_themselves() -> None:
    context = at_step(4)
    keys(context, "a")
    for twin in (copy.deepcopy(context), pickle.loads(pickle.dumps(context))):
        assert (twin.seed, twin.step) == (1, 4)
        expected = keys(copy.deepcopy(context), "a")
        assert keys(twin, "a") == expected
        twin.step = 9
        assert context.step == 4


def run(context: Context, seen: list[int], **options: object) -> Tensor:
    """A forward that asks for a key, under checkpointing."""

    def forward(x: Tensor) -> Tensor:
        seen.append(int(context.key("a")))
        return x.sin()

    return checkpoint(forward, torch.ones(3, requires_grad=True), use_reentrant=False, **options).sum()


def test_a_recomputed_forward_gets_its_key_again() -> None:
    expected = keys(at_step(0), "a", 4)
    context, seen = at_step(0), []
    losses = [run(context, seen) for _ in range(3)]
    assert seen == expected[:3]
    for index in (1, 0, 2):
        losses[index].backward()
    assert seen[3:] == [expected[1], expected[0], expected[2]]
    assert keys(context, "a", 1) == [expected[3]]


def test_a_recomputed_forward_whose_state_was_not_kept_gets_the_last_key() -> None:
    expected = keys(at_step(0), "a", 2)
    context, seen = at_step(0), []
    run(context, seen, preserve_rng_state=False).backward()
    assert seen == [expected[0]] * 2
    assert keys(context, "a", 1) == [expected[1]]
