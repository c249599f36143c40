"""Two forwards are told apart by their operators alone: each way to differ is found, and what is the same is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropsurgery.analysis.traces import Marks, NotComparable, record, replay

INPUTS = ((torch.empty(2, 3, 8, 8, device="meta"),), {})


class Net(nn.Module):
    """A net whose middle is given: what is done to the features, with the net at hand."""

    def __init__(self, middle: Callable[[Net, Tensor], Any] = lambda net, x: F.relu(x)) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.middle = middle

    def forward(self, x: Tensor) -> Any:
        return self.middle(self, self.norm(self.first(x)))


def pair(one: Callable[[Net, Tensor], Any], other: Callable[[Net, Tensor], Any]) -> tuple[Net, Net]:
    """Two nets over the same parameters, which differ in the middle."""
    with torch.device("meta"):
        left = Net(one)
    right = copy.copy(left)
    right.middle = other
    return left, right


def difference(one: Callable[[Net, Tensor], Any], other: Callable[[Net, Tensor], Any], **options: Any) -> str | None:
    left, right = pair(one, other)
    return replay(record(left, INPUTS, **options), right, INPUTS, **options)


def in_place(net: Net, x: Tensor) -> Tensor:
    x += 1
    return x.unsqueeze_(0).squeeze(0).view(x.shape[1], -1)[1:]


def asserting(net: Net, x: Tensor) -> Tensor:
    torch._assert_async((x.mean() * 0 == 0).all())
    return x


def constants_in_place(net: Net, x: Tensor) -> Tensor:
    """Numbers on the CPU: drawn into memory that held others, changed through a view."""
    made = torch.empty(3).uniform_(-1, 1)
    made[1:].mul_(2)
    made += torch.full_like(made, 0.5)
    return x * made.exp().sum().to("meta")


def partly(net: Net, x: Tensor) -> Tensor:
    """A norm without weights: in backward an operator gives nothing for the gradients of what is not there."""
    return F.layer_norm(F.rms_norm(x, x.shape[-1:]), x.shape[-1:])


SAME: dict[str, Callable[[Net, Tensor], Any]] = {
    "one operator": lambda net, x: F.relu(x),
    "operators in place, and views": in_place,
    "lists and dicts": lambda net, x: {"parts": list(x.chunk(2, 1)), "sum": x.sum((2, 3)), "number": 3.5},
    "random numbers": lambda net, x: F.dropout(x, 0.5),
    "constants": lambda net, x: x[:, torch.tensor([2, 0])] * torch.tensor(2.0),
    "a constant that is no number": lambda net, x: x.clamp(max=float("nan")),
    "an attribute": lambda net, x: x + net.first.weight.mean(),
    "constants that are changed": constants_in_place,
    "an operator without a result": asserting,
    "an operator that gives a part": partly,
    "nothing": lambda net, x: None,
}


@pytest.mark.parametrize("what", SAME)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_same(what: str, grad: bool, training: bool) -> None:
    left, right = pair(SAME[what], lambda net, x: SAME[what](net, x))
    trace = record(left.train(training), INPUTS, grad=grad)
    for _ in range(2):
        assert replay(trace, right.train(training), INPUTS, grad=grad) is None
    assert len(trace.calls) >= 2


DIFFERENT: dict[str, tuple[Callable[[Net, Tensor], Any], Callable[[Net, Tensor], Any], str]] = {
    "another operator": (lambda net, x: F.relu(x), lambda net, x: F.gelu(x), "expected aten.relu"),
    "one too many": (lambda net, x: x, lambda net, x: x.clone(), "expected the end, got aten.clone"),
    "one too few": (lambda net, x: x.clone(), lambda net, x: x, "got the end"),
    "another order": (lambda net, x: x.relu().tanh(), lambda net, x: x.tanh().relu(), "expected aten.relu"),
    "another number": (lambda net, x: x + 1, lambda net, x: x + 2, "other arguments of aten.add"),
    "another constant": (
        lambda net, x: x * torch.tensor(1.0),
        lambda net, x: x * torch.tensor(2.0),
        "other arguments of aten",
    ),
    "another parameter": (
        lambda net, x: x * net.first.weight.sum(),
        lambda net, x: x * net.second.weight.sum(),
        "other arguments of aten.sum",
    ),
    "another tensor of the same shape": (
        lambda net, x: x + x.relu(),
        lambda net, x: x.relu() + x.relu(),
        "expected aten.add",
    ),
    "operands exchanged": (lambda net, x: x - x.relu(), lambda net, x: x.relu() - x, "other arguments of aten.sub"),
    "another part": (lambda net, x: x[:1].relu(), lambda net, x: x[1:].relu(), "other arguments of aten.slice"),
    "another result": (lambda net, x: (x, x.relu()), lambda net, x: (x.relu(), x), "another result"),
    "an error": (lambda net, x: x, lambda net, x: net.nothing, "expected no error, got AttributeError"),
    "an error of an operator": (lambda net, x: x, lambda net, x: x.view(7), "expected the end, got aten.view"),
    "no error": (lambda net, x: x.view(7), lambda net, x: x, "got no error"),
    "another error": (
        lambda net, x: net.first.nothing,
        lambda net, x: net.second.anything,
        "got AttributeError: 'Conv2d' object has no attribute 'anything'",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
@pytest.mark.parametrize("grad", [False, True])
def test_a_difference(what: str, grad: bool) -> None:
    one, other, told = DIFFERENT[what]
    assert told in str(difference(one, other, grad=grad))


def test_another_mode_is_a_difference() -> None:
    left, right = pair(SAME["one operator"], SAME["one operator"])
    assert replay(record(left.train(), INPUTS), right.eval(), INPUTS) is not None


def test_a_model_that_hides_errors_hides_no_difference() -> None:
    def hiding(net: Net, x: Tensor) -> Tensor:
        try:
            return x.gelu()  # type: ignore[attr-defined,no-any-return]
        except Exception:
            return F.gelu(x)

    assert "expected aten.relu" in str(difference(SAME["one operator"], hiding))


def test_equal_errors_are_no_difference() -> None:
    assert difference(lambda net, x: x.view(7), lambda net, x: x.relu().view(7)) is None


@pytest.mark.parametrize(
    "middle",
    [
        lambda net, x: x if x.sum() > 0 else -x,
        lambda net, x: x * x.mean().item(),
        lambda net, x: x[x > 0],
        lambda net, x: x * torch.tensor([1.0], device=x.device),
    ],
)
def test_what_hangs_on_values_is_not_comparable(middle: Callable[[Net, Tensor], Any]) -> None:
    left, _ = pair(middle, middle)
    with pytest.raises(NotComparable):
        record(left, INPUTS)


def test_torchs_own_errors_may_be_worded_otherwise() -> None:
    def refusing(error: Exception) -> Callable[[Net, Tensor], Any]:
        def refuse(net: Net, x: Tensor) -> None:
            raise error

        return refuse

    assert difference(refusing(RuntimeError("one")), refusing(RuntimeError("other"))) is None
    for other in (ValueError("one"), RuntimeError("one")):
        assert "expected ValueError: other, got" in str(difference(refusing(ValueError("other")), refusing(other)))


class Marked(nn.Module):
    """Two identities, called and used as said."""

    def __init__(self, use: Callable[[Marked, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.use = nn.Identity(), nn.Identity(), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


@pytest.mark.parametrize(
    ("use", "made", "used"),
    [
        (lambda net, x: net.first(x).relu(), {"first"}, {"first"}),
        (lambda net, x: net.first(x.relu()), {"first"}, {"first"}),
        (lambda net, x: (net.first(x), x.relu())[1], {"first"}, set()),
        (lambda net, x: x.relu(), set(), set()),
        (lambda net, x: net.second(net.first(x)).relu(), {"first", "second"}, {"first", "second"}),
        (lambda net, x: (net.second(x), net.first(x).relu())[1], {"first", "second"}, {"first"}),
        (lambda net, x: x.copy_(given) if (given := net.first(x)) is not x else x, {"first"}, {"first"}),
        (lambda net, x: net.first(x.view(2, 1, 3, 1, 8, 8).transpose(2, 3)).view(-1), {"first"}, {"first"}),
        (lambda net, x: torch.cat([x, net.first(x)]).relu()[:2], {"first"}, {"first"}),
    ],
)
def test_marks(use: Callable[[Marked, Tensor], Tensor], made: set[str], used: set[str]) -> None:
    marks, net = Marks(), Marked(use)
    trace = record(net, INPUTS, grad=True)
    with marks.on({"first": net.first, "second": net.second}):
        assert replay(trace, net, INPUTS, grad=True, marks=marks) is None
    assert (marks.made, marks.used) == (made, used)
    assert not net.first._forward_hooks
