"""Every check of the laws, fed with something wrong that it is there to find."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dropsurgery import SurgeryError
from tests.laws import checks
from tests.laws.models import convert, fresh, images, loud

NAME = "vit"


def call(model: nn.Module) -> Any:
    return model(images(NAME))


def made() -> tuple[nn.Module, fx.GraphModule]:
    model = fresh(NAME)
    return model, convert(NAME, model)


def wrapping(gm: Any, change: Callable[[Tensor], Tensor]) -> fx.GraphModule:
    """Let something happen to the output of a model."""
    own = type(gm).forward
    type(gm).forward = lambda self, x: change(own(self, x))
    return gm


def fails(check: Callable[..., Any], *args: Any, match: str | None = None) -> None:
    with pytest.raises(AssertionError, match=match):
        check(*args)


def test_all_checks_hold_on_what_is_right() -> None:
    model, gm = made()
    checks.check_outputs(model, gm, call)
    checks.check_state(model, gm)
    checks.check_identity(model, gm)
    checks.check_hooks(model, gm, call)
    checks.check_noise(loud(NAME), call)
    checks.check_way(loud(NAME), "forward_features", lambda m: m.forward_features(images(NAME)))
    checks.check_copy(gm, copy.deepcopy(gm), call)


def test_other_outputs() -> None:
    model, gm = made()
    fails(checks.check_outputs, model, wrapping(gm, lambda out: out + 1e-3), call, match="other outputs")


def test_other_outputs_in_training_only() -> None:
    model, gm = made()
    wrapping(gm, lambda out: out * 1.001 if gm.training else out)
    fails(checks.check_outputs, model, gm, call, match="other outputs")


def test_another_dtype() -> None:
    model, gm = made()
    fails(checks.check_outputs, model, wrapping(gm, lambda out: out.double()), call, match="other outputs")


def test_numbers_that_hide_everything() -> None:
    model, gm = made()
    with torch.no_grad():
        model.head.weight.fill_(torch.inf)
    fails(checks.check_outputs, model, gm, call, match="hide")


def test_random_numbers_drawn() -> None:
    model, gm = made()
    wrapping(gm, lambda out: out + 0 * torch.rand(()))
    fails(checks.check_outputs, model, gm, call, match="random")


def test_a_buffer_updated_twice() -> None:
    model = fresh("resnet")
    gm = copy.deepcopy(model)
    gm.bn1.momentum = 0.2
    x = images("resnet")
    fails(checks.check_outputs, model, gm, lambda m: m(x), match="buffers were updated")


def test_other_gradients() -> None:
    gm = made()[1]
    gm.head.weight.register_hook(lambda gradient: gradient * 2)
    fails(checks.check_same, checks.run(fresh(NAME), call, True), checks.run(gm, call, True), match="gradients")


def test_an_error_in_other_words() -> None:
    model, gm = made()
    wrong = images(NAME, 80)
    checks.check_error(model, gm, lambda m: m(wrong))
    fails(checks.check_error, model, gm, call, match="not refused")
    type(gm).forward = lambda self, x: int("x")
    fails(checks.check_error, model, gm, lambda m: m(wrong), match="refused otherwise")


def test_silent_training_and_noisy_eval() -> None:
    fails(checks.check_noise, made()[1], call, match="no noise in training")
    gm = loud(NAME)
    for regularizer in gm.surgery.regularizers.values():
        regularizer.forward = lambda x: x
    fails(checks.check_noise, gm, call, match="no noise when forced")
    noisy = wrapping(loud(NAME), lambda out: out + torch.rand(()))
    fails(checks.check_noise, noisy, call, match="noise in eval")


def test_renamed_and_reordered_state() -> None:
    model, gm = made()
    gm._buffers = {"_tensor_constant0": torch.zeros(1)}
    fails(checks.check_state, model, gm)
    model, gm = made()
    gm.norm.weight = nn.Parameter(gm.norm.weight.detach().clone())
    model.norm._parameters = dict(model.norm._parameters, weight=nn.Parameter(torch.ones(192)))
    fails(checks.check_state, model, gm, match="other parameters")
    model, gm = made()
    gm._modules["head"] = gm._modules.pop("head")
    gm._modules["norm"] = gm._modules.pop("norm")
    fails(checks.check_state, model, gm)


def test_another_class_tree_or_attribute() -> None:
    model, gm = made()
    fails(checks.check_identity, model, model, match="no GraphModule")
    gm.extra = nn.Identity()
    fails(checks.check_identity, model, gm, match="another tree")
    model, gm = made()
    gm.blocks[0].norm1.eps = 1.0
    fails(checks.check_identity, model, gm, match=r"blocks\.0\.norm1\.eps")
    model, gm = made()
    model.blocks[1].norm2 = nn.Identity()
    fails(checks.check_identity, model, gm, match="another class")


@pytest.mark.parametrize(
    "touch",
    [
        lambda m: m.head.weight.data.add_(1),
        lambda m: m.blocks[0].eval(),
        lambda m: m.register_forward_hook(print),
        lambda m: setattr(m.blocks[0], "forward", print),
        lambda m: m.head.weight.requires_grad_(False),
        lambda m: m._modules.update(extra=nn.Identity()),
        lambda m: setattr(m, "head", copy.deepcopy(m.head)),
        lambda m: torch.rand(1),
        lambda m: torch.set_default_dtype(torch.float64),
    ],
)
def test_something_touched(touch: Callable[[nn.Module], Any]) -> None:
    model = fresh(NAME)
    try:
        with pytest.raises(AssertionError, match="changed"), checks.check_untouched(model):
            touch(model)
    finally:
        torch.set_default_dtype(torch.float32)


def test_hooks_that_do_not_fire() -> None:
    model, gm = made()
    gm.blocks[1].forward = lambda x, **_: x
    fails(checks.check_hooks, model, gm, call)


def test_a_way_around_the_sites() -> None:
    gm = loud(NAME)
    for block in gm.blocks:
        type(block).forward = type(block)._own_class.forward
    fails(checks.check_way, gm, "forward", call, match="leaves out")

    def refuse(model: nn.Module) -> None:
        if model.training:
            raise SurgeryError("no")

    fails(checks.check_way, gm, "forward_features", refuse, match="without a word")


def test_copies_that_share_or_forget() -> None:
    gm = loud(NAME)
    fails(checks.check_copy, gm, gm, call, match="shared tensors")
    fails(checks.check_copy, gm, loud(NAME, steps=3), call, match="another step")
    other = copy.deepcopy(gm)
    with torch.no_grad():
        other.head.weight.add_(1)
    fails(checks.check_copy, gm, other, call, match="other outputs")
