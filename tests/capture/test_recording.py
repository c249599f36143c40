"""What recording makes of forwards that do more than compute: they change arguments, keep values, ask for data."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropsurgery import apply_recipe
from dropsurgery.capture import Captured, Level, Opaque, capture
from tests.laws import checks
from tests.laws.models import STEPS, everywhere, ready


def conv(before: int = 4, after: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())


class Appends(nn.Module):
    """Puts its result into the list that its caller gives it, as VoVNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, parts: list[Tensor]) -> Tensor:
        parts.append(self.conv(parts[-1]))
        parts[0] = parts[0] * 2
        return parts[-1]


class Names(Appends):
    """Puts its result into a dict."""

    def forward(self, parts: dict[str, Tensor]) -> Tensor:
        parts["more"] = self.conv(parts["x"])
        return parts["x"] + parts["more"]


class Collecting(nn.Module):
    def __init__(self, child: nn.Module, empty: Any) -> None:
        super().__init__()
        self.child, self.empty, self.last = child, empty, conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.empty(x)
        more = self.child(parts)
        values = list(parts.values()) if isinstance(parts, dict) else parts
        return self.last(torch.cat([values[-1], values[0] + more], 1))


class Table(nn.Module):
    """Keeps a table of the sizes that it saw last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or self.table.shape[-1] != x.shape[-1]:
            self.table = torch.arange(x.shape[-1], device=x.device) / 10
        return self.conv(x + self.table)


class Remembers(Table):
    """Keeps what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        self.table = x.mean((0, 1, 2))
        return self.conv(x + self.table)


class Asks(nn.Module):
    """Goes by the numbers that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 4), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if (x > 0).any():
            x = self.second(x)
        return x * min(1.0, x.abs().max().item())


class Grows(Asks):
    """Goes by numbers, and calls a layer whose shapes torch alone knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(super().forward(x))


class Picks(nn.Module):
    """Gives as many rows as the numbers say."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv(x).mean((2, 3))
        return rows[rows.sum(1) >= 0]


class Counts(nn.Module):
    """Decides by how many rows there are."""

    def __init__(self) -> None:
        super().__init__()
        self.picks, self.head = Picks(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.picks(x)
        return self.head(rows) if rows.shape[0] > 1 else rows[:, :2]


class Ordered(nn.Module):
    """Gives a dict of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        x = self.conv(x)
        return OrderedDict(out=x, half=x / 2)


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = Ordered(), conv()

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        found = self.body(x)
        found["out"] = self.last(found["out"])
        return found


class Laid(nn.Module):
    """Goes by how its values lie in memory, inputs and what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.turned, self.last = conv(3, 4), nn.Linear(4, 4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.last(x) if x.is_contiguous() else self.last(x * 2).contiguous()
        x = torch.relu(self.turned(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return x.view(-1) if x.is_contiguous() else x.contiguous().view(x.shape[0], -1) + 1


class Divides(nn.Module):
    """Divides whole numbers, and goes by what the result is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        counts = (x > 0).long().sum((2, 3))
        shares = counts / (counts + 1)
        return self.conv(x) + (shares if shares.is_floating_point() else shares * 0 + 5).mean()


class Augments(nn.Module):
    """`@=` makes a new tensor: it changes what the module holds, and not what others hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)
        self.register_buffer("turn", torch.eye(4)[[1, 2, 3, 0]])
        self.kept = [self.turn]

    def forward(self, x: Tensor) -> Tensor:
        self.turn @= self.kept[0]
        return torch.einsum("bchw,cd->bdhw", self.conv(x), self.turn - self.kept[0])


class Caches(nn.Module):
    """Asks for numbers, and keeps some that it was given at its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)
        self.first: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = x.mean()
        return self.conv(x) * (2 if x.abs().sum().item() > 0 else 1) + self.first


NETS = {
    "a list that a child changes": lambda: nn.Sequential(conv(3, 4), Collecting(Appends(), lambda x: [x])),
    "a dict that a child changes": lambda: nn.Sequential(conv(3, 4), Collecting(Names(), lambda x: {"x": x})),
    "a table of sizes": lambda: nn.Sequential(conv(3, 4), Table()),
    "what it was given": lambda: nn.Sequential(conv(3, 4), Remembers()),
    "numbers": Asks,
    "numbers, then larger": Grows,
    "numbers within": lambda: nn.Sequential(Asks(), conv()),
    "rows by numbers": lambda: nn.Sequential(Picks(), nn.Linear(4, 4), nn.ReLU()),
    "decides by rows": Counts,
    "ordered": Takes,
    "layouts": Laid,
    "whole numbers": Divides,
    "a new tensor": Augments,
    "the first input": Caches,
}
OPAQUE = {"what it was given", "numbers", "numbers within", "rows by numbers", "decides by rows", "a new tensor"}
OPAQUE |= {"the first input", "numbers, then larger"}


def image(size: int = 12, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(size))


def captured(name: str, device: str = "cpu") -> Captured:
    return capture(NETS[name]().to(device), image().to(device))


@pytest.mark.parametrize("name", NETS)
def test_it_computes_what_the_model_does(name: str) -> None:
    torch.manual_seed(0)
    model = ready(NETS[name]())
    with checks.check_untouched(model):
        gm = apply_recipe(model, everywhere(), example_inputs=image(), total_steps=STEPS)
    for x in (image(), image(16, 3), image(8, 1), image().to(memory_format=torch.channels_last)):
        checks.check_outputs(model, gm, lambda net, x=x: net(x))
    for _ in range(STEPS):
        gm.surgery.step()
    checks.check_noise(gm, lambda net: net(image()))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", NETS)
def test_only_what_has_to_is_opaque(name: str, device: str) -> None:
    opaque = captured(name, device).view.opaque
    assert bool(opaque) is (name in OPAQUE)
    convs = [node for node in captured(name, device).view.graph.nodes if isinstance(node.meta.get("module"), nn.Conv2d)]
    assert len(convs) == sum(isinstance(module, nn.Conv2d) for module in NETS[name]().modules())


def test_the_caller_of_a_forward_that_asks_for_numbers_is_a_graph() -> None:
    root = captured("numbers within").root
    assert isinstance(root, Level)
    (asks,) = [call for call in root.children.values() if isinstance(call, Opaque)]
    assert asks.on_data and len(asks.components) == 2


def test_a_size_that_hangs_on_numbers_decides_nothing_in_a_graph() -> None:
    root = captured("decides by rows").root
    assert isinstance(root, Opaque)
    assert "sizes that hang on the data" in root.reason


def test_tensors_are_followed_through_an_opaque_forward() -> None:
    graph = captured("numbers").view.graph
    (second,) = [node for node in graph.nodes if node.op == "placeholder" and node.meta["component"] == "second"]
    assert second.meta["continues"].meta["path"] == "first.2"


def test_how_many_parts_the_code_says_is_no_guard() -> None:
    class Thirds(nn.Module):
        def __init__(self, parts: int | None) -> None:
            super().__init__()
            self.linear, self.parts = nn.Linear(6, 6), parts

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            x = self.linear(x).reshape(b, n, self.parts or c // 2, 2).permute(2, 0, 1, 3)
            q, k, v = x.unbind(0)
            return q + k * v

    written, counted = (capture(Thirds(parts), torch.randn(2, 5, 6)).root for parts in (3, None))
    assert isinstance(written, Level) and isinstance(counted, Level)
    assert not written.guards and counted.guards
