"""What is taken over from an equal module is what recording the module itself gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from dropsurgery import CaptureError
from dropsurgery.capture import Leaf, Level, Opaque, record, siblings
from dropsurgery.capture.inputs import resolve_inputs
from dropsurgery.capture.levels import map_tree
from dropsurgery.forwards import graph_key
from tests.laws import fuzz
from tests.zoo import ZOO

Call = Level | Opaque | Leaf
# How many levels are at least taken over.
MODELS = {
    "resnet18": 1, "resnet50": 8, "densenet121": 0, "test_vit": 5, "swin_tiny_patch4_window7_224": 12, "coat_tiny": 30,
    "xcit_nano_12_p8_224": 10, "hrnet_w18_small": 15, "mvitv2_tiny": 5, "sequencer2d_s": 2, "dla46x_c": 2,
}  # fmt: skip


def geometry(tree: Any) -> Any:
    """A tree with its tensors as they lie, and its modules by identity."""

    def leaf(item: Any) -> Any:
        if isinstance(item, Tensor):
            return tuple(item.shape), item.stride(), item.dtype, item.device, item.requires_grad
        if isinstance(item, nn.Module):
            return id(item) if "_modules" in item.__dict__ else type(item).__name__  # one of the model, or a probe
        return repr(item)

    return map_tree(tree, leaf)


def picture(call: Call) -> Any:
    """All that a recorded call says, comparable between recordings."""
    home = (type(call).__name__, call.path, id(call.module))
    if isinstance(call, Leaf):
        return home
    if isinstance(call, Opaque):
        parts = [(picture(part.call), geometry(part.inputs), geometry(part.output)) for part in call.components]
        return *home, call.reason, geometry(call.inputs), call.on_data, parts
    order = {node: index for index, node in enumerate(call.graph.nodes)}
    return (
        *home,
        graph_key(call.graph),
        [(geometry(node.meta.get("value")), node.meta.get("random")) for node in call.graph.nodes],
        [(order[guard.node], guard.value, guard.reason) for guard in call.guards],
        call.guarded_tensors,
        {key: geometry(value) for key, value in call.reads.items()},
        {order[node]: picture(child) for node, child in call.children.items()},
        len(call.regions),
        (call.random, call.asks_rank, call.reads_training),
        (geometry(call.inputs), geometry(call.output)),
    )


def recorded(model: nn.Module, inputs: Any, *, share: bool, training: bool | None = False) -> Any:
    try:
        return record(model, *inputs, share=share, training=training)
    except CaptureError as error:
        return str(error)


def check(model: nn.Module, inputs: Any) -> Call:
    """Shared and unshared, in both modes and in that of each module; gives the shared recording in eval."""
    for training in (True, None, False):
        one, other = (recorded(model, inputs, share=share, training=training) for share in (True, False))
        if isinstance(one, str):
            assert one == other
        else:
            assert picture(one) == picture(other)
    return one


def levels(call: Call) -> list[Level]:
    if isinstance(call, Leaf):
        return []
    calls = call.children.values() if isinstance(call, Level) else [part.call for part in call.components]
    return [call] * isinstance(call, Level) + [level for child in calls for level in levels(child)]


def shared(call: Call) -> int:
    """How many levels were taken over."""
    return sum(count - 1 for count in Counter(id(level.graph) for level in levels(call)).values())


@pytest.mark.parametrize("name", MODELS)
def test_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    call = check(model, resolve_inputs(model, None)[0])
    assert isinstance(call, Level)
    assert shared(call) >= MODELS[name]


@pytest.mark.parametrize("name", ZOO)
def test_topologies(name: str) -> None:
    check(ZOO[name].build(), (ZOO[name].example(), {}))


class Row(nn.Module):
    """Several models, called one after the other with the same things."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *args: Any) -> Any:
        return [fuzz.run(model, args if len(args) > 1 else args[0]) for model in self.models]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group", fuzz.STATEMENTS)
