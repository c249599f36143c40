"""Small models chosen for topology: each is one way to write, join or reuse what real nets are made of.

`ZOO[name].build()` gives a fresh model in train mode, `ZOO[name].example()` its positional example inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ZooModel:
    """How to build a model, and the shape of its input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = field(default=(2, 3, 64, 64))

    def example(self) -> tuple[Tensor, ...]:
        return (torch.randn(self.shape, generator=torch.Generator().manual_seed(0)),)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, **options: int) -> nn.Sequential:
    padding = options.get("dilation", 1) * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False, **options)  # type: ignore[arg-type]
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """ReLU as one module used twice; the join as an in-place `+=`."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.first = conv_bn(inputs, outputs, stride=stride, dilation=dilation)
        self.second = conv_bn(outputs, outputs, dilation=dilation)
        self.relu = nn.ReLU(inplace=True)
        same = inputs == outputs and stride == 1
        self.project = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.relu(self.first(x)))
        out += self.project(x)
        return self.relu(out)


def residual(strides: tuple[int, ...], dilations: tuple[int, ...], stem: int = 2) -> nn.Module:
    """Two basic blocks a stage, widths 8, 16, 32 …; with `stem=1` neither stem nor first stage reduce."""
    pool = nn.MaxPool2d(3, 2, 1) if stem > 1 else nn.Identity()
    layers: list[nn.Module] = [conv_bn(3, 8, stride=stem), nn.ReLU(), pool]
    width = 8
    for index, (stride, dilation) in enumerate(zip(strides, dilations, strict=True)):
        layers += [
            BasicBlock(width, 8 << index, stride),
            BasicBlock(8 << index, 8 << index, dilation=dilation),
        ]
        width = 8 << index
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


class FunctionalResNet(nn.Module):
    """Everything in one forward: `F.relu`, `torch.add`, `F.conv2d` with a parameter of its own, `torch.relu_`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
        self.bn1, self.bn2, self.bn3, self.bn4 = (nn.BatchNorm2d(width) for width in (8, 8, 16, 16))
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 16, 3, 2, 1)
        self.conv4 = nn.Conv2d(16, 16, 3, padding=1)
        self.project = nn.Conv2d(8, 16, 1, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        out = F.relu(self.bn1(F.conv2d(x, self.weight, padding=1)))
        x = torch.relu_(torch.add(self.bn2(self.conv2(out)), x))
        out = self.bn3(self.conv3(x)).relu()
        x = F.relu(torch.add(self.project(x), self.bn4(self.conv4(out))), inplace=True)
        return self.head(x.mean((2, 3)))


class InPlaceAdd(nn.Module):
    """`Tensor.add_` and `relu_` as methods, dropout and an identity between the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.drop, self.nothing = nn.Dropout2d(0.1), nn.Identity()
        self.conv3 = nn.Conv2d(8, 5, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.nothing(self.drop(self.bn1(self.conv1(x)))).relu_()
        x = self.bn2(self.drop(self.conv2(x))).add_(x)
        return F.adaptive_avg_pool2d(self.conv3(x), 1).flatten(1)


class PreActivation(nn.Module):
    """norm ▶ ReLU ▶ conv; where the width changes, the projection starts after the first activation."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.project = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.project is None else self.project(out)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(out))))


class ShakeShake(nn.Module):
    """Two equal branches added to each other, then to the shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Sequential(nn.ReLU(), conv_bn(width, width), nn.ReLU(), conv_bn(width, width)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.left(x) + self.right(x))


class RepBlock(nn.Module):
    """Three ways at once, as RepVGG trains: 3x3 and 1x1 convolutions and a batch norm alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.narrow, self.plain = (
            conv_bn(width, width),
            conv_bn(width, width, 1),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.wide(x) + self.narrow(x) + self.plain(x))


class DenseLayer(nn.Module):
    """Concatenates what it makes to what it got."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.make = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, growth, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.make(x)], 1)


class DropPath(nn.Module):
    """Stochastic depth of the model's own."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(0.9)


class LayerScaleBlock(nn.Module):
    """ConvNeXt's block: depthwise conv, channels last inside, a learned scale, stochastic depth."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand, self.reduce = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        out = self.reduce(F.gelu(self.expand(out))) * self.gamma
        return x + self.drop_path(out.permute(0, 3, 1, 2))


class InvertedResidual(nn.Module):
    """Expand, depthwise, gate, project; a shortcut only where nothing changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.expand = nn.Sequential(conv_bn(inputs, wide, 1), nn.SiLU())
        self.depthwise = nn.Sequential(conv_bn(wide, wide, 3, stride, groups=wide), nn.SiLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, wide, 1), nn.Sigmoid())
        self.project = conv_bn(wide, outputs, 1)
        self.shortcut = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out = self.depthwise(self.expand(x))
        out = self.project(out * self.gate(out))
        return x + out if self.shortcut else out


