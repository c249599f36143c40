from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from dropsurgery import SurgeryError, get_regularizer
from dropsurgery.capture import capture
from dropsurgery.capture.facts import annotate
from dropsurgery.models import make_model
from dropsurgery.planning import Sites
from tests.zoo import ZOO, BasicBlock, residual

FACTS = ("stage", "reduction", "depth", "block", "flow", "role", "channel_axis", "channels", "trainable")


@lru_cache(maxsize=4)
def timm_graph(name: str, **options: Any) -> fx.Graph:
    return capture(timm.create_model(name, **options)).view.graph


@lru_cache(maxsize=4)
def smp_graph(architecture: str, encoder: str) -> fx.Graph:
    net = getattr(smp, architecture)(encoder, encoder_weights=None)
    return capture(net, torch.zeros(1, 3, 224, 224)).view.graph


@lru_cache(maxsize=2)
def meta_graph(name: str) -> fx.Graph:
    return capture(make_model(name)).view.graph


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
        *((name, "resnet18") for name in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "DeepLabV3")),
        *((name, "resnet18") for name in ("DeepLabV3Plus", "PAN", "UPerNet", "Segformer")),
        ("Unet", "mit_b0"),
        ("Unet", "tu-hrnet_w18_small"),  # upsamples inside
        ("UPerNet", "tu-swin_tiny_patch4_window7_224"),
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


@pytest.mark.parametrize(("architecture", "encoder"), [("PSPNet", "resnet18"), ("DPT", "tu-vit_tiny_patch16_224")])
def test_roles_of_nets_that_leave_stages_out(architecture: str, encoder: str) -> None:
    graph = smp_graph(architecture, encoder)
    assert {node.meta["role"] for node in leaves(graph, "encoder.")} == {"encoder"}
    assert {node.meta["role"] for node in leaves(graph, "decoder.")} == {"decoder"}
    stages = {node.meta["stage"] for node in leaves(graph, "encoder.")}
    assert stages == ({0, 1, 2} if architecture == "PSPNet" else {None})


@pytest.mark.parametrize("name", ["pafpn", "bifpn"])
def test_a_second_way_down_is_decoder_too(name: str) -> None:
    graph = zoo_graph(name)
    assert {node.meta["role"] for node in leaves(graph, "backbone.")} == {"encoder"}
    assert {node.meta["role"] for node in leaves(graph, "neck." if name == "pafpn" else "convs.")} == {"decoder"}
    assert {node.meta["role"] for node in leaves(graph, "head")} == {"head"}


def test_the_pyramid_of_a_detector() -> None:
    with torch.device("meta"):
        net = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    graph = capture(net, torch.zeros(1, 3, 128, 128, device="meta")).view.graph
    assert [{n.meta["stage"] for n in leaves(graph, f"body.layer{index}.")} for index in (1, 2, 3, 4)] == [
        {1},
        {2},
        {3},
        {4},
    ]
    assert {node.meta["role"] for node in leaves(graph, "body.")} == {"encoder"}
    assert {node.meta["role"] for node in leaves(graph, "fpn.inner")} == {"decoder"}
    assert {node.meta["stage"] for node in leaves(graph, "fpn.")} == {None}


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


@pytest.mark.parametrize(("name", "count"), [("cells", 5), ("looped_stages", 7), ("wrapped", 3), ("shared_block", 3)])
def test_blocks_by_the_tree_of_modules(name: str, count: int) -> None:
    blocks = [node.meta["block"] for node in zoo_graph(name).nodes if "join" in node.meta]
    assert sorted(set(blocks)) == [(index, count) for index in range(count)]


def test_a_cell_is_a_block_as_a_whole() -> None:
    graph = zoo_graph("cells")
    for index in range(5):
        assert {node.meta["block"] for node in leaves(graph, f"cells.{index}.")} == {(index, 5)}


def test_the_cells_of_nasnet() -> None:
    graph = meta_graph("nasnetalarge")
    blocks = {node.meta["block"] for node in leaves(graph, "cell_8.")} | {
        node.meta["block"] for node in leaves(graph, "cell_17.")
    }
    assert blocks == {(11, 22), (21, 22)}  # two cells of the stem, 18, and one before each of the two later groups
    assert {node.meta["stage"] for node in leaves(graph, "reduction_cell_1.")} == {4}


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


