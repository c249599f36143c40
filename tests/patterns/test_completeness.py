"""`conv_bn_act` finds all of them: counted a second time from what a forward calls, without graph and kinds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dropsurgery.capture import capture
from dropsurgery.matching import find
from dropsurgery.models import make_model
from dropsurgery.patterns import conv_bn_act

CONVS = (torch.conv1d, torch.conv2d, torch.conv3d)
NORMS = (F.batch_norm, F.group_norm, F.layer_norm)
ACTIVATIONS = (
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.silu, F.mish, F.gelu, F.hardswish, F.hardsigmoid, F.hardtanh),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, Tensor.relu, Tensor.relu_, Tensor.sigmoid, Tensor.sigmoid_),
)
WITHOUT_EFFECT = (F.dropout, F.dropout2d, Tensor.permute, Tensor.contiguous)


class Calls(TorchFunctionMode):
    """Which tensor each call reads and makes; one changed in place is another one from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []  # or its id would be given away
        self.number: dict[int, int] = {}
        self.made_by: dict[int, Callable[..., Any]] = {}
        self.read_by: defaultdict[int, list[tuple[Callable[..., Any], int]]] = defaultdict(list)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in torch.utils._pytree.tree_leaves(result) if isinstance(each, Tensor)]
        read = torch.utils._pytree.tree_leaves((args, kwargs)) if tensors else []
        numbers = {self.number[id(each)] for each in read if isinstance(each, Tensor) and id(each) in self.number}
        for each in tensors:
            self.kept.append(each)
            self.number[id(each)] = len(self.made_by)
            self.made_by[len(self.made_by)] = function
        for number in numbers:
            self.read_by[number].append((function, self.number[id(tensors[0])]))
        return result

    def only(self, number: int, functions: tuple[Callable[..., Any], ...]) -> int | None:
        """What the only call that reads a tensor makes of it, if it is one of these."""
        calls = self.read_by[number]
        if len(calls) != 1:
            return None
        function, made = calls[0]
        if function in WITHOUT_EFFECT:
            return self.only(made, functions)
        return made if function in functions else None

    def units(self) -> int:
        """How many convolutions are read by a norm alone, and that by an activation alone."""
        convs = [number for number, function in self.made_by.items() if function in CONVS]
        norms = [self.only(number, NORMS) for number in convs]
        return sum(number is not None and self.only(number, ACTIVATIONS) is not None for number in norms)


def counted(model: nn.Module, size: int) -> int:
    with Calls() as calls, torch.no_grad():
        image = torch.zeros(2, 3, size, size, device="meta") + 0
        model(image)
    return calls.units()


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "resnet50", "resnet50d", "seresnet50", "resnest14d", "res2net50_14w_8s", "resnext26ts"),
        *("regnetx_002", "regnety_002", "efficientnet_b0", "tf_efficientnetv2_s", "mobilenetv3_small_100"),
        *("mobilenetv4_conv_small", "rexnet_100", "ese_vovnet19b_dw", "vgg11_bn", "densenet121", "resnetv2_50"),
        *("inception_v3", "inception_v4", "xception41", "hrnet_w18_small", "dla34", "dpn68", "cspdarknet53"),
        *("efficientformerv2_s0", "repvgg_a0", "mambaout_femto", "convnext_tiny", "gcresnet33ts", "levit_128s"),
        *("smp:Unet:resnet34", "smp:DeepLabV3Plus:resnet18", "smp:FPN:resnet18", "smp:MAnet:resnet18"),
    ],
)
def test_all_are_found(name: str) -> None:
    model = make_model(name).eval()
    captured = capture(model, torch.zeros(2, 3, 224, 224, device="meta"))
    assert len(find(captured.view.graph, conv_bn_act.PATTERN).matches) == counted(model, 224)
    captured.view.release()


def test_the_second_count_counts() -> None:
    relu = nn.ReLU(inplace=True)
    wide = [nn.Conv2d(3, 3, 1), nn.Dropout(), nn.BatchNorm2d(3), relu]
    bare = [nn.Conv2d(3, 3, 1), relu, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)]
    model = nn.Sequential(*wide, nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3), nn.GELU(), *bare).to("meta").eval()
    assert counted(model, 8) == 2
