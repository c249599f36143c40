"""The real models on which the laws are held, and the recipes: one of the bundled kind and one that is everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, fx, nn

from dropsurgery import apply_recipe
from tests.zoo import ZOO

STEPS = 10
EDGES = {
    "conv_bn_act": ("output", "conv", "norm", "input"),
    "conv_bn": ("output", "conv", "input"),
    "residual_add": ("branch", "shortcut", "output"),
    "double_conv": ("between", "output"),
}


@dataclass(frozen=True)
class Family:
    """A model, its input size, and other sizes that it allows (a branch may hang on them) or refuses."""

    build: Callable[[], nn.Module]
    size: int = 64
    others: tuple[int, ...] = (96,)
    refused: int | None = None


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options)


def _smp(architecture: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(smp, architecture)("resnet34", encoder_weights=None, **options)


FAMILIES = {
    "resnet": Family(_timm("resnet18")),
    "resnetv2": Family(_timm("resnetv2_18")),
    "regnet": Family(_timm("regnety_002")),
    "convnext": Family(_timm("convnext_atto")),
    "efficientnet": Family(_timm("efficientnet_b0")),
    "mobilenetv3": Family(_timm("mobilenetv3_small_050")),
    "vgg": Family(_timm("vgg11_bn", mlp_ratio=0.02), size=64, others=(224,)),
    "densenet": Family(_timm("densenet121", block_config=(2, 2, 2, 2))),
    "vit": Family(_timm("vit_tiny_patch16_224", img_size=64, depth=3), others=(), refused=80),
    "vit_dynamic": Family(_timm("vit_tiny_patch16_224", img_size=64, depth=2, dynamic_img_size=True)),
    "swin": Family(
        _timm("swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(2, 2, 2, 2)),
        others=(),
        refused=96,
    ),
    "swin_dynamic": Family(
        _timm(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            window_size=4,
            embed_dim=24,
            depths=(1, 2),
            num_heads=(2, 4),
            strict_img_size=False,
        ),
        others=(96, 80, 32),
    ),
    "smp_unet": Family(_smp("Unet", decoder_channels=(64, 32, 16, 8, 8)), others=(96, 70)),
    "smp_fpn": Family(_smp("FPN", decoder_pyramid_channels=32, decoder_segmentation_channels=32), refused=70),
}
"""timm's and SMP's families, each by its smallest member."""


def everywhere(**options: Any) -> dict[str, Any]:
    """Dropout on every edge of every pattern, its rate growing from 0 over the training."""
    common = {
        "insert": "dropout",
        "with": {"p": 0.2},
        "schedule": {"kind": "linear"},
        "optional": True,
        **options,
    }
    entries = [
        {"name": f"{pattern} {edge}", "pattern": pattern, "edge": edge, **common}
        for pattern, edges in EDGES.items()
        for edge in edges
    ]
    return {"version": 1, "name": "everywhere", "entries": entries}


def ready(model: nn.Module) -> nn.Module:
    """Random scales and statistics: a last norm at zero would hide whatever happens on its branch."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                low, high = (-0.1, 0.1) if name.endswith("bias") else (0.5, 1.0)
                parameter.uniform_(low, high, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.8, 1.5, generator=generator)
    return model


@lru_cache(maxsize=4)
def original(name: str) -> nn.Module:
    """A model of the zoo; shared by all tests, so never to be changed: copy it."""
    torch.manual_seed(0)
    return ready(FAMILIES[name].build() if name in FAMILIES else ZOO[name].build())


def fresh(name: str) -> nn.Module:
    return copy.deepcopy(original(name))


def images(name: str, size: int | None = None, batch: int = 2) -> Tensor:
    shape = (3, FAMILIES[name].size, FAMILIES[name].size) if name in FAMILIES else ZOO[name].shape[1:]
    if size is not None:
        shape = (3, size, size)
    return torch.randn((batch, *shape), generator=torch.Generator().manual_seed(2))


def convert(name: str, model: nn.Module, recipe: Any = None) -> fx.GraphModule:
    return apply_recipe(model, recipe or everywhere(), example_inputs=images(name), total_steps=STEPS)


@lru_cache(maxsize=2)
def pair(name: str) -> tuple[nn.Module, fx.GraphModule]:
    """A model and what `everywhere` made of it: checks that run them put back what they change (`kept`)."""
    model = fresh(name)
    return model, convert(name, model)


def loud(name: str, model: nn.Module | None = None, *, steps: int = STEPS) -> fx.GraphModule:
    """A converted model some steps into its schedule, by default at its end."""
    gm = convert(name, fresh(name) if model is None else model)
    for _ in range(steps):
        gm.surgery.step()
    return gm
