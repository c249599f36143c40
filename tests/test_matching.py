from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dropsurgery.capture import capture
from dropsurgery.errors import SurgeryError
from dropsurgery.matching import After, Into, Match, Miss, Op, Pattern, chain, find, kind_of, ops
from dropsurgery.patterns import conv_bn_act, residual_add
from tests.zoo import ZOO, NormAct


def graph_of(model: nn.Module, *shape: int) -> fx.Graph:
    return capture(model, torch.zeros(shape or (2, 3, 16, 16))).view.graph


class Forms(nn.Module):
    """The same three operations again and again, each time in another form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3))
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.group, self.relu = nn.GroupNorm(3, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = F.relu(self.group(F.conv2d(x, self.weight, padding=1)), inplace=True)
        x = torch.relu(F.group_norm(self.conv(x), 3))
        x = F.batch_norm(torch.conv2d(x, self.weight, None, 1, 1), self.mean, self.var, self.scale).relu_()
        return torch.relu_(F.instance_norm(F.conv2d(input=x, weight=self.weight, padding=1)))


class Adds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        y += x
        y = torch.add(y, x).add(x).add_(x)
        return y.mul(x) * x


def test_all_forms_of_an_operation_are_one_thing() -> None:
    assert len(find(graph_of(Forms()), conv_bn_act.PATTERN).matches) == 5


def test_all_forms_of_addition_are_one_thing() -> None:
    kinds = [kind_of(node) for node in graph_of(Adds()).nodes]
    assert kinds.count("add") == 5
    assert kinds.count("mul") == 2


def test_norm_and_activation_are_found_inside_one_leaf() -> None:
    graph = graph_of(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4)))
    (match,) = find(graph, conv_bn_act.PATTERN).matches
    (output,) = match.edges("output")
    assert kind_of(output.node) == "norm_act"
    norm = match.edges("norm")
    assert isinstance(norm, Miss) and not norm
    assert norm.reason == "batch norm with activation is one layer, nothing between norm and activation can be reached"


def test_a_norm_whose_activation_is_switched_off_is_a_norm() -> None:
    norm = NormAct(4)
    norm.act = nn.Identity()
    found = find(graph_of(nn.Sequential(nn.Conv2d(3, 4, 3), norm)), conv_bn_act.PATTERN)
    assert [miss.reason for miss in found.misses] == [
        "batch norm is followed by the result of the net, not by activation"
    ]


def test_edges_address_the_right_nodes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU())
    (match,) = find(graph_of(model), conv_bn_act.PATTERN).matches
    nodes = {name: match.edges(name)[0].node.target for name in ("output", "conv", "norm", "input")}
    assert nodes == {"output": "4", "conv": "0", "norm": "2", "input": "0"}
    (edge,) = match.edges("input")
    assert edge.operand == 0 and edge.source.op == "placeholder"


class Forked(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.conv, self.norm, self.where = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), where

    def forward(self, x: Tensor) -> Tensor:
        values = {"conv": self.conv(x)}
        values["norm"] = self.norm(values["conv"])
        out = F.relu(values["norm"])
        return torch.cat([out, values[self.where]]) if self.where in values else out.reshape(values["norm"].shape)


@pytest.mark.parametrize(
    ("where", "reason"),
    [("conv", "conv2d has 2 users"), ("norm", "batch norm has 2 users"), ("shape only", None)],
)
def test_a_result_used_elsewhere_too_is_a_miss(where: str, reason: str | None) -> None:
    found = find(graph_of(Forked(where)), conv_bn_act.PATTERN)
    assert [miss.reason for miss in found.misses] == ([reason] if reason else [])
    assert len(found.matches) == (reason is None)


def test_nearest_misses_come_first_and_once() -> None:
    nets = [nn.Conv2d(3, 3, 1), nn.MaxPool2d(1), nn.Conv2d(3, 3, 1), nn.MaxPool2d(1), nn.Conv2d(3, 3, 1)]
    found = find(graph_of(nn.Sequential(*nets, nn.BatchNorm2d(3), nn.MaxPool2d(1))), conv_bn_act.PATTERN)
    assert [miss.reason for miss in found.nearest()] == [
        "batch norm is followed by max pool, not by activation",
        "conv2d is followed by max pool, not by norm",
    ]
    assert len(found.nearest(1)) == 1


def test_two_equal_branches_have_no_shortcut() -> None:
    model = ZOO["shake_shake"]
    matches = find(capture(model.build(), model.example()).view.graph, residual_add.PATTERN).matches
    inner, outer = matches[:2]
    assert [edge.operand for edge in inner.edges("branch")] == [0, 1]
    shortcut = inner.edges("shortcut")
    assert isinstance(shortcut, Miss) and "no shortcut" in shortcut.reason
    assert [[edge.operand for edge in outer.edges(name)] for name in ("branch", "shortcut")] == [[1], [0]]


def test_parameters_are_no_places() -> None:
    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, F.relu(F.group_norm(self.weight, 1)))

    assert find(graph_of(Standardised()), chain("norm_act", ["group_norm", "activation"])).matches == ()


def test_declared_chain() -> None:
    pattern = chain("conv_gn_act", ["conv2d", "group_norm", "activation"])
    assert list(pattern.edges) == ["output", "conv2d", "group_norm", "input"]
    assert pattern.default_edge == "output"
    found = find(graph_of(Forms()), pattern)
    assert len(found.matches) == 2
    assert "conv2d is followed by batch norm, not by group_norm" in {miss.reason for miss in found.misses}


def test_declared_chain_finds_leaves_and_numbers_what_repeats() -> None:
    pattern = chain("twice", ["conv", "batch_norm", "activation", "conv", "batch_norm", "activation"])
    layers = [nn.Conv2d(3, 3, 1), NormAct(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()]
    (match,) = find(graph_of(nn.Sequential(*layers)), pattern).matches
    assert isinstance(match, Match)
    assert match.edges("activation")[0].node.target == "1"  # type: ignore[index, union-attr]
    assert match.edges("batch_norm_2")[0].node.target == "3"  # type: ignore[index, union-attr]
    assert isinstance(match.edges("batch_norm"), Miss)


def test_unset_kind_fits_anything() -> None:
    pattern = Pattern("any", [(Op("conv", "conv"), Op("next"))], {"output": After("next")})
    assert len(find(graph_of(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Softmax(1))), pattern).matches) == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: chain("x", ["conv2d", "activaton"]), "no kind 'activaton'; did you mean 'activation'?"),
        (lambda: chain("x", ["zzz"]), "no kind 'zzz'; known: activation"),
        (lambda: chain("x", []), "expected a list of kinds, got"),
        (lambda: chain("x", "conv"), "expected a list of kinds, got 'conv'"),
        (lambda: Op("not a name", "conv"), "expected a name"),
        (lambda: Pattern("x", [()], {"output": After("a")}), "at least one operation"),
        (lambda: Pattern("x", [ops(a="conv")], {}), "at least one edge"),
        (lambda: Pattern("x", [(Op("a"), Op("a"))], {"output": After("a")}), "distinct names"),
        (lambda: Pattern("x", [ops(a="conv")], {"output": After("b")}), "edge 'output' is at an operation 'b'"),
        (lambda: Pattern("x", [ops(a="conv")], {"input": Into("b")}), "edge 'input' is at an operation 'b'"),
    ],
)
def test_nonsense_is_refused_when_built(build: object, message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        build()  # type: ignore[operator]


def test_unknown_edge_is_an_error() -> None:
    (match,) = find(
        graph_of(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())), conv_bn_act.PATTERN
    ).matches
    with pytest.raises(SurgeryError, match=r"no edge 'outptu'; did you mean 'output'\?"):
        match.edges("outptu")


def test_a_number_is_no_edge() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x.shape[-1] * x)

    graph = capture(Scaled(), torch.zeros(2, 3)).view.graph
    (match,) = find(graph, chain("scaled", ["mul", "activation"])).matches
    edges = match.edges("input")
    assert isinstance(edges, Miss) and "a number" in edges.reason
