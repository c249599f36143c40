"""Which tensor each edge is: what is named by hand in small nets, and by shape in real ones."""

from __future__ import annotations

import pytest
import timm
import torch

from dropsurgery import catalogue
from dropsurgery.capture import capture
from dropsurgery.matching import Miss, chain, find
from dropsurgery.models import make_model
from dropsurgery.planning import Sites
from tests.patterns.nets import NETS
from tests.zoo import ZOO

SMALL = NETS | ZOO


def named(net: str, pattern: str, edge: str) -> list[str]:
    """Each edge of a net as `node`, for all users, or `node<operand`."""
    model = SMALL[net]
    matches = find(capture(model.build(), model.example()).view.graph, catalogue.load("patterns", pattern)).matches
    edges = [at for match in matches for at in match.edges(edge) or ()]
    return [at.node.name if at.operand is None else f"{at.node.name}<{at.operand}" for at in edges]


@pytest.mark.parametrize(
    ("net", "pattern", "edge", "expected"),
    [
        ("einsum_attention", "attention", "projection", ["out"]),
        ("einsum_attention", "attention", "probabilities", ["softmax"]),
        ("einsum_attention", "attention", "output", ["einsum_1"]),
        ("einsum_attention", "attention", "input", ["q<0", "k<0", "v<0"]),
        ("torch_attention", "attention", "projection", ["getitem"]),
        ("torch_attention", "attention", "input", ["attention<0"]),
        ("swiglu", "mlp", "hidden", ["mul"]),
        ("packed_glu", "mlp", "hidden", ["mul"]),
        ("packed_glu", "mlp", "output", ["down"]),
        ("gelu_written", "mlp", "hidden", ["mul_3"]),
        ("gates", "se_gate", "input", ["stem", "mul"]),
        ("gates", "se_gate", "output", ["mul", "mul_1"]),
        ("valid_unet", "double_conv", "between", ["down1_1", "down2_1", "bottom_1", "merge2_1", "merge1_1"]),
        ("valid_unet", "skip_concat", "skip", ["cat<(0, 0)", "cat_1<(0, 0)"]),
        ("valid_unet", "skip_concat", "upsampled", ["cat<(0, 1)", "cat_1<(0, 1)"]),
        ("dense", "dense_concat", "new", ["cat<(0, 1)", "cat_1<(0, 1)", "cat_2<(0, 1)"]),
        ("frozen", "conv_bn_act", "norm", ["add", "norm", "layer_norm"]),
        ("frozen", "conv_bn_act", "output", ["mul_2", "mul_3", "relu"]),
        ("heads", "classifier", "input", ["linear<0", "conv<0"]),
        ("patches", "stem", "input", ["reshape<0"]),
        ("pre_activation_written", "norm_act_conv", "conv", ["conv1<0"]),
        ("pre_activation_written", "norm_act_conv", "input", ["norm1<0"]),
    ],
)
def test_edge(net: str, pattern: str, edge: str, expected: list[str]) -> None:
    assert named(net, pattern, edge) == expected


def sites(model: str, pattern: str, edge: str) -> list[tuple[int, ...]]:
    captured = capture(make_model(model))
    return [site.shape for site in Sites(captured).of(pattern, edge)]


@pytest.mark.parametrize(
    ("model", "pattern", "edge", "shape"),
    [
        ("vit_tiny_patch16_224", "mlp", "hidden", (2, 197, 768)),
        ("vit_tiny_patch16_224", "attention", "projection", (2, 197, 192)),
        ("vit_tiny_patch16_224", "attention", "output", (2, 3, 197, 64)),
        ("vit_tiny_patch16_224", "patch_embed", "output", (2, 196, 192)),
        ("vit_tiny_patch16_224", "stem", "input", (2, 3, 224, 224)),
        ("vit_tiny_patch16_224", "classifier", "input", (2, 192)),
        ("convnextv2_atto", "mlp", "hidden", (2, 160, 56, 56)),
        ("efficientnet_b0", "classifier", "input", (2, 1280)),
        ("pvt_v2_b0", "patch_embed", "output", (2, 3136, 32)),
        ("smp:Unet:resnet18", "skip_concat", "skip", (2, 256, 14, 14)),
        ("smp:Unet:resnet18", "skip_concat", "upsampled", (2, 512, 14, 14)),
        ("densenet121", "dense_concat", "new", (2, 32, 56, 56)),
    ],
)
def test_first_site_has_the_shape(model: str, pattern: str, edge: str, shape: tuple[int, ...]) -> None:
    assert sites(model, pattern, edge)[0] == shape


def test_two_readers_of_the_image_share_one_site() -> None:
    model = NETS["two_readers"]
    (site,) = Sites(capture(model.build(), model.example())).of("stem", "input")
    assert site.shape == (2, 3, 32, 32)


def test_probabilities_say_why_they_are_not_there() -> None:
    reasons = []
    for net in ("torch_attention", "linear_attention"):
        model = NETS[net]
        found = find(capture(model.build(), model.example()).view.graph, catalogue.load("patterns", "attention"))
        miss = found.matches[0].edges("probabilities")
        assert isinstance(miss, Miss)
        reasons.append(miss.reason)
    assert reasons == [
        "probabilities of the attention are inside one call",
        "probabilities of the attention do not exist: it is linear, without a softmax",
    ]


@pytest.mark.parametrize(
    ("model", "kinds", "count"),
    [
        ("vit_tiny_patch16_224", ["linear", "activation"], 12),
        ("vit_tiny_patch16_224", ["layer_norm", "linear", "activation", "linear"], 12),
        ("vit_tiny_patch16_224", ["attention", "permute"], 12),
        ("efficientnet_b0", ["conv", "batch_norm", "activation"], 33),
        ("efficientnet_b0", ["batch_norm_act"], 33),
        ("efficientnet_b0", ["conv", "sigmoid", "mul"], 16),
        ("resnetv2_50", ["norm", "activation", "conv"], 44),
        ("nasnetalarge", ["conv", "norm"], 260),
        ("convnext_atto", ["conv", "layer_norm"], 13),
    ],
)
def test_declared_chains_on_real_models(model: str, kinds: list[str], count: int) -> None:
    graph = capture(make_model(model)).view.graph
    assert len(find(graph, chain("declared", kinds)).matches) == count


def test_group_norm_chain() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18", norm_layer="groupnorm")
    assert len(find(capture(model).view.graph, chain("gn", ["conv2d", "group_norm", "activation"])).matches) == 9
