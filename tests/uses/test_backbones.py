"""Models as parts of bigger ones: timm's feature extractors in all their forms, SMP's encoders, two nets in one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropsurgery import apply_recipe
from tests.laws import checks
from tests.laws.models import STEPS, everywhere
from tests.uses.cases import calling, check_part, check_use, check_ways, converted, images, made

SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 1, 1)}
VIT = {"img_size": 64, "depth": 3, "embed_dim": 48}
DENSE = {"block_config": (2, 2, 2, 2)}


def extractor(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, features_only=True, **options)


EXTRACTORS = {
    "list resnet": extractor("resnet18"),
    "list resnet some": extractor("resnet18", out_indices=(1, 3)),
    "list resnet last": extractor("resnet18", out_indices=(-1,)),
    "list resnet dilated": extractor("resnet18", output_stride=8),
    "list convnext": extractor("convnext_atto"),
    "list regnet": extractor("regnety_002"),
    "list densenet": extractor("densenet121", **DENSE),
    "list swin": extractor("swin_tiny_patch4_window7_224", **SWIN),
    "features efficientnet": extractor("efficientnet_b0", out_indices=(1, 2, 4)),
    "features hrnet": extractor("hrnet_w18_small"),
    "dict resnet": extractor("resnet18", feature_cls="dict"),
    "dict convnext": extractor("convnext_atto", feature_cls="dict"),
    "hook resnet": extractor("resnet18", feature_cls="hook"),
    "hook convnext": extractor("convnext_atto", feature_cls="hook"),
    "graph resnet": extractor("resnet18", feature_cls="fx"),
    "getter vit": extractor("vit_tiny_patch16_224", **VIT),
    "getter efficientnet": extractor("efficientnet_b0", feature_cls="getter"),
}


NO_COPY = ("graph",)


class Detector(nn.Module):
    """A top-down pyramid over a backbone, with one head for all of its levels; what has no level is left out."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        channels = backbone.feature_info.channels()  # type: ignore[union-attr, operator]
        self.backbone = backbone
        self.lateral = nn.ModuleList(nn.Conv2d(count, 8, 1) for count in channels)
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.out = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.backbone(x)
        maps = list(features.values()) if isinstance(features, dict) else features
        top, levels = None, []
        for lateral, feature in zip(reversed(self.lateral), reversed(maps), strict=False):
            level = lateral(feature)
            top = level if top is None else level + F.interpolate(top, size=level.shape[-2:])
            levels.append(self.out(self.head(top)))
        return levels


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_a_feature_extractor_alone(kind: str) -> None:
    model = made(EXTRACTORS[kind])
    gm = check_use(model, images(), calling(images()), copies=not kind.startswith(NO_COPY))
    assert type(gm(images())) is type(model(images()))


@pytest.mark.parametrize("kind", [kind for kind in EXTRACTORS if "swin" not in kind])  # it gives NHWC maps
def test_a_feature_extractor_in_a_detector(kind: str) -> None:
    model = made(lambda: Detector(EXTRACTORS[kind]()))
    gm = check_use(model, images(), calling(images()), copies=False)
    assert {"head.1"} <= {site.partition("#")[0] for site in gm.surgery.regularizers}
    check_ways(model, gm, {"backbone": lambda net: net.backbone(images())})
    check_part(model, images(), "backbone", images())


# -- put into a bigger model after surgery --------------------------------------------------------------------------
class Two(nn.Module):
    """Two nets, the first called twice."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other
        self.fuse = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(torch.cat([self.one(x) + self.one(x.flip(-1)), self.other(x)], 1))


def resnet() -> nn.Module:
    return timm.create_model("resnet18", num_classes=5)


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64, depth=2, embed_dim=48)


WRAPPINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "Sequential": lambda net: nn.Sequential(nn.Identity(), net, nn.Flatten(), nn.Dropout(0.0)),
    "ModuleList": lambda net: Iterates([net, nn.Identity()]),
    "twice": lambda net: Two(net, copy.deepcopy(net)),
    "its stages": lambda net: Stages(net),
}


class Iterates(nn.Module):
    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Stages(nn.Module):
    """Calls the stages of a net by itself, the last one twice."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.net
        x = net.maxpool(net.act1(net.bn1(net.conv1(x))))
        x = net.layer1(net.layer1(x))
        return net.layer2[1](net.layer2[0](x))


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_an_emitted_model_within_another(wrapping: str) -> None:
    wrap, plain = WRAPPINGS[wrapping], made(resnet)
    model, gm = wrap(plain), wrap(converted(plain, images()))
    call = calling(images())
    torch.manual_seed(0)
    for net in (model, gm):
        for name, parameter in net.named_parameters():
            if name.startswith("fuse"):
                nn.init.constant_(parameter, 0.1)
    checks.check_outputs(model, gm, call)
    checks.check_state(model, gm) if wrapping != "twice" else None
    for emitted in [module for module in gm.modules() if "surgery" in module.__dict__]:
        for _ in range(STEPS):
            emitted.surgery.step()
    one, other = (checks.run(gm, call, True, seed).outputs for seed in (1, 2))
    assert not checks.equal(one, other)
    checks.check_same(checks.run(model, call, False), checks.run(gm, call, False))


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_model_within_another_is_captured_with_it(wrapping: str) -> None:
    check_use(WRAPPINGS[wrapping](made(resnet)), images(), calling(images()))


