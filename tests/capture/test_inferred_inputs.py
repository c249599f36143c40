"""What a model takes, read off the model itself where its user does not say it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from dropsurgery import CaptureError
from dropsurgery.capture import capture
from dropsurgery.models import make_model


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **options)


INFERRED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "timm's config": (timm_model("resnet18"), (2, 3, 224, 224)),
    "other channels than the config's": (timm_model("resnet18", in_chans=1), (2, 1, 224, 224)),
    "another size than the config's": (timm_model("vit_tiny_patch16_224", img_size=64, depth=1), (2, 3, 64, 64)),
    "pixels rearranged before the first layer": (timm_model("csatv2"), (2, 3, 512, 512)),
    "a segmentation net": (lambda: smp.Unet("resnet18", encoder_weights=None), (2, 3, 224, 224)),
    "a segmentation net of other channels": (
        lambda: smp.Unet("resnet18", encoder_weights=None, in_channels=5),
        (2, 5, 224, 224),
    ),
    "an encoder that takes one size alone": (
        lambda: make_model("smp:FPN:tu-swinv2_tiny_window8_256"),
        (2, 3, 256, 256),
    ),
}


@pytest.mark.parametrize("case", INFERRED)
def test_inputs_are_inferred(case: str) -> None:
    build, shape = INFERRED[case]
    with torch.device("meta"):
        model = build()
    assert capture(model).inputs[0][0].shape == shape


def test_other_models_are_asked_for() -> None:
    with pytest.raises(CaptureError, match="Linear does not say what it takes: give example_inputs"):
        capture(nn.Linear(2, 2))
