"""Every bundled recipe trains: real optimizer steps on a small net of its family.

The loss is finite, every parameter moves, the rates follow the schedule, the noise acts in training and follows the
seed, and in eval the net is the one that `strip` gives back, unless a regularizer says what it does there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torchvision.models import ResNet, resnet
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.misc import FrozenBatchNorm2d

from dropsurgery import SurgeryWarning, apply_recipe, strip
from dropsurgery.recipe import bundled

STEPS = 3
IMAGES = (2, 3, 64, 64)
WIDTHS = (8, 16, 32, 64)


class Case(NamedTuple):
    """A small net, what it is called with in training, and what in eval."""

    model: nn.Module
    training: tuple[Any, ...]
    testing: tuple[Any, ...]


def classifier(name: str, size: int = IMAGES[-1], **options: Any) -> Callable[[], Case]:
    """A timm net of ten classes, on images of `size` x `size`."""

    def make() -> Case:
        images = torch.randn(*IMAGES[:2], size, size)
        return Case(timm.create_model(name, num_classes=10, **options), (images,), (images,))

    return make


def segmenter(architecture: str, encoder: str = "resnet18", **options: Any) -> Callable[[], Case]:
    """An SMP net of two classes."""

    def make() -> Case:
        images = torch.randn(IMAGES)
        model = getattr(smp, architecture)(encoder, encoder_weights=None, classes=2, **options)
        return Case(model, (images,), (images,))

    return make


def detector(norm: type[nn.Module]) -> Callable[[], Case]:
    """A RetinaNet on a thin ResNet-FPN, with one box an image."""

    def make() -> Case:
        body = ResNet(resnet.Bottleneck, [1, 1, 1, 1], width_per_group=16, norm_layer=norm)
        levels = {f"layer{index}": str(index) for index in (2, 3, 4)}
        fpn = BackboneWithFPN(body, levels, [512, 1024, 2048], out_channels=16)
        anchors = AnchorGenerator(tuple((size,) for size in (8, 16, 32, 64)), ((1.0,),) * 4)
        model = RetinaNet(fpn, 3, min_size=64, max_size=64, anchor_generator=anchors, score_thresh=0.0)
        images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
        boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
        targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in images]
        return Case(model, (images, targets), (images,))

    return make


class Reader(nn.Module):
    """A GRU on rows of numbers, read from both sides, and a classifier on its last states."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        _, last = self.gru(x)
        return self.head(torch.cat([last[-2], last[-1]], 1))


def reader() -> Case:
    """A small recurrent net that no library has."""
    rows = torch.randn(3, 7, 6)
    return Case(Reader(), (rows,), (rows,))