class TransformerBlock(nn.Module):
    """Attention written out, and an MLP, each with its join."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(out)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Patches, a class token, a positional embedding, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 65, 16))
        self.blocks = nn.Sequential(TransformerBlock(16, 4), TransformerBlock(16, 4))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(conv_bn(inputs, outputs), nn.ReLU(), conv_bn(outputs, outputs), nn.ReLU())


class UNet(nn.Module):
    """Two levels, transposed convolutions, the skips concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = double_conv(3, 8), double_conv(8, 16), double_conv(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge2, self.merge1 = double_conv(32, 16), double_conv(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.bottom(F.max_pool2d(second, 2))
        x = self.merge2(torch.cat([self.up2(x), second], 1))
        return self.head(self.merge1(torch.cat([self.up1(x), first], 1)))


class Pyramid(nn.Module):
    """A feature pyramid: additions of an upsampled map and a lateral one, which are no residual joins."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8, stride=2), nn.ReLU())
        self.layer1, self.layer2 = BasicBlock(8, 8, 2), BasicBlock(8, 8, 2)
        self.lateral1, self.lateral2 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer1(self.stem(x))
        top = self.lateral2(self.layer2(first))
        return self.head(F.interpolate(top, scale_factor=2.0) + self.lateral1(first))


class SharedBlock(nn.Module):
    """One block called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Sequential(conv_bn(3, 8, stride=2), nn.ReLU()), BasicBlock(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(self.block(self.stem(x))))
        return self.head(x.mean((2, 3)))


class SplitSum(nn.Module):
    """Res2Net's hierarchical sums: parts of one tensor are added, which is no residual join; the outer one is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.part = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.merge = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        left, right = torch.split(x, 8, 1)
        left = F.relu(self.part(left))
        return x + self.merge(torch.cat([left, left + right], 1))


class NormAct(nn.BatchNorm2d):
    """A batch norm that holds its activation."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class PathAggregation(nn.Module):
    """PAFPN on a small backbone: a way down, a way up and a second way down, each merge an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = PyramidBackbone(), AggregatingNeck(), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.head(each) for each in self.neck(self.backbone(x))]


class PyramidBackbone(nn.Module):
    """Maps at reductions 4, 8 and 16, all 8 channels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8, stride=2), nn.ReLU())
        self.stages = nn.ModuleList(BasicBlock(8, 8, 2) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        x, found = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


class AggregatingNeck(nn.Module):
    """Top-down, then bottom-up."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.down = nn.ModuleList(nn.Conv2d(8, 8, 3, 2, 1) for _ in range(2))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        first, second, third = (conv(each) for conv, each in zip(self.lateral, maps, strict=True))
        second = second + F.interpolate(third, scale_factor=2.0)
        first = first + F.interpolate(second, scale_factor=2.0)
        second = second + self.down[0](first)
        return [first, second, third + self.down[1](second)]


class WeightedPyramid(nn.Module):
    """BiFPN: fast normalised fusion of maps that are pooled and upsampled to one size."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.weights = PyramidBackbone(), nn.Parameter(torch.ones(4, 2))
        self.convs = nn.ModuleList(conv_bn(8, 8) for _ in range(4))
        self.head = nn.Conv2d(8, 2, 1)

    def fuse(self, index: int, one: Tensor, other: Tensor) -> Tensor:
        weight = F.relu(self.weights[index])
        return self.convs[index](F.silu((weight[0] * one + weight[1] * other) / (weight.sum() + 1e-4)))

    def forward(self, x: Tensor) -> list[Tensor]:
        first, second, third = self.backbone(x)
        middle = self.fuse(0, second, F.interpolate(third, scale_factor=2.0))
        first = self.fuse(1, first, F.interpolate(middle, scale_factor=2.0))
        middle = self.fuse(2, middle, F.max_pool2d(first, 2))
        third = self.fuse(3, third, F.max_pool2d(middle, 2))
        return [self.head(first), self.head(middle), self.head(third)]


class LoopedStages(nn.Module):
    """Stages whose own forwards loop over their blocks: many joins of one owner, each a block."""

    class Stage(nn.Module):
        def __init__(self, width: int, count: int) -> None:
            super().__init__()
            self.down = conv_bn(width // 2, width, stride=2)
            self.convs = nn.ModuleList(conv_bn(width, width) for _ in range(count))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.down(x))
            for conv in self.convs:
                x = x + conv(F.relu(x))
            return x

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second, self.third = self.Stage(16, 2), self.Stage(32, 3), self.Stage(64, 2)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(self.stem(x)))).mean((2, 3)))


