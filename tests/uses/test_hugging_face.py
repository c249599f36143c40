"""transformers' vision models from small random configs: outputs that are dicts, tuples and objects in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from dropsurgery.capture import capture
from tests.laws import checks
from tests.uses.cases import check_use, check_ways, converted, images, made

CONV: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 2, 1, 1]}
PLAIN: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
SEGFORMER: dict[str, Any] = {
    "hidden_sizes": [8, 16, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}
BACKBONE: dict[str, Any] = {**CONV, "layer_type": "basic", "out_features": ["stage1", "stage2", "stage3", "stage4"]}


def _made(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet": _made("ResNetForImageClassification", "ResNetConfig", layer_type="basic", **CONV),
    "resnet bottleneck": _made("ResNetModel", "ResNetConfig", layer_type="bottleneck", **CONV),
    "resnet backbone": _made("ResNetBackbone", "ResNetConfig", **BACKBONE),
    "regnet": _made("RegNetForImageClassification", "RegNetConfig", groups_width=8, **CONV),
    "convnext": _made(
        "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 2, 1]
    ),
    "mobilenet": _made(
        "MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.35, classifier_dropout_prob=0.0
    ),
    "vit": _made("ViTForImageClassification", "ViTConfig", intermediate_size=32, image_size=64, **PLAIN),
    "dinov2": _made("Dinov2ForImageClassification", "Dinov2Config", image_size=64, **PLAIN),
    "swin": _made(
        "SwinForImageClassification",
        "SwinConfig",
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        image_size=64,
        window_size=4,
        drop_path_rate=0.0,
    ),
    "segformer": _made("SegformerForSemanticSegmentation", "SegformerConfig", **SEGFORMER),
    "upernet": lambda: transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=transformers.ResNetConfig(**BACKBONE),
            hidden_size=16,
            auxiliary_in_channels=16,
            auxiliary_channels=8,
        )
    ),
}
SITES = {"resnet": "resnet.encoder.stages.1.layers.0", "convnext": "convnext.encoder.stages.2.layers.1"}
"""A block that has to be found."""


def example() -> dict[str, Tensor]:
    return {"pixel_values": images()}


def named(model: nn.Module) -> Any:
    return model(**example())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_from_a_small_config(name: str) -> None:
    model = made(MODELS[name])
    # Segformer's hooks, which transformers sets at its first call, are local functions: no file takes them.
    gm = check_use(model, example(), named, copies=name != "segformer")
    for call in (named, lambda net: net(images()), lambda net: net(**example(), return_dict=False)):
        checks.check_same(checks.run(model, call, False), checks.run(gm, call, False))
        assert type(call(gm)) is type(call(model))
    assert list(named(gm)) == list(named(model))
    if name in SITES:
        assert [site for site in gm.surgery.regularizers if site.startswith(SITES[name])]


@pytest.mark.parametrize("name", ["resnet", "convnext", "vit", "segformer"])
def test_hidden_states(name: str) -> None:
    """What hooks of the library's own collect on the way is what they collect on the plain model."""
    model = made(MODELS[name])
    gm = converted(model, example())
    for call in (lambda net: net(**example(), output_hidden_states=True), named):
        checks.check_outputs(model, gm, call)
    assert len(gm(**example(), output_hidden_states=True).hidden_states) > 2


@pytest.mark.parametrize("name", ["resnet", "segformer"])
def test_a_model_that_ran_before_is_captured_alike(name: str) -> None:
    fresh, used = made(MODELS[name]), made(MODELS[name])
    used(**example(), output_hidden_states=True)
    one, other = converted(fresh, example()), converted(used.train(), example())
    assert list(one.surgery.regularizers) == list(other.surgery.regularizers)
    checks.check_outputs(used, other, named)


@pytest.mark.parametrize("name", ["resnet", "segformer"])
def test_a_loss_among_the_outputs(name: str) -> None:
    model = made(MODELS[name])
    shape = (2, 64, 64) if name == "segformer" else (2,)
    call = lambda net: net(**example(), labels=torch.ones(shape, dtype=torch.long))  # noqa: E731
    gm = converted(model, example())
    checks.check_outputs(model, gm, call)
    assert call(gm).loss.requires_grad


@pytest.mark.parametrize("name", ["resnet", "resnet bottleneck", "resnet backbone", "convnext", "vit"])
def test_objects_between_modules_are_no_hindrance(name: str) -> None:
    assert not capture(made(MODELS[name]), example()).view.opaque


def test_checkpointing_and_files(tmp_path: Any) -> None:
    model = made(MODELS["vit"])
    gm = converted(model, example())
    gm.gradient_checkpointing_enable()
    checks.check_outputs(model, gm, named)
    gm.gradient_checkpointing_disable()
    gm.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert checks.equal(loaded.state_dict(), model.state_dict())
    check_ways(model, gm, {"vit": lambda net: net.vit(images()).last_hidden_state})
