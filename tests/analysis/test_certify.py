"""A certificate is sound for what is right, and notices each way in which surgery could go wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dropsurgery import api
from dropsurgery.analysis import certify as certifying
from dropsurgery.analysis.certify import FAILED, OPAQUE, REFUSED, TRACES, UNBUILT, VALUES, WHOLE, Certificate, certify
from dropsurgery.analysis.laws import inserted
from dropsurgery.errors import SurgeryError
from dropsurgery.recipe import load_recipe


class Opaque(nn.Module):
    """Its forward sets an attribute from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.body(x)
        return self.seen


class AsksValues(nn.Sequential):
    """Its training forward asks for a number."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x * x.detach().mean().item() if self.training else x


def conv(cls: type[nn.Sequential] = nn.Sequential) -> nn.Module:
    return cls(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def broken() -> nn.Module:
    raise SurgeryError("model 'broken' cannot be built: ValueError: no")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "conv": conv,
    "opaque": Opaque,
    "asks_values": lambda: conv(AsksValues),
    "broken": broken,
    "stubborn": lambda: nn.DataParallel(nn.Linear(2, 2)),
}


@pytest.fixture(autouse=True)
def _models(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, device: str = "meta") -> nn.Module:
        torch.manual_seed(0)
        return MODELS[name]().to(device)

    def example(name: str) -> Tensor:
        return torch.empty(2, 3, 64, 64, device="meta")

    monkeypatch.setattr(certifying, "make_model", make)
    monkeypatch.setattr(certifying, "example_inputs", example)
    monkeypatch.setattr(certifying, "family", lambda name: "tests")


# -- what is right -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [TRACES, VALUES])
def test_a_sound_model(kind: str) -> None:
    made = certify("conv", kind=kind)
    assert made.sound and (made.status, made.compared, made.broken, made.reason) == (WHOLE, kind, [], "")
    assert made.sites["conv_bn_act"] == 6 and made.edits == 4
    assert (made.family, made.cls, made.parameters) == ("tests", "Sequential", 3 * 4 * 9 + 4 + 8)
    assert set(made.seconds) == {"build", "capture", "sites", "surgery", "checks"} and made.memory > 0
    assert Certificate(**made.to_json()) == made


class Tiled(nn.Sequential):
    """Takes images whose side is one of some tiles."""

    side = 8

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] % self.side == 0
        return super().forward(x)


class Fixed(Tiled):
    side = 600


@pytest.mark.parametrize(("cls", "note"), [(Tiled, "[2, 3, 200, 200]"), (Fixed, "")])
def test_numbers_are_compared_on_smaller_images(
    cls: type[nn.Sequential], note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certifying, "example_inputs", lambda name: torch.empty(2, 3, 600, 600, device="meta"))
    monkeypatch.setitem(MODELS, "large", lambda: conv(cls))
    monkeypatch.setattr(certifying.values, "same_values", lambda model, gm, inputs: iter([str(inputs[0][0].shape)]))
    made = certify("large", kind=VALUES)
    assert note in "".join(made.notes) and bool(made.notes) == bool(note)
    assert made.broken == [f"torch.Size({note or '[2, 3, 600, 600]'})"]
    assert not certify("large").notes


def test_opaque_parts_are_told() -> None:
    made = certify("opaque")
    assert made.sound and made.status == OPAQUE
    ((part),) = made.opaque
    assert (part["path"], part["class"]) == ("", "Opaque") and "seen" in part["reason"]


def test_a_forward_that_asks_values_is_compared_by_them() -> None:
    made = certify("asks_values")
    assert made.sound and made.compared == VALUES and "compared by values" in made.notes[0]
    assert "values" in made.seconds


def test_what_cannot_be_built() -> None:
    made = certify("broken")
    assert made.sound and (made.status, made.broken) == (UNBUILT, []) and "ValueError: no" in made.reason


def test_what_is_refused() -> None:
    made = certify("stubborn")
    assert not made.sound and made.status == REFUSED and "wrapped for parallel training" in made.reason


def test_a_recipe() -> None:
    recipe = {"version": 1, "entries": [{"pattern": "conv_bn_act", "insert": "dropblock", "with": {"p": 0.1}}]}
    made = certify("conv", load_recipe({**recipe, "name": "blocks"}))
    assert made.sound and made.edits == 1 and made.recipe == "blocks"


def test_a_recipe_that_does_not_fit_breaks_nothing() -> None:
    entry = {"pattern": "residual_add", "insert": "dropout", "with": {"p": 0.1}}
    made = certify("conv", load_recipe({"version": 1, "name": "joins", "entries": [entry]}))
    assert made.sound and made.status == WHOLE and "expected >=1 sites, hit 0" in made.misfit


# -- what is wrong: surgery that is sabotaged -------------------------------------------------------------------------
def one_operator_more(gm: Any) -> None:
    gm[2].register_forward_hook(lambda module, args, result: result * 0.5)


def one_operator_more_in_training(gm: Any) -> None:
    gm[2].register_forward_hook(lambda module, args, result: result * 0.5 if module.training else None)


def other_parameter_order(gm: Any) -> None:
    conv = gm[0]
    conv.__dict__["_parameters"] = dict(reversed(conv._parameters.items()))


def other_parameters(gm: Any) -> None:
    conv = gm[0]
    conv.__dict__["_parameters"] = {k: nn.Parameter(p.detach().clone()) for k, p in conv._parameters.items()}


def another_key(gm: Any) -> None:
    gm[1].register_buffer("more", torch.ones(1))


def another_class(gm: Any) -> None:
    gm[2].__class__ = nn.GELU


def another_attribute(gm: Any) -> None:
    gm[1].eps = 0.1


def an_error(gm: Any) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("sabotage")

    gm[2].register_forward_hook(fail)


def no_call(gm: Any) -> None:
    for module in gm.modules():
        if "_owner" in module.__dict__:
            type(module).forward = type(module)._own_class.forward


def a_regularizer_that_draws(gm: Any) -> None:
    for regularizer in inserted(gm).values():
        regularizer.set_rate("p", 0.5)


SABOTAGE: dict[Callable[[Any], None], str] = {
    one_operator_more: "in eval",
    one_operator_more_in_training: "in training",
    other_parameter_order: "other state_dict keys",
    other_parameters: "not the model's own tensors",
    another_key: "surgery changed 1",
    another_class: "expected the class ReLU, got GELU",
    another_attribute: "1: the attribute eps differs",
    an_error: "RuntimeError: sabotage",
    no_call: "that no training forward calls",
    a_regularizer_that_draws: "in training",
}


@pytest.mark.parametrize("sabotage", SABOTAGE, ids=lambda function: function.__name__)
@pytest.mark.parametrize("kind", [TRACES, VALUES])
def test_sabotage_is_noticed(sabotage: Callable[[Any], None], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = api.operate

    def wrong(*args: Any) -> fx.GraphModule:
        gm = right(*args)
        sabotage(gm)
        return gm

    monkeypatch.setattr(api, "operate", wrong)
    made = certify("conv", kind=kind)
    assert not made.sound and made.status == WHOLE
    if kind == TRACES:
        assert SABOTAGE[sabotage] in "\n".join(made.broken)


def test_a_result_that_is_thrown_away_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = api.operate

    def wrong(*args: Any) -> fx.GraphModule:
        gm = right(*args)
        for regularizer in inserted(gm).values():
            monkeypatch.setattr(type(regularizer), "__call__", lambda self, x: (nn.Module.__call__(self, x), x)[1])
        return gm

    monkeypatch.setattr(api, "operate", wrong)
    assert "whose result nothing uses" in "\n".join(certify("conv").broken)


def test_a_model_that_is_changed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = api.operate

    def wrong(captured: Any, planned: Any) -> fx.GraphModule:
        captured.model[1].momentum = 0.5
        torch.rand(1)
        return right(captured, planned)

    monkeypatch.setattr(api, "operate", wrong)
    assert set(certify("conv").broken) == {"surgery changed 1", "surgery changed the random state"}


def test_a_strip_that_leaves_something_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certifying, "strip", lambda gm: gm)
    assert "strip: other modules or classes than the model's" in certify("conv").broken


@pytest.mark.parametrize(
    ("stage", "status"),
    [("capture", REFUSED), ("sites_by_edge", REFUSED), ("plan", REFUSED), ("everywhere", REFUSED), ("strip", FAILED)],
)
def test_an_error_in_a_stage_is_told(stage: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(certifying, stage, fail)
    made = certify("conv")
    assert not made.sound and made.status == status and "KeyError: 'a bug'" in made.reason
