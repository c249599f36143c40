"""From saved weights through surgery and fine-tuning to weights again, timm's way and SMP's; no network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, fx, nn

from dropsurgery import apply_recipe, strip

STEPS = 3
CLASSES = 4
Loss = Callable[[Tensor], Tensor]


def classify(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])


def segment(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(logits[:, 0].numel()).view(logits[:, 0].shape) % logits.shape[1])


def train(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer | None = None) -> None:
    """A few steps on noise: what matters is that the weights move."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model(torch.randn(4, 3, 64, 64))).backward()
        optimizer.step()


def all_equal(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def saved_weights(name: str, file: Path) -> dict[str, Tensor]:
    """Train a timm model a little and save it, as a checkpoint from elsewhere would lie there."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    train(model, classify)
    torch.save(model.state_dict(), file)
    return model.state_dict()


def from_file(name: str, file: Path) -> nn.Module:
    torch.manual_seed(1)
    overlay = {"file": str(file), "num_classes": 7, "input_size": (3, 64, 64)}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=CLASSES)


def backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(("fc.", "head."))}


@pytest.fixture(params=[("resnet18", "dropblock_resnet_g34"), ("convnext_atto", "stochastic_depth_linear")])
def timm_case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, Path, dict[str, Tensor]]:
    name, recipe = request.param
    return name, recipe, tmp_path / "weights.pt", saved_weights(name, tmp_path / "weights.pt")


def test_timm_weights_from_a_file_survive_surgery(
    timm_case: tuple[str, str, Path, dict[str, Tensor]],
) -> None:
    name, recipe, file, saved = timm_case
    gm = apply_recipe(from_file(name, file), recipe, total_steps=STEPS)
    assert all_equal(backbone(gm.state_dict()).values(), backbone(saved).values())
    assert gm.get_classifier().out_features == CLASSES


def test_timm_layer_decay_sees_the_same_groups(timm_case: tuple[str, str, Path, dict[str, Tensor]]) -> None:
    name, recipe, file, _ = timm_case
    model = from_file(name, file)
    gm = apply_recipe(model, recipe, total_steps=STEPS)
    groups = [layer_decay(each).param_groups for each in (model, gm)]
    assert len({group["lr_scale"] for group in groups[0]}) > 2
    for one, other in zip(*groups, strict=True):
        assert all(a is b for a, b in zip(one.pop("params"), other.pop("params"), strict=True))
        assert one == other


def layer_decay(model: nn.Module) -> torch.optim.Optimizer:
    return create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)


def test_timm_fine_tuned_weights_go_back(timm_case: tuple[str, str, Path, dict[str, Tensor]]) -> None:
    name, recipe, file, saved = timm_case
    gm = apply_recipe(from_file(name, file), recipe, total_steps=STEPS)
    train(gm, classify, layer_decay(gm))
    assert gm.surgery.progress == 1.0
    assert not all_equal(backbone(gm.state_dict()).values(), backbone(saved).values())
    goes_back(gm, timm.create_model(name, num_classes=CLASSES))


def goes_back(gm: fx.GraphModule, plain: nn.Module) -> None:
    """The weights load into a plain model, which then computes the same; so does the stripped one."""
    plain.load_state_dict(gm.state_dict(), strict=True)
    stripped = strip(gm)
    assert type(stripped) is type(plain)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = gm.eval()(x)
        assert torch.equal(plain.eval()(x), expected)
        assert torch.equal(stripped.eval()(x), expected)


def smp_from_file(file: Path) -> nn.Module:
    """An SMP model with new decoder and head, its encoder's weights from a file."""
    torch.manual_seed(2)
    model = smp.Unet("resnet18", encoder_weights=None, classes=3)
    model.encoder.load_state_dict(torch.load(file, weights_only=True))
    return model


@pytest.mark.parametrize("recipe", ["dropblock_unet_double_conv", "dropblock_resnet_g34"])
def test_smp_encoder_from_a_file_is_fine_tuned_and_goes_back(recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = smp.Unet("resnet18", encoder_weights=None, classes=2)
    train(source, segment)
    torch.save(source.encoder.state_dict(), tmp_path / "encoder.pt")

    gm = apply_recipe(smp_from_file(tmp_path / "encoder.pt"), recipe, total_steps=STEPS)
    assert all_equal(gm.encoder.state_dict().values(), source.encoder.state_dict().values())
    train(gm, segment, encoder_slower(gm))
    assert gm.surgery.progress == 1.0
    assert not all_equal(gm.encoder.state_dict().values(), source.encoder.state_dict().values())
    goes_back(gm, smp.Unet("resnet18", encoder_weights=None, classes=3))


def encoder_slower(model: nn.Module) -> torch.optim.Optimizer:
    rest = [*model.decoder.parameters(), *model.segmentation_head.parameters()]
    return torch.optim.AdamW([{"params": model.encoder.parameters(), "lr": 1e-4}, {"params": rest, "lr": 1e-3}])
