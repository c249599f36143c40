"""Dropout in soft trees against all masks written out: eval, leaves, gradients; and through its recipe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dropsurgery import SurgeryError, apply_recipe, find_sites, strip
from dropsurgery.regularizers.hme_dropout import HmeDropout, dropped_left, hme_dropout

FEATURES, DEPTH = 5, 3


class Node(nn.Module):
    """g * left + (1 - g) * right."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.gate, self.left, self.right = nn.Linear(FEATURES, 1), left, right

    def forward(self, x: Tensor) -> Tensor:
        share = torch.sigmoid(self.gate(x))
        return share * self.left(x) + (1 - share) * self.right(x)


def tree(depth: int = DEPTH) -> nn.Module:
    return nn.Linear(FEATURES, 2) if depth == 0 else Node(tree(depth - 1), tree(depth - 1))


def new_tree(depth: int = DEPTH, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return tree(depth).to(dtype)


def new_input(count: int = 7) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, FEATURES, dtype=torch.float64)


def nodes_of(net: nn.Module) -> list[Node]:
    return [module for module in net.modules() if isinstance(module, Node)]


def by_hand(net: nn.Module, x: np.ndarray, mask: dict[nn.Module, float]) -> np.ndarray:
    """The response of a tree whose gates are multiplied by given numbers."""

    def linear(layer: nn.Module) -> np.ndarray:
        weight, bias = (each.detach().numpy() for each in (layer.weight, layer.bias))
        return x @ weight.T + bias

    if isinstance(net, nn.Linear):
        return linear(net)
    g = mask[net] / (1 + np.exp(-linear(net.gate)))
    return g * by_hand(net.left, x, mask) + (1 - g) * by_hand(net.right, x, mask)


def by_leaves(net: nn.Module, x: np.ndarray, mask: dict[nn.Module, float]) -> list[np.ndarray]:
    """The weight of each leaf, (B, 1) each."""
    if isinstance(net, nn.Linear):
        return [np.ones((len(x), 1))]
    weight, bias = (each.detach().numpy() for each in (net.gate.weight, net.gate.bias))
    g = mask[net] / (1 + np.exp(-(x @ weight.T + bias)))
    left, right = (by_leaves(each, x, mask) for each in (net.left, net.right))
    return [g * each for each in left] + [(1 - g) * each for each in right]


def operated(net: nn.Module, p: float, **options: object) -> nn.Module:
    return apply_recipe(net, "hme_dropout", example_inputs=new_input(), overrides=_overrides(p, options), seed=0)


def _overrides(p: float, options: dict[str, object]) -> dict[str, object]:
    return {f"decision nodes.with.{name}": value for name, value in {"p": p, **options}.items()}


# ---- the formula ----


def test_dropped_left_is_zero_and_gives_no_gradient() -> None:
    gate = torch.rand(6, 1, requires_grad=True)
    dropped = torch.tensor([[True], [False], [True], [False], [False], [True]])
    y = dropped_left(gate, dropped)
    y.sum().backward()
    for i in range(6):
        assert y[i] == (0 if dropped[i] else gate[i]) and gate.grad[i] == (0 if dropped[i] else 1)


@pytest.mark.parametrize("sample", ["per_sample", "per_batch"])
def test_share(sample: str) -> None:
    torch.manual_seed(0)
    p, times = 0.3, 4000
    draws = torch.stack([hme_dropout(torch.ones(3, 1), p, sample) == 0 for _ in range(times)])
    assert abs(draws[:, 0].double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / times)
    together = (draws == draws[:, :1]).all()
    assert bool(together) == (sample == "per_batch")


def test_eval_is_the_mean_over_all_masks() -> None:
    """All 128 masks of a tree of depth 3 by their probabilities; the tree without dropout is far from it."""
    net, x, p = new_tree(), new_input(), 0.3
    nodes = nodes_of(net)
    mean = np.zeros((len(x), 2))
    for mask in itertools.product((0.0, 1.0), repeat=len(nodes)):
        chance = math.prod(1 - p if kept else p for kept in mask)
        mean += chance * by_hand(net, x.numpy(), dict(zip(nodes, mask, strict=True)))
    gm = operated(net, p).eval()
    assert len(nodes) == 7 and np.abs(gm(x).detach().numpy() - mean).max() <= 1e-6
    assert np.abs(net(x).detach().numpy() - mean).max() > 0.01
    full = operated(net, p, eval_rule="full").eval()
    assert torch.equal(full(x), net(x))


def test_training_is_one_of_the_masks() -> None:
    """With `per_batch` each output is that of one mask, and several of them are met."""
    net, x = new_tree(2), new_input()
    nodes = nodes_of(net)
    outputs = [
        by_hand(net, x.numpy(), dict(zip(nodes, mask, strict=True))) for mask in itertools.product((0.0, 1.0), repeat=3)
    ]
    gm, met = operated(net, 0.5, sample="per_batch").train(), set()
    for _ in range(60):
        y = gm(x).detach().numpy()
        fits = [i for i, each in enumerate(outputs) if np.abs(y - each).max() < 1e-9]
        assert fits
        met.add(fits[0])
    assert len(met) >= 5


