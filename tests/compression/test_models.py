"""Models of the libraries: masked and narrow outputs, parameters by their closed form, and what becomes of a model."""

from __future__ import annotations

import copy
import io
import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from dropsurgery import SurgeryError, SurgeryWarning, apply_recipe, compress

SMALL = (2, 3, 64, 64)


def structural(*places: dict[str, Any], **more: Any) -> dict[str, Any]:
    entries = [
        {"name": f"e{index}", "insert": "structural_dropout", "with": {"p": 0.5, **place.pop("with", {})}, **place}
        for index, place in enumerate(copy.deepcopy(places))
    ]
    return {"version": 1, "name": "sites", "summary": "sites", "entries": entries, **more}


ACTS = {"pattern": "conv_bn_act", "edge": "output"}
BRANCHES = ACTS | {"where": {"path": "branch", "min_size": 2}}
INVERTED = ACTS | {"where": {"module": ["blocks.*"], "exclude": ["blocks.0.*", "blocks.5.*"]}}
PAIRS = {"pattern": "double_conv", "edge": "between"}


def unet() -> nn.Module:
    return smp.Unet("resnet18", encoder_weights=None, decoder_channels=(32, 24, 16, 12, 8))


def vgg() -> nn.Module:
    """VGG-11 with batch norm, the convolutions an eighth as wide."""
    config = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]
    return timm.models.vgg.VGG(config, norm_layer=nn.BatchNorm2d, num_classes=7)  # type: ignore[arg-type]


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=7)


# -- closed forms: parameters of what lies around the gaps, before and after -----------------------------------------
def gap(inputs: int, width: int, outputs: int, kernel: int = 3, first: int = 3) -> int:
    """conv ▶ norm ▶ act ▶ conv, without biases."""
    return inputs * width * first**2 + 2 * width + width * outputs * kernel**2


def resnet18(model: Any, cut: Callable[[int], int]) -> int:
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    return sum(
        gap(b.conv1.in_channels, cut(w := b.conv1.out_channels), w) - gap(b.conv1.in_channels, w, w) for b in blocks
    )


def resnet50(model: Any, cut: Callable[[int], int]) -> int:
    def count(inputs: int, width: int, outputs: int) -> int:
        return inputs * width + 2 * width + 9 * width**2 + 2 * width + width * outputs

    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    facts = [(b.conv1.in_channels, b.conv1.out_channels, b.conv3.out_channels) for b in blocks]
    return sum(count(i, cut(w), o) - count(i, w, o) for i, w, o in facts)


def vgg_all(model: Any, cut: Callable[[int], int]) -> int:
    def count(width: Callable[[int], int]) -> int:
        convs = [m for m in model.features if isinstance(m, nn.Conv2d)]
        widths = [3, *(width(conv.out_channels) for conv in convs)]
        features = sum(9 * i * o + 3 * o for i, o in itertools.pairwise(widths))  # bias, norm
        hidden = [width(model.pre_logits.fc1.out_channels), width(model.pre_logits.fc2.out_channels)]
        fc1 = widths[-1] * hidden[0] * 49 + hidden[0]
        return features + fc1 + hidden[0] * hidden[1] + hidden[1] + hidden[1] * 7 + 7

    return count(cut) - count(lambda width: width)


def mobilenet(model: Any, cut: Callable[[int], int]) -> int:
    total = 0
    for block in (block for stage in model.blocks for block in stage):
        if not hasattr(block, "conv_pwl"):
            continue
        i, w, o, k = block.conv_pw.in_channels, block.conv_pw.out_channels, block.conv_pwl.out_channels, block.conv_dw
        r = block.se.conv_reduce.out_channels if hasattr(block.se, "conv_reduce") else 0

        def count(width: int, i: int = i, o: int = o, k: int = k.kernel_size[0], r: int = r) -> int:
            gate = 2 * r * width + r + width if r else 0
            return i * width + 2 * width + k**2 * width + 2 * width + gate + width * o

        total += count(cut(w)) - count(w)
    return total


def transformer(model: Any, cut: Callable[[int], int]) -> int:
    width, hidden, heads = 192, 768, 3

    def count(units: int, kept: int) -> int:
        mlp = width * units + units + units * width
        return mlp + (width + 1) * 3 * 64 * kept + 64 * kept * width

    return len(model.blocks) * (count(cut(hidden), cut(heads)) - count(hidden, heads))


