"""What all sites of a model get alike in one forward, with a seed and without."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dropsurgery import context as context_module
from dropsurgery.context import Context

SEEDS = [None, 7]


def forward(context: Context, sites: str = "abc", name: str = "column") -> list[int]:
    """One forward of a net with these sites."""
    return [int(context.shared_key(site, name)) for site in sites]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_sites_of_a_forward_agree_and_forwards_do_not(seed: int | None) -> None:
    torch.manual_seed(0)
    context = Context(seed)
    forwards = [forward(context) for _ in range(5)]
    assert all(len(set(keys)) == 1 for keys in forwards)
    assert len({keys[0] for keys in forwards}) == 5
    context.step = 1
    again = forward(context)
    assert len(set(again)) == 1 and again not in forwards


def test_a_sites_own_key_is_another_and_does_not_agree() -> None:
    context = Context(7)
    shared = forward(context)
    own = [int(context.key(site)) for site in "abc"]
    assert len({*own, shared[0]}) == 4
    assert forward(context)[0] == forward_after_own_keys(7)[0]  # counted by themselves


def forward_after_own_keys(seed: int) -> list[int]:
    context = Context(seed)
    forward(context)
    return forward(context)


@pytest.mark.parametrize("seed", SEEDS)
def test_names_are_apart(seed: int | None) -> None:
    torch.manual_seed(0)
    context = Context(seed)
    assert forward(context, name="column")[0] != forward(context, name="coin")[0]


def test_they_repeat_by_seed_or_by_torchs_generator() -> None:
    def run(seed: int | None, noise: int) -> list[int]:
        torch.manual_seed(noise)
        context = Context(seed)
        return [key for _ in range(3) for key in forward(context)]

    assert run(7, 1) == run(7, 2) != run(8, 1)
    assert run(None, 1) == run(None, 1) != run(None, 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_goes_on_by_itself(seed: int | None) -> None:
    torch.manual_seed(0)
    context = Context(seed)
    forward(context)
    context.shared_key("a", "column")  # the others of this forward come later
    for twin in (copy.deepcopy(context), pickle.loads(pickle.dumps(context))):
        first = int(copy.deepcopy(twin).shared_key("b", "column"))
        assert forward(twin, "bc") == [first, first]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("keep_rng", [True, False])
def test_a_recomputed_forward_meets_its_own(seed: int | None, keep_rng: bool) -> None:
    torch.manual_seed(0)
    context, seen = Context(seed), []

    def net(x: Tensor) -> Tensor:
        seen.append(forward(context))
        return x.sin()

    losses = []
    for _ in range(3 if keep_rng else 1):
        x = torch.ones(3, requires_grad=True)
        losses.append(checkpoint(net, x, use_reentrant=False, preserve_rng_state=keep_rng).sum())
    for loss in reversed(losses):
        loss.backward()
    count = len(losses)
    assert seen[count:] == seen[:count][::-1]
    assert all(len(set(keys)) == 1 for keys in seen)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_more_is_kept_than_may_be_asked_for(seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A net that is only run, step after step of no optimizer, does not fill the memory."""
    monkeypatch.setattr(context_module, "_KEPT", 10)
    context = Context(seed)
    forwards = [forward(context) for _ in range(50)]
    assert all(len(set(keys)) == 1 for keys in forwards)
    assert len(context._keys) <= 10 and len(context._shared) <= 10