class Cell(nn.Module):
    """NASNet's: it takes the two cells before; sums of its own, all concatenated."""

    def __init__(self, before: int, last: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.squeeze, self.other = conv_bn(last, width, 1), conv_bn(before, width, 1)
        self.deep, self.wide = conv_bn(width, width, 3, stride), conv_bn(width, width, 5, stride)
        self.again = conv_bn(width, width, 3)
        self.pool = nn.AvgPool2d(3, stride, 1)

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        if before.shape[-1] > last.shape[-1]:
            before = F.avg_pool2d(before, 2)
        last, before = self.squeeze(F.relu(last)), self.other(F.relu(before))
        first = self.deep(last) + self.wide(before)  # of two inputs: no residual join
        second = self.pool(before) + self.wide(before)
        third = self.again(first) + first
        return torch.cat([first, second, third], 1)


class Cells(nn.Module):
    """Five cells, the third at half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12, stride=2)
        self.cells = nn.ModuleList([Cell(12, 12, 4), Cell(12, 12, 4), Cell(12, 12, 4, 2), Cell(12, 12, 4)])
        self.cells.append(Cell(12, 12, 4))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.head(last.mean((2, 3)))


class Add(nn.Module):
    """A wrapper that adds its input to what its one child makes of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def wrapped_block(width: int) -> nn.Module:
    """Three joins in three wrappers: EfficientViT's and RepViT's way to write one block."""
    wide = nn.Sequential(conv_bn(width, 2 * width, 1), nn.ReLU(), conv_bn(2 * width, width, 1))
    return nn.Sequential(Add(conv_bn(width, width, groups=width)), Add(wide), Add(conv_bn(width, width, 5)))


class Deceptive(nn.Module):
    """Additions that are no residual joins, around one that is (the last): each would be a way to lose the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.gate = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 1)
        self.scale, self.token = nn.Parameter(torch.ones(1, 8, 1, 1)), nn.Parameter(torch.zeros(1, 8, 1, 1))
        self.last = nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.zeros_like(x) + self.conv(x)  # the branch is the only way
        x = self.token.expand_as(x) + x  # a parameter
        gate = torch.sigmoid(self.gate(x))
        x = self.conv(x)
        x = x * gate + self.conv(x)  # FocalNet's contexts: a gate from before the fork
        x = x + self.scale * (x / (x.norm(dim=(2, 3), keepdim=True) + 1e-6))  # ConvNeXt V2's GRN
        x = x + self.last(F.relu(x))
        return x.mean((2, 3))


def _chain(width: int, *blocks: nn.Module) -> nn.Module:
    """A stem, blocks at its size, and a classifier."""
    stem = nn.Sequential(conv_bn(3, width, stride=2), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))


def _ready(model: nn.Module) -> nn.Module:
    """Run once so that lazy layers take their shapes."""
    model.eval()(torch.zeros(2, 3, 64, 64))
    return model.train()


def _dense() -> nn.Module:
    return _ready(_chain(8, *(DenseLayer(8 + 4 * index, 4) for index in range(3))))


def _pre_activation() -> nn.Module:
    blocks = (PreActivation(8, 8), PreActivation(8, 16, 2), PreActivation(16, 16))
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def _inverted() -> nn.Module:
    steps = (
        (8, 8, 2),
        (8, 8, 1),
        (8, 16, 2),
        (16, 16, 1),
        (16, 16, 1),
        (16, 24, 2),
        (24, 24, 2),
        (24, 24, 1),
    )
    return _ready(_chain(8, *(InvertedResidual(*step) for step in steps)))


def _norm_act() -> nn.Module:
    convs = (nn.Conv2d(8, 8, 3, padding=1), NormAct(8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    return _ready(_chain(8, *convs))


ZOO: dict[str, ZooModel] = {
    "resnet": ZooModel(lambda: residual((1, 2, 2, 2), (1, 1, 1, 1))),
    "dilated_resnet": ZooModel(lambda: residual((1, 2, 1, 1), (1, 1, 2, 4))),
    "small_image_resnet": ZooModel(lambda: residual((1, 2, 2), (1, 1, 1), stem=1), (2, 3, 32, 32)),
    "functional_resnet": ZooModel(FunctionalResNet),
    "in_place_add": ZooModel(InPlaceAdd),
    "pre_activation": ZooModel(_pre_activation),
    "shake_shake": ZooModel(lambda: _ready(_chain(8, ShakeShake(8), ShakeShake(8)))),
    "three_ways": ZooModel(lambda: _ready(_chain(8, RepBlock(8)))),
    "dense": ZooModel(_dense),
    "layer_scale": ZooModel(lambda: _ready(_chain(8, LayerScaleBlock(8), LayerScaleBlock(8)))),
    "inverted_residual": ZooModel(_inverted),
    "transformer": ZooModel(Transformer),
    "unet": ZooModel(UNet),
    "pyramid": ZooModel(Pyramid),
    "shared_block": ZooModel(SharedBlock),
    "split_sum": ZooModel(SplitSum),
    "norm_act": ZooModel(_norm_act),
    "pafpn": ZooModel(PathAggregation),
    "bifpn": ZooModel(WeightedPyramid),
    "looped_stages": ZooModel(LoopedStages),
    "cells": ZooModel(Cells),
    "wrapped": ZooModel(lambda: _ready(_chain(8, nn.Sequential(*(wrapped_block(8) for _ in range(3)))))),
    "deceptive": ZooModel(Deceptive),
}
"""Every topology by name."""
