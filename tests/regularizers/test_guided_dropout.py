"""Guided dropout: which nodes go by their strength, what is learned, the warm-up, and how it lives in a model."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dropsurgery import apply_recipe, strip
from dropsurgery.errors import SurgeryError
from dropsurgery.regularizers.guided_dropout import GuidedDropout, guided_dropout


def strengths(nodes: int, seed: int = 0) -> Tensor:
    return torch.randn(nodes, generator=torch.Generator().manual_seed(seed))


def active_region(t: np.ndarray) -> np.ndarray:
    """Which nodes lie outside of the fullest of 100 bins of |t| / max |t|."""
    bins = [min(int(abs(each) / np.abs(t).max() * 100), 99) for each in t]
    fullest = max(range(100), key=lambda index: (bins.count(index), -index))
    return np.array([index != fullest for index in bins])


def share_is(drop: Tensor, p: float) -> bool:
    return bool(abs(drop.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / drop.numel()))


# ---- which nodes go ----


@pytest.mark.parametrize("nodes", [1, 5, 6, 10, 64, 1000])
@pytest.mark.parametrize("p", [0.1, 0.2, 0.3, 0.6, 0.7, 0.9, 1.0])
def test_top_k_drops_the_strongest(nodes: int, p: float) -> None:
    """Exactly floor(p * C) of the largest |t|, and x * t elsewhere; the signed or the weakest fail (the controls)."""
    t = strengths(nodes)
    count = math.floor(round(p * nodes, 6))
    order = np.argsort(-np.abs(t.numpy()), kind="stable")
    y = guided_dropout(torch.ones(3, nodes, 2, 2), t, p, "top_k")
    drop = (y == 0).all(0).all(-1).all(-1)
    assert int(drop.sum()) == count and set(np.flatnonzero(drop.numpy())) == set(order[:count])
    assert torch.equal(y, torch.where(drop, 0, t).view(1, -1, 1, 1).expand_as(y))
    if 0 < count < nodes and nodes >= 64:
        assert set(np.flatnonzero(drop.numpy())) != set(np.argsort(-t.numpy())[:count])
        assert set(np.flatnonzero(drop.numpy())) != set(order[-count:])


def test_top_k_of_equal_strengths_drops_the_first() -> None:
    y = guided_dropout(torch.ones(2, 10), torch.ones(10), 0.3, "top_k", channel_axis=-1)
    assert torch.equal(y == 0, (torch.arange(10) < 3).expand(2, 10))


@pytest.mark.parametrize("nodes", [1, 7, 64, 300])
def test_dr_keeps_the_fullest_bin(nodes: int) -> None:
    """The inactive region is never dropped; at p = 1 the active one always is."""
    for seed in range(20):
        t = strengths(nodes, seed)
        drop = guided_dropout(torch.ones(1, nodes), t, 1.0, "dr", channel_axis=-1)[0] == 0
        assert np.array_equal(drop.numpy(), active_region(t.numpy()))


def test_dr_drops_active_nodes_with_probability_p() -> None:
    torch.manual_seed(0)
    p, t = 0.3, strengths(200)
    active = torch.from_numpy(active_region(t.numpy()))
    drops = torch.stack([guided_dropout(torch.ones(1, 200), t, p, channel_axis=-1)[0] == 0 for _ in range(1000)])
    assert not drops[:, ~active].any() and 0 < active.double().mean() < 1
    assert share_is(drops[:, active], p)
    assert not share_is(drops, p)  # not of all nodes
    layer = GuidedDropout(p, channels=200)
    layer.strength.data.copy_(t)
    assert layer.expected_drop((1, 200)) == pytest.approx(p * float(active.double().mean()))


def test_dr_of_equal_strengths_drops_nothing() -> None:
    x = torch.randn(4, 6, 3, 3)
    for value in (1.0, 0.0):
        t = torch.full((6,), value)
        assert torch.equal(guided_dropout(x, t, 1.0, "dr"), x * value)
    assert GuidedDropout(0.2, channels=6).expected_drop((4, 6, 3, 3)) == 0


@pytest.mark.parametrize("mode", ["top_k", "dr"])
@pytest.mark.parametrize(("shape", "axis"), [((5, 6), -1), ((5, 9, 6), -1), ((5, 6, 3, 4), 1), ((5, 3, 4, 6), -1)])
def test_a_node_goes_for_the_whole_batch(mode: str, shape: tuple[int, ...], axis: int) -> None:
    """And what is kept is multiplied by its strength, and not rescaled."""
    torch.manual_seed(0)
    t = torch.tensor([0.5, 0.505, 2.0, -3.0, 0.1, 0.502])
    x = torch.rand(shape) + 0.1
    y = guided_dropout(x, t, 0.5, mode, channel_axis=axis)
    by_node = (y == 0).movedim(axis, 0).flatten(1)
    assert torch.equal(by_node.all(1), by_node.any(1)) and by_node.any() and not by_node.all()
    kept = (~by_node.any(1)).float() * t
    assert torch.equal(y.movedim(axis, -1), x.movedim(axis, -1) * kept)


# ---- what is learned ----


@pytest.mark.parametrize("training", [True, False])
def test_strengths_multiply_in_train_and_eval(training: bool) -> None:
    x = torch.randn(4, 6, 3, 3)
    layer = GuidedDropout(0.0, channels=6).train(training)
    assert torch.equal(layer(x), x)
    layer.strength.data.copy_(strengths(6))
    expected = x * layer.strength.detach().view(1, -1, 1, 1)
    assert torch.equal(layer(x), expected)
    layer.set_rate("p", 0.5)
    assert torch.equal(layer.eval()(x), expected)
    assert layer.eval_rule == "times the learned strength of each channel"
    assert layer.learned == ("strength",) and [name for name, _ in layer.named_parameters()] == ["strength"]


def test_gradient_of_the_strengths() -> None:
    """Of kept nodes the sum of gradient times input, of dropped ones 0; of x the strength of its node."""
    layer = GuidedDropout(0.5, "top_k", channels=6)
    layer.strength.data.copy_(torch.tensor([0.5, 3.0, -2.0, 0.1, 1.5, -0.2]))
    x = torch.randn(4, 6, 3, 3, requires_grad=True)
    w = torch.randn(4, 6, 3, 3)
    (layer(x) * w).sum().backward()
    kept = torch.tensor([1.0, 0, 0, 1, 0, 1])
    assert torch.allclose(layer.strength.grad, (x * w).sum((0, 2, 3)) * kept, atol=1e-5)
    assert torch.allclose(x.grad, w * (layer.strength * kept).view(1, -1, 1, 1))


def test_gradient_of_the_strengths_beyond_float16() -> None:
    """262144 ones add up to more than 65504; a factor in float16 gets an infinite gradient (the control)."""
    x = torch.ones(64, 2, 64, 64, dtype=torch.float16)
    layer = GuidedDropout(0.0, channels=2)
    layer(x).backward(torch.ones_like(x))
    assert torch.equal(layer.strength.grad, torch.full((2,), 64.0 * 64 * 64))
    factor = torch.ones(2, dtype=torch.float16, requires_grad=True)
    (x * factor.view(1, -1, 1, 1)).backward(torch.ones_like(x))
    assert factor.grad.isinf().all()


# ---- the warm-up, and its state ----


def test_nothing_is_dropped_in_the_warm_up() -> None:
    x = torch.ones(2, 6, 3, 3)
    layer = GuidedDropout(0.5, "top_k", warmup=3, channels=6)
    for _ in range(3):
        assert torch.equal(layer(x), x) and layer.expected_drop((2, 6, 3, 3)) == 0
        layer.after_step()
    assert (layer(x) == 0).double().mean() == 0.5 == layer.expected_drop((2, 6, 3, 3))


def test_the_warm_up_goes_on_where_it_was() -> None:
    layer = GuidedDropout(0.5, "top_k", warmup=3, channels=6)
    for _ in range(2):
        layer.after_step()
    twin = GuidedDropout(0.5, "top_k", warmup=3, channels=6)
    twin.load_state(layer.state())
    for each in (twin, copy.deepcopy(layer)):
        assert torch.equal(each(torch.ones(1, 6, 1, 1)), torch.ones(1, 6, 1, 1))
        each.after_step()
        assert not torch.equal(each(torch.ones(1, 6, 1, 1)), torch.ones(1, 6, 1, 1))
    assert layer.steps == 2  # copies count for themselves
    with pytest.raises(SurgeryError, match="state: expected steps, got"):
        layer.load_state({"step": torch.tensor(1)})


def test_compiled_once_for_the_warm_up_and_once_after() -> None:
    layer = GuidedDropout(0.5, "top_k", warmup=3, channels=6)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.rand(4, 6, 3, 3) + 0.1
    for step in range(7):
        layer.strength.data.copy_(strengths(6, step))
        y = run(x)
        assert torch.allclose(y, layer(x)) and bool((y == 0).any()) == (step >= 3)
        layer.after_step()
    assert counter.frame_count == 2


# ---- in a model ----


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).mean((2, 3)))


def guided(net: nn.Module, x: Tensor, **arguments: object) -> nn.Module:
    entry = {"name": "a", "pattern": "conv_act", "insert": "guided_dropout", "with": arguments}
    return apply_recipe(net, {"version": 1, "name": "r", "entries": [entry]}, example_inputs=x)


def test_in_a_model_strengths_are_learned_and_steps_counted() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 3, 8, 8)
    gm = guided(net, x, p=0.5, mode="top_k", warmup=2)
    new = {name for name, _ in gm.named_parameters()} - {name for name, _ in net.named_parameters()}
    assert new == {"act._surgery.s0.strength"} == set(gm.state_dict()) - set(net.state_dict())
    assert torch.equal(gm.eval()(x), net(x))
    optimizer = torch.optim.SGD(gm.train().parameters(), 0.01)
    (layer,) = gm.surgery.regularizers.values()
    for step in range(3):
        assert layer.steps == step
        optimizer.zero_grad()
        gm(x).square().sum().backward()
        optimizer.step()
    assert not torch.equal(layer.strength, torch.ones(8))
    assert not torch.allclose(gm.eval()(x), net(x))  # the weights are shared, the strengths are the model's own
    assert set(strip(gm).state_dict()) == set(net.state_dict())

    other = guided(Net(), x, p=0.5, mode="top_k", warmup=2)
    other.load_state_dict(gm.state_dict())
    other.surgery.load_state_dict(gm.surgery.state_dict())
    assert torch.equal(other.eval()(x), gm(x)) and torch.equal(other.train()(x), gm.train()(x))


def test_refusals_and_repr() -> None:
    for name, value in (("mode", "drop"), ("warmup", -1), ("warmup", True), ("channels", 0)):
        with pytest.raises(SurgeryError, match=rf"{name}: expected .*, got {value!r}"):
            GuidedDropout(**{name: value})
    with pytest.raises(SurgeryError, match="guided_dropout: expected `channels` where it is used alone, 5 here"):
        GuidedDropout()(torch.ones(2, 5))
    with pytest.raises(SurgeryError, match=r"strength: expected one number for each of 5 channels, got .*6"):
        guided_dropout(torch.ones(2, 5), torch.ones(6), 0.2)
    with pytest.raises(
        SurgeryError, match=r"guided_dropout at a: expected a known channel axis, .*; use dropout there"
    ):
        GuidedDropout().build(channel_axis=None, channels=None, shape=(2, 3, 4), site_id="a")
    with pytest.raises(
        SurgeryError, match=r"guided_dropout at a: expected 6 channels, .*, got 3; leave `channels` out"
    ):
        GuidedDropout(channels=6).build(channel_axis=1, channels=3, shape=(2, 3, 4, 4), site_id="a")
    assert repr(GuidedDropout()) == "GuidedDropout(p=0.2, mode='dr', warmup=0)"