def unet_gaps(model: Any, cut: Callable[[int], int]) -> int:
    pairs = [(b.conv1[0].in_channels, b.conv1[0].out_channels) for b in model.decoder.blocks]
    decoder = sum(gap(i, cut(w), w) - gap(i, w, w) for i, w in pairs)
    return decoder + resnet18(model.encoder, cut)


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, tuple[int, ...], Callable[[Any, Any], int]]] = {
    "resnet18": (lambda: timm.create_model("resnet18"), "structural_dropout_resnet", SMALL, resnet18),
    "resnet50": (lambda: timm.create_model("resnet50"), "structural_dropout_resnet", SMALL, resnet50),
    "vgg11_bn": (vgg, structural(ACTS, {"pattern": "conv_act", "edge": "output"}), (2, 3, 224, 224), vgg_all),
    "mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_100"), structural(INVERTED), SMALL, mobilenet),
    "vit_tiny": (vit, "structural_dropout_vit", SMALL, transformer),
    "unet": (unet, structural(BRANCHES | {"where": {"path": "branch", "role": "encoder"}}, PAIRS), SMALL, unet_gaps),
}


def lively(model: nn.Module) -> nn.Module:
    """Numbers in norms as training would leave them: neither zeros nor ones."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
            ):
                nn.init.uniform_(tensor, low, high)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def masked(gm: Any, width: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), gm.surgery.width(width):
        return gm(x)


def relative(expected: torch.Tensor, got: torch.Tensor) -> float:
    return float((expected - got).abs().max() / expected.abs().max())


def share(width: float) -> Callable[[int], int]:
    return lambda units: max(1, int(width * units + 0.5))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance", "width"), [(torch.float64, 1e-12, 0.3), (torch.float32, 1e-6, 0.5)])
def test_masked_and_narrow_outputs_agree(name: str, dtype: torch.dtype, tolerance: float, width: float) -> None:
    build, recipe, shape, closed = MODELS[name]
    model = lively(build()).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    gm: Any = apply_recipe(model, recipe, example_inputs=x, total_steps=10)
    narrow = compress(gm, width)
    expected = masked(gm, width, x)
    with torch.no_grad():
        assert relative(expected, gm(x)) > 1e-3
        assert relative(expected, narrow(x)) <= tolerance
        broken = copy.deepcopy(narrow)  # the same check fails for a weight that is a little wrong
        [p for p in broken.parameters() if p.dim() > 1][-1].mul_(1 + 1e-3)
        assert relative(expected, broken(x)) > tolerance
    assert type(narrow) is type(model)
    assert parameters(narrow) == parameters(model) + closed(model, share(width)) < parameters(model)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, nn.Module, torch.Tensor]:
    """A model after surgery, which also has dropout elsewhere, the narrow model, and an input."""
    recipe = structural(BRANCHES)
    recipe["entries"].append(
        {"name": "head", "pattern": "classifier", "edge": "input", "insert": "dropout", "with": {"p": 0.3}}
    )
    torch.manual_seed(0)
    x = torch.randn(SMALL)
    gm: Any = apply_recipe(
        lively(timm.create_model("resnet18", num_classes=5)), recipe, total_steps=10, example_inputs=x
    )
    return gm, compress(gm, 0.5), x


def test_gm_is_left_as_it_was(pair: Any) -> None:
    gm, narrow, x = pair
    before = {key: value.clone() for key, value in gm.state_dict().items()}
    modes = [module.training for module in gm.modules()]
    with torch.no_grad():
        expected = gm(x)
        compress(gm, {"layer4.*": 0.25})
        assert torch.equal(gm(x), expected)
    assert modes == [module.training for module in gm.modules()]
    assert all(torch.equal(before[key], value) for key, value in gm.state_dict().items())
    assert not any(each._forward_hooks for each in gm.surgery.regularizers.values())
    own = {p.data_ptr() for p in gm.parameters()}
    assert not own & {p.data_ptr() for p in narrow.parameters()}


def test_other_regularizers_are_left_out(pair: Any) -> None:
    _, narrow, _ = pair
    assert not any(type(module).__module__.startswith("dropsurgery") for module in narrow.modules())
    assert not hasattr(narrow, "surgery")


def test_sites_that_are_not_named_stay_whole(pair: Any) -> None:
    gm, _, x = pair
    narrow: Any = compress(gm, {"layer4.0.*": 100}, x)
    assert narrow.layer4[0].conv1.out_channels == 100
    assert narrow.layer4[1].conv1.out_channels == 512
    assert relative(masked(gm, {"layer4.0.*": 100}, x), narrow(x)) <= 1e-6
    whole = compress(gm, 1.0)
    assert parameters(whole) == parameters(gm)


def test_it_trains_and_its_state_goes_round(pair: Any) -> None:
    narrow = copy.deepcopy(pair[1]).train()
    optimizer = torch.optim.SGD(narrow.parameters(), lr=0.05)
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(narrow(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    other = copy.deepcopy(pair[1])
    other.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(x), narrow.eval()(x))
    assert list(narrow.state_dict()) == list(pair[0].state_dict())


def test_the_mode_and_frozen_weights_stay(pair: Any) -> None:
    gm = copy.deepcopy(pair[0]).train()
    for parameter in gm.layer1.parameters():
        parameter.requires_grad_(False)
    narrow = compress(gm, 0.5)
    assert narrow.training and gm.training
    assert not any(p.requires_grad for p in narrow.layer1.parameters())  # type: ignore[union-attr]
    assert all(p.requires_grad for p in narrow.layer2.parameters())  # type: ignore[union-attr]


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dropsurgery":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch

for model, x, expected in torch.load(sys.argv[1], weights_only=False):
    with torch.no_grad():
        assert (model(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
"""


