"""torchvision's detectors, segmenters and classifiers: data-dependent forwards, dicts, outputs that differ by mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tests.laws import checks
from tests.laws.models import STEPS
from tests.uses.cases import calling, check_part, check_use, check_ways, converted, images, made

zoo = torchvision.models
SMALL: dict[str, Any] = {
    "weights": None,
    "weights_backbone": None,
    "min_size": 64,
    "max_size": 96,
    "num_classes": 3,
    "trainable_backbone_layers": 5,
}
DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "retinanet": lambda: zoo.detection.retinanet_resnet50_fpn(**SMALL),
    "fasterrcnn": lambda: zoo.detection.fasterrcnn_mobilenet_v3_large_fpn(
        **{**SMALL, "trainable_backbone_layers": 6}, rpn_pre_nms_top_n_test=60, rpn_pre_nms_top_n_train=60
    ),
}
NONE: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 3}
MAPS: dict[str, Callable[[], nn.Module]] = {
    "deeplabv3": lambda: zoo.segmentation.deeplabv3_resnet50(aux_loss=True, **NONE),
    "lraspp": lambda: zoo.segmentation.lraspp_mobilenet_v3_large(**NONE),
}
CLASSIFIERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (lambda: zoo.resnet18(num_classes=3), 64),
    "densenet": (lambda: zoo.DenseNet(8, (2, 2), 16, num_classes=3), 64),
    "shufflenet": (lambda: zoo.shufflenet_v2_x0_5(num_classes=3), 64),
    "swin": (lambda: zoo.SwinTransformer([4, 4], 24, [1, 1], [2, 4], [4, 4], stochastic_depth_prob=0.2), 64),
    "googlenet": (lambda: zoo.GoogLeNet(num_classes=3, init_weights=False), 64),
}


def photos(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.rand(3, *size, generator=torch.Generator().manual_seed(size[1])) for size in sizes]


def targets(count: int) -> list[dict[str, Tensor]]:
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [10.0, 20.0, 50.0, 60.0]])
    return [{"boxes": boxes.clone(), "labels": torch.tensor([1, 2])} for _ in range(count)]


def detecting(*sizes: tuple[int, int]) -> checks.Call:
    """Losses in training, boxes in eval."""

    def call(model: nn.Module) -> Any:
        return model(photos(*sizes), targets(len(sizes))) if model.training else model(photos(*sizes))

    return call


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector(name: str) -> None:
    """The root is Python that looks at the data; backbone, pyramid and heads are operated on inside."""
    model = made(DETECTORS[name])
    example = (photos((64, 64), (64, 80)),)
    with checks.check_untouched(model):
        gm = converted(model, example)
    sizes = ((64, 64), (64, 80)), ((80, 64), (48, 64), (64, 64))
    for each in sizes:
        checks.check_outputs(model, gm, detecting(*each))
    call = detecting(*sizes[0])
    checks.check_state(model, gm)
    checks.check_identity(model, gm)
    checks.check_hooks(model, gm, call)
    checks.check_copy(gm, checks.saved(gm), call)
    for _ in range(STEPS):
        gm.surgery.step()
    one, other = (checks.run(gm, call, True, seed).outputs for seed in (1, 2))
    assert all(bool(torch.isfinite(loss)) for loss in one) and not checks.equal(one, other)
    x = images()
    check_ways(model, gm, {"backbone": lambda net: net.backbone(x), "body": lambda net: net.backbone.body(x)})
    checks.check_noise(gm, lambda net: net.backbone(x))


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detectors_backbone_has_the_sites_that_it_has_alone(name: str) -> None:
    model = made(DETECTORS[name])
    check_part(model, (photos((64, 64), (64, 64)),), "backbone", images())


@pytest.mark.parametrize("name", MAPS)
def test_maps_in_a_dict(name: str) -> None:
    model = made(MAPS[name])
    gm = check_use(model, images(), calling(images()))
    for training in (True, False):
        assert list(gm.train(training)(images())) == list(model.train(training)(images()))
    check_part(model, images(), "backbone", images())
    check_ways(model, gm, {"backbone": lambda net: net.backbone(images())})


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier(name: str) -> None:
    """GoogLeNet gives auxiliary logits in training, in a named tuple, and plain logits in eval."""
    build, size = CLASSIFIERS[name]
    model = made(build)
    x = images(size)
    gm = check_use(model, x, calling(x), copies=False)
    for training in (True, False):
        assert type(gm.train(training)(x)) is type(model.train(training)(x))