def test_rate_0_and_rate_1() -> None:
    """p = 0 changes nothing; at p = 1 all that is left is the rightmost leaf."""
    net, x = new_tree(), new_input()
    for training in (True, False):
        assert torch.equal(operated(net, 0.0).train(training)(x), net(x))
    rightmost = net
    while isinstance(rightmost, Node):
        rightmost = rightmost.right
    assert torch.equal(operated(net, 1.0).train()(x), rightmost(x))
    leftmost = net
    while isinstance(leftmost, Node):
        leftmost = leftmost.left
    assert not torch.allclose(operated(net, 1.0).train()(x), leftmost(x), atol=1e-2)


def test_weights_of_leaves_add_up_to_1_and_count_as_expected() -> None:
    net, x, p = new_tree(), new_input(1), 0.3
    nodes, rng = nodes_of(net), np.random.default_rng(0)
    torch.manual_seed(0)
    gates = hme_dropout(torch.ones(4000, len(nodes)), p).numpy()
    live = []
    for row in gates:
        leaves = by_leaves(net, x.numpy(), dict(zip(nodes, row, strict=True)))
        assert abs(sum(leaves).item() - 1) < 1e-6
        live.append(sum(bool(each.item() > 0) for each in leaves))
    expected = (2 - p) ** DEPTH
    assert abs(np.mean(live) - expected) <= 4 * np.std(live) / math.sqrt(len(live))
    both = rng.random((4000, 14)) >= p  # the control: subtrees on either side dropped by themselves
    assert abs(both.mean() * 8 - expected) > 4 * np.std(live) / math.sqrt(len(live))


def test_gradients_of_dropped_subtrees_are_0() -> None:
    net, x = new_tree(), new_input()
    gm = operated(net, 1.0).train()
    gm(x).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in gm.named_parameters()}
    right = {"right.right.right.weight", "right.right.right.bias"}
    for name, grad in grads.items():
        assert (grad is not None and bool(grad.any())) == (name in right)
    net.zero_grad()
    net(x).square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in net.parameters())


# ---- in models ----


def test_every_decision_node_is_a_site() -> None:
    net, x = new_tree(), new_input()
    sites = find_sites(net, "hme_node", example_inputs=x)
    assert [site.module for site in sites if site.edge == "gate"] and len(sites) == 4 * 7
    gm = operated(net, 0.2)
    assert len(gm.surgery.plan.edits) == 7 and list(gm.state_dict()) == list(net.state_dict())
    assert isinstance(gm, Node)
    assert "times 1 - p" in str(gm.surgery.plan)
    with pytest.warns(UserWarning, match="in eval this Node also computes"):
        assert torch.equal(strip(gm.eval())(x), net(x))


class Stacked(nn.Module):
    """A tree whose gates are computed at once: no node by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.leaves = nn.Linear(FEATURES, 3), nn.Linear(FEATURES, 4)

    def forward(self, x: Tensor) -> Tensor:
        g = torch.sigmoid(self.gates(x))
        paths = [g[:, 0] * g[:, 1], g[:, 0] * (1 - g[:, 1]), (1 - g[:, 0]) * g[:, 2], (1 - g[:, 0]) * (1 - g[:, 2])]
        return (torch.stack(paths, -1) * self.leaves(x)).sum(-1)


def test_trees_without_single_nodes_are_refused() -> None:
    with pytest.raises(SurgeryError, match="gives more than one number: not the gate of a single node"):
        apply_recipe(Stacked(), "hme_dropout", example_inputs=torch.randn(2, FEATURES))


def _drawn(gm: nn.Module, x: Tensor) -> Sequence[Tensor]:
    gm.surgery.context.step = 3
    return [gm(x) for _ in range(3)]


def test_nodes_draw_for_themselves_and_repeat_by_seed() -> None:
    net, x = new_tree(), new_input()
    first, second = (_drawn(operated(net, 0.5).train(), x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_refusals_and_repr() -> None:
    for wrong in ({"sample": "batch"}, {"eval_rule": "mean"}):
        with pytest.raises(SurgeryError, match=f"{next(iter(wrong))}: expected"):
            HmeDropout(**wrong)
    with pytest.raises(SurgeryError, match="hme_dropout at a: expected the gate of one decision node"):
        HmeDropout().build(channel_axis=None, channels=None, shape=(4,), site_id="a")
    assert repr(HmeDropout()) == "HmeDropout(p=0.1, sample='per_sample', eval_rule='expected')"
    assert HmeDropout().eval_rule == "the gate of each decision node times 1 - p, its expected value"
    assert HmeDropout(eval_rule="full").eval_rule == "identity"
