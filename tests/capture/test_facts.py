from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import fx, nn

from dropsurgery.capture import capture
from dropsurgery.capture.facts import annotate
from tests.zoo import ZOO, BasicBlock, residual

FACTS = ("stage", "reduction", "depth", "block", "flow", "role", "channel_axis", "channels", "trainable")


@lru_cache(maxsize=4)
def timm_graph(name: str, **options: Any) -> fx.Graph:
    return capture(timm.create_model(name, **options)).view.graph


@lru_cache(maxsize=4)
def smp_graph(architecture: str, encoder: str) -> fx.Graph:
    net = getattr(smp, architecture)(encoder, encoder_weights=None)
    return capture(net, torch.zeros(1, 3, 224, 224)).view.graph


def zoo_graph(name: str) -> fx.Graph:
    return capture(ZOO[name].build(), ZOO[name].example()).view.graph


def leaves(graph: fx.Graph, prefix: str) -> list[fx.Node]:
    found = [node for node in graph.nodes if node.op == "call_module" and str(node.target).startswith(prefix)]
    assert found, f"no leaf below {prefix}"
    return found


STAGES = [
    ("resnet50", {}, ["conv1 maxpool", "layer1.", "layer2.", "layer3.", "layer4."]),
    ("resnet50", {"output_stride": 8}, ["conv1 maxpool", "layer1.", "layer2.", "layer3.", "layer4."]),
    ("resnet50", {"output_stride": 16}, ["conv1 maxpool", "layer1.", "layer2.", "layer3.", "layer4."]),
    ("resnet18", {}, ["conv1 maxpool", "layer1.", "layer2.", "layer3.", "layer4."]),
    ("resnet50d", {}, ["conv1 maxpool", "layer1.", "layer2.", "layer3.", "layer4."]),
    ("regnety_002", {}, ["stem.", "s1.", "s2.", "s3.", "s4."]),
    ("resnetv2_50", {}, ["stem.", "stages.0", "stages.1", "stages.2", "stages.3"]),
    ("convnext_atto", {}, ["stem.", "stages.0.blocks", "stages.1", "stages.2", "stages.3"]),
    (
        "swin_tiny_patch4_window7_224",
        {},
        ["patch_embed.", "layers.0.blocks", "layers.1", "layers.2", "layers.3"],
    ),
    (
        "efficientnet_b0",
        {},
        ["conv_stem blocks.0", "blocks.1.1", "blocks.2", "blocks.3 blocks.4", "blocks.5 blocks.6"],
    ),
    (
        "efficientnet_b0",
        {"output_stride": 8},
        ["conv_stem blocks.0", "blocks.1.1", "blocks.2", "blocks.3 blocks.4", "blocks.5 blocks.6"],
    ),
    (
        "mobilenetv3_small_100",
        {},
        ["conv_stem", "blocks.0", "blocks.1.1", "blocks.2 blocks.3", "blocks.4 blocks.5"],
    ),
    ("mobilenetv4_conv_small", {}, ["conv_stem", "", "", "blocks.2.1", "blocks.3.1"]),
    ("densenet121", {}, ["features.pool0", *(f"features.denseblock{number}." for number in (1, 2, 3, 4))]),
    (
        "vgg11_bn",
        {},
        ["features.0 features.4", "features.8 features.11", "features.15", "features.22", "features.28"],
    ),
    ("levit_128s", {}, ["stem.", "stages.0.blocks", "stages.1", "stages.2"]),
]


@pytest.mark.parametrize(("name", "options", "prefixes"), STAGES)
def test_stages(name: str, options: dict[str, Any], prefixes: list[str]) -> None:
    graph = timm_graph(name, **options)
    for stage, both in enumerate(prefixes):
        for prefix in both.split():
            assert {node.meta["stage"] for node in leaves(graph, prefix)} == {stage}, prefix


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s32_224", "convmixer_768_32"])
def test_isotropic_nets_have_no_stages(name: str) -> None:
    assert {node.meta["stage"] for node in timm_graph(name).nodes} == {None}


def test_dilation_changes_the_reduction_but_no_other_fact() -> None:
    plain, dilated = timm_graph("resnet50"), timm_graph("resnet50", output_stride=8)
    different = {
        fact for a, b in zip(plain.nodes, dilated.nodes, strict=True) for fact in FACTS if a.meta[fact] != b.meta[fact]
    }
    assert different == {"reduction"}