@pytest.fixture(scope="module")
def narrow() -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    """Of each model the one of half width, an input, and what it makes of it."""
    made = {}
    for name, (build, recipe, shape, _) in MODELS.items():
        model, x = lively(build()), torch.randn(1, *shape[1:])
        gm = apply_recipe(model, recipe, example_inputs=x, total_steps=10)
        half = compress(gm, 0.5)
        with torch.no_grad():
            made[name] = half, x, half(x)
    return made


def test_saved_ones_need_no_dropsurgery(narrow: Any, tmp_path: Path) -> None:
    torch.save(list(narrow.values()), tmp_path / "narrow.pt")
    call = [sys.executable, "-c", BLOCKED, str(tmp_path / "narrow.pt")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MODELS)
def test_torch_export(name: str, narrow: Any) -> None:
    model, x, expected = narrow[name]
    kept = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), kept)
    kept.seek(0)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(kept).module()(x), expected)


@pytest.mark.parametrize("name", MODELS)
def test_onnx(name: str, narrow: Any, tmp_path: Path) -> None:
    model, x, expected = narrow[name]
    torch.onnx.export(model, (x,), tmp_path / "narrow.onnx", dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "narrow.onnx"))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative(expected, torch.from_numpy(got)) < 1e-4


@pytest.mark.parametrize(
    ("widths", "told"),
    [
        (0, "an integer from 1 to 64"),
        (65, "an integer from 1 to 64"),
        (0.0, "above 0 and up to 1"),
        (1.5, "above 0 and up to 1"),
        (True, "got True"),
        ("half", "got 'half'"),
        ({"layer9.*": 3}, "fits none"),
        ({"layer1.*": -1}, "got -1"),
    ],
)
def test_widths_that_cannot_be(pair: Any, widths: Any, told: str) -> None:
    gm, _, _ = pair
    with pytest.raises(SurgeryError, match=told):
        compress(gm, widths)
    assert all(getattr(each, "width", None) is None for each in gm.surgery.regularizers.values())


def test_models_that_cannot_be() -> None:
    with pytest.raises(SurgeryError, match="made by apply_recipe"):
        compress(nn.Linear(2, 2), 1)
    plain = apply_recipe(timm.create_model("resnet18"), "dropblock_resnet_g34", total_steps=10)
    with pytest.raises(SurgeryError, match="structural_dropout"):
        compress(plain, 1)


def test_an_example_that_the_model_refuses(pair: Any) -> None:
    gm, _, _ = pair
    with pytest.raises(SurgeryError):
        compress(gm, 0.5, torch.randn(2, 4, 64, 64))
    with pytest.raises(SurgeryError, match="not finite"):
        broken = copy.deepcopy(gm)
        nn.init.constant_(broken.fc.weight, float("nan"))
        compress(broken, 0.5)


def test_a_forward_that_does_other_than_its_graph_says_is_found_out() -> None:
    """The check at the end: here it is the width of a branch by which Python decides."""

    class Deceiving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.act(self.a(x))
            return self.b(x * (2.0 if x.shape[1] == 8 else 3.0))

    site = structural({"pattern": "conv_act", "edge": "output"})
    gm = apply_recipe(Deceiving(), site, example_inputs=torch.randn(2, 3, 8, 8), total_steps=10)
    with pytest.raises(SurgeryError, match="differs from the masked one"):
        compress(gm, 4)


def test_half_precision_is_checked_in_float64(pair: Any) -> None:
    gm = copy.deepcopy(pair[0]).bfloat16()
    narrow = compress(gm, 0.3)  # factors that bfloat16 rounds
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


def test_eval_rules_that_are_lost_are_told() -> None:
    recipe = structural(BRANCHES | {"with": {"eval_width": 4}})
    gm: Any = apply_recipe(
        lively(timm.create_model("resnet18")), recipe, example_inputs=torch.randn(SMALL), total_steps=10
    )
    with pytest.warns(SurgeryWarning):
        narrow = compress(gm, 0.5)
    x = torch.randn(SMALL)
    assert relative(masked(gm, 0.5, x), narrow(x)) <= 1e-6


def test_the_residual_stream_is_refused() -> None:
    gm = apply_recipe(timm.create_model("resnet18"), "structural_dropout_classifier", total_steps=10)
    with warnings.catch_warnings(), pytest.raises(SurgeryError, match=r"'layer4\.1\.conv1' reads channels .* not zero"):
        compress(gm, 0.5)