def test_random_models(group: str) -> None:
    """Whatever a forward does, twice the same model in a row is recorded as two."""
    found: list[int] = []

    @settings(max_examples=25, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(fuzz.programs(group))
    def hold(program: fuzz.Program) -> None:
        example = program.example()
        call = check(Row(program.build(), program.build(), program.build()), ((example,), {}))
        found.append(0 if isinstance(call, str) else shared(call))

    hold()
    assert sum(found) > 5


class Block(nn.Module):
    """Looks at all kinds of attributes."""

    rate = 0.5

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.sizes = [2, 2]
        self.act, self.table = nn.functional.relu, {"a": (1, 2.0)}
        for name, value in fields.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.conv(x), self.sizes, 1)
        return torch.cat([self.act(part) * self.rate for part in parts], 1) + self.table["a"][1] + len(self.sizes)


class Counts(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.sizes = self.sizes[::-1]
        return super().forward(x)


class Learns(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.conv.weight.requires_grad else super().forward(x)


class Twice(nn.Module):
    """The same child under two names, or not."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.one = Block()
        self.two = self.one if same else Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Reshapes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose_(2, 3) * 2


class Puts(nn.Module):
    def forward(self, parts: list[Tensor]) -> Tensor:
        parts[0] = parts[0] * 2
        return parts[0]


class Given(nn.Module):
    """Calls its children with something that `wrap` makes."""

    def __init__(self, wrap: Any, *children: nn.Module) -> None:
        super().__init__()
        self.wrap, self.all = wrap, nn.ModuleList(children)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.wrap(x)
        for child in self.all:
            x = x + child(parts)
        return x + (parts[0] if isinstance(parts, list) else parts)


def frozen(block: nn.Module) -> nn.Module:
    return block.requires_grad_(False)


Case = tuple[Callable[[], nn.Module], int]
ALIKE: dict[str, Case] = {
    "equal": (lambda: nn.Sequential(Block(), Block()), 1),
    "other number": (lambda: nn.Sequential(Block(), Block(rate=0.25)), 0),
    "number of another type": (lambda: nn.Sequential(Block(rate=1), Block(rate=1.0)), 0),
    "zero of another sign": (lambda: nn.Sequential(Block(rate=0.0), Block(rate=-0.0)), 0),
    "other list": (lambda: nn.Sequential(Block(), Block(sizes=[1, 3])), 0),
    "list of another type": (lambda: nn.Sequential(Block(), Block(sizes=(2, 2))), 0),
    "other dict": (lambda: nn.Sequential(Block(), Block(table={"a": (1, 3.0)})), 0),
    "other function": (lambda: nn.Sequential(Block(), Block(act=torch.sigmoid)), 0),
    "function of its own": (lambda: nn.Sequential(*(Block(act=lambda x: x * 2) for _ in "12")), 0),
    "other layer": (lambda: nn.Sequential(Block(), Block(conv=nn.Conv2d(4, 4, 1))), 0),
    "other dtype": (lambda: nn.Sequential(Block(), Block(act=nn.Conv2d(2, 2, 1).double())), 0),
    "frozen": (lambda: nn.Sequential(Learns(), frozen(Learns())), 0),
    "one mode another": (lambda: nn.Sequential(Block(), Block().train(False)), 1),
    "one more attribute": (lambda: nn.Sequential(Block(), Block(unused=object())), 0),
    "called again": (lambda: nn.Sequential(*[Block()] * 2), 1),
    "of another size": (lambda: nn.Sequential(Block(), nn.MaxPool2d(2), Block()), 0),
    "sets something": (lambda: nn.Sequential(Counts(), Counts()), 0),
    "one child in two places": (lambda: nn.Sequential(Twice(True), Twice(True)), 4),
    "in two places or not": (lambda: nn.Sequential(Twice(True), Twice(False)), 3),
    "turns its argument": (lambda: Given(torch.clone, Reshapes(), Reshapes()), 0),
    "changes a list": (lambda: Given(lambda x: [x], Puts(), Puts()), 0),
    "same tensor twice": (lambda: Given(torch.relu, Block(), Block()), 1),
}


@pytest.mark.parametrize("case", ALIKE)
def test_what_counts_as_alike(case: str) -> None:
    build, count = ALIKE[case]
    assert shared(check(build(), ((torch.randn(2, 4, 8, 8),), {}))) == count


def test_a_look_that_overlooks_an_attribute_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings, "_of_value", lambda value: type(value))
    with pytest.raises(AssertionError):
        check(nn.Sequential(Block(rate=0.5), Block(rate=0.25)), ((torch.randn(2, 4, 8, 8),), {}))