@pytest.mark.parametrize("size", [28, 32, 64, 100])
def test_stages_do_not_hang_on_the_image_size(size: int) -> None:
    graph = capture(timm.create_model("resnet18"), torch.zeros(1, 3, size, size)).view.graph
    layer4 = leaves(graph, "layer4.1")
    assert {(node.meta["stage"], node.meta["reduction"], node.meta["role"]) for node in layer4} == {(4, 32, "backbone")}


def test_nets_for_small_images_count_from_their_first_block() -> None:
    graph = zoo_graph("small_image_resnet")
    assert [node.meta["stage"] for node in graph.nodes if "join" in node.meta] == [1, 1, 2, 2, 3, 3]


def test_dilation_stands_in_for_a_stride() -> None:
    graph = zoo_graph("dilated_resnet")
    assert [node.meta["stage"] for node in graph.nodes if "join" in node.meta] == [1, 1, 2, 2, 3, 3, 4, 4]
    wider = capture(residual((1, 2, 1, 1), (1, 1, 1, 1)), torch.zeros(1, 3, 64, 64)).view.graph
    assert {node.meta["stage"] for node in wider.nodes if "join" in node.meta} == {1, 2}


def test_reduction_and_channels() -> None:
    graph = timm_graph("resnet50")
    measured = {path: leaves(graph, path)[-1].meta for path in ("conv1", "layer1", "layer2", "layer3", "layer4")}
    assert [meta["reduction"] for meta in measured.values()] == [2, 4, 8, 16, 32]
    assert [meta["channels"] for meta in measured.values()] == [64, 256, 512, 1024, 2048]
    assert {meta["channel_axis"] for meta in measured.values()} == {1}


@pytest.mark.parametrize(
    ("name", "path", "axis", "channels", "reduction"),
    [
        ("convnext_atto", "stages.1.blocks.0.mlp.fc1", 1, 320, 8),
        ("convnext_tiny", "stages.1.blocks.0.mlp.fc1", -1, 768, 8),
        ("swin_tiny_patch4_window7_224", "layers.2.blocks.1.attn.proj", -1, 384, 16),
        ("swin_tiny_patch4_window7_224", "layers.2.blocks.1.mlp.fc1", -1, 1536, 16),
        ("vit_tiny_patch16_224", "patch_embed.proj", 1, 192, 16),
        ("vit_tiny_patch16_224", "blocks.3.attn.qkv", -1, 576, 16),
        ("pvt_v2_b0", "stages.1.blocks.0.mlp.dwconv", 1, 512, 8),
    ],
)
def test_channel_axis(name: str, path: str, axis: int, channels: int, reduction: int) -> None:
    meta = leaves(timm_graph(name), path)[0].meta
    assert (meta["channel_axis"], meta["channels"], meta["reduction"]) == (axis, channels, reduction)


def test_flow_of_a_bottleneck() -> None:
    graph = timm_graph("resnet50")
    flows = {str(node.target): node.meta["flow"] for node in leaves(graph, "layer3.0.")}
    assert {path for path, flow in flows.items() if flow == "shortcut"} == {
        "layer3.0.downsample.0",
        "layer3.0.downsample.1",
    }
    assert flows["layer3.0.conv1"] == flows["layer3.0.bn3"] == "branch"
    assert flows["layer3.0.act3"] == "trunk"
    assert {node.meta["flow"] for node in leaves(graph, "conv1")} == {"trunk"}


def test_shortcut_is_told_by_computation_not_by_position() -> None:
    joins = [node.meta["join"] for node in zoo_graph("functional_resnet").nodes if "join" in node.meta]
    assert [(join.branches, join.shortcut) for join in joins] == [((0,), 1), ((1,), 0)]


def test_the_innermost_join_decides_the_flow() -> None:
    graph = zoo_graph("shake_shake")
    inner = [node for node in graph.nodes if "join" in node.meta and node.meta["join"].shortcut is None]
    assert [node.meta["flow"] for node in inner] == ["branch", "branch"]


