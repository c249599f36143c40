"""Forwards that set attributes, keep caches, hand numbers to torch, and call what only data decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropsurgery import apply_recipe
from dropsurgery.capture import Captured, Level, Opaque, capture

EVERYWHERE = {
    "version": 1,
    "name": "linear",
    "entries": [{"name": "linear", "pattern": "linear", "edge": "output", "insert": "dropout", "with": {"p": 0.5}}],
}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)


def example() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def level_of(net: nn.Module) -> Level | Opaque:
    root = capture(net.eval(), example()).root
    assert not isinstance(root, Captured)
    return root  # type: ignore[return-value]


@pytest.mark.parametrize(
    "numbers",
    [
        lambda x: torch.where(x > 0, x, -1.0),
        lambda x: torch.where(x > 0, torch.zeros((), dtype=x.dtype), -1.0),
        lambda x: torch.where(x > 0, 1.0, x),
        lambda x: torch.clamp(x, min=x.mean(), max=x.amax()),
        lambda x: torch.full((4,), 2.0) * torch.full_like(x, 3.0),
        lambda x: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5),
        lambda x: torch.remainder(x, 2) + torch.float_power(2.0, x).float(),
        lambda x: torch.eq(x, other=x.mean()) + torch.add(x, x, alpha=2),
        lambda x: torch.cumsum(x, -1) + torch.special.xlogy(2, x.abs()),
        lambda x: torch.linalg.vector_norm(x, 2, -1, True) * x,
    ],
)
def test_a_number_beside_a_tensor(numbers: Any) -> None:
    """torch's argument parser takes a stand-in for a tensor's memory there, and the interpreter would crash."""

    class Numbers(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(numbers(self.a(x)))

    net = Numbers()
    assert isinstance(level_of(net), Level)
    gm = apply_recipe(net, EVERYWHERE, example_inputs=example()).eval()
    assert torch.equal(gm(example()), net(example()))


def test_torch_is_as_it_was() -> None:
    rooms = (torch, torch.special, torch.linalg, torch.fft, torch.nn.functional)
    before = [dict(vars(room)) for room in rooms]
    level_of(nn.Sequential(nn.Linear(4, 4)))
    assert all(vars(room) == was for room, was in zip(rooms, before, strict=True))


class Notes(Two):
    """Writes down what it was given, and sends a layer to where it is."""

    def forward(self, x: Tensor) -> Tensor:
        self.given = x.dtype
        self.mode = "train" if self.training else "eval"
        self.a = self.a.to(torch.float32)
        return self.b(self.a(x.float()).to(self.given))


def test_plain_attributes_that_a_forward_sets() -> None:
    net = Notes()
    level = level_of(net)
    assert isinstance(level, Level) and level.sets == {"given": torch.float32, "mode": "eval"}
    assert not hasattr(net, "given")
    gm = apply_recipe(net, EVERYWHERE, example_inputs=example())
    for mode in (True, False):
        gm.train(mode), net.train(mode)
        for regularizer in gm.surgery.regularizers.values():
            regularizer.set_rate("p", 0.0)
        assert torch.equal(gm(example()), net(example()))
        assert (gm.given, gm.mode) == (net.given, net.mode) == (torch.float32, "train" if mode else "eval")


class Holds(Two):
    """Sets an attribute that it has read to what it holds already."""

    def __init__(self) -> None:
        super().__init__()
        self.limit: int | None = 3

    def forward(self, x: Tensor) -> Tensor:
        self.limit = x.shape[0] if self.limit is None else self.limit
        return self.b(self.a(x)[: self.limit])


def test_an_attribute_that_is_set_to_what_it_holds() -> None:
    net = Holds()
    level = level_of(net)
    assert isinstance(level, Level) and level.reads["", "limit"] == 3 and not level.sets
    gm = apply_recipe(net, EVERYWHERE, example_inputs=example()).eval()
    assert torch.equal(gm(example().repeat(2, 1)), net(example().repeat(2, 1)))


class Loads(Two):
    """Counts numbers, of which some may be larger than was said; by `decides` it goes by how many counts it got."""

    def __init__(self, decides: bool) -> None:
        super().__init__()
        self.decides = decides

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.bincount(x.abs().long().flatten(), minlength=2)
        if self.decides and counts.shape[0] > 2:
            return self.a(x)
        return self.b(self.a(x)) * counts.sum()


def test_counts_up_to_a_length_that_is_given() -> None:
    assert isinstance(level_of(Loads(decides=True)), Opaque)
    net = Loads(decides=False)
    assert isinstance(level_of(net), Level)
    gm = apply_recipe(net, EVERYWHERE, example_inputs=example()).eval()
    for scale in (0.1, 5.0):
        assert torch.equal(gm(example() * scale), net(example() * scale))


class Counts(Two):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.b(self.a(x))


class Moves(Two):
    def forward(self, x: Tensor) -> Tensor:
        self.a = self.a.to(torch.float64)
        return self.b(self.a(x.double()).float())


@pytest.mark.parametrize(("cls", "reason"), [(Counts, "sets its attribute 'calls'"), (Moves, "elsewhere")])
def test_what_hangs_on_the_module_itself_stays_python(cls: type[Two], reason: str) -> None:
    net = cls()
    level = level_of(net)
    assert isinstance(level, Opaque) and reason in level.reason
    assert net.a.weight.dtype is torch.float32 and getattr(net, "calls", 0) == 0
    assert "test_python_parts.py" in level.line


class Memory:
    def __init__(self) -> None:
        self.parts: list[Tensor] = []


class Remembers(nn.Module):
    """Puts what it is given into an object of its caller, and takes all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        memory.parts.append(self.a(x))
        return torch.cat(memory.parts)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child, self.last = Remembers(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.child(x, Memory()))


def test_an_object_that_a_forward_changes() -> None:
    """It is looked at more than once, and each time as it was."""
    captured = capture(Remembering().eval(), example())
    (last,) = (node for node in captured.view.graph.nodes if node.meta.get("path") == "last")
    assert last.meta["value"].shape == (3, 4)


class Chosen(nn.Module):
    """Calls those of its children that a token goes to."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        best, out = self.score(x).argmax(-1), torch.zeros_like(x)
        for index in best.unique().tolist():
            out[best == index] = self.experts[index](x[best == index])
        return out


def test_children_that_numbers_leave_out() -> None:
    net = Chosen().eval()
    with torch.no_grad():
        net.score.bias.copy_(torch.tensor([0.0, 99.0, 0.0]))
    gm = apply_recipe(net, EVERYWHERE, example_inputs=example())
    assert {edit.site.module for edit in gm.surgery.plan.edits if "experts" in edit.site.module} == {
        f"experts.{index}.{layer}" for index in range(3) for layer in (0, 2)
    }
    assert torch.equal(gm.eval()(example()), net(example()))


class More(nn.Linear):
    """A linear layer by its class, that gives more than one does."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        made = super().forward(x)
        return made.softmax(-1), made


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.more, self.scaled = More(4, 4), Scaled(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.more(x)
        return self.scaled(one + other)


def test_a_linear_layer_that_gives_more_is_more() -> None:
    captured = capture(Holding().eval(), example())
    assert isinstance(captured.root, Level)
    kinds = {child.path: type(child).__name__ for child in captured.root.children.values()}
    assert kinds == {"more": "Level", "scaled": "Leaf"}