class Mixture(nn.Module):
    """Residual mixtures of four experts, of which two are chosen for each row, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (Experts() for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for mixture in (self.first, self.second, self.third):
            x = x + mixture(x)
        return self.head(x)


class Experts(nn.Module):
    """The mixture itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.gate(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y = y + expert(x) * (weights * (indices == number)).sum(-1, keepdim=True)
        return y


def mixture() -> Case:
    """A small mixture of experts that no library has."""
    rows = torch.randn(64, 6)
    return Case(Mixture(), (rows,), (rows,))


class Tree(nn.Module):
    """A soft tree of two decision nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(6, 1) for _ in range(2))
        self.leaves = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (gate(x).sigmoid() for gate in self.gates)
        below = second * self.leaves[0](x) + (1 - second) * self.leaves[1](x)
        return first * below + (1 - first) * self.leaves[2](x)


def tree() -> Case:
    """A small tree that no library has."""
    rows = torch.randn(32, 6)
    return Case(Tree(), (rows,), (rows,))


_CONVNEXT: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": WIDTHS}
_SWIN: dict[str, Any] = {
    "img_size": 64,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 2, 4),
    "drop_path_rate": 0.0,
}
_UNET: dict[str, Any] = {"decoder_channels": (32, 16, 16, 8, 8)}
_VIT: dict[str, Any] = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}
_RESNET = classifier("resnet26", channels=WIDTHS, layers=(1, 1, 1, 1))
_NASNET = classifier("nasnetalarge", stem_size=8, num_features=96)
_SEQUENCER = classifier("sequencer2d_s", 32, layers=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32))
_VGG = classifier("vgg11_bn", mlp_ratio=0.02)
CASES: dict[str, list[Callable[[], Case]]] = {
    "adl_resnet": [_RESNET],
    "alpha_dropout_selu": [
        classifier("vit_tiny_patch16_224", act_layer="selu", **_VIT),
        classifier("resnet26", channels=WIDTHS, layers=(1, 1, 1, 1), act_layer="selu"),
    ],
    "biased_dropout_vgg": [classifier("vgg11_bn", 224, mlp_ratio=0.02)],  # on less its head is no head
    "channel_dropblock_resnet": [_RESNET],
    "channel_dropblock_vgg": [_VGG],
    "classifier_dropout": [classifier("deit_tiny_distilled_patch16_224", **_VIT), _RESNET],
    "clustering_dropout_classifier": [classifier("deit_tiny_distilled_patch16_224", **_VIT), _RESNET],
    "corrdrop_channel_resnet_g34": [_RESNET],
    "corrdrop_spatial_resnet_g34": [classifier("resnet26", 160, channels=WIDTHS, layers=(1, 1, 1, 1))],
    "crossmap_dropout_resnet_g34": [_RESNET],
    "cutout": [_RESNET],
    "dropblock_convnext_g34": [classifier("convnext_tiny", **_CONVNEXT), classifier("convnext_atto", **_CONVNEXT)],
    "dropblock_efficientnet_g34": [classifier("efficientnet_b0"), classifier("mobilenetv3_small_050")],
    "dropblock_fpn_backbone": [segmenter("FPN", decoder_dropout=0.0)],
    "dropblock_fpn_decoder": [segmenter("FPN", decoder_dropout=0.0), segmenter("UPerNet", decoder_channels=32)],
    "dropblock_nasnet_cells": [_NASNET],
    "dropblock_regnet_g34": [classifier("regnetx_002"), classifier("regnety_002")],
    "dropblock_resnet_g34": [_RESNET],
    "dropblock_resnet_g34_conv_only": [_RESNET],
    "dropblock_resnet_g4": [_RESNET],
    "dropblock_resnet_heavy": [_RESNET],
    "dropblock_retinanet": [detector(nn.BatchNorm2d), detector(FrozenBatchNorm2d)],
    "dropblock_unet_double_conv": [
        segmenter("Unet", "vgg11_bn", **_UNET),
        segmenter("UnetPlusPlus", **_UNET),
        segmenter("MAnet", **_UNET),
    ],
    "dropconnect_classifier": [_RESNET],
    "dropout_resnet_g34": [_RESNET],
    "dropout_vit": [classifier("vit_tiny_patch16_224", **_VIT), classifier("swin_tiny_patch4_window7_224", **_SWIN)],
    "focused_dropout_resnet": [classifier("resnet26", 192, channels=WIDTHS, layers=(1, 1, 1, 1))],
    "expert_dropout_switch": [mixture],
    "fractal_drop_path_cells": [_NASNET],
    "gate_expert_drop_moe": [mixture],
    "gating_dropout_moe": [mixture, classifier("efficientnet_cc_b0_4e")],
    "gaussian_dropout_vgg": [classifier("vgg11_bn", 224, mlp_ratio=0.02)],
    "grid_dropout": [_RESNET],
    "guided_dropout_vgg": [classifier("vgg11_bn", 224, mlp_ratio=0.02)],
    "heuristic_dropout_unet_double_conv": [segmenter("Unet", **_UNET), segmenter("UnetPlusPlus", **_UNET)],
    "hinton_dropout_vgg": [_VGG],
    "hme_dropout": [tree],
    "input_dropout": [_RESNET],
    "nsdropout_classifier": [_RESNET],
    "nsdropout_vgg": [classifier("vgg11_bn", 224, mlp_ratio=0.02)],
    "router_jitter_switch": [mixture, classifier("efficientnet_cc_b0_4e")],
    "scheduled_drop_path_nasnet": [_NASNET],
    "shake_shake_cells": [_NASNET],
    "shakedrop_resnet": [_RESNET],
    "spatial_dropout_resnet_g34": [_RESNET],
    "spectral_dropout_resnet_g34": [_RESNET],
    "standout_vgg": [classifier("vgg11_bn", 224, mlp_ratio=0.02)],
    "stochastic_depth_linear": [_RESNET, classifier("vit_tiny_patch16_224", **_VIT)],
    "stochastic_depth_row": [classifier("convnext_tiny", **_CONVNEXT)],
    "stochastic_pooling_vgg": [_VGG],
    "structural_dropout_classifier": [classifier("deit_tiny_distilled_patch16_224", **_VIT), _RESNET],
    "structural_dropout_resnet": [_RESNET],
    "structural_dropout_vgg": [classifier("vgg11_bn", 224, mlp_ratio=0.02)],
    "structural_dropout_vit": [
        classifier("vit_tiny_patch16_224", **_VIT),
        classifier("swin_tiny_patch4_window7_224", **_SWIN | {"num_heads": (2, 2, 4, 4)}),
    ],
    "unet_heavy": [segmenter("Unet", **_UNET), segmenter("MAnet", **_UNET)],
    "variational_dropout_lstm": [_SEQUENCER, reader],
    "variational_dropout_sequencer": [_SEQUENCER],
    "vit_heavy": [classifier("vit_tiny_patch16_224", **_VIT)],
    "weight_drop_lstm": [_SEQUENCER, reader],
    "weighted_channel_dropout_resnet": [_RESNET],
    "weighted_channel_dropout_vgg": [_VGG],
    "zoneout_gru": [_SEQUENCER, reader],
    "zoneout_lstm": [_SEQUENCER, reader],
}
# What acts on few batches, or in one place by a coin, is looked at at this rate; what then is always the same, at a
# half.
SELDOM = {
    "focused_dropout_resnet": 1.0,
    "gate_expert_drop_moe": 0.5,
    "gating_dropout_moe": 0.5,
    "structural_dropout_classifier": 1.0,
}
# What decides once for each step would give the same under every seed of one step.
OVERRIDES = {
    "gate_expert_drop_moe": {"mixtures.with.per": "microbatch"},
    "gating_dropout_moe": {"scores.with.per": "microbatch"},
}
RUNS = [
    pytest.param(recipe, make, id=f"{recipe}-{index}")
    for recipe, makes in CASES.items()
    for index, make in enumerate(makes)
]


def test_every_recipe_is_trained() -> None:
    assert set(CASES) == set(bundled())


def awake(model: nn.Module) -> nn.Module:
    """The model with no residual branch or head that begins at zero: there noise would have nothing to act on."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if name in ("weight", "gamma") and weight.dim() == 1:
                nn.init.uniform_(weight, 0.5, 1.5)
            elif name == "weight" and not weight.any():
                nn.init.trunc_normal_(weight, std=0.1)
    return model


def spread(gm: nn.Module) -> None:
    """Let nodes differ in strength, as after a longer training: guided dropout tells them apart by it."""
    for name, parameter in gm.named_parameters():
        if name.endswith("strength"):
            nn.init.uniform_(parameter, 0.5, 1.5)


def loss_of(output: Any) -> Tensor:
    """A loss on any output: a detector's own losses, else the mean square of all tensors."""
    losses = [tensor if tensor.dim() == 0 else tensor.square().mean() for tensor in tensors(output)]
    return torch.stack(losses).sum()


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in an output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from tensors(item)
    elif isinstance(output, dict):
        yield from tensors(list(output.values()))


def targets(edit: Any) -> dict[str, float]:
    """The rates that an edit comes to: its p, or where it has several, each `p_*`."""
    several = {name: value for name, value in edit.arguments.items() if name.startswith("p_")}
    return several if several and "p" not in edit.arguments else {"p": edit.p}


def rates(gm: Any) -> dict[str, float]:
    """The current rates of each regularizer."""
    layers = gm.surgery.regularizers
    return {
        f"{edit.site.id} {name}": float(getattr(layers[edit.site.id], name))
        for edit in gm.surgery.plan.edits
        for name in targets(edit)
    }


def expected_rates(gm: Any, progress: float) -> dict[str, float]:
    """What the recipe's schedules ask for; the bundled recipes have constant ones, and linear ones from the start."""
    factors = {"linear": lambda end: min(progress / end, 1.0), "constant": lambda end: 1.0}
    assert all(edit.schedule.begin == 0 for edit in gm.surgery.plan.edits)
    return {
        f"{edit.site.id} {name}": p * factors[edit.schedule.kind](edit.schedule.end)
        for edit in gm.surgery.plan.edits
        for name, p in targets(edit).items()
    }


def told(gm: Any, batch: tuple[Any, ...]) -> AbstractContextManager[None]:
    """Labels of each sample, and a validation, for recipes that go by them."""
    if not any(getattr(each, "needs_labels", False) for each in gm.surgery.regularizers.values()):
        return nullcontext()
    labels = torch.arange(len(batch[0]))
    validation = (torch.cat([batch[0], batch[0].flip(-1)]), labels.repeat(2))
    return gm.surgery.batch(labels=labels, validation=validation)


def ramped(gm: Any) -> None:
    """Let ramps that are longer than this training be over, so that their noise is heard."""
    for edit in gm.surgery.plan.edits:
        for name, p in targets(edit).items():
            gm.surgery.regularizers[edit.site.id].set_rate(name, p)


def train(gm: Any, batch: tuple[Any, ...]) -> None:
    """Take the steps of a training, and check loss and rates at each."""
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-3, eps=1e-20)  # moves what has the least gradient
    gm.train()
    for step in range(STEPS):
        assert rates(gm) == pytest.approx(expected_rates(gm, step / STEPS))
        optimizer.zero_grad()
        with told(gm, batch):
            loss = loss_of(gm(*batch))
            assert loss.isfinite()
            loss.backward()
            optimizer.step()
    assert rates(gm) == pytest.approx(expected_rates(gm, 1.0))