@pytest.mark.parametrize(
    ("architecture", "encoder"),
    [
        ("Unet", "resnet34"),
        ("FPN", "resnet34"),
        ("Unet", "mit_b0"),
        ("DeepLabV3", "resnet34"),
        ("PAN", "resnet18"),
    ],
)
def test_roles_of_segmentation_nets(architecture: str, encoder: str) -> None:
    graph = smp_graph(architecture, encoder)
    for part, roles in (
        ("encoder.", {"encoder"}),
        ("decoder.", {"decoder"}),
        ("segmentation_head.", {"head"}),
    ):
        assert {node.meta["role"] for node in leaves(graph, part)} == roles
    assert {node.meta["stage"] for node in leaves(graph, "decoder.")} == {None}
    assert {node.meta["stage"] for node in leaves(graph, "encoder.")} == {0, 1, 2, 3, 4}


def test_roles_of_a_classifier_and_of_a_lateral_connection() -> None:
    graph = timm_graph("efficientnet_b0")
    assert {node.meta["role"] for node in leaves(graph, "blocks.")} == {"backbone"}
    assert {node.meta["role"] for node in (*leaves(graph, "global_pool"), *leaves(graph, "classifier"))} == {"head"}
    pyramid = zoo_graph("pyramid")
    roles = {path: leaves(pyramid, path)[0].meta["role"] for path in ("layer2.first", "lateral1", "head")}
    assert roles == {"layer2.first": "encoder", "lateral1": "skip", "head": "head"}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet50", 16),
        ("vit_tiny_patch16_224", 12),
        ("convnext_atto", 12),
        ("swin_tiny_patch4_window7_224", 12),
    ],
)
def test_blocks_and_depth(name: str, count: int) -> None:
    graph = timm_graph(name)
    joins = [node.meta for node in graph.nodes if "join" in node.meta]
    assert sorted({meta["block"] for meta in joins}) == [(index, count) for index in range(count)]
    assert all(meta["depth"] == meta["block"][0] / (count - 1) for meta in joins)
    depths = [node.meta["depth"] for node in graph.nodes if node.meta["role"] == "backbone"]
    assert depths == sorted(depths) and depths[0] == 0 and depths[-1] == 1


def test_depth_without_residual_blocks_goes_by_owner() -> None:
    depths = [node.meta["depth"] for node in timm_graph("densenet121").nodes if node.meta["role"] is not None]
    assert len(set(depths)) > 50 and min(depths) == 0 and max(depths) == 1


def test_frozen_parameters_are_seen_downstream() -> None:
    model = timm.create_model("resnet18")
    model.layer2.requires_grad_(False)
    graph = capture(model).view.graph
    trainable = {str(node.target): node.meta["trainable"] for node in leaves(graph, "layer")}
    assert not trainable["layer2.1.bn2"] and not trainable["layer2.1.act2"]
    assert trainable["layer1.1.act2"] and trainable["layer3.0.conv1"]


def renamed(graph: fx.Graph, rename: Callable[[str], str]) -> None:
    for node in graph.nodes:
        for key in ("owner", "path"):
            node.meta[key] = ".".join(rename(part) for part in node.meta[key].split(".")) if node.meta[key] else ""


@pytest.mark.parametrize("name", sorted(ZOO))
def test_names_do_not_matter(name: str) -> None:
    graph = zoo_graph(name)
    before = [[node.meta[fact] for fact in FACTS] for node in graph.nodes if node.op != "output"]
    output = next(node for node in graph.nodes if node.op == "output")
    output.meta.update(owner="", path="")
    renamed(graph, lambda part: f"x{sum(map(ord, part)) * 7919}{part[::-1]}")
    annotate(graph)
    assert [[node.meta[fact] for fact in FACTS] for node in graph.nodes if node.op != "output"] == before


def test_work_grows_linearly_with_depth() -> None:
    def visits(blocks: int) -> int:
        """How often annotation reads a node's inputs, which every walk over the graph does."""
        stem = nn.Conv2d(3, 8, 3, 2, 1)
        graph = capture(
            nn.Sequential(stem, *(BasicBlock(8, 8) for _ in range(blocks))), torch.zeros(1, 3, 8, 8)
        ).view.graph
        count = 0
        original = fx.Node.all_input_nodes

        def counted(self: fx.Node) -> list[fx.Node]:
            nonlocal count
            count += 1
            return original.__get__(self)  # type: ignore[no-any-return]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fx.Node, "all_input_nodes", property(counted))
            annotate(graph)
        return count

    assert visits(40) < 4.5 * visits(10)
