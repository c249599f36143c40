"""An optimizer's groups have other options inside of its steps, and their own ones at all other times."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from dropsurgery.options import StepOptions

OWN, MORE = 1e-4, 1e-2


class Wish:
    """Stands for a clock: wants what it holds."""

    def __init__(self, **options: float) -> None:
        self.options = options

    def wanted_options(self) -> Mapping[str, float]:
        return self.options


def spied(base: type[torch.optim.Optimizer]) -> type[Any]:
    """The optimizer, noting which weight decay its groups have where the update is made, behind the closure."""

    class Spy(base):  # type: ignore[misc, valid-type]
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            def seeing() -> Any:
                result = closure() if closure is not None else None
                self.__dict__.setdefault("seen", []).append(decays(self))
                return result

            return super().step(seeing)

    return Spy


def decays(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["weight_decay"] for group in optimizer.param_groups]


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(3)]


def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    first, second, third = parameters
    return [{"params": [first]}, {"params": [second], "weight_decay": 0.0}, {"params": [third], "weight_decay": 5e-4}]


@pytest.fixture
def optimizer() -> Iterator[Any]:
    made = spied(torch.optim.SGD)(groups(weights()), lr=0.1, weight_decay=OWN)
    yield made
    assert decays(made) == [OWN, 0.0, 5e-4]


def test_inside_of_a_step_and_nowhere_else(optimizer: Any) -> None:
    wish = Wish(weight_decay=MORE)
    StepOptions.of(optimizer).add(wish)
    for options in ({"weight_decay": MORE}, {}, {"weight_decay": MORE}):
        wish.options = options
        optimizer.step()
        assert decays(optimizer) == [OWN, 0.0, 5e-4]
    assert optimizer.seen == [[MORE, 0.0, MORE], [OWN, 0.0, 5e-4], [MORE, 0.0, MORE]]


def test_options_that_a_group_has_not_are_not_given(optimizer: Any) -> None:
    wish = Wish(betas=3.0, momentum=0.9, lr=0.5)
    StepOptions.of(optimizer).add(wish)
    lrs: list[list[float]] = []
    optimizer.step(lambda: None)
    optimizer.register_step_pre_hook(lambda *_: lrs.append([group["lr"] for group in optimizer.param_groups]))
    optimizer.step()
    assert lrs and all(each == [0.5] * 3 for each in lrs)
    for group in optimizer.param_groups:
        assert "betas" not in group and group["momentum"] == 0 and group["lr"] == 0.1


def test_of_several_wishes_the_largest_counts(optimizer: Any) -> None:
    wishes = [Wish(weight_decay=value) for value in (2e-3, MORE, 3e-3)]
    for wish in wishes:
        StepOptions.of(optimizer).add(wish)
    optimizer.step()
    StepOptions.of(optimizer).discard(wishes[1])
    optimizer.step()
    assert [seen[0] for seen in optimizer.seen] == [MORE, 3e-3]


def test_who_is_gone_wants_nothing(optimizer: Any) -> None:
    StepOptions.of(optimizer).add(Wish(weight_decay=MORE))
    gc.collect()
    optimizer.step()
    assert optimizer.seen == [[OWN, 0.0, 5e-4]]


def test_a_step_within_a_step_does_not_end_it() -> None:
    class Longer(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            self.seen = decays(self)

    torch.optim.SGD(weights()).step()  # from now on torch's hooks run for SGD.step as well as for Longer.step
    optimizer, wish = Longer(groups(weights()), lr=0.1, weight_decay=OWN), Wish(weight_decay=MORE)
    StepOptions.of(optimizer).add(wish)
    optimizer.step()
    assert optimizer.seen == [MORE, 0.0, MORE] and decays(optimizer) == [OWN, 0.0, 5e-4]


@pytest.mark.parametrize("as_keyword", [True, False])
def test_what_a_closure_makes_wanted_is_given_behind_it(optimizer: Any, as_keyword: bool) -> None:
    """As where a trainer hands its forwards to step(); their own weight decay is seen within the closure."""
    wish, within = Wish(), []
    StepOptions.of(optimizer).add(wish)

    def closure() -> float:
        within.append(decays(optimizer)[0])
        wish.options = {"weight_decay": MORE}
        return 3.0

    result = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
    assert result == 3.0 and within == [OWN]
    assert optimizer.seen == [[MORE, 0.0, MORE]]


class Broken(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("out of memory")


def broken() -> torch.optim.Optimizer:
    """One whose step was left by an exception, and that has not got its own back yet."""
    optimizer = Broken(groups(weights()), lr=0.1, weight_decay=OWN)
    optimizer.wish = Wish(weight_decay=MORE)  # type: ignore[attr-defined]
    StepOptions.of(optimizer).add(optimizer.wish)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert decays(optimizer) == [MORE, 0.0, MORE]
    return optimizer


def test_after_an_exception_before_a_state_is_taken() -> None:
    optimizer = broken()
    assert [group["weight_decay"] for group in optimizer.state_dict()["param_groups"]] == [OWN, 0.0, 5e-4]
    assert decays(optimizer) == [OWN, 0.0, 5e-4]


def test_after_an_exception_before_the_next_step() -> None:
    optimizer = broken()
    optimizer.wish.options, seen = {}, []  # type: ignore[attr-defined]
    optimizer.register_step_pre_hook(lambda *_: seen.append(decays(optimizer)))
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert seen == [[OWN, 0.0, 5e-4]]
    optimizer = broken()
    with pytest.raises(RuntimeError):  # and a second time it is not taken for its own
        optimizer.step()
    StepOptions.of(optimizer).restore()
    assert decays(optimizer) == [OWN, 0.0, 5e-4]


def test_after_an_exception_what_was_set_meanwhile_stays() -> None:
    optimizer = broken()
    optimizer.param_groups[0]["weight_decay"] = 0.3  # a schedule of its own
    StepOptions.of(optimizer).restore()
    assert decays(optimizer) == [0.3, 0.0, 5e-4]


def test_a_state_that_is_loaded_after_an_exception_stays() -> None:
    optimizer = broken()
    other = torch.optim.SGD(groups(weights()), lr=0.2, weight_decay=0.02)
    optimizer.load_state_dict(other.state_dict())
    StepOptions.of(optimizer).restore()
    assert decays(optimizer) == [0.02, 0.0, 5e-4]


def test_an_exception_in_the_closure_finds_its_own(optimizer: Any) -> None:
    StepOptions.of(optimizer).add(wish := Wish())

    def closure() -> None:
        wish.options = {"weight_decay": MORE}
        raise ValueError

    with pytest.raises(ValueError):
        optimizer.step(closure)
    assert decays(optimizer) == [OWN, 0.0, 5e-4]


def test_copies_and_files_have_no_wishes(optimizer: Any) -> None:
    wish = Wish(weight_decay=MORE)
    StepOptions.of(optimizer).add(wish)
    optimizer.step()
    plain = torch.optim.SGD(groups(weights()), lr=0.1, weight_decay=OWN)
    StepOptions.of(plain).add(wish)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(plain))):
        seen: list[list[float]] = []
        twin.register_step_pre_hook(lambda *_, twin=twin, seen=seen: seen.append(decays(twin)))
        twin.step()
        assert seen and all(each == decays(twin) == [OWN, 0.0, 5e-4] for each in seen)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert [group["weight_decay"] for group in torch.load(file)["param_groups"]] == [OWN, 0.0, 5e-4]


def test_schedulers_of_the_learning_rate_before_and_after(optimizer: Any) -> None:
    wish = Wish(weight_decay=MORE)
    first = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    StepOptions.of(optimizer).add(wish)
    second = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        optimizer.step()
        first.step()
        second.step()
    assert optimizer.seen == [[MORE, 0.0, MORE]] * 3


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "RMSprop", "Adagrad"])
@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
def test_the_update_is_that_of_the_larger_weight_decay(name: str, how: dict[str, bool]) -> None:
    """Weights as if its groups had been changed by hand around each second step; and other than without."""
    cls = getattr(torch.optim, name)
    if how.get("fused") and "fused" not in cls.__init__.__code__.co_varnames:
        pytest.skip("not fused")
    runs = []
    for ours, by_hand in ((True, False), (False, True), (False, False)):
        parameters = weights()
        optimizer = cls(groups(parameters), lr=0.1, weight_decay=OWN, **how)
        wish = Wish()
        if ours:
            StepOptions.of(optimizer).add(wish)
        for step in range(6):
            for index, parameter in enumerate(parameters):
                parameter.grad = torch.full((2,), 0.1 * (index + step))
            wish.options = {"weight_decay": 0.5} if step % 2 else {}
            before = decays(optimizer)
            if by_hand and step % 2:
                for group in optimizer.param_groups:
                    group["weight_decay"] = 0.5 if group["weight_decay"] else 0.0
            optimizer.step()
            for group, own in zip(optimizer.param_groups, before, strict=True):
                group["weight_decay"] = own
        runs.append(torch.stack([parameter.detach() for parameter in parameters]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_compiled_step_has_it_too() -> None:
    torch._dynamo.reset()
    parameter, wish = nn.Parameter(torch.ones(2)), Wish()
    optimizer = torch.optim.SGD([parameter], lr=0.1, weight_decay=OWN)
    StepOptions.of(optimizer).add(wish)
    step = torch.compile(optimizer.step, backend="eager")
    expected = torch.ones(2)
    for turn in range(6):
        wish.options = {"weight_decay": 0.5} if turn % 2 else {}
        parameter.grad = torch.zeros(2)
        step()
        expected = expected - 0.1 * (0.5 if turn % 2 else OWN) * expected
        assert torch.allclose(parameter.detach(), expected, rtol=1e-6)
        assert decays(optimizer) == [OWN]
