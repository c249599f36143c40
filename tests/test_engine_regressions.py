"""Forwards that a recording once got wrong: each runs as the plain model does, or is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dropsurgery import CaptureError, SurgeryError, apply_recipe, find_sites
from dropsurgery.capture import Level, record
from tests.laws import checks, nets
from tests.laws.models import STEPS, everywhere

Change = Callable[[nn.Module, Tensor], Tensor]


class Net(nn.Module):
    """A block whose forward does something in the middle, and an outer module that owns no edit of it."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.block = Block(change)
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


class Block(nets.Base):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change
        self.inner = nets.BranchOnSize()
        self.inner.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.second(self.change(self, self.first(x))))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient


@torch.jit.script
def scripted(x: Tensor, factor: float) -> Tensor:
    return x * factor


@torch.no_grad()
def frozen(x: Tensor) -> Tensor:
    return 2 * x


def autocast_off(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.linear(x.float(), torch.eye(x.shape[-1]))


def autocast_on(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.linear(x, torch.full((x.shape[-1], x.shape[-1]), 0.3)).float()


def nested_no_grad(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = frozen(x) + 3 * x
    return x + scale


def one_attention_kernel(module: nn.Module, x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(x, x, x)


def changed_gradient(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: 2 * kept, lambda kept: kept):
        return x.sigmoid()


def seeded(module: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(5)
    return x + torch.rand(1)


def forked(module: nn.Module, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        return x + torch.rand(1)


def counted(module: Any, x: Tensor) -> Tensor:
    module.seen.append(1.0)
    return x * (len(module.seen) > 0)


# These need Python: the block keeps its forward, and only its own edits are out of reach.
OPAQUE: dict[str, Change] = {
    "autograd function": lambda _, x: Double.apply(x),
    "scripted function": lambda _, x: scripted(x, 0.5),
    "attention kernel": one_attention_kernel,
    "hooks on what autograd saves": changed_gradient,
    "seed": seeded,
    "fork": forked,
    "Python's random numbers": lambda _, x: x * random.random(),
    "a list that grows": counted,
    "is_leaf": lambda _, x: 2 * x if x.is_leaf else x,
    "grad_fn": lambda _, x: 2 * x if x.grad_fn is not None else x,
    "an error that is caught": lambda _, x: caught(x),
}


def caught(x: Tensor) -> Tensor:
    try:
        return x.view(3, -1, 4, 16, 16).sum(1)
    except RuntimeError:
        return x


# These hang on sizes or on a state of torch's: recorded anew where they differ.
GUARDED: dict[str, Change] = {
    "unbind": lambda _, x: torch.stack(x.unbind(0)),
    "split": lambda _, x: torch.cat([part * (i + 1) for i, part in enumerate(x.split(8, 3))], 3),
    "chunk": lambda _, x: x * len(x.chunk(3, 0)),
    "text of a shape": lambda _, x: x * len(str(x.shape)) + len(f"{x.shape[-1]!r}"),
    "sizes in a set": lambda _, x: x * (2.0 if tuple(x.shape[-2:]) in {(16, 16), (8, 8)} else 3.0),
    "sizes as a key": lambda _, x: x * {16: 1.0, 24: 2.0, 8: 3.0}[x.shape[-1]],
    "inference mode": lambda _, x: 2 * x if torch.is_inference_mode_enabled() else x,
    "dtype of autocast": lambda _, x: x * (2.0 if torch.get_autocast_dtype("cpu") is torch.float16 else 1.0),
}
# These need no guard.
PLAIN: dict[str, Change] = {
    "autocast off": autocast_off,
    "autocast on": autocast_on,
    "nested no_grad": nested_no_grad,
    "sizes one by one": lambda _, x: x + torch.zeros(x.shape[0], 1, 1, 1) + torch.ones(x.shape[-1]),
    "named results": lambda _, x: x.max(1, keepdim=True).values + x,
    "dim": lambda _, x: x * x.dim(),
    "type": lambda _, x: x.type(torch.float64).type_as(x),
}


def image(size: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(size))


def emitted(model: nn.Module) -> fx.GraphModule:
    return apply_recipe(model, everywhere(), example_inputs=image(), total_steps=STEPS)


def run(model: nn.Module, x: Tensor, training: bool) -> checks.Run:
    random.seed(3)
    return checks.run(model, lambda net: net(x.clone()), training)


@pytest.mark.parametrize("name", {**OPAQUE, **GUARDED, **PLAIN})
def test_it_computes_what_the_model_does(name: str) -> None:
    torch.manual_seed(0)
    model = Net({**OPAQUE, **GUARDED, **PLAIN}[name])
    drawn = random.getstate()
    with checks.check_untouched(model):
        gm = emitted(model)
    assert random.getstate() == drawn
    for x in (image(), image(24, 3), image(8, 1)):
        for training in (False, True):
            checks.check_same(run(model, x, training), run(gm, x, training))
            for kind in (torch.bfloat16, torch.float16):
                with torch.autocast("cpu", dtype=kind):
                    checks.check_same(run(model, x, training), run(gm, x, training))
        with torch.inference_mode():
            checks.check_same(run(model, x, False), run(gm, x, False))


@pytest.mark.parametrize("name", {**OPAQUE, **GUARDED, **PLAIN})
def test_only_what_no_graph_can_say_is_out_of_reach(name: str) -> None:
    model = Net({**OPAQUE, **GUARDED, **PLAIN}[name])
    assert isinstance(record(model, (image(),), {}), Level)
    sites = find_sites(model, "conv_bn_act", example_inputs=image())
    assert "block.inner" in {site.id.partition("#")[0].rpartition(".")[0] for site in sites}
    assert any(site.module.startswith("block.act") for site in sites) is (name not in OPAQUE)


def test_a_failed_forward_leaves_gradients_on() -> None:
    gm = emitted(Net(nested_no_grad))
    handle = gm.block.act.register_forward_hook(lambda *_: torch.zeros(()).view(2))
    with pytest.raises(RuntimeError):
        gm(image())
    handle.remove()
    assert torch.is_grad_enabled()


def test_a_memo_of_constants_stays_in_the_graph() -> None:
    class Memo(nets.Base):
        def __init__(self) -> None:
            super().__init__()
            self.memo: dict[int, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            size = x.shape[-1]
            if size not in self.memo:
                self.memo[size] = torch.full((size,), float(size))
            return self.second(self.first(x)) + self.memo[size]

    model = Memo()
    gm = emitted(model)
    assert len(gm.surgery.regularizers) >= 6
    for size in (16, 24, 16):
        checks.check_outputs(model, gm, lambda net, size=size: net(image(size)))


def test_a_forward_on_the_instance_is_never_passed_over() -> None:
    model = nets.BranchOnSize()
    model.act.forward = lambda x: 2 * torch.relu(x)
    gm = emitted(model)
    for _ in range(STEPS):
        gm.surgery.step()
    assert set(gm.surgery.regularizers) <= checks.ran(gm, lambda net: net(image()), training=True)
    inner = Net(lambda _, x: x)
    inner.block.forward = inner.block.forward
    with pytest.raises(SurgeryError, match="set on the instance"):
        emitted(inner)


def test_the_flat_graph_keeps_what_hooks_do() -> None:
    model = Net(lambda _, x: x)
    model.block.register_forward_hook(lambda module, args, out: 2 * out)
    gm = emitted(model)
    checks.check_same(run(gm, image(), False), run(gm.surgery.flatten(), image(), False))


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_it_may_be_applied_anywhere(around: Callable[[], Any]) -> None:
    model, x = nets.BranchOnSize(), image()
    with around():
        gm = apply_recipe(model, everywhere(), example_inputs=x, total_steps=STEPS)
    checks.check_outputs(model, gm, lambda net: net(x))
    for _ in range(STEPS):
        gm.surgery.step()
    checks.check_noise(gm, lambda net: net(x))


class SkipsInTraining(nn.Module):
    """Calls its layer in eval only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()) is not None:
            return x
        return self.fc(x)


@pytest.mark.parametrize("edge", ["input", "output"])
def test_a_layer_that_the_root_does_not_call_in_training(edge: str) -> None:
    """The layer itself would carry the edit out, and nothing would tell that it never runs."""
    entry = {"name": "a", "pattern": "linear", "edge": edge, "insert": "dropout"}
    with pytest.raises(CaptureError, match=f"does not pass fc#0:linear.{edge}"):
        apply_recipe(SkipsInTraining(), {"version": 1, "entries": [entry]}, example_inputs=torch.zeros(2, 4))


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class SkipsABlock(nn.Module):
    """Calls its block, which owns the edit, in eval only; or each of two in one mode."""

    def __init__(self, other: bool) -> None:
        super().__init__()
        self.block = Unit()
        self.other = Unit() if other else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(x) if self.training else self.block(x)


@pytest.mark.parametrize("outer", [lambda net: net, nn.Sequential], ids=["root", "within"])
@pytest.mark.parametrize("other", [False, True])
def test_a_block_that_is_called_in_eval_alone(other: bool, outer: Callable[[nn.Module], nn.Module]) -> None:
    entry = {"name": "a", "pattern": "conv_bn_act", "insert": "dropout"}
    with pytest.raises(CaptureError, match=r"the forward of SkipsABlock does not pass .*block\.act#0"):
        apply_recipe(
            outer(SkipsABlock(other)), {"version": 1, "entries": [entry]}, example_inputs=torch.zeros(2, 4, 8, 8)
        )


def test_a_block_that_another_call_runs_in_training() -> None:
    class Twice(SkipsABlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.block(x))

    entry = {"name": "a", "pattern": "conv_bn_act", "insert": "dropout"}
    model = Twice(other=False)
    gm = apply_recipe(model, {"version": 1, "entries": [entry]}, example_inputs=torch.zeros(2, 4, 8, 8))
    with gm.surgery.active(p=0.5):
        x = torch.randn(2, 4, 8, 8)
        assert not torch.equal(gm.train()(x), gm(x))


class Sharing(nn.Module):
    """A block whose activation is not its own."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


@pytest.mark.parametrize("again", [False, True])
def test_a_layer_that_several_blocks_share(again: bool) -> None:
    """Each block is a site of its own, in all of its calls; what stands in for the layer is one."""
    act = nn.ReLU()
    blocks = [Sharing(act) for _ in range(3)]
    net = nn.Sequential(*blocks, *(blocks if again else ()))
    x = torch.randn(2, 4, 8, 8)
    entry = {"name": "e", "pattern": "conv_bn_act", "edge": "output", "insert": "dropout", "with": {"p": 0.5}}
    gm: Any = apply_recipe(net, {"version": 1, "name": "r", "entries": [entry]}, example_inputs=x)
    sites = [f"0.act#{call}:conv_bn_act.output" for call in range(3)]
    assert list(gm.surgery.regularizers) == sites
    called: list[str] = []
    for site, regularizer in gm.surgery.regularizers.items():
        regularizer.register_forward_hook(lambda *_, site=site: called.append(site))
    gm.train()(x)
    assert called == sites * (1 + again)
    swap = {**entry, "edge": "act_module", "insert": "standout"}
    gm = apply_recipe(net, {"version": 1, "name": "r", "entries": [swap]}, example_inputs=x)
    assert list(gm.surgery.regularizers) == ["0.act#0:conv_bn_act.act_module"]