def outputs(gm: nn.Module, batch: tuple[Any, ...], seed: int) -> list[Tensor]:
    """All tensors that come out under a seed of torch's generator."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return list(tensors(gm(*batch)))


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize(("recipe", "make"), RUNS)
def test_recipe_trains(recipe: str, make: Callable[[], Case]) -> None:
    torch.manual_seed(0)
    case = make()
    how: dict[str, Any] = {"total_steps": STEPS, "overrides": OVERRIDES.get(recipe)}
    gm: Any = apply_recipe(awake(case.model), recipe, example_inputs=case.testing, **how)
    before = {name: parameter.detach().clone() for name, parameter in gm.named_parameters()}
    train(gm, case.training)
    still = [name for name, parameter in gm.named_parameters() if torch.equal(parameter, before[name])]
    assert not still
    spread(gm)
    ramped(gm)
    with gm.surgery.active(p=SELDOM[recipe]) if recipe in SELDOM else told(gm, case.training):
        noisy = outputs(gm, case.training, seed=1)
        assert equal(noisy, outputs(gm, case.training, seed=1))
        random = any(regularizer.random for regularizer in gm.surgery.regularizers.values())
        assert equal(noisy, outputs(gm, case.training, seed=2)) is not random
    with gm.surgery.active(p=0.0):  # the model has no noise of its own that could be taken for the recipe's
        assert equal(outputs(gm, case.training, seed=1), outputs(gm, case.training, seed=2))
    at_rest = {regularizer.eval_rule for regularizer in gm.surgery.regularizers.values()} == {"identity"}
    with nullcontext() if at_rest else pytest.warns(SurgeryWarning, match="strip: in eval this"):
        stripped = strip(gm).eval()
    assert equal(outputs(gm.eval(), case.testing, seed=1), outputs(stripped, case.testing, seed=2)) is at_rest