def test_frozen_weights_passed_to_functions_are_seen() -> None:
    model = ZOO["functional_resnet"].build()
    model.get_parameter("weight").requires_grad_(False)
    graph = capture(model, ZOO["functional_resnet"].example()).view.graph
    trainable = [node.meta["trainable"] for node in graph.nodes if node.target is F.conv2d]
    assert trainable == [False]
    assert all(node.meta["trainable"] for node in leaves(graph, "conv"))
    thawed = zoo_graph("functional_resnet")
    assert [node.meta["trainable"] for node in thawed.nodes if node.target is F.conv2d] == [True]


class Parcel:
    """Something that no graph carries."""

    def __init__(self, inside: torch.Tensor) -> None:
        self.inside = inside


class Opaque(nn.Module):
    """Its forward stays Python; between its two parts it does nothing to the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.MaxPool2d(2), BasicBlock(8, 8), BasicBlock(8, 16, 2))
        self.pack, self.late = Pack(), nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 64, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.late(self.pack(self.early(x)).inside)


class Pack(nn.Module):
    def forward(self, x: torch.Tensor) -> Parcel:
        return Parcel(x)


def test_parts_of_an_opaque_net_go_on_from_each_other() -> None:
    view = capture(Opaque(), torch.zeros(1, 3, 64, 64)).view
    assert [part.path for part in view.opaque][:1] == [""]
    graph = view.graph
    entry = next(node for node in graph.nodes if node.op == "placeholder" and node.meta.get("component") == "late")
    entry.meta["continues"] = leaves(graph, "early.3.relu")[-1]
    annotate(graph)
    joins = [node for node in graph.nodes if "join" in node.meta]
    assert [node.meta["stage"] for node in joins] == [1, 2, 3, 4]
    assert [node.meta["reduction"] for node in joins] == [4, 8, 16, 32]
    assert [node.meta["block"] for node in joins] == [(index, 4) for index in range(4)]
    assert [node.meta["depth"] for node in joins] == [0, 1 / 3, 2 / 3, 1]


ONE_WAY = (*ZOO, "vit_tiny_patch16_224", "cait_xxs24_224", "nasnetalarge", "xcit_nano_12_p8_224", "focalnet_tiny_srf")


@pytest.mark.parametrize("name", ONE_WAY)
def test_no_operand_of_a_join_is_the_only_way(name: str) -> None:
    graph = zoo_graph(name) if name in ZOO else meta_graph(name)
    for node in graph.nodes:
        if "join" in node.meta:
            for operand in (0, 1):
                assert reaches_the_result(graph, node, operand), f"{node.meta['path']} without operand {operand}"


def reaches_the_result(graph: fx.Graph, join: fx.Node, cut: int) -> bool:
    """Whether a result depends on the values of the input when one operand of a join is taken away."""
    of_no_value = (torch.zeros_like, "new_zeros", "expand_as")
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        given = [argument for at, argument in enumerate(node.args) if not (node is join and at == cut)]
        sources: list[fx.Node] = []
        fx.map_arg((given, node.kwargs), sources.append)
        if node.op == "placeholder" or (node.target not in of_no_value and reached.intersection(sources)):
            reached.add(node)
    return any(node.op == "output" and node in reached for node in graph.nodes)


LAYOUTS = [
    ("swin_tiny_patch4_window7_224", "residual_add", "branch", {4: -1, 3: -1}),  # maps (B, H, W, C); tokens in MLPs
    ("vit_tiny_patch16_224", "residual_add", "branch", {3: -1}),
    ("convnext_atto", "residual_add", "branch", {4: 1}),
    ("resnet18", "conv_bn_act", "output", {4: 1}),
]


@pytest.mark.parametrize(("name", "pattern", "edge", "axes"), LAYOUTS)
@pytest.mark.parametrize("method", ["dropblock", "spatial_dropout"])
def test_regularizers_of_maps_get_the_channel_axis_or_refuse(
    method: str, name: str, pattern: str, edge: str, axes: dict[int, int]
) -> None:
    sites = Sites(capture(make_model(name))).of(pattern, edge)
    assert {len(site.shape): site.channel_axis for site in sites} == axes
    for site in sites:
        assert site.channel_axis is not None and site.channels == site.shape[site.channel_axis]
        layer = get_regularizer(method)(p=0.5)
        known = {"channel_axis": site.channel_axis, "channels": site.channels, "shape": site.shape, "site_id": site.id}
        if len(site.shape) == 4 or method == "spatial_dropout":  # tokens have channels, and no neighbours
            layer.build(**known)
            assert layer.channel_axis == site.channel_axis
            continue
        with pytest.raises(SurgeryError) as caught:
            layer.build(**known)
        assert site.id in str(caught.value) and str(site.shape) in str(caught.value)


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