def test_two_emitted_models_in_one_have_clocks_of_their_own() -> None:
    one, other = (converted(made(build), images()) for build in (resnet, vit))
    both = Two(one, other)
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3) for net in (one, other)]
    both(images()).square().mean().backward()
    optimizers[0].step()
    assert (one.surgery.current_step, other.surgery.current_step) == (1, 0)
    optimizers[1].step()
    optimizers[1].step()
    assert (one.surgery.current_step, other.surgery.current_step) == (1, 2)


def test_two_models_in_one_are_converted_as_one() -> None:
    model = made(lambda: Two(resnet(), vit()))
    gm = check_use(model, images(), calling(images()))
    ways = {"one": lambda net: net.one(images()), "other": lambda net: net.other(images())}
    check_ways(model, gm, ways)


# -- SMP's encoders over timm ----------------------------------------------------------------------------------------
def segmenter(architecture: str, encoder: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(smp, architecture)(encoder, encoder_weights=None, **options)


SEGMENTERS = {
    "Unet resnet": segmenter("Unet", "tu-resnet18", decoder_channels=(32, 16, 16, 8, 8)),
    "Unet mobilenet": segmenter("Unet", "tu-mobilenetv3_small_050", decoder_channels=(32, 16, 16, 8, 8)),
    "UnetPlusPlus resnetv2": segmenter("UnetPlusPlus", "tu-resnetv2_18", decoder_channels=(32, 16, 16, 8, 8)),
    "MAnet efficientnet": segmenter("MAnet", "tu-efficientnet_lite0", decoder_channels=(32, 16, 16, 8, 8)),
    "FPN convnext": segmenter("FPN", "tu-convnext_atto", decoder_pyramid_channels=32),
    "FPN hrnet": segmenter("FPN", "tu-hrnet_w18_small", decoder_pyramid_channels=32),
    "DeepLabV3Plus regnet": segmenter("DeepLabV3Plus", "tu-regnety_002", decoder_channels=32),
    "Linknet densenet": segmenter("Linknet", "tu-densenet121", **DENSE),
    "PSPNet ghostnet": segmenter("PSPNet", "tu-ghostnet_050"),
    "UPerNet swin": segmenter("UPerNet", "tu-swin_tiny_patch4_window7_224", decoder_channels=32, **SWIN),
    "Segformer pvt": segmenter("Segformer", "tu-pvt_v2_b0"),
    "DPT vit": segmenter("DPT", "tu-vit_tiny_patch16_224", decoder_fusion_channels=32, dynamic_img_size=True),
}


@pytest.mark.parametrize("kind", SEGMENTERS)
def test_a_segmenter_over_a_timm_encoder(kind: str) -> None:
    model = made(SEGMENTERS[kind])
    gm = check_use(model, images(), calling(images()), copies=False)
    given = {} if kind.startswith("DPT") else {"decoder": _decoded}
    check_ways(model, gm, {"encoder": lambda net: net.encoder(images()), **given})


def _decoded(net: Any) -> Tensor:
    return net.segmentation_head(net.decoder(net.encoder(images())))


@pytest.mark.parametrize("kind", ["Unet resnet", "FPN convnext", "DeepLabV3Plus regnet"])
def test_a_frozen_encoder(kind: str) -> None:
    """Frozen before surgery or after it: no gradients below, statistics at rest, noise above."""
    model = made(SEGMENTERS[kind])
    before = copy.deepcopy(model)
    before.freeze_encoder()
    gm, other = converted(before, images()), converted(copy.deepcopy(model), images())
    other.freeze_encoder()
    model.freeze_encoder()
    for net in (gm, other):
        checks.check_outputs(model, net, calling(images()))
        assert not any(parameter.requires_grad for parameter in net.encoder.parameters())
        gradients = checks.run(net, calling(images()), training=True).gradients
        assert gradients and not any(name.startswith("encoder.") for name in gradients)
        for _ in range(STEPS):
            net.surgery.step()
        checks.check_noise(net, calling(images()))  # SMP's `eval()` leaves a frozen encoder out


def test_a_recipe_for_the_parts_that_train() -> None:
    model = made(SEGMENTERS["Unet resnet"])
    model.freeze_encoder()
    recipe = everywhere(where={"trainable": True})
    gm = converted(model, images(), recipe, steps=STEPS)
    assert gm.surgery.regularizers
    frozen = [site for site in gm.surgery.regularizers if site.startswith("encoder.")]
    assert not [site for site in frozen if not site.endswith(".input")]
    checks.check_noise(gm, calling(images()))


def test_statistics_at_rest_while_the_rest_trains() -> None:
    """Norms put into eval by hand stay there: a regularizer goes by its own mode, not by theirs."""
    model = made(resnet)
    gm = apply_recipe(model, everywhere(), example_inputs=images(), total_steps=STEPS)

    def call(net: nn.Module) -> Tensor:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        out: Tensor = net(images())
        return out

    checks.check_same(checks.run(model, call, True), checks.run(gm, call, True))
    buffers = checks.run(gm, call, True).buffers
    assert checks.equal(list(buffers.values()), list(model.buffers()))
    for _ in range(STEPS):
        gm.surgery.step()
    assert not checks.equal(checks.run(gm, call, True, 1).outputs, checks.run(gm, call, True, 2).outputs)
