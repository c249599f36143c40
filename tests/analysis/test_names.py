"""Names of models: lists by wildcards, families, and what can be built and called."""

from __future__ import annotations

from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision

from dropsurgery.capture import capture
from dropsurgery.errors import SurgeryError
from dropsurgery.models import example_inputs, family, make_model, model_names


def test_lists() -> None:
    encoders = smp.encoders.get_encoder_names()
    assert model_names(["*"]) == timm.list_models()
    assert len(model_names(["smp:*:*"])) == 12 * len(encoders)
    assert model_names(["torchvision:*"]) == [f"torchvision:{name}" for name in torchvision.models.list_models()]
    assert model_names(["smp:Unet:tu-resnet1?"]) == ["smp:Unet:tu-resnet18"]
    given = ["smp:FPN:tu-resnet18", "resnet18.a1_in1k", "vgg11", "vgg11*"]
    assert model_names(given) == ["smp:FPN:tu-resnet18", "resnet18.a1_in1k", "vgg11", "vgg11_bn"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resnt18", "did you mean 'resnet18'"),
        ("resnt*", "no model name fits 'resnt*'"),
        ("torchvision:resnt18", "did you mean 'resnet18'"),
        ("smp:Unet:resnt18", "did you mean 'resnet18'"),
        ("smp:Unett:*", "no model name fits"),
    ],
)
def test_what_is_no_name(name: str, told: str) -> None:
    with pytest.raises(SurgeryError) as error:
        model_names([name])
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("resnet18.a1_in1k", "resnet"),
        ("vit_tiny_patch16_224", "vision_transformer"),
        ("smp:FPN:resnet18", "smp.FPN"),
        ("torchvision:retinanet_resnet50_fpn", "torchvision.detection.retinanet"),
    ],
)
def test_families(name: str, home: str) -> None:
    assert family(name) == home


def shapes(tree: Any) -> Any:
    return list(tree.shape) if isinstance(tree, torch.Tensor) else list(map(shapes, tree))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("squeezenet1_1", [2, 3, 224, 224]),
        ("inception_v3", [2, 3, 299, 299]),
        ("lraspp_mobilenet_v3_large", [2, 3, 224, 224]),
        ("r3d_18", [2, 3, 16, 224, 224]),
        ("raft_small", [[2, 3, 128, 128], [2, 3, 128, 128]]),
        ("retinanet_resnet50_fpn", [[[3, 320, 320], [3, 320, 320]]]),
    ],
)
def test_torchvision_models_have_examples(name: str, expected: Any) -> None:
    inputs = example_inputs(f"torchvision:{name}")
    assert shapes(inputs) == expected
    if name in ("squeezenet1_1", "r3d_18"):
        assert capture(make_model(f"torchvision:{name}"), inputs).view.graph.nodes


def test_others_say_what_they_take() -> None:
    assert example_inputs("resnet18") is None and example_inputs("smp:Unet:resnet18") is None


def test_a_constructor_that_asks_for_values_is_built_too() -> None:
    model = make_model("smp:Unet:mit_b0")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    with pytest.raises(SurgeryError, match="Only Timm encoders are supported"):
        make_model("smp:DPT:resnet18")
