"""The laws on small nets, each of which does one thing that a recording could get wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dropsurgery import SurgeryError, apply_recipe
from tests.laws import checks, nets
from tests.laws.models import STEPS, everywhere
from tests.zoo import ZOO

NETS: dict[str, Any] = {
    name: getattr(nets, name)
    for name in (
        "BranchOnSize",
        "SkipOnSize",
        "SizeInArithmetic",
        "OtherOutputsInTraining",
        "Constants",
        "InPlace",
        "Counts",
        "Sets",
        "ClassFlag",
        "ChildFlag",
        "Tied",
    )
} | {
    f"Checkpointed-{reentrant}": lambda reentrant=reentrant: nets.Checkpointed(reentrant) for reentrant in (True, False)
}


def image(size: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(size))


def emitted(model: nn.Module, inputs: Any = None, *, steps: int = 0) -> fx.GraphModule:
    gm = apply_recipe(model, everywhere(), example_inputs=image() if inputs is None else inputs, total_steps=STEPS)
    for _ in range(steps):
        gm.surgery.step()
    return gm


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]()


def calling(size: int, batch: int = 2) -> checks.Call:
    return lambda model: model(image(size, batch))


@pytest.mark.parametrize("name", NETS)
def test_equal_at_every_size_in_both_modes(name: str) -> None:
    model = build(name)
    with checks.check_untouched(model):
        gm = emitted(model)
    for other in (gm, copy.deepcopy(gm), checks.saved(gm)):
        for size in (16, 8, 24, 40):
            checks.check_outputs(model, other, calling(size, 3))
            checks.check_same(*(checks.run(net, calling(size, 1), False) for net in (model, other)))
    checks.check_state(model, gm)
    checks.check_hooks(model, gm, calling(16))


@pytest.mark.parametrize("name", NETS)
def test_noise_and_the_flat_graph(name: str) -> None:
    gm = emitted(build(name), steps=STEPS)
    assert len(gm.surgery.regularizers) >= 6
    flat = gm.surgery.flatten()
    for training in (False, True):
        tree = checks.run(gm, calling(16), training)
        with checks.restored(gm):
            flat.train(training)
            torch.manual_seed(3)
            assert checks.equal(tree.outputs, flat(image()))
    with torch.no_grad():
        one, other = (checks.run(gm, calling(16), True, seed).outputs for seed in (1, 2))
    assert not checks.equal(one, other)


@pytest.mark.parametrize("name", ZOO)
def test_the_topologies_of_the_zoo(name: str) -> None:
    torch.manual_seed(0)
    model, (x,) = ZOO[name].build(), ZOO[name].example()
    gm = emitted(model, x)
    checks.check_outputs(model, gm, lambda net: net(x.clone()))
    checks.check_state(model, gm)
    checks.check_identity(model, gm)
    checks.check_hooks(model, gm, lambda net: net(x.clone()))


def test_branches_without_a_site_are_refused_in_training_only() -> None:
    model = build("SkipOnSize")
    gm = emitted(model, steps=STEPS)
    with pytest.raises(SurgeryError, match=r"SkipOnSize does not pass .* on this input"):
        gm.train()(image(8))
    checks.check_same(checks.run(model, calling(8), False), checks.run(gm, calling(8), False))


def test_the_models_own_error() -> None:
    model = nets.Refuses()
    gm = emitted(model)
    checks.check_outputs(model, gm, calling(24))
    checks.check_error(model, gm, calling(9))


@pytest.mark.parametrize("example", [image(), {"x": image(), "mask": torch.ones(2, 1, 16, 16), "scale": 2.0}])
def test_optional_arguments_and_structured_results(example: Any) -> None:
    model = nets.Structured()
    gm = emitted(model, example)
    x, mask = image(), torch.rand(2, 1, 16, 16)
    for call in (
        lambda net: net(x),
        lambda net: net(x, mask),
        lambda net: net(mask=mask, x=x),
        lambda net: net(x, scale=3.0),
        lambda net: net(x, mask, flip=True),
        lambda net: net(x),
    ):
        checks.check_outputs(model, gm, call)
        assert type(call(gm)) is nets.Result
    flat = gm.surgery.flatten()
    assert type(flat(**example) if isinstance(example, dict) else flat(example)) is nets.Result


def test_lists_of_any_length() -> None:
    model = nets.ListInput()
    gm = emitted(model, ([image(), image()],))
    for length in (2, 1, 3):
        checks.check_outputs(model, gm, lambda net, length=length: net([image(16 + i % 1, 2) for i in range(length)]))


def test_an_input_changed_in_place() -> None:
    model = nets.InPlace()
    gm = emitted(model)
    one, other = image(), image()
    model.eval()(one)
    gm.eval()(other)
    assert torch.equal(one, other)
    assert not torch.equal(one, image())


class Negation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


CHANGES: dict[str, Any] = {
    "flag of the class": lambda net: setattr(net.body, "negate", True),
    "attribute of a child": lambda net: setattr(net.body, "power", 3),
    "list of its own": lambda net: net.repeats.append(3.0),
    "another layer": lambda net: setattr(net.body, "conv1", nn.Conv2d(3, 4, 3, padding=1, bias=False)),
    "another kind of layer": lambda net: setattr(net.body, "act", Negation()),
    "append": lambda net: net.tail.append(Negation()),
    "insert": lambda net: net.tail.insert(0, Negation()),
    "delete": lambda net: net.tail.__delitem__(2),
    "set": lambda net: net.tail.__setitem__(2, Negation()),
    "forward of its own": lambda net: setattr(net.body, "forward", lambda x: nets.ClassFlag.forward(net.body, 2 * x)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("through", ["itself", "copy", "file"])
def test_changes_after_surgery_take_effect(change: str, through: str) -> None:
    """What a user sets on the emitted model does what it would have done on the plain one, and nothing to that."""
    model = build("ChildFlag")
    gm = {"itself": lambda m: m, "copy": copy.deepcopy, "file": checks.saved}[through](emitted(model))
    plain = copy.deepcopy(model)
    call = calling(16)
    before = checks.run(model, call, False)
    for net in (plain, gm):
        torch.manual_seed(1)
        CHANGES[change](net)
    after = checks.run(plain, call, False)
    assert not checks.equal(before.outputs, after.outputs)
    checks.check_outputs(plain, gm, call)
    checks.check_same(before, checks.run(model, call, False))


def test_tied_weights_stay_tied() -> None:
    gm = emitted(nets.Tied())
    for other in (gm, copy.deepcopy(gm), checks.saved(gm)):
        assert other.one.weight is other.two.weight
        assert other.norm is other.again


def test_calls_of_one_module_are_kept_apart() -> None:
    """The block's one ReLU is called after the first norm, where the site is, and after the join."""
    model, (x,) = ZOO["shared_block"].build(), ZOO["shared_block"].example()
    where = {"module": "block*"}
    entry = {"name": "first", "pattern": "conv_bn_act", "insert": "dropout", "with": {"p": 1.0}, "where": where}
    gm = apply_recipe(model, {"version": 1, "name": "one", "entries": [entry]}, example_inputs=x)
    (regularizer,) = gm.surgery.regularizers.values()
    seen: list[Tensor] = []
    regularizer.register_forward_hook(lambda module, args, out: seen.append(out))
    features: list[Tensor] = []
    gm.block.register_forward_hook(lambda module, args, out: features.append(out))
    gm.train()(x)
    assert len(seen) == len(features) == 3
    assert not any(out.any() for out in seen)
    assert all(out.any() for out in features)
